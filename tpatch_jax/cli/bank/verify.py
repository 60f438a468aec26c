"""``tpatch bank verify``: whether every edit still comes out."""

from dataclasses import dataclass

from tpatch_jax.cli.bank.common import BankFolder, ModelPlace, load_banked, show_lines
from tpatch_jax.cli.common import Json, Quiet
from tpatch_jax.display.console import print_json, progress_bar

__all__ = ["Verify"]


@dataclass(frozen=True)
class Verify:
    """Read every active edit's prompt again and see whether its target comes out."""

    bank: BankFolder
    model: ModelPlace = None
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Check, and name what is broken."""
        from rich.markup import escape

        from tpatch_jax.bank.editing import verify_bank
        from tpatch_jax.bank.inspection import open_bank

        model = load_banked(open_bank(self.bank), self.model, self.quiet or self.json)
        with progress_bar(self.quiet or self.json) as report:
            info = verify_bank(self.bank, model, progress=report)
        if self.json:
            print_json({name: list(v) if isinstance(v, tuple) else v for name, v in info._asdict().items()})
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
