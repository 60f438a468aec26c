"""The neurons of a patch: where each one is, how large, and which request it belongs to."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tpatch_jax.core.layers import LayerPatches, flat_positions, flatten_layers
from tpatch_jax.core.patch import Patch, join
from tpatch_jax.display.markup import number, shorten
from tpatch_jax.display.view import Rows, Shown, compose
from tpatch_jax.editors.base import EditInfo
from tpatch_jax.errors import TPatchError
from tpatch_jax.requests import EditRequest

__all__ = ["Owner", "arrays_of", "check_requests", "owners_of", "show_patch"]

MOST_NEURONS = 200


class Owner(NamedTuple):
    """The request that a neuron belongs to."""

    id: str
    prompt: str
    target: str


def check_requests(requests: Sequence[EditRequest], info: EditInfo) -> None:
    """Make sure that requests are those of a result.

    Raises:
        TPatchError: there is another number of them, or their ids differ.
    """
    names = [request.name(position) for position, request in enumerate(requests)]
    if len(names) != len(info.requests) or any(
        request.id is not None and request.id != result.id
        for request, result in zip(requests, info.requests, strict=True)
    ):
        raise TPatchError(
            f"these {len(names)} requests are not the {len(info.requests)} that `info` tells of; give the list that "
            "was edited, in its order"
        )


def owners_of(
    patches: LayerPatches,
    info: EditInfo | None,
    requests: Sequence[EditRequest],
    edits: Sequence[Mapping[str, Any]] = (),
) -> dict[int, Owner]:
    """The request of each neuron, as far as it is known, by its number among those of all layers, lower ones first.

    Args:
        patches: the neurons, ``{layer: [n, d]}``.
        info: what an edit returned.
        requests: what was asked for, in the same order; may be missing.
        edits: instead of both, the entries of a folder of patches.

    Raises:
        TPatchError: the requests are others.
    """
    owners = {n: Owner(edit["id"], edit["prompt"], edit["target"]) for edit in edits for n in edit["neurons"]}
    if info is None:
        return owners
    if requests:
        check_requests(requests, info)
    for position, result in enumerate(info.requests):
        request = requests[position] if requests else EditRequest("", "")
        owner = Owner(result.id, request.prompt, request.target)
        owners |= dict.fromkeys(flat_positions(patches, result.neurons), owner)
    return owners


def arrays_of(patches: LayerPatches | Patch) -> tuple[Patch, list[int | None]]:
    """All neurons as one patch in NumPy, and the layer of each, lower ones first; ``None`` is the last layer.

    Args:
        patches: ``{layer: [n, d]}``, or one patch, or a batch of patches.

    Raises:
        TPatchError: arrays do not belong together.
    """
    if isinstance(patches, Patch):
        whole = _whole(patches)
        return whole, [None] * len(whole.bias)
    if not patches:
        nothing: Any = (np.zeros((0, 0), np.float32), np.zeros(0, np.float32), np.zeros((0, 0), np.float32))
        return Patch(*nothing), []
    whole, layers = flatten_layers({layer: _whole(patch) for layer, patch in patches.items()})
    return whole, layers.tolist()


def _whole(patch: Patch) -> Patch:
    key, bias, value = (np.asarray(array) for array in (patch.key, patch.bias, patch.value))
    if key.ndim < 2 or value.shape != key.shape or bias.shape != key.shape[:-1]:
        raise TPatchError(
            f"a patch has a key [n, d], a bias [n] and a value [n, d], not {key.shape}, {bias.shape} and {value.shape}"
        )
    # What NumPy has no type for, such as bfloat16, is not a number to it.
    arrays: Any = (np.asarray(array, np.float32) for array in (key, bias, value))
    return join(Patch(*arrays))


def _norm(rows: Any) -> list[str]:
    return [number(float(norm)) for norm in np.linalg.norm(np.asarray(rows, np.float32), axis=-1)]


def show_patch(patches: LayerPatches | Patch, owners: Mapping[int, Owner]) -> Shown:
    """Patches as a table of their neurons.

    Args:
        patches: ``{layer: [n, d]}``, or one patch, or a batch of patches.
        owners: the request of each neuron, as far as it is known.
    """
    arrays, places = arrays_of(patches)
    count, width = arrays.key.shape
    layers = ["last" if layer is None else str(layer) for layer in places]
    told = ", ".join(f"{many} in {layer}" if layer == "last" else f"{many} in layer {layer}"
                       for layer, many in sorted(Counter(layers).items()))  # fmt: skip
    norms = _norm(arrays.key), _norm(arrays.value)
    columns = ["neuron", "layer", "‖key‖", "bias", "‖value‖"]
    rows = [
        [str(n), layers[n], norms[0][n], number(float(arrays.bias[n])), norms[1][n]]
        for n in range(min(count, MOST_NEURONS))
    ]
    if owners:
        known = [owners.get(n, Owner("", "", "")) for n in range(len(rows))]
        columns.append("request")
        rows = [[*row, owner.id] for row, owner in zip(rows, known, strict=True)]
        if any(owner.prompt for owner in known):
            columns += ["prompt", "target"]
            rows = [[*row, shorten(o.prompt, 120), shorten(o.target, 60)] for row, o in zip(rows, known, strict=True)]
    numbers = sum(np.asarray(array).size for array in arrays)
    title = f"Patch: {count:,} {'neuron' if count == 1 else 'neurons'} of width {width}, {numbers:,} parameters"
    notes = [told.replace("in last", "in the last layer")] if count else []
    if count > len(rows):
        notes.append(f"The first {len(rows)} are shown.")
    return compose(title, notes, [Rows(columns, rows, ("neuron", "‖key‖", "bias", "‖value‖"))])
