"""What a bank holds after any sequence of changes, against a simple model of it in memory; no network at all."""

import dataclasses
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from bank_engine import ENGINE, fake, make_bank
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tpatch_jax.bank.adding import _asked, add_with
from tpatch_jax.bank.assembly import FIELDS, Held, Store, assemble
from tpatch_jax.bank.changing import change_with, guard_with, undoes_last
from tpatch_jax.bank.drafting import fit_new
from tpatch_jax.bank.inspection import open_bank
from tpatch_jax.bank.state import BankEdit, Guard, _request, active, states
from tpatch_jax.errors import TPatchError
from tpatch_jax.requests import EditRequest

PROMPTS, TARGETS = strategies.sampled_from("abcdef"), strategies.sampled_from(["one", "two", "soft", "weak", "bad"])


def held_by(folder: Path) -> Held:
    bank = open_bank(folder)
    return assemble(bank, active(bank), Store.new())


def same_neurons(one: Held, other: Held) -> bool:
    return all(one.neurons[name].tobytes() == other.neurons[name].tobytes() for name in FIELDS)


@dataclass
class Entry:
    id: str
    prompt: str
    target: str
    flag: str = ""


@dataclass
class Expected:
    """The simple model: a list of edits, of which the last that is neither removed nor disabled counts."""

    entries: list[Entry] = field(default_factory=list)

    def states(self) -> dict[str, str]:
        last = {entry.prompt: entry.id for entry in self.entries if not entry.flag}
        return {
            entry.id: entry.flag or ("active" if last[entry.prompt] == entry.id else "superseded")
            for entry in self.entries
        }

    def now(self, prompt: str) -> str | None:
        answers = [entry.target for entry in self.entries if entry.prompt == prompt and not entry.flag]
        return answers[-1] if answers else None


class Banked(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.folder = make_bank(Path(tempfile.mkdtemp()) / "bank")
        self.expected = Expected()
        self.count = 0

    def teardown(self) -> None:
        shutil.rmtree(self.folder.parent)

    @rule(
        pairs=strategies.lists(strategies.tuples(PROMPTS, TARGETS), min_size=1, max_size=4),
        batch=strategies.integers(1, 3),
    )
    def add(self, pairs: list[tuple[str, str]], batch: int) -> None:
        requests = []
        for prompt, target in pairs:
            self.count += 1
            requests.append(EditRequest(prompt, target, id=f"e{self.count}"))
        info = add_with(self.folder, requests, fake, batch=batch)
        added = []
        for request in requests:
            if request.target != "bad" and self.expected.now(request.prompt) != request.target:
                self.expected.entries.append(Entry(str(request.id), request.prompt, request.target))
                added.append(request.id)
        assert list(info.added) == added
        assert sorted(entry[0] for entry in info.failed) == sorted(
            str(request.id) for request in requests if request.target == "bad"
        )

    @precondition(lambda self: self.expected.entries)
    @rule(data=strategies.data(), kind=strategies.sampled_from(["disable", "enable", "remove"]))
    def change(self, data: strategies.DataObject, kind: str) -> None:
        chosen = data.draw(strategies.lists(strategies.sampled_from(self.expected.entries), min_size=1, max_size=3))
        ids = [entry.id for entry in chosen]
        if any(entry.flag == "removed" for entry in chosen):
            with pytest.raises(TPatchError, match="was removed for good"):
                change_with(self.folder, kind, ids, fake)
            return
        before = self.expected.states()
        change_with(self.folder, kind, ids, fake)
        for entry in chosen:
            entry.flag = {"disable": "disabled", "enable": "", "remove": "removed"}[kind]
        assert before.keys() == self.expected.states().keys()

    @rule(prompt=PROMPTS, wanted=TARGETS)
    def add_and_remove(self, prompt: str, wanted: str) -> None:
        before, known = held_by(self.folder), len(self.expected.entries)
        self.add([(prompt, wanted)], 1)
        if len(self.expected.entries) == known:
            return
        entry = self.expected.entries[-1]
        assert undoes_last(open_bank(self.folder), [entry.id])
        change_with(self.folder, "remove", [entry.id], None)
        entry.flag = "removed"
        assert same_neurons(held_by(self.folder), before)

    @rule()
    def resume_adds_nothing(self) -> None:
        requests = [EditRequest(e.prompt, e.target) for e in self.expected.entries if e.flag != "removed"]
        if requests:
            assert add_with(self.folder, requests, fake, resume=True).skipped == len(requests)

    @invariant()
    def the_disk_says_what_is_expected(self) -> None:
        if not hasattr(self, "folder"):
            return
        bank = open_bank(self.folder)
        wanted = self.expected.states()
        assert states(bank) == wanted
        held = assemble(bank, active(bank), Store.new())
        assert [edit.id for edit in held.edits] == [name for name, state in wanted.items() if state == "active"]
        assert np.array_equal(held.owner, np.arange(len(held.edits)))
        for edit, piece in zip(held.edits, held.pieces, strict=True):
            said = piece["earlier_tokens"].astype(np.uint8).tobytes().decode()
            assert said == edit.request.prompt + edit.request.target


@pytest.mark.filterwarnings("ignore:The recursion limit will not be reset")
def test_any_sequence_of_changes_leaves_what_is_expected(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda handle: None)
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Banked, settings=settings(max_examples=100, stateful_step_count=10, deadline=None))


# --- one by one ---


def requests(*pairs: tuple[str, str]) -> list[EditRequest]:
    return [EditRequest(prompt, target, id=f"{prompt}-{target}") for prompt, target in pairs]


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_bank(tmp_path / "bank")


def test_an_edit_that_stops_holding_is_fitted_again_with_the_newcomers(folder):
    add_with(folder, requests(("a", "weak")), fake)
    info = add_with(folder, requests(*((p, "one") for p in "bcde")), fake, batch=2)
    assert info.refitted == ("a-weak",)
    assert info.broken == ()
    bank = open_bank(folder)
    assert len(bank.edits[0].fits) == 3
    held = held_by(folder)
    assert held.neurons["bias"][0] == 5.0


def test_removing_the_newcomers_brings_the_earlier_neurons_back(folder):
    add_with(folder, requests(("a", "weak"), ("s", "soft")), fake)
    before = held_by(folder)
    add_with(folder, requests(*((p, "one") for p in "bcd")), fake)
    assert not same_neurons(held_by(folder), before)
    info = change_with(folder, "remove", [f"{p}-one" for p in "bcd"], None)
    assert info.broken == ()
    assert same_neurons(held_by(folder), before)


def test_removing_from_the_middle_fits_again_what_leaned_on_it(folder):
    add_with(folder, requests(*((p, "one") for p in "abcd")), fake)
    add_with(folder, requests(("w", "weak")), fake)
    info = change_with(folder, "remove", ["a-one", "b-one", "c-one"], fake)
    assert (info.refitted, info.broken) == (("w-weak",), ())
    assert held_by(folder).neurons["bias"][-1] == 2.0


def test_without_a_model_nothing_is_checked_and_the_result_says_so(folder):
    add_with(folder, requests(*((p, "one") for p in "abcd")), fake)
    add_with(folder, requests(("w", "weak")), fake)
    assert change_with(folder, "disable", ["a-one"], None).broken is None
    assert change_with(folder, "disable", ["a-one"], None).states == {}


def test_a_later_request_supersedes_and_gives_way_when_it_is_gone(folder):
    info = add_with(folder, requests(("a", "one"), ("a", "two")), fake)
    assert info.superseded == (("a-one", "a-two"),)
    assert change_with(folder, "disable", ["a-two"], fake).states == {"a-one": "active", "a-two": "disabled"}
    assert change_with(folder, "enable", ["a-two"], fake).states == {"a-one": "superseded", "a-two": "active"}


def test_a_request_that_fails_does_not_cost_the_one_it_would_have_superseded(folder):
    add_with(folder, requests(("a", "one")), fake)
    info = add_with(folder, requests(("a", "bad"), ("b", "two")), fake)
    assert (info.added, info.superseded) == (("b-two",), ())
    assert states(open_bank(folder)) == {"a-one": "active", "b-two": "active"}


def test_a_guard_keeps_out_what_would_change_it_and_nothing_else(folder):
    guard_with(folder, [Guard("guarded", " x")], ())
    info = add_with(folder, requests(("a", "one"), ("b", "breaker"), ("c", "two")), fake)
    assert info.added == ("a-one", "c-two")
    assert "--force" in info.failed[0][3]
    info = add_with(folder, requests(("b", "breaker")), fake, force=True)
    assert (info.added, info.guards_broken) == (("b-breaker",), ("guarded",))
    # what is broken already is no reason to refuse
    assert add_with(folder, requests(("d", "one")), fake).added == ("d-one",)
    guard_with(folder, (), ["guarded"])
    assert open_bank(folder).guards == ()
    with pytest.raises(TPatchError, match="no guard on 'guarded'"):
        guard_with(folder, (), ["guarded"])


def test_a_guarded_answer_stays_whatever_is_enabled_and_what_changes_it_is_said(folder):
    add_with(folder, requests(("a", "breaker"), ("b", "breaker")), fake)
    change_with(folder, "disable", ["b-breaker"], fake)
    add_with(folder, requests(("a", "one")), fake)
    guard_with(folder, [Guard("guarded", " x")], ())
    with pytest.raises(TPatchError, match="to enable b-breaker would change the guarded answer 'x' after 'guarded'"):
        change_with(folder, "enable", ["b-breaker"], fake)
    assert states(open_bank(folder))["b-breaker"] == "disabled"
    assert change_with(folder, "disable", ["b-breaker"], fake).guards_broken == ()
    assert change_with(folder, "disable", ["a-one"], fake).guards_broken == ("guarded",)
    assert change_with(folder, "enable", ["a-one"], fake).guards_broken == ()
    assert change_with(folder, "enable", ["b-breaker"], None).guards_broken is None


def test_what_shall_hold_in_chats_as_well_supersedes_what_was_fitted_in_bare_text(folder):
    bare, both = EditRequest("who", "Anna", id="bare"), EditRequest("who", "Anna", id="both", form="both")
    add_with(folder, [bare], fake)
    info = add_with(folder, [both], fake, resume=True)
    assert (info.added, info.already, info.superseded, info.skipped) == (("both",), (), (("bare", "both"),), 0)
    # What was fitted in both holds in bare text.
    assert add_with(folder, [EditRequest("who", "Anna", id="again")], fake).already == ("both",)
    assert add_with(folder, [dataclasses.replace(both, id=None)], fake, resume=True).skipped == 1


def test_resume_counts_what_occurs_several_times(folder):
    wanted = [EditRequest("a", target) for target in ("one", "two", "one")]
    add_with(folder, wanted[:2], fake)
    info = add_with(folder, wanted, fake, resume=True)
    assert (info.skipped, len(info.added)) == (2, 1)
    assert [edit.request.target for edit in active(open_bank(folder))] == ["one"]


def test_mistakes_say_what_to_do(folder, tmp_path):
    add_with(folder, requests(("a", "one")), fake)
    with pytest.raises(TPatchError, match="another id, or skip what is there with --resume"):
        add_with(folder, [EditRequest("b", "two", id="a-one")], fake)
    change_with(folder, "remove", ["a-one"], fake)
    with pytest.raises(TPatchError, match=r"had an edit 'a-one', which is removed, and keeps its name; .* another id"):
        add_with(folder, requests(("a", "one")), fake, resume=True)
    with pytest.raises(TPatchError, match="has no edit 'x'; `tpatch bank list"):
        change_with(folder, "remove", ["x"], fake)
    with pytest.raises(TPatchError, match="no edit to remove was named"):
        change_with(folder, "remove", [], fake)
    with pytest.raises(TPatchError, match="batch 0 adds nothing"):
        add_with(folder, [], fake, batch=0)
    for path, said in ((tmp_path / "none", "does not exist"), (folder / "segments", "is no bank")):
        with pytest.raises(TPatchError, match=said):
            add_with(path, [], fake)


def test_neurons_of_another_try_are_others(folder):
    base = held_by(folder)
    edits = [BankEdit(one.id or "", one, 1) for one in requests(("a", "one"))]
    tries = [fit_new(base, edits, ENGINE).held.refs for _ in range(2)]
    assert len(tries[0]) == 1
    assert not set(tries[0]) & set(tries[1])


def test_what_is_kept_is_read_back():
    request = EditRequest("p", "t", "s", ("a",), ("b",), "edit-1", None, ("c", "d"))
    entry = _asked(SimpleNamespace(request=request, reads_as=None))
    assert entry["keep"] == ["c", "d"]
    assert _request({**entry, "id": "edit-1"}) == request
    # Banks of earlier versions know nothing of it, and what keeps nothing is written as they wrote it.
    plain = dataclasses.replace(request, keep=())
    entry = _asked(SimpleNamespace(request=plain, reads_as=None))
    assert set(entry) == {"prompt", "target", "subject", "rephrases", "locality"}
    assert _request({**entry, "id": "edit-1"}) == plain
