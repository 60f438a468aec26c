"""Which edits a model still says: the very one that was corrected, or whatever others have made of it.

Patches may be beside the model, merged into it, or written into a folder or a GGUF file and quantised afterwards. Only
the first two are recognised by their weights; anything else is asked as it is.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tpatch_jax.bank.inspection import open_bank
from tpatch_jax.bank.layout import is_bank
from tpatch_jax.bank.patches import read_patches, saved_requests
from tpatch_jax.bank.state import active
from tpatch_jax.core.arguments import as_path
from tpatch_jax.core.devices import automatically
from tpatch_jax.core.layers import LayerPatches
from tpatch_jax.editors.holding import asked_row
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.fingerprint import fingerprint
from tpatch_jax.models.model import Model, check_loaded
from tpatch_jax.models.patching import attach, detach, unmerge
from tpatch_jax.models.shapes import merged_neurons
from tpatch_jax.requests import EditRequest

__all__ = ["AskedModel", "KnownEdits", "place_edits", "read_edits"]


class KnownEdits(NamedTuple):
    """Edits as a folder of patches or a bank keeps them.

    Attributes:
        folder: it.
        requests: those that held when they were made; of a bank, those that are active.
        model: the name, fingerprint, dtype and width of the model that they were made for.
        patches: the neurons; ``None`` of a bank.
    """

    folder: Path
    requests: list[EditRequest]
    model: dict[str, Any]
    patches: LayerPatches | None


class AskedModel(NamedTuple):
    """A model that shall say some edits.

    Attributes:
        model: what is asked.
        unedited: the same without the edits; ``None`` if it is not at hand.
        state: ``"attached"``, the model was the one that the edits were made for, and they were put beside it;
            ``"merged"``, they are among its weights, which are else that model's; ``"as it is"``, its weights are
            others, or the neurons that are merged into it.
    """

    model: Model
    unedited: Model | None
    state: str


def read_edits(folder: str | Path) -> KnownEdits:
    """What a folder of patches or a bank says about its edits.

    Args:
        folder: it.

    Raises:
        TPatchError: it is neither, or it is damaged, or none of its edits held.
    """
    folder = as_path(folder, "read_edits(folder)", "a folder; give its path")
    if is_bank(folder):
        bank = open_bank(folder)
        requests = [replace(edit.request, id=edit.id) for edit in active(bank)]
        if not requests:
            raise TPatchError(f"{folder} has no active edit, so there is nothing to verify")
        return KnownEdits(folder, requests, dict(bank.manifest["model"]), None)
    saved = read_patches(folder)
    held = [one["held"] for one in saved.edits]
    requests = [one for one, holds in zip(saved_requests(saved), held, strict=True) if holds]
    if not requests:
        raise TPatchError(f"no edit of {folder} held when it was made, so there is nothing to verify")
    return KnownEdits(folder, requests, dict(saved.model), saved.patches)


@automatically
def place_edits(edits: KnownEdits, model: Model, base: Model | None = None) -> AskedModel:
    """The model that is asked for edits: with them beside it if it is the one that they were made for.

    Args:
        edits: what `read_edits` returned.
        model: any model: that one, one with the edits among its weights, or what was made of it, quantised or not.
        base: the model that the edits were made for, to compare with; by default it is taken from `model`, where that
            is possible.

    Raises:
        TPatchError: the model is of another size, or `base` is not the one that the edits were made for.
    """
    check_loaded(model, "place_edits(edits, model)")
    wanted = edits.model["fingerprint"]
    for name, here in (("width", model.config.hidden_size), ("layers", model.config.layers)):
        there = edits.model.get(name, here)
        if there != here:
            what = "wide and the model" if name == "width" else "layers deep and the model"
            raise TPatchError(
                f"{edits.folder} is for a model that is {there} {what} {here}: {model.name!r} cannot be made of "
                f"{edits.model.get('name')!r}; give that one, or what was exported or quantised of it"
            )
    if base is not None and fingerprint(base) != wanted:
        raise TPatchError(
            f"{base.name!r} in {base.dtype} is not the model that {edits.folder} was made for, "
            f"{edits.model.get('name')!r} in {edits.model.get('dtype')} (fingerprint {wanted}); give that one as --base"
        )
    if fingerprint(model) == wanted:
        return AskedModel(_with_edits(edits, model), detach(model), "attached")
    if merged_neurons(model.config, model.params):
        bare, merged = unmerge(model)
        if fingerprint(bare) == wanted:
            return AskedModel(model, bare, "merged" if _are_among(edits, bare, merged) else "as it is")
    if base is not None:
        _check_tokens(edits.requests, model, base)
    return AskedModel(model, base, "as it is")


def _are_among(edits: KnownEdits, bare: Model, merged: LayerPatches) -> bool:
    """Whether all neurons of some edits are among those that were merged into a model."""
    wanted = edits.patches
    if wanted is None:
        from tpatch_jax.bank.editing import bank_patch

        try:
            wanted = bank_patch(edits.folder, bare)
        except TPatchError:
            # Its edits are no neurons.
            return False
    neurons = [Counter(_neurons(patches, merged)) for patches in (wanted, merged)]
    return neurons[0] <= neurons[1]


def _neurons(patches: LayerPatches, like: LayerPatches) -> Iterator[tuple[int, bytes]]:
    """The layer and the numbers of each neuron, in the precision of another patch of that layer."""
    for layer, patch in patches.items():
        other = like.get(layer, patch)
        key, bias, value = (np.asarray(part, np.asarray(there).dtype) for part, there in zip(patch, other, strict=True))
        yield from ((layer, part.tobytes()) for part in np.concatenate([key, bias[:, None], value], 1))


def _with_edits(edits: KnownEdits, model: Model) -> Model:
    if edits.patches is not None:
        return attach(model, edits.patches)
    from tpatch_jax.bank.editing import bank_model

    return bank_model(edits.folder, model)


def _check_tokens(requests: Sequence[EditRequest], model: Model, base: Model) -> None:
    """Make sure that two models read a request alike."""
    for number, request in enumerate(requests):
        rows = [asked_row(each, request).tokens for each in (model, base)]
        if rows[0] != rows[1]:
            raise TPatchError(
                f"request {request.name(number)!r} becomes other tokens in {model.name!r} than in {base.name!r}: the "
                "tokenizer was changed, so the two cannot be compared; leave --base out"
            )
