"""What a bank holds: the replay of its journal, in plain Python.

An edit is *removed*, *lost*, *disabled*, *superseded* or *active*. Superseded means that a later edit with the same
prompt is there and not disabled; so when that one is disabled or removed the earlier one comes back.

A line of the journal that brought neurons is *live* until every edit that it added is removed. An edit has the neurons
of the latest live line that fitted it, and a neuron the key and bias of the latest live line that changed them. So
removing the edits of the last line leaves exactly what was there before it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from tpatch_jax.errors import TPatchError
from tpatch_jax.requests import EditRequest

__all__ = [
    "FREE",
    "SAID",
    "SAID_UNDER_TARGET",
    "Bank",
    "BankEdit",
    "Guard",
    "active",
    "find",
    "live",
    "prompt_key",
    "replay",
    "request_key",
    "states",
    "step",
]

SAID, FREE = "said_before", "free_running"
"""Where the evidence of an edit has what the model said when it was added, and that it said so of its own accord."""
SAID_UNDER_TARGET = "said_under_target"
"""The name of what older banks kept in that place: what was most probable under the target's tokens."""

Ref = tuple[int, int]
"""A neuron: the line of the journal that brought it, and its row in that line's segment."""


@dataclass(frozen=True)
class BankEdit:
    """One edit in a bank.

    Attributes:
        id: its name in the bank.
        request: what was asked for.
        added: the line of the journal that added it.
        removed: whether it was removed.
        disabled: whether it is disabled.
        fits: the lines that fitted it, each with its neurons' rows in that line's segment.
        evidence: of the latest fit status, losses, margin, steps and site; and ``said_before``, what the model said
            after the prompt when the edit was added. Banks of earlier versions did not keep that; what they kept is
            ``said_under_target``.
        evidence: of the latest fit: what the model said before, status, losses, margin, steps, site.
        reads_as: the prompt of the first edit that the model's tokenizer reads alike, where that is spelt otherwise.
    """

    id: str
    request: EditRequest
    added: int
    removed: bool = False
    disabled: bool = False
    fits: tuple[tuple[int, tuple[int, ...]], ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)
    reads_as: str | None = None

    @property
    def key(self) -> str:
        """What it has in common with every edit of the same prompt; see `prompt_key`."""
        return request_key(self.request, self.reads_as)


class Guard(NamedTuple):
    """A prompt that must keep its answer."""

    prompt: str
    answer: str


class Bank(NamedTuple):
    """What a bank holds at one line of its journal.

    Attributes:
        folder: where it is.
        manifest: its format, model and settings.
        records: the lines of its journal.
        edits: every edit that was ever added, in order.
        guards: the prompts that must keep their answers.
        lost: lines whose segment could not be mended.
        check: the seal of the last line.
    """

    folder: Path
    manifest: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...]
    edits: tuple[BankEdit, ...]
    guards: tuple[Guard, ...]
    lost: frozenset[int]
    check: str

    @property
    def next(self) -> int:
        """The number of the next line."""
        return len(self.records) + 1


def prompt_key(prompt: str) -> str:
    """Prompts that differ in white space at their ends are the same prompt."""
    return prompt.strip()


def request_key(request: EditRequest, reads_as: str | None = None) -> str:
    """What a request has in common with every request of the same prompt; one asked in a chat alone is another's.

    Args:
        request: the request.
        reads_as: the prompt of another request that the tokenizer reads alike.

    Example:
        >>> request_key(EditRequest("The sky is ", "blue"))
        'The sky is'
        >>> request_key(EditRequest("The sky is", "blue", form="chat")) == "The sky is"
        False
    """
    prompt = prompt_key(request.prompt if reads_as is None else reads_as)
    if request.form != "chat":
        return prompt
    return "\0".join(["chat", json.dumps([request.system, request.turns], ensure_ascii=False), prompt])


def step(bank: Bank, record: Mapping[str, Any], check: str) -> Bank:
    """The bank after one more line of its journal."""
    number, kind = record["n"], record["op"]
    edits, guards, lost = list(bank.edits), bank.guards, bank.lost
    named = set(record.get("ids", ()))
    if kind == "add":
        for entry in record["edits"]:
            edits.append(BankEdit(entry["id"], _request(entry), number, reads_as=entry.get("reads_as")))
    elif kind in ("disable", "enable", "remove"):
        change: dict[str, Any] = {"removed": True} if kind == "remove" else {"disabled": kind == "disable"}
        edits = [replace(edit, **change) if edit.id in named else edit for edit in edits]
    elif kind == "guard":
        fresh = [Guard(entry["prompt"], entry["answer"]) for entry in record["guards"]]
        lifted = {guard.prompt for guard in fresh} | set(record.get("lifted", ()))
        guards = (*(guard for guard in guards if guard.prompt not in lifted), *fresh)
    elif kind == "repair":
        lost = lost | set(record["lost"])
    else:
        raise TPatchError(
            f"{bank.folder}: line {number} of the journal does {kind!r}, which this version cannot; upgrade tpatch-jax"
        )
    fitted = {entry["id"]: entry for entry in (*record.get("edits", ()), *record.get("refitted", ()))}
    edits = [
        replace(edit, fits=(*edit.fits, (number, tuple(entry["neurons"]))), evidence=_evidence(edit, entry["evidence"]))
        if (entry := fitted.get(edit.id))
        else edit
        for edit in edits
    ]
    return Bank(bank.folder, bank.manifest, (*bank.records, record), tuple(edits), guards, lost, check)


def _evidence(edit: BankEdit, told: Mapping[str, Any]) -> dict[str, Any]:
    """The evidence of a fit; what the model said before is that of the moment when the edit was added."""
    if told.get(FREE):
        return dict(told)
    kept = dict(edit.evidence) if edit.fits else {SAID: None, SAID_UNDER_TARGET: told.get(SAID)}
    names = (SAID, FREE, SAID_UNDER_TARGET)
    return {**told, **{name: kept[name] for name in names if name in kept and (name == SAID or kept[name] is not None)}}


def _request(entry: Mapping[str, Any]) -> EditRequest:
    return EditRequest(
        entry["prompt"],
        entry["target"],
        entry.get("subject"),
        tuple(entry.get("rephrases", ())),
        tuple(entry.get("locality", ())),
        entry["id"],
        entry.get("join"),
        tuple(entry.get("keep", ())),
        entry.get("form"),
        entry.get("system"),
        tuple((turn["role"], turn["content"]) for turn in entry.get("turns", ())),
        tuple(entry.get("aliases", ())),
    )


def replay(folder: Path, manifest: Mapping[str, Any], records: Sequence[tuple[Mapping[str, Any], str]]) -> Bank:
    """The bank that a manifest and the lines of a journal make.

    Args:
        folder: where it is.
        manifest: what ``bank.json`` says.
        records: each line's record and seal, in order.
    """
    bank = Bank(folder, manifest, (), (), (), frozenset(), manifest["check"])
    for record, check in records:
        bank = step(bank, record, check)
    return bank


def live(bank: Bank) -> frozenset[int]:
    """The lines whose neurons count."""
    kept = {edit.added for edit in bank.edits if not edit.removed}
    dead = {record["n"] for record in bank.records if record["op"] == "add" and record["n"] not in kept}
    return frozenset(record["n"] for record in bank.records) - dead - bank.lost


def states(bank: Bank) -> dict[str, str]:
    """Of each edit whether it is active, disabled, superseded, removed or lost."""
    alive, state_of, latest = live(bank), {}, {}
    for edit in reversed(bank.edits):
        key = edit.key
        if edit.removed:
            state_of[edit.id] = "removed"
        elif not any(line in alive for line, _ in edit.fits):
            state_of[edit.id] = "lost"
        elif edit.disabled:
            state_of[edit.id] = "disabled"
        elif key in latest:
            state_of[edit.id] = "superseded"
        else:
            state_of[edit.id] = "active"
            latest[key] = edit.id
    return {edit.id: state_of[edit.id] for edit in bank.edits}


def active(bank: Bank) -> list[BankEdit]:
    """The edits that the model shall follow, in order."""
    state_of = states(bank)
    return [edit for edit in bank.edits if state_of[edit.id] == "active"]


def find(bank: Bank, ids: Sequence[str]) -> list[BankEdit]:
    """Edits by their ids.

    Raises:
        TPatchError: there is none of such an id.
    """
    known = {edit.id: edit for edit in bank.edits}
    for name in ids:
        if name not in known:
            raise TPatchError(f"{bank.folder} has no edit {name!r}; `tpatch bank list {bank.folder}` shows their ids")
    return [known[name] for name in dict.fromkeys(ids)]
