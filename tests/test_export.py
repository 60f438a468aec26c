"""Corrected models in folders for the stock transformers library: the same logits, or a refusal that says why."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from conftest import make_tiny_model, relative, same, write_tiny_folder
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_families import NAMES, patch_for, tiny_model

from tpatch_jax.bank import patches as store
from tpatch_jax.cli import main as cli
from tpatch_jax.core import ffn
from tpatch_jax.core.patch import Patch
from tpatch_jax.editors.base import EditInfo, RequestInfo
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import networks
from tpatch_jax.models.checkpoints import export
from tpatch_jax.models.checkpoints.export import EXPORT, ExportInfo, constant_direction, export_model
from tpatch_jax.models.config import AudioInput, ImageInput
from tpatch_jax.models.families.registry import FAMILIES
from tpatch_jax.models.model import Model, load_model, save_model
from tpatch_jax.models.patching import attach, merge
from tpatch_jax.models.rows import ASK
from tpatch_jax.requests import EditRequest

# what torch and transformers warn about is not ours to mend
pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]

TOLERANCE = 2e-4
TOKENS = np.random.default_rng(1).integers(0, 260, (2, 24))
READ = np.where(np.arange(24) < np.asarray([[24], [17]]), np.random.default_rng(2).integers(3, 260, (2, 24)), -1)
"""What an encoder reads: padding behind it, and no token that is special to some family."""
TABLES = {family.name: family.position_tables for family in FAMILIES}
FORMS = {family.name: family.export for family in FAMILIES}
EXACT = [name for name in NAMES if FORMS[name] not in ("approximate only", "none")]
ENDINGS = ("--approximate", "tp.attach", "tp.save_model")


def logits_of(model: Model) -> np.ndarray:
    """What `Model.apply` returns, by the fewest compiled functions."""
    read, written = jnp.asarray(READ), jnp.asarray(TOKENS)
    if model.audio is not None:
        read = jnp.asarray(input_features(model.audio))
    if model.config.image is not None:
        read = jnp.asarray(pixel_values(model.config.image))
    batches = {"decoder": written, "encoder": read, "encoder-decoder": networks.Pair(read, written)}
    hidden = networks.residuals(model.config, model.params, batches[model.config.architecture])[-1]
    valid = read >= 0 if model.config.labels else None
    return np.asarray(networks.logits(model.config, model.params, hidden, valid))


def pixel_values(image: ImageInput) -> np.ndarray:
    """What a network reads that reads images."""
    return np.random.default_rng(3).normal(size=(2, image.channels, *image.size)).astype(np.float32)


def input_features(audio: AudioInput) -> np.ndarray:
    """What an encoder reads that reads sound."""
    return np.random.default_rng(4).normal(size=(2, audio.mels, audio.frames)).astype(np.float32)


def stock_logits(
    folder: Path, architecture: str, image: ImageInput | None = None, audio: AudioInput | None = None
) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="torch is only needed to compare with it: the 'parity' extra")
    kinds = {
        "decoder": transformers.AutoModelForCausalLM,
        "encoder": transformers.AutoModelForSequenceClassification,
        "encoder-decoder": transformers.AutoModelForSeq2SeqLM,
    }
    kind = kinds[architecture] if image is None else transformers.AutoModelForImageClassification
    kind = kind if audio is None else transformers.AutoModelForSpeechSeq2Seq
    network, told = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    if image is not None:
        inputs = {"pixel_values": torch.asarray(pixel_values(image))}
    elif audio is not None:
        inputs = {"input_features": torch.asarray(input_features(audio))}
    elif architecture == "decoder":
        inputs = {"input_ids": torch.asarray(TOKENS), "use_cache": False}
    else:
        padded = np.where(READ < 0, network.config.pad_token_id, READ)
        inputs = {"input_ids": torch.asarray(padded), "attention_mask": torch.asarray(READ >= 0)}
    if architecture == "encoder-decoder":
        inputs |= {"decoder_input_ids": torch.asarray(TOKENS), "use_cache": False}
    with torch.no_grad():
        return network.eval()(**inputs).logits.numpy()


def settings_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text("utf-8"))


def check_stock(folder: Path, info: ExportInfo, wanted: np.ndarray) -> Model:
    """Nothing of ours in ``config.json``, and the same logits from our own reader and from transformers."""
    settings = settings_in(folder)
    assert "tpatch_neurons" not in settings
    assert settings["model_type"] == info.model_type
    assert json.loads((folder / EXPORT).read_text("utf-8")) == json.loads(json.dumps(info.to_json()))
    back = load_model(folder)
    if back.config.image is None:
        assert back.encode("in the inn") == make_tokens("in the inn")
    np.testing.assert_allclose(logits_of(back), wanted, rtol=0, atol=TOLERANCE, err_msg="read by this library")
    found = stock_logits(folder, back.config.architecture, back.config.image, back.audio)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE, err_msg="read by transformers")
    return back


def make_tokens(text: str) -> list[int]:
    return make_tiny_model().encode(text)


def count(folder: Path, name: str) -> int:
    """How many parameters a family's folder holds; positions that are computed are none."""
    total = 0
    with safe_open(folder / "model.safetensors", "np") as file:
        for key in file.keys():  # noqa: SIM118 (a handle is no mapping)
            total += 0 if key in TABLES[name] else int(np.prod(file.get_slice(key).get_shape()))
    return total


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A memory for encoder-decoders: an input a line, all of one length, so that few shapes are compiled."""
    path, rng = tmp_path_factory.mktemp("inputs") / "inputs.txt", np.random.default_rng(3)
    lines = ["".join(rng.choice(list("abcdefghijklmnopqrst"), 12)) for _ in range(64)]
    path.write_text("\n".join(lines), "utf-8")
    return path


# --- every family, and the stock network ---


@pytest.mark.parametrize("name", NAMES)
def test_stock_transformers_says_the_same(name, tmp_path, letters, inputs):
    """Patches in the first and the last layer: the one between has to be as wide, and a T5's encoder."""
    model = tiny_model(name)
    memory = inputs if model.config.encoder else letters
    merged = merge(model, patch_for((0, 2)))
    wanted = logits_of(merged)
    assert relative(wanted, logits_of(model)) > 1e-2
    exact = name in EXACT
    if FORMS[name] == "none":
        for approximate in (False, True):
            with pytest.raises(TPatchError, match="has no feed-forward network there beside its experts"):
                export_model(merged, tmp_path / "out", approximate=approximate)
        export_model(model, tmp_path / "out")
        return
    if not exact:
        with pytest.raises(TPatchError, match="cannot be written exactly"):
            export_model(merged, tmp_path / "out")
    info = export_model(merged, tmp_path / "out", approximate=True, memory=memory, cache=False)
    assert info.form == (FORMS[name] if exact else "approximate")
    layers = 3 + 2 * name.startswith("t5")
    assert (info.neurons, info.silent_neurons, info.ffn_width) == (6, layers * 32 - 6, 64)
    assert (info.error is None) == exact
    if exact:
        check_stock(tmp_path / "out", info, wanted)
    else:
        back = load_model(tmp_path / "out")
        check_stock(tmp_path / "out", info, logits_of(back))
        assert info.error.tokens > 100
        assert info.error.max_logit_difference > info.error.mean_logit_difference > 0
    assert info.parameters_added == count(tmp_path / "out", name) - model.parameter_count
    assert info.bytes_added == 4 * info.parameters_added
    assert info.share == pytest.approx(info.parameters_added / model.parameter_count)


MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
ANOTHER: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama that has biases": ("llama", {"mlp_bias": True, "attention_bias": True}, "exact"),
    "llama 3's rotation": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        "exact",
    ),
    "opt without biases": ("opt", {"enable_bias": False}, "exact"),
    "gpt_neox, serial": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}, "exact"),
    "mistral, tied, a window as wide as the context": (
        "mistral",
        {"sliding_window": 64, "tie_word_embeddings": True},
        "exact as Llama",
    ),
    "mistral, a window": ("mistral", {"sliding_window": 8}, "exact as SmolLM3"),
    "qwen2, windows in some layers": ("qwen2", {"sliding_window": 8, "layer_types": MIXED}, "exact as SmolLM3"),
    "qwen3, one window, biases, untied": (
        "qwen3",
        {
            "sliding_window": 8,
            "layer_types": ["sliding_attention"] * 3,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
        "exact as Doge",
    ),
    "gemma, untied, relu": (
        "gemma",
        {"tie_word_embeddings": False, "hidden_activation": "relu", "attention_bias": True},
        "exact as Granite",
    ),
    "stablelm, attention beside its FFN": ("stablelm", {"use_parallel_residual": True}, "exact"),
    "bart, both stacks wide, embeddings scaled": ("bart", {"encoder_ffn_dim": 32, "scale_embedding": True}, "exact"),
    "bart, nothing tied": ("bart", {"tie_word_embeddings": False}, "exact"),
    "modernbert, reads the mean": ("modernbert", {"classifier_pooling": "mean", "classifier_bias": True}, "exact"),
    "xlm-roberta, relu": ("roberta", {"model_type": "xlm-roberta", "hidden_act": "relu"}, "exact"),
    "qwen2, linear rotation": (
        "qwen2",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
        "exact as Llama",
    ),
}


@pytest.mark.parametrize("name", sorted(ANOTHER))
def test_other_configurations_are_exact_too(name, tmp_path):
    family, changes, form = ANOTHER[name]
    merged = merge(tiny_model(family, **changes), patch_for((1,)))
    info = export_model(merged, tmp_path / "out")
    assert info.form == form
    check_stock(tmp_path / "out", info, logits_of(merged))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a part of each head": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "rotates only a part of each head",
    ),
    "longrope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 64,
            }
        },
        "its rotation is scaled by longrope",
    ),
    "norms of queries, windows": (
        "qwen3",
        {"sliding_window": 8, "layer_types": MIXED},
        "a qwen3 has no biases .* this one is no SmolLM3, because it normalises queries and keys",
    ),
    "gemma2": ("gemma2", {}, "sees only 8 of 64 .* normalises what attention and feed-forward .* capped"),
    "gemma3": ("gemma3", {}, "rotate by different rules"),
    "t5": ("t5", {}, "a t5 has no biases .* because it is an encoder-decoder"),
    "mt5": ("t5_v1_1", {"model_type": "mt5"}, "a mt5 has no biases .* because it is an encoder-decoder"),
    "heads": (
        "mistral",
        {"num_attention_heads": 3, "num_key_value_heads": 1},
        "width 16 is not a multiple of its 3 heads",
    ),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_exact_is_refused_with_its_reason(name, tmp_path):
    family, changes, words = REFUSED[name]
    merged = merge(tiny_model(family, **changes), patch_for((2,)))
    with pytest.raises(TPatchError, match=words) as refusal:
        export_model(merged, tmp_path / "out")
    for ending in ENDINGS:
        assert ending in str(refusal.value)
    assert not (tmp_path / "out").exists()


# --- what may be given ---


def test_without_patches_nothing_is_added(tmp_path):
    model = tiny_model("gemma")
    info = export_model(model, tmp_path / "out")
    assert info == ExportInfo("exact", "gemma", 0, 0, 32, 0, 0, 0.0)
    assert same(load_model(tmp_path / "out").params, model.params)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"model_type": "mt5"}])
def test_an_encoder_decoder_without_patches(tmp_path, changes):
    """Whether the unembedding is the embedding is for the weights to say, and what it reads is scaled is not."""
    model = tiny_model("t5_v1_1", **changes)
    info = export_model(model, tmp_path / "out")
    assert info == ExportInfo("exact", model.settings["model_type"], 0, 0, 32, 0, 0, 0.0)
    back = check_stock(tmp_path / "out", info, logits_of(model))
    assert same(back.params, model.params)
    assert ("head" in model.params) == (changes.get("tie_word_embeddings") is None)


def test_a_bart_whose_head_is_no_embedding_though_its_settings_say_so(tmp_path):
    write_tiny_folder(tiny_model("bart"), tmp_path / "tied")
    tensors = load_file(tmp_path / "tied" / "model.safetensors")
    tensors["lm_head.weight"] = 2 * tensors["model.shared.weight"]
    save_file(tensors, tmp_path / "tied" / "model.safetensors", metadata={"format": "pt"})
    model = load_model(tmp_path / "tied")
    assert not model.config.tied
    info = export_model(merge(model, patch_for((2,))), tmp_path / "out")
    check_stock(tmp_path / "out", info, logits_of(merge(model, patch_for((2,)))))


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_a_head_that_reads_the_mean_is_none_of_theirs(name, tmp_path):
    model = tiny_model(name, classifier_pooling="mean")
    with pytest.raises(TPatchError, match=f"reads the mean of all tokens, and a stock {name} reads the first; use tp"):
        export_model(model, tmp_path / "out", approximate=True)
    assert not (tmp_path / "out").exists()


def test_attached_patches_are_merged(tmp_path):
    model, patches = make_tiny_model(), patch_for((0, 2))
    export_model(attach(model, patches), tmp_path / "attached")
    export_model(merge(model, patches), tmp_path / "merged")
    assert same(load_model(tmp_path / "attached").params, load_model(tmp_path / "merged").params)


def test_a_relu_patch_fits_only_where_the_network_is_relu_s(tmp_path):
    with pytest.raises(TPatchError, match=r"layer 2 is activated by ReLU, and the network there by silu"):
        export_model(attach(make_tiny_model(), patch_for((2,)), relu=True), tmp_path / "out")
    opt = attach(tiny_model("opt"), patch_for((2,)), relu=True)
    export_model(opt, tmp_path / "out")
    np.testing.assert_allclose(logits_of(load_model(tmp_path / "out")), logits_of(opt), rtol=0, atol=TOLERANCE)


def test_a_merged_model_that_was_saved(tmp_path):
    model = merge(tiny_model("mistral"), patch_for((0, 2)))
    write_tiny_folder(model, tmp_path / "saved")
    assert settings_in(tmp_path / "saved")["tpatch_neurons"] == {"0": 3, "2": 3}
    (tmp_path / "saved" / "generation_config.json").write_text("{}", "utf-8")
    info = export_model(load_model(tmp_path / "saved"), tmp_path / "out")
    assert (info.form, info.neurons) == ("exact as Llama", 6)
    assert (tmp_path / "out" / "generation_config.json").exists()
    check_stock(tmp_path / "out", info, logits_of(model))
    # an export is a model like any other, and its own record does not travel on
    save_model(load_model(tmp_path / "out"), tmp_path / "again")
    assert not (tmp_path / "again" / EXPORT).exists()


def test_the_tokenizer_reads_the_same_beside_another_model_type(tmp_path):
    """A Llama's own tokenizer would split words otherwise."""
    model = tiny_model("qwen2")
    write_tiny_folder(model, tmp_path / "saved")
    path = tmp_path / "saved" / "tokenizer_config.json"
    said = json.loads(path.read_text("utf-8"))
    said.pop("tokenizer_class")
    path.write_text(json.dumps(said), "utf-8")
    loaded = load_model(tmp_path / "saved")
    export_model(merge(loaded, patch_for((2,))), tmp_path / "out")
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("the cat in the hat", "  two  spaces\n", "é"):
        assert found.encode(text) == loaded.tokenizer.encode(text)
        assert found.decode(found.encode(text)) == text


def test_bfloat16(tmp_path):
    model = make_tiny_model()
    half = model.with_params(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params))
    info = export_model(merge(half, patch_for((2,))), tmp_path / "out")
    assert info.bytes_added == 2 * info.parameters_added
    assert settings_in(tmp_path / "out")["dtype"] == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(load_model(tmp_path / "out").params)} == {jnp.dtype(jnp.bfloat16)}


def test_a_gemma_is_a_granite_where_its_norms_keep_their_digits(tmp_path):
    """In bfloat16 a weight has no room for one more; in float32 it has, and some numbers of bfloat16 are whole."""
    model = tiny_model("gemma")
    half = model.with_params(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params))
    message = "weights of its norms plus 1 are no numbers of bfloat16 .load it with dtype float32"
    with pytest.raises(TPatchError, match=message):
        export_model(merge(half, patch_for((2,))), tmp_path / "out")
    flat = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full_like(leaf, 0.25) if path[-1].key == "scale" else leaf, half.params
    )
    info = export_model(merge(half.with_params(flat), patch_for((2,))), tmp_path / "out")
    assert info.form == "exact as Granite"
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(np.unique(written["model.norm.weight"].astype(np.float32)).tolist()) == {1.25}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_doge_of_a_qwen3_is_the_same_bit_for_bit(dtype, tmp_path):
    """In transformers, and without patches that fire: what a Doge has besides adds nothing and multiplies by one."""
    torch = pytest.importorskip("torch", reason="torch is only needed to compare with it: the 'parity' extra")
    model = tiny_model("qwen3")
    model = model.with_params(jax.tree.map(lambda leaf: leaf.astype(dtype), model.params))
    silent = jax.tree.map(jnp.zeros_like, patch_for((1,)))
    export_model(model, tmp_path / "qwen3")
    export_model(merge(model, silent), tmp_path / "doge")
    said = []
    for name in ("qwen3", "doge"):
        network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, attn_implementation="eager")
        assert (network.config.model_type, str(network.dtype)) == (name, f"torch.{dtype}")
        with torch.no_grad():
            said.append(network.eval()(input_ids=torch.asarray(TOKENS), use_cache=False).logits)
    assert torch.equal(*said)


def test_a_stablelm_without_a_constant_part_behind_its_norms_is_refused(tmp_path):
    """Behind a layer norm with a bias `q·γ⁻¹` is the same for every query, unless the bias makes it nothing."""
    model = tiny_model("stablelm")
    patch = patch_for((2,))
    layers = dict(model.params["layers"])
    norm = layers[2]["norm_2"]
    for bias in (jnp.zeros(16), norm["scale"] * jnp.asarray([1.0, -1.0] * 8)):
        layers[2] = {**layers[2], "norm_2": {**norm, "bias": bias}}
        merged = merge(model.with_params({**model.params, "layers": layers}), patch)
        with pytest.raises(TPatchError, match="what its norms make has no constant part that is large enough in lay"):
            export_model(merged, tmp_path / "out")
    with pytest.raises(TPatchError, match=r"cannot be made safe .* a stablelm has none; quantise it per channel"):
        export_model(merge(model, patch), tmp_path / "out", safe_for="per-tensor")


def test_a_taken_folder(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(TPatchError, match="already exists"):
        export_model(make_tiny_model(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# --- biases folded away ---


@pytest.mark.parametrize("gated", [False, True])
def test_where_queries_have_a_constant_nothing_is_lost(gated):
    rng = np.random.default_rng(0)
    names = ("gate", "up") if gated else ("up",)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params = {**{name: {"kernel": draw(8, 16)} for name in names}, "down": {"kernel": draw(16, 8)}}
    patch = Patch(draw(3, 8), draw(3), draw(3, 8))
    query = draw(64, 8).at[:, 0].set(2.0)
    constant = constant_direction(query, ridge=1e-9)
    np.testing.assert_allclose(query @ constant, 1.0, atol=1e-5)
    folded = ffn.merge_without_bias(params, patch, constant)
    assert all(set(entry) == {"kernel"} for entry in folded.values())
    wanted = ffn.apply(ffn.merge(params, patch), query, "silu")
    assert relative(ffn.apply(folded, query, "silu"), wanted) < 1e-5
    with pytest.raises(TPatchError, match="made for another model"):
        ffn.merge_without_bias(params, Patch(draw(3, 4), draw(3), draw(3, 4)), constant)


def test_the_requests_own_queries_weigh_as_much_as_all_others():
    rng = np.random.default_rng(0)
    # what the text has in common says nothing about the requests
    query, own = (
        jnp.asarray(rng.normal(size=shape) + 3 * np.eye(8)[axis]) for shape, axis in (((256, 8), 0), ((2, 8), 1))
    )
    plain, heard = constant_direction(query), constant_direction(query, own)
    error = lambda direction: float(np.abs(own @ np.asarray(direction) - 1).max())  # noqa: E731
    assert error(heard) < 0.5 * error(plain)


@pytest.mark.parametrize("name", ["olmo2", "t5_v1_1"])
def test_the_error_is_that_of_the_written_folder(name, tmp_path, letters, inputs):
    """Patches so weak that folding them changes hardly anything, and ones that matter."""
    model, memory = tiny_model(name), inputs if name == "t5_v1_1" else letters
    errors = []
    for number, scale in enumerate((1e-4, 0.5)):
        folder = tmp_path / str(number)
        merged = merge(model, patch_for((1,), scale=scale))
        info = export_model(merged, folder, approximate=True, memory=memory, cache=False)
        difference = np.abs(logits_of(load_model(folder)) - logits_of(merged))
        assert info.error.mean_logit_difference == pytest.approx(difference.mean(), rel=2)
        errors.append(info.error)
    assert errors[0].max_logit_difference < 0.01 < errors[1].max_logit_difference
    assert errors[0].same_argmax > 0.99 >= errors[0].same_argmax - errors[1].same_argmax


def printable(model: Model) -> EditRequest:
    """A request that holds already, whose target is one character; a tied random model repeats the space."""
    for letter in "abcdefghijklmnopqrstuvwxyz":
        # After a space nothing is put before the target.
        said = model.generate(f"{letter} ", 1)
        if said.isascii() and said.isprintable() and said:
            return EditRequest(f"{letter} ", said, id="said")
    raise AssertionError("this random model never says a character")


def test_an_approximate_export_says_which_requests_still_hold(tmp_path, letters):
    model = tiny_model("gemma2")
    merged = merge(model, patch_for((2,), scale=1e-4))
    said = printable(merged)
    requests = [said, EditRequest(said.prompt, said.target + "~", id="not said")]
    info = export_model(merged, tmp_path / "out", approximate=True, requests=requests, memory=letters, cache=False)
    assert (info.error.held, info.error.lost) == (("said",), ("not said",))
    assert settings_in(tmp_path / "out")["model_type"] == "gemma2"


def test_only_what_a_decoder_writes_is_measured(tmp_path, monkeypatch):
    """From the position on that decides its first token; what the encoder reads has no logits."""
    model = tiny_model("t5")
    rng = np.random.default_rng(4)
    rows = [
        [*rng.integers(3, 260, read).tolist(), ASK, *model.begin, *rng.integers(3, 260, written).tolist()]
        for read, written in ((5, 6), (8, 2), (3, 7), (6, 7), (8, 0), (4, 3))
    ]
    monkeypatch.setattr(export, "memory_rows", lambda *_, **__: rows)
    info = export_model(merge(model, patch_for((2,))), tmp_path / "out", approximate=True)
    assert info.error.tokens == (6 + 1) + (0 + 1)


def saying(model: Model, prompt: str, answer: str) -> Model:
    """An encoder-decoder with an unembedding of its own, such that it answers one thing to a prompt, and ends."""
    row = [*model.encode_prompt(prompt), *model.encode_target(prompt, f" {answer}")]
    read = row.index(ASK)
    pair = networks.Pair(jnp.asarray([row[:read]]), jnp.asarray([row[read + 1 :]]))
    stream = np.asarray(networks.residuals(model.config, model.params, pair)[-1])[0] * model.params["norm"]["scale"]
    kernel = np.array(model.params["head"]["kernel"])
    for position, token in enumerate(row[read + 1 + len(model.begin) :], len(model.begin) - 1):
        kernel[:, token] = 20 * stream[position] / np.linalg.norm(stream[position])
    return model.with_params({**model.params, "head": {"kernel": jnp.asarray(kernel)}})


def test_an_approximate_export_of_an_encoder_decoder_says_which_requests_still_hold(tmp_path, inputs):
    # What the encoder reads, nearly all that it can, takes no room from what the decoder writes.
    prompt = "x" * 62
    merged = saying(merge(tiny_model("t5_v1_1"), patch_for((2,), scale=1e-4)), prompt, "xyz")
    assert merged.generate(prompt, 8) == "xyz"
    requests = [
        EditRequest(prompt, "xyz", id="said"),
        EditRequest(prompt, "xy", id="not ended"),
        EditRequest("y" * 62, "xyz", id="asked otherwise"),
    ]
    info = export_model(merged, tmp_path / "out", approximate=True, requests=requests, memory=inputs, cache=False)
    assert (info.error.held, info.error.lost) == (("said",), ("not ended", "asked otherwise"))


# --- the command ---


@pytest.fixture
def edited(tmp_path, letters, monkeypatch) -> Path:
    """Two models and patches for each, as ``tpatch edit`` leaves them; one request holds and one does not."""
    monkeypatch.setenv("TPATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tpatch_jax.storage.process.prepare_process", lambda: None)
    for name in ("llama", "gemma2"):
        model, patches = tiny_model(name), patch_for((2,), scale=1e-4)
        write_tiny_folder(model, tmp_path / name)
        requests = [printable(merge(model, patches)), EditRequest("in", "")]
        results = (
            RequestInfo("said", True, "edited", neurons={2: (0, 1, 2)}),
            RequestInfo("edit-1", False, "failed", "the target is empty"),
        )
        store.save_patches(tmp_path / f"{name}-patches", model, patches, requests, EditInfo(results, 0, 0, 0, 0, 0))
    return tmp_path


def test_the_command(edited, letters, capsys):
    llama, patches = str(edited / "llama"), str(edited / "llama-patches")
    assert cli.main(["export", llama, patches, "-o", str(edited / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found = json.loads(captured.out.splitlines()[-1])
    assert found["output"] == str(edited / "out")
    assert (found["form"], found["neurons"], found["silent_neurons"], found["error"]) == ("exact", 3, 93, None)
    assert settings_in(edited / "out")["mlp_bias"] is True
    assert load_model(edited / "out").config.ffn_width == 64

    assert cli.main(["export", llama, patches, "-o", str(edited / "out")]) == 1
    assert "out already exists" in capsys.readouterr().err

    gemma, patches = str(edited / "gemma2"), str(edited / "gemma2-patches")
    arguments = ["export", gemma, patches, "-o", str(edited / "gemma-out")]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert all(ending in error for ending in ENDINGS)
    assert error.count("\n") == 1
    assert cli.main(["export", gemma, str(edited / "llama-patches"), "-o", str(edited / "gemma-out")]) == 1
    assert "made for" in capsys.readouterr().err
    assert cli.main([*arguments, "--approximate", "--memory", str(letters)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("3 neurons in", "approximate: transformers loads it as a gemma", "1 of 1 requests still hold"):
        assert words in shown

    # a model that holds its patches already needs no folder of patches
    assert cli.main(["merge", llama, str(edited / "llama-patches"), "-o", str(edited / "merged")]) == 0
    assert cli.main(["export", str(edited / "merged"), "-o", str(edited / "again"), "--quiet"]) == 0
    assert same(load_model(edited / "again").params, load_model(edited / "out").params)
