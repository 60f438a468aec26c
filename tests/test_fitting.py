"""Fitting on arrays alone: edits hold, memory stays silent, lanes do not couple."""

import dataclasses
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative, same
from jax.tree_util import Partial

from tpatch_jax.core.fit import FitInfo, FitProblem, FitSettings, fit, fit_many
from tpatch_jax.core.memory import create_memory
from tpatch_jax.core.objective import Weights, edit_loss
from tpatch_jax.core.patch import Patch, contribution, join, preactivations
from tpatch_jax.core.recipes import joint
from tpatch_jax.core.recipes.staged import recognise
from tpatch_jax.errors import TPatchError

PROMOTION = "standard"  # optax's Adam needs it

WIDTH, VOCABULARY, LANES, CONTEXTS = 16, 40, 7, 3
ACT = jax.nn.silu
SETTINGS = {
    "staged": FitSettings(lanes=8, key_steps=24, rounds=2, negatives=32),
    # Strong weight decay, so that lanes stop early, and not all at the same step.
    "joint": FitSettings(
        recipe="joint",
        learning_rate=0.1,
        weight_decay=0.5,
        least_steps=50,
        most_steps=200,
        patience=10,
        value_spread=1.0,
        lanes=8,
    ),
}
BOTH = pytest.mark.parametrize("recipe", sorted(SETTINGS))


class Problem(NamedTuple):
    lanes: FitProblem
    memory: object
    resume: Partial
    keys: jax.Array


def finish(head, context, output):
    return (context["residual"] + output) @ head


@cache
def problem() -> Problem:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    head, target = draw(WIDTH, VOCABULARY), jnp.arange(LANES, dtype=jnp.int32) * 5
    lanes = FitProblem(
        query=2 * draw(LANES, 1, WIDTH) + 0.1 * draw(LANES, CONTEXTS, WIDTH),
        output=0.5 * draw(LANES, CONTEXTS, WIDTH),
        negative=2 * draw(LANES, 2, WIDTH),
        context={"residual": draw(LANES, CONTEXTS, WIDTH)},
        target=target,
        direction=head.T[target].at[6].multiply(-1),  # a lane that needs steps on its value
        scale=jnp.full(LANES, 4.0),
    )
    keys, memory = jax.random.split(jax.random.key(1), LANES), create_memory(draw(200, WIDTH))
    return Problem(lanes, memory, Partial(finish, head), keys)


def pick(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


@cache
def fitted(recipe: str) -> tuple[Patch, FitInfo]:
    given = problem()
    return fit_many(given.lanes, given.memory, given.resume, given.keys, SETTINGS[recipe], ACT)


@cache
def one(recipe: str):
    """`fit` itself, jitted: lane by lane."""
    return jax.jit(lambda lane, memory, resume, key: fit(lane, memory, resume, key, SETTINGS[recipe], ACT))


def largest_difference(left: Patch, right: Patch) -> float:
    """The largest relative distance of any lane's key, bias or value, each as one vector."""
    pairs = zip(left[:3], right[:3], strict=True)
    return max(relative(a[lane], b[lane]) for a, b in pairs for lane in range(len(b)))


@BOTH
def test_edits_hold_and_memory_stays_silent(recipe):
    (patches, info), given = fitted(recipe), problem()
    assert patches.key.shape == patches.value.shape == (LANES, 1, WIDTH)
    assert info.held.all()
    holds = []
    for lane in range(LANES):
        mine, patch = pick(given.lanes, lane), pick(patches, lane)
        plain = given.resume(mine.context, mine.output)
        logits = given.resume(mine.context, mine.output + contribution(patch, mine.query, ACT))
        assert jnp.argmax(plain[0]) != mine.target
        assert jnp.argmax(logits[0]) == mine.target  # the bare prompt
        holds.append(np.mean(jnp.argmax(logits, -1) == mine.target))
        assert info.l_e[lane] == pytest.approx(float(edit_loss(logits, mine.target)), rel=1e-3, abs=1e-5)
        assert preactivations(patch, mine.query[0]).min() > 0
        assert preactivations(patch, given.memory.query).max() < 0
        assert preactivations(patch, mine.negative).max() < 0
    assert np.mean(holds) > 0.8  # its contexts
    assert (info.margin > 0).all()
    assert recipe == "joint" or (info.steps > SETTINGS[recipe].key_steps).any()


def test_all_patches_together_still_hold():
    (patches, _), given = fitted("staged"), problem()
    everything = join(patches)
    lanes = given.lanes
    logits = jax.vmap(given.resume)(lanes.context, lanes.output + contribution(everything, lanes.query, ACT))
    np.testing.assert_array_equal(jnp.argmax(logits[:, 0], -1), lanes.target)
    assert contribution(everything, given.memory.query, jax.nn.relu).max() == 0


@BOTH
def test_each_alone_gives_the_same(recipe):
    patches, info = fitted(recipe)
    lanes, memory, resume, keys = problem()
    alone = [one(recipe)(pick(lanes, lane), memory, resume, keys[lane]) for lane in range(LANES)]
    stacked, infos = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    assert largest_difference(stacked, patches) < 1e-5
    np.testing.assert_array_equal(infos.steps, info.steps)
    np.testing.assert_allclose(infos.margin, info.margin, rtol=1e-4)


@BOTH
def test_the_order_changes_nothing(recipe):
    order = np.array([3, 1, 6, 0, 2, 5, 4])
    lanes, memory, resume, keys = problem()
    patches, _ = fit_many(pick(lanes, order), memory, resume, keys[order], SETTINGS[recipe], ACT)
    assert largest_difference(patches, pick(fitted(recipe)[0], order)) < 1e-5


@BOTH
def test_other_buckets_give_the_same(recipe):
    seen = []
    settings = dataclasses.replace(SETTINGS[recipe], lanes=2)
    patches, _ = fit_many(*problem(), settings, ACT, seen.append)
    assert largest_difference(patches, fitted(recipe)[0]) < 1e-5
    assert seen == [2, 4, 6, 7]


@BOTH
def test_padding_lanes_change_no_bit(recipe):
    # Seven lanes are padded to eight; here another lane stands where the padding was.
    lanes, memory, resume, keys = problem()
    more = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[3:4]]), lanes)
    more = more._replace(target=more.target.at[-1].set(33))
    patches, info = fit_many(more, memory, resume, keys[np.r_[:LANES, 3]], SETTINGS[recipe], ACT)
    assert same(pick((patches, info), slice(0, LANES)), fitted(recipe))


@BOTH
def test_the_same_seed_gives_the_same_bits(recipe):
    assert same(fit_many(*problem(), SETTINGS[recipe], ACT), fitted(recipe))


def test_another_seed_gives_another_joint_patch():
    lanes, memory, resume, _ = problem()
    keys = jax.random.split(jax.random.key(9), LANES)
    patches, _ = fit_many(lanes, memory, resume, keys, SETTINGS["joint"], ACT)
    assert relative(patches.value, fitted("joint")[0].value) > 1e-2


def test_joint_lanes_stop_one_by_one():
    steps = np.asarray(fitted("joint")[1].steps)
    assert 1 <= (steps == steps.max()).sum() <= 4  # so that the tests above also saw a bucket of eight shrink
    assert steps.min() >= SETTINGS["joint"].least_steps
    assert steps.max() <= SETTINGS["joint"].most_steps


@BOTH
def test_fit_under_vmap_is_fit_many(recipe):
    lanes, memory, resume, keys = problem()
    settings = SETTINGS[recipe]
    run = jax.jit(jax.vmap(lambda lane, key: fit(lane, memory, resume, key, settings, ACT)))
    patches, info = run(lanes, keys)
    assert largest_difference(patches, fitted(recipe)[0]) < 1e-5
    np.testing.assert_array_equal(info.steps, fitted(recipe)[1].steps)


@BOTH
def test_a_lane_that_cannot_be_parted_says_so(recipe):
    lanes, memory, resume, keys = problem()
    lane = pick(lanes, 0)
    trapped = memory._replace(query=memory.query.at[5].set(lane.query[0]))
    excused = trapped._replace(answer=trapped.answer.at[5].set(lane.target))  # that row wants the very same token
    contrary = lane._replace(negative=lane.negative.at[1].set(lane.query[0]))
    margins = []
    for given, rows in ((lane, trapped), (contrary, memory), (lane, excused)):
        patch, info = one(recipe)(given, rows, resume, keys[0])
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((patch, info)))
        margins.append(float(info.margin))
    assert max(margins[:2]) <= 1e-6  # two equal queries may go through matrix products of different shapes
    assert margins[2] > 0.1


def test_output_bias_is_an_ungated_neuron():
    settings = dataclasses.replace(SETTINGS["joint"], output_bias=True)
    lanes, memory, resume, keys = problem()
    run = jax.jit(lambda lane, key: fit(lane, memory, resume, key, settings, ACT))
    lane = pick(lanes, 2)
    patch, info = run(lane, keys[2])
    assert patch.key.shape == (2, WIDTH)
    assert not patch.key[1].any()
    assert patch.bias.tolist() == [0, 1]
    ungated = patch.value[1] * ACT(1.0)
    assert np.ptp(ungated) == 0  # b is a scalar
    assert ungated[0] != 0
    for query in (lane.query, memory.query):
        expected = ACT(query @ patch.key[0])[:, None] * patch.value[0] + ungated[0]
        assert relative(contribution(patch, query, ACT), expected) < 1e-5
    logits = resume(lane.context, lane.output + contribution(patch, lane.query, ACT))
    assert info.held
    assert info.l_e == pytest.approx(float(edit_loss(logits, lane.target)), rel=1e-3, abs=1e-5)


def test_a_key_turns_with_its_queries():
    """Steps straight down the gradient know no axes; Adam's, equally far along each of them, do."""
    rng = np.random.default_rng(3)
    turn = jnp.asarray(np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0], jnp.float32)
    query, rows = problem().lanes.query[0], problem().memory.query * jnp.linspace(0.3, 3.0, WIDTH)
    settings = dataclasses.replace(SETTINGS["staged"], negatives=len(rows))

    def key(turned: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            found = recognise(
                query @ turned, jnp.asarray(0), jnp.zeros((0, WIDTH)), create_memory(rows @ turned), settings
            )
        assert found.margin > 0
        return found.key

    assert relative(key(turn), key(jnp.eye(WIDTH)) @ turn) < 1e-3


def test_a_key_that_cannot_be_parted_from_memory_keeps_a_sane_length():
    given, prompt = problem(), problem().lanes.query[:, :1]
    # A negative that is stronger than the prompt, and contexts in which it is weak.
    lanes = given.lanes._replace(
        query=jnp.concatenate([prompt, prompt / 4, prompt / 4], 1),
        negative=jnp.concatenate([1.5 * prompt, 1.5 * prompt], 1),
    )
    patches, info = fit_many(lanes, given.memory, given.resume, given.keys, SETTINGS["staged"], ACT)
    assert (np.asarray(info.margin) < 0).all()
    z = jax.vmap(preactivations)(patches, lanes.query)[..., 0] / SETTINGS["staged"].sharpness
    assert (np.abs(np.asarray(z[:, 0]) - 1) < 0.5).all()
    assert float(jnp.abs(z).max()) < 1e3


def test_weight_decay_is_a_part_of_the_gradient():
    """As in the authors' code: Adam sees it, and of a parameter without any other gradient it takes a whole step."""
    settings = dataclasses.replace(SETTINGS["joint"], weight_decay=0.01)
    params = {"far": jnp.array([100.0]), "near": jnp.array([0.1])}
    transform = joint.optimiser(settings)
    update, _ = transform.update(jax.tree.map(jnp.zeros_like, params), transform.init(params), params)
    np.testing.assert_allclose(update["far"], 1.0, rtol=1e-4)
    np.testing.assert_allclose(update["near"], 1.0, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lanes", 0, "lanes is 0; give 1 or more"),
        ("negatives", -1, "negatives is -1; give 1 or more"),
        ("rounds", 0, "rounds is 0; give 1 or more"),
        ("key_steps", -1, "key_steps is -1; give 0 or more"),
        ("split", float("nan"), "split is nan; give 0 to 1"),
        ("learning_rate", 0.0, "learning_rate is 0.0; give a positive number"),
        ("clip", -1.0, "clip is -1.0; give a positive number"),
        ("overshoot", float("inf"), "overshoot is inf"),
        ("weights", Weights(hardest=0), "hardest is 0; give 1 or more"),
        ("weights", Weights(memory=-1.0), "memory is -1.0; give 0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_named(name, value, message):
    with pytest.raises(TPatchError, match=message):
        FitSettings(**{name: value})
    assert FitSettings(clip=float("inf"), value_limit=float("inf")).clip == float("inf")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@BOTH
def test_a_problem_in_half_precision_is_fitted_in_float32(recipe, dtype):
    lanes, memory, resume, keys = problem()
    lanes = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf, lanes)
    patches, info = fit_many(lanes, memory, resume, keys, SETTINGS[recipe], ACT)
    assert {leaf.dtype for leaf in patches} == {jnp.dtype("float32")}
    assert np.asarray(info.held).sum() == np.asarray(fitted(recipe)[1].held).sum()
    alone, _ = fit(pick(lanes, 0), memory, resume, keys[0], SETTINGS[recipe], ACT)
    np.testing.assert_allclose(alone.key, patches.key[0], rtol=2e-3, atol=2e-3)
