"""What the tokenizer makes of requests: signs, unknown characters, spellings, subjects that are parts of words."""

import dataclasses
import json
import logging
import tomllib
import unicodedata
from pathlib import Path

import jax
import pytest
from conftest import make_tiny_model, tiny_tokenizer, write_tiny_folder
from flax import nnx
from jax.sharding import AxisType
from packaging.requirements import Requirement
from packaging.version import Version
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

import tpatch_jax as tp
from tpatch_jax.bank.state import states
from tpatch_jax.core.patch import create
from tpatch_jax.editors.locating import locate_subject, replace_subject, subject_spans, with_spelling
from tpatch_jax.editors.reading import check_requests, read_item, subject_token
from tpatch_jax.editors.subject_rows import rephrase_rows
from tpatch_jax.editors.wordings import shortened
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.checkpoints.export import common_width
from tpatch_jax.models.fingerprint import fingerprint
from tpatch_jax.models.model import Model, load_model
from tpatch_jax.models.tokenizer import lost_characters
from tpatch_jax.requests import EditRequest

PROMOTION = "standard"  # optax


def apart(text: str) -> str:
    """Letters and their accents apart."""
    return unicodedata.normalize("NFD", text)


@pytest.fixture(scope="module")
def lowering() -> Model:
    """Its tokenizer lower-cases and joins letters and accents."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    return dataclasses.replace(make_tiny_model(max_position_embeddings=512), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def unknowing() -> Model:
    """Its tokenizer knows the Latin letters only, as T5's nearly does."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ?"
    pieces = [("<unk>", 0.0), ("▁", -2.0), *((letter, -4.0) for letter in letters)]
    tokenizer = Tokenizer(Unigram(pieces, 0, False))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="?")
    return dataclasses.replace(make_tiny_model(), tokenizer=fast)


# --- where the subject is ---


@pytest.mark.parametrize("subject", ["Disney+", "C++", "Yahoo!", "the hen (fox)", '"fox"'])
def test_a_sign_with_a_token_of_its_own_belongs_to_the_subject(tiny_model, subject):
    for text in (f"who hit {subject} in", f"in {subject}? it"):
        end = text.index(subject) + len(subject)
        ids = tiny_model.encode_prompt(text)
        assert tiny_model.decode(ids[: subject_token(tiny_model, text, end) + 1]) == text[:end]


def test_a_sign_that_shares_its_token_with_what_follows_is_passed_over():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["+?", ")?"])
    model = dataclasses.replace(make_tiny_model(), tokenizer=tokenizer)
    for text, subject, kept in (("is Disney+? it", "Disney+", "is Disney"), ("the (fox)? it", "(fox)", "the (fox")):
        end = text.index(subject) + len(subject)
        assert model.decode(model.encode(text)[: subject_token(model, text, end) + 1]) == kept


@pytest.mark.parametrize(
    ("text", "subject", "spans"),
    [
        ("Russian is spoken in Russia by", "Russia", [(21, 27)]),
        ("Russia and Russia's", "Russia", [(0, 6), (11, 17)]),
        ("Russians", "Russia", [(0, 6)]),
        ("the JavaScript of Java", "Java", [(18, 22)]),
        ("法国的首都是", "法国", [(0, 2)]),
        ("法国人在法国", "法国", [(0, 2), (4, 6)]),
        ("in Rome", "Paris", []),
    ],
)
def test_subjects_are_whole_words(text, subject, spans):
    assert subject_spans(text, subject) == spans


def test_a_subject_beside_a_longer_word_is_no_second_one(tiny_model):
    text = "Russian is spoken in Russia by"
    request = EditRequest(text, "ab", subject="Russia", rephrases=("In Russia the Russians", "Russia or Russia"))
    assert check_requests(tiny_model, [request], True) == {}
    twice = dataclasses.replace(request, prompt="Russia, Russia")
    assert "occurs 2 times" in check_requests(tiny_model, [twice], True)[0]
    assert replace_subject(text, "Russia", "China") == "Russian is spoken in China by"
    item = read_item(tiny_model, 0, request, [], True)
    (row,) = rephrase_rows(tiny_model, request, item, "subject")
    assert tiny_model.decode(row.tokens[: row.subject + 1]) == "In Russia"
    assert all(wording.text[: wording.end].endswith("Russia") for wording in shortened(request))
    assert not any("Russian" in wording.text for wording in shortened(request)[1:])


# --- what cannot be written ---


def test_characters_that_the_tokenizer_does_not_know_are_named(unknowing):
    wanted = [EditRequest("the capital is", "東京"), EditRequest("東京?", "a"), EditRequest("北京?", "b")]
    problems = check_requests(unknowing, [*wanted, EditRequest("the capital is it", "Rome")], True)
    assert set(problems) == {0, 1, 2}
    assert "the target '東京' has characters" in problems[0]
    assert "'東', '京'" in problems[0]
    assert "the prompt '東京?'" in problems[1]
    assert "reads like '東京?'" in problems[2]


def test_what_a_tokenizer_changes_on_purpose_is_not_lost(lowering, unknowing, tiny_model):
    for text in ("São Paulo ÉCOLE", apart("São Paulo"), "a\u200bb\tc  d"):
        assert lowering.lost(text) == []
    assert tiny_model.lost("東京 <|endoftext|> 🙂") == []
    assert unknowing.lost("x 東京 y") == ["東", "京"]


def test_a_tokenizer_that_drops_characters_loses_them():
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE({"a": 0, "b": 1}, []))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="a")
    assert lost_characters(fast, "a東b京東") == ["東", "京"]


def test_a_tokenizer_that_does_not_write_what_it_reads_is_refused(tmp_path):
    folder = write_tiny_folder(make_tiny_model(), tmp_path / "tiny")
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["decoder"] = {"type": "Sequence", "decoders": [{"type": "Fuse"}]}
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(TPatchError, match=r"writes 'TheĠcapital.* with transformers \d"):
        load_model(folder)


# --- what is the same to the tokenizer ---


def test_contradictions_are_those_that_the_model_reads(lowering, tiny_model):
    pairs = [("São is", "x"), (apart("SÃO is"), "y"), (apart("são is "), "X"), ("in", "é"), ("IN", apart("É"))]
    requests = [EditRequest(*pair) for pair in pairs]
    problems = check_requests(lowering, requests, False)
    assert set(problems) == {1}
    assert "contradicts 'edit-0': the same prompt, which the tokenizer reads like 'São is'" in problems[1]
    # Of a tokenizer that keeps them apart each is a prompt of its own.
    assert check_requests(tiny_model, requests, False) == {}


def test_a_subject_is_there_in_another_spelling(lowering, tiny_model):
    request = EditRequest(apart("The mayor of SÃO Paulo is"), "x", subject="São Paulo")
    (span,) = locate_subject(lowering, request.prompt, "São Paulo")
    assert request.prompt[slice(*span)] == apart("SÃO Paulo")
    assert check_requests(lowering, [request], True) == {}
    assert with_spelling(lowering, [request])[0].subject == apart("SÃO Paulo")
    assert "is not in the prompt" in check_requests(tiny_model, [request], True)[0]


def test_a_bank_supersedes_what_the_model_reads_alike(lowering, letters, tmp_path):
    settings = {"attempts": 1, "fit.key_steps": 48, "fit.value_steps": 24}
    tp.create_bank(tmp_path / "bank", lowering, memory=letters, settings=settings)
    tp.add_edits(tmp_path / "bank", lowering, [EditRequest("São", "q", id="one")])
    again = tp.add_edits(tmp_path / "bank", lowering, [EditRequest(apart("SÃO"), "Q", id="again")])
    assert again.already == ("one",)
    info = tp.add_edits(tmp_path / "bank", lowering, [EditRequest(apart("SÃO"), "z", id="two")])
    assert info.superseded == (("one", "two"),)
    assert states(tp.open_bank(tmp_path / "bank")) == {"one": "superseded", "two": "active"}
    assert tp.verify_bank(tmp_path / "bank", lowering).broken == ()


# --- the token that begins a text ---


def test_a_text_begins_with_its_first_token_once(caplog):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    ends = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = ends
    model = dataclasses.replace(make_tiny_model(), tokenizer=tokenizer)
    plain = model.encode_prompt("the cat")
    assert plain[0] == tokenizer.bos_token_id
    with caplog.at_level(logging.WARNING):
        assert model.encode_prompt("<s>the cat") == plain
        assert model.encode_prompt("<s>the cat") == plain
    assert sum("there once" in record.getMessage() for record in caplog.records) == 1
    request = EditRequest("<s>the cat", "ab", subject="cat")
    item = read_item(model, 0, request, ["A hen."], False)
    assert item.texts == ["<s>the cat", "<s>A hen. the cat"]
    assert [row.count(tokenizer.bos_token_id) for row in item.rows] == [1, 1]
    for text, row in zip(item.texts, item.rows, strict=True):
        assert model.decode(row[: subject_token(model, text, len(text)) + 1]).endswith("cat")


# --- one model, however JAX is set up ---


def test_a_fingerprint_does_not_depend_on_x64(tiny_model):
    before = fingerprint(tiny_model)
    jax.config.update("jax_enable_x64", True)
    try:
        assert fingerprint(tiny_model) == before
    finally:
        jax.config.update("jax_enable_x64", False)


def test_a_mesh_with_explicit_axes_may_be_set(tmp_path: Path, letters):
    folder = write_tiny_folder(make_tiny_model(max_position_embeddings=512), tmp_path / "tiny")
    alone, tokens = load_model(folder), [[1, 2, 3]]
    batch = jax.numpy.asarray(tokens)
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Explicit,))
    request, settings = EditRequest("bdkv", "q"), dataclasses.replace(tp.PRESETS["default"], attempts=1)
    with jax.set_mesh(mesh):
        model = load_model(folder, mesh=mesh)
        assert model.generate("abc", 3) == alone.generate("abc", 3)
        traced = model.trace(batch)
        assert float(model.resume(traced, traced.output).sum()) == pytest.approx(float(alone.apply(batch).sum()), 1e-4)
        assert fingerprint(model) == fingerprint(alone)
        patches, info = tp.edit(model, [request], settings=settings, memory=letters, cache=False)
        assert info.requests[0].held
        assert all(bool(jax.numpy.isfinite(patch.key).all()) for patch in patches.values())
        assert tp.merge(model, patches).generate("bdkv", 2) == " q"
        assert tp.attach(model, patches).apply(batch).sum().shape == ()


# --- dependencies ---


def test_the_lowest_versions_are_those_that_are_declared():
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    declared = dict(line.split(">=") for line in project["dependencies"] + project["optional-dependencies"]["test"])
    lines = (root / "tests" / "lowest.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert {Requirement(name).name: Version(bound) for name, bound in declared.items()} == {
        name: Version(version) for name, version in pinned.items()
    }


# --- checkpoints ---


@pytest.mark.parametrize("prefix", ["_orig_mod.", "base_model.model.", "module."])
def test_tensors_of_a_wrapped_model_are_recognised(tiny_folder, tmp_path, prefix):
    from safetensors.numpy import load_file, save_file

    path = tiny_folder(tmp_path) / "model.safetensors"
    save_file({f"{prefix}{name}": tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(TPatchError, match=rf"begin with '{prefix}', such as '{prefix}model.embed"):
        load_model(path.parent)


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_to_be_merged_first(tiny_folder, tmp_path, whole):
    folder = tiny_folder(tmp_path)
    (folder / "adapter_config.json").write_text("{}", "utf-8")
    if not whole:
        (folder / "config.json").unlink()
    with pytest.raises(TPatchError, match=r"belongs to an adapter.*merge it first"):
        load_model(folder)


def test_rotary_entries_that_differ_are_refused(tiny_folder, tmp_path):
    folder = tiny_folder(tmp_path)
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    settings.pop("rope_theta", None)
    older = {"rope_type": "linear", "factor": 2.0}
    both = {**settings, "rope_scaling": older, "rope_parameters": {**older, "rope_theta": 500000.0}}
    (folder / "config.json").write_text(json.dumps(both), "utf-8")
    with pytest.raises(TPatchError, match=r"rope_theta is 10000\.0 there and 500000\.0"):
        load_model(folder)
    # The older entries alone, and what is saved of them, say the same.
    alone = {**settings, "rope_scaling": older, "rope_theta": 500000.0}
    alone.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(alone), "utf-8")
    model = load_model(folder)
    tp.save_model(model, tmp_path / "saved")
    assert "rope_scaling" not in json.loads((tmp_path / "saved" / "config.json").read_text("utf-8"))
    assert load_model(tmp_path / "saved").config == model.config


def test_templates_are_copied_and_paths_are_not(tiny_folder, tmp_path):
    folder = tiny_folder(tmp_path)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ x }}", "utf-8")
    tp.export_model(load_model(folder), tmp_path / "out")
    assert (tmp_path / "out" / "additional_chat_templates" / "rag.jinja").read_text("utf-8") == "{{ x }}"
    for path in (tmp_path / "out").rglob("*.json"):
        assert str(tmp_path) not in path.read_text("utf-8")
    assert "_name_or_path" not in json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))


def test_code_that_is_not_written_is_not_named(tiny_folder, tmp_path):
    folder = tiny_folder(tmp_path)
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    settings["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(settings), "utf-8")
    model = load_model(folder)
    tp.export_model(model, tmp_path / "stock")
    tp.save_model(model, tmp_path / "saved")
    for name in ("stock", "saved"):
        written = json.loads((tmp_path / name / "config.json").read_text("utf-8"))
        assert written["model_type"] == settings["model_type"]
        assert "auto_map" not in written


# --- networks from elsewhere ---


def test_linen_parameters_keep_how_they_are_split():
    import flax.linen as linen

    split, normal = linen.with_partitioning, linen.initializers.lecun_normal()

    class Mlp(linen.Module):
        hidden: int

        @linen.compact
        def __call__(self, x):
            bias = split(linen.initializers.zeros, ("model",))
            up = linen.Dense(self.hidden, kernel_init=split(normal, (None, "model")), bias_init=bias)
            down = linen.Dense(x.shape[-1], kernel_init=split(normal, ("model", None)))
            return down(linen.gelu(up(x)))

    class Tiny(linen.Module):
        hidden: int = 16

        @linen.compact
        def __call__(self, tokens):
            x = linen.Embed(50, 8)(tokens)
            return linen.Dense(50)(x + Mlp(self.hidden, name="mlp")(x))

    def widen(module, count):
        return module.clone(hidden=module.hidden + count)

    variables = Tiny().init(jax.random.key(0), jax.numpy.zeros((1, 4), int))
    for params in (variables, variables["params"], linen.meta.unbox(variables)):
        network = tp.from_linen(Tiny(), params, "mlp", activation="gelu_tanh", widen=widen)
        wider = network.merge(create(8, 3))
        assert linen.get_partition_spec(wider[1]) == linen.get_partition_spec(params)
        assert jax.tree.structure(wider[1]) == jax.tree.structure(params)
        back, _ = network.unmerge(wider)
        assert jax.tree.structure(back[1]) == jax.tree.structure(params)


def test_nnx_layers_that_share_a_kernel_share_it_again():
    class Mlp(nnx.Module):
        def __init__(self, rngs):
            self.fc1, self.fc2 = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

        def __call__(self, x):
            return self.fc2(jax.nn.gelu(self.fc1(x)))

    class Tiny(nnx.Module):
        def __init__(self, rngs):
            self.embed, self.first, self.mlp = nnx.Embed(50, 8, rngs=rngs), Mlp(rngs), Mlp(rngs)
            self.mlp.fc1.kernel, self.mlp.fc2.bias = self.first.fc1.kernel, self.first.fc2.bias

        def __call__(self, tokens):
            x = self.embed(tokens)
            x = x + self.first(x)
            return self.embed.attend(x + self.mlp(x))

    network = tp.from_nnx(Tiny(nnx.Rngs(0)), "mlp", activation="gelu_tanh", up="fc1", down="fc2")
    wider = network.merge(create(8, 3))
    # One of them is wider now, which the other must not be; what keeps its shape stays shared.
    assert (wider.mlp.fc1.kernel.shape, wider.first.fc1.kernel.shape) == ((8, 19), (8, 16))
    assert wider.mlp.fc2.bias is wider.first.fc2.bias
    back, _ = network.unmerge(wider)
    assert back.mlp.fc1.kernel is back.first.fc1.kernel
    assert back.mlp.fc2.bias is back.first.fc2.bias
    # Trained apart, they stay apart.
    wider.first.fc1.kernel = wider.first.fc1.kernel.replace(wider.first.fc1.kernel[...] + 1)
    apart_again, _ = network.unmerge(wider)
    assert apart_again.mlp.fc1.kernel is not apart_again.first.fc1.kernel


def test_widths_are_such_that_a_quantiser_takes_them():
    for width, neurons, wanted in ((512, 3, 768), (96, 3, 128), (40, 3, 48), (20, 3, 24)):
        model = make_tiny_model(intermediate_size=width)
        assert common_width(tp.merge(model, create(16, neurons))) == wanted
        assert common_width(model) == width
