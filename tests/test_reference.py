"""Our networks say what torch's said (`reference/make_references.py`), family by family and layer by layer.

Runs without torch. What these networks promise besides is tested on the same small checkpoints: the cache, the cut,
patches beside and inside, half precision, reading shards and older files, and writing back what was read.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative, same
from safetensors.numpy import load_file, save_file

from tpatch_jax.errors import TPatchError
from tpatch_jax.models import checkpoint, generation, networks
from tpatch_jax.models.families import FAMILIES, configure
from tpatch_jax.models.model import Model, attach, merge, save_model, unmerge
from tpatch_jax.patch import Patch

pytestmark = pytest.mark.usefixtures("quick_compilation")

FOLDER = Path(__file__).parent / "reference"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/config.json"))
TOLERANCE = 2e-4
LENGTHS = (5, 14)
"""Of the prompts that are continued: the longer one, and the other's continuation, outgrow the windows of 8."""
COUNT = 10


class Reference(NamedTuple):
    """A small checkpoint, what torch said with it, and what we say: residual streams and logits, computed once."""

    name: str
    model: Model
    expected: dict[str, np.ndarray]
    tokens: jax.Array
    residuals: list[np.ndarray]
    logits: np.ndarray


@cache
def read(name: str) -> Reference:
    config, params, settings = checkpoint.read_folder(FOLDER / name)
    model = Model(config, params, None, name, None, settings)
    expected = load_file(FOLDER / f"{name}_expected.safetensors")
    tokens = jnp.asarray(expected["tokens"])
    residuals = [np.asarray(x) for x in networks.residuals(config, params, tokens)]
    return Reference(name, model, expected, tokens, residuals, np.asarray(model.apply(tokens)))


@pytest.fixture(scope="module", params=NAMES)
def reference(request: pytest.FixtureRequest) -> Reference:
    return read(request.param)


def random_patch(model: Model, neurons: int = 2) -> Patch:
    """Neurons for every layer, about half of them active on any query."""
    rng, count = np.random.default_rng(5), neurons * model.config.layers
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    layers = jnp.repeat(jnp.arange(model.config.layers, dtype=jnp.int32), neurons)
    return Patch(draw(count, model.config.width) * 0.3, draw(count), draw(count, model.config.width) * 0.3, layers)


def logits_of(model: Model, tokens: jax.Array) -> np.ndarray:
    """What `Model.apply` returns, by the fewest compiled functions."""
    hidden = networks.residuals(model.config, model.params, tokens)[-1]
    return np.asarray(networks.logits(model.config, model.params, hidden))


def test_every_family_has_a_reference():
    assert len(NAMES) >= 13
    for family in FAMILIES:
        assert set(family.model_types) & set(NAMES), f"{family.name} has no reference; see {FOLDER.name}"


@pytest.mark.parametrize("layer", range(3))
def test_each_layer_agrees(reference, layer):
    expected = reference.expected
    assert len(reference.residuals) == reference.model.config.layers == 3
    # another layer's residual stream would not pass for this one's
    assert np.abs(expected[f"layer_{layer}"] - expected[f"layer_{(layer + 1) % 3}"]).max() > 1000 * TOLERANCE
    np.testing.assert_allclose(
        reference.residuals[layer],
        expected[f"layer_{layer}"],
        rtol=0,
        atol=TOLERANCE,
        err_msg=f"{reference.name}, after layer {layer}",
    )


def test_the_logits_agree(reference):
    assert np.ptp(reference.expected["logits"]) > 5
    np.testing.assert_allclose(
        reference.logits, reference.expected["logits"], rtol=0, atol=TOLERANCE, err_msg=f"{reference.name}, logits"
    )


@pytest.mark.parametrize("layer", range(3))
def test_the_cut_changes_nothing(reference, layer):
    model = reference.model
    traced = model.trace(reference.tokens, layer)
    assert relative(model.resume(traced, traced.output), reference.logits) < 1e-5, f"{reference.name}, cut at {layer}"
    # what is resumed is the output that is given, not the one that was traced
    assert relative(model.resume(traced, 0 * traced.output), reference.logits) > 1e-2


def test_the_cache_gives_torchs_logits(reference):
    """Sixteen tokens at once, the others one by one, the rows not abreast: one is a token ahead of the other."""
    config, params = reference.model.config, reference.model.params
    tokens, wanted = np.asarray(reference.tokens), reference.expected["logits"]
    rows, ahead, entries = np.arange(2), np.asarray([16, 15]), networks.empty_cache(config, params, 2, 32)
    positions = np.stack([np.arange(16), np.arange(16)])
    # a position past the cache's end marks padding
    positions[1, 15] = 32
    found = np.zeros((*tokens.shape, config.width), np.float32)
    hidden, entries = networks.decode(config, params, jnp.asarray(tokens[:, :16]), jnp.asarray(positions), entries)
    found[:, :16] = hidden
    for step in range(8):
        now = ahead + step
        hidden, entries = networks.decode(
            config, params, jnp.asarray(tokens[rows, now][:, None]), jnp.asarray(now[:, None]), entries
        )
        found[rows, now] = np.asarray(hidden)[:, 0]
    # the network reads the rows to the end of the shorter one
    logits = np.asarray(networks.logits(config, params, jnp.asarray(found)))[:, :23]
    np.testing.assert_allclose(
        logits, wanted[:, :23], rtol=0, atol=TOLERANCE, err_msg=f"{reference.name}, with the cache"
    )


def test_generation_with_the_cache_is_generation_without(reference):
    model, shape = reference.model, reference.tokens.shape
    prompts = [np.asarray(row)[:length].tolist() for row, length in zip(reference.tokens, LENGTHS, strict=True)]
    found = generation.greedy(model.config, model.params, prompts, COUNT)
    rows = [list(prompt) for prompt in prompts]
    for _ in range(COUNT):
        table = np.zeros(shape, np.int32)
        for lane, row in enumerate(rows):
            table[lane, : len(row)] = row
        logits = np.asarray(model.apply(jnp.asarray(table)))
        for lane, row in enumerate(rows):
            row.append(int(logits[lane, len(row) - 1].argmax()))
    assert found == [row[length:] for row, length in zip(rows, LENGTHS, strict=True)], reference.name
    # a network that says one token whatever it reads would prove nothing
    assert len({token for row in found for token in row}) > 1


def test_merged_equals_attached(reference):
    model, tokens = reference.model, reference.tokens
    patch = random_patch(model)
    attached, merged = (logits_of(edited, tokens) for edited in (attach(model, patch), merge(model, patch)))
    assert relative(attached, reference.logits) > 1e-2
    assert relative(merged, attached) < 1e-5, reference.name


def test_unmerge_gives_back_model_and_patch_bit_for_bit(reference):
    model, patch = reference.model, random_patch(reference.model)
    merged = merge(model, patch)
    assert networks.merged_neurons(model.config, merged.params) == {0: 2, 1: 2, 2: 2}
    back, found = unmerge(merged)
    assert same(back.params, model.params), reference.name
    assert same(found, patch), reference.name
    assert not same(merged.params, model.params)


def test_bfloat16_stays_near(reference):
    config, params, _ = checkpoint.read_folder(FOLDER / reference.name, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    logits = logits_of(Model(config, params, None), reference.tokens)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all(), reference.name
    assert 1e-5 < relative(logits, reference.logits) < 0.05, reference.name


def write_shards(tensors: dict[str, np.ndarray], folder: Path, count: int = 3) -> None:
    """The tensors in several files with an index, as large checkpoints come; neighbours in different files."""
    files = {name: f"model-{number % count + 1:05d}-of-{count:05d}.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        held = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}), "utf-8")


def test_shards_read_as_one_file(reference, tmp_path):
    (tmp_path / "config.json").write_bytes((FOLDER / reference.name / "config.json").read_bytes())
    write_shards(load_file(FOLDER / reference.name / "model.safetensors"), tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    config, params, _ = checkpoint.read_folder(tmp_path)
    assert config == reference.model.config
    assert same(params, reference.model.params), reference.name


def test_written_as_it_was_read(reference, tmp_path):
    """Names, shapes and bits of the checkpoint, so that transformers reads what we write."""
    save_model(reference.model, tmp_path / "new")
    before, after = (load_file(folder / "model.safetensors") for folder in (FOLDER / reference.name, tmp_path / "new"))
    assert same(after, before), reference.name


def test_a_merged_model_reads_back(reference, tmp_path):
    merged = merge(reference.model, random_patch(reference.model))
    save_model(merged, tmp_path / "new")
    config, params, _ = checkpoint.read_folder(tmp_path / "new")
    assert config == merged.config
    assert same(params, merged.params), reference.name


def published(name: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors as checkpoints on the hub have them: names without the first part, constants, a tied head."""
    mask, number = np.ones((1, 1, 48, 48), np.uint8), np.asarray(-1e9, np.float32)
    tensors = dict(tensors)
    if name == "gpt2":
        tensors = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
        tensors |= {"h.0.attn.bias": mask, "h.0.attn.masked_bias": number}
    if name == "gptj":
        tensors |= {"transformer.h.0.attn.bias": mask, "transformer.h.0.attn.masked_bias": number}
    if name == "gpt_neo":
        place = "transformer.h.0.attn.attention"
        tensors |= {f"{place}.bias": mask, f"{place}.masked_bias": number}
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    if name == "gpt_neox":
        place = "gpt_neox.layers.0.attention"
        tensors |= {f"{place}.bias": mask, f"{place}.masked_bias": number}
        tensors[f"{place}.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    if name == "llama":
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    if name in ("qwen3", "gemma", "gemma2"):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    if name == "opt":
        tensors = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
        tensors["lm_head.weight"] = tensors["decoder.embed_tokens.weight"]
    return tensors


@pytest.mark.parametrize("name", ["gpt2", "gptj", "gpt_neo", "gpt_neox", "llama", "qwen3", "gemma", "gemma2", "opt"])
def test_a_published_checkpoint_reads_the_same(tmp_path, name):
    (tmp_path / "config.json").write_bytes((FOLDER / name / "config.json").read_bytes())
    tensors = load_file(FOLDER / name / "model.safetensors")
    changed = published(name, tensors)
    assert set(changed) != set(tensors)
    save_file(changed, tmp_path / "model.safetensors")
    _, params, _ = checkpoint.read_folder(tmp_path)
    assert same(params, read(name).model.params), name
    # but no stranger is passed over
    save_file(changed | {"stranger.weight": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(TPatchError, match=r"stranger\.weight is not part of"):
        checkpoint.read_folder(tmp_path)


OLDER: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "gpt2": ({"n_ctx": 48, "torch_dtype": "float32"}, ("dtype", "tie_word_embeddings", "pad_token_id")),
    "gptj": ({"rotary": True}, ("dtype", "tie_word_embeddings")),
    "gpt_neo": ({"attention_layers": ["global", "local", "global"]}, ("dtype", "tie_word_embeddings")),
    "gpt_neox": ({"rotary_pct": 0.5, "rotary_emb_base": 100}, ("rope_parameters", "attention_bias")),
    "llama": (
        {
            "rope_theta": 500.0,
            "rope_scaling": {
                "type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        ("rope_parameters", "head_dim"),
    ),
    "mistral": ({"rope_theta": 100.0}, ("rope_parameters",)),
    "qwen2": (
        {"rope_theta": 100.0, "sliding_window": 8, "use_sliding_window": False, "max_window_layers": 1},
        ("rope_parameters", "layer_types"),
    ),
    "qwen3": ({"rope_theta": 100.0, "rope_scaling": None}, ("rope_parameters", "layer_types")),
    "gemma": ({"rope_theta": 100.0, "hidden_act": "gelu"}, ("rope_parameters", "tie_word_embeddings")),
    "gemma2": ({"rope_theta": 100.0}, ("rope_parameters", "layer_types", "tie_word_embeddings")),
    "gemma3_text": (
        {
            "rope_theta": 100.0,
            "rope_local_base_freq": 10.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "sliding_window_pattern": 3,
        },
        ("rope_parameters", "layer_types", "_sliding_window_pattern", "tie_word_embeddings"),
    ),
    "phi3": (
        {
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 4.0, 8.0]},
        },
        ("rope_parameters",),
    ),
    "opt": ({"dropout": 0.1}, ("tie_word_embeddings", "_remove_final_layer_norm")),
}
"""What a ``config.json`` from before transformers 5 says otherwise, and what it does not say."""


@pytest.mark.parametrize("name", sorted(OLDER))
def test_an_older_config_reads_the_same(tmp_path, name):
    new = json.loads((FOLDER / name / "config.json").read_text("utf-8"))
    said, unsaid = OLDER[name]
    old = {key: value for key, value in new.items() if key not in unsaid} | said
    assert old != new
    (tmp_path / "config.json").write_text(json.dumps(old), "utf-8")
    assert configure(checkpoint.read_settings(tmp_path)) == read(name).model.config


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"scale_attn_weights": False}),
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {"word_embed_proj_dim": 8}),
        ("opt", {"layer_norm_elementwise_affine": False}),
        ("gemma", {"use_bidirectional_attention": True}),
        ("gemma2", {"use_bidirectional_attention": True}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0}}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}}),
        ("mistral", {"hidden_act": "tanh"}),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, name, change):
    """Rather than run as another network than the one that ``config.json`` describes."""
    settings = json.loads((FOLDER / name / "config.json").read_text("utf-8")) | change
    (tmp_path / "config.json").write_text(json.dumps(settings), "utf-8")
    with pytest.raises(TPatchError, match=r"config\.json"):
        configure(checkpoint.read_settings(tmp_path))
