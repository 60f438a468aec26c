"""Networks from elsewhere, in NNX and in Linen: cut, resume, attach, merge, edit, and what is refused."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import bits, relative, same
from flax import nnx
from flax.training.train_state import TrainState

import tpatch_jax as tp
from tpatch_jax.core import ffn
from tpatch_jax.core.fit import fit_many
from tpatch_jax.core.patch import Patch, create
from tpatch_jax.editors.tpatcher import rounds
from tpatch_jax.models.foreign.network import Network

PROMOTION = "standard"
pytestmark = pytest.mark.usefixtures("quick_compilation")
VOCABULARY, WIDTH, LENGTH = 60, 32, 24


class FeedForward(nnx.Module):
    def __init__(self, width: int, hidden: int, rngs: nnx.Rngs, bias: bool = True, **kinds):
        self.expand = nnx.Linear(width, hidden, use_bias=bias, rngs=rngs, **kinds)
        self.contract = nnx.Linear(hidden, width, use_bias=bias, rngs=rngs, **kinds)

    def __call__(self, x):
        return self.contract(nnx.gelu(self.expand(x)))


class Gated(nnx.Module):
    def __init__(self, width: int, hidden: int, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.gate, self.up, self.down = linear(width, hidden), linear(width, hidden), linear(hidden, width)

    def __call__(self, x):
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    def __init__(self, mlp: nnx.Module, rngs: nnx.Rngs, dropout: float = 0.0):
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.norm_1, self.norm_2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.mlp, self.dropout = mlp, nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norm_1(x), mask=mask)
        return x + self.dropout(self.mlp(self.norm_2(x)))


class Decoder(nnx.Module):
    """A decoder in the usual NNX style."""

    def __init__(self, rngs: nnx.Rngs, mlps=None, dropout: float = 0.0):
        self.tokens = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        mlps = mlps or [FeedForward(WIDTH, 4 * WIDTH, rngs) for _ in range(2)]
        self.layers = nnx.List([Layer(mlp, rngs, dropout) for mlp in mlps])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        mask = nnx.make_causal_mask(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(self.norm(x))


class MlpBlock(nn.Module):
    """Shaped after Flax's language-model example, with its dropout."""

    hidden: int
    rate: float = 0.1

    @nn.compact
    def __call__(self, inputs, deterministic: bool = True):
        x = nn.gelu(nn.Dense(self.hidden)(inputs))
        x = nn.Dropout(self.rate)(x, deterministic=deterministic)
        return nn.Dense(inputs.shape[-1])(x)


class Block(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x, mask, deterministic: bool):
        y = nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x), mask=mask)
        x = x + y
        return x + MlpBlock(self.hidden, name="mlp")(nn.LayerNorm()(x), deterministic=deterministic)


class LanguageModel(nn.Module):
    hidden: int = 64
    depth: int = 2
    remat: bool = False

    @nn.compact
    def __call__(self, tokens, deterministic: bool = False):
        embed = nn.Embed(VOCABULARY, WIDTH)
        table = self.param("positions", nn.initializers.normal(0.1), (LENGTH, WIDTH))
        x = embed(tokens) + table[None, : tokens.shape[1]]
        mask = nn.make_causal_mask(tokens)
        kind = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        for number in range(self.depth):
            x = kind(self.hidden, name=f"block_{number}")(x, mask, deterministic)
        return nn.Dense(VOCABULARY)(nn.LayerNorm()(x))


TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, VOCABULARY, (3, 11)), jnp.int32)
TOLERANCE = 2e-6


def quiet(module, tokens):
    return module(tokens, deterministic=True)


def run(module, tokens=TOKENS):
    """The user's own network, as the user runs it."""
    if isinstance(module, nnx.Module):
        graph, state = nnx.split(module)
        return jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))(state, tokens)
    module, params = module
    return jax.jit(partial(module.apply, deterministic=True))({"params": params}, tokens)


def initial(module) -> dict:
    return jax.jit(module.init)(jax.random.key(0), TOKENS)["params"]


def build(*args, seed: int = 0, **kwargs) -> Decoder:
    return nnx.jit(lambda: Decoder(nnx.Rngs(seed), *args, **kwargs))()


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return build()


@pytest.fixture(scope="module")
def network(decoder) -> Network:
    return tp.from_nnx(decoder, "layers.1.mlp", activation="gelu_tanh", up="expand", down="contract", example=TOKENS)


@pytest.fixture(scope="module")
def linen() -> tuple[LanguageModel, dict]:
    module = LanguageModel()
    return module, initial(module.clone())


@pytest.fixture(scope="module")
def linen_network(linen) -> Network:
    widen = lambda module, n: module.clone(hidden=module.hidden + n)  # noqa: E731
    return tp.from_linen(*linen, "block_1/mlp", activation="gelu_tanh", call=quiet, widen=widen, example=TOKENS)


@pytest.fixture(scope="module")
def inner(decoder) -> Network:
    return tp.from_nnx(decoder, "layers.0.mlp", activation="gelu_tanh", example=TOKENS)


@pytest.fixture(scope="module")
def expected(decoder, linen) -> dict[str, jax.Array]:
    """What the users' own networks say."""
    return {"nnx": run(decoder), "linen": run(linen)}


@pytest.fixture(params=["nnx", "linen"])
def either(request, network, linen_network) -> Network:
    return network if request.param == "nnx" else linen_network


def active(network: Network, neurons: int = 5) -> Patch:
    """Neurons that fire on some of the tokens."""
    query = network.trace(TOKENS).query.reshape(-1, WIDTH)[:neurons]
    value = jax.random.normal(jax.random.key(3), query.shape)
    return Patch(query / 4, jnp.linspace(-1, 1, neurons), value)


def weights(module: nnx.Module) -> nnx.State:
    return nnx.state(module, nnx.Param)


def products(steps) -> int:
    return sum(step.equation.primitive.name == "dot_general" for step in steps)


def test_resuming_a_trace_is_the_users_own_network(either, expected):
    traced = either.trace(TOKENS)
    assert traced.query.shape == traced.output.shape == (*TOKENS.shape, WIDTH)
    logits = either.resume(traced, traced.output)
    assert relative(logits, expected["nnx" if "layers" in either.path else "linen"]) < TOLERANCE
    assert bits(either.apply(TOKENS)) == bits(logits)


def test_the_captured_arrays_are_the_ffns(network, decoder):
    traced = network.trace(TOKENS)
    assert relative(decoder.layers[1].mlp(traced.query), traced.output) < TOLERANCE
    assert traced.layer == 1


def test_what_follows_the_output_depends_on_it(either):
    traced = either.trace(TOKENS)
    moved = either.resume(traced, traced.output.at[0, 4].add(jnp.arange(1.0 * WIDTH)))
    difference = np.asarray(jnp.abs(moved - either.apply(TOKENS)).max(-1))
    assert difference[0, 4] > 1e-3
    assert np.count_nonzero(difference > 1e-6) == 1


def test_resume_runs_only_what_follows(either):
    halves = either.cut(TOKENS.shape)
    # After the last FFN there is a residual sum, a norm and the head: one matrix product, none of the attention's.
    assert products(halves.after) == 1
    assert list(halves.context) == ["0"]
    assert halves.context["0"].shape == (*TOKENS.shape, WIDTH)
    traced = either.trace(TOKENS)
    compiled = jax.make_jaxpr(either.resume)(traced, traced.output)
    text = str(compiled)
    assert text.count("dot_general[") == 1
    assert "gather" not in text  # of the embedding
    assert products(halves.before) > 6


def test_a_cut_at_an_inner_layer(inner, expected):
    traced = inner.trace(TOKENS)
    assert traced.layer == 0
    assert relative(inner.resume(traced, traced.output), expected["nnx"]) < TOLERANCE
    halves = inner.cut(TOKENS.shape)
    # Attention has six products and an FFN two; the other layer and the head come after the cut.
    assert (products(halves.before), products(halves.after)) == (8, 8 + 1)
    assert not inner.pointwise
    with pytest.raises(tp.TPatchError, match=r"does not act on each position alone.*cut at the last FFN"):
        inner.gather(traced, [0], [0])


def test_gathered_positions_resume_as_in_their_rows(either):
    assert either.pointwise
    traced, lane, place = either.trace(TOKENS), np.array([2, 0, 1]), np.array([10, 0, 7])
    gathered = either.gather(traced, lane, place)
    assert gathered.query.shape == (3, 1, WIDTH)
    logits = either.resume(gathered, gathered.output)[:, 0]
    assert relative(logits, either.apply(TOKENS)[lane, place]) < TOLERANCE


def test_a_network_that_adds_positions_at_the_end_is_not_pointwise(linen):
    class Late(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(VOCABULARY, WIDTH)(tokens)
            x = x + MlpBlock(48, name="mlp")(x)
            return nn.Dense(VOCABULARY)(x + nn.Embed(LENGTH, WIDTH)(jnp.arange(tokens.shape[1])))

    params = Late().init(jax.random.key(0), TOKENS)
    late = tp.from_linen(Late(), params, "mlp")
    assert not late.pointwise
    assert relative(late.apply(TOKENS), jax.jit(Late().apply)(params, TOKENS)) < TOLERANCE


def test_patches_that_contribute_nothing_change_no_bit(either):
    before = bits(either.apply(TOKENS))
    zero = create(WIDTH, 4)._replace(key=jnp.ones((4, WIDTH)), bias=jnp.ones(4))
    silent = Patch(jnp.ones((4, WIDTH)), jnp.full(4, -1e4), jnp.ones((4, WIDTH)))
    assert bits(either.attach(zero).apply(TOKENS)) == before
    assert bits(either.attach(silent, relu=True).apply(TOKENS)) == before
    assert bits(either.attach(active(either)).apply(TOKENS)) != before
    assert bits(either.attach(active(either)).detach().apply(TOKENS)) == before
    assert bits(either.apply(TOKENS)) == before


def test_attached_patches_join(either):
    first, second = active(either, 3), active(either, 5)
    joined = either.attach(first).attach(second).apply(TOKENS)
    assert bits(joined) == bits(either.attach(tp.concatenate([first, second])).apply(TOKENS))
    traced = either.attach(first).trace(TOKENS)
    assert relative(either.resume(traced, traced.output), either.attach(first).apply(TOKENS)) < TOLERANCE


def test_attached_is_what_the_formula_says(either, decoder):
    patch = active(either)
    traced, changed = either.trace(TOKENS), either.attach(patch).trace(TOKENS)
    z = traced.query @ patch.key.T + patch.bias
    assert relative(changed.output - traced.output, jax.nn.gelu(z) @ patch.value) < 1e-5


def test_merged_is_attached(either):
    patch = active(either)
    merged = either.merge(patch)
    assert relative(run(merged), either.attach(patch).apply(TOKENS)) < 1e-5
    assert relative(run(merged), either.apply(TOKENS)) > 1e-2


def test_merging_leaves_the_module_as_it_was(network, decoder):
    before = bits(weights(decoder))
    merged = network.merge(active(network))
    assert merged.layers[1].mlp.expand.out_features == 4 * WIDTH + 5
    assert decoder.layers[1].mlp.expand.kernel.shape == (WIDTH, 4 * WIDTH)
    assert type(merged.layers[1].mlp) is FeedForward
    assert type(decoder.layers[1].mlp) is FeedForward
    # Training one in place must not reach the other, nor the network.
    merged.tokens.embedding[...] = merged.tokens.embedding[...] * 2
    assert bits(weights(decoder)) == before
    after = network.merge(active(network))
    assert bits(after.tokens.embedding[...]) == bits(decoder.tokens.embedding[...])


def test_training_the_module_afterwards_does_not_reach_the_network(decoder):
    module = nnx.clone(decoder)
    network = tp.from_nnx(module, "layers/1/mlp")
    module.head.kernel[...] = module.head.kernel[...] * 2
    assert network.layer == 1
    assert bits(nnx.filter_state(network.params, nnx.Param)) == bits(weights(decoder))


def test_unmerging_is_exact(network, linen_network, decoder, linen):
    patch = active(network)
    original, found = network.unmerge(network.merge(patch))
    assert same(weights(original), weights(decoder))
    assert bits(found) == bits(patch)
    patch = active(linen_network)
    (module, params), found = linen_network.unmerge(linen_network.merge(patch))
    assert module is linen[0]
    assert same(params, linen[1])
    assert bits(found) == bits(patch)


@pytest.mark.parametrize("gated", [False, True])
def test_ffns_without_bias_and_with_a_gate(gated):
    class Shallow(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
            self.mlp = Gated(WIDTH, 48, rngs) if gated else FeedForward(WIDTH, 48, rngs, bias=False)

        def __call__(self, tokens):
            x = self.embed(tokens)
            return self.embed.attend(x + self.mlp(x))

    module = Shallow(nnx.Rngs(7))
    names = {"up": "up", "down": "down", "gate": "gate"} if gated else {"up": "expand", "down": "contract"}
    network = tp.from_nnx(module, "mlp", activation="silu" if gated else "gelu_tanh", **names)
    patch = active(network)
    merged = network.merge(patch)
    assert relative(run(merged), network.attach(patch).apply(TOKENS)) < 1e-5
    original, found = network.unmerge(merged)
    assert same(weights(original), weights(module))
    assert bits(found) == bits(patch)


def test_all_variables_of_a_linen_module_may_be_given(linen, linen_network):
    widen = lambda module, n: module.clone(hidden=module.hidden + n)  # noqa: E731
    variables = {"params": linen[1], "other": {"x": jnp.ones(2)}}
    network = tp.from_linen(
        linen[0], variables, "block_1.mlp", activation="gelu_tanh", call=quiet, widen=widen, example=TOKENS
    )
    assert bits(network.apply(TOKENS)) == bits(linen_network.apply(TOKENS))
    patch = active(network)
    merged = network.merge(patch)
    assert set(merged[1]) == {"params", "other"}
    (_, before), _ = network.unmerge(merged)
    assert same(before, variables)


def test_rematerialised_and_jitted_layers_are_cut_through(decoder, linen, expected):
    network = tp.from_linen(LanguageModel(remat=True), linen[1], "block_1/mlp", call=quiet, example=TOKENS)
    assert products(network.cut(TOKENS.shape).after) == 1
    assert relative(network.apply(TOKENS), expected["linen"]) < TOLERANCE

    def rematted(module, tokens):
        x, mask = module.tokens(tokens) + module.positions(jnp.arange(tokens.shape[1])), nnx.make_causal_mask(tokens)
        for layer in module.layers:
            x = nnx.remat(lambda layer, x: layer(x, mask))(layer, x)
        return nnx.jit(lambda module, x: module.head(module.norm(x)))(module, x)

    network = tp.from_nnx(decoder, "layers.1.mlp", call=rematted, example=TOKENS)
    assert products(network.cut(TOKENS.shape).after) == 1
    assert relative(network.apply(TOKENS), expected["nnx"]) < TOLERANCE


def test_a_network_works_under_jit_and_grad(either):
    patch = active(either)

    @jax.jit
    def loss(value):
        return -jax.nn.log_softmax(either.attach(patch._replace(value=value)).apply(TOKENS))[0, -1, 7]

    gradient = jax.grad(loss)(patch.value)
    assert np.isfinite(gradient).all()
    assert float(loss(patch.value - 0.1 * gradient)) < float(loss(patch.value))


def test_half_precision_networks(linen, expected):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), linen[1])
    network = tp.from_linen(linen[0], params, "block_1/mlp", call=quiet, example=TOKENS)
    traced = network.trace(TOKENS)
    assert traced.output.dtype == jnp.bfloat16
    logits = network.resume(traced, traced.output.astype(jnp.float32))
    assert logits.dtype == jnp.bfloat16
    assert relative(logits.astype(jnp.float32), expected["linen"]) < 5e-2


@pytest.mark.parametrize("kinds", [{"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}])
def test_an_ffn_in_half_precision_beneath_float32_logits_is_merged(kinds):
    ffns = [FeedForward(WIDTH, 64, nnx.Rngs(3), **kinds) for _ in range(2)]
    network = tp.from_nnx(
        Decoder(nnx.Rngs(0), ffns), "layers.1.mlp", activation="gelu_tanh", up="expand", down="contract"
    )
    assert network.apply(TOKENS).dtype == jnp.float32
    patch = active(network)
    assert relative(network.merge(patch)(TOKENS), network.attach(patch).apply(TOKENS)) < 2e-2
    assert relative(network.attach(patch).apply(TOKENS), network.apply(TOKENS)) > 2e-2


def test_a_masked_vocabulary_is_pointwise_and_merged():
    class Masked(Decoder):
        def __call__(self, tokens):
            return jnp.where(jnp.arange(VOCABULARY) < 50, super().__call__(tokens), -jnp.inf)

    network = tp.from_nnx(
        Masked(nnx.Rngs(0)), "layers.1.mlp", activation="gelu_tanh", up="expand", down="contract", example=TOKENS
    )
    assert network.pointwise
    patch = active(network)
    merged, attached = network.merge(patch)(TOKENS), network.attach(patch).apply(TOKENS)
    assert relative(merged[..., :50], attached[..., :50]) < TOLERANCE
    wrong = dataclasses.replace(network, activation=ffn.ACTIVATIONS["relu"])
    with pytest.raises(tp.TPatchError, match="gives other logits than attaching"):
        wrong.merge(patch)


# Editing.

RNG = np.random.default_rng(4)
MEMORY = RNG.integers(0, VOCABULARY, (40, 16)).tolist()
# A network that was never trained sees little but the last token, so that what is unrelated has other tokens.
PROMPTS = RNG.integers(0, VOCABULARY // 2, (3, 5)).tolist()
TARGETS = [[7], [11, 12], [3]]


LIGHT = dataclasses.replace(tp.PRESETS["default"], contexts=2, attempts=2, fit=tp.FitSettings(rounds=1, key_steps=32))


def greedy(network: Network, prompt: list[int], count: int) -> list[int]:
    row = list(prompt)
    for _ in range(count):
        # Always one shape, which editing compiled already; what stands behind the row is not seen.
        table = np.zeros((8, 16), int)
        table[:, : len(row)] = row
        row.append(int(network.apply(table)[0, len(row) - 1].argmax()))
    return row[len(prompt) :]


def test_an_edit_holds_and_leaves_the_rest_alone(either):
    patch, info = tp.edit_tokens(either, PROMPTS, TARGETS, MEMORY, settings=LIGHT)
    # Such a network parts few queries, and yet no key may be of a size that overflows on its neighbours.
    assert float(jnp.abs(patch.key).max()) < 1e6
    assert [request.status for request in info.requests] == ["edited"] * 3
    assert 4 <= len(patch.key) <= 8
    assert all(set(request.neurons) == {either.layer} for request in info.requests)
    positions = [position for request in info.requests for position in request.neurons[either.layer]]
    assert sorted(positions) == list(range(len(patch.key)))
    edited = either.attach(patch)
    assert [greedy(edited, prompt, len(target)) for prompt, target in zip(PROMPTS, TARGETS, strict=True)] == TARGETS
    others = np.random.default_rng(9).integers(VOCABULARY // 2, VOCABULARY, (64, 16))
    agree = either.apply(others).argmax(-1) == edited.apply(others).argmax(-1)
    assert float(agree.mean()) > 0.99


def test_the_same_seed_gives_the_same_patch(network):
    first, _ = tp.edit_tokens(network, PROMPTS, TARGETS, MEMORY, settings=LIGHT, seed=3)
    second, _ = tp.edit_tokens(network, PROMPTS, TARGETS, MEMORY, settings=LIGHT, seed=3)
    assert bits(first) == bits(second)


def test_what_holds_already_gets_no_neuron(network):
    said = greedy(network, PROMPTS[0], 2)
    patch, info = tp.edit_tokens(network, [PROMPTS[0]], [said], MEMORY, settings=LIGHT)
    assert info.requests[0].status == "already"
    assert info.requests[0].held
    assert patch.key.shape == (0, WIDTH)


def test_an_edit_at_an_inner_layer_is_fitted_on_whole_rows(inner):
    once = dataclasses.replace(LIGHT, attempts=1)
    patch, info = tp.edit_tokens(inner, PROMPTS, TARGETS, MEMORY, settings=once)
    edited = inner.attach(patch)
    assert any(request.held for request in info.requests)
    for prompt, target, request in zip(PROMPTS, TARGETS, info.requests, strict=True):
        assert (greedy(edited, prompt, len(target)) == target) is request.held


def test_further_edits_go_on_top_of_attached_ones(network):
    first, _ = tp.edit_tokens(network, PROMPTS, TARGETS, MEMORY, settings=LIGHT)
    edited, prompts = network.attach(first), [[*prompt[:4], number] for number, prompt in enumerate(PROMPTS, 30)]
    second, info = tp.edit_tokens(edited, prompts, TARGETS, MEMORY, settings=LIGHT)
    assert all(request.held for request in info.requests)
    both = edited.attach(second)
    assert [greedy(both, prompt, len(target)) for prompt, target in zip(prompts, TARGETS, strict=True)] == TARGETS
    # Finding the rest of the network again would compile the whole fit again.
    assert edited.finisher().func == network.finisher().func


def test_failed_edits_are_reported_and_left_out(network, monkeypatch):
    def spoilt(*args, **options):
        patches, info = fit_many(*args, **options)
        return patches._replace(value=patches.value.at[0].set(0)), info

    monkeypatch.setattr(rounds, "fit_many", spoilt)
    once = dataclasses.replace(LIGHT, attempts=1)
    patch, info = tp.edit_tokens(network, PROMPTS, TARGETS, MEMORY, settings=once)
    assert [request.status for request in info.requests] == ["failed", "edited", "edited"]
    assert "target token 1 of 1 still comes out wrong after 1 attempts" in info.requests[0].reason
    assert patch.key.shape[0] == sum(len(request.neurons.get(network.layer, ())) for request in info.requests) == 3
    edited = network.attach(patch)
    assert [greedy(edited, prompt, len(target)) == target for prompt, target in zip(PROMPTS, TARGETS, strict=True)] == [
        False,
        True,
        True,
    ]


def test_items_that_cannot_be_worked_on_are_named(network):
    said = greedy(network, PROMPTS[0], 1)
    prompts = [PROMPTS[0], PROMPTS[0], [], PROMPTS[1], [1, 99], [1.5]]
    targets = [said, [(said[0] + 1) % VOCABULARY], [1], [], [1], [1]]
    patch, info = tp.edit_tokens(network, prompts, targets, MEMORY, settings=LIGHT)
    assert [request.held for request in info.requests] == [True] + 5 * [False]
    assert [request.status for request in info.requests] == ["already"] + 5 * ["failed"]
    assert patch.key.shape[0] == 0
    reasons = [request.reason for request in info.requests]
    assert "contradicts request 0" in reasons[1]
    assert "the prompt is empty" in reasons[2]
    assert "the target is empty" in reasons[3]
    assert "the prompt holds a token outside 0 … 59" in reasons[4]
    assert "not a list of token ids" in reasons[5]
    nothing, info = tp.edit_tokens(network, [[]], [[1]], MEMORY)
    assert (nothing.key.shape[0], info.requests[0].status) == (0, "failed")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "0 prompts and 3 targets"),
        ({"prompts": [], "targets": []}, "no request to edit"),
        ({"memory": [[1, 2, 3]]}, "fewer than 32 queries; give more rows"),
        ({"memory": [[100] * 40]}, "memory row 0 holds a token outside"),
        ({"settings": "best"}, "preset 'best' does not exist"),
        ({"settings": dataclasses.replace(tp.PRESETS["default"], site="subject")}, "site 'subject' needs a subject"),
    ],
)
def test_edits_that_are_refused(network, changes, message):
    with pytest.raises(tp.TPatchError, match=message):
        tp.edit_tokens(network, **{"prompts": PROMPTS, "targets": TARGETS, "memory": MEMORY, **changes})


def test_edits_need_a_causal_language_model(decoder):
    backwards = lambda module, tokens: module(tokens[:, ::-1])[:, ::-1]  # noqa: E731
    with pytest.raises(tp.TPatchError, match=r"sees the tokens after it.*needs a causal network"):
        tp.edit_tokens(tp.from_nnx(decoder, "layers.1.mlp", call=backwards), PROMPTS, TARGETS, MEMORY)
    last = tp.from_nnx(decoder, "layers.1.mlp", call=lambda module, tokens: module(tokens)[:, -1])
    assert last.cut(TOKENS.shape).logits.shape == (3, VOCABULARY)
    assert not last.pointwise
    with pytest.raises(tp.TPatchError, match=r"needs logits .batch, tokens, vocabulary.: pick them with call="):
        tp.edit_tokens(last, PROMPTS, TARGETS, MEMORY)


# What is refused.


@pytest.mark.parametrize("path", ["layers.7.mlp", "layers.1.ffn", "mlp", "layers.x"])
def test_unknown_nnx_paths_are_listed(decoder, path):
    with pytest.raises(
        tp.TPatchError, match=r"is not in this network; modules that keep.*layers\.0\.mlp, layers\.0, layers\.1\.mlp"
    ):
        tp.from_nnx(decoder, path)


def test_nnx_paths_that_are_no_ffn(decoder):
    with pytest.raises(tp.TPatchError, match=r"'layers' is a List, not one of its modules|'layers' is never called"):
        tp.from_nnx(decoder, "layers")
    with pytest.raises(tp.TPatchError, match=r"'' is the whole network"):
        tp.from_nnx(decoder, "")
    with pytest.raises(tp.TPatchError, match=r"'head' maps \[2, 8, 32\] to \[2, 8, 60\].*an FFN maps"):
        tp.from_nnx(decoder, "head")
    with pytest.raises(tp.TPatchError, match=r"'tokens' maps"):
        tp.from_nnx(decoder, "tokens")


def test_unknown_linen_paths_are_listed(linen):
    with pytest.raises(tp.TPatchError, match=r"'block_9/mlp' is not a module .*block_0/mlp, block_0, block_1/mlp"):
        tp.from_linen(*linen, "block_9/mlp", call=quiet)
    with pytest.raises(tp.TPatchError, match=r"'' is not a module"):
        tp.from_linen(*linen, "", call=quiet)


def test_shared_ffns_are_refused():
    rngs = nnx.Rngs(0)
    shared = FeedForward(WIDTH, 48, rngs)
    with pytest.raises(tp.TPatchError, match=r"is called 2 times in one pass \(shared between layers\?\)"):
        tp.from_nnx(Decoder(rngs, [shared, shared]), "layers.0.mlp")


def test_ffns_inside_a_scan_are_refused():
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + MlpBlock(48, name="mlp")(x), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(VOCABULARY, WIDTH)(tokens)
            layers = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="layers")
            x, _ = layers(x, None)
            return nn.Dense(VOCABULARY)(x)

    params = Scanned().init(jax.random.key(0), TOKENS)["params"]
    with pytest.raises(tp.TPatchError, match=r"'layers/mlp' is called inside 'scan'.*unrolled"):
        tp.from_linen(Scanned(), params, "layers/mlp")


def test_nnx_scans_are_refused(decoder):
    def scanned(module, tokens):
        def step(x, _):
            return x + module.layers[0].mlp(x), None

        x, _ = jax.lax.scan(step, module.tokens(tokens), None, length=2)
        return module.head(x)

    with pytest.raises(tp.TPatchError, match=r"called inside 'scan'"):
        tp.from_nnx(decoder, "layers.0.mlp", call=scanned)


def test_networks_that_draw_are_refused(linen):
    noisy = build(dropout=0.5)
    with pytest.raises(tp.TPatchError, match=r"draws random numbers.*module.eval\(\)"):
        tp.from_nnx(noisy, "layers.1.mlp")
    noisy.eval()
    assert tp.from_nnx(noisy, "layers.1.mlp").hidden_size == WIDTH
    with pytest.raises(tp.TPatchError, match=r"does not run on tokens.*InvalidRngError.*call="):
        tp.from_linen(*linen, "block_1/mlp")


def test_outputs_that_are_not_one_array(decoder):
    def pair(module, tokens):
        return module(tokens), tokens

    with pytest.raises(tp.TPatchError, match=r"returns a tuple; pick the logits with call="):
        tp.from_nnx(decoder, "layers.1.mlp", call=pair)
    network = tp.from_nnx(decoder, "layers.1.mlp", call=lambda module, tokens: pair(module, tokens)[0])
    assert network.vocabulary == VOCABULARY


def test_ffns_without_effect_or_call(decoder):
    def without(module, tokens):
        return module.head(module.norm(module.tokens(tokens)))

    def ignored(module, tokens):
        module.layers[1].mlp(module.tokens(tokens))
        return without(module, tokens)

    with pytest.raises(tp.TPatchError, match=r"is never called on the way"):
        tp.from_nnx(decoder, "layers.1.mlp", call=without)
    with pytest.raises(tp.TPatchError, match=r"has no effect on the logits"):
        tp.from_nnx(decoder, "layers.1.mlp", call=ignored)


def test_ffns_called_in_other_ways(decoder):
    class Pair(FeedForward):
        def __call__(self, x, scale=1.0):
            return super().__call__(x) * scale, x

    class Named(FeedForward):
        def __call__(self, *, scale, inputs):
            return super().__call__(inputs) * scale

    class Around(nnx.Module):
        def __init__(self, kind, rngs):
            self.inner = kind(WIDTH, 48, rngs)

        def __call__(self, x):
            return self.inner(x)[0] if isinstance(self.inner, Pair) else self.inner(inputs=x, scale=2.0)

    def around(kind):
        rngs = nnx.Rngs(0)
        return Decoder(rngs, [Around(kind, rngs)])

    with pytest.raises(tp.TPatchError, match=r"'layers.0.mlp.inner' returns a tuple, not one array"):
        tp.from_nnx(around(Pair), "layers.0.mlp.inner")
    assert tp.from_nnx(around(Pair), "layers.0.mlp").hidden_size == WIDTH
    module = around(Named)
    network = tp.from_nnx(module, "layers.0.mlp.inner")
    assert relative(network.apply(TOKENS), module(TOKENS)) < TOLERANCE


def test_examples_and_activations(decoder):
    with pytest.raises(
        tp.TPatchError, match=r"activation 'swish' is not known; use one of gelu, gelu_tanh, relu, silu"
    ):
        tp.from_nnx(decoder, "layers.1.mlp", activation="swish")
    assert tp.from_nnx(decoder, "layers.1.mlp", activation=nnx.gelu).activation is nnx.gelu
    with pytest.raises(tp.TPatchError, match=r"does not run on inputs float32\[2, 3\]"):
        tp.from_nnx(decoder, "layers.1.mlp", example=jnp.ones((2, 3)))
    with pytest.raises(tp.TPatchError, match=r"rows of one token; give rows of at least two"):
        tp.from_nnx(decoder, "layers.1.mlp", example=[[1], [2]])
    with pytest.raises(tp.TPatchError, match=r"tokens are int32\[3\]"):
        tp.from_nnx(decoder, "layers.1.mlp").apply([1, 2, 3])


def test_a_network_of_one_length():
    class Fixed(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            table = self.param("positions", nn.initializers.normal(1.0), (11, WIDTH))
            x = nn.Embed(VOCABULARY, WIDTH)(tokens) + table
            return nn.Dense(VOCABULARY)(x + MlpBlock(48, name="mlp")(x))

    params = Fixed().init(jax.random.key(0), TOKENS)["params"]
    with pytest.raises(tp.TPatchError, match=r"does not run on tokens of shape \(2, 8\).*example="):
        tp.from_linen(Fixed(), params, "mlp")
    network = tp.from_linen(Fixed(), params, "mlp", example=TOKENS)
    assert relative(network.apply(TOKENS), Fixed().apply({"params": params}, TOKENS)) < TOLERANCE
    assert not network.pointwise


def test_patches_that_do_not_fit(either):
    with pytest.raises(tp.TPatchError, match=r"the patch is 8 wide and .* 32: it was made for another model"):
        either.attach(create(8, 2))
    with pytest.raises(tp.TPatchError, match=r"is a batch of patches; use patch.join"):
        either.attach(Patch(jnp.ones((2, 1, WIDTH)), jnp.ones((2, 1)), jnp.ones((2, 1, WIDTH))))
    for put in (either.attach, either.merge):
        with pytest.raises(
            tp.TPatchError, match=r"a dict is not one Patch; .* of \{layer: patch\} that is patches\[layer\]"
        ):
            put({either.layer: create(WIDTH, 2)})
        with pytest.raises(tp.TPatchError, match=r"a tuple is not one Patch"):
            put((create(WIDTH, 2), "info"))
    traced = either.trace(TOKENS)
    with pytest.raises(tp.TPatchError, match=r"the output is \[3, 1, 32\]; the trace holds \[3, 11, 32\]"):
        either.resume(traced, traced.output[:, :1])


def test_merging_needs_to_know_how(decoder, linen):
    patch = create(WIDTH, 2)
    with pytest.raises(tp.TPatchError, match=r'name its nnx.Linear layers, as in from_nnx.*up="fc1"'):
        tp.from_nnx(decoder, "layers.1.mlp").merge(patch)
    with pytest.raises(tp.TPatchError, match=r"needs a wider module; pass widen=lambda module, n: module.clone"):
        tp.from_linen(*linen, "block_1/mlp", call=quiet).merge(patch)
    with pytest.raises(tp.TPatchError, match=r"up='fc1' in 'layers.1.mlp' is missing"):
        tp.from_nnx(decoder, "layers.1.mlp", up="fc1", down="fc2")
    with pytest.raises(tp.TPatchError, match=r"up='Dense_7' is not an nn.Dense .* which holds Dense_0, Dense_1"):
        tp.from_linen(*linen, "block_1/mlp", call=quiet, up="Dense_7", widen=lambda module, n: module)


def test_merging_is_refused_where_it_would_differ(network, decoder, linen):
    patch = create(WIDTH, 2)
    wrong = dataclasses.replace(network, activation=ffn.ACTIVATIONS["gelu"])
    with pytest.raises(
        tp.TPatchError, match=r"gives other logits than attaching.*check up=, down=, gate= and activation="
    ):
        wrong.merge(patch)
    swapped = tp.from_nnx(decoder, "layers.1.mlp", activation="gelu_tanh", up="contract", down="expand")
    with pytest.raises(tp.TPatchError, match=r"are \[128, 32\] and \[32, 128\].*name the first and the last"):
        swapped.merge(patch)
    for widen, message in [
        (lambda module, n: module, r"expects 'block_1/mlp/Dense_0/bias' to be \[64\].*must add just that many"),
        (lambda module, n: module.clone(depth=3, hidden=module.hidden + n), "has a new parameter 'block_2"),
        (lambda module, n: module.clone(depth=1, hidden=module.hidden + n), "has no parameter 'block_1"),
    ]:
        network = tp.from_linen(*linen, "block_1/mlp", activation="gelu_tanh", call=quiet, widen=widen)
        with pytest.raises(tp.TPatchError, match=message):
            network.merge(patch)


def test_an_ffn_with_more_that_is_as_wide_as_its_hidden_layer_cannot_be_merged():
    class Normed(FeedForward):
        def __init__(self, rngs):
            super().__init__(WIDTH, 48, rngs)
            self.norm = nnx.LayerNorm(48, rngs=rngs)

        def __call__(self, x):
            return self.contract(self.norm(nnx.gelu(self.expand(x))))

    module = Decoder(nnx.Rngs(0), [Normed(nnx.Rngs(1)) for _ in range(2)])
    network = tp.from_nnx(module, "layers.1.mlp", activation="gelu_tanh", up="expand", down="contract")
    with pytest.raises(tp.TPatchError, match=r"with more neurons 'layers.1.mlp' does not run .*check up=.* or attach"):
        network.merge(create(WIDTH, 2))


def test_a_training_state_is_no_dict_of_parameters(linen):
    state = TrainState.create(apply_fn=linen[0].apply, params=linen[1], tx=optax.sgd(0.1))
    with pytest.raises(tp.TPatchError, match="a TrainState is no dict of parameters; of a TrainState give its params"):
        tp.from_linen(linen[0], state, "block_1/mlp", call=quiet)


def test_unmerging_needs_what_merge_returned(network, linen_network, linen):
    small = nnx.clone(network.merge(create(WIDTH, 0)))
    small.layers[1].mlp = FeedForward(WIDTH, 48, nnx.Rngs(0))
    with pytest.raises(tp.TPatchError, match=r"narrower than this network's; give what `merge` returned"):
        network.unmerge(small)
    with pytest.raises(tp.TPatchError, match=r"a pair of a module and its parameters"):
        linen_network.unmerge(linen[1])


class Inline(nnx.Module):
    """A layer whose feed-forward network is no module of its own."""

    def __init__(self, rngs: nnx.Rngs, attends: bool = True, post_norm: bool = False):
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs) if attends else None
        self.norm_1, self.norm_2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.fc1, self.fc2 = nnx.Linear(WIDTH, 48, rngs=rngs), nnx.Linear(48, WIDTH, rngs=rngs)
        self.post_norm = post_norm

    def __call__(self, x, mask):
        if self.attention is not None:
            x = x + self.attention(self.norm_1(x), mask=mask)
        if self.post_norm:
            return self.norm_2(x + self.fc2(nnx.gelu(self.fc1(x))))
        return x + self.fc2(nnx.gelu(self.fc1(self.norm_2(x))))


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        ({}, "it adds its own input"),
        ({"attends": False}, "it adds its own input"),
        ({"post_norm": True}, "what it says at one position depends on others"),
    ],
)
@pytest.mark.parametrize("names", [{}, {"up": "fc1", "down": "fc2"}])
def test_an_ffn_inline_in_a_block_is_refused_at_the_cut(kinds, reason, names):
    module = Decoder(nnx.Rngs(0))
    module.layers = nnx.List([Inline(nnx.Rngs(1), **kinds) for _ in range(2)])
    message = f"'layers.1' is no feed-forward network but a block around one: {reason}.*its last linear layer as a pair"
    with pytest.raises(tp.TPatchError, match=message):
        tp.from_nnx(module, "layers.1", activation="gelu_tanh", **names)
    with pytest.raises(tp.TPatchError, match=r"inline in a block .* name its first and its last linear layer"):
        tp.from_nnx(module, "layers.1.fc1", activation="gelu_tanh")


class InlineBlock(nn.Module):
    hidden: int = 48

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, WIDTH)(tokens)
        x = InlineLayer(self.hidden, name="block")(x)
        return nn.Dense(VOCABULARY)(x)


class InlineLayer(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(self.hidden)(nn.LayerNorm()(x))))


@pytest.mark.parametrize("options", [{}, {"widen": lambda module, n: module.clone(hidden=module.hidden + n)}])
def test_an_ffn_inline_in_a_linen_block_is_refused_at_the_cut(options):
    module = InlineBlock()
    params = module.init(jax.random.key(0), TOKENS)["params"]
    with pytest.raises(tp.TPatchError, match=r"'block' is no feed-forward network but a block.*it adds its own input"):
        tp.from_linen(module, params, "block", activation="gelu_tanh", **options)


@pytest.mark.parametrize("names", [{}, {"up": "expand", "down": "contract"}])
@pytest.mark.parametrize("activation", ["relu", "silu", jnp.tanh])
def test_a_wrong_activation_is_noticed_at_the_cut(decoder, names, activation):
    with pytest.raises(tp.TPatchError, match=r"activates with 'gelu_tanh'.*give activation='gelu_tanh'"):
        tp.from_nnx(decoder, "layers.1.mlp", activation=activation, **names)


def test_an_activation_that_is_nearly_the_own_is_noticed_where_it_would_be_merged(decoder):
    names = {"up": "expand", "down": "contract"}
    with pytest.raises(tp.TPatchError, match=r"activates with 'gelu_tanh'.*give activation='gelu_tanh'"):
        tp.from_nnx(decoder, "layers.1.mlp", activation="gelu", **names)
    assert tp.from_nnx(decoder, "layers.1.mlp", activation="gelu").path == "layers.1.mlp"


def test_a_wrong_activation_is_noticed_at_the_cut_of_a_gated_and_of_a_linen_network(linen):
    gated = Decoder(nnx.Rngs(0), [Gated(WIDTH, 64, nnx.Rngs(1)) for _ in range(2)])
    for names in ({}, {"gate": "gate", "up": "up", "down": "down"}):
        with pytest.raises(tp.TPatchError, match=r"activates with 'silu'"):
            tp.from_nnx(gated, "layers.1.mlp", activation="relu", **names)
        assert tp.from_nnx(gated, "layers.1.mlp", activation="silu", **names).hidden_size == WIDTH
    with pytest.raises(tp.TPatchError, match=r"activates with 'gelu_tanh'"):
        tp.from_linen(*linen, "block_1/mlp", activation="relu", call=quiet)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda module, *_: tp.from_nnx("layers.1.mlp", module), "'layers.1.mlp' is not an NNX module"),
        (lambda module, *_: tp.from_nnx(module, 3), "3 is no path of a module"),
        (lambda module, *_: tp.from_nnx(module, "layers.1.mlp", activation=None), "activation is None; give a name"),
        (lambda module, *_: tp.from_nnx(module, "layers.1.mlp", up="expand"), "needs both up= and down="),
        (lambda module, *_: tp.from_nnx(module, "layers.1.mlp", example="x"), "'x' is no table of token ids"),
        (lambda _, linen, params: tp.from_linen(linen, params, None), "None is no path of a module"),
        (lambda _, linen, params: tp.from_linen(linen, params, "block_1/mlp", widen="x"), "widen is 'x'"),
        (lambda module, _, params: tp.from_linen(module, params, "block_1/mlp"), "a Decoder is not a Linen module"),
    ],
)
def test_arguments_of_a_cut_are_checked(decoder, linen, cut, message):
    with pytest.raises(tp.TPatchError, match=message):
        cut(decoder, *linen)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"network": [[5, 3]], "prompts": None}, "a list is not a Network"),
        ({"memory": None}, "memory is None; give lists of token ids"),
        ({"prompts": [5, 3], "targets": [7, 7]}, "prompts is one list of token ids"),
        ({"targets": "ab"}, "targets is 'ab'; give lists"),
        ({"settings": {"layer": 1}}, "layer 1 is of no use here"),
        ({"settings": None}, "None is no settings"),
        ({"settings": {"recipe": "x"}}, "recipe 'x' does not exist"),
    ],
)
def test_arguments_of_an_edit_by_tokens_are_checked(network, given, message):
    usual = {"network": network, "prompts": [[5, 3]], "targets": [[7]], "memory": [[1, 2, 3]]}
    with pytest.raises(tp.TPatchError, match=message):
        tp.edit_tokens(**{**usual, **given})


def test_a_network_is_no_model(network):
    for call in (tp.detach, tp.unmerge, lambda it: tp.attach(it, create(WIDTH)), lambda it: tp.edit(it, [])):
        with pytest.raises(tp.TPatchError, match=r"a Network is no model of this library; edit it with"):
            call(network)
