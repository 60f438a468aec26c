"""What `tpatch models --check` says of a folder: what it is, what is read of it, and what is refused and why."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import bits
from safetensors.numpy import load_file, save_file

from tpatch_jax.cli import main as cli
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.checkpoints import folder as checkpoint
from tpatch_jax.models.checkpoints.check import check_folder

FOLDER = Path(__file__).parent / "reference"


@pytest.fixture(autouse=True)
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight is looked at."""

    def fail(*_: object) -> bool:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(checkpoint, "_alike", fail)


def copy(name: str, folder: Path, **changes: Any) -> Path:
    """A reference's folder with other settings."""
    shutil.copytree(FOLDER / name, folder)
    settings = json.loads((folder / "config.json").read_text("utf-8")) | changes
    (folder / "config.json").write_text(json.dumps(settings), "utf-8")
    return folder


def test_what_can_be_read_is_described():
    result = check_folder(FOLDER / "cohere2")
    assert (result["model_type"], result["family"], result["architecture"]) == ("cohere2", "cohere2", "decoder")
    assert (result["export"], result["problems"]) == ("approximate only", [])
    sizes = {"layers": 3, "hidden_size": 16, "ffn_width": 24, "heads": 4, "key_value_heads": 2, "context": 48}
    assert result["sizes"] == {**sizes, "vocabulary": 64, "tied": True, "labels": []}
    tensors = load_file(FOLDER / "cohere2" / "model.safetensors")
    assert result["weights"] == {
        "files": 1,
        "tensors": len(tensors),
        "parameters": sum(tensor.size for tensor in tensors.values()),
        "types": {"F32": len(tensors)},
        "left_out": [],
    }
    assert check_folder(FOLDER / "modernbert")["sizes"]["labels"] == ["no", "yes", "maybe"]


def test_settings_alone_are_judged(tmp_path):
    (tmp_path / "config.json").write_bytes((FOLDER / "granite" / "config.json").read_bytes())
    result = check_folder(tmp_path)
    assert (result["family"], result["weights"], result["problems"]) == ("granite", None, [])


def test_copies_and_constants_are_left_out_and_types_counted(tmp_path):
    folder = copy("marian", tmp_path / "model")
    tensors: dict[str, np.ndarray] = load_file(folder / "model.safetensors")
    more = {f"model.{side}.embed_tokens.weight": tensors["model.shared.weight"] for side in ("encoder", "decoder")}
    more |= {"lm_head.weight": tensors["model.shared.weight"]}
    more["model.encoder.embed_positions.weight"] = np.ones((48, 16), np.float32)
    half = {name: tensor.astype(np.float16) for name, tensor in tensors.items() if "decoder" in name}
    (folder / "model.safetensors").unlink()
    save_file(tensors | more | half, folder / "all.safetensors")
    weights = check_folder(folder)["weights"]
    assert weights["left_out"] == sorted(more)
    assert weights["types"] == {"F16": len(half), "F32": len(tensors) - len(half)}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("stablelm", {"qk_layernorm": True}, "asks for 'qk_layernorm'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1.0, "factor": 2.0}}, "type 'dynamic'"),
        ("qwen3", {"quantization_config": {"quant_method": "awq"}}, r"is quantised \(awq\)"),
        ("olmo2", {"intermediate_size": 48}, r"has shape .* config\.json implies"),
        ("olmo2", {"num_hidden_layers": 2}, r"model\.layers\.2\.\S+ is not part of a olmo2 model"),
        ("olmo2", {"num_hidden_layers": 4}, r"model\.layers\.3\.\S+ is missing"),
        ("llama", {"model_type": "phimoe"}, "; phimoe is not: its feed-forward networks are other mixtures of experts"),
        ("olmoe", {"num_experts": 6}, r"model\.layers\.0\.mlp\.experts\.5\.\w+_proj\.weight is missing"),
        ("llama", {"model_type": "jamba"}, "; jamba is not: some of its layers are recurrent"),
        ("llama", {"model_type": "gemma3"}, "; gemma3 is not: it reads images as well"),
        ("llama", {"model_type": "minicpm3"}, "compressed keys and values"),
        ("llama", {"model_type": "albert"}, "all its layers share one feed-forward network"),
        (
            "llama",
            {"model_type": "new", "n_routed_experts": 8},
            "; new is not: its feed-forward networks are other mixtures",
        ),
        ("llama", {"model_type": "new", "num_experts": 1}, "'new'; supported are bart, bert"),
        (
            "llama",
            {"model_type": "new", "kv_lora_rank": 4},
            "; new is not: .*latent attention.*, which is not run here",
        ),
        ("llama", {"model_type": "new", "layer_types": ["mamba", "attention"]}, "; new is not: some .* are recurrent"),
        ("llama", {"model_type": "new", "ssm_state_size": 4}, "recurrent.*; edit a model whose layers all attend"),
        ("llama", {"model_type": "new", "vision_config": {"a": 1}}, "; new is not: it reads images as well"),
        (
            "llama",
            {"model_type": "new", "text_config": {"num_experts": 2}, "vision_config": {"a": 1}},
            "experts and it re",
        ),
        ("llama", {"model_type": "new", "audio_config": {"a": 1}}, "; new is not: it reads or says speech"),
        ("llama", {"model_type": "new", "index_topk": 4}, "picks the tokens that it sees by an index"),
        ("llama", {"model_type": "new", "alibi": True}, "; new is not: its attention scores fall with distance"),
        ("llama", {"model_type": "new", "auto_map": {"AutoConfig": "a.B"}}, "brings it as Python code"),
        ("llama", {"model_type": "phi", "auto_map": {"AutoConfig": "a.B"}}, "'phi'; supported are bart, bert"),
        (
            "llama",
            {"model_type": "llava", "text_config": {"model_type": "mamba"}},
            "text part of this llava is not read:",
        ),
        ("qwen3", {"quantization_config": {"quant_algo": "NVFP4"}}, r"is quantised \(NVFP4\)"),
        ("llama", {"model_type": "no such thing"}, "'no such thing'; supported are bart, bert"),
    ],
)
def test_what_is_refused_and_why(name, changes, words, tmp_path, capsys):
    folder = copy(name, tmp_path / "model", **changes)
    assert cli.main(["models", "--check", str(folder), "--json"]) == 1
    said = capsys.readouterr()
    found = json.loads(said.out.splitlines()[-1])
    assert found["readable"] is False
    assert found["model_type"] == changes.get("model_type", name)
    with pytest.raises(TPatchError, match=words):
        raise TPatchError(found["problems"][0])
    assert said.err.startswith(f"tpatch: {folder} cannot be read: {found['problems'][0]}")
    # what is said here is what reading says
    with pytest.raises(TPatchError, match=words):
        checkpoint.read_folder(folder)


def test_quantisation_that_another_file_tells(tmp_path):
    (tmp_path / "config.json").write_bytes((FOLDER / "llama" / "config.json").read_bytes())
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}', "utf-8")
    assert "is quantised (FP8), and patches need" in check_folder(tmp_path)["problems"][0]
    (tmp_path / "hf_quant_config.json").write_text("[]", "utf-8")
    assert check_folder(tmp_path)["problems"] == []


@pytest.mark.parametrize(
    ("name", "named", "words"),
    [
        ("roberta", "RobertaForMaskedLM", "RobertaForMaskedLM, an encoder without a classification head; train one"),
        ("bert", "BertModel", "BertModel, an encoder without a classification head; train one with `tpatch finetune`"),
        ("vit", "ViTModel", "ViTModel, an encoder without"),
        ("llama", "LlamaForSequenceClassification", "whose head does not say the next token"),
        ("t5", "T5EncoderModel", "whose head does not say the next token"),
        ("roberta", "RobertaForSequenceClassification", ""),
        ("vit", "ViTForImageClassification", ""),
        ("llama", "LlamaModel", ""),
        ("marian", "MarianMTModel", ""),
    ],
)
def test_settings_alone_tell_the_head_by_its_class(name, named, words, tmp_path):
    settings = json.loads((FOLDER / name / "config.json").read_text("utf-8")) | {"architectures": [named]}
    (tmp_path / "config.json").write_text(json.dumps(settings), "utf-8")
    problems = check_folder(tmp_path)["problems"]
    assert len(problems) == bool(words)
    assert all(words in problem for problem in problems)


def test_labels_that_share_a_name_are_told_apart_by_their_numbers(tmp_path):
    labels = {"id2label": {"0": "crane", "1": "dog", "2": "crane"}, "label2id": {"crane": 2, "dog": 1}}
    result = check_folder(copy("vit", tmp_path / "model", **labels))
    assert (result["problems"], result["sizes"]["labels"]) == ([], ["crane (0)", "dog", "crane (2)"])


@pytest.mark.parametrize(
    ("name", "whole", "first", "head"),
    [
        ("gemma3_text", {"model_type": "gemma3", "tie_word_embeddings": True}, "language_model.model.", ""),
        ("qwen3", {"model_type": "qwen3_vl"}, "model.language_model.", "lm_head."),
        ("llama", {"model_type": "llava"}, "language_model.model.", "language_model.lm_head."),
        ("mistral", {"model_type": "mistral3"}, "model.language_model.", "lm_head."),
    ],
)
def test_the_text_part_of_a_network_that_reads_images(name, whole, first, head, tmp_path, monkeypatch):
    settings = json.loads((FOLDER / name / "config.json").read_text("utf-8"))
    inner = settings | ({"model_type": "qwen3_vl_text"} if name == "qwen3" else {})
    tensors = load_file(FOLDER / name / "model.safetensors")
    for key in list(tensors):
        new = key.replace("model.", first, 1) if key.startswith("model.") else key.replace("lm_head.", head)
        tensors[new] = tensors.pop(key)
    seen = {"model.visual.blocks.0.mlp.weight": np.ones((2, 3), np.float32), "multi_modal_projector.bias": np.ones(2)}
    vision = {"model_type": "siglip_vision_model"} if name == "gemma3_text" else {}
    whole = {"tie_word_embeddings": bool(settings.get("tie_word_embeddings")), **whole}
    (tmp_path / "config.json").write_text(json.dumps({**whole, "text_config": inner, "vision_config": vision}), "utf-8")
    save_file(tensors | seen, tmp_path / "model.safetensors")
    result = check_folder(tmp_path)
    assert (result["problems"], result["text_of"]) == ([], whole["model_type"])
    assert result["family"] == check_folder(FOLDER / name)["family"]
    assert result["weights"]["left_out"] == sorted(seen)
    monkeypatch.undo()
    config, params, known = checkpoint.read_folder(tmp_path)
    expected, same, _ = checkpoint.read_folder(FOLDER / name)
    assert config == expected
    assert bits(params) == bits(same)
    checkpoint.write_folder(tmp_path / "alone", config, params, known)
    assert check_folder(tmp_path / "alone")["text_of"] is None
    assert bits(checkpoint.read_folder(tmp_path / "alone")[1]) == bits(same)


def test_a_folder_that_is_none(tmp_path, capsys):
    assert cli.main(["models", "--check", str(tmp_path / "none")]) == 1
    assert "is no folder; --check takes a model's folder" in capsys.readouterr().err
    assert check_folder(tmp_path)["problems"][0].endswith("a model is a folder with config.json and safetensors")
    (tmp_path / "config.json").write_bytes((FOLDER / "llama" / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin is a pickle, which is never read" in check_folder(tmp_path)["problems"][0]


def test_the_table_says_the_same(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["models", "--check", str(FOLDER / "mbart"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["readable"] is True
    assert cli.main(["models", "--check", str(FOLDER / "mbart")]) == 0
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in capsys.readouterr().out.splitlines()]
    for row in (["read as", "mbart"], ["kind", "encoder-decoder"], ["ffn width", "24"], ["left out", "nothing"]):
        assert row in rows
