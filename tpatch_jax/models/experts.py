"""A mixture of experts: a router chooses a few gated networks for each token, and their outputs are weighted."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tpatch_jax.core.ffn import ACTIVATIONS
from tpatch_jax.models.config import Mixture

__all__ = ["Experts", "Routes"]

MOST_ROWS = 512
"""So many tokens of one expert are computed at a time at most."""


class Routes(NamedTuple):
    """Which experts a router chose.

    Attributes:
        expert: of each token, ``[..., active]`` int, the largest weight first.
        weight: of each, ``[..., active]``, float32.
    """

    expert: Int[Array, "*rows active"]
    weight: Float[Array, "*rows active"]


class _Stacked(nnx.Module):
    """The kernels of a linear layer of each expert, one behind the other."""

    kernel: nnx.Param[Float[Array, "experts inner outer"]]
    bias: nnx.Param[Float[Array, "experts outer"]]
    biased: bool

    def __init__(self, count: int, inner: int, outer: int, biased: bool):
        self.kernel, self.biased = nnx.Param(jnp.zeros((count, inner, outer))), biased
        if biased:
            self.bias = nnx.Param(jnp.zeros((count, outer)))

    def of(self, expert: Int[Array, ""], x: Float[Array, "rows inner"]) -> Float[Array, "rows outer"]:
        """What one expert's layer makes of some rows."""
        y = x @ self.kernel[...][expert].astype(x.dtype)
        return y + self.bias[...][expert].astype(x.dtype) if self.biased else y


class _Gated(nnx.Module):
    """A gated network that every token passes through, ``sigmoid(q·g)·(act(q·G) ∘ (q·U))·V``."""

    activation: str
    gate: nnx.Linear
    up: nnx.Linear
    down: nnx.Linear
    share: nnx.Linear

    def __init__(self, hidden_size: int, width: int, activation: str, *, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.activation = activation
        self.gate, self.up = linear(hidden_size, width), linear(hidden_size, width)
        self.down, self.share = linear(width, hidden_size), linear(hidden_size, 1)

    def __call__(self, query: Float[Array, "rows hidden"]) -> Float[Array, "rows hidden"]:
        hidden = ACTIVATIONS[self.activation](self.gate(query)) * self.up(query)
        return jax.nn.sigmoid(self.share(query)) * self.down(hidden)


class Experts(nnx.Module):
    """The experts of one block and their router: ``Σ wᵢ·(act(q·Gᵢ) ∘ (q·Uᵢ))·Vᵢ`` over the chosen ones.

    Where `Mixture.limit` is given, ``min(q·Gᵢ, limit)`` is gated by a logistic function of itself, and times one more
    than ``q·Uᵢ`` within ``±limit``.
    """

    mixture: Mixture
    activation: str
    router: nnx.Linear
    gate: _Stacked
    up: _Stacked
    down: _Stacked
    shared: _Gated
    correction: nnx.Param[Float[Array, " experts"]]

    def __init__(self, mixture: Mixture, hidden_size: int, activation: str, *, rngs: nnx.Rngs):
        self.mixture, self.activation = mixture, activation
        stacked = partial(_Stacked, mixture.experts, biased=mixture.biased)
        self.router = nnx.Linear(hidden_size, mixture.experts, use_bias=mixture.biased, rngs=rngs)
        self.gate, self.up = (stacked(hidden_size, mixture.width) for _ in range(2))
        self.down = stacked(mixture.width, hidden_size)
        if mixture.shared_width:
            self.shared = _Gated(hidden_size, mixture.shared_width, activation, rngs=rngs)
        if mixture.corrected:
            self.correction = nnx.Param(jnp.zeros(mixture.experts))

    def route(self, query: Float[Array, "*rows hidden"]) -> Routes:
        """The experts of each token and their weights: the largest of ``softmax(q·R)``, normalised or as they are.

        Or those of a logistic function of ``q·R``; and a correction may be added before they are compared, and all but
        the best groups of them left out.
        """
        kernel, mixture = self.router.kernel[...], self.mixture
        logits = jnp.matmul(query, kernel.astype(query.dtype), preferred_element_type=jnp.float32)
        if mixture.biased and self.router.bias is not None:
            logits = logits + self.router.bias[...].astype(jnp.float32)
        scores = jax.nn.sigmoid(logits) if mixture.logistic else jax.nn.softmax(logits, -1)
        compared = scores + self.correction[...].astype(jnp.float32) if mixture.corrected else scores
        compared = self._in_groups(compared) if mixture.groups else compared
        weight, expert = jax.lax.top_k(compared, mixture.active)
        weight = jnp.take_along_axis(scores, expert, -1) if mixture.corrected else weight
        if mixture.normalised:
            weight = weight / jnp.sum(weight, -1, keepdims=True)
        return Routes(expert, weight if mixture.scale == 1 else weight * mixture.scale)

    def _in_groups(self, compared: Float[Array, "*rows experts"]) -> Float[Array, "*rows experts"]:
        """The scores of the best groups of experts, and minus infinity in the place of the others."""
        mixture = self.mixture
        grouped = compared.reshape(*compared.shape[:-1], mixture.groups, -1)
        best = jnp.sum(jax.lax.top_k(grouped, 2 if mixture.corrected else 1)[0], -1)
        _, chosen = jax.lax.top_k(best, mixture.active_groups)
        kept = jnp.any(chosen[..., None] == jnp.arange(mixture.groups), -2)
        return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(compared.shape)

    def _hidden(self, gate: Float[Array, "rows width"], up: Float[Array, "rows width"]) -> Float[Array, "rows width"]:
        if not (limit := self.mixture.limit):
            return ACTIVATIONS[self.activation](gate) * up
        gate = jnp.minimum(gate, limit)
        return (jnp.clip(up, -limit, limit) + 1) * gate * jax.nn.sigmoid(self.mixture.slope * gate)

    def __call__(self, query: Float[Array, "*rows hidden"]) -> Float[Array, "*rows hidden"]:
        """What the chosen experts make of ``query [..., d]``, weighted, and the shared one if there is one."""
        rows = query.reshape(-1, query.shape[-1])
        routes = self.route(rows)
        parts = self._each(rows, routes.expert) * routes.weight[..., None].astype(rows.dtype)
        output = jnp.sum(parts, 1)
        if self.mixture.shared_width:
            output = output + self.shared(rows)
        return output.reshape(query.shape)

    def _each(
        self, rows: Float[Array, "rows hidden"], expert: Int[Array, "rows active"]
    ) -> Float[Array, "rows active hidden"]:
        """What each chosen expert makes of its token.

        Tokens are brought together by expert, in blocks of one size, so that a block is a product of plain matrices
        and no expert computes tokens of others. Some blocks are not full.
        """
        (count, active), experts = expert.shape, self.mixture.experts
        size = min(MOST_ROWS, max(1, 1 << max(0, (count * active // experts).bit_length() - 1)))
        blocks = min(count * active, count * active // size + experts)
        chosen = expert.reshape(-1)
        order = jnp.argsort(chosen, stable=True)
        held = jnp.sum(chosen[:, None] == jnp.arange(experts, dtype=chosen.dtype), 0, dtype=jnp.int32)
        ends = jnp.cumsum(-(-held // size))
        # The place of each token among those of its expert, then among all blocks.
        rank = jnp.zeros_like(chosen).at[order].set(jnp.arange(count * active, dtype=chosen.dtype), unique_indices=True)
        rank = rank - (jnp.cumsum(held) - held)[chosen]
        place = (ends - -(-held // size))[chosen] * size + rank
        token = (
            jnp.zeros(blocks * size, jnp.int32)
            .at[place]
            .set(jnp.arange(count * active, dtype=jnp.int32) // active, unique_indices=True)
        )
        owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(blocks, dtype=jnp.int32), side="right"), experts - 1)

        # Computed again for gradients: what is kept would be the kernels of each block.
        @partial(jax.checkpoint, prevent_cse=False)
        def run(query: Float[Array, "block hidden"], owner: Int[Array, ""]) -> Float[Array, "block hidden"]:
            return self.down.of(owner, self._hidden(self.gate.of(owner, query), self.up.of(owner, query)))

        _, results = jax.lax.scan(
            lambda _, block: (None, run(*block)), None, (rows[token].reshape(blocks, size, -1), owner)
        )
        return results.reshape(blocks * size, -1)[place].reshape(count, active, -1)
