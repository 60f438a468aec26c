"""``tpatch export``: the corrected model, as the stock transformers library reads it, or as a GGUF file."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

from tyro.conf import Positional, arg

from tpatch_jax.cli.common import Json, ModelName, Quiet, load
from tpatch_jax.cli.merge import InPlace, replace_in, show_replaced
from tpatch_jax.display.console import format_count, print_json, progress_bar, result_console
from tpatch_jax.errors import TPatchError
from tpatch_jax.requests import EditRequest

if TYPE_CHECKING:
    from tpatch_jax.models.model import Model

__all__ = [
    "Approximate",
    "Export",
    "ExportFormat",
    "ExportMemory",
    "SafeFor",
    "TensorType",
    "check_export",
    "export_corrected",
]

ExportFormat = Annotated[
    Literal["transformers", "gguf"],
    arg(metavar="{transformers,gguf}", help="a folder for transformers, or a GGUF file for llama.cpp"),
]
TensorType = Annotated[
    Literal["keep", "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] | None,
    arg(
        metavar="{keep,f32,f16,bf16,q8_0,q5_1,q5_0,q4_1,q4_0}",
        help="with --format gguf: how matrices are stored; by default as they are in MODEL",
    ),
]

Approximate = Annotated[bool, arg(help="where the architecture has no biases, fold them away and measure the error")]
ExportMemory = Annotated[
    str | None, arg(help="with --approximate, --safe-for or --in-place-of-unused: a text file to fit and measure on")
]
SafeFor = Annotated[
    Literal["per-tensor"] | None,
    arg(metavar="per-tensor", help="patches that outlive INT8 with one scale for each matrix; measure what it costs"),
]


UNSAFE = 1.5
"""Where a patch's largest weight is so many times the network's own, INT8 per tensor loses half a bit and more."""


@dataclass(frozen=True)
class Export:
    """Write the corrected model for the stock transformers library, or as a GGUF file for llama.cpp."""

    model: ModelName
    patches: Annotated[
        Positional[str | None],
        arg(metavar="PATCHES", help="a folder that `tpatch edit` wrote; none if MODEL has them merged"),
    ] = None
    _: KW_ONLY
    output: Annotated[str, arg(aliases=["-o"], metavar="OUT", help="folder for the model, or NAME.gguf")]
    format: ExportFormat = "transformers"
    type: TensorType = None
    approximate: Approximate = False
    safe_for: SafeFor = None
    in_place_of_unused: InPlace = False
    memory: ExportMemory = None
    dtype: Annotated[str | None, arg(help="float32, bfloat16 or int8; as given to `tpatch edit`")] = None
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Merge the patches, write the model, and say how it differs from the uncorrected one."""
        from tpatch_jax.bank.patches import check_model, read_patches, saved_requests
        from tpatch_jax.models.patching import merge
        from tpatch_jax.models.quantising import dequantize_base

        if self.in_place_of_unused:
            self._export_in_place()
            return
        check_export(self, self.model)
        saved = read_patches(self.patches) if self.patches else None
        model, requests = load(self.model, self.dtype, self.quiet or self.json), []
        if saved:
            check_model(saved, model)
            model = merge(dequantize_base(model), saved.patches)
            held = [one["held"] for one in saved.edits]
            requests = [one for one, holds in zip(saved_requests(saved), held, strict=True) if holds]
        export_corrected(model, self, requests)

    def _export_in_place(self) -> None:
        """Replace the least-used neurons, and write a folder of the very shapes that the uncorrected model has."""
        from tpatch_jax.bank.patches import check_model, read_patches
        from tpatch_jax.models.checkpoints.export import export_model
        from tpatch_jax.models.checkpoints.replacing import write_replaced
        from tpatch_jax.models.quantising import dequantize_base
        from tpatch_jax.storage.files import replace_folder

        if self.patches is None or self.format == "gguf" or self.approximate or self.safe_for:
            raise TPatchError(
                "--in-place-of-unused goes with PATCHES and --format transformers, without --approximate and "
                "--safe-for; of what it wrote `tpatch export FOLDER --format gguf` makes a GGUF file"
            )
        check_export(self, self.model)
        saved, quiet = read_patches(self.patches), self.quiet or self.json
        model = load(self.model, self.dtype, quiet)
        check_model(saved, model)
        corrected, replaced = replace_in(dequantize_base(model), saved, self.memory, quiet)
        with replace_folder(Path(self.output)) as temporary:
            info = export_model(corrected, temporary)
            write_replaced(temporary, replaced)
        if self.json:
            print_json({"output": self.output, **info.to_json(), **replaced.to_json()})
        else:
            show_replaced(replaced, self.output)


class ExportOptions(Protocol):
    """The parameters of the commands that export."""

    @property
    def output(self) -> str: ...
    @property
    def format(self) -> Literal["transformers", "gguf"]: ...
    @property
    def type(self) -> str | None: ...
    @property
    def approximate(self) -> bool: ...
    @property
    def safe_for(self) -> Literal["per-tensor"] | None: ...
    @property
    def memory(self) -> str | None: ...
    @property
    def json(self) -> bool: ...
    @property
    def quiet(self) -> bool: ...


def check_export(options: ExportOptions, model: str) -> None:
    """Make sure that the options belong together and that the output can be written, before a model is loaded.

    Args:
        options: the parameters of the command.
        model: what the user calls the model.

    Raises:
        TPatchError: they do not, or it cannot.
    """
    from tpatch_jax.storage.files import check_vacant

    path = Path(options.output)
    if options.format == "gguf":
        from tpatch_jax.models.checkpoints.gguf_export import KEEP, check_gguf_output

        if options.approximate or options.memory is not None:
            raise TPatchError("--approximate and --memory are for --format transformers; a GGUF file is always exact")
        if options.safe_for is not None:
            raise TPatchError(
                "--safe-for is for --format transformers; the types of GGUF have a scale for every 16 to 256 weights, "
                "which patches survive"
            )
        check_gguf_output(path, model, options.type or KEEP)
        return
    if options.type is not None:
        raise TPatchError("--type is for --format gguf; give that, too, or leave it out")
    if path.suffix.lower() == ".gguf":
        raise TPatchError(f"{path} names a GGUF file, and a folder would be written; give --format gguf, too")
    check_vacant(path)


def export_corrected(model: "Model", options: ExportOptions, requests: Sequence[EditRequest]) -> None:
    """Write a corrected model as the options say, and say how it differs from the uncorrected one.

    Args:
        model: the model with its patches merged.
        options: the parameters of the command.
        requests: what has to hold in what is written.
    """
    from rich.markup import escape

    if options.format == "gguf":
        _export_gguf(model, options)
        return
    from tpatch_jax.models.checkpoints.export import export_model

    with progress_bar(options.quiet or options.json) as report:
        info = export_model(
            model,
            options.output,
            approximate=options.approximate,
            safe_for=options.safe_for,
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
    if info.safe_for:
        if info.split_neurons:
            console.print(
                f"{format_count(info.split_neurons, 'neuron')} share values that would set the scale of all others"
            )
        count = len(info.held_rounded) + len(info.lost_rounded)
        console.print(f"in INT8 with one scale for each matrix {len(info.held_rounded)} of {count} requests hold")
        for name in info.lost_rounded:
            console.print(f"[red]lost[/red] {escape(name)}")
    elif info.weight_excess > UNSAFE:
        console.print(
            f"[yellow]not safe for INT8 per tensor[/yellow]: the largest weight of the patches is "
            f"{info.weight_excess:.0f} times the network's largest; quantise per channel, or give --safe-for per-tensor"
        )


def _export_gguf(model: "Model", options: ExportOptions) -> None:
    """Write a GGUF file, and say what it holds."""
    from tpatch_jax.models.checkpoints.gguf_export import KEEP, export_gguf

    with progress_bar(options.quiet or options.json) as report:
        info = export_gguf(model, options.output, type=options.type or KEEP, progress=report)
    if options.json:
        print_json({"output": options.output, **info.to_json()})
        return
    console = result_console()
    console.print(
        f"{format_count(info.neurons, 'neuron')} in {options.output}, for llama.cpp: {info.architecture}, "
        + ("types as they were" if info.type == KEEP else f"matrices in {info.type}"),
        markup=False,
    )
    console.print(
        f"all layers are {info.ffn_width} wide, by {info.silent_neurons:,} silent neurons; {info.bytes:,} bytes, "
        f"{info.bytes_added:+,}"
    )
    console.print(
        f"{info.copied} tensors are copied, {info.widened} hold the original's blocks and more, {info.added} are new "
        f"biases, {info.converted} are converted; the patches' weights are rounded by {info.rounding:.2%}"
    )
