"""``tpatch bank enable``: brings edits back."""

from dataclasses import dataclass

from tpatch_jax.cli.bank.common import ChangeEdits

__all__ = ["Enable"]


@dataclass(frozen=True)
class Enable(ChangeEdits):
    """Bring disabled edits back."""

    def run(self) -> None:
        """Change the edits and show their states."""
        self.change("enable")
