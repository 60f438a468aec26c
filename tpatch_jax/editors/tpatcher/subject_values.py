"""What a value at a subject is trained on: rows that should say the target, and rows that should stay.

The rows of some lanes are run once up to the layer; from there on only their ends are run again.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from tpatch_jax.core import ffn
from tpatch_jax.core.devices import host, mesh_of, shard_rows
from tpatch_jax.core.patch import Patch
from tpatch_jax.core.sizes import power_of_two
from tpatch_jax.core.start import StartParams, predict_values, start_features
from tpatch_jax.core.values import KeptRows, TargetRows, log_odds_against, run_rows
from tpatch_jax.editors.subject_rows import ForkedRows, KnownRows, PromptRow, fork_rows, known_rows, runner, said_at
from tpatch_jax.models import networks
from tpatch_jax.models.model import Model
from tpatch_jax.typing import Params

__all__ = ["SHARPNESS", "ValueProblem", "create_value_problem", "level_patch", "predict_start", "target_slope"]

HEARD = 0.1
"""A key hears a wording on which it fires this strongly, the bare prompt being 1."""

SHARPNESS = 256.0
"""``s`` of ``act(s·z)/s``, folded into the patch."""


class ValueProblem(NamedTuple):
    """What the values of some lanes are trained on.

    Attributes:
        known: the rows of each lane as the network after the layer reads them, the targets first.
        targets: where and what each lane's neuron should make the model say, the bare prompt first.
        kept: where it should change little; ``None`` is nowhere.
        scale: the length of the unedited FFN's output at each lane's subject, ``[lanes]``.
        features: what is known of each lane before any step, ``[lanes, features]``; see
            `tpatch_jax.core.start.start_features`. ``None`` where nothing is predicted.
    """

    known: KnownRows
    targets: TargetRows
    kept: KeptRows | None
    scale: Float[Array, " lanes"]
    features: Float[Array, "lanes features"] | None

    def limit(self, longest: float) -> Float[Array, " lanes"]:
        """Each value's largest length: ``longest`` times the FFN's output at its subject."""
        return (longest * self.scale).astype(jnp.float32)


@partial(jax.jit, static_argnames="plateau")
def level_patch(patch: Patch, plateau: float) -> Patch:
    """Neurons whose response rises from 0 at ``z = 0`` to 1 at ``z = plateau`` and stays there: two for each, in turn.

    ``act(z)/p - act(z - p)/p``. A value then says the same however strongly a rephrasing is recognised.
    """
    if not plateau:
        return patch
    height = patch.value / plateau
    pair = patch._replace(value=height), patch._replace(bias=patch.bias - plateau, value=-height)
    return jax.tree.map(lambda low, high: jnp.stack([low, high], 1).reshape(-1, *low.shape[1:]), *pair)


@partial(jax.jit, static_argnames=("activation", "plateau"))
def _activity(query: Array, patch: Patch, activation: str, plateau: float) -> Array:
    """How strongly each lane's neurons fire on some queries of it, all together: ``[lanes, rows, d]`` to two axes."""
    z = jnp.einsum("nrd,nkd->nrk", query.astype(jnp.float32), patch.key) + patch.bias[:, None]
    act = ffn.ACTIVATIONS[activation]
    fired = act(z * SHARPNESS) / SHARPNESS
    fired = (fired - act((z - plateau) * SHARPNESS) / SHARPNESS) / plateau if plateau else fired
    return jnp.sum(fired, 2)


def _unedited_output(model: Model, unedited: Model, layer: int, forked: ForkedRows) -> Array:
    """The unedited FFN's output at the subject of each lane's first row, ``[lanes, d]``.

    What a value is measured by: with the neurons of earlier edits of a subject in it, each value would be allowed to
    be longer than the one before.
    """
    first = forked.first[:, :1]
    if model is unedited:
        return networks.take_tokens(forked.fork.output, first)[:, 0]
    # This layer reads what no neuron of its own has changed.
    query = networks.take_tokens(forked.fork.query, first)[:, 0]
    config = unedited.config
    return networks.feed_forward(config, config.kind(layer), unedited.params["layers"][layer], query)


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
    rounded: Params | None = None,
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
        rounded: see `tpatch_jax.models.networks.fork`.
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
    # Rows that aim and rows that stay close are read together: much of what they begin with is the same.
    together = [[*part, *beside] for part, beside in zip(rows, neutral, strict=True)]
    forked = fork_rows(model, together, layer, count, rounded)
    query = host(networks.take_tokens(forked.fork.query, forked.first))
    activity = np.asarray(_activity(query, patch, model.config.activation, plateau))
    scale = np.linalg.norm(host(_unedited_output(model, unedited, layer, forked)).astype(np.float32), axis=-1)
    # A wording that the key does not know can teach the value nothing.
    recognised = activity[:, :each] > HEARD * activity[:, :1]
    weight *= np.where(np.arange(each) < len(prompts[0]), recognised, True)[..., None]
    share = weight.sum((1, 2), keepdims=True)
    targets = TargetRows(jax.device_put(activity[:, :each]), jax.device_put(wanted), jax.device_put(weight / share))
    read, others = _read_places(forked.places, each)
    known = known_rows(forked, read)
    kept_rows = None
    if neutral[0]:
        before, table = forked.fork, others
        if model is not unedited:
            before, _, places = fork_rows(unedited, neutral, layer, 1, rounded)
            table = places[..., 0]
        kept_rows = KeptRows(jax.device_put(activity[:, each:]), said_at(unedited, before, table))
    features = None
    if predicted:
        first = np.ones((lanes, 1), np.float32), wanted[:, :1], (weight / share)[:, :1]
        bare = TargetRows(*map(jax.device_put, first))
        features = jax.device_put(host(_features(unedited, layer, [part[:1] for part in rows], bare)))
    targets, kept_rows = shard_rows((targets, kept_rows), mesh_of(model.params))
    return ValueProblem(known, targets, kept_rows, jax.device_put(scale), features)


@partial(jax.jit, static_argnames="each")
def _read_places(places: Array, each: int) -> tuple[Array, Array]:
    """Of ``places [lanes, rows, places]`` all of the first rows, then the first of the others; and the latter alone."""
    others = places[:, each:, 0]
    return jnp.concatenate([places[:, :each].reshape(len(places), -1), others], 1), others


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
    unedited: Model, layer: int, prompts: Sequence[list[PromptRow]], bare: TargetRows
) -> Float[Array, "lanes features"]:
    """What is known of each lane before any step, from its bare prompt alone: a slope costs what its rows do."""
    forked = fork_rows(unedited, prompts, layer, bare.wanted.shape[2])
    rows = networks.unembedding_rows(unedited.config, unedited.params, jax.device_put(bare.wanted[:, 0]))
    places, _ = _read_places(forked.places, 1)
    slope = target_slope(runner(unedited, layer), known_rows(forked, places), bare)
    return _features_of(forked.fork.query, forked.fork.hidden, forked.first, places, rows, bare.weight, slope)


@jax.jit
def _features_of(
    query: Array, hidden: Array, first: Array, places: Array, rows: Array, weight: Array, slope: Array
) -> Array:
    """`start_features` of lanes of one row each, from what stands at the ends of their packs."""
    end = places[:, :1]
    subject, last, hidden = (networks.take_tokens(*at)[:, 0] for at in ((query, first), (query, end), (hidden, end)))
    return start_features(subject, last, hidden, rows, weight[:, 0], slope)


@jax.jit
def target_slope(run: Partial, known: KnownRows, bare: TargetRows) -> Float[Array, "lanes d"]:
    """How the log-odds of each lane's target depend on what is added at its subject, where nothing is yet."""

    def odds(added: Array) -> Array:
        said, _ = run_rows(run, known, bare, None, added)
        return -jnp.sum(log_odds_against(bare, said))

    nothing = jnp.zeros((bare.wanted.shape[0], 1, known.fork[0].shape[-1]), jnp.float32)
    return jax.grad(odds)(nothing)[:, 0]
