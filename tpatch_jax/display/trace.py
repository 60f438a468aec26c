"""What `trace` found at the cut: its shapes, the sizes of its rows, and where a patch fires on them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tpatch_jax.core.layers import LayerPatches
from tpatch_jax.core.patch import Patch
from tpatch_jax.display.markup import number
from tpatch_jax.display.patch import Owner
from tpatch_jax.display.tokens import activations_at, strip, tell, token_texts
from tpatch_jax.display.view import Rows, Shown, compose
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.model import Model
from tpatch_jax.models.networks import Trace

__all__ = ["show_trace"]

MOST_ROWS = 200


def _texts(tokens: Any, model: Model | None, shape: tuple[int, int]) -> list[list[str]] | None:
    if tokens is None:
        return None
    ids = np.asarray(tokens)
    if ids.shape != shape:
        raise TPatchError(f"tokens are {ids.shape} and the trace is {shape}; give the batch that was traced")
    plain = [[str(one) for one in row] for row in ids.tolist()]
    # Negative numbers are padding.
    return plain if model is None else [
        ["" if one < 0 else token_texts(model.tokenizer, [one])[0] for one in row] for row in ids.tolist()
    ]  # fmt: skip


def show_trace(
    traced: Trace, *, patch: LayerPatches | Patch | None, model: Model | None, tokens: Any, owners: Mapping[int, Owner]
) -> Shown:
    """A trace, row by row.

    Args:
        traced: the trace.
        patch: neurons whose activation on it is shown too.
        model: names the tokens, if they are given.
        tokens: the batch that was traced, ``[batch, tokens]`` int.
        owners: the request of each neuron, as far as it is known.

    Raises:
        TPatchError: the tokens are not those of the trace.
    """
    arrays = [np.asarray(array, np.float32) for array in (traced.query, traced.output, traced.context["residual"])]
    lanes, length, width = arrays[0].shape
    texts = _texts(tokens, model, (lanes, length))
    columns = ["text", "token", "", "‖query‖", "‖output‖", "‖residual‖"]
    norms = [np.linalg.norm(array, axis=-1) for array in arrays]
    activations = None if patch is None else activations_at(patch, traced)
    rows = []
    for lane, position in list(np.ndindex(lanes, length))[:MOST_ROWS]:
        row = [str(lane), str(position), texts[lane][position] if texts else ""]
        row += [number(float(norm[lane, position])) for norm in norms]
        if activations is not None:
            row.append(number(float(activations[lane, position].max(initial=0.0))))
        rows.append(row)
    columns += ["strongest activation"] * (activations is not None)
    if not texts:
        columns, rows = columns[:2] + columns[3:], [row[:2] + row[3:] for row in rows]
    title = f"Trace: layer {traced.layer}, {lanes} by {length} tokens of width {width}"
    notes = [f"The first {MOST_ROWS} rows are shown."] * (lanes * length > MOST_ROWS)
    strips = []
    if activations is not None:
        notes.append(tell(activations.reshape(-1, activations.shape[-1])))
        strips = [strip(texts[lane], activations[lane], owners) for lane in range(min(lanes, 20))] if texts else []
    numbers = [name for name in columns if name]
    return compose(title, notes, [Rows(columns, rows, numbers)], strips)
