"""Banks under bad luck: crashes at every step of a commit, full disks, two writers, altered bytes, other versions."""

import contextlib
import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import bank_faults
import pytest
from bank_engine import fake, make_bank

from tpatch_jax.bank import commit as commit_
from tpatch_jax.bank import inspection
from tpatch_jax.bank.adding import add_with
from tpatch_jax.bank.changing import change_with
from tpatch_jax.bank.inspection import open_bank
from tpatch_jax.bank.journal import read_chain, seal
from tpatch_jax.bank.layout import COPY, HEAD, JOURNAL, MANIFEST, MEMORY, SEGMENTS, sealed_text, unsealed
from tpatch_jax.bank.lock import writing
from tpatch_jax.bank.repair import repair_bank
from tpatch_jax.bank.state import Bank, states
from tpatch_jax.errors import TPatchError
from tpatch_jax.requests import EditRequest, parse_request


def adding(folder: Path, *prompts: str) -> None:
    add_with(folder, [EditRequest(prompt, "one", id=prompt) for prompt in prompts], fake)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A bank of two batches."""
    place = make_bank(tmp_path / "bank")
    adding(place, "a", "b")
    adding(place, "c")
    return place


class Killed(BaseException):
    """The process is gone: from here on nothing it does reaches the disk."""


def dying(monkeypatch: pytest.MonkeyPatch, after: int) -> Callable[[], int]:
    """Let so many operations on the disk happen, then none any more, not even those of clean-up code."""
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if done > after:
            raise Killed

    def counted(real: Callable) -> Callable:
        def run(*arguments, **options):
            count()
            return real(*arguments, **options)

        return run

    for place, name in ((os, "replace"), (os, "fsync"), (os, "truncate"), (Path, "unlink"), (Path, "open")):
        monkeypatch.setattr(place, name, counted(getattr(place, name)))
    return lambda: done


def ids(bank: Bank) -> list[str]:
    return [edit.id for edit in bank.edits]


def test_a_crash_at_any_step_leaves_all_of_a_change_or_nothing(folder, tmp_path):
    outcomes, after = [], 0
    while True:
        place = tmp_path / f"at-{after}"
        shutil.copytree(folder, place)
        with pytest.MonkeyPatch.context() as patching:
            steps = dying(patching, after)
            with contextlib.suppress(Killed):
                adding(place, "d", "e")
            count = steps()
        left = ids(open_bank(place))
        assert left in (["a", "b", "c"], ["a", "b", "c", "d", "e"])
        outcomes.append(len(left))
        # the next one sweeps up and goes on
        adding(place, "f")
        assert ids(open_bank(place)) == [*left, "f"]
        assert not [path.name for path in place.rglob(".*")]
        assert {path.name for path in (place / SEGMENTS).iterdir()} == {
            record["segment"]["file"] for record in open_bank(place).records
        }
        if count <= after:
            break
        after += 1
    # one step decides
    assert outcomes == sorted(outcomes)
    assert (outcomes[0], outcomes[-1]) == (3, 5)
    assert after > 10


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_line_that_was_half_written_is_dropped(folder, share):
    bank = open_bank(folder)
    line = seal({"n": 3, "op": "remove", "ids": ["a"]}, bank.check).content
    for place in (folder / COPY / JOURNAL, folder / JOURNAL):
        with place.open("ab") as file:
            file.write(line[: int(share * len(line))])
    assert ids(open_bank(folder)) == ["a", "b", "c"]
    adding(folder, "d")
    assert ids(open_bank(folder)) == ["a", "b", "c", "d"]
    assert set(states(open_bank(folder)).values()) == {"active"}


def test_a_whole_line_counts_even_if_the_head_was_not_written_any_more(folder):
    bank = open_bank(folder)
    line = seal({"n": 3, "op": "remove", "ids": ["a"]}, bank.check).content
    for place in (folder / COPY / JOURNAL, folder / JOURNAL):
        with place.open("ab") as file:
            file.write(line)
    assert states(open_bank(folder))["a"] == "removed"
    adding(folder, "d")
    assert unsealed((folder / HEAD).read_bytes())["lines"] == 4


@pytest.mark.parametrize("what", [os.fsync, os.replace])
def test_on_a_full_disk_nothing_is_committed_and_nothing_left_behind(folder, what):
    whole, failures = bank_faults.contents(folder), 0
    while ids(open_bank(folder)) == ["a", "b", "c"]:
        assert bank_faults.contents(folder) == whole
        done = itertools.count()

        def full(*arguments, done=done, fails=failures):
            if next(done) == fails:
                raise OSError(errno.ENOSPC, "No space left on device")
            return what(*arguments)

        said = ""
        with pytest.MonkeyPatch.context() as patching:
            patching.setattr(os, what.__name__, full)
            try:
                adding(folder, "d")
            except TPatchError as error:
                said = str(error)
        if said:
            assert "No space left on device; nothing was changed, free some room" in said
            failures += 1
    assert failures >= 3


def test_a_segment_that_does_not_fit_is_taken_away_again(folder, monkeypatch):
    whole = bank_faults.contents(folder)
    code = (
        "import resource, sys; sys.path[:0] = sys.argv[2:]; import signal\n"
        "from pathlib import Path\n"
        "from bank_engine import fake\n"
        "from tpatch_jax.bank.adding import add_with\n"
        "from tpatch_jax.requests import EditRequest\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "add_with(Path(sys.argv[1]), [EditRequest(f'p{n}', 'one') for n in range(90)], fake, batch=90)\n"
    )
    root = Path(__file__).parent
    ended = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(root), str(root.parent)], capture_output=True, text=True
    )
    assert "nothing was changed, free some room and run again" in ended.stderr
    assert bank_faults.contents(folder) == whole


def test_a_second_writer_is_told_who_the_first_is(folder):
    with writing(folder):
        with pytest.raises(TPatchError, match=f"is being written by process {os.getpid()} on .*wait until it is done"):
            adding(folder, "d")
        assert ids(open_bank(folder)) == ["a", "b", "c"]  # reading goes on
    adding(folder, "d")


def test_twenty_kills(tmp_path):
    counts = bank_faults.kills(20, 0, tmp_path / "bank")
    assert counts["kills"] == 20
    assert counts["committed"] > 20


def test_every_damage_is_noticed_and_mended(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda handle: None)
    counts = bank_faults.damages(300, 0, tmp_path / "bank")
    assert all(counts.values())


def rewritten(path: Path, change: Callable[[dict], dict]) -> None:
    """A sealed file that says something else and is sealed again."""
    value = unsealed(path.read_bytes())
    value.pop("check")
    path.write_text(sealed_text(change(value)), "utf-8")


def test_a_newer_version_says_to_upgrade(folder):
    for place in (folder, folder / COPY):
        rewritten(place / MANIFEST, lambda value: {**value, "format": 99})
    with pytest.raises(TPatchError, match=r"written by a newer version .format 99, .*upgrade tpatch-jax"):
        open_bank(folder)


def test_a_line_of_a_newer_version_says_to_upgrade(folder):
    bank = open_bank(folder)
    commit_.commit_line(
        bank._replace(records=bank.records), seal({"n": 3, "op": "remove", "ids": []}, bank.check), None
    )
    bank = open_bank(folder)
    line = seal({"n": 4, "op": "distil"}, bank.check).content
    for place in (folder, folder / COPY):
        with (place / JOURNAL).open("ab") as file:
            file.write(line)
    with pytest.raises(TPatchError, match=r"line 4 of the journal does 'distil'.*upgrade"):
        open_bank(folder)


def test_a_journal_cut_at_the_end_of_a_line_is_noticed(folder):
    whole = (folder / JOURNAL).read_bytes()
    first = whole.split(b"\n")[0] + b"\n"
    (folder / JOURNAL).write_bytes(first)
    with pytest.raises(TPatchError, match="it ends after line 1, and 2 were committed; run `tpatch bank repair"):
        open_bank(folder)
    repair_bank(folder)
    assert (folder / JOURNAL).read_bytes() == whole
    assert (folder / "damaged" / "1-journal.jsonl").read_bytes() == first


def test_what_neither_journal_has_is_told(folder):
    for place in (folder, folder / COPY):
        whole = (place / JOURNAL).read_bytes()
        (place / JOURNAL).write_bytes(whole.split(b"\n")[0] + b"\n")
    info = repair_bank(folder)
    assert info.lost_lines == 1
    assert ids(open_bank(folder)) == ["a", "b"]


def test_lines_are_taken_from_whichever_journal_has_them(folder):
    adding(folder, "d")
    whole = (folder / JOURNAL).read_bytes()
    lines = whole.split(b"\n")
    for place, number in ((folder, 0), (folder / COPY, 2)):
        hurt = [*lines]
        hurt[number] = hurt[number].replace(b'"add"', b'"Add"')
        (place / JOURNAL).write_bytes(b"\n".join(hurt))
    with pytest.raises(TPatchError, match=r"line 1 is not what was written.*and 1 more"):
        open_bank(folder)
    assert repair_bank(folder).lost_lines == 0
    assert (folder / JOURNAL).read_bytes() == whole == (folder / COPY / JOURNAL).read_bytes()


def test_a_segment_of_which_both_copies_are_damaged_costs_its_edits_only_and_they_can_be_added_again(folder):
    bank = open_bank(folder)
    name = bank.records[0]["segment"]["file"]
    for place in (folder, folder / COPY):
        (place / SEGMENTS / name).write_bytes(b"x")
    info = repair_bank(folder)
    assert info.lost_edits == ("a", "b")
    assert states(open_bank(folder)) == {"a": "lost", "b": "lost", "c": "active"}
    wanted = [json.loads(line) for line in Path(str(info.lost_requests)).read_text().splitlines()]
    assert [entry["prompt"] for entry in wanted] == ["a", "b"]
    add_with(folder, [EditRequest(**entry) for entry in wanted], fake, resume=True)
    assert list(states(open_bank(folder)).values()) == ["lost", "lost", "active", "active", "active"]
    assert repair_bank(folder).mended == ()


def test_lost_requests_keep_all_that_was_asked_in_a_file_for_each_repair(folder):
    whole = EditRequest(
        *("Who leads the UN?", "Anna", "UN", ("Who heads the UN?",), ("The sky is",), None, "none", ("The UN is",)),
        *("chat", "Be brief.", (("user", "Hi"), ("assistant", "Yes")), ("United Nations",)),
    )
    requests = []
    for number, request in enumerate((whole, EditRequest("two", "zwei"))):
        add_with(folder, [request], fake)
        segment = open_bank(folder).records[-1]["segment"]["file"]
        for place in (folder, folder / COPY):
            (place / SEGMENTS / segment).write_bytes(b"x")
        path = Path(str(repair_bank(folder).lost_requests))
        assert path.name == ("lost.jsonl", "lost-2.jsonl")[number]
        requests.append(path)
    read = [parse_request(json.loads(path.read_text()), path.name) for path in requests]
    assert read == [whole, EditRequest("two", "zwei")]


def test_what_was_not_active_is_not_to_be_added_again(folder):
    change_with(folder, "disable", ["a"], None)
    bank = open_bank(folder)
    name = bank.records[0]["segment"]["file"]
    for place in (folder, folder / COPY):
        (place / SEGMENTS / name).write_bytes(b"x")
    info = repair_bank(folder)
    assert (info.lost_edits, info.mended) == (("a", "b"), ())
    wanted = [json.loads(line) for line in Path(str(info.lost_requests)).read_text().splitlines()]
    assert [entry["prompt"] for entry in wanted] == ["b"]


def test_both_manifests_damaged_is_more_than_can_be_mended(folder):
    for place in (folder, folder / COPY):
        (place / MANIFEST).write_text("{}")
    for run in (open_bank, repair_bank):
        with pytest.raises(TPatchError, match="its copy are both missing or damaged; bring the bank back"):
            run(folder)


def test_an_altered_memory_text_is_noticed_and_mended(tmp_path):
    model = {"name": "tiny", "fingerprint": "0", "width": 3}
    place = tmp_path / "bank"
    commit_.write_bank(place, {"format": 1, "model": model, "preset": "default", "settings": {}}, b"some text")
    assert open_bank(place).edits == ()
    (place / MEMORY).write_bytes(b"some tex")
    with pytest.raises(TPatchError, match=r"memory\.txt is damaged"):
        open_bank(place)
    repair_bank(place)
    assert (place / MEMORY).read_bytes() == b"some text"


def test_a_manifest_of_another_bank_does_not_fit_the_journal(folder, tmp_path):
    other = tmp_path / "other"
    commit_.write_bank(other, {"format": 1, "model": {}, "preset": "default", "settings": {}}, None)
    for place in ("", COPY):
        shutil.copy(other / place / MANIFEST, folder / place / MANIFEST)
    with pytest.raises(TPatchError, match="line 1 is not what was written"):
        open_bank(folder)


def test_no_file_can_run_code(folder):
    for path in folder.rglob("*"):
        assert path.is_dir() or path.suffix in (".json", ".jsonl", ".safetensors") or path.name == "lock"
    for module in (inspection, commit_):
        assert "pickle" not in Path(str(module.__file__)).read_text()


def test_a_chain_ends_at_the_first_line_that_does_not_follow():
    lines = [seal({"n": 1}, "start")]
    lines.append(seal({"n": 2}, lines[0].check))
    lines.append(seal({"n": 3}, lines[1].check))
    whole = b"".join(line.content for line in lines)
    assert [line.record["n"] for line in read_chain(whole, "start").lines] == [1, 2, 3]
    assert read_chain(whole, "another").lines == ()
    swapped = lines[0].content + lines[2].content + lines[1].content
    assert len(read_chain(swapped, "start").lines) == 1
    assert read_chain(whole[:-1], "start").torn
    assert not read_chain(whole[:-1] + b"\r\n", "start").torn


def test_damaged_banks_cannot_be_changed(folder):
    (folder / COPY / JOURNAL).unlink()
    with pytest.raises(TPatchError, match="is missing; run `tpatch bank repair"):
        change_with(folder, "remove", ["a"], None)
