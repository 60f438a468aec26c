"""What changes a bank: add, disable, enable, remove, guard. Each is one line of the journal, or none."""

import contextlib
import getpass
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from tpatch_jax.bank.assembly import Held, Store, assemble
from tpatch_jax.bank.commit import commit, open_to_write
from tpatch_jax.bank.drafting import Draft, fit_new, record_of, settle
from tpatch_jax.bank.lock import writing
from tpatch_jax.bank.method import Engine
from tpatch_jax.bank.state import Bank, BankEdit, Guard, active, find, prompt_key, states, step
from tpatch_jax.errors import TPatchError
from tpatch_jax.requests import EditRequest

__all__ = ["AddInfo", "ChangeInfo", "add_with", "change_with", "guard_with", "undoes_last"]

Progress = Callable[[str, int, int], None]


class AddInfo(NamedTuple):
    """What became of requests that were added to a bank.

    Attributes:
        added: ids of the new edits.
        already: ids of edits that held before, without a neuron; also those that are in the bank already.
        superseded: ``(earlier id, id of the edit that takes its place)``.
        refitted: ids of earlier edits that were fitted again beside the new ones.
        gave_way: ids of earlier edits whose thresholds rose.
        failed: ``(id, prompt, target, reason)`` of requests that were not taken in.
        skipped: how many requests an earlier run had committed.
        broken: ids of active edits that do not come out.
        guards_broken: prompts whose guarded answers changed.
        batches: of each batch how many edits it added, how many were active after it, and its seconds.
        seconds: wall time.
    """

    added: tuple[str, ...]
    already: tuple[str, ...]
    superseded: tuple[tuple[str, str], ...]
    refitted: tuple[str, ...]
    gave_way: tuple[str, ...]
    failed: tuple[tuple[str, str, str, str], ...]
    skipped: int
    broken: tuple[str, ...]
    guards_broken: tuple[str, ...]
    batches: tuple[tuple[int, int, float], ...]
    seconds: float


class ChangeInfo(NamedTuple):
    """What became of edits that were disabled, enabled or removed.

    Attributes:
        ids: the edits whose state changed.
        states: of every edit whose state is another one now, what it is.
        refitted: ids of other edits that had to be fitted again.
        broken: ids of active edits that do not come out now; ``None`` where no model was given to ask.
    """

    ids: tuple[str, ...]
    states: dict[str, str]
    refitted: tuple[str, ...]
    broken: tuple[str, ...] | None


def _stamp() -> dict[str, Any]:
    """When, who, and with what."""
    found = {}
    for name in ("tpatch-jax", "jax"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    try:
        who = getpass.getuser()
    except (OSError, KeyError):
        who = "unknown"
    return {"time": datetime.now(UTC).isoformat(timespec="seconds"), "who": who, "versions": found}


def _asked(request: EditRequest) -> dict[str, Any]:
    entry: dict[str, Any] = {"prompt": request.prompt, "target": request.target}
    if request.subject is not None:
        entry["subject"] = request.subject
    for name in ("rephrases", "locality"):
        if texts := getattr(request, name):
            entry[name] = list(texts)
    return entry


def _same(request: EditRequest) -> tuple[str, str]:
    return prompt_key(request.prompt), request.target.strip()


def _waiting(bank: Bank, requests: Sequence[EditRequest], resume: bool) -> list[tuple[str, EditRequest]]:
    """The requests that are not in the bank yet, with the names that they will have there."""
    taken = {edit.id for edit in bank.edits}
    found = states(bank)
    done = Counter(_same(edit.request) for edit in bank.edits if found[edit.id] not in ("removed", "lost"))
    waiting, number = [], len(bank.edits)
    for request in requests:
        if resume and done[_same(request)]:
            done[_same(request)] -= 1
            continue
        name = request.id
        if name is None:
            while (name := f"edit-{(number := number + 1)}") in taken:
                pass
        elif name in taken:
            raise TPatchError(
                f"{bank.folder} has an edit {name!r} already; give the request another id, or skip what is there "
                "with --resume"
            )
        taken.add(name)
        waiting.append((name, request))
    return waiting


def _batches(waiting: Sequence[tuple[str, EditRequest]], size: int) -> Iterator[list[tuple[str, EditRequest]]]:
    """At most ``size`` requests at a time, none of which says the same prompt twice."""
    part: list[tuple[str, EditRequest]] = []
    for name, request in waiting:
        same = any(prompt_key(other.prompt) == prompt_key(request.prompt) for _, other in part)
        if part and (same or len(part) == size):
            yield part
            part = []
        part.append((name, request))
    if part:
        yield part


def add_with(
    folder: Path,
    requests: Sequence[EditRequest],
    engine: Callable[[Bank], Engine],
    *,
    batch: int = 50,
    resume: bool = False,
    force: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> AddInfo:
    """Add requests to a bank with an engine that is made once the bank is open; see `add_edits`."""
    if batch < 1:
        raise TPatchError(f"batch {batch} adds nothing; give 1 or more")
    began = time.perf_counter()
    with writing(folder):
        bank = open_to_write(folder)
        waiting = _waiting(bank, requests, resume)
        total = AddInfo((), (), (), (), (), (), len(requests) - len(waiting), (), (), (), 0.0)
        if not waiting:
            return total
        maker, store = engine(bank), Store.new()
        held = assemble(bank, active(bank), store)
        broken, guards = maker.broken(held), maker.guards_broken(held, bank.guards)
        done = 0
        for part in _batches(waiting, batch):
            start = time.perf_counter()
            bank, draft, told = _add(bank, part, maker, store, broken, guards, force, seed, start)
            broken, guards = list(draft.broken), list(draft.guards)
            done += len(part)
            if progress:
                progress("adding edits", done, len(waiting))
            count = len(told["added"]), sum(state == "active" for state in states(bank).values())
            told["batches"] = ((*count, time.perf_counter() - start),)
            total = total._replace(**{name: (*getattr(total, name), *value) for name, value in told.items()})
    return total._replace(
        refitted=tuple(dict.fromkeys(total.refitted)),
        gave_way=tuple(dict.fromkeys(total.gave_way)),
        broken=tuple(broken),
        guards_broken=tuple(guard.prompt for guard in guards),
        seconds=time.perf_counter() - began,
    )


def _add(
    bank: Bank, part: Sequence[tuple[str, EditRequest]], engine: Engine, store: Store, broken: Sequence[str],
    guards: Sequence[Guard], force: bool, seed: int, start: float,
) -> tuple[Bank, Draft, dict[str, tuple[Any, ...]]]:  # fmt: skip
    now = {prompt_key(edit.request.prompt): edit for edit in active(bank)}
    there = {name: now.get(prompt_key(request.prompt)) for name, request in part}
    known = [old.id for name, request in part if (old := there[name]) and _same(old.request) == _same(request)]
    fresh = [(name, one) for name, one in part if (old := there[name]) is None or _same(old.request) != _same(one)]
    edits = [BankEdit(name, request, bank.next) for name, request in fresh]
    base = assemble(bank, active(bank), store)
    gone = {name: old.id for name, _ in fresh if (old := there[name]) is not None}
    # A request that fails must not cost the one that it would have superseded.
    draft = fit_new(
        base.without(gone.values()), edits, engine, guards=bank.guards,
        broken=[name for name in broken if name not in gone.values()], guards_broken=guards, force=force,
    )  # fmt: skip
    failures = {failure.edit.id for failure in draft.failed}
    back = [gone[name] for name in gone if name in failures]
    if back:
        draft = _with_old(base, draft, back, edits, engine, bank, broken, guards, force)
        failures = {failure.edit.id for failure in draft.failed}
    record, arrays = record_of(draft, base)
    superseded = [(old, name) for name, old in gone.items() if name not in failures]
    by_name = {edit.id: edit.request for edit in edits}
    told: dict[str, tuple[Any, ...]] = {
        "added": tuple(entry["id"] for entry in record["edits"]),
        "already": (*known, *(e["id"] for e in record["edits"] if e["evidence"]["status"] == "already")),
        "superseded": tuple(superseded),
        "refitted": tuple(entry["id"] for entry in record["refitted"]),
        "gave_way": tuple(record["gave_way"]),
        "failed": tuple((f.edit.id, f.edit.request.prompt, f.edit.request.target, f.reason) for f in draft.failed),
    }
    if not record["edits"]:
        return (
            bank,
            draft._replace(broken=tuple(broken), guards=tuple(guards)),
            {**told, "refitted": (), "gave_way": ()},
        )
    record["edits"] = [{**entry, **_asked(by_name[entry["id"]])} for entry in record["edits"]]
    record |= {
        "superseded": [{"id": old, "by": name} for old, name in superseded],
        "failed": [{"id": f[0], "prompt": f[1], "target": f[2], "reason": f[3]} for f in told["failed"]],
        "broken": list(draft.broken),
        "guards_broken": [guard.prompt for guard in draft.guards],
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 3),
    }
    return commit(bank, {"op": "add", **_stamp(), **record}, arrays), draft, told


def _with_old(
    base: Held, draft: Draft, back: Sequence[str], edits: Sequence[BankEdit], engine: Engine, bank: Bank,
    broken: Sequence[str], guards: Sequence[Guard], force: bool,
) -> Draft:  # fmt: skip
    """Fit again without the requests that failed, beside the edits that those would have superseded."""
    failures = {failure.edit.id for failure in draft.failed}
    kept = [edit for edit in edits if edit.id not in failures]
    keys = {prompt_key(edit.request.prompt) for edit in kept}
    gone = [edit.id for edit in base.edits if prompt_key(edit.request.prompt) in keys]
    known = [name for name in broken if name not in gone]
    if not kept:
        return Draft(base, {}, draft.failed, tuple(known), tuple(guards))
    again = fit_new(
        base.without(gone), kept, engine, guards=bank.guards, broken=known, guards_broken=guards, force=force
    )
    lost = {failure.edit.id for failure in again.failed} & {edit.id for edit in kept}
    again = again._replace(failed=(*draft.failed, *again.failed))
    also = [edit.id for edit in base.edits if edit.id not in {one.id for one in again.held.edits} and edit.id in gone]
    if lost and any(also):
        return _with_old(base, again, also, edits, engine, bank, broken, guards, force)
    return again


def undoes_last(bank: Bank, ids: Iterable[str]) -> bool:
    """Whether removing these edits leaves exactly the bank as it was at an earlier line of its journal."""
    named = {edit.id for edit in find(bank, list(ids))}
    kept = {edit.added for edit in bank.edits if not edit.removed and edit.id not in named}
    first = min(edit.added for edit in bank.edits if edit.id in named)
    # What is not an addition brought neurons only if it had to fit something again.
    return all(
        record["n"] not in kept if record["op"] == "add" else "segment" not in record
        for record in bank.records[first - 1 :]
    )


def change_with(folder: Path, kind: str, ids: Sequence[str], engine: Callable[[Bank], Engine] | None) -> ChangeInfo:
    """Disable, enable or remove edits; see `disable_edits`, `enable_edits` and `remove_edits`."""
    if not ids:
        raise TPatchError(f"no edit to {kind} was named; `tpatch bank list {folder}` shows their ids")
    with writing(folder):
        bank = open_to_write(folder)
        edits = find(bank, ids)
        for edit in edits:
            if edit.removed:
                raise TPatchError(f"the edit {edit.id!r} was removed for good; add its request again")
        wanted = {"disable": True, "enable": False}
        edits = [edit for edit in edits if kind == "remove" or edit.disabled != wanted[kind]]
        names = [edit.id for edit in edits]
        if not names:
            return ChangeInfo((), {}, (), () if engine is not None else None)
        before, store = states(bank), Store.new()
        record: dict[str, Any] = {"op": kind, **_stamp(), "ids": names}
        after = _imagined(bank, kind, names)
        exact = kind == "remove" and undoes_last(bank, names)
        arrays, broken = None, None
        if exact:
            broken = ()
        elif engine is not None:
            maker = engine(bank)
            known = maker.broken(assemble(bank, active(bank), store))
            base = assemble(after, active(after), store)
            draft = settle(Draft(base, {}), maker, bank.guards, known)
            entries, arrays = record_of(draft, base)
            record |= {"refitted": entries["refitted"], "gave_way": entries["gave_way"], "broken": list(draft.broken)}
            broken = draft.broken
        bank = commit(bank, record, arrays)
        now = states(bank)
        return ChangeInfo(
            tuple(names),
            {name: state for name, state in now.items() if before[name] != state},
            tuple(entry["id"] for entry in record.get("refitted", ())),
            broken,
        )


def _imagined(bank: Bank, kind: str, names: Sequence[str]) -> Bank:
    record = {"n": bank.next, "op": kind, "ids": names}
    return step(bank, record, "")


def guard_with(folder: Path, guards: Sequence[Guard], lifted: Sequence[str]) -> Bank:
    """Put guards on a bank, or lift them; see `guard_bank`."""
    with writing(folder):
        bank = open_to_write(folder)
        there = {guard.prompt for guard in bank.guards}
        for prompt in lifted:
            if prompt not in there:
                raise TPatchError(f"{folder} has no guard on {prompt!r}; `tpatch bank guard {folder}` lists them")
        if not guards and not lifted:
            return bank
        entries = [guard._asdict() for guard in guards]
        return commit(bank, {"op": "guard", **_stamp(), "guards": entries, "lifted": list(lifted)})
