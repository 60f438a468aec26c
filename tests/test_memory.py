"""The query memory: its statistics, its whitening, its hardest rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpatch_jax.core.memory import (
    NO_ANSWER,
    counted,
    create_memory,
    extend,
    hardest,
    nuisance_scatter,
    second_moments,
    whitening,
)

SEEDS = st.integers(0, 10_000)


def queries(seed: int, rows: int = 60, width: int = 6) -> np.ndarray:
    """Correlated queries with an offset."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)).astype(
        np.float32
    )


@given(SEEDS)
def test_second_moments_are_numpys(seed):
    query = queries(seed)
    mean, covariance = second_moments(jnp.asarray(query))
    np.testing.assert_allclose(mean, query.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(covariance, np.cov(query, rowvar=False, bias=True), rtol=1e-4, atol=1e-4)


def test_second_moments_of_bfloat16_are_taken_in_float32():
    query = jnp.asarray(queries(0), jnp.bfloat16)
    mean, covariance = second_moments(query)
    assert mean.dtype == covariance.dtype == jnp.float32
    np.testing.assert_allclose(mean, np.asarray(query, np.float32).mean(0), rtol=1e-5, atol=1e-5)


def test_nuisance_scatter_is_the_covariance_within_groups():
    groups = np.stack([queries(seed, 5) + 100 * seed for seed in range(4)])
    within = np.mean([np.cov(group, rowvar=False, bias=True) for group in groups], 0)
    np.testing.assert_allclose(nuisance_scatter(jnp.asarray(groups)), within, rtol=1e-3, atol=1e-3)


def mixed(covariance, nuisance, weight, shrinkage):
    """``C`` as the docstring words it, in float64."""
    c = covariance / np.trace(covariance)
    if nuisance is not None:
        c = (1 - weight) * c + weight * nuisance / np.trace(nuisance)
    c = c + shrinkage * np.trace(c) / len(c) * np.eye(len(c))
    return c * len(c) / np.trace(c)


@given(SEEDS, st.booleans(), st.sampled_from([0.0, 0.8, 1.0]), st.sampled_from([0.1, 1.0]))
def test_whitening_is_a_root_of_the_inverse(seed, with_nuisance, weight, shrinkage):
    covariance = np.cov(queries(seed), rowvar=False)
    nuisance = np.cov(queries(seed + 1), rowvar=False) if with_nuisance else None
    a = whitening(
        jnp.asarray(covariance, jnp.float32),
        None if nuisance is None else jnp.asarray(nuisance, jnp.float32),
        weight=weight,
        shrinkage=shrinkage,
    )
    a = np.asarray(a, np.float64)
    assert not np.triu(a, 1).any()
    c = mixed(covariance, nuisance, weight, shrinkage)
    np.testing.assert_allclose(a @ a.T @ c, np.eye(6), atol=2e-4)
    np.testing.assert_allclose(np.trace(np.linalg.inv(a @ a.T)), 6, rtol=1e-4)


@given(SEEDS)
def test_whitening_does_not_depend_on_the_scale(seed):
    covariance = jnp.asarray(np.cov(queries(seed), rowvar=False), jnp.float32)
    np.testing.assert_allclose(whitening(1e4 * covariance), whitening(covariance), rtol=1e-3, atol=1e-4)


@given(SEEDS)
def test_whitening_shrinks_nuisance_directions(seed):
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=6)
    direction = (direction / np.linalg.norm(direction)).astype(np.float32)
    across = np.linalg.qr(np.column_stack([direction, rng.normal(size=(6, 5))]))[0][:, 1]
    nuisance = jnp.asarray(np.outer(direction, direction))

    def preference(a) -> float:
        return float(np.linalg.norm(direction @ a) / np.linalg.norm(across @ a))

    plain, informed = preference(whitening(jnp.eye(6))), preference(whitening(jnp.eye(6), nuisance))
    assert plain == pytest.approx(1, abs=1e-4)
    assert informed < 0.5


def test_whitening_of_no_variation_is_finite():
    zeros, covariance = jnp.zeros((4, 4)), jnp.diag(jnp.array([1.0, 2.0, 3.0, 4.0]))
    np.testing.assert_allclose(whitening(zeros), np.eye(4), atol=1e-6)
    np.testing.assert_allclose(
        whitening(covariance, zeros, shrinkage=0.0), whitening(covariance, shrinkage=0.0), rtol=1e-5
    )


def test_memory_rows_are_unanswered_and_extending_keeps_the_statistics():
    memory = create_memory(jnp.asarray(queries(0), jnp.bfloat16))
    assert memory.query.dtype == jnp.float32
    assert (memory.answer == NO_ANSWER).all()
    longer = extend(extend(memory, jnp.ones((2, 6)), jnp.array([5, 7])), jnp.zeros((1, 6)))
    assert longer.answer.tolist() == [NO_ANSWER, 5, 7] + [NO_ANSWER] * 60
    np.testing.assert_array_equal(longer.query[:3], [[0] * 6, [1] * 6, [1] * 6])
    assert longer.mean is memory.mean
    assert longer.whitener is memory.whitener


def test_padding_rows_never_count():
    memory = create_memory(jnp.asarray(queries(0)))
    padded = extend(memory, jnp.full((2, 6), 100.0), jnp.array([5, 7]), size=8)
    assert padded.query.shape == (68, 6)
    assert counted(padded, jnp.array(7)).tolist() == [False] * 6 + [True, False] + [True] * 60
    rows, counts = hardest(jnp.full(6, -1.0), jnp.array(0), padded, 68)
    assert not counts[np.isin(rows, range(6))].any()
    assert counts[np.isin(rows, range(6), invert=True)].all()


@given(SEEDS, st.sampled_from([(1, 1), (12, 5), (13, 5), (60, 7), (60, 60), (13, 100)]), st.integers(0, 4))
def test_hardest_has_the_hardest_and_never_a_row_that_wants_the_target(seed, sizes, target):
    (rows, count), rng = sizes, np.random.default_rng(seed)
    memory = create_memory(jnp.asarray(queries(seed, rows)))
    answer = rng.integers(-1, 3, rows)
    memory = memory._replace(answer=jnp.asarray(answer, jnp.int32))
    key = jnp.asarray(rng.normal(size=6), jnp.float32)
    found, counts = (np.asarray(x) for x in hardest(key, jnp.asarray(target, jnp.int32), memory, count))
    assert len(found) == len(counts) == min(count, rows)
    assert ((found >= 0) & (found < rows)).all()
    chosen = found[counts]
    assert len(set(chosen)) == len(chosen)
    assert (answer[chosen] != target).all()
    allowed = np.flatnonzero(answer != target)
    score = np.asarray(memory.query) @ np.asarray(key)
    assert counts.any() == bool(len(allowed))
    if len(allowed):
        assert score[chosen].max() == pytest.approx(score[allowed].max(), rel=1e-5)
    if count >= rows:
        assert set(chosen) == set(allowed)


def test_hardest_finds_the_maximum_wherever_it_stands():
    memory = create_memory(jnp.asarray(queries(0, 13)))
    run = jax.jit(lambda query: hardest(jnp.ones(6), jnp.array(0), memory._replace(query=query), 4))
    for row in range(13):
        found, counts = run(memory.query.at[row].set(100.0))
        assert row in np.asarray(found)[np.asarray(counts)]


def test_a_whitener_is_the_lower_factor_of_the_inverse():
    rng = np.random.default_rng(0)
    rows, groups = rng.normal(size=(60, 6)) * [1, 2, 5, 0.1, 1, 1], rng.normal(size=(60, 6))
    covariance, nuisance = rows.T @ rows / 60, groups.T @ groups / 60
    whitener = whitening(jnp.asarray(covariance, jnp.float32), jnp.asarray(nuisance, jnp.float32), weight=0.3)
    normalised = lambda matrix: matrix / (np.trace(matrix) / 6)  # noqa: E731
    mixed = normalised(0.7 * normalised(covariance) + 0.3 * normalised(nuisance))
    expected = np.linalg.cholesky(np.linalg.inv(normalised(mixed + 0.1 * np.eye(6))))
    np.testing.assert_allclose(whitener, expected, rtol=1e-4, atol=1e-5)
    assert not np.triu(whitener, 1).any()
