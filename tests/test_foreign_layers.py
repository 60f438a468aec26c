"""Networks from elsewhere whose FFN is two linear layers of a block, that read anything, and are edited in words."""

import dataclasses
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny_model, relative, same
from flax import nnx

import tpatch_jax as tp
from tpatch_jax.core.patch import Patch, create
from tpatch_jax.models.foreign.network import Network
from tpatch_jax.storage.settings import change

PROMOTION = "standard"
pytestmark = pytest.mark.usefixtures("quick_compilation")
WIDTH, SIZE, CLASSES = 16, 8, 5
QUICK = change(dataclasses.replace(tp.PRESETS["default"], attempts=2, contexts=1), {"lanes": 1})


class Turned(nnx.Module):
    """Somebody's linear layer, which keeps its kernel the other way round."""

    def __init__(self, inner: int, outer: int, rngs: nnx.Rngs):
        self.weight = nnx.Param(rngs.params.normal((outer, inner)) * inner**-0.5)
        self.offset = nnx.Param(rngs.params.normal((outer,)) * 0.1)

    def __call__(self, x):
        return x @ self.weight[...].T + self.offset[...]


def write_turned(layer, entry):
    layer.weight, layer.offset = nnx.Param(entry["kernel"].T), nnx.Param(entry["bias"])


TURNED = {Turned: tp.LinearKind(lambda it: {"kernel": it.weight[...].T, "bias": it.offset[...]}, write_turned)}


class Block(nnx.Module):
    """Positions that are mixed, and an FFN that is written inline, as in bonsai's ViT and Whisper."""

    def __init__(self, rngs: nnx.Rngs, linear=nnx.Linear):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.fc1, self.fc2 = linear(WIDTH, 24, rngs=rngs), linear(24, WIDTH, rngs=rngs)

    def __call__(self, x, mixes=True):
        x = x + x.mean(1, keepdims=True) if mixes else x
        return x + self.fc2(nnx.gelu(self.fc1(self.norm(x))))


class Images(nnx.Module):
    """A classifier of pictures and a number beside each: a class token, patches of four pixels."""

    def __init__(self, rngs: nnx.Rngs, linear=Turned):
        self.patches = nnx.Linear(4, WIDTH, rngs=rngs)
        self.token = nnx.Param(rngs.params.normal((1, 1, WIDTH)))
        self.places = nnx.Param(rngs.params.normal((1, SIZE * SIZE // 4 + 1, WIDTH)))
        self.layers = nnx.List([Block(rngs), Block(rngs, linear)])
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, inputs):
        pixels = inputs["pixels"]
        x = self.patches(pixels.reshape(pixels.shape[0], -1, 4)) + inputs["shift"][:, None, None]
        x = jnp.concatenate([jnp.tile(self.token[...], (x.shape[0], 1, 1)), x], 1) + self.places[...]
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0])


class Words(nnx.Module):
    """Says the next token of each, whatever stands before it."""

    def __init__(self, rngs: nnx.Rngs, vocabulary: int):
        self.embed = nnx.Embed(vocabulary, WIDTH, rngs=rngs)
        self.layers = nnx.List([Block(rngs)])

    def __call__(self, tokens):
        return self.embed.attend(self.layers[0](self.embed(tokens), mixes=False))


def pictures(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {"pixels": rng.normal(size=(SIZE, SIZE)).astype(np.float32), "shift": np.float32(rng.normal())}
        for _ in range(count)
    ]


def batch(rows):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


ENDS = ("layers.1.fc1", "layers.1.fc2")
EXAMPLE = batch(pictures(2, 1))


def cut(module: nnx.Module, path=ENDS, **changes) -> Network:
    return tp.from_nnx(module, path, **{"activation": "gelu_tanh", "example": EXAMPLE, "linears": TURNED, **changes})


@pytest.fixture(scope="module")
def images() -> Images:
    return nnx.jit(lambda: Images(nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def network(images) -> Network:
    return cut(images)


def firing(network: Network, inputs=EXAMPLE) -> Patch:
    query = network.trace(inputs).query[:, 0]
    return Patch(query / 4, jnp.linspace(-1, 1, len(query)), jax.random.normal(jax.random.key(3), query.shape))


def test_a_cut_between_two_layers_of_a_network_that_reads_images(network, images):
    inputs = batch(pictures(3))
    wanted = images(inputs)
    assert (network.layer, network.path, network.hidden_size) == (1, "layers.1.fc1 to layers.1.fc2", WIDTH)
    assert not network.reads_tokens
    traced = network.trace(inputs)
    assert traced.query.shape == (3, SIZE * SIZE // 4 + 1, WIDTH)
    assert relative(network.resume(traced, traced.output), wanted) < 2e-6
    assert relative(network.resume(traced, traced.output + 1), wanted) > 1e-2
    patch = firing(network)
    attached, wider = network.attach(patch), network.merge(patch)
    assert relative(attached.apply(inputs), wanted) > 1e-3
    assert relative(wider(inputs), attached.apply(inputs)) < 1e-5
    assert (wider.layers[1].fc1.weight.shape, wider.layers[0].fc1.out_features) == ((26, WIDTH), 24)
    original, back = network.unmerge(wider)
    assert same(back, patch)
    assert same(nnx.state(original), nnx.state(images))


def test_an_edit_of_an_image_holds_and_leaves_others_alone(network, images):
    """A position is named, that of the class token; what cannot be said is a problem of its own request."""
    rows, memory = pictures(3), pictures(12, 5)
    before = np.asarray(images(batch(rows))).argmax(-1)
    others = np.asarray(images(batch(memory))).argmax(-1)
    targets = [int(before[0] + 1) % CLASSES, int(before[1]), CLASSES]
    patch, info = tp.edit_inputs(network, rows, targets, memory, settings=QUICK)
    assert [(each.held, each.status) for each in info.requests] == [
        (True, "edited"),
        (True, "already"),
        (False, "failed"),
    ]
    assert "the target 5 is none of the network's classes, 0 to 4" in info.requests[2].reason
    assert info.requests[0].neurons == {1: (0,)}
    edited = network.merge(patch)
    assert np.asarray(edited(batch(rows))).argmax(-1).tolist() == [targets[0], *before[1:].tolist()]
    assert np.asarray(edited(batch(memory))).argmax(-1).tolist() == others.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": [1, 2]}, "1 inputs and 2 targets"),
        ({"inputs": [], "targets": []}, "no request to edit"),
        ({"inputs": {"pixels": 1}}, "inputs is a dict; give a list"),
        ({"inputs": [np.zeros((8, 8))]}, r"input 0: the network reads PyTreeDef\(\{'pixels': \*, 'shift': \*\}\)"),
        ({"memory": [*pictures(1), {"pixels": np.zeros((4, 8)), "shift": 0.0}]}, "the inputs have 2 shapes"),
        ({"memory": pictures(1)}, "fewer than 32 queries"),
        ({"position": 40}, "position 40 is none of the 17"),
        ({"answer": 0}, r"gives \[8, 5\] on 8 inputs; edit_inputs needs logits \[batch, classes\]"),
        ({"settings": {"layer": 1}}, "layer 1 is of no use here"),
        ({"network": 3}, "3 is not a Network"),
    ],
)
def test_edits_of_inputs_that_are_refused(network, changes, message):
    given = {"network": network, "inputs": pictures(1), "targets": [1], "memory": pictures(4), **changes}
    with pytest.raises(tp.TPatchError, match=message):
        tp.edit_inputs(**given)


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        (ENDS[::-1], {}, "does not depend on what it reads; name its first layer first"),
        (("layers.0.fc1", "layers.1.fc2"), {}, "what it says at one position depends on others"),
        (("layers.1.fc1", "layers.1.fc3"), {}, r"'layers.1.fc3' is not in this network; modules that keep"),
        (("layers.1.fc1", "layers.1.gate"), {}, r"'layers.1.gate' is not in this network"),
        (ENDS, {"up": "fc1", "down": "fc2"}, "a path of 2 layers names them already; leave up=, down= and gate= out"),
        (("layers.1.fc1",), {}, "is no path of a module"),
        (ENDS, {"activation": "relu"}, r"'layers.1.fc1 to layers.1.fc2' activates with 'gelu_tanh'"),
        (
            "layers.1.fc1",
            {},
            r"on inputs float32\[2, 8, 8\], float32\[2\]; .* name its first and its last linear layer",
        ),
        (ENDS, {"example": {"pixels": EXAMPLE["pixels"]}}, "does not run on inputs float32.* as example="),
        (ENDS, {"linears": {nnx.Linear: None}}, "None is not what reads and writes such a layer"),
    ],
)
def test_cuts_that_are_refused(images, path, changes, message):
    with pytest.raises(tp.TPatchError, match=message):
        cut(images, path, **changes)


def test_inputs_of_another_kind_are_refused(network):
    with pytest.raises(tp.TPatchError, match=r"the network reads PyTreeDef.* give inputs such as the example"):
        network.apply(np.zeros((2, 8, 8)))
    with pytest.raises(tp.TPatchError, match=r"reads no table of token ids; edit it with tp.edit_inputs"):
        tp.edit_tokens(network, [[1]], [[2]], [[1, 2, 3]])


def test_somebodys_linear_layers_are_cut_without_an_adapter_and_merged_into_with_a_right_one(images):
    plain = cut(images, linears=None)
    with pytest.raises(tp.TPatchError, match=r"up='layers.1.fc1' is a Turned; name an nnx.Linear, say how it keeps"):
        plain.merge(firing(plain))
    with pytest.raises(tp.TPatchError, match=r"what `read` of linears= makes of the Turned for up is not"):
        cut(images, linears={Turned: tp.LinearKind(lambda layer: {"weight": layer.weight[...]}, write_turned)})
    silent = {Turned: tp.LinearKind(TURNED[Turned].read, lambda layer, entry: None)}
    with pytest.raises(tp.TPatchError, match="gives other logits than attaching"):
        cut(images, linears=silent).merge(firing(plain))


class LinenBlock(nn.Module):
    hidden: int = 24

    @nn.compact
    def __call__(self, x):
        hidden = nn.gelu(nn.Dense(self.hidden)(x))
        return x + nn.Dense(WIDTH)(hidden)


class LinenFeatures(nn.Module):
    """Reads numbers in place of tokens."""

    hidden: int = 24

    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES)(LinenBlock(self.hidden, name="block_3")(nn.Dense(WIDTH)(x)).mean(1))


def test_a_cut_between_two_layers_of_a_linen_network():
    module, example = LinenFeatures(), np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)
    params = module.init(jax.random.key(0), example)["params"]
    widen = lambda module, n: module.clone(hidden=module.hidden + n)  # noqa: E731
    ends = ("block_3/Dense_0", "block_3/Dense_1")
    network = tp.from_linen(module, params, ends, activation="gelu_tanh", widen=widen, example=example)
    assert (network.layer, network.path) == (3, "block_3/Dense_0 to block_3/Dense_1")
    assert relative(network.apply(example), module.apply({"params": params}, example)) < 2e-6
    patch = firing(network, example)
    wider, wider_params = network.merge(patch)
    assert wider.hidden == 26
    assert relative(wider.apply({"params": wider_params}, example), network.attach(patch).apply(example)) < 1e-5
    (_, original), back = network.unmerge((wider, wider_params))
    assert same(back, patch)
    assert same(original, params)
    with pytest.raises(tp.TPatchError, match="does not depend on what it reads"):
        tp.from_linen(module, params, ends[::-1], activation="gelu_tanh", example=example)
    with pytest.raises(tp.TPatchError, match="'block_3/Dense_7' is not a module that this network calls"):
        tp.from_linen(module, params, ("block_3/Dense_0", "block_3/Dense_7"), example=example)


# --- requests in words ---


@pytest.fixture(scope="module")
def words() -> tuple[Network, object]:
    tokenizer = make_tiny_model().tokenizer
    module = nnx.jit(lambda: Words(nnx.Rngs(0), 300))()
    path = ("layers.0.fc1", "layers.0.fc2")
    return tp.from_nnx(module, path, activation="gelu_tanh", example=jnp.ones((2, 8), int)), tokenizer


def test_reports_of_requests_in_words_name_them(words, monkeypatch):
    """By their ids, in reasons as well; what they shall keep is memory."""
    network, tokenizer = words
    given = {}

    def edit(network, prompts, targets, memory, **settings):
        given.update(memory=memory, settings=settings)
        reason = "contradicts request 0: the same prompt with another target; keep one of them"
        results = tp.RequestInfo("edit-0", True, "edited"), tp.RequestInfo("edit-1", False, "failed", reason)
        return create(WIDTH), tp.EditInfo(results, 0, 0, 0, 0, 0)

    monkeypatch.setattr("tpatch_jax.editors.tpatcher.network_requests.edit_tokens", edit)
    requests = [tp.EditRequest("a cat", "sat", id="cat", keep=("a dog",)), {"prompt": "a cat", "target": "ran"}]
    _, info = tp.edit_network(network, requests, tokenizer, ["in the inn"], settings="paper", seed=4)
    assert [each.id for each in info.requests] == ["cat", "edit-1"]
    assert info.requests[1].reason.startswith("contradicts cat: the same prompt")
    assert given["memory"] == [tokenizer.encode(text, add_special_tokens=False) for text in ("in the inn", "a dog")]
    assert given["settings"] == {"settings": "paper", "seed": 4}


def test_what_a_tokenizer_puts_before_a_text_stands_before_prompts_and_memory(words, letters, monkeypatch):
    """Of transformers what it adds, of sentencepiece's kind the token that it names; whatever spells it out has one."""
    network, tokenizer = words
    given = {}

    def edit(network, prompts, targets, memory, **settings):
        given.update(prompts=prompts, targets=targets, memory=memory)
        return None, tp.EditInfo((tp.RequestInfo("edit-0", True, "edited"),), 0, 0, 0, 0, 0)

    monkeypatch.setattr("tpatch_jax.editors.tpatcher.network_requests.edit_tokens", edit)

    def encode(text: str, add_special_tokens: bool = False) -> list[int]:
        return [7] * add_special_tokens + tokenizer.encode(text, add_special_tokens=False)

    def bare(text: str) -> list[int]:
        return encode(text)

    kinds = {
        "transformers": SimpleNamespace(encode=encode, decode=tokenizer.decode),
        "tunix": SimpleNamespace(encode=bare, decode=tokenizer.decode, bos_id=lambda: 7),
        "none": SimpleNamespace(encode=bare, decode=tokenizer.decode, bos_id=-1),
    }
    for name, kind in kinds.items():
        start = [] if name == "none" else [7]
        for memory in (["in the inn", "a cat"], letters):
            tp.edit_network(network, [tp.EditRequest("a cat", "sat")], kind, memory)
            assert given["prompts"] == [[*start, *encode("a cat")]]
            assert given["targets"] == [encode(" sat")]
            assert {row[:1] == [7] for row in given["memory"]} == {bool(start)}
        assert max(map(len, given["memory"])) == 64 + len(start)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "gpt2"}, "'gpt2' is no tokenizer; give one with encode"),
        ({"memory": [3]}, "the memory holds something that is no text"),
        ({"memory": None}, "a text file; give its path, or a list of texts"),
        ({"requests": [tp.EditRequest("a", "b", form="chat")]}, "edit-0 is for a chat"),
        ({"requests": [tp.EditRequest("a", "b", system="c", id="x")]}, "x is for a chat"),
        ({"network": None}, "None is not a Network"),
    ],
)
def test_requests_in_words_that_are_refused(words, changes, message):
    network, tokenizer = words
    usual = {"network": network, "requests": [tp.EditRequest("a", "b")], "tokenizer": tokenizer, "memory": ["a cat"]}
    with pytest.raises(tp.TPatchError, match=message):
        tp.edit_network(**{**usual, **changes})


# --- float neurons beside weights in INT8 ---


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_neurons_beside_a_network_that_qwix_has_quantised():
    """Its matrices are in INT8, the patch in float32 beside them; merging would need a wider matrix in INT8."""
    qwix = pytest.importorskip("qwix", reason="weights in INT8 need the 'int8' extra")
    tokens = jnp.asarray([[1, 2, 3, 4], [5, 6, 7, 8]])
    provider = qwix.PtqProvider([qwix.QuantizationRule(module_path=".*fc.*", weight_qtype=jnp.int8)])
    module = qwix.quantize_model(Words(nnx.Rngs(0), 60), provider, tokens)
    network = tp.from_nnx(module, ("layers.0.fc1", "layers.0.fc2"), activation="gelu_tanh", example=tokens)
    wanted = module(tokens)
    assert relative(Words(nnx.Rngs(0), 60)(tokens), wanted) > 1e-4
    assert relative(network.apply(tokens), wanted) < 1e-5
    patch, traced = firing(network, tokens), network.trace(tokens)
    beside = nnx.gelu(traced.query @ patch.key.T + patch.bias) @ patch.value
    assert relative(network.attach(patch).trace(tokens).output, traced.output + beside) < 1e-5
    assert relative(network.attach(patch).apply(tokens), wanted) > 1e-3
    with pytest.raises(
        tp.TPatchError, match=r"up='layers.0.fc1' keeps its kernel as a \w+, quantised, .* attach the patch"
    ):
        network.merge(patch)
