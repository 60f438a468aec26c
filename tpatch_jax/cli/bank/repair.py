"""``tpatch bank repair``: damaged files mended."""

from dataclasses import dataclass

from tpatch_jax.cli.bank.common import BankFolder, show_lines
from tpatch_jax.cli.common import Json, Quiet
from tpatch_jax.display.console import print_json

__all__ = ["Repair"]


@dataclass(frozen=True)
class Repair:
    """Mend damaged files from their second copy; what was damaged is kept aside."""

    bank: BankFolder
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Mend, and say what was damaged and what is lost."""
        from rich.markup import escape

        from tpatch_jax.bank.repair import repair_bank

        info = repair_bank(self.bank)
        if self.json:
            print_json(info._asdict())
            return
        again = f"tpatch bank add {self.bank} {info.lost_requests}"
        show_lines(
            [
                *(f"mended {escape(path)}" for path in info.mended),
                *([] if info.mended or info.lost_edits or info.lost_lines else ["nothing was damaged"]),
                *([f"[red]{info.lost_lines} lines of the journal are lost[/red]"] if info.lost_lines else []),
                *(f"[red]lost[/red] {escape(name)}" for name in info.lost_edits),
                *([f"add what was active again: {escape(again)}"] if info.lost_requests else []),
            ]
        )
