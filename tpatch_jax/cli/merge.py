"""``tpatch merge``: a model with patches among its parameters."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from tpatch_jax.cli.common import Json, ModelName, Patches, Quiet, load
from tpatch_jax.display.console import format_count, print_json, result_console

__all__ = ["Merge"]


@dataclass(frozen=True)
class Merge:
    """Write the patched model as a folder that only this library reads; for transformers use `tpatch export`."""

    model: ModelName
    patches: Patches
    output: Annotated[str, arg(aliases=["-o"], metavar="OUT", help="folder for the model")]
    dtype: Annotated[str | None, arg(help="float32, bfloat16 or int8; as given to `tpatch edit`")] = None
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Merge, write, and say what was added."""
        from tpatch_jax.bank.patches import check_model, read_patches
        from tpatch_jax.core.layers import count_neurons
        from tpatch_jax.models.model import save_model
        from tpatch_jax.models.patching import merge
        from tpatch_jax.models.quantising import dequantize_base
        from tpatch_jax.storage.files import check_vacant

        check_vacant(Path(self.output))
        saved = read_patches(self.patches)
        model = load(self.model, self.dtype, self.quiet or self.json)
        check_model(saved, model)
        # The plain weights that those in INT8 stand for, through which the edits were fitted.
        model = dequantize_base(model)
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
