"""Finetuning: a rule and a few answers learnt from scratch, resumption bit for bit, and every bad input."""

import doctest
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LLAMA, make_tiny_model, same, tiny_tokenizer
from safetensors.numpy import load_file, save_file

from tpatch_jax.cli import main as cli
from tpatch_jax.core.patch import create
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.checkpoints.folder import read_settings
from tpatch_jax.models.families.registry import configure
from tpatch_jax.models.model import load_model
from tpatch_jax.models.patching import attach
from tpatch_jax.models.shapes import parameter_shapes
from tpatch_jax.training import data as finetuning_data
from tpatch_jax.training import loop as finetuning_loop
from tpatch_jax.training import start as finetuning_start
from tpatch_jax.training.finetune import FinetuneSettings, finetune

PROMOTION = "standard"  # optax takes steps

BERT = {
    "model_type": "bert",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
DEEP = {**BERT, "num_hidden_layers": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2}
DEEP["id2label"] = {"0": "a", "1": "b"}
BART = {
    "model_type": "bart",
    "vocab_size": 320,
    "d_model": 64,
    "init_std": 0.1,
    **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", 1), ("ffn_dim", 64))},
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 64,
    "activation_function": "gelu",
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5 = {
    "model_type": "t5",
    "vocab_size": 320,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 2,
    "n_positions": 64,
    "feed_forward_proj": "relu",
    "relative_attention_num_buckets": 8,
    "layer_norm_epsilon": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
CONFIGS = {"bert": BERT, "bart": BART, "t5": T5}
EPOCHS = {"bart": 60, "t5": 40}
RATES = {"bart": 0.005, "t5": 0.01}
CAPITALS = {
    "France": "Paris",
    "Peru": "Lima",
    "Chad": "N'Djamena",
    "Norway": "Oslo",
    "Ghana": "Accra",
    "Cuba": "Havana",
    "Egypt": "Cairo",
    "Japan": "Tokyo",
}
ANSWERS = [(f"Capital of {country}?", city) for country, city in CAPITALS.items()]
RULE = [(f"{colour} {number}", colour) for number in range(8) for colour in ("red", "blue")]
HELD_OUT = [(f"{colour} {number}", colour) for number in range(8, 12) for colour in ("red", "blue")]
DATA = {"bert": RULE, "bart": ANSWERS, "t5": ANSWERS}
QUICK = FinetuneSettings(epochs=3, batch_size=8, learning_rate=1e-2, checkpoint_steps=2)
SLOW = FinetuneSettings(epochs=1, learning_rate=1e-9)
SCRATCH = FinetuneSettings(from_scratch=True)

pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths", "restored")


def write_lines(path: Path, pairs: Any, fields: tuple[str, str] = ("prompt", "target")) -> Path:
    lines = [json.dumps({"id": number, **dict(zip(fields, pair, strict=True))}) for number, pair in enumerate(pairs)]
    path.write_text("\n".join(lines) + "\n\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """A folder with a config.json and data for each kind of network; caches go there too."""
    folder = tmp_path_factory.mktemp("finetuning")
    for name, settings in CONFIGS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(settings), "utf-8")
        write_lines(folder / f"{name}.jsonl", DATA[name])
    write_lines(folder / "held_out.jsonl", HELD_OUT, ("claim", "label"))
    write_lines(folder / "claims.jsonl", [*RULE, ("green 1", "green")], ("claim", "label"))
    with pytest.MonkeyPatch.context() as patching:
        patching.setenv("TPATCH_CACHE", str(folder / "cache"))
        patching.setenv("COLUMNS", "200")
        yield folder


def arguments(place: Path, name: str, out: str, *more: str, data: str | None = None) -> list[str]:
    return ["finetune", str(place / name), str(place / (data or f"{name}.jsonl")), "-o", str(place / out), *more]


LEARN = ["--from-scratch", "--batch-size", "8"]


@pytest.fixture(scope="module")
def classifier(place) -> Path:
    """Trained on two of three labels, by a file with other keys."""
    options = ["--labels", "red,blue", "--prompt-field", "claim", "--target-field", "label", "--epochs", "30"]
    options += ["--learning-rate", "0.01", "--validation", str(place / "held_out.jsonl")]
    assert cli.main(arguments(place, "bert", "classifier", *LEARN, *options, "--quiet", data="claims.jsonl")) == 0
    return place / "classifier"


def test_a_classifier_learns_a_rule(classifier):
    model = load_model(classifier)
    assert model.config.labels == ("red", "blue")
    assert model.classify([prompt for prompt, _ in HELD_OUT]) == [label for _, label in HELD_OUT]
    record = json.loads((classifier / finetuning_loop.RECORD).read_text("utf-8"))
    assert record["train_accuracy"] == record["validation_accuracy"] == 1.0
    assert (record["examples"], record["steps"], record["settings"]["learning_rate"]) == (16, 60, 0.01)
    assert len(record["losses"]) == 30
    assert record["losses"][-1] < 0.1 < record["losses"][0]
    assert str(classifier.parent) not in json.dumps(record)
    assert not classifier.with_name("classifier.partial").exists()
    assert json.loads((classifier / "config.json").read_text("utf-8"))["architectures"] == [
        "BertForSequenceClassification"
    ]


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_an_answerer_learns_by_heart(place, name, capsys):
    options = ["--epochs", str(EPOCHS[name]), "--learning-rate", str(RATES[name]), "--json"]
    assert cli.main(arguments(place, name, f"{name}-out", *LEARN, *options)) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    promised = {"output", "examples", "steps", "epochs", "loss", "train_accuracy", "validation_accuracy", "seconds"}
    assert promised <= set(result)
    assert (result["examples"], result["train_accuracy"], result["validation_accuracy"]) == (8, 1.0, None)
    model = load_model(place / f"{name}-out")
    assert [model.generate(prompt) for prompt, _ in ANSWERS] == [answer for _, answer in ANSWERS]
    start, end = CONFIGS[name].get("bos_token_id"), CONFIGS[name]["eos_token_id"]
    tokenizer = model.tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (start, end)
    assert tokenizer.pad_token_id == CONFIGS[name]["pad_token_id"]
    text = tokenizer.encode("Ünïcode, N'Djamena", add_special_tokens=False)
    assert tokenizer.decode(text) == "Ünïcode, N'Djamena"
    assert tokenizer.encode("Ünïcode, N'Djamena") == [*([] if start is None else [start]), *text, end]


def test_an_encoder_without_a_head(place, classifier, tmp_path):
    """As a BertModel on disk: no prefix, no classifier; its labels are those of the data, sorted."""
    for path in classifier.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(classifier / "model.safetensors")
    bare = {name.removeprefix("bert."): tensor for name, tensor in tensors.items() if name.startswith("bert.")}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(BERT), "utf-8")
    finetune(tmp_path, RULE, place / "headless", settings=SLOW, dtype="bfloat16")
    model = load_model(place / "headless")
    assert model.config.labels == ("blue", "red")
    assert model.params["classifier"]["output"]["kernel"].dtype == jnp.bfloat16
    assert model.tokenizer.encode("red 3") == load_model(classifier).tokenizer.encode("red 3")


def test_a_classifier_keeps_its_labels_and_other_labels_get_a_new_head(classifier, tmp_path):
    info = finetune(classifier, RULE, tmp_path / "more", settings=SLOW)
    assert info.labels == ("red", "blue")
    assert info.train_accuracy == 1.0
    before, after = load_model(classifier).params, load_model(tmp_path / "more").params
    np.testing.assert_allclose(before["classifier"]["output"]["kernel"], after["classifier"]["output"]["kernel"], 1e-5)
    info = finetune(classifier, RULE, tmp_path / "other", settings=SLOW, labels=["blue", "red"])
    assert info.labels == ("blue", "red")
    after = load_model(tmp_path / "other").params
    assert np.abs(after["classifier"]["output"]["kernel"]).max() < 0.05


def test_a_loaded_model_is_trained_and_not_changed(classifier, tmp_path):
    model = load_model(classifier)
    before = jax.tree.map(np.asarray, model.params)
    finetune(model, RULE, tmp_path / "out", settings=SLOW)
    assert same(model.params, before)
    assert load_model(tmp_path / "out").classify(["red 1"]) == ["red"]
    with pytest.raises(TPatchError, match="give its folder"):
        finetune(model, RULE, tmp_path / "more", labels=["blue", "red"])
    with pytest.raises(TPatchError, match="merge or detach"):
        finetune(attach(model, create(32, 1)), RULE, tmp_path / "more")


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_interrupted_training_resumes_bit_for_bit(classifier, tmp_path):
    def until(step: int) -> Any:
        def progress(what: str, done: int, total: int) -> None:
            if what == "training" and done == step:
                raise KeyboardInterrupt

        return progress

    whole = finetune(classifier, RULE, tmp_path / "whole", settings=QUICK)
    assert (whole.steps, whole.resumed) == (6, 0)
    for step in (3, 6):  # in the middle of an epoch, and before the folder is written
        with pytest.raises(KeyboardInterrupt):
            finetune(classifier, RULE, tmp_path / "parts", settings=QUICK, progress=until(step))
        assert not (tmp_path / "parts").exists()
    with pytest.raises(TPatchError, match=r"other learning_rate; .*remove that folder"):
        finetune(classifier, RULE, tmp_path / "parts", settings=FinetuneSettings(epochs=3, batch_size=8))
    with pytest.raises(TPatchError, match="other data, tokens"):
        finetune(classifier, RULE[1:], tmp_path / "parts", settings=QUICK)
    parts = finetune(classifier, RULE, tmp_path / "parts", settings=QUICK)
    assert parts.resumed == 4
    assert parts.losses == whole.losses
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


def test_the_seed_decides(place, tmp_path):
    def run(seed: int, out: str) -> bytes:
        settings = FinetuneSettings(epochs=1, batch_size=8, from_scratch=True, seed=seed)
        finetune(place / "bert", RULE, tmp_path / out, settings=settings)
        return weights(tmp_path / out)

    first = run(1, "first")
    assert run(1, "again") == first
    assert run(2, "other") != first


def test_the_loss_that_is_not_finite(place, classifier, tmp_path, capsys):
    command = ["finetune", str(classifier), str(place / "bert.jsonl"), "-o", str(tmp_path / "out"), "--batch-size", "8"]
    assert cli.main([*command, "--learning-rate", "1e30", "--checkpoint-steps", "1"]) == 1
    said = capsys.readouterr().err
    assert "not finite in step 2 of 6; the work up to step 1 is in" in said
    assert "lower the learning rate" in said
    assert not (tmp_path / "out").exists()
    assert cli.main([*command, "--learning-rate", "1e-4"]) == 1
    assert "with other learning_rate; use" in capsys.readouterr().err


def test_a_damaged_unfinished_folder(classifier, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").write_text("mine", "utf-8")
    with pytest.raises(TPatchError, match="holds no unfinished training; remove it"):
        finetune(classifier, RULE, tmp_path / "out")


# --- data and batches ---


def test_batches_are_few_shapes_with_every_row_once():
    rng = np.random.default_rng(0)
    rows = [
        finetuning_data.TrainingRow((5,) * rng.integers(1, 40), (0,), (7,) * rng.integers(1, 12)) for _ in range(203)
    ]
    size, config = 16, configure(T5)
    batches = finetuning_data.plan(rows, size, np.random.default_rng(1))
    assert len(batches) == len(finetuning_data.plan(rows, size)) <= 203 // size + 10
    assert sorted(np.concatenate([batch.numbers for batch in batches])) == list(range(203))
    assert len({(batch.read, batch.written) for batch in batches}) <= 10
    total = 0.0
    for batch, lesson in zip(batches, finetuning_data.lessons(config, rows, size, batches), strict=True):
        assert lesson.batch.source.shape == (size, batch.read)
        assert lesson.batch.target.shape == lesson.answer.shape == lesson.weight.shape == (size, batch.written)
        assert batch.read % 8 == batch.written % 8 == 0
        total += lesson.weight.sum()
    assert total == sum(len(row.answer) for row in rows)


def test_what_the_decoder_reads_and_says():
    row = finetuning_data.TrainingRow((9, 2), (2, 0), (5, 6, 2))
    (lesson,) = finetuning_data.lessons(configure(BART), [row], 2, finetuning_data.plan([row], 2))
    assert lesson.batch.source[0].tolist() == [9, 2, *[-1] * 6]
    assert lesson.batch.target[0].tolist() == [2, 0, 5, 6, 0, 0, 0, 0]
    assert lesson.answer[0].tolist() == [0, 5, 6, 2, 0, 0, 0, 0]
    assert lesson.weight.tolist() == [[0, 1, 1, 1, 0, 0, 0, 0], [0] * 8]
    assert lesson.batch.source[1].tolist() == [0, *[-1] * 7]


def test_the_short_cut_to_a_classifier_s_logits():
    model = make_tiny_model(defaults=DEEP)
    batch = jnp.asarray([[1, 5, 6, 2, -1], [1, 5, 2, -1, -1]])
    found = finetuning_loop.logits(model.config, model.params, batch)
    np.testing.assert_allclose(found, model.apply(batch), atol=1e-5)


def test_examples_in_docstrings():
    found = doctest.testmod(finetuning_data)
    assert found.attempted >= 2
    assert found.failed == 0


# --- starts ---


@pytest.mark.parametrize("name", ["bart-small", "t5-small"])
def test_configurations_of_this_repository(name):
    folder = Path(__file__).parents[1] / "configs" / name
    settings = read_settings(folder)
    config = configure(settings)
    params = finetuning_start.read_start(folder, settings, None, True, ["abc"], 0).params
    shapes = parameter_shapes(config)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    assert 3e6 < sum(leaf.size for leaf in jax.tree.leaves(params)) < 6e6
    tokenizer = finetuning_start.train_tokenizer(config, settings, [prompt for prompt, _ in ANSWERS])
    for kind in ("pad", "bos", "eos"):
        assert getattr(tokenizer, f"{kind}_token_id") == settings.get(f"{kind}_token_id")
    query = params["layers"][0]["attention"]["query"]["kernel"]
    spread = float(jnp.std(query)) / 0.88  # of a normal distribution cut at two deviations
    assert spread == pytest.approx(0.07 if name == "bart-small" else (192 * 48) ** -0.5, rel=0.03)


def test_an_unembedding_of_its_own():
    settings = {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    assert not finetuning_start._tied(settings)
    assert not finetuning_start._tied({**T5, "scale_decoder_outputs": False})
    assert finetuning_start._tied({**T5, "scale_decoder_outputs": None})


def test_numbers_of_special_tokens():
    config = configure(BART)
    tokenizer = finetuning_start.train_tokenizer(config, {**BART, "pad_token_id": 4}, ["abc"])
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 2, 4)
    with pytest.raises(TPatchError, match="the same number"):
        finetuning_start.train_tokenizer(config, {**BART, "pad_token_id": 0}, ["abc"])
    with pytest.raises(TPatchError, match="raise 'vocab_size'"):
        finetuning_start.train_tokenizer(config, {**BART, "pad_token_id": 100}, ["abc"])


def test_a_tokenizer_that_is_there_is_used(place, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(T5), "utf-8")
    tiny_tokenizer().save_pretrained(tmp_path)
    model = finetuning_start.read_start(tmp_path, read_settings(tmp_path), None, True, (), 0)
    assert model.tokenizer.eos_token == "<|endoftext|>"
    assert model.folder == tmp_path


# --- bad input ---


def refused(capsys: pytest.CaptureFixture[str], command: list[str], *words: str) -> None:
    assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert said.startswith("tpatch: ")
    assert said.count("\n") == 1
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "a", "target": "b"}\n{"prompt": "a"}', ["data.jsonl, line 2: no 'target'", "--target-field"]),
        ('{"target": "a"}', ["data.jsonl, line 1: no 'prompt'", "--prompt-field"]),
        ('{"prompt": "a", "target": 3}', ["line 1: 'target' must be a string"]),
        ('{"prompt": " ", "target": "b"}', ["line 1: 'prompt' must be a string with something in it"]),
        ('{"prompt": "\\ud800", "target": "b"}', ["line 1: 'prompt' holds half of a surrogate pair"]),
        ("[1]", ["line 1: list instead of an object"]),
        ("{", ["line 1: not JSON"]),
        ("\n \n", ["holds no example"]),
        (None, ["data.jsonl does not exist"]),
    ],
)
def test_bad_data(place, tmp_path, capsys, text, words):
    if text is not None:
        (tmp_path / "data.jsonl").write_text(text, "utf-8")
    command = ["finetune", str(place / "bart"), str(tmp_path / "data.jsonl"), "-o", str(tmp_path / "out")]
    refused(capsys, [*command, "--from-scratch"], *words)
    refused(capsys, [*arguments(place, "bart", "x"), "--from-scratch", "--validation", command[2]], *words)
    assert not (place / "x.partial").exists()


def test_data_that_are_not_utf8(place, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_bytes(b'{"prompt": "\xff"}')
    command = ["finetune", str(place / "bart"), str(tmp_path / "data.jsonl"), "-o", str(tmp_path / "out")]
    refused(capsys, command, "line 1: not UTF-8 at byte 12")


@pytest.mark.parametrize(("forms", "count", "size"), [(6, 7, 3), (3, 4, 4), (2, 5, 1)])
def test_pairs_are_two_forms_of_one_picture(forms, count, size):
    rows = [finetuning_data.TrainingRow((0,) * 9, (), (number,)) for number in range(forms * count)]
    for shuffle in (None, np.random.default_rng(3)):
        batches = finetuning_data.plan_pairs(rows, forms, size, shuffle)
        assert len(batches) == -(-forms // 2) * -(-count // size)
        seen = set()
        for batch in batches:
            numbers = batch.numbers
            assert (len(numbers), batch.read) == (2 * size, 16)
            picture = np.where(numbers < count, numbers, (numbers - count) // (forms - 1))
            np.testing.assert_array_equal(picture[:size], picture[size:])
            assert len(set(picture.tolist())) == size
            assert not np.any(numbers[:size] == numbers[size:])
            seen |= set(numbers.tolist())
        assert seen == set(range(forms * count))


def test_the_contrastive_loss_by_hand():
    query = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    unit = query / np.linalg.norm(query, axis=1, keepdims=True)
    terms = []
    for row in range(6):
        alike = {other: float(unit[row] @ unit[other]) / 0.1 for other in range(6) if other != row}
        terms.append(np.log(sum(map(np.exp, alike.values()))) - alike[(row + 3) % 6])
    both = jax.jit(jax.value_and_grad(finetuning_loop.contrastive_loss))
    loss, _ = both(jnp.asarray(query))
    np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-5)
    assert np.isfinite(both(jnp.zeros((6, 4)))[1]).all()


def test_bad_labels(place, capsys):
    command = arguments(place, "bert", "x", "--from-scratch")
    refused(capsys, [*command, "--labels", "red,green"], "no example has the label 'green'", "blue, red")
    refused(capsys, [*command, "--labels", "red,red"], "'red' is wanted twice")
    refused(capsys, [*command, "--labels", "red"], "two labels or more")
    fields = ["--prompt-field", "claim", "--target-field", "label"]
    claims, held_out = place / "claims.jsonl", place / "held_out.jsonl"
    command = ["finetune", str(place / "bert"), str(held_out), "-o", str(place / "x"), "--from-scratch", *fields]
    refused(
        capsys,
        [*command, "--validation", str(claims)],
        "claims.jsonl, line 17: the classifier has no label 'green'",
        "blue, red",
    )
    refused(capsys, arguments(place, "t5", "x", "--labels", "a,b"), "leave them out")
    with pytest.raises(TPatchError, match="no validation example has one of the labels red, blue"):
        finetune(
            place / "bert",
            RULE,
            place / "x",
            settings=SCRATCH,
            labels=["red", "blue"],
            validation=[("green 1", "green")],
        )


def test_bad_models(place, tmp_path, capsys):
    for name, settings in (("llama", LLAMA), ("odd", {"model_type": "odd"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(settings), "utf-8")
    end = [str(place / "bart.jsonl"), "-o", str(tmp_path / "out")]
    refused(capsys, ["finetune", str(tmp_path / "llama"), *end], "is a decoder", "use another tool")
    refused(capsys, ["finetune", str(tmp_path / "odd"), *end], "architecture 'odd'")
    refused(capsys, arguments(place, "bart", "x"), "holds no weights", "--from-scratch")
    with pytest.raises(TPatchError, match="is a decoder"):
        finetune(make_tiny_model(), ANSWERS, tmp_path / "out")


def test_too_long(place, tmp_path, capsys):
    for pair, words in (((80 * "x ", "b"), "line 2: the prompt has"), (("a", 80 * "x "), "line 2: the target has")):
        path = write_lines(tmp_path / "data.jsonl", [("a", "b"), pair])
        command = ["finetune", str(place / "bart"), str(path), "-o", str(tmp_path / "out"), "--from-scratch"]
        refused(capsys, command, words, "64", "shorten it")


def test_bad_settings(place, tmp_path, capsys):
    (tmp_path / "taken").write_text("", "utf-8")
    command = ["finetune", str(place / "bart"), str(place / "bart.jsonl"), "-o"]
    refused(capsys, [*command, str(tmp_path / "taken")], "already exists")
    out = str(tmp_path / "out")
    refused(capsys, [*command, out, "--epochs", "0"], "epochs is 0; give 1 or more")
    refused(capsys, [*command, out, "--learning-rate", "nan"], "learning_rate is nan")
    refused(capsys, [*command, out, "--dtype", "int8"], "dtype 'int8' is not supported")
    with pytest.raises(TPatchError, match="image_contrast"):
        FinetuneSettings(image_contrast=-1.0)
    with pytest.raises(TPatchError, match="warmup is a share"):
        FinetuneSettings(warmup=1.0)
    with pytest.raises(TPatchError, match="no example to learn from"):
        finetune(place / "bart", [], out)
