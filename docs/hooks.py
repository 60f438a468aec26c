"""What the documentation needs besides its pages: examples shown as code, and every public name in the reference."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError
from mkdocstrings import Inventory

PUBLIC_MODULES = (
    "bank.repair",
    "bank.sharing",
    "editors.registry",
    "editors.tpatcher.learning",
    "editors.tpatcher.start_file",
    "evaluation.metrics",
    "evaluation.records",
    "evaluation.report",
    "evaluation.runner",
    "evaluation.sweep",
    "core.ffn",
    "core.fit",
    "core.memory",
    "core.objective",
    "core.patch",
    "core.start",
)
"""The modules whose every name in ``__all__`` is public, beside the names of ``tpatch_jax`` itself."""


class Examples(griffe.Extension):
    """Shows what stands under ``Example:`` as code; griffe takes only ``Examples:`` for that."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Griffe calls this for every object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)


def public_names() -> list[str]:
    """The full path of every public name."""
    names = [f"tpatch_jax.{name}" for name in import_module("tpatch_jax").__all__]
    for module in PUBLIC_MODULES:
        names += [f"tpatch_jax.{module}.{name}" for name in import_module(f"tpatch_jax.{module}").__all__]
    return names


def missing_names(site: Path) -> list[str]:
    """The public names that a built site has no entry for."""
    with (site / "objects.inv").open("rb") as file:
        documented = set(Inventory.parse_sphinx(file, domain_filter=["py"]))
    return [name for name in public_names() if name not in documented]


def on_post_build(config: Any) -> None:
    """MkDocs calls this when the site is written."""
    if missing := missing_names(Path(config["site_dir"])):
        raise PluginError(f"the API reference lacks {', '.join(missing)}; add them to a page in docs/api")
