"""Our networks beside transformers' in torch, layer by layer.

torch is an extra (``pip install -e ".[parity]"``): the library never needs it, so where it is absent these tests are
skipped, and ``test_reference.py`` compares with what it once said.
"""

import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch", reason="torch is only needed to compare with it: the 'parity' extra")

import transformers  # noqa: E402

from tpatch_jax.models import generation, networks  # noqa: E402
from tpatch_jax.models.blocks import relative_bias  # noqa: E402
from tpatch_jax.models.checkpoints import folder as checkpoint  # noqa: E402
from tpatch_jax.models.families.registry import configure  # noqa: E402
from tpatch_jax.models.model import Model, load_model, save_model  # noqa: E402
from tpatch_jax.models.rows import ASK, tokens_array  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent / "reference"))
import make_references  # noqa: E402

# what torch and transformers warn about is not ours to mend
pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]

ROTATION = make_references.ROTATION
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
SPREAD = {"attention_bias": False, "mlp_bias": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
LOCAL = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}
# each variant compiles its own network: a second or two
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "plain": {},
        "every head its own key, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
        "one key for all heads": {"num_key_value_heads": 1},
        "wide heads, attention bias": {"head_dim": 16, "attention_bias": True},
        "mlp bias, linear rotation": {"mlp_bias": True, "rope_parameters": LINEAR},
        "another norm, gelu": {"rms_norm_eps": 0.1, "hidden_act": "gelu"},
    },
    "gpt2": {
        "default width, untied, relu": {"n_inner": None, "tie_word_embeddings": False, "activation_function": "relu"},
        "another norm": {"layer_norm_epsilon": 0.1},
    },
    "gpt_neo": {"local everywhere": {"attention_types": [[["local"], 3]], "window_size": 5}},
    "gptj": {"whole heads rotated, exact gelu": {"rotary_dim": 8, "activation_function": "gelu"}},
    "gpt_neox": {
        "one after the other": {"use_parallel_residual": False},
        "a quarter rotated, more heads": {
            "num_attention_heads": 4,
            "hidden_size": 32,
            "rope_parameters": {**ROTATION, "partial_rotary_factor": 0.25},
        },
        "no attention bias, tied": {"attention_bias": False, "tie_word_embeddings": True},
    },
    "mistral": {"no window": {"sliding_window": None}, "narrow heads": {"head_dim": None, "sliding_window": 3}},
    "qwen2": {"windows from the second layer on": LOCAL, "tied": {"tie_word_embeddings": True}},
    "qwen3": {"windows, bias": {**LOCAL, "attention_bias": True}, "untied": {"tie_word_embeddings": False}},
    "gemma": {
        "every head its own key": {"num_key_value_heads": 4},
        "bias, relu": {"attention_bias": True, "hidden_act": "relu"},
    },
    "gemma2": {
        "no soft caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        "wide window": {"sliding_window": 64, "query_pre_attn_scalar": 256},
    },
    "gemma3_text": {
        "default rotations": {"rope_parameters": None},
        "full attention first": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    },
    "phi3": {
        "plain rotation, more heads": {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": ROTATION,
        },
        "half rotated, window": {
            "sliding_window": 8,
            "rope_parameters": {**ROTATION, "partial_rotary_factor": 0.5},
            "tie_word_embeddings": True,
        },
    },
    "opt": {
        "gelu, untied": {"activation_function": "gelu", "tie_word_embeddings": False},
        "no biases": {"enable_bias": False},
    },
    "bert": {
        "relu, one head, another norm": {"hidden_act": "relu", "num_attention_heads": 1, "layer_norm_eps": 0.1},
        "two labels, no types": {
            "id2label": {0: "no", 1: "yes"},
            "label2id": {"no": 0, "yes": 1},
            "type_vocab_size": 1,
            "hidden_act": "gelu_new",
        },
    },
    "roberta": {
        "xlm-roberta": {"model_type": "xlm-roberta", "num_attention_heads": 2},
        "camembert, another padding token": {
            "model_type": "camembert",
            "pad_token_id": 2,
            "max_position_embeddings": 51,
            "type_vocab_size": 2,
        },
    },
    "distilbert": {"relu, one head": {"activation": "relu", "n_heads": 1}},
    "bart": {
        "scaled embeddings, silu": {"scale_embedding": True, "activation_function": "silu"},
        "untied": {"tie_word_embeddings": False},
        "one head, a deeper encoder": {
            "encoder_layers": 3,
            "decoder_layers": 1,
            "encoder_attention_heads": 1,
            "decoder_attention_heads": 1,
        },
    },
    "t5": {
        "gelu, one wide head": {"feed_forward_proj": "gelu", "num_heads": 1, "d_kv": 24},
        "as deep, the default buckets": {
            "num_decoder_layers": None,
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
        },
        "untied": {"tie_word_embeddings": False},
    },
    "t5_v1_1": {
        "tied, silu": {"tie_word_embeddings": True, "feed_forward_proj": "gated-silu"},
        "mt5": {"model_type": "mt5", "tie_word_embeddings": True},
        "mt5, untied": {"model_type": "mt5"},
    },
}
TOLERANCE = 2e-4
PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "Water boils at a temperature of",
    "def fibonacci(n):",
    "The most important thing about numbers like 1234 is",
)


def compare(config: Any, params: Any, reference: Any, table: np.ndarray, source: np.ndarray | None = None) -> None:
    """Every block, then the logits: a failure names the first layer that differs."""
    expected = run(reference, table, source)
    batch = tokens_array(table.tolist(), table.shape[1])
    if source is not None:
        read = tokens_array(source.tolist(), source.shape[1]) if source.ndim == 2 else jnp.asarray(source)
        encoder = {"embed": params["embed"], **params["encoder"]}
        agree("encoder", networks.residuals(config.encoder, encoder, read), expected, source)
        batch = networks.Pair(read, batch)
    residuals = networks.residuals(config, params, batch)
    assert len(residuals) == config.layers == len(make_references.blocks(reference))
    agree("layer", residuals, expected, table)
    found = np.asarray(networks.apply(config, params, batch))
    np.testing.assert_allclose(found, expected["logits"].numpy(), rtol=0, atol=TOLERANCE, err_msg="logits")


def agree(kind: str, streams: Any, expected: Any, tokens: np.ndarray) -> None:
    """The residual streams of one stack, but for padding."""
    assert len(streams) == sum(key.startswith(f"{kind}_") for key in expected)
    for layer, found in enumerate(streams):
        wanted = expected[f"{kind}_{layer}"].numpy()
        # residual streams of large models carry entries in the thousands, where float32 has fewer digits left
        scale = max(1.0, float(np.abs(wanted).max()) / 10)
        found = np.asarray(found) if tokens.ndim == 3 else np.where((tokens >= 0)[..., None], np.asarray(found), 0)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE * scale, err_msg=f"after {kind} {layer}")


def run(reference: Any, tokens: np.ndarray, source: np.ndarray | None = None) -> Any:
    """What torch's network says; see `make_references.run`."""
    tensors = (
        None if part is None else torch.asarray(part if part.ndim == 3 else part.astype(np.int64))
        for part in (tokens, source)
    )
    return make_references.run(reference, *tensors)


def run_again(reference: Any, expected: dict[str, np.ndarray]) -> Any:
    """What torch's network says to what a committed reference was asked."""
    if "pixel_values" in expected:
        return make_references.run_images(reference, torch.asarray(expected["pixel_values"]))
    return run(reference, expected["tokens"], expected.get("source"))


def build(name: str, **changes: Any) -> Any:
    """A family's network in torch with random weights, the same ones for all changes that keep their shapes."""
    reference = make_references.randomise(make_references.build(name, **changes), 7)
    if name == "bart":
        # An untied BART of transformers 5 has embeddings of its own in either stack; published ones share one.
        for stack in (reference.get_encoder(), reference.get_decoder()):
            stack.embed_tokens.weight = reference.get_input_embeddings().weight
    return reference


@pytest.mark.parametrize(("name", "variant"), [(name, variant) for name in VARIANTS for variant in VARIANTS[name]])
def test_a_variant_agrees(tmp_path, name, variant):
    reference = build(name, **{**(SPREAD if name == "llama" else {}), **VARIANTS[name][variant]})
    reference.save_pretrained(tmp_path / "saved")
    config, params, _ = checkpoint.read_folder(tmp_path / "saved")
    table, source = np.random.default_rng(2).integers(0, config.vocabulary, (2, 40)), None
    if config.architecture != "decoder":
        tokens, read = make_references.batch(name, reference)
        table, source = tokens.numpy(), None if read is None else read.numpy()
    compare(config, params, reference, table, source)


# families × what a reader of config.json could forget
MATTERS: dict[str, list[dict[str, Any]]] = {
    "gpt2": [{"n_head": 2}, {"activation_function": "gelu"}, {"layer_norm_epsilon": 0.01}],
    "gpt_neo": [{"window_size": 9}, {"attention_types": [[["global"], 3]]}, {"num_heads": 2}],
    "gptj": [{"rotary_dim": 2}, {"n_head": 1}],
    "gpt_neox": [
        {"use_parallel_residual": False},
        {"rope_parameters": {**ROTATION, "partial_rotary_factor": 0.25}},
        {"hidden_act": "gelu_new"},
    ],
    "llama": [{"rope_parameters": LINEAR}, {"rms_norm_eps": 0.01}],
    "mistral": [{"sliding_window": 9}, {"sliding_window": None}, {"rope_parameters": LINEAR}],
    "qwen2": [LOCAL, {"rope_parameters": LINEAR}],
    "qwen3": [LOCAL, {"rope_parameters": LINEAR}],
    "gemma": [{"rope_parameters": LINEAR}, {"hidden_act": "relu"}],
    "gemma2": [
        {"sliding_window": 9},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"query_pre_attn_scalar": 8},
        {"attn_logit_softcapping": None},
        {"final_logit_softcapping": None},
    ],
    "gemma3_text": [
        {"sliding_window": 9},
        {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
        {"query_pre_attn_scalar": 8},
        *(
            {"rope_parameters": {**make_references.SETTINGS["gemma3_text"]["rope_parameters"], kind: ROTATION}}
            for kind in ("sliding_attention", "full_attention")
        ),
    ],
    "phi3": [
        {"rope_parameters": {**make_references.SETTINGS["phi3"]["rope_parameters"], **change}}
        for change in ({"short_factor": [1.0, 1.5, 1.5]}, {"attention_factor": 1.0})
    ],
    "opt": [{"activation_function": "gelu"}, {"num_attention_heads": 2}],
    "bert": [{"num_attention_heads": 2}, {"hidden_act": "gelu_new"}, {"layer_norm_eps": 0.01}],
    "roberta": [{"num_attention_heads": 2}, {"pad_token_id": 2}, {"layer_norm_eps": 0.01}],
    "distilbert": [{"n_heads": 2}, {"activation": "relu"}],
    "bart": [
        {"scale_embedding": True},
        {"encoder_attention_heads": 2},
        {"decoder_attention_heads": 4},
        {"activation_function": "gelu_new"},
    ],
    "t5": [
        {"relative_attention_max_distance": 14},
        {"feed_forward_proj": "gelu"},
        {"layer_norm_epsilon": 0.01},
        {"scale_decoder_outputs": False},
    ],
    "t5_v1_1": [{"feed_forward_proj": "gated-relu"}, {"scale_decoder_outputs": True}],
}


@pytest.mark.parametrize("name", sorted(MATTERS))
def test_what_config_json_says_matters(name):
    """The comparisons can fail: the same weights under any other setting are beyond the tolerance, most of them far.

    (The two kinds of GELU are the nearest to each other: four times the tolerance.)
    """
    batch = [expectations(name).get(part) for part in ("tokens", "source")]
    base = run(build(name), *batch)["logits"]
    for change in MATTERS[name]:
        other = run(build(name, **change), *batch)["logits"]
        assert float((base - other).abs().max()) > 3 * TOLERANCE, (name, change)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_shards_as_transformers_writes_them(tmp_path, name):
    reference = build(name)
    reference.save_pretrained(tmp_path / "saved", max_shard_size="10KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    config, params, _ = checkpoint.read_folder(tmp_path / "saved")
    compare(config, params, reference, np.arange(32).reshape(2, 16))


def expectations(name: str) -> dict[str, np.ndarray]:
    return load_file(Path(make_references.__file__).parent / f"{name}_expected.safetensors")


@pytest.mark.parametrize("name", sorted(make_references.SETTINGS))
def test_the_committed_references_are_what_the_script_makes(name):
    expected = expectations(name)
    reference = make_references.randomise(make_references.build(name), 0)
    found = run_again(reference, expected)
    assert set(found) == set(expected) - {"tokens", "source", "pixel_values"}
    for key, wanted in expected.items():
        if key in found:
            np.testing.assert_allclose(found[key].numpy(), wanted, rtol=0, atol=1e-4, err_msg=f"{name}, {key}")


@pytest.mark.parametrize("name", sorted(make_references.SETTINGS))
def test_transformers_reads_what_we_write(tmp_path, name):
    config, params, settings = checkpoint.read_folder(Path(make_references.__file__).parent / name)
    save_model(Model(config, params, None, name, None, settings), tmp_path / "ours")
    reference = make_references.kind(name).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    expected = expectations(name)
    found = run_again(reference, expected)["logits"]
    np.testing.assert_allclose(found.numpy(), expected["logits"], rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20), (64, 256), (20, 1000)])
@pytest.mark.parametrize("causal", [False, True])
def test_every_distance_is_in_its_bucket(buckets, furthest, causal):
    """Where a bucket begins the last digit of a logarithm decides: in an encoder's at distances 16, 32 and 64."""
    from transformers.models.t5.modeling_t5 import T5Attention

    changes = {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": furthest}
    config = configure({"layer_norm_epsilon": 1e-6, "model_type": "t5", **make_references.T5, **changes})
    config, ends = config if causal else config.encoder, np.asarray([[0, 1199]])
    ahead = torch.arange(1200)[None] - torch.asarray(ends.T)
    wanted = T5Attention._relative_position_bucket(ahead, not causal, buckets, furthest)
    found = relative_bias(config, jnp.arange(buckets)[:, None], jnp.asarray(ends), 1200)
    assert len(np.unique(wanted)) == (buckets if causal else buckets - 1)
    np.testing.assert_array_equal(found[0, 0], wanted)


@pytest.mark.parametrize("name", ["bart", "t5", "t5_v1_1"])
def test_an_encoder_decoder_writes_the_same_text(tmp_path, name):
    """Sources of different lengths in one batch. (With stacks of different depths transformers has no cache for T5.)"""
    reference = build(name)
    reference.save_pretrained(tmp_path / "saved")
    config, params, settings = checkpoint.read_folder(tmp_path / "saved")
    rng, begin = np.random.default_rng(3), [settings["decoder_start_token_id"]]
    sources = [rng.integers(3, 64, length).tolist() for length in (19, 4, 11)]
    found = generation.greedy(config, params, [[*source, ASK, *begin] for source in sources], 12)
    table = np.asarray(tokens_array(sources, 19, ASK))
    theirs = reference.generate(
        torch.asarray(np.where(table < 0, reference.config.pad_token_id, table)),
        attention_mask=torch.asarray(table >= 0),
        max_new_tokens=12,
        do_sample=False,
        num_beams=1,
        eos_token_id=None,
        use_cache=False,
    )
    assert [[*begin, *row] for row in found] == theirs.tolist()
    # networks that say one thing whatever they read would prove nothing
    assert len({tuple(row) for row in found}) == 3
    assert len({token for row in found for token in row}) > 3


@pytest.fixture(scope="module")
def real():
    model = load_model("smollm2-135m", dtype="float32")
    return model, transformers.LlamaForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()


@pytest.mark.real_model
def test_the_real_model_agrees(real):
    model, reference = real
    text = "The quick brown fox jumps over the lazy dog. In 1969, Neil Armstrong walked on the Moon; def f(x): return x"
    ids = model.encode(text)
    compare(model.config, model.params, reference, np.asarray([ids]))


@pytest.mark.real_model
def test_the_real_model_writes_the_same_text(real):
    model, reference = real
    rows = [model.encode(prompt) for prompt in PROMPTS]
    found = generation.greedy(model.config, model.params, rows, 64)
    for row, ours in zip(rows, found, strict=True):
        # What torch would write, too, is what it holds likeliest behind each beginning of it.
        with torch.inference_mode():
            logits = reference(torch.asarray([[*row, *ours[:-1]]])).logits[0]
        assert logits[len(row) - 1 :].argmax(-1).tolist() == ours
