"""``tpatch generate``: what a model says, with or without patches."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from tpatch_jax.cli.common import Json, Quiet, System, Texts, load
from tpatch_jax.display.console import print_json, result_console
from tpatch_jax.errors import TPatchError

if TYPE_CHECKING:
    from tpatch_jax.bank.state import Bank
    from tpatch_jax.models.model import Model

__all__ = ["Generate", "load_base", "load_edited"]

LANES = 16
"""So many prompts are continued together."""


@dataclass(frozen=True)
class Generate:
    """Continue texts greedily, answer questions or name labels: whatever the model does, with or without patches."""

    model: Annotated[
        Positional[str | None],
        arg(metavar="MODEL", help="a name from `tpatch models`, a folder, or a hub id; by default that of --bank"),
    ] = None
    _: KW_ONLY
    prompt: Annotated[Texts, arg(metavar="TEXT", help="a text to continue, answer or classify; may be repeated")] = ()
    file: Annotated[str | None, arg(metavar="FILE", help="a text file of prompts, one a line")] = None
    patches: Annotated[str | None, arg(help="patches to attach")] = None
    bank: Annotated[str | None, arg(metavar="BANK", help="a bank whose active edits are attached")] = None
    chat: Annotated[bool, arg(help="ask each prompt as a user's turn, in the model's chat template")] = False
    system: System = None
    max_new_tokens: Annotated[int, arg(help="at most so many tokens are added")] = 32
    dtype: Annotated[str | None, arg(help="float32, bfloat16 or int8; as given to `tpatch edit`")] = None
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Attach the edits, and print each prompt with its answer."""
        from rich.text import Text

        if self.max_new_tokens < 1:
            raise TPatchError(f"--max-new-tokens {self.max_new_tokens} generates nothing; give 1 or more")
        prompts = [*self.prompt, *(_read_prompts(self.file) if self.file is not None else ())]
        if not prompts:
            raise TPatchError(
                "there is nothing to continue; give --prompt, which may be repeated, or a --file of prompts"
            )
        if self.system is not None and not self.chat:
            raise TPatchError("--system belongs to a chat; give --chat, too, or leave it out")
        model = load_edited(self.model, self.patches, self.bank, self.dtype, self.quiet or self.json)
        answers = self._answer(model, prompts)
        if self.json:
            each = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, answers, strict=True)]
            print_json(each[0] if len(each) == 1 else {"answers": each})
            return
        console = result_console()
        # A decoder goes on where the prompt ends; the others answer, and so does a chat.
        between = "" if model.config.architecture == "decoder" and not self.chat else "\n"
        for number, (prompt, text) in enumerate(zip(prompts, answers, strict=True)):
            if number:
                console.print()
            console.print(Text.assemble((prompt, "dim"), between, text), soft_wrap=True)

    def _answer(self, model: "Model", prompts: Sequence[str]) -> list[str]:
        """What the model says to each prompt, batch after batch."""
        from tpatch_jax.models.chat import as_messages, chat_stops, check_chat, encode_chat, render_chat
        from tpatch_jax.models.sentences import continue_rows

        if self.chat:
            check_chat(model)
            told = (as_messages(prompt, self.system, f"prompt {number}") for number, prompt in enumerate(prompts))
            rows = [encode_chat(model, render_chat(model, messages)) for messages in told]
            said = continue_rows(model, rows, self.max_new_tokens, lanes=LANES, stops=chat_stops(model))
            return [model.continuation(row, tokens).strip() for row, tokens in zip(rows, said, strict=True)]
        answers = []
        for first in range(0, len(prompts), LANES):
            part = prompts[first : first + LANES]
            answers += model.classify(part) if model.config.labels else model.generate(part, self.max_new_tokens)
        return answers


def load_edited(name: str | None, patches: str | None, bank: str | None, dtype: str | None, quiet: bool) -> "Model":
    """A model that a command names, with the patches or the bank's edits attached."""
    from tpatch_jax.bank.editing import bank_model
    from tpatch_jax.bank.inspection import open_bank
    from tpatch_jax.bank.patches import check_model, read_patches
    from tpatch_jax.models.patching import attach

    if bank is not None:
        return bank_model(bank, load_base(open_bank(bank), name, patches, dtype, quiet))
    if name is None:
        raise TPatchError("no model is given; name one, or give a --bank, which knows its own")
    saved = read_patches(patches) if patches else None
    model = load(name, dtype, quiet)
    if saved is None:
        return model
    check_model(saved, model)
    return attach(model, saved.patches)


def load_base(bank: "Bank", name: str | None, patches: str | None, dtype: str | None, quiet: bool) -> "Model":
    """The model that a bank is for, without its edits."""
    from tpatch_jax.cli.bank.common import load_banked

    if patches is not None:
        raise TPatchError("give either --patches or --bank, not both")
    wanted = bank.manifest["model"]["dtype"]
    if dtype not in (None, wanted):
        raise TPatchError(f"{bank.folder} is for its model in {wanted}; leave --dtype out")
    return load_banked(bank, name, quiet)


def _read_prompts(path: str) -> list[str]:
    """The lines of a text file that hold anything."""
    from tpatch_jax.storage.reading import read_text

    try:
        text = read_text(path, "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TPatchError(f"the prompts in {path} cannot be read ({error}); give a UTF-8 text file") from None
    return [line for line in text.split("\n") if line.strip()]
