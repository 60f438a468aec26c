"""``tpatch export``: the corrected model, as the stock transformers library reads it."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

from tyro.conf import Positional, arg

from tpatch_jax.cli.common import Json, ModelName, Quiet, load
from tpatch_jax.display.console import format_count, print_json, progress_bar, result_console
from tpatch_jax.requests import EditRequest

if TYPE_CHECKING:
    from tpatch_jax.models.model import Model

__all__ = ["Approximate", "Export", "ExportMemory", "export_corrected"]

Approximate = Annotated[bool, arg(help="where the architecture has no biases, fold them away and measure the error")]
ExportMemory = Annotated[str | None, arg(help="with --approximate: a text file to fit and measure on")]


@dataclass(frozen=True)
class Export:
    """Write the corrected model for the stock transformers library."""

    model: ModelName
    patches: Annotated[
        Positional[str | None],
        arg(metavar="PATCHES", help="a folder that `tpatch edit` wrote; none if MODEL has them merged"),
    ] = None
    _: KW_ONLY
    output: Annotated[str, arg(aliases=["-o"], metavar="OUT", help="folder for the model")]
    approximate: Approximate = False
    memory: ExportMemory = None
    dtype: Annotated[str | None, arg(help="float32 or bfloat16; as given to `tpatch edit`")] = None
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Merge the patches, write the model, and say how it differs from the uncorrected one."""
        from tpatch_jax.bank.patches import check_model, read_patches, saved_requests
        from tpatch_jax.models.patching import merge
        from tpatch_jax.storage.files import check_vacant

        check_vacant(Path(self.output))
        saved = read_patches(self.patches) if self.patches else None
        model, requests = load(self.model, self.dtype, self.quiet or self.json), []
        if saved:
            check_model(saved, model)
            model = merge(model, saved.patches)
            held = [one["held"] for one in saved.edits]
            requests = [one for one, holds in zip(saved_requests(saved), held, strict=True) if holds]
        export_corrected(model, self, requests)


class ExportOptions(Protocol):
    """The parameters of the commands that export."""

    @property
    def output(self) -> str: ...
    @property
    def approximate(self) -> bool: ...
    @property
    def memory(self) -> str | None: ...
    @property
    def json(self) -> bool: ...
    @property
    def quiet(self) -> bool: ...


def export_corrected(model: "Model", options: ExportOptions, requests: Sequence[EditRequest]) -> None:
    """Write a corrected model as the options say, and say how it differs from the uncorrected one.

    Args:
        model: the model with its patches merged.
        options: the parameters of the command.
        requests: what has to hold in what is written.
    """
    from rich.markup import escape

    from tpatch_jax.models.checkpoints.export import export_model

    with progress_bar(options.quiet or options.json) as report:
        info = export_model(
            model,
            options.output,
            approximate=options.approximate,
            requests=requests,
            memory=options.memory,
            progress=report,
        )
    if options.json:
        print_json({"output": options.output, **info.to_json()})
        return
    console = result_console()
    console.print(
        f"{format_count(info.neurons, 'neuron')} in {options.output}, {info.form}: transformers loads it as a "
        f"{info.model_type}",
        markup=False,
    )
    console.print(
        f"all layers are {info.ffn_width} wide, by {info.silent_neurons:,} silent neurons; "
        f"{info.parameters_added:,} parameters ({info.share:.3%}) and {info.bytes_added:,} bytes more than "
        "uncorrected"
    )
    if error := info.error:
        console.print(
            f"over {error.tokens:,} tokens of text, logits differ by {error.max_logit_difference:.3g} at most and "
            f"{error.mean_logit_difference:.3g} on average; {error.same_argmax:.2%} of the most probable next "
            f"tokens are the same; {len(error.held)} of {len(error.held) + len(error.lost)} requests still hold"
        )
        for name in error.lost:
            console.print(f"[red]lost[/red] {escape(name)}")
