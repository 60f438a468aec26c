"""``tpatch bank push``: a copy of a bank brought up to date."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from tpatch_jax.cli.bank.common import BankFolder, show_copied
from tpatch_jax.cli.common import Json, Quiet

__all__ = ["Push"]


@dataclass(frozen=True)
class Push:
    """Bring another copy of the bank up to date, or make it."""

    bank: BankFolder
    target: Annotated[Positional[str], arg(metavar="TARGET", help="a folder, or hf://owner/name")]
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Copy what is new, and say how much that was."""
        from tpatch_jax.bank.sharing import push_bank

        show_copied(self.target, self.bank, push_bank(self.bank, self.target), self.json)
