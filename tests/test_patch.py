"""The patch's algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative, same
from hypothesis import given
from hypothesis import strategies as st

from tpatch_jax.core.ffn import ACTIVATIONS
from tpatch_jax.core.patch import (
    Patch,
    activations,
    concatenate,
    contribution,
    create,
    join,
    pad,
    preactivations,
    sharpen,
    take,
)
from tpatch_jax.errors import TPatchError

SEEDS = st.integers(0, 10_000)
SIZES = st.sampled_from([0, 3])
WIDTHS = st.sampled_from([1, 8])
NAMES = st.sampled_from(sorted(ACTIVATIONS))
DTYPES = st.sampled_from([jnp.float32, jnp.bfloat16])


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


def make(seed: int, neurons: int, width: int, dtype=jnp.float32) -> Patch:
    rng = np.random.default_rng([7, seed])
    shapes = ((neurons, width), (neurons,), (neurons, width))
    return Patch(*(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes))


@given(SEEDS, SIZES, WIDTHS)
def test_contribution_is_the_formula(seed, neurons, width):
    patch, query = make(seed, neurons, width), normal(seed, 5, width)
    key, bias, value, rows = (np.asarray(x, np.float64) for x in (*patch, query))
    z = np.einsum("nd,rd->rn", key, rows) + bias
    np.testing.assert_allclose(preactivations(patch, query), z, rtol=1e-5, atol=1e-5)
    expected = sum((np.maximum(z[:, n, None], 0) * value[n] for n in range(neurons)), np.zeros_like(rows))
    np.testing.assert_allclose(contribution(patch, query, jax.nn.relu), expected, rtol=1e-5, atol=1e-5)


@given(SEEDS, WIDTHS, DTYPES)
def test_concatenate_then_take_gives_each_back(seed, width, dtype):
    parts = [make(seed + n, n, width, dtype) for n in (1, 0, 3)]
    whole = concatenate(parts)
    assert whole.key.shape == (4, width)
    assert same(take(whole, slice(0, 1)), parts[0])
    assert same(take(whole, [1, 2, 3]), parts[2])
    assert same(take(whole, np.array([False, True, True, True])), parts[2])
    assert same(concatenate([concatenate(parts[:2]), parts[2]]), whole)
    assert same(take(whole, [3, 0]).bias, jnp.stack([parts[2].bias[2], parts[0].bias[0]]))


@pytest.mark.parametrize("nothing", [[], slice(0, 0), np.zeros(0, np.int64), np.zeros(2, bool)])
def test_take_of_nothing_is_an_empty_patch(nothing):
    assert take(make(0, 2, 4), nothing).key.shape == (0, 4)


@given(SEEDS, NAMES)
def test_contributions_of_concatenated_patches_add_up(seed, name):
    act, query = ACTIVATIONS[name], normal(seed, 5, 8)
    parts = [make(seed, 1, 8), make(seed + 1, 3, 8)]
    apart = sum(np.asarray(contribution(part, query, act)) for part in parts)
    assert relative(contribution(concatenate(parts), query, act), apart) < 1e-5


@given(SEEDS, st.sampled_from([0, 3]), DTYPES)
def test_padding_keeps_the_neurons_and_adds_silent_ones(seed, neurons, dtype):
    patch = make(seed, neurons, 8, dtype)
    padded = pad(patch, 4)
    assert padded.key.shape == (4, 8)
    assert same(take(padded, slice(0, neurons)), patch)
    rest = take(padded, slice(neurons, None))
    query = 1e4 * normal(seed, 5, 8, dtype=dtype)
    assert (preactivations(rest, query) < 0).all()
    for act in ACTIVATIONS.values():  # not even where an activation leaks below zero
        assert not contribution(rest, query, act).any()
    assert {leaf.dtype for leaf in padded} == {jnp.dtype(dtype)}
    assert pad(patch, neurons) is patch


@given(SEEDS, st.sampled_from([1, 3]), NAMES)
def test_padding_changes_no_contribution(seed, neurons, name):
    # Not bit for bit: the matrix product of another shape may sum in another order.
    act, patch, query = ACTIVATIONS[name], make(seed, neurons, 8), normal(seed, 5, 8)
    assert relative(contribution(pad(patch, 8), query, act), contribution(patch, query, act)) < 1e-6


@given(SEEDS, SIZES, DTYPES)
def test_joining_a_batch_is_concatenating_its_lanes(seed, neurons, dtype):
    lanes = [make(seed + n, neurons, 8, dtype) for n in range(3)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes)
    assert same(join(batch), concatenate(lanes))
    assert same(join(jax.tree.map(lambda leaf: leaf[None], batch)), concatenate(lanes))


@given(SEEDS, NAMES, DTYPES, st.sampled_from([0.5, 1.0, 4.0, 256.0]))
def test_sharpening_by_a_power_of_two_is_exact(seed, name, dtype, s):
    act, patch, query = ACTIVATIONS[name], make(seed, 3, 8, dtype), normal(seed, 5, 8, dtype=dtype)
    scaled = act(preactivations(patch, query) * s)
    assert same(activations(sharpen(patch, s), query, act), scaled)
    assert same(contribution(sharpen(patch, s), query, act), (scaled / s) @ patch.value)
    assert same(sharpen(sharpen(patch, s), 1 / s), patch)


@given(SEEDS, NAMES, st.floats(0.1, 100))
def test_sharpening_is_act_of_sz_over_s(seed, name, s):
    act, patch, query = ACTIVATIONS[name], make(seed, 3, 8), normal(seed, 5, 8)
    expected = act(preactivations(patch, query) * s) / s @ patch.value
    assert relative(contribution(sharpen(patch, s), query, act), expected) < 1e-5


def test_sharpening_nears_relu():
    patch, query = make(0, 3, 8), normal(0, 50, 8)
    exact = contribution(patch, query, jax.nn.relu)
    errors = [relative(contribution(sharpen(patch, s), query, jax.nn.silu), exact) for s in (1.0, 8.0, 64.0)]
    assert errors[0] > 0.1
    assert errors[2] < errors[1] / 4 < errors[0] / 8


def test_a_patch_goes_through_jit_vmap_and_grad():
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), make(0, 2, 8), make(1, 2, 8))
    query = normal(0, 5, 8)
    many = jax.jit(jax.vmap(lambda patch: contribution(patch, query, jax.nn.relu)))(batch)
    assert relative(many[1], contribution(make(1, 2, 8), query, jax.nn.relu)) < 1e-6
    gradient = jax.grad(lambda patch: contribution(patch, query, jax.nn.relu).sum())(make(0, 2, 8))
    assert all(leaf.any() for leaf in gradient)


def test_created_neurons_have_the_dtype_asked_for():
    assert {leaf.dtype for leaf in jax.tree.leaves(create(4, 2, jnp.bfloat16))} == {jnp.dtype(jnp.bfloat16)}


def test_nothing_to_concatenate_is_an_error():
    with pytest.raises(TPatchError, match=r"no patch.*create"):
        concatenate([])


def test_widths_that_differ_are_an_error():
    with pytest.raises(TPatchError, match=r"widths \[4, 8\]"):
        concatenate([create(4, 1), create(8, 1)])


def test_patches_of_several_layers_are_an_error():
    with pytest.raises(TPatchError, match=r"patches of one layer; use concatenate_layers for \{layer: patch\}"):
        concatenate([make(0, 1, 4), {2: make(0, 1, 4)}])


def test_padding_to_fewer_neurons_is_an_error():
    with pytest.raises(TPatchError, match="3 neurons does not fit into 2"):
        pad(create(4, 3), 2)
