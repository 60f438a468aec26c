"""What several ``tpatch bank`` commands share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from tpatch_jax.cli.common import Json, Quiet
from tpatch_jax.display.console import print_json, progress_bar, result_console
from tpatch_jax.requests import place_fields

if TYPE_CHECKING:
    from tpatch_jax.bank.changing import ChangeInfo
    from tpatch_jax.bank.state import Bank, BankEdit
    from tpatch_jax.models.model import Model

__all__ = ["BankFolder", "ChangeEdits", "ModelPlace", "edit_json", "load_banked", "show_copied", "show_lines"]

BankFolder = Annotated[Positional[str], arg(metavar="BANK", help="the bank's folder")]
Ids = Annotated[Positional[tuple[str, ...]], arg(metavar="ID…", help="as `tpatch bank list` shows them")]
ModelPlace = Annotated[str | None, arg(help="where the bank's model is now, if it moved")]


def show_lines(lines: Sequence[str]) -> None:
    """Print lines of markup, none of which is broken in two."""
    console = result_console()
    for line in lines:
        console.print(line, soft_wrap=True)


def load_banked(bank: "Bank", model: str | None, quiet: bool) -> "Model":
    """Load the model of a bank."""
    from tpatch_jax.bank.creating import load_banked_model
    from tpatch_jax.storage.process import prepare_process

    prepare_process()
    return load_banked_model(bank, model, quiet=quiet)


def edit_json(edit: "BankEdit", state: str) -> dict[str, Any]:
    """An edit as ``--json`` shows it."""
    request = edit.request
    entry: dict[str, Any] = {"id": edit.id, "prompt": request.prompt, "target": request.target, "state": state}
    if request.subject is not None:
        entry["subject"] = request.subject
    entry.update(place_fields(request))
    neurons = len(edit.fits[-1][1]) if edit.fits else 0
    return {**entry, "neurons": neurons, "fits": len(edit.fits), "added": edit.added, **edit.evidence}


def show_copied(target: str, source: str, lines: int, json: bool) -> None:
    """Say by how much a copy of a bank grew."""
    from rich.markup import escape

    if json:
        print_json({"lines": lines})
    else:
        show_lines([escape(f"{target} grew by {lines} lines from {source}")])


@dataclass(frozen=True)
class ChangeEdits:
    """The parameters of the commands that disable, enable or remove edits, and what all three do."""

    bank: BankFolder
    ids: Ids
    model: ModelPlace = None
    json: Json = False
    quiet: Quiet = False

    def change(self, kind: Literal["disable", "enable", "remove"]) -> None:
        """Change the edits and show their states."""
        from tpatch_jax.bank import editing
        from tpatch_jax.bank.changing import check_named, undoes_last
        from tpatch_jax.bank.inspection import open_bank
        from tpatch_jax.bank.state import find

        check_named(self.bank, kind, self.ids)
        bank = open_bank(self.bank)
        edits = find(bank, self.ids)
        # What only undoes the last additions needs no model.
        exact = kind == "remove" and not any(edit.removed for edit in edits) and undoes_last(bank, self.ids)
        model = None if exact else load_banked(bank, self.model, self.quiet or self.json)
        functions = {"disable": editing.disable_edits, "enable": editing.enable_edits, "remove": editing.remove_edits}
        with progress_bar(self.quiet or self.json) as report:
            info = functions[kind](self.bank, self.ids, model, progress=report)
        if self.json:
            print_json(_changed_json(info))
        else:
            _show_changed(info)


def _show_changed(info: "ChangeInfo") -> None:
    from rich.markup import escape

    show_lines(
        [
            *(f"{escape(name)} is {state}" for name, state in info.states.items()),
            *([] if info.states else ["nothing to change"]),
            *([f"fitted again: {escape(', '.join(info.refitted))}"] if info.refitted else []),
            *(f"[red]broken[/red] {escape(name)}" for name in info.broken or ()),
            *(f"[red]changed[/red] the guarded answer after {escape(prompt)!r}" for prompt in info.guards_broken or ()),
        ]
    )


def _changed_json(info: "ChangeInfo") -> dict[str, Any]:
    broken, changed = (None if names is None else list(names) for names in (info.broken, info.guards_broken))
    states = {"ids": list(info.ids), "states": info.states, "refitted": list(info.refitted)}
    return {**states, "broken": broken, "guards_broken": changed}
