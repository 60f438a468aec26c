"""Public modules that stand elsewhere now: the old names work, and warn.

Each line of `MOVED` is one such module. They go in version 0.3.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["MOVED", "install"]

MOVED = {
    "tpatch_jax.ffn": "tpatch_jax.core.ffn",
    "tpatch_jax.fitting": "tpatch_jax.core.fit",
    "tpatch_jax.memory": "tpatch_jax.core.memory",
    "tpatch_jax.objective": "tpatch_jax.core.objective",
    "tpatch_jax.patch": "tpatch_jax.core.patch",
}
"""From a module's old name to the new one."""


class _Moved(MetaPathFinder, Loader):
    """Finds a module under its old name, which then holds the public names of the new one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the import system asks of every finder."""
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Fill the old name's module, and warn."""
        new = MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is {new} now; the old name goes in 0.3", DeprecationWarning, stacklevel=2)
        source = import_module(new)
        vars(module).update({name: getattr(source, name) for name in source.__all__}, __all__=source.__all__)


def install() -> None:
    """Let the old names be imported."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
