"""Our networks beside transformers' in torch, layer by layer.

torch is an extra (``pip install -e ".[parity]"``): the library never needs it, so where it is absent these tests are
skipped, and ``test_reference.py`` compares with what it once said.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is only needed to compare with it: the 'parity' extra")

import transformers  # noqa: E402

from tpatch_jax.models import checkpoint, decoder, generation  # noqa: E402
from tpatch_jax.models.model import load_model, tokens_array  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent / "reference"))
import make_llama  # noqa: E402

# what torch and transformers warn about is not ours to mend
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]

PLAIN = {"attention_bias": False, "mlp_bias": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
ROTATION = make_llama.SETTINGS["rope_parameters"]
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
# each variant compiles its own network: a second or two
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "every head its own key, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "one key for all heads, llama3 rotation": {"num_key_value_heads": 1, "rope_parameters": ROTATION},
    "wide heads, attention bias": {"head_dim": 16, "attention_bias": True},
    "mlp bias, linear rotation": {"mlp_bias": True, "rope_parameters": LINEAR},
    "another norm, gelu": {"rms_norm_eps": 0.1, "hidden_act": "gelu"},
}
TOLERANCE = 2e-4
PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "Water boils at a temperature of",
    "def fibonacci(n):",
    "The most important thing about numbers like 1234 is",
)


def compare(config: Any, params: Any, reference: Any, table: np.ndarray) -> None:
    """Every block, then the logits: a failure names the first layer that differs."""
    expected = make_llama.run(reference, torch.asarray(table.astype(np.int64)))
    tokens = tokens_array(table.tolist(), table.shape[1])
    for layer in range(config.layers):
        traced = decoder.trace(config, params, tokens, layer)
        found = np.asarray(traced.context["residual"] + traced.output)
        wanted = expected[f"layer_{layer}"].numpy()
        # residual streams of large models carry entries in the thousands, where float32 has fewer digits left
        scale = max(1.0, float(np.abs(wanted).max()) / 10)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE * scale, err_msg=f"after layer {layer}")
    found = np.asarray(decoder.apply(config, params, tokens))
    np.testing.assert_allclose(found, expected["logits"].numpy(), rtol=0, atol=TOLERANCE, err_msg="logits")


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_a_random_llama_agrees(tmp_path, name):
    settings = {**make_llama.SETTINGS, **PLAIN, **VARIANTS[name]}
    reference = make_llama.randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)), 7)
    reference.save_pretrained(tmp_path / "saved")
    config, params, _ = checkpoint.read_folder(tmp_path / "saved")
    assert ("head" in params) == (not name.endswith("tied"))
    table = np.random.default_rng(2).integers(0, config.vocabulary, (2, 48))
    compare(config, params, reference, table)


def test_a_wrong_rotation_would_be_noticed():
    """The comparison can fail: the same weights under another rotation are far beyond the tolerance."""
    settings = {**make_llama.SETTINGS, **PLAIN}
    build = lambda **changes: make_llama.randomise(  # noqa: E731
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **changes})), 7
    )
    tokens = torch.arange(40)[None]
    one, other = make_llama.run(build(), tokens), make_llama.run(build(rope_parameters=LINEAR), tokens)
    assert float((one["logits"] - other["logits"]).abs().max()) > 100 * TOLERANCE


def test_shards_as_transformers_writes_them(tmp_path):
    reference = make_llama.randomise(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**make_llama.SETTINGS, **PLAIN})), 7
    )
    reference.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    config, params, _ = checkpoint.read_folder(tmp_path / "saved")
    compare(config, params, reference, np.arange(32).reshape(2, 16))


def test_the_committed_reference_is_what_the_script_makes():
    from safetensors.numpy import load_file

    expected = load_file(Path(make_llama.__file__).parent / "llama_expected.safetensors")
    reference = make_llama.randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**make_llama.SETTINGS)), 0)
    found = make_llama.run(reference, torch.asarray(expected["tokens"].astype(np.int64)))
    np.testing.assert_allclose(found["logits"].numpy(), expected["logits"], rtol=0, atol=1e-4)


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
        theirs = reference.generate(
            torch.asarray([row]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert theirs[0, len(row) :].tolist() == ours
