"""``tpatch bank show``: one edit and what happened to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import Positional, arg

from tpatch_jax.cli.bank.common import BankFolder, edit_json, show_lines
from tpatch_jax.cli.common import Json, Quiet
from tpatch_jax.display.console import print_json

__all__ = ["Show"]


@dataclass(frozen=True)
class Show:
    """Show one edit: what was asked, the evidence, and what happened to it since."""

    bank: BankFolder
    name: Annotated[Positional[str], arg(metavar="ID", help="an edit")]
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Print the edit and the lines of the journal that name it."""
        from rich.markup import escape

        from tpatch_jax.bank.inspection import open_bank
        from tpatch_jax.bank.state import find, states

        bank = open_bank(self.bank)
        (edit,) = find(bank, [self.name])
        entry = edit_json(edit, states(bank)[self.name])
        history = [
            {"n": record["n"], "op": record["op"], "time": record["time"], "who": record["who"]}
            for record in bank.records
            if _names(record, self.name)
        ]
        if self.json:
            print_json({**entry, "history": history})
            return
        show_lines([f"[bold]{key}[/bold] {escape(str(value))}" for key, value in entry.items()])
        show_lines([f"line {line['n']}: {line['op']} {line['time']} by {escape(line['who'])}" for line in history])


def _names(record: Mapping[str, Any], name: str) -> bool:
    """Whether a line of the journal is about an edit."""
    return (
        name in record.get("ids", ())
        or any(name == entry["id"] for key in ("edits", "refitted") for entry in record.get(key, ()))
        or any(name in (entry["id"], entry["by"]) for entry in record.get("superseded", ()))
        or name in record.get("gave_way", ())
    )
