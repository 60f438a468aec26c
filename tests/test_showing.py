"""What is shown: fragments for notebooks, and pages that need nothing but themselves."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from bank_engine import fake, make_bank
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import tiny_model as tiny_model_of

import tpatch_jax as tp
from tpatch_jax.bank import patches as store
from tpatch_jax.bank.adding import add_with
from tpatch_jax.bank.assembly import Store, assemble
from tpatch_jax.bank.inspection import open_bank
from tpatch_jax.bank.state import active
from tpatch_jax.cli import main as cli
from tpatch_jax.core.patch import preactivations, take
from tpatch_jax.display.bank import cross_activations
from tpatch_jax.display.edit import answers
from tpatch_jax.display.markup import element, table, written
from tpatch_jax.display.page import page
from tpatch_jax.display.tokens import activations_at, activations_on
from tpatch_jax.display.view import Shown
from tpatch_jax.models.networks import Trace

pytestmark = pytest.mark.usefixtures("quick_compilation")

NASTY = '<script>alert("1")</script>'
VOID = {"meta", "link", "img", "br"}
# A picture of one pixel.
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001a5f6"
    "45400000000049454e44ae426082"
)


class Document(HTMLParser):
    """The elements of a document with their attributes, its texts, and whether it is balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], tuple[str, ...]]] = []
        self.texts: list[str] = []
        self.open: list[tuple[str, dict[str, str]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        above = tuple(f"{name}.{attributes.get('class', '')}" for name, attributes in self.open)
        self.elements.append((tag, dict(attrs), above))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1][0] not in ("style", "title"):
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes, _ in self.elements if name == tag]


def check_safe(text: str) -> Document:
    """Nothing in it runs, and nothing is fetched."""
    document = Document(text)
    tags = {tag for tag, _, _ in document.elements}
    assert not tags & {"script", "iframe", "object", "embed", "form", "base"}
    for _, attributes, _ in document.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "action", "srcset"):
            assert attributes.get(name, "data:").startswith("data:")
    style = "".join(part.split("</style>")[0] for part in text.split("<style>")[1:])
    assert "url(" not in style
    assert "@import" not in style
    for tag, _, above in document.elements:
        assert tag != "table" or above[-1] == "div.scroll"
    return document


def check_page(path: Path) -> Document:
    """One self-contained page, legible on a phone, in the dark and to those who cannot see it."""
    text = path.read_text("utf-8")
    document = check_safe(text)
    assert text.startswith("<!DOCTYPE html>")
    assert document.all("html")[0]["lang"] == "en"
    assert [meta["content"] for meta in document.all("meta") if meta.get("name") == "viewport"] == [
        "width=device-width, initial-scale=1"
    ]
    assert "prefers-color-scheme: dark" in text
    assert "default-src 'none'" in text
    assert len(document.all("h1")) == 1
    assert all(len(image["alt"]) > 20 for image in document.all("img"))
    assert all(drawing["role"] == "img" and drawing["aria-label"] for drawing in document.all("svg"))
    return document


@given(st.text())
def test_any_text_comes_out_as_it_went_in(text):
    kept = "".join(one if one in "\n\t" or (one >= " " and one != "\x7f") else "\ufffd" for one in text)
    document = Document(written(element("p", text, element("b", "", title=text), text)))
    assert "".join(document.texts) == kept * 2
    assert document.all("b")[0]["title"].replace("\n", " ") == kept.replace("\n", " ")


def test_half_a_surrogate_pair_can_be_written():
    assert written(element("p", "a\ud800")).encode() == b"<p>a?</p>"


def test_rows_must_fit_their_columns():
    with pytest.raises(tp.TPatchError, match="a row of 1 cells does not fit 2 columns"):
        table(["a", "b"], [["1"]])


def patch_of(neurons: int = 3, seed: int = 2) -> tp.Patch:
    draw = np.random.default_rng(seed).normal
    key, bias, value = (jnp.asarray(draw(size=shape), jnp.float32) for shape in ((neurons, 16), neurons, (neurons, 16)))
    return tp.Patch(key, bias, value)


REQUESTS = (
    tp.EditRequest("the cat", "ab", rephrases=("a cat",), locality=("the inn",), id=NASTY),
    tp.EditRequest("in the inn", NASTY, id="inn"),
)
INFO = tp.EditInfo(
    (
        tp.RequestInfo(
            NASTY, True, "edited", neurons={0: (0,), 2: (1,)}, steps=64, losses={"l_e": 0.0123}, margin=0.25
        ),
        tp.RequestInfo("inn", False, "failed", "it [b]does[/b] not come out"),
    ),
    *(1.5, 1.0, 20.25, 10.0, 99),
)


def test_a_patch_is_its_neurons():
    patch = patch_of()
    shown = tp.show({2: take(patch, [1, 2]), 0: take(patch, [0])}, info=INFO, requests=REQUESTS)
    document = check_safe(shown._repr_html_())
    assert repr(shown) == str(shown) == shown.text
    for text in (shown.text, "\n".join(document.texts)):
        assert "3 neurons of width 16, 99 parameters" in text
        assert "1 in layer 0, 2 in layer 2" in text
        for n in range(3):
            assert f"{float(jnp.linalg.norm(patch.key[n])):.4g}" in text
            assert f"{float(patch.bias[n]):.4g}" in text
    # Neurons 0 and 2 belong to the first request, neuron 1 to none.
    assert document.texts.count(NASTY) == 2
    assert document.texts.count("the cat") == 2
    rows = [line for line in shown.text.splitlines() if any(f"{float(b):.4g}" in line for b in patch.bias)]
    assert ["the cat" in line for line in rows] == [True, False, True]
    assert "‖value‖" in tp.show(patch).text
    assert "6 neurons" in tp.show(tp.Patch(*(jnp.stack([leaf, leaf]) for leaf in patch))).text
    assert "3 neurons" in tp.show(patch._replace(key=patch.key.astype(jnp.bfloat16))).text


def test_saved_patches_know_their_requests(tiny_model, tmp_path):
    patch = patch_of(2)
    info = INFO._replace(requests=(INFO.requests[0]._replace(neurons={2: (0, 1)}), INFO.requests[1]))
    store.save_patches(tmp_path / "patches", tiny_model, patch, REQUESTS, info)
    assert check_safe(tp.show(store.read_patches(tmp_path / "patches")).html).texts.count(NASTY) == 2


def test_tokens_tell_what_fires_where(tiny_model):
    whole, text = patch_of(4), f"the {NASTY} inn"
    patches = {2: take(whole, [2, 3]), 0: take(whole, [0, 1])}
    tokens, activations = activations_on(tiny_model, patches, text)
    assert tokens == tiny_model.encode(text)
    # A neuron of an earlier layer changes the queries of later ones. Lower layers come first.
    attached = tp.attach(tiny_model, patches, relu=True)
    for layer, chosen in ((0, [0, 1]), (2, [2, 3])):
        query = attached.trace(jnp.asarray([tokens]), layer).query[0]
        wanted = jnp.maximum(preactivations(whole, query)[:, jnp.asarray(chosen)], 0)
        np.testing.assert_allclose(activations[:, chosen], wanted, rtol=1e-4, atol=1e-4)
    plain = tiny_model.trace(jnp.asarray([tokens]), 2)
    assert np.abs(activations[:, 2:] - activations_at(patches, plain)[0][:, 2:]).max() > 1e-2
    assert not activations_at(patches, plain)[0][:, :2].any()

    shown = tp.show(patches, model=tiny_model, text=text)
    page_ = check_safe(shown.html)
    spans = page_.all("span")
    assert len(spans) == len(tokens)
    for span, row in zip(spans, activations, strict=True):
        assert ("rgba" in span.get("style", "")) == bool(row.any()) == ("silent" not in span["title"])
        assert all(f"neuron {n}: {row[n]:.4g}" in span["title"] for n in np.flatnonzero(row))
    assert sum(tag == "tr" for tag, _, _ in page_.elements) == 1 + np.count_nonzero(activations)
    assert shown.text.count("\n") > np.count_nonzero(activations)
    mute = {layer: patch._replace(bias=jnp.full(2, -1e6)) for layer, patch in patches.items()}
    silent = tp.show(mute, model=tiny_model, text="the inn")
    assert "None of 4 neurons fires" in silent.text
    assert not any("rgba" in span.get("style", "") for span in Document(silent.html).all("span"))


def test_an_edit_is_what_is_said_before_and_after(tiny_model):
    patch = patch_of()
    shown = tp.show(INFO, requests=REQUESTS, model=tiny_model, patch=patch)
    document = check_safe(shown.html)
    tokens = len(tiny_model.encode(f" {NASTY}"))
    prompts = ["the cat", "a cat", "the inn", "in the inn"]
    cells = [element("p", text.strip()) for model in (tiny_model, tp.attach(tiny_model, patch))
             for text in answers(model, prompts, tokens)]  # fmt: skip
    assert {cell.text or "" for cell in cells} <= {*document.texts, ""}
    for text in (shown.text, "\n".join(document.texts)):
        assert "2 requests, 1 edited, 1 failed" in text
        assert "20.25 forward equivalents" in text
        assert "no: it [b]does[/b] not" in text
        assert "0.25" in text
        assert "l_e 0.012" in text
    asked = [text for text in document.texts if text in ("edit", "rephrase", "elsewhere")]
    assert asked == ["edit", "rephrase", "elsewhere", "edit"]
    assert "in the inn" in tp.show(INFO, requests=REQUESTS).text
    assert "1 failed" in tp.show(INFO).text


def test_a_trace_is_its_rows(tiny_model):
    batch = jnp.asarray([tiny_model.encode("the inn")[:4], tiny_model.encode("in the inn")[:4]])
    traced, patch = tiny_model.trace(batch), patch_of(1)
    assert "layer 2, 2 by 4 tokens of width 16" in tp.show(traced).text
    shown = tp.show(traced, patch={0: patch_of(1, seed=3), 2: patch}, model=tiny_model, tokens=batch)
    document = check_safe(shown.html)
    assert len(document.all("span")) == 8
    strongest = np.maximum(np.asarray(preactivations(patch, traced.query))[..., 0], 0)
    assert f"{strongest.max():.4g}" in document.texts
    assert f"{float(jnp.linalg.norm(traced.output[1, 3])):.4g}" in document.texts


def test_what_cannot_be_shown_says_so(tiny_model):
    patch = patch_of()
    traced = Trace(jnp.ones((1, 2, 16)), jnp.ones((1, 2, 16)), {"residual": jnp.ones((1, 2, 16))}, 2)
    wrong = {
        "int cannot be shown": (3, {}),
        "info= says nothing about a trace|text= says nothing": (traced, {"text": "a"}),
        "give both `model=` and `text=`": (patch, {"text": "a"}),
        "need all of": (INFO, {"model": tiny_model}),
        "stands in `info`": (patch, {"requests": REQUESTS}),
        "are not the 2 that": (patch, {"info": INFO, "requests": REQUESTS[:1]}),
        "the text is empty": (patch, {"model": tiny_model, "text": ""}),
        "shorten the prompt": (patch, {"model": tiny_model, "text": "x" * 100}),
        "a patch is attached": (patch, {"model": tp.attach(tiny_model, patch), "text": "a"}),
        "a patch is merged": (patch, {"model": tp.merge(tiny_model, patch), "text": "a"}),
        "give the batch that was traced": (traced, {"tokens": jnp.ones((1, 3), jnp.int32)}),
        "a patch has a key": ({2: patch, 0: patch._replace(bias=jnp.ones(5))}, {}),
    }
    for message, (thing, more) in wrong.items():
        with pytest.raises(tp.TPatchError, match=message):
            tp.show(thing, **more)


@pytest.fixture
def bank(tmp_path) -> Path:
    """Seven edits, one of them superseded, with texts that are markup."""
    folder = make_bank(tmp_path / "bank")
    names = ["a", "b", "c", "d", "e", NASTY]
    add_with(folder, [tp.EditRequest(name, f"soft{NASTY}", id=f"id {name}") for name in names], fake)
    add_with(folder, [tp.EditRequest("a", "soft", id="later")], fake)
    return folder


def test_a_bank_becomes_a_page(bank, tmp_path, capsys):
    assert cli.main(["report", str(bank), "-o", str(tmp_path / "page.html"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: said[name] for name in ("kind", "edits", "active", "superseded")} == {
        "kind": "bank",
        "edits": 7,
        "active": 6,
        "superseded": 1,
    }
    assert said["bytes"] == (tmp_path / "page.html").stat().st_size
    document = check_page(tmp_path / "page.html")
    assert f"id {NASTY}" in document.texts
    assert f"soft{NASTY}" in document.texts
    assert document.texts.count("active") == 6 + 1
    assert len(document.all("svg")) == 2
    shown = tp.show(open_bank(bank))
    check_safe(shown.html)
    assert "6 active, 1 superseded" in shown.text


def test_an_edit_fires_on_what_its_bank_remembers(bank):
    opened = open_bank(bank)
    held = assemble(opened, active(opened), Store.new())
    activations = cross_activations(held, 2)
    for row, edit in enumerate(held.edits):
        rows = np.flatnonzero(held.owner == row)
        for column, piece in enumerate(held.pieces):
            z = piece["earlier_query"] @ held.neurons["key"][rows].T + held.neurons["bias"][rows]
            assert activations[row, column] == pytest.approx(max(0.0, float(z.max()))), edit.id
    assert np.count_nonzero(np.diag(activations)) >= 5


@pytest.fixture
def report(tmp_path) -> Path:
    """A report folder of one method whose every text is nasty."""
    folder = tmp_path / "report"
    folder.mkdir()
    cost = {"seconds": 12.5, "forward_equivalents": 1234.0, "parameters_added": 99}
    lines = [
        {"id": f"{NASTY} {n}", "figures": {"exact": float(n > 2)}, "requests": [{"status": "edited"}]}
        for n in range(320)
    ]
    lines[1]["requests"] = [{"status": "failed", "reason": "too long"}]
    results = [
        {"method": method, "protocol": "batch", "moment": "after all edits", "n": 320, "metrics": {"exact": share}}
        for method, share in (("unedited", 0.25), ("tpatcher", 0.75))
    ]
    results = [{**result, "cost": cost, "requests": {"edited": 3, "failed": 1}} for result in results]
    config = {"methods": ["tpatcher"], "model": f"tiny{NASTY[:7]}", "n": 320, "seed": 0, "data": NASTY, "text": None}
    whole = {"schema": 1, "config": config, "results": results, "versions": {"jax": NASTY}, "data_sha256": "0a5553"}
    (folder / "report.json").write_text(json.dumps(whole), "utf-8")
    (folder / "records-tpatcher.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    (folder / "records-unedited.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    (folder / "cost.png").write_bytes(PNG)
    (folder / "activations-tpatcher.png").write_bytes(PNG)
    return folder


def test_a_report_becomes_a_page(report, tmp_path, capsys):
    target = tmp_path / "deeper" / "page.html"
    assert cli.main(["report", str(report), "-o", str(target)]) == 0
    assert "tpatcher on tiny<script" in capsys.readouterr().out
    document = check_page(target)
    assert len(document.all("img")) == 2
    assert {"0.25", "0.75", "1,234", "tpatcher: of the requests, 3 edited, 1 failed."} <= set(document.texts)
    assert [cell["style"].split("%")[0][-4:] for cell in document.all("td") if "gradient" in cell.get("style", "")] == [
        "25.0",
        "75.0",
    ]
    # What failed comes first, and what is left out is counted.
    ids = [text for text in document.texts if text.startswith(f"{NASTY} ")]
    assert ids[:4] == [f"{NASTY} {n}" for n in range(4)]
    assert len(ids) == 300
    assert any("20 more are in records-tpatcher.jsonl" in text for text in document.texts)
    assert document.texts.count("no") == 3 * 2
    assert (document.texts.count("too long"), document.texts.count("edited")) == (1, 299)


def test_a_page_has_the_records_one_by_one(report, tmp_path):
    path = report / "records-tpatcher.jsonl"
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    lines[0]["asked"] = [{"prompt": "Paris <b> is", "target": "old", "before": " in France.", "after": None}]
    lines[0]["probes"] = [
        {"kind": "reliability", "prompt": "good one", "target": "a", "before": False, "after": True, "changed": True},
        {
            "kind": "rewrite_true",
            "prompt": "still the former",
            "target": "b",
            "before": 1,
            "after": 1,
            "changed": False,
        },
        {"kind": "locality", "prompt": "left alone", "target": "c", "before": 0, "after": 0, "changed": False},
        {"kind": "neighborhood_true", "prompt": "never right", "target": "d", "before": 0, "after": 0, "changed": True},
        {"kind": "locality", "prompt": "one that changed", "changed": True},
    ]
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    assert cli.main(["report", str(report), "-o", str(tmp_path / "page.html")]) == 0
    texts = check_page(tmp_path / "page.html").texts
    assert {"Paris <b> is", "in France.", "3 of 5 as wanted"} <= set(texts)
    prompts = [probe["prompt"] for probe in lines[0]["probes"]]
    # what is amiss comes first
    assert [text for text in texts if text in prompts] == [prompts[n] for n in (1, 4, 0, 2, 3)]


def test_pictures_are_drawn_where_there_are_none(report, tmp_path):
    for path in report.glob("*.png"):
        path.unlink()
    assert cli.main(["report", str(report), "-o", str(tmp_path / "page.html")]) == 0
    assert len(check_page(tmp_path / "page.html").all("img")) == 2
    assert list(report.glob("*.png")) == []


def test_no_page_without_something_to_show(bank, report, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (report / "records-tpatcher.jsonl").write_text('{"id": 3}\n', "utf-8")
    damaged = next((bank / "segments").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", "utf-8")
    for folder, output, message in (
        ("empty", "page.html", "neither a bank nor a finished report"),
        ("model", "page.html", "it holds a model"),
        ("bank", "page.txt", "ends in .html"),
        ("bank", "page.html", "tpatch bank repair"),
        ("report", "page.html", "is damaged"),
    ):
        assert cli.main(["report", str(tmp_path / folder), "-o", str(tmp_path / output)]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_page_takes_the_place_of_an_older_one_only_when_it_is_whole(bank, tmp_path):
    target = tmp_path / "page.html"
    target.write_text("older", "utf-8")
    assert cli.main(["report", str(bank), "-o", str(target)]) == 0
    assert "older" not in target.read_text("utf-8")
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ""] == ["page.html"]


def test_a_page_has_one_title():
    document = Document(page("a < b", [element("p", "c")]))
    assert document.texts.count("a < b") == 1


def test_every_other_kind_of_network_shows_its_tokens():
    for family in ("bert", "bart"):
        model = tiny_model_of(family)
        patch = patch_of(2)._replace(
            key=jnp.ones((2, model.config.hidden_size)), value=jnp.ones((2, model.config.hidden_size))
        )
        tokens, activations = activations_on(model, patch, "the inn")
        assert activations.shape == (len(tokens), 2)
        assert isinstance(tp.show(patch, model=model, text="the inn"), Shown)


def test_a_folder_of_another_kind_is_named(bank, report, capsys):
    wanted = (
        (["inspect", str(bank)], "it is a bank, which `tpatch bank list`"),
        (["inspect", str(report)], "it holds a report, which `tpatch report`"),
        (["compare", str(bank)], "it is a bank"),
        (["bank", "list", str(report)], "it holds a report"),
    )
    for arguments, message in wanted:
        assert cli.main(arguments) == 1
        assert message in capsys.readouterr().err
