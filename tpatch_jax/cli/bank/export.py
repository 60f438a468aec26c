"""``tpatch bank export``: the corrected model, as the stock transformers library reads it."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from tpatch_jax.cli.bank.common import BankFolder, ModelPlace, load_banked
from tpatch_jax.cli.common import Json, Quiet
from tpatch_jax.cli.export import Approximate, ExportMemory, export_corrected

__all__ = ["ExportBank"]


@dataclass(frozen=True)
class ExportBank:
    """Write the model with all active edits for the stock transformers library."""

    bank: BankFolder
    _: KW_ONLY
    output: Annotated[str, arg(aliases=["-o"], metavar="OUT", help="folder for the model")]
    approximate: Approximate = False
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
        from tpatch_jax.storage.files import check_vacant

        check_vacant(Path(self.output))
        bank = open_bank(self.bank)
        model = load_banked(bank, self.model, self.quiet or self.json)
        merged = merge(model, bank_patch(self.bank, model))
        export_corrected(merged, self, [edit.request for edit in active(bank)])
