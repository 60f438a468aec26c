"""What Python callers give in the wrong form or order: each mistake is named, none reaches the arrays."""

import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny_model

import tpatch_jax as tp
from tpatch_jax.core.patch import Patch, create
from tpatch_jax.requests import as_requests

PROMOTION = "standard"  # optax takes steps
pytestmark = pytest.mark.usefixtures("quick_compilation")
REQUEST = tp.EditRequest("the in a", "b", "in")
QUICK = {"site": "last", "attempts": 1, "fit": {"key_steps": 8, "value_steps": 1}}
PATCHES = {2: create(16, 1)}
INFO = tp.EditInfo((tp.RequestInfo("edit-0", True, "edited", neurons={2: (0,)}),), 0.0, 0.0, 0.0, 0.0, 0)


def edit(model, letters, requests=(REQUEST,), **given):
    return tp.edit(model, requests, **{"settings": QUICK, "memory": letters, "cache": False, **given})


def test_settings_are_given_as_changes_by_name(tiny_model, letters):
    patches, info = edit(tiny_model, letters)
    object_too = replace(
        tp.PRESETS["default"],
        site="last",
        attempts=1,
        fit=replace(tp.PRESETS["default"].fit, key_steps=8, value_steps=1),
    )
    again, _ = edit(tiny_model, letters, settings=object_too)
    assert info.requests[0].site == "last"
    assert np.array_equal(patches[2].key, again[2].key)
    dotted, _ = edit(
        tiny_model, letters, settings={"site": "last", "attempts": 1, "key_steps": 8, "fit.value_steps": 1}
    )
    assert np.array_equal(patches[2].key, dotted[2].key)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sit": "last"}, "no setting 'sit'.*'site'"),
        ({"site": "lats"}, "site 'lats' does not exist"),
        ({"preset": "papr"}, "preset 'papr' does not exist"),
        ({"attempts": "many"}, "'attempts' is 'many'; give a whole number"),
        ({"attempts": True}, "'attempts' is True; give a whole number"),
        ({3: 4}, "no setting '3'"),
        (None, "None is no settings; give the name of a preset"),
        (3, "3 is no settings"),
        (["site=last"], "a list is no settings"),
        (tp.FitSettings(), "a FitSettings is no settings"),
        (tp.TPatcherSettings, "the class TPatcherSettings is no settings"),
        ("site=last", "preset 'site=last' does not exist.*changes by name"),
        ({"layer": 99}, "layer 99 is not in this model; it has layers 0 to 2"),
        ({"layer": "99"}, "layer 99 is not in this model"),
        ({"layer": -1}, "layer '-1' is not a layer"),
        ({"layer": True}, "'layer' is True"),
        ({"layer": 1.5}, "'layer' is 1.5"),
        ({"layer": None}, "'layer' is None"),
        ({"layer": "²"}, "layer '²' is not a layer"),
        ({"layer": "last"}, "layer 'last' is not a layer"),
    ],
)
def test_settings_of_another_form_are_refused(tiny_model, letters, settings, message):
    with pytest.raises(tp.TPatchError, match=message):
        edit(tiny_model, letters, settings=settings)
    with pytest.raises(tp.TPatchError, match=message):
        tp.tpatcher(settings, memory=letters).init(tiny_model, jax.random.key(0))


@pytest.mark.parametrize("layer", [99, "99", -1, True, None, [1]])
def test_a_layer_that_is_not_there_is_refused_in_settings_too(tiny_model, letters, layer):
    for site in ("auto", "last", "subject"):
        with pytest.raises(tp.TPatchError, match="layer"):
            edit(tiny_model, letters, settings=replace(tp.PRESETS["default"], site=site, layer=layer))


def test_a_layer_may_be_a_number():
    assert tp.TPatcherSettings(layer=1) == tp.TPatcherSettings(layer="1")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tp.TPatcherSettings(attempts="3"), "'attempts' is '3'; give a whole number"),
        (lambda: tp.TPatcherSettings(contexts=2.5), "'contexts' is 2.5"),
        (lambda: tp.TPatcherSettings(complete="no"), "'complete' is 'no'; give true or false"),
        (lambda: tp.TPatcherSettings(fit=None), "'fit' is None; give FitSettings"),
        (lambda: tp.TPatcherSettings(subject={}), "'subject' is a dict; give SubjectSettings"),
        (lambda: tp.FitSettings(key_steps=None), "'key_steps' is None"),
        (lambda: tp.FitSettings(weights=tp.Weights(memory="5")), "'memory' is '5'; give a number"),
        (lambda: tp.FitSettings(recipe="stagd"), "recipe 'stagd' does not exist"),
        (lambda: tp.FinetuneSettings(epochs="3"), "'epochs' is '3'"),
        (lambda: tp.FinetuneSettings(epochs=True), "'epochs' is True"),
        (lambda: tp.FinetuneSettings(learning_rate="x"), "learning_rate is x"),
    ],
)
def test_a_setting_of_the_wrong_type_is_refused(make, message):
    with pytest.raises(tp.TPatchError, match=message):
        make()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": 3}, "request 1: 'prompt' is int"),
        ({"prompt": None}, "request 1: 'prompt' is NoneType"),
        ({"prompt": b"the in"}, "request 1: 'prompt' is bytes"),
        ({"prompt": "a\ud800"}, "request 1: 'prompt' holds half of a surrogate pair"),
        ({"target": 4}, "request 1: 'target' is int"),
        ({"target": None}, "request 1: 'target' is NoneType"),
        ({"subject": 3}, "request 1: 'subject' is int"),
        ({"rephrases": "one string"}, "request 1: 'rephrases' must be a list of non-empty strings"),
        ({"rephrases": b"ab"}, "'rephrases' must be a list"),
        ({"rephrases": [3]}, "'rephrases' must be a list"),
        ({"locality": "one"}, "'locality' must be a list"),
        ({"locality": 7}, "'locality' must be a list"),
        ({"id": True}, "'id' is bool"),
        ({"id": ["a"]}, "'id' is list"),
    ],
)
def test_a_request_in_code_is_checked_as_one_in_a_file(tiny_model, letters, fields, message):
    record = {"prompt": "a in", "target": "b", **fields}
    for request in (record, tp.EditRequest(**record)):
        with pytest.raises(tp.TPatchError, match=message):
            edit(tiny_model, letters, [REQUEST, request])
        with pytest.raises(tp.TPatchError, match=message):
            tp.show(INFO, requests=[REQUEST, request])


def test_lists_and_numbers_are_taken_as_a_file_has_them():
    loose = tp.EditRequest("p", "t", None, ["a"], ["b"], 3)  # type: ignore[arg-type]
    assert (
        as_requests([loose, {"prompt": "p", "target": "t", "rephrases": ("a",), "locality": ["b"], "id": 3}])
        == [tp.EditRequest("p", "t", None, ("a",), ("b",), "3")] * 2
    )


@pytest.mark.parametrize("ids", [("x", "x"), (1, "1"), ("edit-1", None)])
def test_equal_ids_are_refused(tiny_model, letters, ids):
    requests = [tp.EditRequest(text, "b", id=name) for text, name in zip(("in a", "the a"), ids, strict=True)]
    with pytest.raises(tp.TPatchError, match=f"request 1: the id {str(ids[0])!r} is that of request 0, too"):
        edit(tiny_model, letters, requests)


@pytest.mark.parametrize("requests", [REQUEST, {"prompt": "p", "target": "t"}, "r.jsonl", b"ab", 3, None, object()])
def test_no_list_of_requests(tiny_model, letters, requests):
    with pytest.raises(tp.TPatchError, match="is no list of requests; give a list of EditRequest"):
        edit(tiny_model, letters, requests)


def mistakes(model, folder):
    """Calls with arguments in the wrong order or form, by name, and what the message says."""
    bank, patch = folder / "bank", create(16, 1)
    return {
        "edit swapped": (lambda: tp.edit([REQUEST], model), "a list is no model"),
        "edit None": (lambda: tp.edit(None, [REQUEST]), "None is no model"),
        "edit params": (lambda: tp.edit(model.params, [REQUEST]), "a dict is no model"),
        "edit name": (lambda: tp.edit("tiny", [REQUEST]), "'tiny' is the name of a model; load it first"),
        "edit seed": (lambda: tp.edit(model, [REQUEST], seed="0"), "seed is '0'; give a whole number"),
        "edit seed None": (lambda: tp.edit(model, [REQUEST], seed=None), "seed is None"),
        "edit seed 1.5": (lambda: tp.edit(model, [REQUEST], seed=1.5), "seed is 1.5"),
        "edit memory": (lambda: tp.edit(model, [REQUEST], memory=["text"]), "a list is not a text file"),
        "edit progress": (lambda: tp.edit(model, [REQUEST], progress=True), "progress is True; give a function"),
        "edit cache": (lambda: tp.edit(model, [REQUEST], cache="no"), "'no' is not True or False"),
        "attach swapped": (lambda: tp.attach(PATCHES, model), "a dict is no model"),
        "attach edit's pair": (lambda: tp.attach(model, (PATCHES, INFO)), "a tuple is no patch"),
        "attach True": (lambda: tp.attach(model, {True: patch}), "a dict is no patch"),
        "attach no arrays": (lambda: tp.attach(model, Patch([1], [2], [3])), "key, bias and value none, none, none"),
        "attach shapes": (lambda: tp.attach(model, patch._replace(bias=jnp.ones(2))), r"\[1, 16\], \[2\], \[1, 16\]"),
        "attach relu": (lambda: tp.attach(model, PATCHES, relu="yes"), "'yes' is not True or False"),
        "merge swapped": (lambda: tp.merge(PATCHES, model), "a dict is no model"),
        "detach": (lambda: tp.detach("tiny"), "load it first"),
        "unmerge": (lambda: tp.unmerge(PATCHES), "a dict is no model"),
        "unmerge count": (lambda: tp.unmerge(tp.merge(model, PATCHES), 1), "1 is not a dict from layers"),
        "unmerge True": (lambda: tp.unmerge(tp.merge(model, PATCHES), {2: True}), "number of neurons is True"),
        "unmerge name": (lambda: tp.unmerge(tp.merge(model, PATCHES), {"2": 1}), "layer '2' is no number of a layer"),
        "concatenate": (lambda: tp.concatenate(patch), "not a Patch; put it into one"),
        "concatenate_layers": (lambda: tp.concatenate_layers(PATCHES), "not a dict; put it into one"),
        "concatenate_layers patches": (lambda: tp.concatenate_layers([patch]), "not a Patch; use concatenate"),
        "save model first": (lambda: tp.save_patches(model, bank, PATCHES, [REQUEST], INFO), "a Model is not a folder"),
        "save swapped": (lambda: tp.save_patches(bank, model, PATCHES, INFO, [REQUEST]), "prompt"),
        "save info": (lambda: tp.save_patches(bank, model, PATCHES, [REQUEST], None), "None is not an EditInfo"),
        "save layer": (lambda: tp.save_patches(bank, model, {99: patch}, [REQUEST], INFO), "layer 99 is not in"),
        "save pair": (lambda: tp.save_patches(bank, model, (PATCHES, INFO), [REQUEST], INFO), "a tuple is no patch"),
        "load swapped": (lambda: tp.load_patches(model, bank), "a Model is not a folder"),
        "load name": (lambda: tp.load_patches(bank, "tiny"), "load it first"),
        "read requests": (lambda: tp.read_requests([REQUEST]), "a list is not a file of requests"),
        "read None": (lambda: tp.read_requests(None), "None is not a file of requests"),
        "load_model": (lambda: tp.load_model(model), "is loaded already"),
        "load_model 3": (lambda: tp.load_model(3), "3 is not the name of a model"),
        "load_model mesh": (lambda: tp.load_model("tiny", mesh=3), "3 is not a mesh"),
        "save_model": (lambda: tp.save_model(bank, model), "the name of a model"),
        "save_model 3": (lambda: tp.save_model(model, 3), "3 is not a folder"),
        "save_model nul": (lambda: tp.save_model(model, "a\0b"), "a character that no path can have"),
        "export": (lambda: tp.export_model(bank, model), "the name of a model"),
        "export requests": (lambda: tp.export_model(model, bank, requests="a.jsonl"), "is no list of requests"),
        "export memory": (lambda: tp.export_model(model, bank, memory=3), "3 is not a text file"),
        "create_bank": (lambda: tp.create_bank(model, bank), "a Model is not a folder"),
        "create_bank name": (lambda: tp.create_bank(bank, "tiny"), "load it first"),
        "create_bank method": (lambda: tp.create_bank(bank, model, method=3), "3 is not the name of a method"),
        "create_bank settings": (lambda: tp.create_bank(bank, model, settings="paper"), "'paper' is not settings"),
        "open_bank": (lambda: tp.open_bank(model), "a Model is not the folder of a bank"),
        "add_edits": (lambda: tp.add_edits(model, bank, [REQUEST]), "a Model is not the folder of a bank"),
        "add_edits swapped": (lambda: tp.add_edits(bank, [REQUEST], model), "a list is no model"),
        "add_edits strings": (lambda: tp.add_edits(bank, model, ["abc"]), "request 0: str instead of an object"),
        "add_edits one": (lambda: tp.add_edits(bank, model, REQUEST), "is no list of requests"),
        "add_edits prompt": (lambda: tp.add_edits(bank, model, [tp.EditRequest(3, "b")]), "'prompt' is int"),
        "add_edits batch": (lambda: tp.add_edits(bank, model, [REQUEST], batch="5"), "batch is '5'"),
        "add_edits resume": (lambda: tp.add_edits(bank, model, [REQUEST], resume="no"), "'no' is not True or False"),
        "disable": (lambda: tp.disable_edits(["x"], bank), "a list is not the folder of a bank"),
        "enable model": (lambda: tp.enable_edits(bank, model, ["x"]), "a Model is not the id of an edit"),
        "remove request": (lambda: tp.remove_edits(bank, REQUEST), "an EditRequest is not the id of an edit"),
        "remove 3": (lambda: tp.remove_edits(bank, 3), "3 is not the id of an edit"),
        "bank_patch": (lambda: tp.bank_patch(model, bank), "a Model is not the folder of a bank"),
        "bank_model": (lambda: tp.bank_model(bank, "tiny"), "load it first"),
        "verify_bank": (lambda: tp.verify_bank(bank, None), "None is no model"),
        "guard": (lambda: tp.guard_bank(model, bank), "a Model is not the folder of a bank"),
        "guard 3": (lambda: tp.guard_bank(bank, model, [3]), "3 is not a prompt"),
        "guard triple": (lambda: tp.guard_bank(bank, model, [("a", "b", "c")]), "a tuple is not a prompt"),
        "guard tokens": (lambda: tp.guard_bank(bank, model, ["a"], tokens="3"), "tokens is '3'"),
        "show": (lambda: tp.show([REQUEST]), "list cannot be shown"),
        "show model": (lambda: tp.show(PATCHES, model="tiny", text="a"), "load it first"),
        "show text": (lambda: tp.show(PATCHES, model=model, text=3), "3 is not a text"),
        "show info": (lambda: tp.show(PATCHES, info=PATCHES), "a dict is not an EditInfo"),
        "generate bytes": (lambda: model.generate(b"the in"), r"b'the in' is no prompt; decode it first"),
        "generate chat": (lambda: model.generate([{"role": "user"}]), "apply_chat_template.*pip install jinja2"),
        "generate count": (lambda: model.generate("the", "2"), "max_new_tokens is '2'; give a whole number, 1 or more"),
        "generate none": (lambda: model.generate("the", 0), "max_new_tokens is 0"),
        "encode": (lambda: model.encode(b"the"), "is no prompt"),
        "encode_target": (lambda: model.encode_target("the", None), "None is no prompt; give a text"),
        "decode": (lambda: model.decode("abc"), "'abc' is no list of token ids"),
        "decode negative": (lambda: model.decode([-1]), "a list is no list of token ids"),
        "apply": (lambda: model.apply(np.zeros((1, 3))), "the tokens are float64; give an array of token ids"),
        "layer": (lambda: model.layer("1"), "layer '1' is no number of a layer"),
        "layer True": (lambda: model.layer(True), "layer True is no number of a layer"),
        "resume": (lambda: model.resume("x", "y"), "'x' is not a Trace"),
        "finetune": (lambda: tp.finetune("minilm", bank, [("a", "b")]), "a list is not a folder for the model"),
        "finetune pairs": (lambda: tp.finetune("minilm", ["a", "b"], bank), "example 0 is 'a'; give a pair"),
        "finetune settings": (lambda: tp.finetune("minilm", [("a", "b")], bank, settings=3), "3 is not settings"),
        "finetune labels": (lambda: tp.finetune("minilm", [("a", "b")], bank, labels="b"), "labels is one text"),
        "create_memory": (lambda: tp.create_memory(["text"]), "the queries of a memory are a list"),
        "create_memory 1d": (lambda: tp.create_memory(np.ones(4)), r"are an array \[4\]"),
        "create_memory weight": (lambda: tp.create_memory(jnp.eye(4), weight=7), "weight is 7"),
    }


NAMES = list(mistakes(make_tiny_model(), Path("nowhere")))


@pytest.mark.parametrize("name", NAMES)
def test_arguments_of_another_kind_or_order_are_named(tiny_model, tmp_path, name):
    call, message = mistakes(tiny_model, tmp_path)[name]
    with pytest.raises(tp.TPatchError, match=message):
        call()
    assert not list(tmp_path.iterdir())


def test_a_fit_says_which_argument_is_another():
    query = jnp.ones((1, 4))
    problem = tp.FitProblem(query, query, jnp.zeros((0, 4)), None, jnp.array(3), jnp.ones(4), jnp.array(1.0))
    memory = tp.create_memory(jax.random.normal(jax.random.key(0), (64, 4)))
    given = (problem, memory, lambda context, output: output, jax.random.key(0), tp.FitSettings(), jax.nn.relu)
    for place, wrong, message in [
        (0, memory, "a Memory is not a FitProblem"),
        (0, problem._replace(query=jnp.ones((1, 5))), "are 5, 4, 4, 4, 4 wide"),
        (1, problem, "a FitProblem is not a Memory"),
        (2, None, "head is None; give a function"),
        (3, 0, "0 is no typed random key; give jax.random.key"),
        (4, {"key_steps": 1}, "a dict is not FitSettings"),
        (5, "relu", "activation is 'relu'; give a function"),
    ]:
        arguments = [*given[:place], wrong, *given[place + 1 :]]
        for function in (tp.fit, tp.fit_many):
            with pytest.raises(tp.TPatchError, match=message):
                function(*arguments)


@pytest.mark.parametrize(
    ("layers", "said"), [(1, "with one layer"), (2, "with the 2 layers.*site=subject and layer=0")]
)
def test_a_small_model_says_why_a_subject_is_edited_in_the_last_layer(letters, layers, said):
    settings = {"attempts": 1, "fit.key_steps": 8}
    model = make_tiny_model(num_hidden_layers=layers)
    _, info = edit(model, letters, settings=settings)
    (result,) = info.requests
    assert (result.site, result.status) == ("last", "edited")
    assert re.search(f"edited in the last layer: {said}", result.reason)
    with pytest.raises(tp.TPatchError, match=r"is the last one of 'tiny'.*use site=last"):
        edit(model, letters, settings={"site": "subject"})


def test_a_request_without_a_subject_says_why_it_is_edited_in_the_last_layer(tiny_model, letters):
    settings = {"site": "subject", "attempts": 1, "fit.key_steps": 8}
    _, info = edit(tiny_model, letters, [tp.EditRequest("the in a", "b")], settings=settings)
    assert info.requests[0].reason == "edited in the last layer: it has no subject"
