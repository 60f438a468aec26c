"""``tpatch bank list``: every edit and its state."""

from dataclasses import dataclass

from tpatch_jax.cli.bank.common import BankFolder, edit_json
from tpatch_jax.cli.common import Json, Quiet
from tpatch_jax.display.console import format_count, print_json, result_console, result_table

__all__ = ["List"]


@dataclass(frozen=True)
class List:
    """List every edit and its state: active, disabled, superseded, removed or lost."""

    bank: BankFolder
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Print a line for each edit."""
        from rich.text import Text

        from tpatch_jax.bank.inspection import open_bank
        from tpatch_jax.bank.state import states

        bank = open_bank(self.bank)
        by_id = states(bank)
        entries = [edit_json(edit, by_id[edit.id]) for edit in bank.edits]
        if self.json:
            guards = [guard._asdict() for guard in bank.guards]
            print_json({"model": dict(bank.manifest["model"]), "edits": entries, "guards": guards})
            return
        columns = ("id", "prompt", "target", "state", "neurons")
        title = f"{self.bank}: {format_count(len(entries), 'edit')} of {bank.manifest['model']['name']}"
        table = result_table(title, columns)
        for entry in entries:
            table.add_row(*(Text(str(entry[column])) for column in columns))
        result_console().print(table)
