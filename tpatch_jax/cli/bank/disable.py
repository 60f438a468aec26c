"""``tpatch bank disable``: leaves edits out."""

from dataclasses import dataclass

from tpatch_jax.cli.bank.common import ChangeEdits

__all__ = ["Disable"]


@dataclass(frozen=True)
class Disable(ChangeEdits):
    """Leave edits out for a while."""

    def run(self) -> None:
        """Change the edits and show their states."""
        self.change("disable")
