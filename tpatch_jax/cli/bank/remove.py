"""``tpatch bank remove``: takes edits out."""

from dataclasses import dataclass

from tpatch_jax.cli.bank.common import ChangeEdits

__all__ = ["Remove"]


@dataclass(frozen=True)
class Remove(ChangeEdits):
    """Take edits out for good; the last ones without a trace in what the model says."""

    def run(self) -> None:
        """Change the edits and show their states."""
        self.change("remove")
