"""One evaluation: methods, a protocol, records in; figures, costs and a report folder out."""

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import Array

from tpatch_jax.core.checks import random_key
from tpatch_jax.core.devices import automatically
from tpatch_jax.editors.registry import Method, find_method, method_settings
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.circumstances import package_versions, peak_memory
from tpatch_jax.evaluation.contamination import contaminated_probes, count_probes
from tpatch_jax.evaluation.data_notes import DataNotes
from tpatch_jax.evaluation.forms import (
    answer_questions,
    as_forms,
    check_decoder,
    form_prompts,
    is_chat,
    long_text,
    old_answers,
    question_rows,
    records_in_chat,
)
from tpatch_jax.evaluation.generated import sentences
from tpatch_jax.evaluation.journal import Journal, finish_report, reporting
from tpatch_jax.evaluation.protocols import ACCURACY, ELSEWHERE, MOMENTS, PROTOCOLS, SAID, Forms, Setup, unedited
from tpatch_jax.evaluation.recalled import recall_answers
from tpatch_jax.evaluation.records import Probe, Record
from tpatch_jax.evaluation.report import SCHEMA, write_report
from tpatch_jax.evaluation.running_text import WINDOW, read_windows
from tpatch_jax.evaluation.scoring import ScoredPrompts, ask, base_scores
from tpatch_jax.evaluation.subject_specificity import FRAMES_EACH, OtherFact, continue_facts, facts_about
from tpatch_jax.models.chat import check_chat, render_requests
from tpatch_jax.models.fingerprint import fingerprint, fingerprint_attached
from tpatch_jax.models.model import Model
from tpatch_jax.requests import request_fields
from tpatch_jax.storage.cache import cache_folder
from tpatch_jax.storage.finished_parts import hash_file
from tpatch_jax.typing import Progress

__all__ = ["evaluate"]

_log = logging.getLogger(__name__)


@automatically
def evaluate(
    model: Model,
    records: Sequence[Record],
    methods: Sequence[str] = ("tpatcher",),
    protocol: str = "batch",
    *,
    output: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    train: Sequence[Record] = (),
    held_out: Sequence[Record] = (),
    text: str | Path | None = None,
    text_tokens: int = 16384,
    memory: str | Path | None = None,
    generate: bool = False,
    other_facts: int = FRAMES_EACH,
    forms: str | Sequence[str] = (),
    samples: int = 0,
    every: int = 50,
    seed: int = 0,
    cache: bool = True,
    about: Mapping[str, Any] | None = None,
    notes: DataNotes | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Edit a model by one or more methods and measure what each does; the unedited model is always measured too.

    Patches with a sharp threshold are evaluated attached with ReLU, others with the network's own activation; see
    `tpatch_jax.evaluation.scoring`.

    Args:
        model: the model; not changed.
        records: what is edited and asked; none to measure the model on ``text`` alone.
        methods: names from `tpatch_jax.editors.registry.METHODS`.
        protocol: ``single``, ``batch`` or ``sequential``; see `tpatch_jax.evaluation.protocols`.
        output: the report folder. A run that was interrupted goes on there. ``None`` writes nothing.
        settings: each method's settings by its name; its default preset where absent.
        train: records that are only asked, for TrainR of ``sequential``; see
            `tpatch_jax.evaluation.record.asked_only`.
        held_out: records that are never edited, for TestR of ``sequential``.
        text: a UTF-8 text file for perplexity, agreement and the certificate.
        text_tokens: at most so many tokens of it, from its start.
        memory: a text file on whose queries patches stay silent; by default text is sampled from the model.
        generate: also sample continuations for GE, which is slow.
        other_facts: so many other facts about each edited subject are asked in each form, for ``subject_specificity``
            (`tpatch_jax.evaluation.subject_specificity`); 0 asks none.
        forms: in which forms the requests are asked, to be answered freely up to a natural stop: of
            `tpatch_jax.evaluation.forms.FORM_NAMES`; none by default. Long forms begin with text of ``text``, or with
            what the model itself samples.
        samples: so many answers in each form are drawn as well, at temperature 0.7, with seeds from ``seed`` on.
        every: after so many edits of a stream all edits so far are asked again.
        seed: the same seed gives the same figures on one machine.
        cache: keep what the unedited model says on disk between runs.
        about: further entries of the report's ``config``, such as the data set's name; ``data_sha256`` is taken out.
        notes: what the reader of the records passed over and left out; goes into the report, as ``data``. Records that
            this model cannot be asked are passed over and noted too, unless the notes are strict.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        The report: ``schema, config, seed, versions, data_sha256, data, probes, results``. Each result has ``method,
        protocol, moment, n, metrics, cost``, ``subject_specificity`` with the numbers of prompts where other facts
        were asked, ``forms`` where answers were free (`tpatch_jax.evaluation.forms.form_totals`), and ``curves`` over
        the number of edits in a stream; ``properties`` says of most methods whether edits can be undone and whether an
        edited model can be a stock checkpoint (`tpatch_jax.editors.registry.Method`). ``probes`` has of
        each kind how many there are and how many are contaminated; figures over the others are ``<figure>_clean``.

    Raises:
        TPatchError: no such method or protocol, no record that can be asked, or a folder that holds another run, or in
            which another process measures.

    Example:
        >>> from tpatch_jax.evaluation.records import read_records
        >>> records = read_records("counterfact", "counterfact.json", n=100)  # doctest: +SKIP
        >>> evaluate(model, records, protocol="single")["results"][1]["metrics"]["ES"]  # doctest: +SKIP
        1.0
    """
    if protocol not in PROTOCOLS:
        raise TPatchError(f"there is no protocol {protocol!r}; choose from {', '.join(PROTOCOLS)}")
    if not records and text is None:
        raise TPatchError("there is nothing to measure; give records, a text file or both")
    if isinstance(other_facts, bool) or not isinstance(other_facts, int) or other_facts < 0:
        raise TPatchError(f"{other_facts!r} other facts a subject are impossible; give 0 or more")
    chosen_forms = as_forms(forms) if forms else []
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
        raise TPatchError(f"{samples!r} samples of each answer are impossible; give 0 or more")
    if samples and not chosen_forms:
        raise TPatchError("answers are sampled in forms, and none is given; give --forms as well (forms=)")
    if any(map(is_chat, chosen_forms)):
        check_chat(model)
    elif chosen_forms:
        check_decoder(model)
    if every < 1:
        raise TPatchError(f"checks every {every} edits are impossible; give 1 or more")
    chosen = [find_method(name) for name in dict.fromkeys(methods) if name != "unedited"] if records else []
    used = {**method_settings([method.name for method in chosen]), **(settings or {})}
    place = cache_folder() if cache else None
    # What cannot work says so before anything is measured, and before a folder is in the way of the next run.
    editors = {method.name: method.build(used[method.name], memory, place, progress) for method in chosen}
    for method in chosen:
        method.check(model, used[method.name])
    learnt = {method.name: told for method in chosen if (told := method.learnt(model, used[method.name]))}
    told = DataNotes(records=len(records)) if notes is None else notes
    # The notes are of the records' file; what is only asked may come from others.
    elsewhere, earlier = DataNotes(told.strict), len(told.passed_over)
    records = _askable(model, records_in_chat(model, records), told)
    train, held_out = (_askable(model, records_in_chat(model, some), elsewhere) for some in (train, held_out))
    for reason in [*told.passed_over[earlier:], *elsewhere.passed_over]:
        _log.warning("a record is passed over: %s", reason)
    prepared = _ask(model, records, train, held_out, text, text_tokens, seed)
    marks = contaminated_probes(records, protocol != "single")
    probes = count_probes(records, marks)
    extra = dict(about or {})
    data_sha256 = extra.pop("data_sha256", None) or _content(records)
    config = {
        **extra,
        "model": model.name,
        "fingerprint": fingerprint(model),
        **({"attached": mark} if (mark := fingerprint_attached(model)) else {}),
        "methods": [method.name for method in chosen],
        "protocol": protocol,
        "n": len(records),
        "settings": {method.name: asdict(used[method.name]) for method in chosen},
        "activation": _activation(model, chosen, used),
        "text": None if text is None else {"sha256": hash_file(text), "tokens": text_tokens, "window": WINDOW},
        "memory": None if memory is None else hash_file(memory),
        "generate": generate,
        "every": every,
        "seed": seed,
    }
    # Only what differs from the default, so that folders that do not know it can be gone on with.
    config |= {"other_facts": other_facts} if other_facts != FRAMES_EACH else {}
    config |= {"forms": chosen_forms, "samples": samples} if chosen_forms else {}
    config = json.loads(json.dumps(config, default=list))
    folder = None if output is None else Path(output)
    beside = {"train": train, "held_out": held_out}
    contents: dict[str, Any] = {f"{name}_sha256": _content(others) for name, others in beside.items() if others}
    contents |= {"learnt": learnt} if learnt else {}
    contents |= {"records_sha256": _content(records), "data_sha256": data_sha256}
    tell = progress or (lambda what, done, total: None)
    with reporting(folder, {**config, **contents}) as whole, jax.default_matmul_precision("highest"):
        if whole is not None:
            return whole
        mixed = {kind for kind, count in probes.items() if count["contaminated"]}
        wanted = [{kind: mark for kind, mark in marked.items() if kind in mixed} for marked in marks]
        facts = _facts(model, records, other_facts)
        setup = _prepare(model, records, train, held_out, prepared, wanted, generate, facts, every, cache, tell)
        setup = setup._replace(forms=_forms(setup, chosen_forms, text, samples, seed))
        results, lines = [], {}
        for name, settled in [("unedited", None), *((method.name, method) for method in chosen)]:
            journal = Journal(name, folder)
            result = journal.result()
            if result is None:
                began = time.perf_counter()
                if settled is None:
                    result = unedited(setup, journal)
                else:
                    result = PROTOCOLS[protocol](setup, settled, editors[name], journal)
                cost = {
                    **result["cost"],
                    "total_seconds": time.perf_counter() - began,
                    "peak_memory_mib": peak_memory(),
                }
                common: dict[str, Any] = {"method": name, "protocol": protocol}
                common |= {"moment": MOMENTS[protocol], "n": len(records)}
                if settled is not None and settled.properties:
                    common["properties"] = settled.properties
                result = json.loads(json.dumps({**common, **result, "cost": cost}))
                journal.finish(result)
            results.append(result)
            lines[name] = journal.lines
        report = {
            "schema": SCHEMA,
            "config": config,
            "seed": seed,
            "versions": package_versions(),
            "data_sha256": data_sha256,
            "data": told.summary(),
            "probes": probes,
            "results": results,
        }
        if folder is not None:
            write_report(folder, report, lines)
            finish_report(folder)
        return report


def _askable(model: Model, records: Sequence[Record], notes: DataNotes) -> Sequence[Record]:
    """The records whose probes the model can read; the others are noted."""
    kept, reasons = [], []
    for record in records:
        try:
            ask(model, [probe for probes in record.probes.values() for probe in probes])
        except TPatchError as error:
            reasons.append(str(error) if record.id in str(error) else f"{record.id}: {error}")
        else:
            kept.append(record)
    if reasons and not kept:
        raise TPatchError(reasons[0])
    for reason in reasons:
        notes.pass_over(reason)
    return kept


def _facts(model: Model, records: Sequence[Record], count: int) -> list[OtherFact]:
    """Other facts about the edited subjects, each with the number of its record."""
    edits = [(number, request) for number, record in enumerate(records) for request in record.requests]
    facts = facts_about(model, [request for _, request in edits], count=count) if count else []
    return [fact._replace(number=edits[fact.number][0]) for fact in facts]


def _forms(setup: Setup, forms: Sequence[str], text: str | Path | None, samples: int, seed: int) -> Forms:
    """What is asked freely, form by form: each request, numbered as its record, and unrelated questions in a chat."""
    if not forms or not setup.records:
        return Forms()
    model, edits = setup.model, [(n, request) for n, record in enumerate(setup.records) for request in record.requests]
    requests = [request for _, request in edits]
    told = [text for texts in setup.said for text in texts]
    told += [None] * (len(requests) - len(told))
    known = []
    for number, _ in edits:
        record = setup.records[number]
        true = [probe.target for probe in record.probes.get("rewrite_true", ())]
        known.append((*true, *record.old_answers) if len(record.requests) == 1 else ())
    before = long_text(model, text) if any(form.endswith("long") for form in forms) else ""
    prompts = form_prompts(
        model, requests, forms, long=before, old=old_answers(requests, told, known), numbers=[n for n, _ in edits]
    )
    questions: list[list[int]] = []
    if any(map(is_chat, forms)):
        questions = recall_answers(
            setup.cache, model, "questions", question_rows(model), lambda: answer_questions(model)
        )
    return Forms(prompts, samples, seed, questions)


class _Prepared(NamedTuple):
    """Everything that will be asked, in tokens, each distinct probe once; the running text; the random key."""

    probes: list[Probe]
    tokens: ScoredPrompts
    windows: ScoredPrompts | None
    rng: Array


def _ask(
    model: Model,
    records: Sequence[Record],
    train: Sequence[Record],
    held_out: Sequence[Record],
    text: str | Path | None,
    text_tokens: int,
    seed: int,
) -> _Prepared:
    asked = [probe for record in records for probes in record.probes.values() for probe in probes]
    others = [record.probes.get(kind, ()) for record in (*train, *held_out) for kind in (*ELSEWHERE, *ACCURACY)]
    asked += [probe for probes in others for probe in probes]
    probes = list(dict.fromkeys(asked))
    windows = None if text is None else read_windows(model, text, text_tokens)
    return _Prepared(probes, ask(model, probes), windows, random_key(seed))


def _prepare(
    model: Model,
    records: Sequence[Record],
    train: Sequence[Record],
    held_out: Sequence[Record],
    prepared: _Prepared,
    contaminated: Sequence[Mapping[str, Sequence[bool]]],
    generate: bool,
    facts: Sequence[OtherFact],
    every: int,
    cache: bool,
    tell: Progress,
) -> Setup:
    """The unedited model's answers to everything that will be asked."""
    probes, tokens, windows, rng = prepared
    place = cache_folder() if cache else None
    base = base_scores(model, tokens, cache=place, tell=lambda done: tell("reading probes", done, len(probes)))
    running = None
    if windows is not None:
        count = len(windows.rows)
        running = base_scores(model, windows, cache=place, tell=lambda done: tell("reading the text", done, count))
    index = {probe: number for number, probe in enumerate(probes)}
    asked = render_requests(model, [request for record in records[:SAID] for request in record.requests])
    prompts = [request.prompt for request in asked]
    told = recall_answers(
        place, model, "sentences", [model.encode(prompt) for prompt in prompts], lambda: sentences(model, prompts)
    )
    texts = iter(told)
    said = [[next(texts) for _ in record.requests] for record in records[:SAID]]
    known = recall_answers(place, model, "facts", [fact.row for fact in facts], lambda: continue_facts(model, facts))
    shared = (model, records, train, held_out, base, index, running, rng, contaminated)
    return Setup(*shared, generate, every, tell, said, facts, known, cache=place)


def _activation(model: Model, methods: Sequence[Method], used: Mapping[str, Any]) -> str | None:
    """What neurons are activated with, if a method adds any."""
    names = (method.activation(model, used[method.name]) for method in methods)
    return next((name for name in names if name is not None), None)


def _content(records: Sequence[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        fields = {**asdict(record), "requests": [request_fields(request) for request in record.requests]}
        digest.update(json.dumps(fields, sort_keys=True).encode())
    return digest.hexdigest()
