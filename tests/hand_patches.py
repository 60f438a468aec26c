"""Patches of a tiny model that are written down, not trained, with the requests that they are for."""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from tpatch_jax.bank.patches import save_patches
from tpatch_jax.core.patch import Patch, sharpen
from tpatch_jax.editors.base import EditInfo, RequestInfo
from tpatch_jax.models.model import Model
from tpatch_jax.requests import EditRequest

__all__ = ["request_info", "saved_folder", "spoken_patch"]


def spoken_patch(
    model: Model, requests: Sequence[EditRequest], *, loud: float = 400.0, sharpness: float = 256.0
) -> Patch:
    """A neuron of the last layer for each request, which makes the model say a target of one token."""
    keys, values = [], []
    for request in requests:
        row = model.encode_prompt(request.prompt)
        (token,) = model.encode_target(request.prompt, request.continuation)
        query = model.trace(jnp.asarray([row])).query[0, -1]
        keys.append(20 * query / (query @ query))
        head = model.params["head"]["kernel"][:, token]
        values.append(loud * head / jnp.linalg.norm(head))
    patch = Patch(jnp.stack(keys), jnp.full(len(keys), -19.0), jnp.stack(values))
    return sharpen(patch, sharpness)


def request_info(requests: Sequence[EditRequest], neurons: Sequence[Sequence[int]], layer: int) -> EditInfo:
    """What an editor would say of edits that all hold."""
    results = tuple(
        RequestInfo(
            request.name(number),
            held=True,
            status="edited",
            neurons={layer: tuple(some)},
            continuation=request.continuation,
        )
        for number, (request, some) in enumerate(zip(requests, neurons, strict=True))
    )
    return EditInfo(results, 0.0, 0.0, 0.0, 0.0, 0)


def saved_folder(folder: Path, model: Model, requests: Sequence[EditRequest], patch: Patch) -> Path:
    """A folder of patches with a neuron for each request."""
    info = request_info(requests, [[number] for number in range(len(requests))], model.config.layers - 1)
    save_patches(folder, model, patch, requests, info)
    return folder


def with_outliers(model: Model) -> Model:
    """The model with a few weights in its last layer that are far larger than all others, as trained ones have them."""
    layers = dict(model.params["layers"])
    network = dict(layers[2]["ffn"])
    for name in ("gate", "down"):
        network[name] = {**network[name], "kernel": network[name]["kernel"].at[3, 5].set(8.0)}
    layers[2] = {**layers[2], "ffn": network}
    return model.with_params({**model.params, "layers": layers})
