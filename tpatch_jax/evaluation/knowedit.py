"""KnowEdit: its zsRE rows, and its two sets made of Wikidata; what contradicts itself in them is left out."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tpatch_jax.evaluation.comparing import plain_words
from tpatch_jax.evaluation.data_files import Entry, read_entries
from tpatch_jax.evaluation.data_notes import DataNotes, reading_notes
from tpatch_jax.evaluation.record import Probe, Record
from tpatch_jax.evaluation.templates import QUESTION, asker
from tpatch_jax.requests import EditRequest

__all__ = ["read_knowedit"]

REPHRASED = ("rephrase_prompt", "rephrase")
SPECIFIC = "relation_specificity"
_LITTLE_WORDS = frozenset({"the", "a", "an", "of", "is", "are", "was", "were", "name"})

OLD_TARGET = "records whose target is the old answer, left out"
CONTRADICTING = (
    "records in which locality prompts ask for the edited fact and want the old answer; the prompts left out"
)
AGAIN = "locality prompts that ask again what another of their record asks, left out"


class _Fact(NamedTuple):
    """What is edited: its wordings and answers as they are compared."""

    prompts: frozenset[str]
    is_question: bool
    old: frozenset[str]
    new: str


def read_knowedit(
    path: str | Path, template: str = QUESTION, *, strict: bool = False, notes: DataNotes | None = None
) -> list[Record]:
    """Read KnowEdit: its zsRE rows, or its sets made of Wikidata (``wiki_counterfact``, ``wiki_recent``).

    Fields: ``subject, prompt, target_new, ground_truth?, rephrase_prompt?, locality? {kind: [{prompt, ground_truth}]},
    portability? {kind: [{prompt, ground_truth}]}``. ``Relation_Specificity``, other facts about the same subject,
    becomes ``relation_specificity``; any other kind of locality is ``locality``; portability keeps its kinds, as in
    ``portability_subject_aliasing``. Of several ground truths the first is the target.

    The published files contradict themselves. Left out and counted are records whose target is the old answer, locality
    prompts that ask for the edited fact and want the old answer, locality prompts that ask what another of their record
    asks ("The mother of X is", "X mother"), and probes without an answer.

    Args:
        path: the file, a JSON list.
        template: where questions go: in the zsRE rows the prompt, its rephrasing and portability, in the others what
            ends in a question mark. Other prompts open a statement.
        strict: a record that cannot be read, or contradicts itself, is an error.
        notes: counts what is passed over and left out; by default the log says it.

    Returns:
        The records; ids are ``knowedit-<position from 0>``.

    Raises:
        TPatchError: the file is missing, damaged or of another data set, or no record can be read.

    Source: Zhang et al. 2024, "A Comprehensive Study of Knowledge Editing for Large Language Models".

    Example:
        >>> read_knowedit("knowedit_zsre_train.json")[0].request.target  # doctest: +SKIP
        'Jane Doe'
    """
    ask = asker(template)
    with reading_notes(path, strict, notes) as notes:
        entries = read_entries(path, "knowedit", notes)
        # The zsRE rows are questions with a rephrasing each; the others open a statement and have none.
        rephrased = next((name for name in REPHRASED for entry in entries if name in entry.content), None)

        def put(text: str) -> str:
            return ask(text) if _is_question(text, rephrased) else text

        return notes.read_each(entries, lambda entry: _record(entry, rephrased, put, notes))


def _is_question(text: str, rephrased: str | None) -> bool:
    return rephrased is not None or text.endswith(("?", "\uff1f"))


def _record(entry: Entry, rephrased: str | None, put: Callable[[str], str], notes: DataNotes) -> Record | None:
    name = f"knowedit-{entry.position}"
    text, target, subject = entry.text("prompt"), entry.text("target_new"), entry.text("subject")
    rephrase = entry.text(rephrased) if rephrased is not None else None
    old = (
        frozenset(map(plain_words, entry.answers("ground_truth"))) if entry.content.get("ground_truth") else frozenset()
    )
    wordings = frozenset(plain_words(wording) for wording in (text, rephrase) if wording is not None)
    fact = _Fact(wordings, _is_question(text, rephrased), old, plain_words(target))
    specific = _specific(entry, fact, notes)
    if fact.new in old:
        notes.leave_out(OLD_TARGET, f"{entry.where}: the target {target!r} is the old answer; take the record out")
        return None
    probes: dict[str, tuple[Probe, ...]] = {"reliability": (Probe(put(text), target),)}
    if rephrase is not None:
        probes["generalization"] = (Probe(put(rephrase), target),)
    for kind, probe in specific:
        probes[kind] = (*probes.get(kind, ()), probe)
    silent = tuple(probe.prompt for kind in (SPECIFIC, "locality") for probe in probes.get(kind, ()))
    for kind, asked in entry.kinds("portability", notes):
        probes[f"portability_{kind}"] = tuple(Probe(put(probe.prompt), probe.target) for probe, _ in asked)
    rephrases = (put(rephrase),) if rephrase is not None else ()
    return Record(name, (EditRequest(put(text), target, subject, rephrases, silent, name),), probes)


def _specific(entry: Entry, fact: _Fact, notes: DataNotes) -> list[tuple[str, Probe]]:
    """The locality probes of a record by kind, without those that contradict the edit or ask one thing twice."""
    kept: list[tuple[str, Probe]] = []
    seen, contradicts = set(), None
    for kind, asked in entry.kinds("locality", notes):
        for probe, answers in asked:
            given = frozenset(map(plain_words, answers))
            if _contradicts(fact, plain_words(probe.prompt), given):
                contradicts = contradicts or probe
                continue
            meaning = frozenset(plain_words(probe.prompt).split()) - _LITTLE_WORDS, plain_words(probe.target)
            if meaning in seen:
                notes.count(AGAIN)
                continue
            seen.add(meaning)
            kept.append((SPECIFIC if kind == SPECIFIC else "locality", probe))
    if contradicts is not None:
        reason = f"the locality prompt {contradicts.prompt!r} asks for the edited fact and wants the old answer"
        notes.leave_out(CONTRADICTING, f"{entry.where}: {reason}; take the prompt out")
    return kept


def _contradicts(fact: _Fact, prompt: str, answers: frozenset[str]) -> bool:
    if fact.new in answers - fact.old:
        return False
    # A question asks for its fact in other words than a statement about the same subject does, so the answer tells. Of
    # two statements the words do: a man may have died where he was born.
    return prompt in fact.prompts or (fact.is_question and bool(fact.old & answers))
