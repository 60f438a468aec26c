"""Disabling, enabling and removing edits, and guarding answers: each is one line of the journal, or none."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tpatch_jax.bank.assembly import Store, assemble
from tpatch_jax.bank.commit import commit, open_to_write
from tpatch_jax.bank.drafting import Draft, record_of, settle
from tpatch_jax.bank.lock import writing
from tpatch_jax.bank.method import Engine
from tpatch_jax.bank.state import Bank, Guard, active, find, states, step
from tpatch_jax.errors import TPatchError

__all__ = ["ChangeInfo", "change_with", "guard_with", "undoes_last"]


class ChangeInfo(NamedTuple):
    """What became of edits that were disabled, enabled or removed.

    Attributes:
        ids: the edits whose state changed.
        states: of every edit whose state is another one now, what it is.
        refitted: ids of other edits that had to be fitted again.
        broken: ids of active edits that do not come out now; ``None`` where no model was given to ask.
        guards_broken: guarded prompts whose answers came out before and do not now; ``None`` where no model was asked.
    """

    ids: tuple[str, ...]
    states: dict[str, str]
    refitted: tuple[str, ...]
    broken: tuple[str, ...] | None
    guards_broken: tuple[str, ...] | None = None


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


def check_named(folder: str | Path, kind: str, ids: Sequence[str]) -> None:
    """Make sure that there is something to disable, enable or remove.

    Raises:
        TPatchError: no edit is named.
    """
    if not ids:
        raise TPatchError(f"no edit to {kind} was named; `tpatch bank list {folder}` shows their ids")


def change_with(folder: Path, kind: str, ids: Sequence[str], engine: Callable[[Bank], Engine] | None) -> ChangeInfo:
    """Disable, enable or remove edits; see `disable_edits`, `enable_edits` and `remove_edits`."""
    check_named(folder, kind, ids)
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
            nothing = () if engine is not None else None
            return ChangeInfo((), {}, (), nothing, nothing)
        before, store = states(bank), Store.new()
        record: dict[str, Any] = {"op": kind, "ids": names}
        after = _imagined(bank, kind, names)
        exact = kind == "remove" and undoes_last(bank, names)
        arrays, broken, changed = None, None, None
        if exact:
            broken = ()
        elif engine is not None:
            maker = engine(bank)
            held = assemble(bank, active(bank), store)
            known, lost = maker.broken(held), maker.guards_broken(held, bank.guards)
            base = assemble(after, active(after), store)
            draft = settle(Draft(base, {}), maker, bank.guards, known)
            entries, arrays = record_of(draft, base)
            record |= {"refitted": entries["refitted"], "gave_way": entries["gave_way"], "broken": list(draft.broken)}
            broken = draft.broken
            spoilt = [guard for guard in maker.guards_broken(draft.held, bank.guards) if guard not in lost]
            if spoilt and kind == "enable":
                raise TPatchError(
                    f"to enable {', '.join(names)} would change the guarded answer {spoilt[0].answer.strip()!r} after "
                    f"{spoilt[0].prompt!r}; `tpatch bank guard {folder} --lift PROMPT` gives the guard up"
                )
            changed = tuple(guard.prompt for guard in spoilt)
            record["guards_broken"] = list(changed)
        bank = commit(bank, record, arrays)
        now = states(bank)
        return ChangeInfo(
            tuple(names),
            {name: state for name, state in now.items() if before[name] != state},
            tuple(entry["id"] for entry in record.get("refitted", ())),
            broken,
            changed,
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
        return commit(bank, {"op": "guard", "guards": entries, "lifted": list(lifted)})
