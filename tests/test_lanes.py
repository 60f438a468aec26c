"""Lanes that stop one by one: each ends where it would alone, whatever steps beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tpatch_jax.core.lanes import minimise_lanes, take_lanes

PROMOTION = "standard"  # optax takes steps

GOALS = np.asarray([[0.1, 0.0], [2.0, 1.0], [0.4, -0.3], [1.0, 1.0], [9.0, 0.0]], np.float32)
STEPS = 60


def minimise(goals, seen=None):
    """Each lane goes to its goal, no farther than 3 in any direction; its state counts the looks at it."""

    def loss(moves, goals, looks, number):
        if seen is not None:
            seen.append(moves.shape[0])
        each = jnp.sum(jnp.square(moves - goals), -1)
        return jnp.sum(each), each

    def stop(moves, goals, looks, each, number):
        return looks + 1, (each < 0.01) | ~jnp.isfinite(each)

    def project(moves, goals):
        return jnp.clip(moves, -3, 3)

    start, looks = jnp.zeros(goals.shape), jnp.zeros(len(goals), jnp.int32)
    return minimise_lanes(loss, project, stop, start, jnp.asarray(goals), looks, optax.adam(0.2), STEPS)


def test_lanes_end_where_they_would_alone():
    seen = []
    together = minimise(GOALS, seen)
    # some were dropped on the way, and each size was traced once, however many steps it took
    assert seen == [5, 4, 2]
    assert len(set(together.steps.tolist())) > 2
    assert together.steps[4] == STEPS
    np.testing.assert_allclose(together.moves[4], [3, 0])
    np.testing.assert_array_equal(together.state, together.steps + 1)
    assert (np.square(together.moves[:4] - GOALS[:4]).sum(-1) < 0.01).all()
    for lane, goal in enumerate(GOALS):
        alone = minimise(goal[None])
        assert alone.steps[0] == together.steps[lane]
        np.testing.assert_allclose(alone.moves[0], together.moves[lane], rtol=1e-5, atol=1e-6)


def test_a_lane_that_is_no_number_ends_and_leaves_the_others_alone():
    goals = GOALS.copy()
    goals[1] = np.nan
    broken, whole = minimise(goals), minimise(GOALS)
    assert broken.steps[1] == 0
    others = [0, 2, 3, 4]
    np.testing.assert_array_equal(broken.steps[others], whole.steps[others])
    np.testing.assert_allclose(broken.moves[others], whole.moves[others], rtol=1e-5, atol=1e-6)


def test_some_lanes_of_any_tree():
    tree = {"rows": jnp.arange(12).reshape(6, 2), "scale": jnp.arange(3), "count": jnp.array(7)}
    taken = jax.tree.map(np.asarray, take_lanes(tree, np.array([2, 0, 2]), 3))
    np.testing.assert_array_equal(taken["rows"][:, 0] // 2, [4, 5, 0, 1, 4, 5])
    np.testing.assert_array_equal(taken["scale"], [2, 0, 2])
    assert taken["count"] == 7
