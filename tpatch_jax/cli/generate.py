"""``tpatch generate``: what a model says, with or without patches."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from tpatch_jax.cli.common import Json, ModelName, Quiet, load
from tpatch_jax.display.console import print_json, result_console
from tpatch_jax.errors import TPatchError

__all__ = ["Generate"]


@dataclass(frozen=True)
class Generate:
    """Continue a text greedily, answer a question or name a label: whatever the model does, with or without patches."""

    model: ModelName
    prompt: Annotated[str, arg(help="the text to continue, answer or classify")]
    patches: Annotated[str | None, arg(help="patches to attach")] = None
    max_new_tokens: Annotated[int, arg(help="at most so many tokens are added")] = 32
    dtype: Annotated[str | None, arg(help="float32 or bfloat16")] = None
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Attach the patches, and print the prompt and the answer."""
        from rich.text import Text

        from tpatch_jax.bank.patches import check_model, read_patches
        from tpatch_jax.models.patching import attach

        if self.max_new_tokens < 1:
            raise TPatchError(f"--max-new-tokens {self.max_new_tokens} generates nothing; give 1 or more")
        saved = read_patches(self.patches) if self.patches else None
        model = load(self.model, self.dtype, self.quiet or self.json)
        if saved:
            check_model(saved, model)
            model = attach(model, saved.patches)
        if model.config.labels:
            text = model.classify([self.prompt])[0]
        else:
            text = model.generate(self.prompt, self.max_new_tokens)
        if self.json:
            print_json({"prompt": self.prompt, "text": text})
        else:
            # A decoder goes on where the prompt ends; the others answer.
            between = "" if model.config.architecture == "decoder" else "\n"
            result_console().print(Text.assemble((self.prompt, "dim"), between, text), soft_wrap=True)
