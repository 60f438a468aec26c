"""``tpatch bank``: the name of a group of commands."""

from dataclasses import dataclass

from tpatch_jax.cli.common import Json, Quiet
from tpatch_jax.errors import TPatchError

__all__ = ["Bank"]


@dataclass(frozen=True)
class Bank:
    """Patches that last: a folder of edits with undo, which survives crashes; `tpatch bank --help`."""

    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Never reached by `tpatch_jax.cli.main.main`, which parses what follows ``bank`` by its table."""
        raise TPatchError("tpatch bank: a command is missing; `tpatch bank --help` lists them")
