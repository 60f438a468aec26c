"""``tpatch generate``: what a model says, with or without patches."""

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from tpatch_jax.cli.common import Json, Quiet, Texts, load
from tpatch_jax.display.console import print_json, result_console
from tpatch_jax.errors import TPatchError

if TYPE_CHECKING:
    from tpatch_jax.models.model import Model

__all__ = ["Generate"]

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
    max_new_tokens: Annotated[int, arg(help="at most so many tokens are added")] = 32
    dtype: Annotated[str | None, arg(help="float32 or bfloat16")] = None
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
        model = self._load()
        answers = []
        for first in range(0, len(prompts), LANES):
            part = prompts[first : first + LANES]
            labels = model.config.labels
            answers += model.classify(part) if labels else model.generate(part, self.max_new_tokens)
        if self.json:
            each = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, answers, strict=True)]
            print_json(each[0] if len(each) == 1 else {"answers": each})
            return
        console = result_console()
        # A decoder goes on where the prompt ends; the others answer.
        between = "" if model.config.architecture == "decoder" else "\n"
        for number, (prompt, text) in enumerate(zip(prompts, answers, strict=True)):
            if number:
                console.print()
            console.print(Text.assemble((prompt, "dim"), between, text), soft_wrap=True)

    def _load(self) -> "Model":
        """The model, with the patches or the bank's edits attached."""
        from tpatch_jax.bank.editing import bank_model
        from tpatch_jax.bank.inspection import open_bank
        from tpatch_jax.bank.patches import check_model, read_patches
        from tpatch_jax.cli.bank.common import load_banked
        from tpatch_jax.models.patching import attach

        quiet = self.quiet or self.json
        if self.bank is not None:
            if self.patches is not None:
                raise TPatchError("give either --patches or --bank, not both")
            bank = open_bank(self.bank)
            wanted = bank.manifest["model"]["dtype"]
            if self.dtype not in (None, wanted):
                raise TPatchError(f"{self.bank} is for its model in {wanted}; leave --dtype out")
            return bank_model(self.bank, load_banked(bank, self.model, quiet))
        if self.model is None:
            raise TPatchError("no model is given; name one, or give a --bank, which knows its own")
        saved = read_patches(self.patches) if self.patches else None
        model = load(self.model, self.dtype, quiet)
        if saved is None:
            return model
        check_model(saved, model)
        return attach(model, saved.patches)


def _read_prompts(path: str) -> list[str]:
    """The lines of a text file that hold anything."""
    from tpatch_jax.storage.reading import read_text

    try:
        text = read_text(path, "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TPatchError(f"the prompts in {path} cannot be read ({error}); give a UTF-8 text file") from None
    return [line for line in text.split("\n") if line.strip()]
