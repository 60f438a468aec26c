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
from tiny_families import KIN

from tpatch_jax.core.layers import split_layers
from tpatch_jax.core.patch import Patch
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import generation, networks
from tpatch_jax.models.checkpoints import folder as checkpoint
from tpatch_jax.models.checkpoints.layout import flatten
from tpatch_jax.models.families.registry import FAMILIES, configure, family_of
from tpatch_jax.models.model import Model, save_model
from tpatch_jax.models.patching import attach, merge, unmerge
from tpatch_jax.models.rows import ASK
from tpatch_jax.models.shapes import merged_neurons
from tpatch_jax.models.stack import OFFSET, STEPS

pytestmark = pytest.mark.usefixtures("quick_compilation")

FOLDER = Path(__file__).parent / "reference"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/config.json"))
CLASSIFIERS = ("bert", "distilbert", "electra", "modernbert", "roberta")
IMAGES = ("deit", "vit")
"""Classifiers that read images."""
TEXT_PAIRS = ("bart", "marian", "mbart", "pegasus", "t5", "t5_v1_1")
PAIRS = (*TEXT_PAIRS, "whisper")
"""Encoder-decoders; the last one's encoder reads sound, which has no padding."""
WRITERS = [name for name in NAMES if name not in (*CLASSIFIERS, *IMAGES)]
OLDER_WRITERS = [name for name in WRITERS if name not in KIN]
TOLERANCE = 2e-4
LENGTHS = (5, 14)
"""Of the prompts that are continued: the longer one, and the other's continuation, outgrow the windows of 8."""
COUNT = 10


class Reference(NamedTuple):
    """A small checkpoint, what torch said with it, and what we say: residual streams and logits, computed once."""

    name: str
    model: Model
    expected: dict[str, np.ndarray]
    batch: networks.Batch
    residuals: list[np.ndarray]
    logits: np.ndarray


@cache
def read(name: str) -> Reference:
    config, params, settings = checkpoint.read_folder(FOLDER / name)
    model = Model(config, params, None, name, None, settings)
    expected = load_file(FOLDER / f"{name}_expected.safetensors")
    if name in IMAGES:
        batch = jnp.asarray(expected["pixel_values"])
        residuals = [np.asarray(x) for x in networks.residuals(config, params, batch)]
        return Reference(name, model, expected, batch, residuals, np.asarray(model.apply(batch)))
    batch = jnp.asarray(expected["tokens"])
    if name in PAIRS:
        batch = networks.Pair(jnp.asarray(expected["source"]), batch)
    residuals = [without_padding(x, expected["tokens"]) for x in networks.residuals(config, params, batch)]
    return Reference(name, model, expected, batch, residuals, np.asarray(model.apply(batch)))


def without_padding(stream: jax.Array, tokens: np.ndarray) -> np.ndarray:
    """A residual stream with zeros at padding, as the references have it."""
    return np.where((tokens >= 0)[..., None], np.asarray(stream), 0)


@pytest.fixture(scope="module", params=NAMES)
def reference(request: pytest.FixtureRequest) -> Reference:
    return read(request.param)


@pytest.fixture(scope="module", params=WRITERS)
def writer(request: pytest.FixtureRequest) -> Reference:
    """A reference that writes text."""
    return read(request.param)


@pytest.fixture(scope="module", params=OLDER_WRITERS)
def older_writer(request: pytest.FixtureRequest) -> Reference:
    """The same without kin."""
    return read(request.param)


def random_patches(model: Model, neurons: int = 2) -> dict[int, Patch]:
    """Neurons for every layer, about half of them active on any query."""
    rng, count = np.random.default_rng(5), neurons * model.config.layers
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    hidden_size = model.config.hidden_size
    patch = Patch(draw(count, hidden_size) * 0.3, draw(count), draw(count, hidden_size) * 0.3)
    return split_layers(patch, np.repeat(range(model.config.layers), neurons))


def logits_of(model: Model, batch: networks.Batch) -> np.ndarray:
    """What `Model.apply` returns, by the fewest compiled functions."""
    hidden = networks.residuals(model.config, model.params, batch)[-1]
    return np.asarray(networks.logits(model.config, model.params, hidden))


def test_every_family_has_a_reference():
    assert len(NAMES) >= 36
    for family in FAMILIES:
        assert {*family.model_types, family.name} & set(NAMES), f"{family.name} has no reference; see {FOLDER.name}"
    configs = {name: configure(checkpoint.read_settings(FOLDER / name)) for name in NAMES}
    assert {config.family for config in configs.values()} == {family.name for family in FAMILIES}
    assert {name for name in NAMES if configs[name].architecture == "encoder"} == {*CLASSIFIERS, *IMAGES}
    assert {name for name in NAMES if configs[name].architecture == "encoder-decoder"} == set(PAIRS)


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


@pytest.mark.parametrize("name", PAIRS)
def test_each_layer_of_the_encoder_agrees(name):
    found = read(name)
    config, params, source = found.model.config.encoder, found.model.params, found.expected["source"]
    assert config is not None
    assert config.layers == 2
    streams = networks.residuals(config, {"embed": params["embed"], **params["encoder"]}, jnp.asarray(source))
    for layer, stream in enumerate(streams):
        np.testing.assert_allclose(
            np.asarray(stream) if source.ndim == 3 else without_padding(stream, source),
            found.expected[f"encoder_{layer}"],
            rtol=0,
            atol=TOLERANCE,
            err_msg=f"{name}, after layer {layer} of the encoder",
        )


def padded(batch: networks.Batch, more: int) -> networks.Batch:
    """The same batch with more padding behind what an encoder reads."""
    longer = lambda read: jnp.pad(read, ((0, 0), (0, more)), constant_values=-7)  # noqa: E731
    return batch._replace(source=longer(batch.source)) if isinstance(batch, networks.Pair) else longer(batch)


@pytest.mark.parametrize("name", [*CLASSIFIERS, *TEXT_PAIRS])
def test_padding_changes_nothing(name):
    """However much there is of it, whatever negative numbers it consists of; what is no padding does."""
    found = read(name)
    assert relative(logits_of(found.model, padded(found.batch, 8)), found.logits) < 1e-5
    other = jax.tree.map(lambda tokens: jnp.where(tokens < 0, 3, tokens), found.batch)
    assert relative(logits_of(found.model, other), found.logits) > 1e-2


def test_the_logits_agree(reference):
    assert np.ptp(reference.expected["logits"]) > 5
    np.testing.assert_allclose(
        reference.logits, reference.expected["logits"], rtol=0, atol=TOLERANCE, err_msg=f"{reference.name}, logits"
    )


@pytest.mark.parametrize("layer", range(3))
def test_the_cut_changes_nothing(reference, layer):
    model = reference.model
    traced = model.trace(reference.batch, layer)
    assert relative(model.resume(traced, traced.output), reference.logits) < 1e-5, f"{reference.name}, cut at {layer}"
    # what is resumed is the output that is given, not the one that was traced
    assert relative(model.resume(traced, 0 * traced.output), reference.logits) > 1e-2


def test_the_cache_gives_torchs_logits(writer):
    """Sixteen tokens at once, the others one by one, the rows not abreast: one is a token ahead of the other."""
    config, params = writer.model.config, writer.model.params
    tokens, wanted = writer.expected["tokens"], writer.expected["logits"]
    source = jnp.asarray(writer.expected["source"]) if config.encoder else None
    rows, ahead, entries = np.arange(2), np.asarray([16, 15]), networks.empty_cache(config, params, 2, 32, source)
    positions = np.stack([np.arange(16), np.arange(16)])
    # a position past the cache's end marks padding
    positions[1, 15] = 32
    found = np.zeros((*tokens.shape, config.hidden_size), np.float32)
    hidden, entries = networks.decode(config, params, jnp.asarray(tokens[:, :16]), jnp.asarray(positions), entries)
    found[:, :16] = hidden
    # as many steps as there are tokens
    steps = 8
    for step in range(steps):
        now = ahead + step
        hidden, entries = networks.decode(
            config, params, jnp.asarray(tokens[rows, now][:, None]), jnp.asarray(now[:, None]), entries
        )
        found[rows, now] = np.asarray(hidden)[:, 0]
    # the network reads the rows to the end of the shorter one
    shared = 15 + steps
    logits = np.asarray(networks.logits(config, params, jnp.asarray(found)))[:, :shared]
    np.testing.assert_allclose(
        logits, wanted[:, :shared], rtol=0, atol=TOLERANCE, err_msg=f"{writer.name}, with the cache"
    )


def source_tokens(source: np.ndarray) -> list[int]:
    """What an encoder reads, as a row of tokens: without padding, or the frames of sound one after the other."""
    if source.ndim == 1:
        return source[source >= 0].tolist()
    return np.rint((source.T + OFFSET) * STEPS).astype(int).reshape(-1).tolist()


def test_generation_with_the_cache_is_generation_without(older_writer):
    writer = older_writer
    model, tokens = writer.model, writer.expected["tokens"]
    begun = [row[:length].tolist() for row, length in zip(tokens, LENGTHS, strict=True)]
    sources = [source_tokens(source) for source in writer.expected.get("source", ())]
    prompts = [[*source, ASK, *row] for source, row in zip(sources, begun, strict=True)] if sources else begun
    found = generation.greedy(model.config, model.params, prompts, COUNT)
    rows = [list(prompt) for prompt in begun]
    for _ in range(COUNT):
        table = np.zeros(tokens.shape, np.int32)
        for lane, row in enumerate(rows):
            table[lane, : len(row)] = row
        written = jnp.asarray(table)
        logits = np.asarray(model.apply(writer.batch._replace(target=written) if sources else written))
        for lane, row in enumerate(rows):
            row.append(int(logits[lane, len(row) - 1].argmax()))
    assert found == [row[length:] for row, length in zip(rows, LENGTHS, strict=True)], writer.name
    # a network that says one token whatever it reads would prove nothing
    assert len({token for row in found for token in row}) > 1


def test_merged_equals_attached(reference):
    model, batch = reference.model, reference.batch
    patches = random_patches(model)
    attached, merged = (logits_of(put(model, patches), batch) for put in (attach, merge))
    assert relative(attached, reference.logits) > 1e-2
    assert relative(merged, attached) < 1e-5, reference.name


def test_unmerge_gives_back_model_and_patches_bit_for_bit(reference):
    model, patches = reference.model, random_patches(reference.model)
    merged = merge(model, patches)
    assert merged_neurons(model.config, merged.params) == {0: 2, 1: 2, 2: 2}
    back, taken = unmerge(merged)
    assert same(back.params, model.params), reference.name
    assert same(taken, patches), reference.name
    assert not same(merged.params, model.params)


def test_bfloat16_stays_near(reference):
    config, params, settings = checkpoint.read_folder(FOLDER / reference.name, "bfloat16")
    precise = family_of(settings).precise
    kinds = {(path.endswith(precise), leaf.dtype.name) for path, leaf in flatten(params)}
    assert kinds == {(False, "bfloat16"), *([(True, "float32")] if precise else [])}
    logits = logits_of(Model(config, params, None), reference.batch)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all(), reference.name
    lengths = np.linalg.norm(reference.logits, axis=-1)
    each = np.linalg.norm(logits - reference.logits, axis=-1) / lengths
    assert 1e-5 < np.median(each) < 0.03, reference.name
    # Half precision sends a token of a mixture to another expert now and then, which says little of its precision.
    if not config.mixture:
        assert relative(logits, reference.logits) < 0.05, reference.name


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
    merged = merge(reference.model, random_patches(reference.model))
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
    if name == "bert":
        older = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for key in [key for key in tensors if "LayerNorm" in key]:
            place, _, part = key.rpartition("LayerNorm.")
            tensors[place + older[f"LayerNorm.{part}"]] = tensors.pop(key)
    if name in CLASSIFIERS and name != "modernbert":
        tensors[f"{name}.embeddings.position_ids"] = np.arange(48)[None]
    if name == "roberta":
        # the classifier reads the first token itself, and the pooler of pretraining stayed in the file
        tensors["roberta.pooler.dense.weight"] = np.ones((16, 16), np.float32)
        tensors["roberta.pooler.dense.bias"] = np.ones(16, np.float32)
    if name in IMAGES:
        tensors = {**tensors, f"{name}.pooler.dense.weight": np.ones((16, 16), np.float32)}
        tensors |= {f"{name}.embeddings.mask_token": np.ones((1, 1, 16), np.float32)}
    if name in ("bart", "marian", "mbart", "pegasus"):
        tensors = {key.removeprefix("model."): tensor for key, tensor in tensors.items() if key != "final_logits_bias"}
        tensors["lm_head.weight"] = tensors["shared.weight"]
    if name in ("marian", "pegasus"):
        tensors |= {f"{side}.embed_positions.weight": np.ones((48, 16), np.float32) for side in ("encoder", "decoder")}
    if name == "whisper":
        tensors["proj_out.weight"] = tensors["model.decoder.embed_tokens.weight"]
    if name in TEXT_PAIRS:
        tensors |= {f"{side}.embed_tokens.weight": tensors["shared.weight"] for side in ("encoder", "decoder")}
    if name == "t5":
        place = "decoder.block.0.layer.1.EncDecAttention"
        tensors[f"{place}.relative_attention_bias.weight"] = np.ones((8, 4), np.float32)
    return tensors


PUBLISHED = ["gpt2", "gptj", "gpt_neo", "gpt_neox", "llama", "qwen3", "gemma", "gemma2", "opt", *CLASSIFIERS]
PUBLISHED += [*IMAGES, *TEXT_PAIRS, "whisper"]
PUBLISHED.remove("modernbert")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_checkpoint_reads_the_same(tmp_path, name):
    (tmp_path / "config.json").write_bytes((FOLDER / name / "config.json").read_bytes())
    tensors = load_file(FOLDER / name / "model.safetensors")
    changed = published(name, tensors)
    assert set(changed) != set(tensors)
    save_file(changed, tmp_path / "model.safetensors")
    _, params, _ = checkpoint.read_folder(tmp_path)
    wanted = read(name).model.params
    if name in ("bart", "marian", "mbart", "pegasus"):
        wanted = {**wanted, "head": {"bias": jnp.zeros(64)}}
    assert same(params, wanted), name
    # but no stranger is passed over
    save_file(changed | {"stranger.weight": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(TPatchError, match=r"stranger\.weight is not part of"):
        checkpoint.read_folder(tmp_path)


@pytest.mark.parametrize("name", TEXT_PAIRS)
def test_stacks_with_embeddings_of_their_own_are_refused(tmp_path, name):
    (tmp_path / "config.json").write_bytes((FOLDER / name / "config.json").read_bytes())
    tensors = published(name, load_file(FOLDER / name / "model.safetensors"))
    save_file(tensors | {"decoder.embed_tokens.weight": tensors["shared.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(TPatchError, match=r"decoder\.embed_tokens\.weight differs from shared\.weight, and one"):
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
    "bert": (
        {"position_embedding_type": "absolute", "gradient_checkpointing": False},
        ("layer_norm_eps", "is_decoder", "add_cross_attention", "tie_word_embeddings"),
    ),
    "roberta": ({"position_embedding_type": "absolute"}, ("pad_token_id", "is_decoder", "add_cross_attention")),
    "distilbert": ({"sinusoidal_pos_embds": False, "tie_weights_": True}, ("activation", "tie_word_embeddings")),
    "bart": (
        {"num_hidden_layers": 2, "normalize_before": False, "static_position_embeddings": False},
        ("scale_embedding", "tie_word_embeddings", "decoder_start_token_id"),
    ),
    "vit": ({"add_pooling_layer": False}, ("pooler_act", "pooler_output_size", "encoder_stride")),
    "deit": ({"qkv_bias": True}, ("pooler_act", "pooler_output_size")),
    "t5": (
        {"n_positions": 512, "output_past": True},
        ("feed_forward_proj", "is_gated_act", "dense_act_fn", "scale_decoder_outputs", "tie_word_embeddings"),
    ),
    "t5_v1_1": ({"tie_word_embeddings": False}, ("is_gated_act", "dense_act_fn", "scale_decoder_outputs")),
}
"""What a ``config.json`` from before transformers 5 says otherwise, and what it does not say."""


@pytest.mark.parametrize("name", sorted(OLDER))
def test_an_older_config_reads_the_same(tmp_path, name):
    new = json.loads((FOLDER / name / "config.json").read_text("utf-8"))
    said, unsaid = OLDER[name]
    old = {key: value for key, value in new.items() if key not in unsaid} | said
    assert old != new
    (tmp_path / "config.json").write_text(json.dumps(old), "utf-8")
    (tmp_path / "model.safetensors").symlink_to(FOLDER / name / "model.safetensors")
    assert checkpoint.read_folder(tmp_path)[0] == read(name).model.config


YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 12}


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
        ("qwen2", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 100.0, "factor": 4.0}}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}}),
        ("mistral", {"hidden_act": "tanh"}),
        ("smollm3", {"no_rope_layers": [1, 0]}),
        ("smollm3", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}),
        ("olmo3", {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), YARN)}),
        ("stablelm", {"qk_layernorm": True}),
        ("cohere", {"use_qk_norm": True}),
        ("bert", {"problem_type": "multi_label_classification"}),
        ("bert", {"position_embedding_type": "relative_key"}),
        ("bert", {"is_decoder": True}),
        ("bert", {"id2label": {"0": "yes"}, "label2id": {"yes": 0}}),
        ("bert", {"id2label": {"0": "yes", "1": "yes"}, "label2id": {"yes": 1}}),
        ("bert", {"classifier_pooling": "max"}),
        ("roberta", {"problem_type": "regression"}),
        ("roberta", {"add_cross_attention": True}),
        ("distilbert", {"id2label": {"0": "yes", "2": "no"}, "label2id": {"yes": 0, "no": 2}}),
        ("vit", {"num_channels": 4}),
        ("vit", {"patch_size": 16}),
        ("vit", {"image_size": [8, 8, 8]}),
        ("vit", {"num_attention_heads": 3}),
        ("vit", {"classifier_pooling": "max"}),
        ("deit", {"problem_type": "regression"}),
        ("bart", {"activation_function": "tanh"}),
        ("electra", {"is_decoder": True}),
        ("modernbert", {"norm_bias": True}),
        ("modernbert", {"classifier_activation": "tanh"}),
        ("marian", {"share_encoder_decoder_embeddings": False}),
        ("marian", {"decoder_vocab_size": 70}),
        ("t5", {"feed_forward_proj": "gelu-gated"}),
        ("t5", {"relative_attention_max_distance": 4}),
        ("t5_v1_1", {"feed_forward_proj": "gated-gelu-new"}),
        ("t5_v1_1", {"feed_forward_proj": "gated-tanh"}),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, name, change):
    """Rather than run as another network than the one that ``config.json`` describes."""
    settings = json.loads((FOLDER / name / "config.json").read_text("utf-8")) | change
    (tmp_path / "config.json").write_text(json.dumps(settings), "utf-8")
    with pytest.raises(TPatchError, match=r"config\.json"):
        configure(checkpoint.read_settings(tmp_path))


# --- heads ---


def pretrained(name: str, folder: Path) -> dict[str, np.ndarray]:
    """A classifier's checkpoint as it was before it had a head, in a folder of its own; returns the tensors."""
    heads = ("classifier.", "pre_classifier.")
    tensors = load_file(FOLDER / name / "model.safetensors")
    kept = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if not key.startswith(heads)}
    (folder / "config.json").write_bytes((FOLDER / name / "config.json").read_bytes())
    save_file(kept, folder / "model.safetensors")
    return kept


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_an_encoder_without_a_head_says_how_to_get_one(tmp_path, name):
    pretrained(name, tmp_path)
    with pytest.raises(TPatchError, match=r"without a classification head .*`tpatch finetune`"):
        checkpoint.read_folder(tmp_path)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_an_encoder_without_a_head_is_read_for_given_labels(tmp_path, name):
    tensors = pretrained(name, tmp_path)
    # heads of pretraining are passed over, strangers are not
    save_file(tensors | {"lm_head.bias": np.ones(64, np.float32)}, tmp_path / "model.safetensors")
    config, params, settings = checkpoint.read_folder(tmp_path, labels=["bad", "good"])
    assert config.labels == ("bad", "good")
    assert settings["id2label"] == {"0": "bad", "1": "good"}
    assert settings["label2id"] == {"bad": 0, "good": 1}
    head = params.pop("classifier", {})
    # BERT's pooler is the first layer of its head, and ModernBERT's is that of pretraining
    assert set(head) == {"bert": {"dense"}, "modernbert": {"dense", "norm"}}.get(name, set())
    wanted = dict(read(name).model.params)
    assert same(head, {part: wanted["classifier"][part] for part in head})
    del wanted["classifier"]
    assert same(params, wanted)
    save_file(tensors | {"stranger.weight": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(TPatchError, match=r"stranger\.weight is not part of"):
        checkpoint.read_folder(tmp_path, labels=["bad", "good"])


def test_a_head_for_other_labels_keeps_what_fits():
    """The layer before the labels fits, unless its shape tells otherwise; that of three labels does not fit two."""
    _, params, _ = checkpoint.read_folder(FOLDER / "roberta", labels=["bad", "good"])
    assert same(params["classifier"], {"dense": read("roberta").model.params["classifier"]["dense"]})
    _, params, _ = checkpoint.read_folder(FOLDER / "roberta", labels=["a", "b", "c"])
    assert same(params, read("roberta").model.params)


def test_a_head_may_read_the_mean_of_all_tokens(tmp_path):
    """Of those that are no padding, as ``classifier_pooling`` says; the weights are the same."""
    found, tensors = read("bert"), load_file(FOLDER / "bert" / "model.safetensors")
    settings = json.loads((FOLDER / "bert" / "config.json").read_text("utf-8")) | {"classifier_pooling": "mean"}
    (tmp_path / "config.json").write_text(json.dumps(settings), "utf-8")
    save_file(tensors, tmp_path / "model.safetensors")
    config, params, settings = checkpoint.read_folder(tmp_path)
    model = Model(config, params, None, "mean", None, settings)
    lengths = (found.expected["tokens"] >= 0).sum(1, keepdims=True)
    mean = found.expected["layer_2"].sum(1) / lengths
    middle = np.tanh(mean @ tensors["bert.pooler.dense.weight"].T + tensors["bert.pooler.dense.bias"])
    wanted = middle @ tensors["classifier.weight"].T + tensors["classifier.bias"]
    np.testing.assert_allclose(model.apply(found.batch), wanted, rtol=0, atol=TOLERANCE)
    assert relative(wanted, found.expected["logits"]) > 1e-2
    # the same with other layers cut, patches in them, and written and read
    patches = random_patches(model)
    attached, merged = (np.asarray(put(model, patches).apply(found.batch)) for put in (attach, merge))
    assert relative(attached, wanted) > 1e-2
    assert relative(merged, attached) < 1e-5
    save_model(merge(model, patches), tmp_path / "new")
    assert checkpoint.read_folder(tmp_path / "new")[0] == config


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_labels_are_for_encoders(name):
    with pytest.raises(TPatchError, match=f"is a {name}, which has no classification head; give labels to an encoder"):
        checkpoint.read_folder(FOLDER / name, labels=["bad", "good"])


@pytest.mark.parametrize("said", [None, 3])
def test_where_a_decoder_starts_may_stand_with_what_is_said_of_generation(tmp_path, said):
    """As transformers has it: ``generation_config.json`` decides, ``config.json`` where it says nothing."""
    for name, default in (("t5", 0), ("bart", 2)):
        settings = json.loads((FOLDER / name / "config.json").read_text("utf-8"))
        (tmp_path / "config.json").write_text(json.dumps(settings), "utf-8")
        (tmp_path / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": said}), "utf-8")
        found = checkpoint.read_settings(tmp_path)
        assert found["decoder_start_token_id"] == (default if said is None else said)
        del settings["decoder_start_token_id"]
        (tmp_path / "config.json").write_text(json.dumps(settings), "utf-8")
        if said is not None:
            assert checkpoint.read_settings(tmp_path)["decoder_start_token_id"] == said
    (tmp_path / "generation_config.json").write_text("no JSON", "utf-8")
    assert checkpoint.read_settings(tmp_path)["decoder_start_token_id"] == 2
