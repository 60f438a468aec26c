"""Loading: memory never holds a model twice, and with a mesh every device gets its own part only."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import pytest
import transformers
from conftest import make_tiny_model, write_tiny_folder
from jax.sharding import PartitionSpec
from safetensors.numpy import save_file

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.fingerprint import tokenizer_fingerprint
from tpatch_jax.models.model import load_model
from tpatch_jax.models.sharding import spec
from tpatch_jax.models.tokenizer import same_tokenizer

MEASURE = """
import json, sys, threading, time
import jax
from tpatch_jax.models.checkpoints import folder as checkpoint
from pathlib import Path

resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
folder, dtype = Path(sys.argv[1]), sys.argv[2]
jax.numpy.zeros(8).block_until_ready()
checkpoint.read_settings(folder)
before, peak, going = resident(), 0, True

def watch():
    global peak
    while going:
        peak = max(peak, resident())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
_, params, _ = checkpoint.read_folder(folder, dtype)
jax.block_until_ready(params)
going = False
watcher.join()
print(json.dumps({"share": (peak - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(params))}))
"""

SHARDED = """
import json, sys
import jax
import numpy as np
from tpatch_jax.models.model import load_model
from tpatch_jax.models.rows import tokens_array

mesh = jax.make_mesh((2, 4), ("data", "model"))
one, many = load_model(sys.argv[1]), load_model(sys.argv[1], mesh=mesh)
tokens = tokens_array([[5, 6, 7, 8]], 8)
found = {
    "same": all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params))),
    "close": float(abs(np.asarray(one.apply(tokens)) - np.asarray(many.apply(tokens))).max()),
    "up": [part.data.shape for part in many.params["layers"][0]["ffn"]["up"]["kernel"].addressable_shards],
    "norm": [part.data.shape for part in many.params["norm"]["scale"].addressable_shards],
}
print(json.dumps(found))
"""


def run(script: str, *arguments: str, **environment: str) -> Any:
    finished = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.real_model
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_needs_little_more_than_the_parameters(dtype):
    folder = load_model("smollm2-135m").folder
    assert 0.9 < run(MEASURE, str(folder), dtype)["share"] <= 1.15


def test_every_device_gets_its_part(tiny_folder, tmp_path):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    found = run(SHARDED, str(tiny_folder(tmp_path)), XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    assert found["same"]
    assert found["close"] < 1e-5
    assert found["up"] == [[16, 8]] * 8
    assert found["norm"] == [[16]] * 8


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("layers.0.ffn.up.kernel", (16, 32), PartitionSpec(None, "model")),
        ("layers.0.ffn.up.bias", (32,), PartitionSpec("model")),
        ("layers.0.ffn.down.kernel", (32, 16), PartitionSpec("model", None)),
        ("layers.0.ffn.down.bias", (16,), PartitionSpec()),
        ("layers.0.attention.output.kernel", (16, 16), PartitionSpec("model", None)),
        ("embed.embedding", (300, 16), PartitionSpec("model", None)),
        ("layers.0.norm_1.scale", (16,), PartitionSpec()),
    ],
)
def test_what_is_split_and_how(path, shape, expected):
    mesh = jax.sharding.AbstractMesh((1,), ("model",))
    assert spec(path, shape, mesh) == expected  # pyright: ignore[reportArgumentType]


def test_what_the_axis_does_not_divide_is_repeated():
    mesh = jax.sharding.AbstractMesh((3,), ("model",))
    assert spec("layers.0.ffn.up.kernel", (16, 32), mesh) == PartitionSpec()  # pyright: ignore[reportArgumentType]
    other = jax.sharding.AbstractMesh((2,), ("data",))
    assert spec("layers.0.ffn.up.kernel", (16, 32), other) == PartitionSpec()  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_a_quantised_checkpoint_says_what_to_do(tmp_path, method):
    folder = write_tiny_folder(make_tiny_model(), tmp_path / "tiny")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": method}}))
    with pytest.raises(TPatchError, match=rf"is quantised \({method}\).*fetch the unquantised model"):
        load_model(folder)


def test_a_start_token_begins_prompts_and_not_targets(tmp_path):
    from tokenizers.processors import TemplateProcessing

    folder: Path = write_tiny_folder(make_tiny_model(), tmp_path / "tiny")
    model = load_model(folder)
    assert model.start == ()
    assert model.encode_prompt("the cat") == model.encode("the cat")
    backend = model.tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    model.tokenizer.save_pretrained(folder)
    model = load_model(folder)
    assert model.start == (0,)
    assert model.encode_prompt("the cat") == [0, *model.encode("the cat")]
    assert model.encode_target("the cat", " in") == model.encode(" in")


def test_a_model_without_a_head_says_so_by_its_names(tmp_path):
    """A checkpoint of the bare network leaves out the first part of every name."""
    from safetensors.numpy import load_file

    model = make_tiny_model(1, tie_word_embeddings=True)
    folder = write_tiny_folder(model, tmp_path / "tiny")
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    found = load_model(folder)
    chex.assert_trees_all_equal(model.params, found.params)


def test_how_texts_are_cut_at_a_call_is_no_other_tokenizer(tiny_model):
    before = tokenizer_fingerprint(tiny_model)
    other = copy.deepcopy(tiny_model.tokenizer)
    other(["the cat sat in"], truncation=True, max_length=4)
    assert tokenizer_fingerprint(dataclasses.replace(tiny_model, tokenizer=other)) == before
    other.add_tokens(["<new>"])
    assert tokenizer_fingerprint(dataclasses.replace(tiny_model, tokenizer=other)) != before


def test_a_converted_folder_s_tokenizer_is_read_directly_and_is_what_transformers_finds(
    tmp_path, tiny_folder, monkeypatch
):
    folder = tiny_folder(tmp_path)
    told = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(told | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    stock = transformers.AutoTokenizer.from_pretrained(folder)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *given, **named: pytest.fail("asked"))
    (folder / "tpatch_source.json").write_text("{}")
    assert same_tokenizer(load_model(folder).tokenizer, stock)
    (folder / "tpatch_source.json").unlink()
    with pytest.raises(pytest.fail.Exception, match="asked"):
        load_model(folder)
