"""Sizes hold what they are meant to hold."""

from hypothesis import given
from hypothesis import strategies as st

from tpatch_jax.core.sizes import few_or_most, in_blocks, in_steps, power_of_two, round_up

COUNTS = st.integers(0, 5000)
POWERS = st.integers(0, 8).map(lambda power: 2**power)


@given(COUNTS, POWERS)
def test_steps_hold_all_and_are_hardly_empty(count, most):
    sizes = in_steps(count, most)
    assert set(sizes) <= {most, min(4, most)}
    assert sizes == sorted(sizes, reverse=True)
    assert count <= sum(sizes) < count + max(4, most // 4 + 1)
    assert sum(sizes[:-1]) < count or not sizes


@given(COUNTS, POWERS, POWERS)
def test_other_sizes(count, least, block):
    assert few_or_most(min(count, block), block) in (min(4, block), block)
    assert min(count, block) <= few_or_most(min(count, block), block) <= block
    assert power_of_two(count, least) >= max(count, least)
    assert round_up(count, block) - block < max(count, 1) <= round_up(count, block)
    assert in_blocks(count, least, block) >= count
