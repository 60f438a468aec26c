"""What a value at a subject is trained on: rows that should say the target, and rows that should stay.

The rows of some lanes are run once up to the layer; from there on only their ends are run again.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tpatch_jax.core import ffn
from tpatch_jax.core.patch import Patch
from tpatch_jax.core.sizes import power_of_two
from tpatch_jax.core.start import StartParams, predict_values, start_features
from tpatch_jax.core.values import TargetRows
from tpatch_jax.editors.subject_rows import PromptRow, forked_rows, said_at
from tpatch_jax.models import networks
from tpatch_jax.models.model import Model

__all__ = ["SHARPNESS", "ValueProblem", "create_value_problem", "level_patch", "predict_start"]

HEARD = 0.1
"""A key hears a wording on which it fires this strongly, the bare prompt being 1."""

SHARPNESS = 256.0
"""``s`` of ``act(s·z)/s``, folded into the patch."""


class ValueProblem(NamedTuple):
    """What the values of some lanes are trained on.

    Attributes:
        targets: where and what each lane's neuron should make the model say, the bare prompt first.
        neutral: where it should change little; ``None`` is nowhere.
        scale: the length of the unedited FFN's output at each lane's subject, ``[lanes]``.
        features: what is known of each lane before any step, ``[lanes, features]``; see
            `tpatch_jax.core.start.start_features`. ``None`` where nothing is predicted.
    """

    targets: TargetRows
    neutral: TargetRows | None
    scale: Float[Array, " lanes"]
    features: Float[Array, "lanes features"] | None

    def limit(self, longest: float) -> Float[Array, " lanes"]:
        """Each value's largest length: ``longest`` times the FFN's output at its subject."""
        return (longest * self.scale).astype(jnp.float32)


def level_patch(patch: Patch, plateau: float) -> Patch:
    """Neurons whose response rises from 0 at ``z = 0`` to 1 at ``z = plateau`` and stays there: two for each, in turn.

    ``act(z)/p - act(z - p)/p``. A value then says the same however strongly a rephrasing is recognised.
    """
    if not plateau:
        return patch
    height = patch.value / plateau
    pair = patch._replace(value=height), patch._replace(bias=patch.bias - plateau, value=-height)
    return jax.tree.map(lambda low, high: jnp.stack([low, high], 1).reshape(-1, *low.shape[1:]), *pair)


def _activity(model: Model, patch: Patch, forked: networks.Fork, plateau: float) -> Array:
    """How strongly each lane's neurons fire at the subject in each of its rows, all together, ``[lanes, rows]``."""
    query = forked.query[:, 0].reshape(patch.key.shape[0], -1, patch.key.shape[2]).astype(jnp.float32)
    z = jnp.einsum("nrd,nkd->nrk", query, patch.key) + patch.bias[:, None]
    act = ffn.ACTIVATIONS[model.config.activation]
    fired = act(z * SHARPNESS) / SHARPNESS
    fired = (fired - act((z - plateau) * SHARPNESS) / SHARPNESS) / plateau if plateau else fired
    return jnp.sum(fired, 2)


def _unedited_output(model: Model, unedited: Model, layer: int, forked: networks.Fork) -> Array:
    """The unedited FFN's output at the subject of each row, ``[rows, d]``.

    What a value is measured by: with the neurons of earlier edits of a subject in it, each value would be allowed to
    be longer than the one before.
    """
    if model is unedited:
        return forked.output[:, 0].astype(jnp.float32)
    # This layer reads what no neuron of its own has changed.
    output = ffn.apply(unedited.params["layers"][layer]["ffn"], forked.query[:, 0], unedited.config.activation)
    return output.astype(jnp.float32)


def create_value_problem(
    model: Model,
    unedited: Model,
    layer: int,
    patch: Patch,
    prompts: Sequence[list[PromptRow]],
    kept: Sequence[list[PromptRow]],
    neutral: Sequence[list[PromptRow]],
    plateau: float,
    predicted: bool = True,
) -> ValueProblem:
    """The rows of one chunk of lanes, run up to the layer.

    Args:
        model: the model as it stands.
        unedited: the model without any patch.
        layer: the layer.
        patch: each lane's keys without a value, before they are sharpened, ``[lanes, keys, d]``; all bear its value.
        prompts: of each lane the prompts that should say the target, equally many, the bare one first.
        kept: of each lane prompts of earlier edits of the same subject, which must go on.
        neutral: of each lane prompts after which little should change, equally many.
        plateau: see `level_patch`.
        predicted: whether values are predicted, for which features are read.
    """
    lanes, most = len(prompts), max((len(rows) for rows in kept), default=0)
    # A lane without that many repeats its own bare prompt, which then counts for nothing.
    rows = [[*part, *also, *[part[0]] * (most - len(also))] for part, also in zip(prompts, kept, strict=True)]
    each, count = len(rows[0]), power_of_two(max(len(row.wanted) for part in rows for row in part), 2)
    wanted, weight = np.zeros((lanes, each, count), np.int32), np.zeros((lanes, each, count), np.float32)
    for lane, part in enumerate(rows):
        for number, row in enumerate(part[: len(prompts[lane]) + len(kept[lane])]):
            wanted[lane, number, : len(row.wanted)] = row.wanted
            group = len(prompts[lane]) if number < len(prompts[lane]) else 1
            weight[lane, number, : len(row.wanted)] = 1 / (group * len(row.wanted))
    # Rows that aim and rows that stay close are read together, lane after lane.
    together = [row for parts in zip(rows, neutral, strict=True) for part in parts for row in part]
    forked, places = forked_rows(model, together, layer, count)
    activity = np.asarray(_activity(model, patch, forked, plateau))
    scale = jnp.linalg.norm(_unedited_output(model, unedited, layer, forked), axis=-1).reshape(lanes, -1)[:, 0]
    aims = _part(forked, places, lanes, 0, each)
    # A wording that the key does not know can teach the value nothing.
    recognised = activity[:, :each] > HEARD * activity[:, :1]
    weight *= np.where(np.arange(each) < len(prompts[0]), recognised, True)[..., None]
    share = weight.sum((1, 2), keepdims=True)
    targets = TargetRows(aims, jnp.asarray(activity[:, :each]), jnp.asarray(wanted), jnp.asarray(weight / share))
    close = None
    if count_beside := len(neutral[0]):
        beside = _part(forked, places, lanes, each, each + count_beside)
        before, table = networks.Fork(*beside[0], layer=layer), beside[1]
        if model is not unedited:
            before, table = forked_rows(unedited, [row for part in neutral for row in part], layer, 1)
        reference = said_at(unedited, before, table[:, :1]).reshape(lanes, count_beside, 1, -1)
        share = jnp.full((lanes, count_beside, 1), 1 / count_beside)
        close = TargetRows(beside, jnp.asarray(activity[:, each:]), reference, share)
    features = _features(unedited, forked, places, targets, lanes) if predicted else None
    return ValueProblem(targets, close, scale, features)


def predict_start(params: StartParams, problem: ValueProblem, longest: float) -> Float[Array, "lanes d"]:
    """Values to start from, none longer than ``longest`` times the FFN's output at its subject.

    Args:
        params: what has learnt to predict them.
        problem: what they are to be trained on.
        longest: see `tpatch_jax.core.values.ValueTrainingSettings`.
    """
    assert problem.features is not None
    return predict_values(params, problem.features, problem.limit(longest))


def _features(
    unedited: Model, forked: networks.Fork, places: Array, targets: TargetRows, lanes: int
) -> Float[Array, "lanes features"]:
    """What is known of each lane before any step, from its bare prompt."""
    each = places.shape[0] // lanes
    end, lane = places[::each, 0], jnp.arange(lanes)
    query, hidden = forked.query[::each], forked.hidden[::each]
    rows = networks.unembedding_rows(unedited.config, unedited.params, targets.wanted[:, 0].reshape(-1))
    rows = rows.reshape(lanes, -1, rows.shape[-1])
    return start_features(query[:, 0], query[lane, end], hidden[lane, end], rows, targets.weight[:, 0])


def _part(forked: networks.Fork, places: Array, lanes: int, first: int, last: int) -> tuple[tuple[Any, ...], Array]:
    """The same part of each lane's rows, as `train_values` takes them."""
    return jax.tree.map(lambda leaf: _rows_of(leaf, lanes, first, last), (tuple(forked[:-1]), places))


@partial(jax.jit, static_argnames=("lanes", "first", "last"))
def _rows_of(leaf: Array, lanes: int, first: int, last: int) -> Array:
    chosen = leaf.reshape(lanes, -1, *leaf.shape[1:])[:, first:last]
    return chosen.reshape(-1, *leaf.shape[1:])
