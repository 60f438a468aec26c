"""Patches of several layers: a plain dict, as one table of neurons and back, and through JAX's transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import bits, relative, same
from hypothesis import given
from hypothesis import strategies as st
from test_patch import DTYPES, SEEDS, make, normal

from tpatch_jax.core.layers import (
    concatenate_layers,
    count_neurons,
    flat_positions,
    flatten_layers,
    split_layers,
    take_layers,
)
from tpatch_jax.core.patch import Patch, concatenate, contribution, create, take
from tpatch_jax.errors import TPatchError

WIDTH = 4
SIZES = st.dictionaries(st.integers(0, 9), st.integers(0, 3), min_size=1, max_size=3)
"""How many neurons which layers have: the dict may name them in any order."""


def make_layers(seed: int, sizes: dict[int, int], dtype=jnp.float32) -> dict[int, Patch]:
    return {layer: make(seed + layer, neurons, WIDTH, dtype) for layer, neurons in sizes.items()}


def on_host(patches: dict[int, Patch]) -> dict[int, Patch]:
    return jax.tree.map(np.asarray, patches)


@given(SEEDS, SIZES, DTYPES)
def test_flattening_puts_lower_layers_first(seed, sizes, dtype):
    patches = make_layers(seed, sizes, dtype)
    patch, layer = flatten_layers(patches)
    assert layer.tolist() == [number for number in sorted(sizes) for _ in range(sizes[number])]
    assert layer.dtype == np.int32
    assert count_neurons(patches) == patch.key.shape[0] == len(layer)
    assert same(patch, concatenate([patches[number] for number in sorted(patches)]))


@given(SEEDS, SIZES, DTYPES)
def test_splitting_undoes_flattening(seed, sizes, dtype):
    patches = make_layers(seed, sizes, dtype)
    parts = split_layers(*flatten_layers(patches))
    # a layer without neurons leaves no trace in a table
    assert same(parts, {layer: patch for layer, patch in patches.items() if sizes[layer]})
    assert list(parts) == sorted(parts)


@given(SEEDS, st.lists(st.integers(0, 3), max_size=6))
def test_flattening_undoes_splitting_up_to_the_order_of_layers(seed, layer):
    patch = make(seed, len(layer), WIDTH)
    parts = split_layers(patch, layer)
    assert set(parts) == set(layer)
    assert count_neurons(parts) == len(layer)
    if layer:
        flat, layers = flatten_layers(parts)
        order = np.argsort(layer, kind="stable")
        assert same(flat, take(patch, order))
        assert layers.tolist() == sorted(layer)


@given(SEEDS, SIZES, SIZES, DTYPES)
def test_concatenation_goes_layer_by_layer(seed, sizes, others, dtype):
    first, second = make_layers(seed, sizes, dtype), make_layers(seed + 100, others, dtype)
    both = concatenate_layers([first, second])
    assert list(both) == sorted(set(first) | set(second))
    for layer, patch in both.items():
        assert same(patch, concatenate([part[layer] for part in (first, second) if layer in part]))
    third = make_layers(seed + 200, sizes, dtype)
    assert same(concatenate_layers([both, third]), concatenate_layers([first, concatenate_layers([second, third])]))
    assert same(concatenate_layers([first, {}]), first)
    assert concatenate_layers([]) == {}


def test_a_layer_that_only_one_part_has_is_not_copied():
    first, second = make_layers(0, {1: 2, 3: 1}), make_layers(1, {3: 2})
    both = concatenate_layers([first, second])
    assert both[1] is first[1]
    assert both[3].key.shape == (3, WIDTH)


@given(SEEDS, SIZES, SIZES)
def test_what_was_concatenated_can_be_taken_again(seed, sizes, others):
    first, second = make_layers(seed, sizes), make_layers(seed + 100, others)
    both = concatenate_layers([first, second])
    assert same(take_layers(both, {layer: range(sizes[layer]) for layer in first}), first)
    starts = {layer: sizes.get(layer, 0) for layer in second}
    rest = {layer: range(start, start + others[layer]) for layer, start in starts.items()}
    assert same(take_layers(both, rest), second)


@given(SEEDS, SIZES, st.data())
def test_positions_by_layer_are_positions_in_the_table(seed, sizes, data):
    patches = make_layers(seed, sizes)
    neurons = {
        layer: data.draw(st.lists(st.integers(0, count - 1), max_size=3)) for layer, count in sizes.items() if count
    }
    positions = flat_positions(patches, neurons)
    chosen = take_layers(patches, neurons)
    assert len(positions) == count_neurons(chosen)
    patch, layer = flatten_layers(patches)
    if chosen:
        assert same(take(patch, positions), flatten_layers(chosen)[0])
        assert layer[positions].tolist() == flatten_layers(chosen)[1].tolist()


@given(SEEDS, SIZES)
def test_all_positions_by_layer_are_the_whole_table(seed, sizes):
    patches = make_layers(seed, sizes)
    everything = {layer: range(count) for layer, count in sizes.items()}
    assert flat_positions(patches, everything) == list(range(sum(sizes.values())))
    assert same(take_layers(patches, everything), patches)
    assert flat_positions(patches, {}) == []


def test_positions_in_a_layer_without_a_patch_stand_behind_all_others():
    patches = make_layers(0, {3: 2, 5: 1})
    assert flat_positions(patches, {3: [1], 4: [0, 1], 5: [0]}) == [1, 2, 3, 3]


@given(SEEDS, SIZES)
def test_what_is_on_the_host_stays_there(seed, sizes):
    patches = make_layers(seed, sizes)
    held = on_host(patches)
    everything = {layer: range(count) for layer, count in sizes.items()}
    patch, layer = flatten_layers(held)
    for result in (
        {0: patch},
        split_layers(patch, layer),
        concatenate_layers([held, held]),
        take_layers(held, everything),
    ):
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(result))
    assert bits(concatenate_layers([held, held])) == bits(concatenate_layers([patches, patches]))


def test_widths_that_differ_within_a_layer_are_an_error():
    with pytest.raises(TPatchError, match=r"widths \[4, 8\]"):
        concatenate_layers([{1: create(4, 1)}, {1: create(8, 1)}])


# --- JAX ---


def add_all(patches: dict[int, Patch], query: jax.Array) -> jax.Array:
    """What the patches of all layers add to one query, each layer weighted by its number."""
    parts = [(layer + 1) * contribution(patch, query, jax.nn.gelu) for layer, patch in patches.items()]
    return sum(parts[1:], parts[0])


@given(SEEDS, SIZES)
def test_jit_takes_the_dict_as_it_is(seed, sizes):
    patches, query = make_layers(seed, sizes), normal(seed, 5, WIDTH)
    assert relative(jax.jit(add_all)(patches, query), add_all(patches, query)) < 1e-5


def test_other_layers_are_another_program_and_other_numbers_are_not():
    traced = []

    @jax.jit
    def run(patches):
        traced.append(sorted(patches))
        return add_all(patches, jnp.ones((1, WIDTH)))

    for sizes in ({1: 2, 4: 1}, {4: 1, 1: 2}, {1: 2, 5: 1}):
        run(make_layers(0, sizes))
        run(make_layers(7, sizes))
    assert traced == [[1, 4], [1, 5]]


@given(SEEDS, SIZES)
def test_gradients_have_the_same_layers(seed, sizes):
    patches, query = make_layers(seed, sizes), normal(seed, 5, WIDTH)
    gradient = jax.grad(lambda patches: add_all(patches, query).sum())(patches)
    assert jax.tree.structure(gradient) == jax.tree.structure(patches)
    for layer, patch in patches.items():
        alone = jax.grad(lambda patch, layer=layer: add_all({layer: patch}, query).sum())(patch)
        for part, expected in zip(gradient[layer], alone, strict=True):
            assert relative(part, expected) < 1e-5
            assert bool(expected.any()) == bool(sizes[layer])


def test_a_step_of_an_optimiser_goes_through_the_whole_tree():
    """The numbers of layers are keys and no leaves: nothing in the tree is an integer that has no gradient."""
    patches = make_layers(0, {1: 2, 4: 1})
    assert {leaf.dtype for leaf in jax.tree.leaves(patches)} == {jnp.dtype(jnp.float32)}
    stepped = jax.tree.map(lambda leaf, step: leaf - 0.1 * step, patches, patches)
    assert list(stepped) == [1, 4]
    assert relative(stepped[4].key, 0.9 * patches[4].key) < 1e-6


@given(SEEDS, SIZES)
def test_vmap_runs_a_batch_of_them(seed, sizes):
    query = normal(seed, 5, WIDTH)
    lanes = [make_layers(seed + n, sizes) for n in (0, 20, 40)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes)
    together = jax.vmap(add_all, in_axes=(0, None))(batch, query)
    for number, patches in enumerate(lanes):
        assert relative(together[number], add_all(patches, query)) < 1e-5
