"""``tpatch bank merge``: the model with all active edits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from tpatch_jax.cli.bank.common import BankFolder, ModelPlace, load_banked, show_lines
from tpatch_jax.cli.common import Json, Quiet
from tpatch_jax.display.console import format_count, print_json

__all__ = ["MergeBank"]


@dataclass(frozen=True)
class MergeBank:
    """Write the model with all active edits inside its feed-forward networks."""

    bank: BankFolder
    output: Annotated[str, arg(aliases=["-o"], metavar="OUT", help="folder for the model")]
    model: ModelPlace = None
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Merge, write, and say what was added."""
        from rich.markup import escape

        from tpatch_jax.bank.editing import bank_patch
        from tpatch_jax.bank.inspection import open_bank
        from tpatch_jax.core.layers import count_neurons
        from tpatch_jax.models.model import save_model
        from tpatch_jax.models.patching import merge
        from tpatch_jax.models.quantising import dequantize_base
        from tpatch_jax.storage.files import check_vacant

        check_vacant(Path(self.output))
        model = load_banked(open_bank(self.bank), self.model, self.quiet or self.json)
        patches, model = bank_patch(self.bank, model), dequantize_base(model)
        neurons, merged = count_neurons(patches), merge(model, patches)
        save_model(merged, self.output)
        added = merged.parameter_count - model.parameter_count
        if self.json:
            print_json({"output": self.output, "neurons": neurons, "parameters_added": added})
        else:
            count = format_count(neurons, "neuron")
            show_lines([f"{count} merged ({added:,} parameters) into {escape(self.output)}"])
