"""``tpatch merge``: a model with patches among its parameters."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from tpatch_jax.cli.common import Json, ModelName, Patches, Quiet, load
from tpatch_jax.display.console import format_count, print_json, progress_bar, result_console
from tpatch_jax.errors import TPatchError

if TYPE_CHECKING:
    from tpatch_jax.bank.patches import SavedPatches
    from tpatch_jax.models.checkpoints.replacing import Replaced
    from tpatch_jax.models.model import Model

__all__ = ["InPlace", "Merge", "replace_in", "show_replaced"]

InPlace = Annotated[bool, arg(help="put the neurons in the place of those that the model uses least: it does not grow")]


@dataclass(frozen=True)
class Merge:
    """Write the patched model as a folder that only this library reads; for transformers use `tpatch export`."""

    model: ModelName
    patches: Patches
    output: Annotated[str, arg(aliases=["-o"], metavar="OUT", help="folder for the model")]
    in_place_of_unused: InPlace = False
    memory: Annotated[str | None, arg(help="with --in-place-of-unused: a text file to measure use on")] = None
    dtype: Annotated[str | None, arg(help="float32, bfloat16 or int8; as given to `tpatch edit`")] = None
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Merge, write, and say what was added."""
        from tpatch_jax.bank.patches import check_model, read_patches
        from tpatch_jax.core.layers import count_neurons
        from tpatch_jax.models.checkpoints.replacing import write_replaced
        from tpatch_jax.models.model import save_model
        from tpatch_jax.models.patching import merge
        from tpatch_jax.models.quantising import dequantize_base
        from tpatch_jax.storage.files import check_vacant, replace_folder

        if self.memory is not None and not self.in_place_of_unused:
            raise TPatchError("--memory is for --in-place-of-unused; give that, too, or leave it out")
        check_vacant(Path(self.output))
        saved = read_patches(self.patches)
        model = load(self.model, self.dtype, self.quiet or self.json)
        check_model(saved, model)
        # The plain weights that those in INT8 stand for, through which the edits were fitted.
        model = dequantize_base(model)
        if self.in_place_of_unused:
            merged, replaced = replace_in(model, saved, self.memory, self.quiet or self.json)
            with replace_folder(Path(self.output)) as temporary:
                save_model(merged, temporary)
                write_replaced(temporary, replaced)
            if self.json:
                print_json(
                    {
                        "output": self.output,
                        "neurons": count_neurons(saved.patches),
                        "parameters_added": 0,
                        **replaced.to_json(),
                    }
                )
            else:
                show_replaced(replaced, self.output)
            return
        merged = merge(model, saved.patches)
        save_model(merged, self.output)
        neurons, added = count_neurons(saved.patches), merged.parameter_count - model.parameter_count
        if self.json:
            print_json({"output": self.output, "neurons": neurons, "parameters_added": added})
        else:
            line = f"{format_count(neurons, 'neuron')} merged ({added:,} parameters) into {self.output}"
            result_console().print(line, markup=False)
            note = "this library reads it, as MODEL of any command; for transformers use  tpatch export"
            result_console().print(note, markup=False)


def replace_in(model: "Model", saved: "SavedPatches", memory: str | None, quiet: bool) -> "tuple[Model, Replaced]":
    """Put saved patches in the place of a model's least-used neurons, and measure what it costs.

    Args:
        model: without them.
        saved: the patches and their requests.
        memory: a text file to measure use on.
        quiet: show no progress.
    """
    from tpatch_jax.bank.patches import saved_requests
    from tpatch_jax.models.checkpoints.replacing import replace_unused

    held = [one["held"] for one in saved.edits]
    requests = [one for one, holds in zip(saved_requests(saved), held, strict=True) if holds]
    with progress_bar(quiet) as report:
        return replace_unused(model, saved.patches, requests=requests, memory=memory, progress=report)


def show_replaced(replaced: "Replaced", output: str) -> None:
    """Print what patches took the place of, and what it cost.

    Args:
        replaced: what `tpatch_jax.replace_unused` returned.
        output: the folder that was written.
    """
    from rich.markup import escape

    console = result_console()
    for layer, neurons in sorted(replaced.neurons.items()):
        console.print(f"{format_count(len(neurons), 'neuron')} of layer {layer} replaced in {output}", markup=False)
    how = "exactly" if replaced.exact else "nearly: the network has no biases, and none are added"
    console.print(
        f"the patches are {how}; tp.unmerge(tp.load_model({output!r})) takes them out, bit for bit", markup=False
    )
    if replaced.perplexity:
        before, after = replaced.perplexity
        console.print(f"perplexity of held-out memory text {before:.4g}, {after:.4g} after ({after / before - 1:+.2%})")
    console.print(f"{len(replaced.held)} of {len(replaced.held) + len(replaced.lost)} requests hold")
    for name in replaced.lost:
        console.print(f"[red]lost[/red] {escape(name)}")
