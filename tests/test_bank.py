"""The bank with T-Patcher itself, on the tiny model: from the command line and from Python."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import make_tiny_model, same, write_tiny_folder
from tiny_families import tiny_model as tiny_model_of

import tpatch_jax as tp
from tpatch_jax.bank import engine as engine_
from tpatch_jax.bank import sharing
from tpatch_jax.bank.assembly import Store, assemble
from tpatch_jax.bank.creating import load_banked_model
from tpatch_jax.bank.state import active, states
from tpatch_jax.cli import main as cli
from tpatch_jax.core.layers import count_neurons
from tpatch_jax.models.rows import tokens_array
from tpatch_jax.models.sentences import say
from tpatch_jax.requests import EditRequest

PROMOTION = "standard"  # optax takes steps
pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths", "restored")

MEMORY = (
    "The theory in the inn: winter thins the herd, and the hen then hides. Numbers 1 to 9, and then some more. " * 3
)
QUICK = {"key_steps": 24, "value_steps": 8, "lanes": 4, "rounds": 1, "negatives": 32, "attempts": 2}
REQUESTS = (
    EditRequest("the cat sat in", "ab", id="cat"),
    EditRequest("in the inn", "h", id="inn"),
    EditRequest("who hit the", "q", subject="who", id="who"),
    EditRequest("then the herd", "zz", id="herd"),
)


@pytest.fixture(scope="module")
def memory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "memory.txt"
    path.write_text(MEMORY, "utf-8")
    return path


@pytest.fixture(scope="module")
def place(tiny_model, memory, tmp_path_factory) -> Iterator[Path]:
    """A folder with a model, a file of requests, and a bank of them in two batches."""
    folder = tmp_path_factory.mktemp("bank")
    write_tiny_folder(tiny_model, folder / "tiny")
    lines = [{"id": one.id, "prompt": one.prompt, "target": one.target, "subject": one.subject} for one in REQUESTS]
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", "utf-8")
    with pytest.MonkeyPatch.context() as patching:
        patching.setenv("TPATCH_CACHE", str(folder / "cache"))
        patching.setenv("COLUMNS", "200")
        quick = [text for name, value in QUICK.items() for text in ("--set", f"{name}={value}")]
        init = ["--model", str(folder / "tiny"), "--memory", str(memory), "--set", "site=last", *quick]
        assert cli.main(["bank", "init", str(folder / "bank"), *init]) == 0
        assert cli.main(["bank", "add", str(folder / "bank"), str(folder / "requests.jsonl"), "--batch", "2"]) == 0
        yield folder


@pytest.fixture
def bank(place, tmp_path) -> Path:
    """The bank for one test alone."""
    folder = tmp_path / "copy of the bank"
    assert sharing.pull_bank(folder, place / "bank") == 2
    return folder


@pytest.fixture
def run(place, capsys):
    """Run a command; what its last line says."""

    def call(*arguments: Any, error: str = "") -> Any:
        capsys.readouterr()
        assert cli.main(["bank", *map(str, arguments), "--json"]) == int(bool(error))
        captured = capsys.readouterr()
        assert error in captured.err if error else captured.err == ""
        return json.loads(captured.out.splitlines()[-1])

    return call


def refused(capsys: pytest.CaptureFixture[str], arguments: list[Any], *words: str) -> None:
    capsys.readouterr()
    assert cli.main(["bank", *map(str, arguments)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("tpatch: ")
    assert said.count("\n") == 1
    for word in words:
        assert word in said


def says(model: tp.Model, request: EditRequest) -> bool:
    target = model.encode_target(request.prompt, f" {request.target}")
    return model.generate(request.prompt, len(target)) == model.decode(target)


def logits(model: tp.Model) -> np.ndarray:
    rows = [model.encode(one.prompt) for one in REQUESTS]
    return np.asarray(model.apply(tokens_array(rows, 16)))


def test_edits_of_several_batches_hold_together_after_the_merge(run, place, bank, tmp_path):
    assert run("verify", bank) == {"broken": [], "checked": 4, "guards_broken": [], "guards": 0}
    listed = run("list", bank)
    assert [entry["id"] for entry in listed["edits"]] == ["cat", "inn", "who", "herd"]
    assert {entry["state"] for entry in listed["edits"]} == {"active"}
    assert all({"prompt", "target", "neurons", "losses", "said_before"} <= set(entry) for entry in listed["edits"])
    merged = run("merge", bank, "-o", tmp_path / "merged")
    assert merged["neurons"] == sum(entry["neurons"] for entry in listed["edits"])
    model = tp.load_model(tmp_path / "merged")
    assert all(says(model, request) for request in REQUESTS)
    assert run("show", bank, "who")["history"][0]["op"] == "add"
    assert [record["op"] for record in run("log", bank)["records"]] == ["add", "add"]


def test_removing_the_last_is_as_if_it_had_never_been(run, place, bank):
    model = tp.load_model(place / "tiny")
    before = tp.bank_patch(bank, model)
    info = run("add", bank, "--prompt", "the cat hit", "--target", "k")
    assert info["added"] == ["edit-5"]
    changed = tp.bank_patch(bank, model)
    assert count_neurons(changed) > count_neurons(before)
    assert run("remove", bank, "edit-5") == {
        "ids": ["edit-5"], "states": {"edit-5": "removed"}, "refitted": [], "broken": [], "guards_broken": None,
    }  # fmt: skip
    after = tp.bank_patch(bank, model)
    assert same(before, after)
    assert logits(tp.merge(model, after)).tobytes() == logits(tp.merge(model, before)).tobytes()


def test_a_contradiction_supersedes_and_undoing_it_brings_the_old_answer_back(run, place, bank):
    model = tp.load_model(place / "tiny")
    info = run("add", bank, "--prompt", " the cat sat in", "--target", "yy")
    assert info["superseded"] == [{"id": "cat", "by": "edit-5"}]
    edited = tp.merge(model, tp.bank_patch(bank, model))
    assert says(edited, EditRequest("the cat sat in", "yy")) or not says(edited, REQUESTS[0])
    assert run("verify", bank)["broken"] == []
    assert run("disable", bank, "edit-5")["states"] == {"cat": "active", "edit-5": "disabled"}
    assert says(tp.merge(model, tp.bank_patch(bank, model)), REQUESTS[0])
    assert run("enable", bank, "edit-5")["states"] == {"cat": "superseded", "edit-5": "active"}
    assert run("verify", bank) == {"broken": [], "checked": 4, "guards_broken": [], "guards": 0}


def test_a_removed_edit_is_forgotten_and_the_others_hold(run, place, bank):
    model = tp.load_model(place / "tiny")
    assert run("remove", bank, "cat")["broken"] == []
    edited = tp.merge(model, tp.bank_patch(bank, model))
    assert [says(edited, request) for request in REQUESTS] == [False, True, True, True]


def test_what_was_committed_is_passed_over(run, place, bank):
    info = run("add", bank, place / "requests.jsonl", "--resume")
    assert (info["skipped"], info["added"]) == (4, [])


def test_a_guarded_answer_keeps_an_edit_out(run, place, bank):
    model = tp.load_model(place / "tiny")
    edited = tp.merge(model, tp.bank_patch(bank, model))
    # a random model says something that is text here and there
    prompt = next(text for text in map("the {}".format, "abcdefghijklmnopq") if edited.generate(text, 1).isalnum())
    (guard,) = run("guard", bank, "--prompt", prompt, "--tokens", "1")["guards"]
    assert guard["prompt"] == prompt
    info = run("add", bank, "--prompt", prompt, "--target", "k", error="nothing is added")
    assert info["added"] == []
    assert "it would change the guarded answer" in info["failed"][0]["reason"]
    info = run("add", bank, "--prompt", prompt, "--target", "k", "--force")
    assert (info["added"], info["guards_broken"]) == (["edit-5"], [prompt])
    assert run("verify", bank)["guards_broken"] == [prompt]
    assert run("guard", bank, "--lift", prompt)["guards"] == []


def test_what_was_said_before_an_edit_is_said_of_its_own_accord(run, place, bank):
    model = tp.load_model(place / "tiny")
    listed = {entry["id"]: entry for entry in run("list", bank)["edits"]}
    # the first batch was added to an empty bank, the second beside it
    assert [listed[name]["said_before"] for name in ("cat", "inn")] == say(model, [one.prompt for one in REQUESTS[:2]])
    beside = tp.bank_model(bank, model)
    tp.remove_edits(bank, ["who", "herd"])
    then = tp.bank_model(bank, model)
    assert [listed[name]["said_before"] for name in ("who", "herd")] == say(then, [one.prompt for one in REQUESTS[2:]])
    assert say(beside, ["in the inn"]) != [listed["inn"]["said_before"]]
    # what supersedes an edit was said by that one before, and stays what was said when it is fitted again
    (said,) = say(then, ["in the inn"])
    run("add", bank, "--prompt", "in the inn", "--target", "j")
    shown = run("show", bank, "edit-5")
    assert shown["said_before"] == said
    assert said.strip().startswith("h")


def test_a_guarded_prompt_is_refused_without_the_model(run, place, bank, monkeypatch):
    model = tp.load_model(place / "tiny")
    edited = tp.bank_model(bank, model)
    prompt = next(text for text in map("the {}".format, "abcdefghijklmnopq") if edited.generate(text, 1).isalnum())
    (guard,) = run("guard", bank, "--prompt", prompt)["guards"]
    assert edited.generate(prompt, 24).startswith(guard["answer"])
    assert run("verify", bank)["guards_broken"] == []
    wrong = "k" if not guard["answer"].strip().startswith("k") else "m"

    def stop(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing has to be loaded")

    with monkeypatch.context() as patching:
        patching.setattr("tpatch_jax.cli.bank.add.load_banked", stop)
        info = run("add", bank, "--prompt", f"{prompt} ", "--target", wrong, error="nothing is added")
    ((name, *_, reason),) = [entry.values() for entry in info["failed"]]
    assert (name, info["added"]) == ("edit-5", [])
    assert "it would change the guarded answer" in reason
    # of several, the others are taken in
    (place / "two.jsonl").write_text(
        "\n".join(json.dumps({"prompt": text, "target": wrong}) for text in (prompt, "who hit a hen")) + "\n", "utf-8"
    )
    info = run("add", bank, place / "two.jsonl")
    assert (len(info["added"]), [entry["prompt"] for entry in info["failed"]]) == (1, [prompt])


def test_generate_answers_several_prompts_with_a_bank(place, bank, tmp_path, capsys):
    model = tp.bank_model(bank, tp.load_model(place / "tiny"))
    prompts = ["the cat sat in", "in the inn", "the cat"]
    wanted = [{"prompt": prompt, "text": model.generate(prompt, 4)} for prompt in prompts]
    (tmp_path / "prompts.txt").write_text("in the inn\n\nthe cat\n", "utf-8")
    for source in ([str(place / "tiny")], []):
        given = ["--prompt", prompts[0], "--file", str(tmp_path / "prompts.txt"), "--max-new-tokens", "4"]
        assert cli.main(["generate", *source, "--bank", str(bank), *given, "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"answers": wanted}
    asked = [text for prompt in prompts for text in ("--prompt", prompt)]
    assert cli.main(["generate", "--bank", str(bank), *asked, "--max-new-tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert all(f"{one['prompt']}{one['text']}".rstrip() in said for one in wanted)
    for arguments, error in (
        (["--bank", str(bank)], "nothing to continue"),
        (["--prompt", "a"], "no model is given"),
        (["--bank", str(bank), "--patches", str(bank), "--prompt", "a"], "not both"),
        (["--bank", str(bank), "--dtype", "bfloat16", "--prompt", "a"], "leave --dtype out"),
        (["--bank", str(tmp_path), "--prompt", "a"], "tpatch bank init"),
        (["--bank", str(bank), "--file", str(tmp_path / "none.txt")], "UTF-8 text file"),
    ):
        assert cli.main(["generate", *arguments]) == 1
        assert error in capsys.readouterr().err


def test_a_bank_is_exported(run, place, bank, tmp_path):
    exported = run("export", bank, "-o", tmp_path / "out")
    assert exported["output"] == str(tmp_path / "out")
    model = tp.load_model(place / "tiny")
    assert exported["neurons"] == count_neurons(tp.bank_patch(bank, model))
    again, edited = tp.load_model(tmp_path / "out"), tp.bank_model(bank, model)
    for request in REQUESTS:
        assert says(again, request)
        assert again.generate(request.prompt, 4) == edited.generate(request.prompt, 4)
    written = run("export", bank, "--format", "gguf", "-o", tmp_path / "out.gguf")
    assert (written["neurons"], written["type"]) == (exported["neurons"], "keep")
    again = tp.load_model(tmp_path / "out.gguf")
    assert all(says(again, request) for request in REQUESTS)


def test_banks_are_compared_and_brought_up_to_date(run, place, bank, tmp_path, capsys):
    assert run("add", bank, "--prompt", "the hen", "--target", "k")["added"] == ["edit-5"]
    run("add", bank, "--prompt", "in the inn", "--target", "j")
    diff = run("diff", place / "bank", bank)
    assert (diff["same_model"], diff["common"]) == (True, 2)
    assert diff["only_right"] == [["the hen", "k"]]
    assert diff["targets"] == [["in the inn", "h", "j"]]
    assert diff["states"] == [["in the inn", "h", "active", "superseded"]]
    copy = tmp_path / "copy"
    assert run("push", bank, copy) == {"lines": 4}
    assert run("push", bank, copy) == {"lines": 0}
    assert run("diff", bank, copy)["common"] == 4
    run("remove", copy, "edit-6")
    assert run("pull", bank, copy) == {"lines": 1}
    assert states(tp.open_bank(bank))["edit-6"] == "removed"
    run("remove", copy, "edit-5")
    run("disable", bank, "edit-5")
    refused(capsys, ["push", bank, copy], "have parted after line 5", "tpatch bank diff")
    refused(capsys, ["pull", bank, tmp_path / "none"], "does not exist")


def test_the_hub_is_asked_only_when_it_is_named(bank, tmp_path, monkeypatch):
    pushed: dict[str, Any] = {}

    class Hub:
        def repo_exists(self, name: str) -> bool:
            return "folder" in pushed

        def create_repo(self, name: str, **options: Any) -> None:
            pushed["name"] = name

        def repo_info(self, name: str) -> Any:
            return SimpleNamespace(sha=f"commit {pushed['commits']}")

        def upload_folder(self, **options: Any) -> None:
            assert options["parent_commit"] == (f"commit {pushed['commits']}" if "commits" in pushed else None)
            pushed["folder"] = tmp_path / "hub"
            sharing.push_bank(options["folder_path"], pushed["folder"])
            pushed["commits"] = pushed.get("commits", 0) + 1

        def snapshot_download(self, name: str, revision: str, local_dir: Path) -> None:
            if name == "nobody/nothing":
                raise ConnectionError("no route\nmore")
            if not pushed["folder"].exists():
                local_dir.mkdir()
                (local_dir / ".gitattributes").write_text("what the hub puts into a new repository")
                return
            assert revision == f"commit {pushed['commits']}"
            sharing.push_bank(pushed["folder"], local_dir)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert sharing.push_bank(bank, "hf://me/facts") == 2
    assert pushed["name"] == "me/facts"
    assert sharing.push_bank(bank, "hf://me/facts") == 0
    assert sharing.pull_bank(tmp_path / "mine", "hf://me/facts") == 2
    # A repository that was made on the hub, or before an upload that was cut short.
    shutil.rmtree(pushed["folder"])
    with pytest.raises(tp.TPatchError, match="hf://me/facts holds no bank; `tpatch bank push`"):
        sharing.pull_bank(tmp_path / "mine", "hf://me/facts")
    assert sharing.push_bank(bank, "hf://me/facts") == 2
    assert pushed["commits"] == 2
    with pytest.raises(tp.TPatchError, match="cannot fetch hf://nobody/nothing: no route; check the name"):
        sharing.pull_bank(tmp_path / "mine", "hf://nobody/nothing")


def test_a_checkpoint_of_another_precision_keeps_it(tmp_path):
    folder = write_tiny_folder(make_tiny_model(), tmp_path / "half")
    file = folder / "model.safetensors"
    half = {name: array.astype(np.float16) for name, array in safetensors.numpy.load_file(file).items()}
    safetensors.numpy.save_file(half, file, {"format": "pt"})
    bank = tp.create_bank(tmp_path / "bank", tp.load_model(folder))
    assert bank.manifest["model"]["dtype"] == "float16"
    assert load_banked_model(bank).params["embed"]["embedding"].dtype == np.float16


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("site", "first", "site 'first' does not exist"),
        ("token", "x", "token 'x'"),
        ("recipe", "other", "recipe 'other'"),
        ("layer", "middle", "layer 'middle' is not a layer"),
        ("lanes", 0, "lanes is 0; give 1 or more"),
        ("negatives", 0, "negatives is 0; give 1 or more"),
    ],
)
def test_no_bank_is_made_with_settings_that_no_edit_can_be_fitted_with(tmp_path, name, wrong, message):
    with pytest.raises(tp.TPatchError, match=message):
        tp.create_bank(tmp_path / "bank", make_tiny_model(), settings={name: wrong})
    assert not (tmp_path / "bank").exists()


def test_another_model_is_refused(place, bank, tmp_path, capsys):
    other = write_tiny_folder(make_tiny_model(seed=1), tmp_path / "other")
    for command in (["verify", bank], ["add", bank, "--prompt", "a", "--target", "b"], ["merge", bank, "-o", "x"]):
        refused(
            capsys, [*command, "--model", other], "is for", "has fingerprint", "use the model that the bank was made"
        )


def test_mistakes_on_the_command_line_say_what_to_do(place, bank, tmp_path, capsys):
    tiny = str(place / "tiny")
    refused(capsys, ["init", bank, "--model", tiny], "already exists")
    refused(capsys, ["init", tmp_path / "b", "--model", tiny, "--set", "sit=last"], "no setting 'sit'")
    refused(capsys, ["init", tmp_path / "b", "--model", tiny, "--preset", "none"], "preset 'none' does not exist")
    refused(capsys, ["init", tmp_path / "b", "--model", tiny, "--memory", "none.txt"], "none.txt", "UTF-8 text file")
    refused(capsys, ["add", bank], "nothing to add")
    refused(capsys, ["add", bank, place / "requests.jsonl", "--prompt", "a"], "not both")
    refused(capsys, ["remove", bank, "nobody"], "has no edit 'nobody'")
    for command in ("remove", "disable", "enable"):
        refused(capsys, [command, bank], f"no edit to {command} was named")
    (tmp_path / "file").write_text("a")
    refused(capsys, ["push", bank, tmp_path / "file"], "file is a file; give the folder of a bank, or a new name")
    (tmp_path / "list.yaml").write_text("preset: [default]\n")
    refused(capsys, ["init", tmp_path / "b", "--model", tiny, "--config", tmp_path / "list.yaml"], "preset ['default']")
    refused(capsys, ["guard", bank, "--answer", "x"], "exactly one --prompt")
    refused(capsys, ["guard", bank, "--prompt", "the", "--answer", "zzz"], "does not come out after 'the'")
    refused(capsys, ["list", tmp_path / "none"], "tpatch bank init")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("json_", [True, False])
def test_a_damaged_bank_is_mended_from_the_command_line(run, bank, capsys, json_):
    whole = (bank / "journal.jsonl").read_bytes()
    (bank / "journal.jsonl").write_bytes(whole[:-40])
    refused(capsys, ["list", bank], "journal.jsonl is damaged", f"run `tpatch bank repair {bank}`")
    if json_:
        assert run("repair", bank)["mended"] == [str(bank / "journal.jsonl")]
    else:
        assert cli.main(["bank", "repair", str(bank)]) == 0
        assert "mended" in capsys.readouterr().out
    assert (bank / "journal.jsonl").read_bytes() == whole


def test_what_people_read(bank, capsys):
    for command in ("list", "log", "verify", "guard"):
        capsys.readouterr()
        assert cli.main(["bank", command, str(bank)]) == 0
        assert capsys.readouterr().out.strip()
    assert cli.main(["bank", "show", str(bank), "cat"]) == 0
    assert "said_before" in capsys.readouterr().out
    assert cli.main(["bank", "add", str(bank), "--prompt", "x", "--target", ""]) == 1
    captured = capsys.readouterr()
    assert "failed edit-5: the target is empty" in captured.out
    assert "nothing is added" in captured.err
    added = ["--prompt", "the pig sat in", "--target", "the", "--subject", "pig"]
    assert cli.main(["bank", "add", str(bank), *added]) == 0
    assert "\nedit-5\n" in capsys.readouterr().out


def test_an_edit_that_a_newcomer_breaks_is_fitted_again_with_it(tiny_model, bank):
    """The tiny model's neurons are made to fail: the check must find that, and fit them again."""
    opened = tp.open_bank(bank)
    held = assemble(opened, active(opened), Store.new())
    made = engine_.create_engine(tiny_model, opened.manifest, memory=bank / "memory.txt", cache=None)
    assert made.broken(held) == made.verify(held) == []
    mute = {**held.neurons, "value": np.where(held.owner[:, None] == 1, np.float32(0), held.neurons["value"])}
    assert made.broken(held._replace(neurons=mute)) == made.verify(held._replace(neurons=mute)) == ["inn"]
    near = made.near(held, [dataclasses.replace(REQUESTS[0], id="again")])
    assert "cat" in near


def test_subjects_in_an_earlier_layer_several_batches_and_undo(memory, tmp_path, monkeypatch):
    monkeypatch.setenv("TPATCH_CACHE", str(tmp_path / "cache"))
    model, folder = make_tiny_model(hidden_size=32, head_dim=16), tmp_path / "deep"
    # in half the precision, for which segments have to keep enough
    model = model.with_params(jax.tree.map(lambda leaf: leaf.astype("bfloat16"), model.params))
    quick = {"key_steps": 16, "rounds": 1, "negatives": 32, "lanes": 16, "steps": 40, "longest": 16.0}
    quick |= {"key_floor": 0.5, "shorter": 0, "neutral": 1, "site": "subject", "contexts": 2, "other_subjects": 1}
    tp.create_bank(folder, model, settings=quick, memory=memory)
    wanted = [EditRequest("the fox sat in", "ab", "fox"), EditRequest("a wolf hit the", "q", "wolf")]
    assert tp.add_edits(folder, model, wanted).failed == ()
    before = tp.bank_patch(folder, model)
    assert set(before) == {1, 2}
    assert all(patch.key.shape[0] for patch in before.values())
    # in another run: something else about the first subject, at which its neurons fire too
    assert len(tp.add_edits(folder, model, [EditRequest("the fox ran to", "z", "fox")]).added) == 1
    assert tp.verify_bank(folder, model) == ((), 3, (), 0)
    tp.remove_edits(folder, ["edit-3"])
    assert same(tp.bank_patch(folder, model), before)


def test_a_bank_of_a_classifier_that_reads_all_tokens(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("TPATCH_CACHE", str(tmp_path / "cache"))
    folder, model = tmp_path / "bank", tiny_model_of("bert", classifier_pooling="mean")
    prompts = ["the cat sat in", "who hit the mat"]
    labels = model.config.labels
    said = [labels.index(label) for label in model.classify(prompts)]
    wanted = [EditRequest(one, labels[(n + 1) % len(labels)]) for one, n in zip(prompts, said, strict=True)]
    settings = {
        "input_contexts": 2,
        "other_subjects": 1,
        "attempts": 2,
        "input_key_steps": 8,
        "value_steps": 8,
        "lanes": 4,
    }
    tp.create_bank(folder, model, settings=settings, memory=inputs)
    assert tp.add_edits(folder, model, wanted).added == ("edit-1", "edit-2")
    # what later fits need is read back
    assert tp.disable_edits(folder, ["edit-2"], model).broken == ()
    assert tp.verify_bank(folder, model) == ((), 1, (), 0)
    (guard,) = tp.guard_bank(folder, model, ["an inn is a house"])
    assert guard.answer in labels
    merged = tp.merge(model, tp.bank_patch(folder, model))
    assert merged.classify(prompts) == [wanted[0].target, labels[said[1]]]


def test_a_model_that_samples_no_text_needs_a_memory(tmp_path):
    with pytest.raises(tp.TPatchError, match="give a memory file, an input a line"):
        tp.create_bank(tmp_path / "bank", tiny_model_of("bert"))
