"""``tpatch bank add``: fits requests and commits them."""

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from tpatch_jax.cli.bank.common import BankFolder, ModelPlace, load_banked, show_lines
from tpatch_jax.cli.common import Form, Join, Json, Prompt, Quiet, RequestsFile, Subject, System, Target, requests_of
from tpatch_jax.display.console import print_json, progress_bar
from tpatch_jax.errors import TPatchError

if TYPE_CHECKING:
    from tpatch_jax.bank.adding import AddInfo
    from tpatch_jax.bank.method import Engine
    from tpatch_jax.bank.state import Bank

__all__ = ["Add"]

SHOWN = 20
"""So many ids of new edits are printed at most."""


@dataclass(frozen=True)
class Add:
    """Fit requests beside what is active, check everything, and commit batch after batch."""

    bank: BankFolder
    requests: RequestsFile = None
    _: KW_ONLY
    prompt: Prompt = None
    target: Target = None
    subject: Subject = None
    join: Join = None
    form: Form = None
    system: System = None
    batch: Annotated[int, arg(help="so many requests are fitted together and committed at once")] = 50
    resume: Annotated[bool, arg(help="pass over what the bank already holds: go on after an interruption")] = False
    force: Annotated[bool, arg(help="let guarded answers change")] = False
    model: ModelPlace = None
    seed: Annotated[int, arg(help="the same seed gives the same patches")] = 0
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Add the requests, and show what became of each."""
        from pathlib import Path

        from tpatch_jax.bank.adding import add_with
        from tpatch_jax.bank.editing import add_edits
        from tpatch_jax.bank.guards import refused_by_guards
        from tpatch_jax.bank.inspection import open_bank

        requests = requests_of(
            self.requests, (self.prompt, self.target, self.subject), "add", self.join, self.form, self.system
        )
        bank = open_bank(self.bank)
        if not self.force and len(refused_by_guards(requests, bank.guards)) == len(requests):
            # That no request can be taken in is known without the model.
            self._show(add_with(Path(self.bank), requests, _no_engine, batch=self.batch, resume=self.resume))
            return
        model = load_banked(bank, self.model, self.quiet or self.json)
        with progress_bar(self.quiet or self.json) as report:
            info = add_edits(
                self.bank,
                model,
                requests,
                batch=self.batch,
                resume=self.resume,
                force=self.force,
                seed=self.seed,
                progress=report,
            )
        self._show(info)

    def _show(self, info: "AddInfo") -> None:
        if self.json:
            print_json(_added_json(info))
        else:
            _show_added(self.bank, info)
        if info.failed and not (info.added or info.already or info.skipped):
            raise TPatchError(f"nothing is added to {self.bank}: every request failed, for the reasons given")


def _no_engine(bank: "Bank") -> "Engine":
    raise AssertionError("a guarded prompt needs no engine")


def _show_added(folder: str, info: "AddInfo") -> None:
    from rich.markup import escape

    place, more = escape(folder), len(info.added) - SHOWN
    show_lines(
        [
            f"added to {place}: {len(info.added)} (batches: {len(info.batches)}, {info.seconds:.1f} s)",
            *(escape(name) for name in info.added[:SHOWN]),
            *([f"and {more} more; see `tpatch bank list {place}`"] * (more > 0)),
            *([f"{info.skipped} were there already"] if info.skipped else []),
            *(f"{escape(new)} supersedes {escape(old)}" for old, new in info.superseded),
            *([f"fitted again: {escape(', '.join(info.refitted))}"] if info.refitted else []),
            *(f"[red]failed[/red] {escape(name)}: {escape(reason)}" for name, _, _, reason in info.failed),
            *(f"[red]broken[/red] {escape(name)}" for name in info.broken),
            *(f"[red]changed[/red] the guarded answer after {escape(prompt)!r}" for prompt in info.guards_broken),
        ]
    )


def _added_json(info: "AddInfo") -> dict[str, Any]:
    return {
        "added": list(info.added),
        "already": list(info.already),
        "superseded": [{"id": old, "by": new} for old, new in info.superseded],
        "refitted": list(info.refitted),
        "gave_way": list(info.gave_way),
        "failed": [dict(zip(("id", "prompt", "target", "reason"), entry, strict=True)) for entry in info.failed],
        "skipped": info.skipped,
        "broken": list(info.broken),
        "guards_broken": list(info.guards_broken),
        "batches": [
            {"added": added, "active": active, "seconds": round(seconds, 3)} for added, active, seconds in info.batches
        ],
        "seconds": round(info.seconds, 3),
    }
