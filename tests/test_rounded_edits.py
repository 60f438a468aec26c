"""Edits that outlive rounding: what is foreseen of a tool's INT8, and what is given back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from conftest import make_tiny_model
from hand_patches import spoken_patch, with_outliers
from tiny_families import tiny_model

from tpatch_jax.core import ffn
from tpatch_jax.core.per_tensor import merge_per_tensor
from tpatch_jax.models.checkpoints.export import ask_requests, export_model
from tpatch_jax.models.checkpoints.rounded_edits import ask_rounded, round_weights, strengthen_edits
from tpatch_jax.models.model import Model, load_model
from tpatch_jax.models.patching import merge
from tpatch_jax.requests import EditRequest

pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths")

REQUESTS = [
    EditRequest("the hen", "q", join="none", id="hen"),
    EditRequest("a big cat", "x", join="none", id="cat"),
    EditRequest("one owl", "z", join="none", id="owl"),
]


def edited(loud: float = 400.0) -> tuple[Model, np.ndarray, list]:
    """A model with a neuron for each request, as a safe export merges it, its neurons, and what is asked."""
    model = with_outliers(make_tiny_model(hidden_size=32, head_dim=16))
    last = model.config.layers - 1
    network = merge_per_tensor(model.params["layers"][last]["ffn"], spoken_patch(model, REQUESTS, loud=loud), None)
    layers = {**model.params["layers"], last: {**model.params["layers"][last], "ffn": network}}
    wider = model.with_params({**model.params, "layers": layers})
    places = np.arange(ffn.width(model.params["layers"][last]["ffn"]), ffn.width(network))
    return wider, places, ask_requests(wider, REQUESTS)


def plain_margin(model: Model, row: list[int], places: range) -> float:
    said = np.asarray(model.apply(jnp.asarray([row[:-1]])))[0, places.start : places.stop].copy()
    wanted = np.asarray(row[places.start + 1 : places.stop + 1])
    right = said[np.arange(len(wanted)), wanted]
    said[np.arange(len(wanted)), wanted] = -np.inf
    return float((right - said.max(1)).min())


def test_without_rounding_requests_are_asked_as_ever():
    model, places, asked = edited()
    last = model.config.layers - 1
    answers = ask_rounded(model, model, {last: places}, [asked[2], asked[0]], 0.0)
    assert answers.margins == pytest.approx([plain_margin(model, *asked[number]) for number in (2, 0)], abs=1e-3)
    row, spots = asked[2]
    query = model.trace(jnp.asarray([row[:-1]]), last).query[0]
    gate = model.params["layers"][last]["ffn"]["gate"]
    wanted = np.asarray(query @ gate["kernel"][:, places] + gate["bias"][places])
    assert answers.inputs[0][last] == pytest.approx(wanted, rel=1e-4, abs=1e-2)
    # a request's neuron fires at the last token of its prompt
    assert answers.inputs[0][last][spots.start].argmax() == 2


def test_a_text_is_rounded_by_itself_whatever_runs_beside_it():
    model, places, asked = edited()
    light, neurons = round_weights(model, head=True), {model.config.layers - 1: places}
    together = ask_rounded(model, light, neurons, asked, 127.0)
    alone = [ask_rounded(model, light, neurons, [asked[number]], 127.0).margins[0] for number in range(3)]
    assert together.margins == pytest.approx(alone, abs=1e-3)
    assert together.margins != pytest.approx([plain_margin(model, *one) for one in asked], abs=1e-2)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_what_is_foreseen_is_what_torch_makes_of_it(tmp_path, letters):
    torch = pytest.importorskip("torch", reason="torch is only needed to compare with it: the 'parity' extra")
    plain = with_outliers(make_tiny_model(hidden_size=32, head_dim=16))
    merged = merge(plain, spoken_patch(plain, REQUESTS))
    export_model(merged, tmp_path / "safe", safe_for="per-tensor", requests=REQUESTS, memory=letters, cache=False)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "safe", dtype=torch.float32).eval()
    light = torch.ao.quantization.quantize_dynamic(stock, {torch.nn.Linear}, dtype=torch.qint8)
    model = load_model(tmp_path / "safe")
    asked = ask_requests(model, REQUESTS)
    foreseen = ask_rounded(model, round_weights(model, head=True), {}, asked, 127.0).margins
    seen = []
    for row, spots in asked:
        with torch.no_grad():
            said = light(torch.tensor([row[:-1]])).logits[0, spots.start : spots.stop].numpy()
        wanted = np.asarray(row[spots.start + 1 : spots.stop + 1])
        right = said[np.arange(len(wanted)), wanted].copy()
        said[np.arange(len(wanted)), wanted] = -np.inf
        seen.append(float((right - said.max(1)).min()))
    assert foreseen == pytest.approx(seen, rel=0.15)
    assert min(seen) > 0


def least_margins(model: Model, neurons: dict, asked: list) -> np.ndarray:
    light = round_weights(model, head=True)
    return np.min([ask_rounded(model, light, neurons, asked, levels).margins for levels in (0, 127, 255)], 0)


def test_an_edit_that_rounding_would_take_is_said_more_strongly_and_no_weight_changes():
    model, places, asked = edited(loud=60.0)
    last = model.config.layers - 1
    stronger = strengthen_edits(model, {last: places}, asked)
    before, after = (least_margins(one, {last: places}, asked) for one in (model, stronger))
    assert before.min() < 3
    assert np.all(after[before < 3] > before[before < 3])
    changed = [
        jax.tree_util.keystr(path)
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(model.params), jax.tree.leaves(stronger.params), strict=True
        )
        if not np.array_equal(old, new)
    ]
    assert set(changed) == {f"['layers'][{last}]['ffn']['{name}']['bias']" for name in ("gate", "up")}
    for name in ("gate", "up"):
        old, new = (one.params["layers"][last]["ffn"][name]["bias"] for one in (model, stronger))
        assert np.array_equal(old[: places[0]], new[: places[0]])
        assert np.all(new[places] >= old[places])


def test_what_holds_by_far_is_not_said_more_strongly(monkeypatch):
    monkeypatch.setattr("tpatch_jax.models.checkpoints.rounded_edits.AIM", 1.0)
    model, places, asked = edited()
    last = model.config.layers - 1
    assert least_margins(model, {last: places}, asked).min() > 1
    stronger = strengthen_edits(model, {last: places}, asked)
    old, new = (one.params["layers"][last]["ffn"]["up"]["bias"] for one in (model, stronger))
    assert np.array_equal(old, new)


def test_what_is_no_plain_decoder_stays_as_it_is():
    for family in ("t5", "gpt2"):
        model = tiny_model(family)
        assert strengthen_edits(model, {}, [([1, 2], range(1))]) is model
    t5 = tiny_model("t5")
    assert strengthen_edits(t5, {0: np.arange(2)}, [([1, 2], range(1))]) is t5
