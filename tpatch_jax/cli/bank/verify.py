"""``tpatch bank verify``: whether every edit still comes out."""

from dataclasses import dataclass, replace

from tpatch_jax.cli.bank.common import BankFolder, ModelPlace, load_banked, show_lines
from tpatch_jax.cli.common import Json, Quiet
from tpatch_jax.cli.verify import Forms, check_measured, forms_json, measure_banked, show_forms
from tpatch_jax.display.console import print_json, progress_bar

__all__ = ["Verify"]


@dataclass(frozen=True)
class Verify:
    """Read every active edit's prompt again and see whether its target comes out."""

    bank: BankFolder
    forms: Forms = None
    model: ModelPlace = None
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Check, and name what is broken."""
        from rich.markup import escape

        from tpatch_jax.bank.editing import bank_model, verify_bank
        from tpatch_jax.bank.inspection import open_bank
        from tpatch_jax.bank.state import active

        check_measured(self.forms, 0)
        bank = open_bank(self.bank)
        model = load_banked(bank, self.model, self.quiet or self.json)
        with progress_bar(self.quiet or self.json) as report:
            info = verify_bank(self.bank, model, progress=report)
        told = {name: list(v) if isinstance(v, tuple) else v for name, v in info._asdict().items()}
        free = None
        if self.forms is not None:
            requests = [replace(edit.request, id=edit.id) for edit in active(bank)]
            free = measure_banked(self.bank, model, bank_model(self.bank, model), requests, self.forms)
        if self.json:
            print_json({**(forms_json(*free) if free else {}), **told})
            return
        kept = f"{info.guards - len(info.guards_broken)} of {info.guards} guarded answers are kept"
        show_lines(
            [
                f"{info.checked - len(info.broken)} of {info.checked} edits come out",
                *([kept] if info.guards else []),
                *(f"[red]broken[/red] {escape(name)}" for name in info.broken),
                *(f"[red]changed[/red] the guarded answer after {escape(prompt)!r}" for prompt in info.guards_broken),
            ]
        )
        if free:
            show_forms(f"{self.bank}: free answers", *free)
