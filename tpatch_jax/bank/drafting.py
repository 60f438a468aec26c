"""From requests to what one line of the journal will say: fitted, checked against everything else, refitted with it.

Arrays, edits and an `Engine` only: nothing here touches the disk.
"""

from collections.abc import Iterable, Sequence
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np

from tpatch_jax.bank.assembly import Held, join_neurons, take_neurons
from tpatch_jax.bank.guards import guarded_reason
from tpatch_jax.bank.method import Engine, Stepped
from tpatch_jax.bank.pieces import join_pieces
from tpatch_jax.bank.segments import Arrays
from tpatch_jax.bank.state import BankEdit, Guard

__all__ = ["Draft", "Failure", "fit_new", "fit_superseding", "record_of", "settle"]

NEW = 0
"""The line that neurons belong to which are in no segment yet; their places are numbers that never come twice."""
ROUNDS = 2
EXPLAINED = 8

# What an engine knows of an edit it knows beside certain neurons: those of another try are others.
_numbers = count()


class Failure(NamedTuple):
    """A request that is not taken into the bank, and why."""

    edit: BankEdit
    reason: str


class Draft(NamedTuple):
    """What shall be committed.

    Attributes:
        held: all edits as they will be.
        evidence: of each edit that was fitted, by id.
        failed: requests that are left out.
        broken: held edits that do not come out.
        guards: guarded prompts whose answers do not come out.
    """

    held: Held
    evidence: dict[str, Any]
    failed: tuple[Failure, ...] = ()
    broken: tuple[str, ...] = ()
    guards: tuple[Guard, ...] = ()


def _absorb(held: Held, edits: Sequence[BankEdit], stepped: Stepped) -> Held:
    """What is held, with neurons that gave way, and with the edits that hold now."""
    neurons = {name: np.array(array) for name, array in held.neurons.items()}
    refs = list(held.refs)
    for row, (key, bias) in stepped.changed.items():
        neurons["key"][row], neurons["bias"][row] = key, bias
    taken = [(edit, result) for edit, result in zip(edits, stepped.results, strict=True) if result.held]
    owner, first = held.owner.tolist(), len(held.edits)
    for at, (_, result) in enumerate(taken, first):
        size = len(result.neurons["bias"])
        owner += [at] * size
        refs += [(NEW, number) for number in islice(_numbers, size)]
    return Held(
        (*held.edits, *(edit for edit, _ in taken)),
        join_neurons([neurons, *(result.neurons for _, result in taken)], neurons["key"].shape[1]),
        tuple(refs),
        np.asarray(owner, np.int64),
        (*held.pieces, *(result.piece for _, result in taken)),
    )


def _fit(draft: Draft, edits: Sequence[BankEdit], engine: Engine, guards: Sequence[Guard]) -> tuple[Draft, Stepped]:
    stepped = engine.step(draft.held, [edit.request for edit in edits], guards)
    fitted = {edit.id: result.evidence for edit, result in zip(edits, stepped.results, strict=True) if result.held}
    failed = [
        Failure(edit, result.reason) for edit, result in zip(edits, stepped.results, strict=True) if not result.held
    ]
    held = _absorb(draft.held, edits, stepped)
    return draft._replace(held=held, evidence={**draft.evidence, **fitted}, failed=(*draft.failed, *failed)), stepped


def fit_new(
    held: Held,
    edits: Sequence[BankEdit],
    engine: Engine,
    *,
    guards: Sequence[Guard] = (),
    broken: Iterable[str] = (),
    guards_broken: Iterable[Guard] = (),
    force: bool = False,
) -> Draft:
    """Fit new edits beside what is held.

    What fails is tried once more together with the earlier edits nearest to it. Earlier edits that no longer come out
    are fitted again. If that does not help, or a guarded answer changes, the requests are tried in two halves, down to
    the single one that is at fault, which then fails.

    Args:
        held: what is active, without what the new edits supersede.
        edits: the new ones, with different prompts.
        engine: the editing method.
        guards: prompts that must keep their answers.
        broken: held edits that did not come out before either.
        guards_broken: guards whose answer did not come out before either.
        force: whether guarded answers may change.
    """
    before, lost_guards = set(broken), set(guards_broken)
    start = Draft(held, {}, (), tuple(before), tuple(guards_broken))
    problems = engine.problems([edit.request for edit in edits])
    bad = tuple(Failure(edits[number], reason) for number, reason in sorted(problems.items()))
    good = [edit for number, edit in enumerate(edits) if number not in problems]
    if not good:
        return start._replace(failed=bad)
    silent = () if force else guards
    draft, _ = _fit(start, good, engine, silent)
    if draft.failed and held.edits:
        draft = _with_neighbours(draft, engine, silent)
    draft = settle(draft, engine, silent, before)
    changed = tuple(guard for guard in engine.guards_broken(draft.held, guards))
    harm = [name for name in draft.broken if name not in before]
    spoilt = [] if force else [guard for guard in changed if guard not in lost_guards]
    if harm or spoilt:
        return _halves(start, good, bad, engine, guards, harm, spoilt, force)
    failed = _explained(draft, engine, guards, lost_guards) if guards and not force else draft.failed
    return draft._replace(failed=(*bad, *failed), guards=changed)


def fit_superseding(
    base: Held,
    edits: Sequence[BankEdit],
    engine: Engine,
    *,
    guards: Sequence[Guard],
    broken: Sequence[str],
    guards_broken: Sequence[Guard],
    force: bool,
) -> Draft:
    """`fit_new` with the held edits taken out whose prompts the new ones have.

    A request that fails must not cost the edit that it would have superseded: then the others are fitted again beside
    that edit.

    Args:
        base: what is active.
        edits: the new edits, with different prompts.
        engine: the editing method.
        guards: prompts that must keep their answers.
        broken: edits that did not come out before either.
        guards_broken: guards whose answer did not come out before either.
        force: whether guarded answers may change.
    """
    failed: tuple[Failure, ...] = ()
    while edits:
        wanted = {edit.key: edit.id for edit in edits}
        superseded = {edit.id: wanted[edit.key] for edit in base.edits if edit.key in wanted}
        known = [name for name in broken if name not in superseded]
        left = base.without(superseded)
        draft = fit_new(left, edits, engine, guards=guards, broken=known, guards_broken=guards_broken, force=force)
        failed = (*failed, *draft.failed)
        lost = {failure.edit.id for failure in draft.failed}
        if not lost & set(superseded.values()):
            return draft._replace(failed=failed)
        edits = [edit for edit in edits if edit.id not in lost]
    return Draft(base, {}, failed, tuple(broken), tuple(guards_broken))


def _halves(
    start: Draft, good: list[BankEdit], bad: tuple[Failure, ...], engine: Engine, guards: Sequence[Guard],
    harm: Sequence[str], spoilt: Sequence[Guard], force: bool,
) -> Draft:  # fmt: skip
    if len(good) == 1:
        if spoilt:
            reason = guarded_reason(spoilt[0])
        else:
            reason = f"it would break {', '.join(harm)}; remove that edit first, or reword the request"
        return start._replace(failed=(*bad, Failure(good[0], reason)))
    draft, middle = start, len(good) // 2
    evidence: dict[str, Any] = {}
    failed = bad
    for part in (good[:middle], good[middle:]):
        draft = fit_new(
            draft.held, part, engine, guards=guards, broken=draft.broken, guards_broken=draft.guards, force=force
        )
        evidence |= draft.evidence
        failed = (*failed, *draft.failed)
    return draft._replace(evidence=evidence, failed=failed)


def _explained(draft: Draft, engine: Engine, guards: Sequence[Guard], lost: set[Guard]) -> tuple[Failure, ...]:
    """Which failures are the guards' doing: what would hold without them and change a guarded answer."""
    explained = []
    for failure in draft.failed[:EXPLAINED]:
        tried, _ = _fit(draft._replace(failed=()), [failure.edit], engine, ())
        spoilt = [] if tried.failed else [g for g in engine.guards_broken(tried.held, guards) if g not in lost]
        explained.append(failure._replace(reason=guarded_reason(spoilt[0])) if spoilt else failure)
    return (*explained, *draft.failed[EXPLAINED:])


def _with_neighbours(draft: Draft, engine: Engine, guards: Sequence[Guard]) -> Draft:
    """Try what failed once more, together with the edits that are nearest to it."""
    lost = [failure.edit for failure in draft.failed]
    names = set(engine.near(draft.held, [edit.request for edit in lost]))
    near = [edit for edit in draft.held.edits if edit.id in names]
    tried = draft._replace(held=draft.held.without(names), failed=())
    tried, stepped = _fit(tried, [*near, *lost], engine, guards)
    holds = [result.held for result in stepped.results]
    return tried if all(holds[: len(near)]) and any(holds[len(near) :]) else draft


def settle(draft: Draft, engine: Engine, guards: Sequence[Guard], before: Iterable[str] = ()) -> Draft:
    """Fit again what no longer comes out beside everything else.

    Args:
        draft: what is held.
        engine: the editing method.
        guards: prompts on which what is fitted stays silent.
        before: edits that did not come out before either, and stay as they are.
    """
    before = set(before)
    broken = engine.broken(draft.held)
    for _ in range(ROUNDS):
        again = [edit for edit in draft.held.edits if edit.id in broken and edit.id not in before]
        if not again:
            break
        tried, stepped = _fit(draft._replace(held=draft.held.without(edit.id for edit in again)), again, engine, guards)
        if not all(result.held for result in stepped.results):
            break
        draft, broken = tried, engine.broken(tried.held)
    return draft._replace(broken=tuple(broken))


def record_of(draft: Draft, base: Held) -> tuple[dict[str, Any], Arrays | None]:
    """What the journal and the segment say about a draft.

    Args:
        draft: what shall be committed.
        base: what was committed before.

    Returns:
        For the record ``edits`` and ``refitted``, each ``{"id", "neurons", "evidence"}``, and ``gave_way``, the ids
        of the edits whose neurons changed; and the arrays.
    """
    there = {edit.id for edit in base.edits}
    rows_of: dict[int, list[int]] = {number: [] for number in range(len(draft.held.edits))}
    for row, number in enumerate(draft.held.owner.tolist()):
        rows_of[number].append(row)
    parts, pieces, entries, first = [], [], [], 0
    fitted = [n for n, edit in enumerate(draft.held.edits) if edit.id in draft.evidence]
    # new edits first: in the segment their pieces come in the order in which the record names them
    for number in sorted(fitted, key=lambda n: draft.held.edits[n].id in there):
        edit, rows = draft.held.edits[number], rows_of[number]
        parts.append(take_neurons(draft.held.neurons, rows))
        pieces.append(draft.held.pieces[number])
        entries.append({"id": edit.id, "neurons": [*range(first, first + len(rows))],
                        "evidence": draft.evidence[edit.id]})  # fmt: skip
        first += len(rows)
    place = {ref: row for row, ref in enumerate(base.refs)}
    moved, gave_way = [], []
    for row, ref in enumerate(draft.held.refs):
        edit = draft.held.edits[int(draft.held.owner[row])]
        if edit.id in draft.evidence or ref not in place:
            continue
        old = place[ref]
        if (draft.held.neurons["key"][row] != base.neurons["key"][old]).any() or (
            draft.held.neurons["bias"][row] != base.neurons["bias"][old]
        ):
            moved.append(row)
            gave_way.append(edit.id)
    record = {
        "edits": [entry for entry in entries if entry["id"] not in there],
        "refitted": [entry for entry in entries if entry["id"] in there],
        "gave_way": list(dict.fromkeys(gave_way)),
    }
    if not entries and not moved:
        return record, None
    arrays = join_neurons(parts, base.neurons["key"].shape[1])
    if pieces:
        arrays |= join_pieces(pieces)
    if moved:
        arrays["changed"] = np.asarray([draft.held.refs[row] for row in moved], np.int64)
        arrays["changed_key"] = draft.held.neurons["key"][moved]
        arrays["changed_bias"] = draft.held.neurons["bias"][moved]
    return record, arrays
