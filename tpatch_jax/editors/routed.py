"""What edited models say whose edits another model answers: see `tpatch_jax.editors.base.Routing`."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from tpatch_jax.editors.base import Routing
from tpatch_jax.models.collection import collect, predicted
from tpatch_jax.models.model import Model
from tpatch_jax.models.networks import Batch
from tpatch_jax.models.rows import row_length
from tpatch_jax.requests import EditRequest

__all__ = ["apply_routed", "routed_answers"]


def apply_routed(model: Model, routing: Routing, batch: Batch) -> Array:
    """Logits where it is known no more than rows of tokens: each is decided on as a whole, padding left out.

    Padding is zeros at a row's end. What the base model answers are its logits, bit for bit.

    Args:
        model: the base model.
        routing: which rows the other model answers.
        batch: ``[rows, tokens]``.
    """
    logits = model.apply(batch)
    rows = [np.trim_zeros(row, "b").tolist() for row in np.asarray(batch)]
    for lane, (row, context) in enumerate(zip(rows, routing.contexts(rows), strict=True)):
        if context is None or not row:
            continue
        read, at = routing.joined(row, context, row), routing.place(row)
        padded = np.pad(np.asarray(read, np.int32), (0, row_length(len(read)) - len(read)))
        places = np.asarray([*range(at), *range(at + len(context), len(read))])
        logits = logits.at[lane, : len(row)].set(routing.model.apply(jnp.asarray(padded[None]))[0, places])
    return logits


def routed_answers(
    model: Model, routing: Routing, requests: Sequence[EditRequest], contexts: Sequence[Sequence[int] | None]
) -> list[bool]:
    """Whether each request's target comes out after its prompt.

    Args:
        model: the base model.
        routing: the other model.
        requests: what is asked.
        contexts: what the other model reads beside each prompt; ``None`` where the base model answers.
    """
    held = np.zeros(len(requests), bool)
    for answers, there in ((routing.model, True), (model, False)):
        chosen = [number for number, context in enumerate(contexts) if (context is not None) == there]
        rows, places, wanted = [], [], []
        for number in chosen:
            request, context = requests[number], contexts[number]
            prompt = model.encode_prompt(request.prompt)
            before = prompt if context is None else routing.joined(prompt, context, prompt)
            target = model.encode_target(request.prompt, request.continuation)
            rows.append(before + target)
            places.append(range(len(before) - 1, len(before) + len(target) - 1))
            wanted.append(target)
        if chosen:
            said = predicted(answers, collect(answers, rows, places, answers.layer(None)))
            parts = np.split(said, np.cumsum([len(target) for target in wanted])[:-1])
            held[chosen] = [part.tolist() == target for part, target in zip(parts, wanted, strict=True)]
    return held.tolist()
