"""Values predicted before any step: a small network that has learnt from many edits how a value says its target.

What it is trained on is what values are trained on: prompts that should say the target, and prompts that should stay.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from tpatch_jax.core.values import KeptRows, Run, TargetRows, kept_close, losses_of_rows, run_rows

__all__ = [
    "PARTS",
    "StartParams",
    "create_start",
    "even_out",
    "predict_values",
    "start_features",
    "start_loss",
    "turn_inputs",
]

PRESSED = 0.1
"""A target need not be said with a smaller loss than this, in nats."""


PARTS = 6
"""What features are made of; a network that was learnt before slopes were among them reads the first five."""

DIVISOR = 16.0
"""What makes steps of one size suit both layers."""


class StartParams(NamedTuple):
    """A network of one inner layer.

    Attributes:
        inner: ``[features, width]``.
        bias: ``[width]``.
        outer: ``[width, d]``.
        direct: from the features past the inner layer, ``[features, d]``.
    """

    inner: Float[Array, "features width"]
    bias: Float[Array, " width"]
    outer: Float[Array, "width d"]
    direct: Float[Array, "features d"]


def create_start(rng: PRNGKeyArray, hidden_size: int, width: int) -> StartParams:
    """A network that predicts zero.

    Args:
        rng: a typed random key.
        hidden_size: ``d``; there are `PARTS` times as many features.
        width: of the inner layer.

    Example:
        >>> params = create_start(jax.random.key(0), 4, 8)
        >>> params.inner.shape, float(jnp.abs(predict_values(params, jnp.ones((1, 24)), jnp.ones(1))).max())
        ((24, 8), 0.0)
    """
    features = PARTS * hidden_size
    inner = jax.random.normal(rng, (features, width), jnp.float32) / features**0.5
    bias, outer, direct = (
        jnp.zeros(shape, jnp.float32) for shape in ((width,), (width, hidden_size), (features, hidden_size))
    )
    return StartParams(inner, bias, outer, direct)


@jax.jit
def start_features(
    query: Float[Array, "lanes d"],
    end: Float[Array, "lanes d"],
    hidden: Float[Array, "lanes d"],
    target: Float[Array, "lanes tokens d"],
    weight: Float[Array, "lanes tokens"],
    slope: Float[Array, "lanes d"],
) -> Float[Array, "lanes features"]:
    """What is known of an edit before any step, each part scaled to a mean square of 1.

    Args:
        query: at the subject, ``[lanes, d]``.
        end: the query at the prompt's last token, ``[lanes, d]``.
        hidden: the residual stream after the last block there: what the model says now, ``[lanes, d]``.
        target: the unembedding rows of the target's tokens, ``[lanes, tokens, d]``.
        weight: of each token; 0 is padding.
        slope: how the target's log-odds depend on what is added to the FFN's output at the subject, where nothing is
            yet, ``[lanes, d]``.

    Returns:
        ``[lanes, 6·d]``: the three, the target's first token, the mean of all its tokens, and the slope.

    Example:
        >>> one = jnp.ones((1, 2))
        >>> start_features(one, one, one, jnp.ones((1, 3, 2)), jnp.ones((1, 3)), one).shape
        (1, 12)
    """
    # Those of a model in bfloat16 as well: its rows have another type than their weights.
    target, weight = target.astype(jnp.float32), weight.astype(jnp.float32)
    mean = jnp.einsum("ntd,nt->nd", target, weight) / jnp.maximum(jnp.sum(weight, 1, keepdims=True), 1e-12)
    parts = [part.astype(jnp.float32) for part in (query, end, hidden, target[:, 0], mean, slope)]
    return jnp.concatenate([x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-20) for x in parts], -1)


@jax.jit
def predict_values(
    params: StartParams, features: Float[Array, "lanes features"], limit: Float[Array, " lanes"]
) -> Float[Array, "lanes d"]:
    """``limit · y / √(1 + ‖y‖²)`` with ``y = (gelu(features · inner + bias) · outer + features · direct) / 16``.

    Args:
        params: the network.
        features: what `start_features` gives, of which a network may read the first parts only.
        limit: each value's largest length.

    Returns:
        Values to start from, ``[lanes, d]``, none longer than its limit.

    Example:
        >>> params = StartParams(jnp.ones((5, 1)), jnp.zeros(1), jnp.ones((1, 1)) * 1e4, jnp.zeros((5, 1)))
        >>> float(predict_values(params, jnp.ones((1, 5)), jnp.array([2.0]))[0, 0].round(3))
        2.0
    """
    features = features[:, : params.inner.shape[0]]
    y = (jax.nn.gelu(features @ params.inner + params.bias) @ params.outer + features @ params.direct) / DIVISOR
    return limit[:, None] * y * jax.lax.rsqrt(1 + jnp.sum(y * y, -1, keepdims=True))


def even_out(features: Float[np.ndarray, "rows features"]) -> tuple[np.ndarray, np.ndarray]:
    """How to turn features so that all their directions vary alike, which is easier to learn from: ``A`` and ``A⁻¹``.

    ``A = M^(-1/2)`` of ``M = (1-s)·E[x xᵀ] + s·diag E[x²]``, to which a thousandth of its mean eigenvalue is added; a
    tenth is ``s``, for there are seldom many more rows than features.

    Args:
        features: of some requests, ``[rows, features]``.

    Returns:
        ``A`` and its inverse, both symmetric, ``[features, features]`` float32.

    Example:
        >>> turn, back = even_out(np.array([[4.0, 0.0], [0.0, 0.5]]))
        >>> (turn @ back).round(4).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    moment = features.T.astype(np.float64) @ features / len(features)
    moment = 0.9 * moment + 0.1 * np.diag(np.diag(moment))
    moment += 1e-3 * np.trace(moment) / len(moment) * np.eye(len(moment))
    squares, directions = np.linalg.eigh(moment)
    turn, back = ((directions * squares**power) @ directions.T for power in (-0.5, 0.5))
    return turn.astype(np.float32), back.astype(np.float32)


def turn_inputs(params: StartParams, turn: Float[Array, "features features"]) -> StartParams:
    """The network that says of ``x`` what this one says of ``x · turn``.

    Args:
        params: the network.
        turn: from `even_out`, ``[features, features]``.

    Example:
        >>> params = StartParams(jnp.ones((2, 1)), jnp.zeros(1), jnp.ones((1, 1)), jnp.ones((2, 1)))
        >>> turn_inputs(params, 2 * jnp.eye(2)).inner.tolist()
        [[2.0], [2.0]]
    """
    exactly = jax.lax.Precision.HIGHEST
    inner, direct = (jnp.matmul(turn, leaf, precision=exactly) for leaf in (params.inner, params.direct))
    return params._replace(inner=inner, direct=direct)


def start_loss(
    params: StartParams,
    features: Float[Array, "lanes features"],
    limit: Float[Array, " lanes"],
    known: Any,
    targets: TargetRows,
    kept: KeptRows,
    run: Run,
    closeness: float,
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], Float[Array, ""]]]:
    """What the network is trained on: mean ``softplus(2·(loss - 0.1))/2`` of targets and ``closeness · KL`` of others.

    Args:
        params: the network.
        features: of each lane.
        limit: each value's largest length.
        known: what ``run`` knows of the lanes.
        targets: where and what each lane's value should make the model say.
        kept: where it should change little.
        run: the network after the cut, as `tpatch_jax.core.values.train_values` takes it.
        closeness: weight of the divergence from the unedited model.

    Returns:
        The loss, and its two parts as they are: the targets' mean loss and the mean divergence, in nats.

    Example:
        >>> run = lambda known, added: jax.nn.log_softmax(known[:, None] + added)
        >>> one, known = jnp.ones((1, 1)), jnp.zeros((1, 4))
        >>> targets = TargetRows(one, jnp.array([[[2]]]), one[None])
        >>> kept = KeptRows(one, jnp.full((1, 1, 4), jnp.log(0.25)))
        >>> params = create_start(jax.random.key(0), 4, 8)
        >>> parts = start_loss(params, jnp.ones((1, 24)), jnp.ones(1), known, targets, kept, run, 1.0)[1]
        >>> round(parts[0].item(), 3)
        1.386
    """
    values = predict_values(params, features, limit)
    activity = jnp.concatenate([targets.activity, kept.activity], 1)
    said, others = run_rows(run, known, targets, kept, activity[..., None] * values[:, None])
    losses = losses_of_rows(targets, said)
    counts = jnp.sum(targets.weight, 2) > 0
    number = jnp.maximum(jnp.sum(counts), 1).astype(losses.dtype)
    short = jnp.sum(jnp.where(counts, jax.nn.softplus(2 * (losses - PRESSED)) / 2, 0.0)) / number
    moved = jnp.mean(kept_close(kept.before, others))
    return short + closeness * moved, (jnp.sum(jnp.where(counts, losses, 0.0)) / number, moved)
