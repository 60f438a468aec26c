"""``tpatch bank log``: the journal."""

from dataclasses import dataclass

from tpatch_jax.cli.bank.common import BankFolder, show_lines
from tpatch_jax.cli.common import Json, Quiet
from tpatch_jax.display.console import print_json

__all__ = ["Log"]


@dataclass(frozen=True)
class Log:
    """Show the journal: what was done, when, and by whom."""

    bank: BankFolder
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Print every line of the journal in words."""
        from rich.markup import escape

        from tpatch_jax.bank.inspection import open_bank

        bank = open_bank(self.bank)
        if self.json:
            print_json({"records": [dict(record) for record in bank.records]})
            return
        for record in bank.records:
            what = ", ".join(entry["id"] for entry in record.get("edits", ())) or ", ".join(record.get("ids", ()))
            what = what or ", ".join(entry["prompt"] for entry in record.get("guards", ()))
            more = [f"{len(record[key])} {key}" for key in ("superseded", "refitted", "failed") if record.get(key)]
            who = f"{record['n']:>5} {record['time']} {escape(record['who'])}"
            show_lines([f"{who} {record['op']:8} {escape(what)} {'; '.join(more)}".rstrip()])
