"""Embeddings in front of texts and in the place of tokens: the network, prompts, requests and edits with them."""

import copy
import json
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative
from tiny_families import tiny_model

import tpatch_jax as tp
from tpatch_jax.display.tokens import token_texts
from tpatch_jax.editors import model_memory
from tpatch_jax.editors.model_memory import collect_model_memory
from tpatch_jax.embeddings import as_embeddings, embedding_prompt, plain_text
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import memory_text
from tpatch_jax.models.embedded import EmbeddedToken, table_of
from tpatch_jax.models.inputs import embedding_contexts
from tpatch_jax.models.model import Model
from tpatch_jax.models.networks import Embedded, Pair
from tpatch_jax.models.rows import tokens_array
from tpatch_jax.requests import parse_request

pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths")

PROMOTION = "standard"  # optax takes steps
TOKENS = jnp.asarray([[5, 6, 7, 8], [9, 10, 11, 12]])
QUICK = {"contexts": 2, "attempts": 2, "fit.key_steps": 16, "fit.lanes": 2, "fit.value_steps": 8}


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def seen(model) -> np.ndarray:
    """What a tower would make of three pictures, ``[3, 2, d]``."""
    return np.asarray(jax.random.normal(jax.random.key(0), (3, 2, model.config.hidden_size)), np.float32)


def rows_of(model: Model, tokens: Any) -> Any:
    """What the network's own table gives for tokens, as it goes on from there."""
    return model.params["embed"]["embedding"][tokens] * model.config.embed_scale


# --- the network ---


@pytest.mark.parametrize("family", ["gpt2", "gemma"])
def test_embeddings_of_tokens_are_those_tokens(family):
    """With position embeddings, rotary ones, and where the table's rows are scaled."""
    model = tiny_model(family)
    first, inside = model.apply(TOKENS, embeddings=rows_of(model, TOKENS[:, :2])), jnp.asarray([1, 3])
    assert first.shape[1] == 6
    np.testing.assert_allclose(first, model.apply(jnp.concatenate([TOKENS[:, :2], TOKENS], 1)), atol=1e-5)
    replaced = TOKENS.at[:, inside].set(0)
    put = model.apply(replaced, embeddings=rows_of(model, TOKENS[:, inside]), positions=inside)
    np.testing.assert_allclose(put, model.apply(TOKENS), atol=1e-5)


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_an_encoder_reads_them(family):
    model = tiny_model(family)
    whole = jnp.asarray([[5, 6, 7, 8], [9, 10, 11, -1]])
    # What stood in their place was padding, which it is no more.
    batches = [whole, whole.at[:, 1].set(-1)]
    if family == "t5":
        batches = [Pair(batch, TOKENS) for batch in batches]
    put = model.apply(batches[1], embeddings=rows_of(model, whole[:, 1:2]), positions=jnp.asarray([1]))
    np.testing.assert_allclose(put, model.apply(batches[0]), atol=1e-5)


def test_they_are_jitted_differentiated_and_traced(model, seen):
    two, places = jnp.asarray(seen[:2]), jnp.asarray([[0, 2], [1, 3]])

    @jax.jit
    def run(model: Model, embeddings: Any, places: Any) -> Any:
        return model.apply(TOKENS, embeddings=embeddings, positions=places)

    np.testing.assert_allclose(
        run(model, two, places), model.apply(TOKENS, embeddings=two, positions=places), atol=1e-5
    )
    slope = jax.grad(lambda embeddings: model.apply(TOKENS, embeddings=embeddings)[0, -1, 7])(two)
    assert relative(slope[0], 0 * slope[0])
    assert not np.any(slope[1])
    traced = model.trace(TOKENS, 1, embeddings=two)
    np.testing.assert_allclose(model.resume(traced, traced.output), model.apply(TOKENS, embeddings=two), atol=1e-5)


@pytest.mark.parametrize(
    ("embeddings", "positions", "said"),
    [
        (np.zeros((2, 16), np.float32), None, "give floats"),
        (np.zeros((1, 2, 16), np.float32), None, "give floats"),
        (np.zeros((2, 2, 8), np.float32), None, "give floats"),
        (np.zeros((2, 0, 16), np.float32), None, "give floats"),
        (np.zeros((2, 2, 16), np.int32), None, "give floats"),
        ([[0.5]], None, "give floats"),
        (np.zeros((2, 2, 16), np.float32), np.asarray([1]), "a token for each"),
        (np.zeros((2, 2, 16), np.float32), np.asarray([0.0, 1.0]), "a token for each"),
        (np.zeros((2, 2, 16), np.float32), np.asarray([2, 4]), "0 to 3"),
        (np.zeros((2, 2, 16), np.float32), np.asarray([-1, 2]), "0 to 3"),
        (None, np.asarray([1]), "no embeddings"),
    ],
)
def test_other_shapes_are_refused(model, embeddings, positions, said):
    with pytest.raises(TPatchError, match=said):
        model.apply(TOKENS, embeddings=embeddings, positions=positions)


def test_what_reads_no_tokens_takes_none(model, seen):
    with pytest.raises(TPatchError, match="reads images"):
        tiny_model("vit").apply(jnp.zeros((1, 64), jnp.int32), embeddings=seen[:1])
    with pytest.raises(TPatchError, match="already"):
        model.apply(Embedded(TOKENS, jnp.asarray(seen[:2]), jnp.asarray([[0, 1]] * 2)), embeddings=seen[:2])
    with pytest.raises(TPatchError, match="Pair"):
        tiny_model("t5").apply(TOKENS, embeddings=seen[:2])


# --- prompts ---


def test_a_prompt_is_known_by_text_and_embeddings(seen):
    prompt = tp.EmbeddingPrompt("Is it normal? ", seen[0])
    assert prompt == tp.EmbeddingPrompt("Is it normal? ", seen[0].tolist()) != tp.EmbeddingPrompt("Is it?", seen[0])
    assert (
        len({prompt, tp.EmbeddingPrompt(prompt.text, seen[1]), tp.EmbeddingPrompt(prompt.text, seen[0], [0, 1])}) == 3
    )
    assert prompt.strip() == tp.EmbeddingPrompt("Is it normal?", seen[0])
    assert tp.EmbeddingPrompt(" a ", seen[0], (0, 1)).strip().text == " a"
    for other in (copy.copy(prompt), copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt))):
        assert (other, other.text, other.positions) == (prompt, prompt.text, None)
        np.testing.assert_array_equal(other.embeddings, seen[0])
    # Files keep the name, never the embeddings.
    assert json.loads(json.dumps([prompt])) == [str(prompt)]
    assert plain_text(prompt) == "Is it normal? "
    assert plain_text("a") == "a"


@pytest.mark.parametrize(
    ("text", "embeddings", "positions", "said"),
    [
        (b"a", np.zeros((1, 2)), None, "give a text"),
        ("a", np.zeros(2), None, "n, hidden_size"),
        ("a", np.zeros((0, 2)), None, "n, hidden_size"),
        ("a", np.zeros((1, 2), int), None, "n, hidden_size"),
        ("a", [[1.0], [1.0, 2.0]], None, "n, hidden_size"),
        ("a", None, None, "nothing"),
        ("a", np.full((1, 2), np.nan), None, "not finite"),
        ("a", np.zeros((1, 2)), [0, 1], "each of the 1"),
        ("a", np.zeros((1, 2)), [0.5], "each of the 1"),
        ("a", np.zeros((1, 2)), 0, "each of the 1"),
        ("a", np.zeros((1, 2)), [-1], "from 0 on"),
        ("a", np.zeros((2, 2)), [3, 3], "each once"),
    ],
)
def test_what_is_no_prompt_says_so(text, embeddings, positions, said):
    with pytest.raises(TPatchError, match=said):
        tp.EmbeddingPrompt(text, embeddings, positions)


def test_a_npy_holds_embeddings(tmp_path, seen):
    np.save(tmp_path / "seen.npy", seen[0])
    np.testing.assert_array_equal(as_embeddings("seen.npy", folder=tmp_path), seen[0])
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY no more")
    np.save(tmp_path / "objects.npy", np.asarray([{}, {}]), allow_pickle=True)
    for name, said in (
        ("broken.npy", "cannot be read"),
        ("objects.npy", "cannot be read"),
        ("none.npy", "cannot"),
        ("a.txt", "no .npy"),
    ):
        with pytest.raises(TPatchError, match=said):
            as_embeddings(name, folder=tmp_path)


def test_where_they_stand_in_a_text(model, seen):
    plain, (_begin, *_) = model.encode_prompt("The chest is"), model.encode_prompt("a")
    front = model.encode_prompt(tp.EmbeddingPrompt("The chest is", seen[0]))
    start = len(model.start)
    assert front[:start] == plain[:start]
    assert front[start + 2 :] == plain[start:]
    assert all(isinstance(token, EmbeddedToken) and token < -1 for token in front[start : start + 2])
    inside = model.encode_prompt(tp.EmbeddingPrompt("The chest is", seen[0], [2, 1]))
    assert len(inside) == len(plain)
    assert inside[3:] == plain[3:]
    np.testing.assert_array_equal(inside[2].vector, seen[0, 0])
    with pytest.raises(TPatchError, match=f"0 to {len(plain) - 1}"):
        model.encode_prompt(tp.EmbeddingPrompt("The chest is", seen[0], [0, len(plain)]))
    with pytest.raises(TPatchError, match="8 wide"):
        model.encode_prompt(tp.EmbeddingPrompt("The chest is", seen[0, :, :8]))
    with pytest.raises(TPatchError, match="reads images"):
        tiny_model("vit").encode_prompt(tp.EmbeddingPrompt("a", seen[0]))
    # A name alone, or one with something in front of it, is read by nobody.
    for text in (str(tp.EmbeddingPrompt("a", seen[0])) + "", f"So: {tp.EmbeddingPrompt('a', seen[0])}"):
        with pytest.raises(TPatchError, match="only the name"):
            model.encode_prompt(text)
    with pytest.raises(TPatchError, match="token ids alone"):
        tokens_array([front], len(front))
    shown = token_texts(model.tokenizer, front)
    assert shown[start : start + 2] == ["[·]", "[·]"]
    assert shown[start + 2 :] == token_texts(model.tokenizer, plain)[start:]
    assert isinstance(table_of([front, plain], 32), Embedded)
    assert not isinstance(table_of([plain], 32), Embedded)


def test_generate_reads_them(model):
    words = model.encode("chest")
    given = np.asarray(rows_of(model, jnp.asarray(words)))
    whole = "chestThe lung is"
    if [*words, *model.encode("The lung is")] != model.encode(whole):
        pytest.skip("the tokenizer joins the two")
    assert model.generate("The lung is", 5, embeddings=given) == model.generate(whole, 5)
    several = model.generate(["The lung is", "So"], 3, embeddings=[given, given])
    assert several == [model.generate(tp.EmbeddingPrompt(text, given), 3) for text in ("The lung is", "So")]
    for embeddings, positions in (([given], None), (None, [0]), (given, [[0], [1]])):
        with pytest.raises(TPatchError, match=r"embeddings|positions"):
            model.generate(["The lung is", "So"], 3, embeddings=embeddings, positions=positions)


# --- requests ---


def test_a_request_with_embeddings(seen, tmp_path):
    np.save(tmp_path / "other.npy", seen[2])
    record = {
        "prompt": "The chest is",
        "embeddings": seen[0],
        "target": "ill",
        "rephrases": [seen[1], "It is"],
        "locality": [{"prompt": "The sky is"}, {"embeddings": "other.npy"}],
        "keep": [{"prompt": "So", "embeddings": seen[2].tolist(), "positions": [0, 1]}],
    }
    request = parse_request(record, "here", tmp_path)
    assert request.prompt == tp.EmbeddingPrompt("The chest is", seen[0])
    assert request.continuation == " ill"
    assert request.rephrases == (tp.EmbeddingPrompt("The chest is", seen[1]), tp.EmbeddingPrompt("It is", seen[0]))
    assert request.locality == ("The sky is", tp.EmbeddingPrompt("The chest is", seen[2]))
    assert request.keep == (tp.EmbeddingPrompt("So", seen[2], (0, 1)),)
    # Read again, as every call reads what it is given, it stays what it is.
    assert tp.read_requests is not None
    assert parse_request({**vars(request)}, "again") == request


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"subject": "chest"}, "'subject'"),
        ({"system": "s"}, "'system'"),
        ({"turns": [("user", "a"), ("assistant", "b")]}, "'turns'"),
        ({"form": "chat"}, "bare text"),
        ({"embeddings": [1.0]}, "'embeddings' are an array"),
        ({"positions": [0]}, "each of the 2"),
        ({"rephrases": "text"}, "must be a list"),
        ({"rephrases": [[[1]]]}, "entry 0 of 'rephrases'"),
        ({"keep": [{}]}, "has nothing"),
        ({"keep": [{"image": "a"}]}, "'image'"),
        ({"keep": [{"prompt": 3}]}, "'prompt' is a int"),
        ({"keep": [{"prompt": ""}]}, "no 'embeddings'"),
        ({"positions": [0, 1], "locality": ["It"]}, "those of another"),
        ({"image": "a.png", "prompt": None}, "does not exist"),
    ],
)
def test_a_request_that_makes_no_sense(seen, change, said):
    record = {"prompt": "The chest is", "embeddings": seen[0], "target": "ill"}
    with pytest.raises(TPatchError, match=said):
        parse_request({**record, **change}, "here")
    assert embedding_prompt(tp.EmbeddingPrompt("a", seen[0]), tp.EmbeddingPrompt("b", seen[0]), "x").endswith("a")


# --- edits ---


def test_an_edit_holds_for_these_embeddings_alone(model, seen, tmp_path):
    asked = [tp.EmbeddingPrompt("The chest is", one) for one in seen]
    before = model.generate(asked, 1)
    request = {
        "prompt": "The chest is",
        "embeddings": seen[0],
        "target": "z",
        "join": "none",
        "keep": [*seen[1:], {"prompt": "The chest is"}],
    }
    memory = written(tmp_path)
    patches, info = tp.edit(model, [request], settings=QUICK, memory=memory, cache=False)
    assert (info.requests[0].status, info.requests[0].site) == ("edited", "last")
    edited = tp.attach(model, patches)
    after = edited.generate(asked, 1)
    assert after == ["z", *before[1:]]
    assert edited.generate("The chest is", 1) == model.generate("The chest is", 1)
    assert edited.generate("The chest is", 1, embeddings=seen[0]) == "z"
    # Two answers about the same embeddings contradict each other; about others they do not.
    pairs = [("z", seen[0]), ("y", seen[0]), ("y", seen[1])]
    asked = [{**request, "target": target, "embeddings": one, "keep": []} for target, one in pairs]
    _, info = tp.edit(model, asked, settings=QUICK, memory=memory, cache=False)
    assert [result.held for result in info.requests] == [True, False, True]
    assert "contradicts" in info.requests[1].reason


def test_at_a_subject_they_are_refused(model, seen, tmp_path):
    request = tp.EditRequest(tp.EmbeddingPrompt("The chest is", seen[0]), "z")
    settings = {**QUICK, "site": "subject", "layer": "0"}
    _, info = tp.edit(model, [request], settings=settings, memory=written(tmp_path), cache=False)
    assert not info.requests[0].held
    assert "site=last" in info.requests[0].reason


def test_contexts_are_nearly_the_same(seen):
    prompt = tp.EmbeddingPrompt("a", seen[0], [0, 1])
    made = embedding_contexts(prompt, 3)
    assert [other.positions for other in made] == [(0, 1)] * 3
    assert made == embedding_contexts(prompt, 3)
    apart = [float(np.abs(other.embeddings - seen[0]).mean()) for other in made]
    assert 0 < apart[0] < apart[1] < apart[2] < 0.3


def test_a_bank_keeps_them_by_name(model, seen, tmp_path):
    bank, settings = tmp_path / "bank", {**QUICK, "site": "last"}
    tp.create_bank(bank, model, settings=settings, memory=written(tmp_path))
    request = {"prompt": "The chest is", "embeddings": seen[0], "target": "z", "join": "none", "id": "chest"}
    assert tp.add_edits(bank, model, [request]).added == ("chest",)
    more = tp.add_edits(bank, model, [{**request, "id": "again"}, {"prompt": "It is", "target": "y", "join": "none"}])
    assert (more.already[:1], len(more.added), more.broken) == (("chest",), 1, ())
    edited = tp.bank_model(bank, model)
    assert edited.generate(["The chest is", "It is"], 1, embeddings=[seen[0], seen[1]])[0] == "z"
    assert tp.verify_bank(bank, model)[:2] == ((), 2)
    files = [path.read_bytes() for path in bank.rglob("*") if path.is_file()]
    assert not any(seen[0, 0].tobytes() in content for content in files)
    with pytest.raises(TPatchError, match="'keep' of the requests"):
        tp.guard_bank(bank, model, [tp.EmbeddingPrompt("a", seen[0])])


def written(folder: Any) -> Any:
    """Ordinary text as a memory, on which a random model's patches can stay silent."""
    path = folder / "english.txt"
    path.write_text("The theory in the inn: winter thins the herd, and the hen then hides. " * 12, "utf-8")
    return path


# --- a memory of embeddings ---


def write_memory(path: Any, seen: np.ndarray, **changes: Any) -> Any:
    np.savez(path, **{"embeddings": seen, "prompts": "the cat", **changes})
    return path


def test_a_memory_holds_embeddings_beside_text(model, seen, tmp_path, monkeypatch):
    """Their queries, how these move between shapes of one thing, and what is said there."""
    monkeypatch.setattr(memory_text, "TEXTS", 4)
    monkeypatch.setattr(model_memory, "SPANS", 2)
    monkeypatch.setattr(model_memory, "LEAST_TEXTS", 2)
    last = model.layer(None)
    plain = collect_model_memory(model, last)
    single = collect_model_memory(model, last, write_memory(tmp_path / "one.npz", seen))
    shapes = np.stack([seen, seen + 0.1], 1)
    path = write_memory(tmp_path / "two.npz", shapes, prompts=np.asarray(["the cat", "the hen", "a mat"]))
    several, lower = collect_model_memory(model, last, path), collect_model_memory(model, 0, path)
    rows = [model.encode_prompt(tp.EmbeddingPrompt("the cat", one)) for one in seen]
    traced = model.trace(table_of(rows, len(rows[0])))
    np.testing.assert_allclose(single.query[:3], traced.query[:, -1], atol=1e-5)
    np.testing.assert_allclose(several.query[0], traced.query[0, -1], atol=1e-5)
    assert single.answers is not None
    said = model.resume(traced, traced.output)[:, -1].argmax(-1)
    assert single.answers.tolist()[:4] == [*said.tolist(), -1]
    # Text is thinned out to as many.
    assert 3 < len(single.query) <= 7 < len(plain.query)
    np.testing.assert_array_equal(single.nuisance, plain.nuisance)
    groups = np.asarray(several.query[:6]).reshape(3, 2, -1)
    moved = groups - groups.mean(1, keepdims=True)
    np.testing.assert_allclose(several.nuisance, np.einsum("gsd,gse->de", moved, moved) / 6, atol=1e-5)
    assert lower.answers is None


def test_an_edit_stays_silent_on_remembered_embeddings(model, seen, tmp_path):
    rng = np.random.default_rng(0)
    others = rng.standard_normal((48, 2, *seen.shape[1:])).astype(np.float32)
    others[:, 1] = others[:, 0] + 0.05 * others[:, 1]
    path = write_memory(tmp_path / "others.npz", others)
    request = {"prompt": "the cat", "embeddings": seen[0], "target": "sat"}
    patches, info = tp.edit(model, [request], settings=QUICK, memory=path, cache=False)
    assert info.requests[0].held
    asked = ["the cat"] * len(others)
    said = (each.generate(asked, 1, embeddings=others[:, 0]) for each in (model, tp.attach(model, patches)))
    assert len(set(map(tuple, said))) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"embeddings": np.zeros((3, 2), np.float32)}, r"'embeddings' is float32 \[3, 2\]; give floats"),
        ({"embeddings": np.zeros((3, 2, 16), np.int32)}, "'embeddings' is int32"),
        ({"embeddings": np.zeros((3, 2, 5), np.float32)}, "'embeddings' are 5 wide, and the model is"),
        ({"embeddings": np.full((3, 2, 16), np.nan, np.float32)}, "hold something that is not finite"),
        ({"prompts": np.asarray(["a", "b"])}, r"'prompts' is <U1 \[2\]; give one text, or one for each of the 3"),
        ({"prompts": np.asarray(7)}, "'prompts' is int64"),
    ],
)
def test_a_memory_of_embeddings_that_makes_no_sense(model, seen, tmp_path, changes, said):
    path = write_memory(tmp_path / "memory.npz", seen, **changes)
    with pytest.raises(TPatchError, match=said):
        collect_model_memory(model, 1, path)


def test_a_memory_that_holds_none(model, seen, tmp_path):
    np.savez(tmp_path / "pictures.npz", train_images=np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(TPatchError, match="has train_images; a memory of embeddings has 'embeddings' and 'prompts'"):
        collect_model_memory(model, 1, tmp_path / "pictures.npz")
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("text.npz", "missing.npz"):
        with pytest.raises(TPatchError, match=f"{name} is no .npz that can be read"):
            collect_model_memory(model, 1, tmp_path / name)
