"""``tpatch bank export``: the corrected model, as the stock transformers library reads it, or as a GGUF file."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated

from tyro.conf import arg

from tpatch_jax.cli.bank.common import BankFolder, ModelPlace, load_banked
from tpatch_jax.cli.common import Json, Quiet
from tpatch_jax.cli.export import (
    Approximate,
    ExportFormat,
    ExportMemory,
    SafeFor,
    TensorType,
    check_export,
    export_corrected,
)

__all__ = ["ExportBank"]


@dataclass(frozen=True)
class ExportBank:
    """Write the model with all active edits for the stock transformers library, or as a GGUF file for llama.cpp."""

    bank: BankFolder
    _: KW_ONLY
    output: Annotated[str, arg(aliases=["-o"], metavar="OUT", help="folder for the model, or NAME.gguf")]
    format: ExportFormat = "transformers"
    type: TensorType = None
    approximate: Approximate = False
    safe_for: SafeFor = None
    memory: ExportMemory = None
    model: ModelPlace = None
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Merge the active edits, write the model, and say how it differs from the uncorrected one."""
        from tpatch_jax.bank.editing import bank_patch
        from tpatch_jax.bank.inspection import open_bank
        from tpatch_jax.bank.state import active
        from tpatch_jax.models.patching import merge
        from tpatch_jax.models.quantising import dequantize_base

        bank = open_bank(self.bank)
        check_export(self, self.model or bank.manifest["model"]["name"])
        model = load_banked(bank, self.model, self.quiet or self.json)
        merged = merge(dequantize_base(model), bank_patch(self.bank, model))
        export_corrected(merged, self, [edit.request for edit in active(bank)])
