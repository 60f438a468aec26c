"""``tpatch bank pull``: a bank brought up to date from a copy of it."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from tpatch_jax.cli.bank.common import BankFolder, show_copied
from tpatch_jax.cli.common import Json, Quiet

__all__ = ["Pull"]


@dataclass(frozen=True)
class Pull:
    """Bring the bank up to date from another copy of it, or make it."""

    bank: BankFolder
    source: Annotated[Positional[str], arg(metavar="SOURCE", help="a bank's folder, or hf://owner/name")]
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Copy what is new, and say how much that was."""
        from tpatch_jax.bank.sharing import pull_bank

        show_copied(self.bank, self.source, pull_bank(self.bank, self.source), self.json)
