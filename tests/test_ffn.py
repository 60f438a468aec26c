"""How a patch joins each kind of feed-forward network, and comes out again."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import bits, relative, same
from hypothesis import given
from hypothesis import strategies as st
from test_patch import DTYPES, NAMES, SEEDS, make, normal

from tpatch_jax.core import ffn
from tpatch_jax.core.patch import Patch, concatenate, create, pad, sharpen
from tpatch_jax.errors import TPatchError

WIDTH, HIDDEN = 8, 12
GATED = {"two": False, "two_bias": False, "gated": True, "gated_bias": True, "two_reader_bias": False}
KINDS = st.sampled_from(sorted(GATED))

erf = np.vectorize(math.erf)
REFERENCE = {
    "gelu": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def network(seed: int, kind: str, dtype=jnp.float32) -> ffn.Params:
    rng = np.random.default_rng([3, seed])

    def linear(inputs: int, outputs: int, bias: bool) -> ffn.Params:
        draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
        return {"kernel": draw(inputs, outputs), **({"bias": draw(outputs)} if bias else {})}

    readers = ("gate", "up") if GATED[kind] else ("up",)
    params = {name: linear(WIDTH, HIDDEN, kind.endswith("bias")) for name in readers}
    return {**params, "down": linear(HIDDEN, WIDTH, kind.endswith("_bias") and "reader" not in kind)}


def silent(patch: Patch, query: jax.Array) -> Patch:
    """The same neurons with thresholds that no query reaches."""
    highest = jnp.max(jnp.abs(query.astype(jnp.float32) @ patch.key.astype(jnp.float32).T), 0)
    return patch._replace(bias=(-2 * highest - 1).astype(patch.bias.dtype))


@given(SEEDS, KINDS, NAMES)
def test_apply_is_the_formula(seed, kind, name):
    params, query = network(seed, kind), normal(seed, 5, WIDTH)
    double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    linear = lambda entry, x: x @ entry["kernel"] + entry.get("bias", 0.0)  # noqa: E731
    x, act = np.asarray(query, np.float64), REFERENCE[name]
    up = linear(double["up"], x)
    hidden = act(linear(double["gate"], x)) * up if GATED[kind] else act(up)
    assert relative(ffn.apply(params, query, name), linear(double["down"], hidden)) < 1e-5


@given(SEEDS, KINDS, NAMES, DTYPES, st.sampled_from([0, 3]), st.booleans())
def test_attaching_neurons_that_do_nothing_changes_no_bit(seed, kind, name, dtype, neurons, relu):
    params, query = network(seed, kind, dtype), normal(seed, 5, WIDTH, dtype=dtype)
    patched = ffn.attach(params, create(WIDTH, neurons, dtype), relu=relu)
    assert same(ffn.apply(patched, query, name), ffn.apply(params, query, name))


@given(SEEDS, KINDS, NAMES, DTYPES)
def test_silent_relu_patches_change_no_bit(seed, kind, name, dtype):
    params, query = network(seed, kind, dtype), normal(seed, 5, WIDTH, dtype=dtype)
    loud = make(seed, 3, WIDTH, dtype)
    patched = ffn.attach(params, silent(loud, query), relu=True)
    assert same(ffn.apply(patched, query, name), ffn.apply(params, query, name))
    awake = ffn.attach(params, loud._replace(bias=loud.bias + 100), relu=True)
    assert not same(ffn.apply(awake, query, name), ffn.apply(params, query, name))


@pytest.mark.parametrize("kind", sorted(GATED))
def test_silent_relu_patches_change_no_bit_under_jit(kind):
    params, query = network(0, kind), normal(0, 5, WIDTH)
    run = jax.jit(partial(ffn.apply, activation="silu"))
    patched = ffn.attach(params, silent(make(0, 3, WIDTH), query), relu=True)
    assert same(run(patched, query), run(params, query))


@given(SEEDS, KINDS, NAMES, st.sampled_from([None, 1 / 4, 2.0, 64.0]))
def test_merged_equals_attached(seed, kind, name, sharpness):
    params, patch, query = network(seed, kind), make(seed, 3, WIDTH), normal(seed, 5, WIDTH)
    patch = patch if sharpness is None else sharpen(patch, sharpness)
    merged, beside = ffn.merge(params, patch), ffn.attach(params, patch)
    assert ffn.width(merged) == ffn.width(params) + 3
    assert set(merged) == set(params)
    expected = ffn.apply(beside, query, name)
    assert relative(ffn.apply(merged, query, name), expected) < 1e-5
    assert relative(ffn.apply(params, query, name), expected) > 1e-5  # the patch does something


@given(SEEDS, KINDS, NAMES)
def test_merging_two_patches_is_merging_both_at_once(seed, kind, name):
    params, first, second = network(seed, kind), make(seed, 1, WIDTH), make(seed + 1, 3, WIDTH)
    assert same(ffn.merge(ffn.merge(params, first), second), ffn.merge(params, concatenate([first, second])))
    beside = ffn.attach(ffn.attach(params, first), second)
    assert same(beside, ffn.attach(params, concatenate([first, second])))
    query = normal(seed, 5, WIDTH)
    halves = ffn.attach(ffn.merge(params, first), second)
    assert relative(ffn.apply(halves, query, name), ffn.apply(beside, query, name)) < 1e-5


@given(SEEDS, KINDS, DTYPES, st.sampled_from([0, 3]))
def test_unmerge_gives_back_parameters_and_patch_bit_for_bit(seed, kind, dtype, neurons):
    params, patch = network(seed, kind, dtype), make(seed, neurons, WIDTH, dtype)
    assert same(ffn.unmerge(ffn.merge(params, patch), neurons), (params, patch))


def tiny_values(patch: Patch) -> Patch:
    """The same neurons, the first with a value that has numbers next to zero, the second with none but zeros."""
    return patch._replace(value=patch.value.at[0, 0].set(1e-40).at[1].set(0))


@given(SEEDS, st.sampled_from(["gated", "gated_bias"]), NAMES, DTYPES, st.sampled_from([1.0, 8.0, 256.0]))
def test_the_strength_of_a_sharp_neuron_is_divided_without_a_bit_of_difference(seed, kind, name, dtype, sharpness):
    params, query = network(seed, kind, dtype), normal(seed, 5, WIDTH, dtype=dtype)
    patch = sharpen(make(seed, 3, WIDTH, dtype), sharpness)
    merged, reader = ffn.merge(params, patch), params["gate"]["kernel"].shape[1]
    shares = np.asarray(merged["up"]["bias"][reader:], np.float32)
    largest = [np.abs(np.asarray(leaf, np.float32)).max(1) for leaf in (patch.key, patch.value)]
    ratio = largest[0] / largest[1]
    assert shares.tolist() == np.where(ratio >= 16, 1 / 4, np.where(ratio >= 4, 1 / 2, 1)).tolist()
    assert sharpness < 256 or set(shares) == {1 / 4}
    # The same neurons with everything in `down`, as they were merged before.
    bias = jnp.concatenate([merged["up"]["bias"][:reader], jnp.ones(3, dtype)])
    down = jnp.concatenate([params["down"]["kernel"], patch.value])
    undivided = {**merged, "up": {**merged["up"], "bias": bias}, "down": {**params["down"], "kernel": down}}
    assert same(ffn.apply(merged, query, name), ffn.apply(undivided, query, name))
    assert same(ffn.unmerge(merged, 3), (params, patch))
    # What was merged so is taken out as ever.
    assert same(ffn.unmerge(undivided, 3), (params, patch))


@pytest.mark.parametrize("kind", ["gated", "two"])
@pytest.mark.parametrize("compiled", [False, True])
def test_numbers_next_to_zero_come_back_bit_for_bit(kind, compiled):
    params, patch = network(0, kind), tiny_values(sharpen(make(0, 3, WIDTH), 256.0))
    merged = (jax.jit(ffn.merge) if compiled else ffn.merge)(params, patch)
    assert bits(ffn.unmerge(merged, 3)) == bits((params, patch))
    if kind == "gated":
        assert merged["up"]["bias"][-3:].tolist() == [1.0, 1.0, 0.25]


@given(SEEDS, KINDS)
def test_nested_merges_come_out_in_turn_bit_for_bit(seed, kind):
    params, first, second = network(seed, kind), make(seed, 2, WIDTH), make(seed + 1, 3, WIDTH)
    once = ffn.merge(params, first)
    before, taken = ffn.unmerge(ffn.merge(once, second), 3)
    assert same((before, taken), (once, second))
    assert same(ffn.unmerge(before, 2), (params, first))
    assert same(ffn.unmerge(ffn.merge(once, second), 5), (params, concatenate([first, second])))


@pytest.mark.parametrize("kind", sorted(GATED))
def test_unmerge_under_jit_is_told_about_added_biases(kind):
    params, patch = network(0, kind), make(0, 3, WIDTH)
    run = jax.jit(lambda merged: ffn.unmerge(merged, 3, added_bias=not kind.endswith("bias")))
    assert same(run(jax.jit(ffn.merge)(params, patch)), (params, patch))


def test_unmerge_keeps_zero_biases_when_told_that_they_were_there():
    # By looking alone, a first patch with zero bias is the same as biases that a merge added.
    params, first = network(0, "two"), make(0, 1, WIDTH)._replace(bias=jnp.zeros(1))
    once = ffn.merge(params, first)
    before, _ = ffn.unmerge(ffn.merge(once, make(1, 2, WIDTH)), 2, added_bias=False)
    assert same(before, once)
    assert same(ffn.unmerge(before, 1), (params, first))


@given(SEEDS, KINDS, st.booleans())
def test_detach_returns_the_very_arrays(seed, kind, relu):
    params = network(seed, kind)
    both = ffn.attach(ffn.attach(params, make(seed, 2, WIDTH)), make(seed, 1, WIDTH), relu=relu)
    assert sum(patch.key.shape[0] for patch in ffn.attached(both).values()) == 3
    after = ffn.detach(both)
    assert jax.tree.structure(after) == jax.tree.structure(params)
    assert all(old is new for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(after), strict=True))
    assert not ffn.attached(after)


@given(SEEDS, KINDS, NAMES, st.booleans())
def test_padding_neurons_change_nothing(seed, kind, name, relu):
    params, patch, query = network(seed, kind), make(seed, 3, WIDTH), normal(seed, 5, WIDTH)
    plain, padded = (ffn.attach(params, entry, relu=relu) for entry in (patch, pad(patch, 8)))
    assert relative(ffn.apply(padded, query, name), ffn.apply(plain, query, name)) < 1e-6
    widened = ffn.apply(ffn.merge(params, create(WIDTH, 5)), query, name)
    assert relative(widened, ffn.apply(params, query, name)) < 1e-6


@pytest.mark.parametrize("join", [ffn.attach, ffn.merge])
def test_joining_leaves_the_given_parameters_alone(join):
    params = network(0, "gated_bias")
    before = jax.tree.map(lambda leaf: leaf, params)
    join(params, make(0, 2, WIDTH))
    assert same(params, before)
    with pytest.raises(TPatchError, match="7 wide and the network 8"):
        join(params, create(7, 1))
    with pytest.raises(TPatchError, match=r"batch of patches.*join"):
        join(params, jax.tree.map(lambda leaf: leaf[None], create(WIDTH, 1)))


def test_a_merged_patch_takes_the_parameters_dtype():
    merged = ffn.merge(network(0, "gated", jnp.bfloat16), make(0, 1, WIDTH))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(merged)} == {"bfloat16"}


@pytest.mark.parametrize("neurons", [-1, HIDDEN + 1])
def test_taking_out_more_than_there_is_is_an_error(neurons):
    with pytest.raises(TPatchError, match="cannot be taken out"):
        ffn.unmerge(network(0, "two_bias"), neurons)


def test_taking_out_of_a_network_without_biases_is_an_error():
    with pytest.raises(TPatchError, match="not merged"):
        ffn.unmerge(network(0, "two"), 1)
