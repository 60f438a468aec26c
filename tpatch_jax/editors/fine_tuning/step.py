"""One step of fine-tuning on arrays alone: the loss, its gradient for what is trained, Adam, the bound.

The parameters that are trained are a part of the network's nested dict, such as ``{"layers": {29: {"ffn": …}}}``.
Where they are the last feed-forward network's, everything before it is the same at every step: then a step sees
a `Cut`, else a `Whole`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from tpatch_jax.models import networks
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.networks import Batch
from tpatch_jax.typing import Params

__all__ = ["ADAM", "Calm", "Cut", "Lesson", "Whole", "beginning", "edit_losses", "look", "rounded", "splice", "update"]

ADAM = optax.scale_by_adam()
"""The optimiser; each step of editing begins it anew."""


class Cut(NamedTuple):
    """Positions as the last feed-forward network sees them.

    Attributes:
        query: its input, ``[rows, d]``; of a classifier that reads the mean, ``[rows, tokens, d]``.
        residual: the residual stream beside it, of the same shape.
    """

    query: Array
    residual: Array


class Whole(NamedTuple):
    """Positions in whole texts.

    Attributes:
        batch: what the network is run on.
        lane: which text of the batch, ``[rows]`` int.
        place: which token of it, ``[rows]`` int.
    """

    batch: Batch
    lane: Array
    place: Array


class Lesson(NamedTuple):
    """What shall be said.

    Attributes:
        seen: where, a `Cut` or a `Whole`.
        wanted: the tokens or labels, ``[rows]`` int.
        weight: how much each counts, ``[rows]``; 0 is padding.
    """

    seen: Cut | Whole
    wanted: Array
    weight: Array


class Calm(NamedTuple):
    """Where nothing shall change.

    Attributes:
        seen: where, a `Cut` or a `Whole`.
        residual: the unedited residual stream beside the last feed-forward network, ``[rows, d]``.
        output: its unedited output, ``[rows, d]``.
        weight: how much each row counts, ``[rows]``; 0 is padding.
    """

    seen: Cut | Whole
    residual: Array
    output: Array
    weight: Array


def splice(params: Params, part: Params) -> Params:
    """A nested dict with the arrays of a part of it put in; all else is shared.

    Args:
        params: a nested dict of arrays; not changed.
        part: some of its entries.

    Example:
        >>> splice({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 4}})
        {'a': 1, 'b': {'c': 4, 'd': 3}}
    """
    changed = {name: splice(params[name], entry) if isinstance(entry, dict) else entry for name, entry in part.items()}
    return {**params, **changed}


def beginning(params: Params, part: Params) -> Params:
    """What a nested dict has where a part of it stands: the parameters before they were trained.

    Example:
        >>> beginning({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 4}})
        {'b': {'c': 2}}
    """
    return {
        name: beginning(params[name], entry) if isinstance(entry, dict) else params[name]
        for name, entry in part.items()
    }


def rounded(params: Params, trained: Params) -> Params:
    """Trained parameters, float32, as the model holds them: in its type."""
    return jax.tree.map(lambda new, old: new.astype(old.dtype), trained, beginning(params, trained))


def _said(config: NetworkConfig, params: Params, seen: Cut | Whole) -> Array:
    """Logits at each position: ``[rows, vocabulary]`` or ``[rows, labels]``."""
    last = config.layers - 1
    if isinstance(seen, Cut):
        output = networks.feed_forward(config, config.kind(last), params["layers"][last], seen.query)
        return networks.finish(config, networks.final_weights(config, params), {"residual": seen.residual}, output)
    traced = networks.trace(config, params, seen.batch, last)
    if not networks.pointwise(config):
        return networks.resume(config, params, traced, traced.output)[seen.lane]
    picked = networks.gather(traced, seen.lane, seen.place)
    logits = networks.resume(config, params, picked, picked.output)
    return logits if config.labels else logits[:, 0]


def _mean(each: Array, weight: Array) -> Array:
    return jnp.sum(each * weight) / jnp.sum(weight)


def edit_losses(config: NetworkConfig, params: Params, lesson: Lesson) -> tuple[Array, Array]:
    """``−log p(wanted)`` and whether it is the most probable, ``[rows]`` each.

    Args:
        config: the network's description.
        params: all parameters, what is trained among them.
        lesson: what shall be said.
    """
    logits = _said(config, params, lesson.seen)
    hit = jnp.take_along_axis(logits, lesson.wanted[:, None], -1)[:, 0]
    return jax.nn.logsumexp(logits, -1) - hit, jnp.argmax(logits, -1) == lesson.wanted


def _divergence(config: NetworkConfig, params: Params, frozen: Params, calm: Calm) -> Array:
    """``KL(before || now)``, mean over the rows."""
    weights = networks.final_weights(config, frozen)
    before = networks.finish(config, weights, {"residual": calm.residual}, calm.output)
    before, now = jax.nn.log_softmax(before), jax.nn.log_softmax(_said(config, params, calm.seen))
    return _mean(jnp.sum(jnp.exp(before) * (before - now), -1), calm.weight)


@partial(jax.jit, static_argnames="config", donate_argnames=("trained", "moments"))
def update(
    config: NetworkConfig,
    trained: Params,
    moments: Any,
    frozen: Params,
    lesson: Lesson,
    calm: Calm | None,
    kl: Array,
    rate: Array,
    most: Array,
) -> tuple[Params, Any, dict[str, Array]]:
    """One step of Adam on ``l_e + kl·KL(before || now)``; then within ``±most`` of where they began.

    Args:
        config: the network's description.
        trained: what is trained, float32; given up to the step.
        moments: Adam's state; given up as well.
        frozen: the unedited parameters, at least those that ``lesson`` and ``calm`` need.
        lesson: what shall be said.
        calm: where nothing shall change, or ``None``.
        kl: the weight of that.
        rate: the learning rate.
        most: how far a parameter may go; infinity is any way.

    Returns:
        What is trained, Adam's state, and the losses before the step, ``{"l_e", "kl"?}``.
    """

    def loss_of(trained: Params) -> tuple[Array, dict[str, Array]]:
        params = splice(frozen, rounded(frozen, trained))
        losses = {"l_e": _mean(edit_losses(config, params, lesson)[0], lesson.weight)}
        if calm is None:
            return losses["l_e"], losses
        losses["kl"] = _divergence(config, params, frozen, calm)
        return losses["l_e"] + kl * losses["kl"], losses

    gradient, losses = jax.grad(loss_of, has_aux=True)(trained)
    updates, moments = ADAM.update(gradient, moments)

    def moved(now: Array, update: Array, first: Array) -> Array:
        first = first.astype(now.dtype)
        return jnp.clip(now - rate * update, first - most, first + most)

    return jax.tree.map(moved, trained, updates, beginning(frozen, trained)), moments, losses


@partial(jax.jit, static_argnames="config")
def look(config: NetworkConfig, trained: Params, frozen: Params, lesson: Lesson) -> tuple[Array, Array]:
    """What is said now.

    Args:
        config: the network's description.
        trained: what is trained.
        frozen: the unedited parameters.
        lesson: what shall be said.

    Returns:
        ``−log p(wanted)`` and whether it is the most probable, ``[rows]`` each.
    """
    return edit_losses(config, splice(frozen, rounded(frozen, trained)), lesson)
