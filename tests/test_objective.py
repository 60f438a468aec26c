"""The four terms of the objective, by hand and against a plain numpy formulation."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpatch_jax.core.objective import (
    Weights,
    activation_loss,
    edit_loss,
    memory_limit_loss,
    memory_margin_loss,
    total_loss,
)

close = lambda value: pytest.approx(value if isinstance(value, dict) else float(value), rel=1e-5)  # noqa: E731
SEEDS = st.integers(0, 10_000)
QUARTER = jnp.array([[0.0, math.log(3)]])  # probabilities 1/4 and 3/4


def test_edit_loss_by_hand():
    assert edit_loss(QUARTER, jnp.array(1)) == close(-math.log(3 / 4))
    assert edit_loss(QUARTER, jnp.array([0])) == close(-math.log(1 / 4))
    assert edit_loss(QUARTER + 100, jnp.array(1)) == close(-math.log(3 / 4))


def test_label_smoothing_by_hand():
    expected = -0.9 * math.log(3 / 4) - 0.1 * (math.log(1 / 4) + math.log(3 / 4)) / 2
    assert edit_loss(QUARTER, jnp.array(1), 0.1) == close(expected)


def test_entropy_is_subtracted():
    entropy = -(1 / 4 * math.log(1 / 4) + 3 / 4 * math.log(3 / 4))
    assert edit_loss(QUARTER, jnp.array(1), 0.0, 0.1) == close(-math.log(3 / 4) - 0.1 * entropy)


def test_edit_loss_is_the_mean_over_queries():
    logits = jnp.concatenate([QUARTER, QUARTER])
    assert edit_loss(logits, jnp.array([0, 1])) == close(-(math.log(1 / 4) + math.log(3 / 4)) / 2)


def test_activation_loss_averages_the_five_least_active():
    z = jnp.array([50.0, 4.0, 0.0, 3.0, -1.0, 1.0, 40.0])
    assert activation_loss(z) == close(sum(math.exp(-x) for x in (-1, 0, 1, 3, 4)) / 5)
    assert activation_loss(z, 2) == close((math.e + 1) / 2)
    assert activation_loss(z[:2], 5) == close((math.exp(-50) + math.exp(-4)) / 2)


def test_memory_losses_by_hand():
    z = jnp.array([-3.0, -5.0, -2.0, -9.0])
    assert memory_limit_loss(z) == close((1 + math.exp(-2) + math.e + math.exp(-6)) / 4)
    assert memory_limit_loss(z, -4.0, 2) == close((math.exp(1) + math.exp(2)) / 2)
    assert memory_margin_loss(z, jnp.array(1.0), 3.0, 1) == close(math.exp(-2 - 1 + 3))
    assert memory_margin_loss(z, jnp.array(2.0), 1.0, 2) == close((math.exp(-3) + math.exp(-4)) / 2)


def test_total_by_hand():
    weights = Weights(activation=2.0, memory=3.0)
    loss, terms = total_loss(jnp.array(0.5), jnp.array([0.0, 2.0]), jnp.array([-3.0]), weights)
    l_a, l_m1, l_m2 = (1 + math.exp(-2)) / 2, 1.0, math.exp(-3 - 1 + 3)  # z_e is the mean, 1
    assert {name: float(term) for name, term in terms.items()} == close(
        {"l_e": 0.5, "l_a": l_a, "l_m1": 1, "l_m2": l_m2}
    )
    assert loss == close(0.5 + 2 * l_a + 3 * (l_m1 + l_m2))


def reference(logits, target, z_edit, z_memory, weights: Weights) -> float:
    """The objective once more, in float64 and in loops, as the paper words it."""
    l_e = 0.0
    for row, wanted in zip(logits, target, strict=True):
        p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        goal = np.full(len(p), weights.label_smoothing / len(p))
        goal[wanted] += 1 - weights.label_smoothing
        l_e += -(goal * np.log(p)).sum() + weights.entropy * (p * np.log(p)).sum()
    least = sorted(z_edit)[: weights.least_active]
    l_a = sum(math.exp(-z) for z in least) / len(least)
    hard = sorted((z for z in z_memory if z > -math.inf), reverse=True)[: weights.hardest]
    l_m1 = sum(math.exp(z - weights.limit) for z in hard) / len(hard)
    l_m2 = sum(math.exp(z - np.mean(z_edit) + weights.margin) for z in hard) / len(hard)
    return l_e / len(logits) + weights.activation * l_a + weights.memory * (l_m1 + l_m2)


@given(
    SEEDS,
    st.sampled_from([1, 7]),
    st.sampled_from([2, 30]),
    st.sampled_from([Weights(), Weights(0.5, 2.0, -1.0, 1.5, 2, 4, 0.1, 0.2)]),
)
def test_total_is_the_plain_formulation(seed, queries, rows, weights):
    rng = np.random.default_rng(seed)
    logits, target = rng.normal(0, 3, (queries, 11)), rng.integers(0, 11, queries)
    z_edit, z_memory = rng.normal(0, 2, queries), rng.normal(-2, 2, rows)
    z_memory[0] = -math.inf
    single = [jnp.asarray(x, jnp.float32) for x in (logits, z_edit, z_memory)]
    loss_edit = edit_loss(single[0], jnp.asarray(target), weights.label_smoothing, weights.entropy)
    loss, _ = total_loss(loss_edit, single[1], single[2], weights)
    assert loss == close(reference(logits, target, z_edit, z_memory, weights))


def test_rows_at_minus_infinity_do_not_count():
    z = jnp.array([-3.0, -1.0, -2.0])
    more = jnp.concatenate([z, jnp.full(4, -jnp.inf)])
    for hardest in (1, 2, 5, 1000):
        assert memory_limit_loss(more, -3.0, hardest) == close(memory_limit_loss(z, -3.0, hardest))
        z_e = jnp.array(1.0)
        assert memory_margin_loss(more, z_e, 3.0, hardest) == close(memory_margin_loss(z, z_e, 3.0, hardest))
    assert memory_limit_loss(jnp.full(3, -jnp.inf)) == 0


def objective(key, query, memory, head, target, excluded):
    z_edit, z_memory = query @ key, jnp.where(excluded, -jnp.inf, memory @ key)
    return total_loss(edit_loss(z_edit[:, None] * head[None], target, 0.1, 0.1), z_edit, z_memory, Weights())[0]


def arguments(seed: int) -> tuple:
    rng = np.random.default_rng(seed)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4,), (3, 4), (20, 4), (9,))]
    return *arrays, jnp.array(2), jnp.arange(20) < 5


def test_gradient_is_finite_and_that_of_finite_differences():
    (key, *rest), value, slope = arguments(0), jax.jit(objective), jax.jit(jax.grad(objective))
    for axis, step in enumerate(1e-2 * np.eye(4, dtype=np.float32)):
        expected = (value(key + step, *rest) - value(key - step, *rest)) / 2e-2
        assert slope(key, *rest)[axis] == pytest.approx(float(expected), rel=2e-2, abs=2e-2)
    nothing_left = slope(key, *rest[:-1], jnp.ones(20, bool))
    assert jnp.isfinite(nothing_left).all()


def test_jit_vmap_and_grad_compose():
    many = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(arguments(seed) for seed in range(3)))
    together = jax.jit(jax.vmap(jax.value_and_grad(objective)))(*many)
    for lane in range(3):
        alone = jax.jit(jax.value_and_grad(objective))(*arguments(lane))
        chex.assert_trees_all_close(jax.tree.map(lambda leaf, lane=lane: leaf[lane], together), alone, rtol=1e-4)
