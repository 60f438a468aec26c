"""``tpatch prune``: fewer neurons for the same edits."""

from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from tpatch_jax.cli.common import Dtype, Json, MemoryText, Quiet, load
from tpatch_jax.display.console import format_count, print_json, progress_bar, result_console
from tpatch_jax.errors import TPatchError

if TYPE_CHECKING:
    from tpatch_jax.editors.base import EditInfo
    from tpatch_jax.models.model import Model
    from tpatch_jax.requests import EditRequest

__all__ = ["Prune"]


@dataclass(frozen=True)
class Prune:
    """Write a folder of patches with fewer neurons for the same edits; what is pruned stays as it is."""

    patches: Annotated[
        Positional[str], arg(metavar="PATCHES", help="a folder that `tpatch edit` wrote, or a bank of T-Patcher edits")
    ]
    _: KW_ONLY
    output: Annotated[str, arg(aliases=["-o"], metavar="OUT", help="folder for the pruned patches")]
    model: Annotated[str | None, arg(help="the model that they are for, if it is not where it was")] = None
    memory: MemoryText = None
    dtype: Dtype = None
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Prune, write, and say what it saved."""
        from rich.markup import escape

        from tpatch_jax.bank.patches import save_patches
        from tpatch_jax.editors.pruning import prune_patches
        from tpatch_jax.storage.files import check_vacant

        check_vacant(Path(self.output))
        model, patches, requests, info = self._read()
        with progress_bar(self.quiet or self.json) as report:
            fewer, info, pruned = prune_patches(model, patches, requests, info, memory=self.memory, progress=report)
        save_patches(self.output, model, fewer, requests, info)
        if self.json:
            print_json({"output": self.output, **pruned.to_json()})
            return
        console = result_console()
        console.print(
            f"{format_count(pruned.neurons, 'neuron')} of {pruned.neurons_before} are left in {self.output}: "
            f"{pruned.merged} were merged into others, {pruned.dropped} dropped, {pruned.levelled} made one of two",
            markup=False,
        )
        console.print(
            f"{pruned.parameters:,} of {pruned.parameters_before:,} parameters, {pruned.bytes:,} of "
            f"{pruned.bytes_before:,} bytes"
        )
        console.print(
            f"checked: {format_count(pruned.edits, 'edit')} after {pruned.prompts} prompts, {pruned.kept} prompts "
            f"that should stay, {pruned.memory:,} queries of unrelated text; no edit was lost"
        )
        for name in pruned.restored:
            console.print(f"{escape(name)} keeps all its neurons")

    def _read(self) -> "tuple[Model, Any, list[EditRequest], EditInfo]":
        """Model, patches, requests and what became of them, of a folder or of a bank."""
        from tpatch_jax.bank.layout import is_bank
        from tpatch_jax.bank.patches import check_model, read_patches, saved_info, saved_requests

        quiet = self.quiet or self.json
        if is_bank(Path(self.patches)):
            return self._read_bank(quiet)
        saved = read_patches(self.patches)
        dtype = self.dtype or saved.model.get("dtype")
        model = load(self.model or str(saved.model.get("name")), dtype, quiet)
        check_model(saved, model)
        return model, saved.patches, saved_requests(saved), saved_info(saved)

    def _read_bank(self, quiet: bool) -> "tuple[Model, Any, list[EditRequest], EditInfo]":
        from tpatch_jax.bank.assembly import Store, assemble
        from tpatch_jax.bank.editing import bank_patch
        from tpatch_jax.bank.inspection import open_bank
        from tpatch_jax.bank.state import active
        from tpatch_jax.cli.bank.common import load_banked
        from tpatch_jax.editors.base import EditInfo, RequestInfo

        if self.dtype is not None:
            raise TPatchError(
                f"{self.patches} is a bank, which knows in which precision its model is; leave --dtype out"
            )
        bank = open_bank(self.patches)
        model = load_banked(bank, self.model, quiet)
        patches, held = bank_patch(self.patches, model), assemble(bank, active(bank), Store.new())
        last, counts, results = model.layer(None), dict.fromkeys(patches, 0), []
        neurons: list[dict[int, list[int]]] = [{} for _ in held.edits]
        for owner, named in zip(held.owner.tolist(), held.neurons["layer"].tolist(), strict=True):
            layer = last if named < 0 else named
            neurons[owner].setdefault(layer, []).append(counts[layer])
            counts[layer] += 1
        for edit, some in zip(held.edits, neurons, strict=True):
            results.append(
                RequestInfo(
                    edit.id,
                    held=True,
                    status=str(edit.evidence.get("status", "edited")),
                    neurons={layer: tuple(places) for layer, places in some.items()},
                    steps=int(edit.evidence.get("steps", 0)),
                    margin=edit.evidence.get("margin"),
                    site=str(edit.evidence.get("site", "last")),
                    continuation=edit.request.continuation,
                )
            )
        info = EditInfo(tuple(results), 0.0, 0.0, 0.0, 0.0, 0)
        return model, patches, [replace(edit.request, id=edit.id) for edit in held.edits], info
