"""``tpatch bank guard``: answers that edits must not change."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated

from tyro.conf import arg

from tpatch_jax.cli.bank.common import BankFolder, ModelPlace, load_banked, show_lines
from tpatch_jax.cli.common import Json, Quiet, Texts
from tpatch_jax.display.console import print_json
from tpatch_jax.errors import TPatchError

__all__ = ["Guard"]


@dataclass(frozen=True)
class Guard:
    """Have the bank keep answers: `add` leaves out what would change one. Without options, list them."""

    bank: BankFolder
    _: KW_ONLY
    prompt: Annotated[Texts, arg(metavar="TEXT", help="a prompt that must keep its answer; may be repeated")] = ()
    answer: Annotated[str | None, arg(help="of a single prompt; by default the sentence that the model says now")] = (
        None
    )
    file: Annotated[str | None, arg(metavar="FILE", help="JSON lines of prompts and targets to keep")] = None
    tokens: Annotated[int, arg(help="so many tokens at most, where no sentence ends before")] = 24
    lift: Annotated[Texts, arg(metavar="TEXT", help="a prompt to guard no longer; may be repeated")] = ()
    model: ModelPlace = None
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Guard and lift, and print all guards."""
        from rich.markup import escape

        from tpatch_jax.bank.editing import guard_bank
        from tpatch_jax.bank.inspection import open_bank
        from tpatch_jax.storage.request_file import read_requests

        if self.answer is not None and len(self.prompt) != 1:
            raise TPatchError(
                "--answer belongs to exactly one --prompt; put several into a --file of prompts and targets"
            )
        wanted: list[str | tuple[str, str]] = list(self.prompt)
        if self.answer is not None:
            wanted = [(self.prompt[0], self.answer)]
        if self.file is not None:
            wanted += [(request.prompt, request.target) for request in read_requests(self.file)]
        model = load_banked(open_bank(self.bank), self.model, self.quiet or self.json) if wanted else None
        guards = guard_bank(self.bank, model, wanted, tokens=self.tokens, lift=self.lift)
        if self.json:
            print_json({"guards": [guard._asdict() for guard in guards]})
            return
        lines = [f"{escape(guard.prompt)} [bold]{escape(guard.answer.strip())}[/bold]" for guard in guards]
        show_lines(lines or ["none"])
