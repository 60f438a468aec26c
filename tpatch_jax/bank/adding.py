"""Adding requests to a bank, batch after batch: each is one line of the journal, or none."""

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tpatch_jax.bank.assembly import Held, Store, assemble
from tpatch_jax.bank.commit import commit, open_to_write
from tpatch_jax.bank.drafting import Draft, fit_superseding, record_of
from tpatch_jax.bank.guards import refused_by_guards
from tpatch_jax.bank.lock import writing
from tpatch_jax.bank.method import Engine
from tpatch_jax.bank.state import FREE, SAID, Bank, BankEdit, Guard, active, prompt_key, request_key, states
from tpatch_jax.errors import TPatchError
from tpatch_jax.requests import EditRequest, request_line
from tpatch_jax.typing import Progress

__all__ = ["AddInfo", "Said", "add_with"]

Said = Callable[[Engine, Held, Sequence[EditRequest]], Sequence[str | None]]
"""What the model says of its own accord to some requests, with the held edits active."""


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


def _asked(edit: BankEdit) -> dict[str, Any]:
    return request_line(edit.request) | ({} if edit.reads_as is None else {"reads_as": edit.reads_as})


def _same(request: EditRequest) -> tuple[str, str]:
    return request_key(request), request.target.strip()


def _in_chats_too(request: EditRequest) -> bool:
    """Whether a request asks to be fitted in chats beside bare text."""
    return request.form == "both" or (request.form is None and bool(request.system is not None or request.turns))


def _covers(edit: BankEdit, request: EditRequest) -> bool:
    """Whether an edit that says what a request wants was fitted wherever that shall hold."""
    return _in_chats_too(edit.request) or not _in_chats_too(request)


Reads = Callable[[EditRequest], tuple[Hashable, Hashable] | None]
"""A request's prompt and target as the model's tokenizer reads them; ``None`` if it cannot."""


class _Alike:
    """Which requests have one prompt, and which want one thing, by what the tokenizer makes of them.

    Args:
        reads: the tokenizer's view of a request; `_same`, which only leaves out white space, where it has none.
    """

    def __init__(self, reads: Reads):
        self.reads = reads
        self._known: dict[EditRequest, tuple[Hashable, Hashable]] = {}

    def read(self, request: EditRequest) -> tuple[Hashable, Hashable]:
        """Prompt and target of a request, each equal to those that are read alike."""
        if request not in self._known:
            self._known[request] = self.reads(request) or _same(request)
        return self._known[request]

    def prompt(self, request: EditRequest) -> Hashable:
        """The prompt alone."""
        return self.read(request)[0]

    def first(self, edits: Sequence[BankEdit]) -> dict[Hashable, BankEdit]:
        """By each prompt the first edit that has it."""
        return {self.prompt(edit.request): edit for edit in reversed(edits)}


def _waiting(bank: Bank, requests: Sequence[EditRequest], resume: bool) -> list[tuple[str, EditRequest]]:
    """The requests that are not in the bank yet, with the names that they will have there."""
    taken = {edit.id for edit in bank.edits}
    state_of = states(bank)
    there = [edit.request for edit in bank.edits if state_of[edit.id] not in ("removed", "lost")]
    done = Counter((*_same(request), _in_chats_too(request)) for request in there)
    waiting, number = [], len(bank.edits)
    for request in requests:
        mark = (*_same(request), _in_chats_too(request))
        if resume and done[mark]:
            done[mark] -= 1
            continue
        name = request.id
        if name is None:
            while (name := f"edit-{(number := number + 1)}") in taken:
                pass
        elif state_of.get(name) in ("removed", "lost"):
            raise TPatchError(
                f"{bank.folder} had an edit {name!r}, which is {state_of[name]}, and keeps its name; give the request "
                "another id"
            )
        elif name in taken:
            raise TPatchError(
                f"{bank.folder} has an edit {name!r} already; give the request another id, or skip what is there "
                "with --resume"
            )
        taken.add(name)
        waiting.append((name, request))
    return waiting


def _batches(
    waiting: Sequence[tuple[str, EditRequest]], size: int, alike: _Alike
) -> Iterator[list[tuple[str, EditRequest]]]:
    """At most ``size`` requests at a time, none of which says the same prompt twice."""
    part: list[tuple[str, EditRequest]] = []
    for name, request in waiting:
        same = any(alike.prompt(other) == alike.prompt(request) for _, other in part)
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
    reads: Reads = _same,
    batch: int = 50,
    resume: bool = False,
    force: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    say: Said | None = None,
) -> AddInfo:
    """Add requests to a bank with an engine that is made once there is something to fit; see `add_edits`.

    ``reads`` tells which requests are the same to the model; by default those of the same text.
    """
    if batch < 1:
        raise TPatchError(f"batch {batch} adds nothing; give 1 or more")
    began = time.perf_counter()
    with writing(folder):
        bank = open_to_write(folder)
        waiting = _waiting(bank, requests, resume)
        total = AddInfo((), (), (), (), (), (), len(requests) - len(waiting), (), (), (), 0.0)
        # What wants something else after a guarded prompt itself is known before anything is read or fitted.
        refused = {} if force else refused_by_guards([request for _, request in waiting], bank.guards)
        told = ((waiting[n][0], waiting[n][1].prompt, waiting[n][1].target, why) for n, why in refused.items())
        total = total._replace(failed=tuple(told))
        waiting = [entry for number, entry in enumerate(waiting) if number not in refused]
        if not waiting:
            return total._replace(seconds=time.perf_counter() - began)
        maker, store = engine(bank), Store.new()
        held = assemble(bank, active(bank), store)
        broken, guards = maker.broken(held), maker.guards_broken(held, bank.guards)
        done, alike = 0, _Alike(reads)
        if progress:
            progress("adding edits", 0, len(waiting))
        for part in _batches(waiting, batch, alike):
            start = time.perf_counter()
            bank, draft, told = _add(bank, part, maker, store, alike, broken, guards, force, seed, start, say)
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
    bank: Bank, part: Sequence[tuple[str, EditRequest]], engine: Engine, store: Store, alike: _Alike,
    broken: Sequence[str], guards: Sequence[Guard], force: bool, seed: int, start: float, say: Said | None,
) -> tuple[Bank, Draft, dict[str, tuple[Any, ...]]]:  # fmt: skip
    now = {alike.prompt(edit.request): edit for edit in active(bank)}
    there = {name: now.get(alike.prompt(request)) for name, request in part}
    same = {
        name: old.id
        for name, one in part
        if (old := there[name]) and alike.read(old.request) == alike.read(one) and _covers(old, one)
    }
    known = list(same.values())
    fresh = [(name, request) for name, request in part if name not in same]
    earlier, edits = alike.first(bank.edits), []
    for name, request in fresh:
        # Under the prompt of the first edit that is read alike, if that is spelt otherwise.
        first = earlier.get(alike.prompt(request))
        spelt = (
            None
            if first is None or first.key == request_key(request)
            else prompt_key(first.request.prompt if first.reads_as is None else first.reads_as)
        )
        edits.append(BankEdit(name, request, bank.next, reads_as=spelt))
    base = assemble(bank, active(bank), store)
    draft = fit_superseding(base, edits, engine, guards=bank.guards, broken=broken, guards_broken=guards, force=force)
    failures = {failure.edit.id for failure in draft.failed}
    record, arrays = record_of(draft, base)
    superseded = [(old.id, name) for name, _ in fresh if (old := there[name]) is not None and name not in failures]
    by_name = {edit.id: edit for edit in edits}
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
    if say is not None:
        # With everything that was active at this moment, so of an edit that supersedes another, what that one said.
        said = say(engine, base, [by_name[entry["id"]].request for entry in record["edits"]])
        record["edits"] = [
            {**entry, "evidence": {**entry["evidence"], SAID: text, FREE: True}}
            for entry, text in zip(record["edits"], said, strict=True)
        ]
    record |= {
        "superseded": [{"id": old, "by": name} for old, name in superseded],
        "failed": [{"id": f[0], "prompt": f[1], "target": f[2], "reason": f[3]} for f in told["failed"]],
        "broken": list(draft.broken),
        "guards_broken": [guard.prompt for guard in draft.guards],
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 3),
    }
    return commit(bank, {"op": "add", **record}, arrays), draft, told
