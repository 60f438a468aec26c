"""The paper's loop as its code runs it: the whole model on 8 copies and 40,000 memory queries at every step."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from tpatch_jax.core.ffn import ACTIVATIONS
from tpatch_jax.core.objective import edit_loss, total_loss
from tpatch_jax.core.patch import Patch, contribution, preactivations
from tpatch_jax.core.recipes.joint import optimiser
from tpatch_jax.editors.model_memory import ModelMemory
from tpatch_jax.editors.tpatcher.settings import PRESETS
from tpatch_jax.models import networks
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.model import Model
from tpatch_jax.models.rows import tokens_array
from tpatch_jax.requests import EditRequest

__all__ = ["COPIES", "ROWS", "paper_step_seconds"]

COPIES, ROWS = 8, 40_000
_SETTINGS = PRESETS["paper"].fit


def _transform() -> optax.GradientTransformation:
    return optax.chain(optimiser(_SETTINGS), optax.scale(-_SETTINGS.learning_rate))


@partial(jax.jit, static_argnames="config")
def _step(
    config: NetworkConfig, params: Any, patch: Patch, optimiser: Any, tokens: Array, place: Array, target: Array,
    memory: Array
) -> tuple[Patch, Any, Array]:  # fmt: skip
    act, layer = ACTIVATIONS[config.activation], config.layers - 1

    def loss(patch: Patch) -> Array:
        traced = networks.trace(config, params, tokens, layer)
        output = traced.output + contribution(patch, traced.query, act)
        logits = networks.resume(config, params, traced, output)[:, place]
        loss_edit = edit_loss(logits, target, _SETTINGS.weights.label_smoothing)
        z = preactivations(patch, traced.query[:, place])[:, 0]
        return total_loss(loss_edit, z, preactivations(patch, memory)[:, 0], _SETTINGS.weights)[0]

    value, gradient = jax.value_and_grad(loss)(patch)
    update, optimiser = _transform().update(gradient[:3], optimiser, patch[:3])
    changed = optax.apply_updates(patch[:3], update)
    return Patch(*changed), optimiser, value  # type: ignore[misc]


def paper_step_seconds(model: Model, known: ModelMemory, requests: Sequence[EditRequest], steps: int) -> list[float]:
    """Seconds of one step of the paper's loop, for the first neuron of each request.

    Args:
        model: a decoder.
        known: its memory, repeated until there are 40,000 queries.
        requests: what is edited.
        steps: how many steps of each are timed, after one that is not.

    Returns:
        For each request the mean over its steps.
    """
    memory = jnp.resize(known.query, (ROWS, known.query.shape[1]))
    transform, seconds = _transform(), []
    for request in requests:
        target = model.encode_target(request.prompt, request.continuation)
        start = model.encode_prompt(request.prompt)
        row = [*start, *target]
        tokens = tokens_array([row] * COPIES, len(row))
        query = networks.trace(model.config, model.params, tokens, model.layer(None)).query[0, len(start) - 1]
        query = query.astype(jnp.float32)
        value = _SETTINGS.value_spread * jax.random.normal(jax.random.key(0), query.shape)
        patch = Patch((query / jnp.sum(query * query))[None], jnp.zeros(1), value[None])
        optimiser = transform.init(patch[:3])
        place, wanted = jnp.asarray(len(start) - 1), jnp.asarray(target[0])
        step = partial(_step, model.config, model.params)
        patch, optimiser, loss = jax.block_until_ready(step(patch, optimiser, tokens, place, wanted, memory))
        began = time.perf_counter()
        for _ in range(steps):
            patch, optimiser, loss = step(patch, optimiser, tokens, place, wanted, memory)
        jax.block_until_ready(loss)
        seconds.append((time.perf_counter() - began) / steps)
    return seconds
