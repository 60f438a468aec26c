"""What is called pure is: `jit`, `vmap` and `grad` through models, traces, forks and anybody's networks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny_model, relative, same, tiny_tokenizer, write_tiny_folder
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tpatch_jax as tp
from tpatch_jax.core.patch import Patch
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import generation, networks
from tpatch_jax.models.checkpoints import folder as checkpoint
from tpatch_jax.models.model import Model, load_model
from tpatch_jax.models.patching import attach, merge
from tpatch_jax.models.rows import tokens_array

TEXTS = ["the cat in the hat", "in", "a hen then", "who is in there, then?"]
LAYERS = range(3)


@pytest.fixture(scope="module")
def tokens() -> jax.Array:
    model = make_tiny_model()
    return tokens_array([model.encode(text) for text in TEXTS], 24)


@pytest.fixture(scope="module")
def model() -> Model:
    return make_tiny_model()


def random_patch(neurons: int = 2, width: int = 16) -> Patch:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return Patch(draw(neurons, width), draw(neurons), draw(neurons, width))


# --- models ---


def test_a_model_runs_under_jit_closed_over_and_as_an_argument(model, tokens):
    expected = model.apply(tokens)
    inside = jax.jit(lambda batch: model.apply(batch))
    argument = jax.jit(lambda model, batch: model.apply(batch))
    params = jax.jit(lambda params, batch: model.with_params(params).apply(batch))
    assert relative(inside(tokens), expected) < 1e-5
    assert relative(argument(model, tokens), expected) < 1e-5
    assert relative(params(model.params, tokens), expected) < 1e-5
    assert relative(jax.jit(lambda: model.apply(tokens))(), expected) < 1e-5
    doubled = jax.tree.map(lambda leaf: 2 * leaf, model)
    assert relative(argument(doubled, tokens), doubled.apply(tokens)) < 1e-5
    assert argument._cache_size() == 1


def test_a_model_runs_under_vmap(model, tokens):
    expected = model.apply(tokens)
    each = jax.vmap(lambda row: model.apply(row[None])[0])(tokens)
    assert relative(each, expected) < 1e-5
    models = [model, make_tiny_model(1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(one.params for one in models))
    many = jax.vmap(lambda model: model.apply(tokens))(model.with_params(stacked))
    for found, one in zip(many, models, strict=True):
        assert relative(found, one.apply(tokens)) < 1e-5


def test_a_model_has_a_gradient(model, tokens):
    def loss(model: Model, batch: jax.Array) -> jax.Array:
        return -jax.nn.log_softmax(model.apply(batch))[0, 3, 7]

    gradient = jax.grad(loss)(model, tokens)
    assert isinstance(gradient, Model)
    assert jax.tree.structure(gradient) == jax.tree.structure(model)
    of_params = jax.jit(jax.grad(lambda params: loss(model.with_params(params), tokens)))(model.params)
    kernel = lambda params: params["layers"][1]["ffn"]["up"]["kernel"]  # noqa: E731
    assert relative(kernel(of_params), kernel(gradient.params)) < 1e-4
    # along the gradient the loss falls as it says
    step = 1e-3 / float(jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient))))
    lower = loss(jax.tree.map(lambda leaf, slope: leaf - step * slope, model, gradient), tokens)
    fall = step * float(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient)))
    assert float(loss(model, tokens) - lower) == pytest.approx(fall, rel=0.05)


def test_patches_in_two_layers_are_attached_and_merged_under_transformations(model, tokens):
    patches = {0: random_patch(), 2: random_patch(3)}
    for put in (attach, merge):
        expected = put(model, patches).apply(tokens)
        assert relative(expected, model.apply(tokens)) > 1e-3
        run = jax.jit(lambda model, patches, put=put: put(model, patches).apply(tokens))
        assert relative(run(model, patches), expected) < 1e-5
    batched = jax.tree.map(lambda leaf: jnp.stack([leaf, 0 * leaf]), patches)
    with_patches, without = jax.vmap(lambda patches: attach(model, patches).apply(tokens))(batched)
    assert relative(with_patches, attach(model, patches).apply(tokens)) < 1e-5
    assert relative(without, model.apply(tokens)) < 1e-5
    slope = jax.grad(lambda patches: attach(model, patches).apply(tokens)[0, 3, 7])(patches)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(slope))

    def resumed(model, patches):
        patched = attach(model, patches)
        traced = patched.trace(tokens, 1)
        return patched.resume(traced, traced.output)

    assert relative(jax.jit(resumed)(model, patches), attach(model, patches).apply(tokens)) < 1e-5


def test_a_mesh_with_explicit_axes_is_no_hindrance(model, tokens):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    expected = model.apply(tokens)
    with jax.set_mesh(mesh):
        placed = model.with_params(jax.device_put(model.params, NamedSharding(mesh, PartitionSpec())))
        for found in (placed.apply(tokens), jax.jit(lambda: placed.apply(tokens))()):
            np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompt", ["decoder", "encoder-decoder"])
def test_what_generates_runs_under_jit(model, prompt):
    config, params = model.config, model.params
    if prompt == "encoder-decoder":
        from test_reference import read

        config, params = read("t5").model.config, read("t5").model.params
    source = jnp.asarray([[3, 4, 5, -1], [6, 7, -1, -1]], jnp.int32) if config.encoder else None
    written = jnp.asarray([[1, 2, 3], [4, 5, 6]], jnp.int32)

    def run(params: dict, written: jax.Array) -> tuple:
        positions = jnp.broadcast_to(jnp.arange(3), (2, 3))
        return networks.decode(config, params, written, positions, networks.empty_cache(config, params, 2, 8, source))

    stream, cache = jax.jit(run)(params, written)
    expected, expected_cache = run(params, written)
    assert relative(stream, expected) < 1e-5
    assert jax.tree.structure(cache) == jax.tree.structure(expected_cache)


# --- traces and forks ---


@pytest.mark.parametrize("layer", LAYERS)
def test_a_trace_that_crossed_jit_is_resumed(model, tokens, layer):
    traced = jax.jit(lambda model, batch: model.trace(batch, layer))(model, tokens)
    assert traced.layer == layer
    assert isinstance(traced.layer, int)
    expected = model.apply(tokens)
    assert relative(model.resume(traced, traced.output), expected) < 1e-5
    resume = jax.jit(lambda model, traced: model.resume(traced, traced.output))
    assert relative(resume(model, traced), expected) < 1e-5
    rows = jax.vmap(lambda row: model.trace(row[None], layer))(tokens)
    assert rows.query.shape == (len(TEXTS), 1, *traced.query.shape[1:])
    each = jax.vmap(lambda traced: model.resume(traced, traced.output)[0])(rows)
    assert relative(each, expected) < 1e-5
    slope = jax.grad(lambda output: model.resume(traced, output)[0, 3, 7])(traced.output)
    assert float(jnp.abs(slope[0]).max()) > 0
    assert float(jnp.abs(slope[1:]).max()) == 0
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(traced))


def test_another_layer_is_another_program(model, tokens):
    resume = jax.jit(lambda traced: model.resume(traced, traced.output))
    expected = model.apply(tokens)
    for layer in LAYERS[:2]:
        assert relative(resume(model.trace(tokens, layer)), expected) < 1e-5
    # both traces have arrays of the same shapes, and yet what follows them differs
    assert resume._cache_size() == 2
    with pytest.raises(ValueError, match=r"different pytree metadata|Mismatch custom node data"):
        jax.tree.map(jnp.add, model.trace(tokens, 0), model.trace(tokens, 1))


def test_a_fork_that_crossed_jit_is_resumed(model, tokens):
    count = tokens.shape[1]
    places = jnp.broadcast_to(jnp.arange(count), tokens.shape)
    sees = jnp.broadcast_to(jnp.tri(count, dtype=bool), (*tokens.shape, count))
    # Each row in a sequence of its own, all in one pack.
    pack = networks.Pack(*(part[None] for part in (tokens, places, sees, places[:, 2:], places[:, :2])))
    run = lambda params: networks.fork(model.config, params, pack, 1)  # noqa: E731
    forked, expected = jax.jit(run)(model.params), run(model.params)
    assert forked.layer == 1
    assert isinstance(forked.layer, int)
    end = jax.jit(lambda params, forked: networks.resume_fork(model.config, params, forked, forked.output))
    wanted = networks.resume_fork(model.config, model.params, expected, expected.output)
    assert relative(end(model.params, forked), wanted) < 1e-5
    assert relative(networks.resume_fork(model.config, model.params, forked, forked.output), wanted) < 1e-5
    moved = forked._replace(output=forked.output + 1)
    assert moved.layer == 1
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(moved))


# --- equality ---


def test_a_model_equals_its_copy_and_hashes(model):
    copied = jax.tree.map(jnp.copy, model)
    assert model == model
    assert copied == model
    assert same(copied, model)
    assert hash(copied) == hash(model)
    assert len({model, copied}) == 1
    assert make_tiny_model() == model  # another tokenizer of the same kind
    assert make_tiny_model(1) != model
    assert model != "model"


def test_every_bit_and_every_fact_counts(model):
    scale = model.params["norm"]["scale"]

    def with_scale(array: jax.Array) -> Model:
        return model.with_params({**model.params, "norm": {"scale": array}})

    assert with_scale(jnp.copy(scale)) == model
    assert with_scale(scale.at[3].add(1e-6)) != model
    assert with_scale(scale.astype(jnp.bfloat16)) != model
    assert with_scale(scale[:8]) != model
    zero = scale.at[3].set(0.0)
    assert with_scale(zero) != with_scale(zero.at[3].set(-0.0))
    lost = scale.at[3].set(jnp.nan)
    assert with_scale(lost) == with_scale(jnp.copy(lost))
    for field, value in {"name": "other", "settings": {**model.settings, "more": 1}}.items():
        assert dataclasses.replace(model, **{field: value}) != model
    assert dataclasses.replace(model, config=dataclasses.replace(model.config, embed_scale=2.0)) != model
    assert dataclasses.replace(model, settings=dict(model.settings)) == model
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["cat"])
    assert dataclasses.replace(model, tokenizer=tokenizer) != model
    assert dataclasses.replace(model, tokenizer=None) != model


# --- several texts at once ---


def test_a_list_of_texts_gives_what_each_gives_alone(model):
    together = model.generate(TEXTS, 12)
    assert together == [model.generate(text, 12) for text in TEXTS]
    assert len(set(together)) > 1
    assert model.generate(tuple(TEXTS[:1]), 12) == together[:1]
    assert model.generate([]) == []


def test_a_long_prompt_leaves_the_others_their_room(model):
    texts = ["a" * (model.config.context - 2), "in"]
    together = model.generate(texts, 20)
    assert together == [model.generate(text, 20) for text in texts]
    rows = [model.encode(text) for text in texts]
    lengths = [len(row) for row in generation.greedy(model.config, model.params, rows, 20)]
    assert lengths == [2, 20]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (["in", 3], "prompt 1 is 3; give a list of texts"),
        (["in", None, 3], "prompt 1 is None"),
        (3, "3 is no prompt; give a text, or a list of texts"),
        (b"in", "b'in' is no prompt; decode it first"),
        (["in", ""], "prompt 1 is empty"),
        (["in", "a" * 70], "prompt 1 has 70 tokens, the model reads 64; shorten it"),
    ],
)
def test_a_prompt_of_another_kind_is_named(model, prompt, message):
    with pytest.raises(TPatchError, match=message):
        model.generate(prompt, 2)


def test_loading_reads_the_settings_once(model, tmp_path, monkeypatch):
    folder = write_tiny_folder(model, tmp_path / "tiny")
    read, times = checkpoint.read_settings, []
    monkeypatch.setattr(checkpoint, "read_settings", lambda folder: times.append(folder) or read(folder))
    loaded = load_model(folder)
    assert times == [folder]
    assert loaded == load_model(folder)
    assert loaded.apply(jnp.ones((1, 8), jnp.int32)).shape == (1, 8, 300)


# --- anybody's networks ---


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up, self.down = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(x)))


class Tiny(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed, self.mlp = nnx.Embed(50, 16, rngs=rngs), Mlp(rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        return self.embed.attend(x + self.mlp(x))


IDS = jnp.asarray(np.random.default_rng(2).integers(0, 50, (3, 8)), jnp.int32)


def cut_tiny() -> tp.Network:
    return tp.from_nnx(Tiny(nnx.Rngs(0)), "mlp", activation="gelu_tanh", up="up", down="down", example=IDS)


@pytest.fixture(scope="module")
def network() -> tp.Network:
    return cut_tiny()


def test_a_network_runs_under_jit_vmap_and_grad(network):
    patched = network.attach(random_patch())
    run = jax.jit(lambda network, ids: network.apply(ids))
    for one in (network, patched, network.attach(random_patch(), relu=True)):
        expected = one.apply(IDS)
        assert relative(run(one, IDS), expected) < 1e-5
        assert relative(jax.jit(lambda ids, one=one: one.apply(ids))(IDS), expected) < 1e-5
        assert relative(jax.vmap(lambda ids, one=one: one.apply(ids[None])[0])(IDS), expected) < 1e-5
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), one)
        assert relative(jax.vmap(lambda one: one.apply(IDS))(stacked)[1], expected) < 1e-5
    slope = jax.grad(lambda network: network.apply(IDS)[0, 3, 7])(patched)
    assert isinstance(slope, tp.Network)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(slope.beside))
    assert jax.tree.structure(slope) == jax.tree.structure(patched)


def test_a_trace_of_a_network_crosses_jit(network):
    traced = jax.jit(lambda network, ids: network.trace(ids))(network, IDS)
    assert relative(network.resume(traced, traced.output), network.apply(IDS)) < 1e-5
    assert traced.layer == network.layer


def test_whether_a_network_is_pointwise_is_known_where_it_is_traced():
    # first asked within `jit`, where no parameter has a value
    fresh, lane = cut_tiny(), np.array([2, 0])
    pick = jax.jit(lambda network, ids: network.gather(network.trace(ids), lane, lane).query)
    np.testing.assert_allclose(pick(fresh, IDS)[:, 0], fresh.trace(IDS).query[lane, lane], rtol=1e-5, atol=1e-6)
    assert fresh.pointwise
    assert relative(fresh.apply(IDS), cut_tiny().apply(IDS)) < 1e-6  # nothing that was traced is left in it


def test_parameters_of_another_type_are_cut_anew(network):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), network)
    with jax.numpy_dtype_promotion("standard"):
        assert half.cut(IDS.shape) is not network.cut(IDS.shape)
        for dtype, one in ((jnp.float32, network), (jnp.bfloat16, half)):
            plain = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), nnx.state(Tiny(nnx.Rngs(0))))
            users = nnx.merge(nnx.graphdef(Tiny(nnx.Rngs(0))), plain)
            assert relative(one.apply(IDS), users(IDS)) < 1e-5


def test_a_network_equals_its_copy_and_hashes(network):
    copied = jax.tree.map(jnp.copy, network)
    assert copied == network
    assert hash(copied) == hash(network)
    assert network != network.attach(random_patch())
    assert network.attach(random_patch()) == copied.attach(random_patch())
    assert jax.tree.map(lambda leaf: leaf + 1, network) != network
    assert network != cut_tiny()  # another module, whatever it holds
    assert network != "network"
