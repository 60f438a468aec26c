"""The three ways in which edits are made and measured: each alone, all at once, and as a stream.

``single``: each record is edited alone, from the same unedited state (nothing is loaded or collected again), and
measured right after. ``batch``: all records are edited in one step and measured after it. ``sequential``: records come
one after the other; a record is edited only if the model, with the edits so far, does not say its targets; the model is
never reset. SR and GR are measured right after each edit, everything else after the whole stream.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from tpatch_jax.core.adapters import Adapter
from tpatch_jax.core.layers import LayerPatches
from tpatch_jax.core.patch import activations, take
from tpatch_jax.editors.base import EditInfo, Editor, RequestInfo, Routing
from tpatch_jax.editors.registry import Method
from tpatch_jax.evaluation import metrics
from tpatch_jax.evaluation.chat_questions import CHAT_QUESTIONS
from tpatch_jax.evaluation.forms import (
    FormPrompt,
    answer_forms,
    answer_questions,
    compare_forms,
    form_figures,
    form_totals,
    questions_unchanged,
)
from tpatch_jax.evaluation.generated import answers, continuations, sentences
from tpatch_jax.evaluation.image_firing import image_firing
from tpatch_jax.evaluation.journal import Journal
from tpatch_jax.evaluation.metrics import Score
from tpatch_jax.evaluation.recalled import recall_answers
from tpatch_jax.evaluation.records import Probe, Record
from tpatch_jax.evaluation.running_text import text_figures
from tpatch_jax.evaluation.scoring import (
    Base,
    Outcome,
    acts_forward,
    adapted_scores,
    apply_scores,
    model_scores,
    patched_scores,
    routed_scores,
    score,
)
from tpatch_jax.evaluation.subject_specificity import (
    OtherFact,
    compare_facts,
    continue_facts,
    specificity_figures,
    specificity_totals,
)
from tpatch_jax.evaluation.token_costs import token_costs
from tpatch_jax.images import ImagePrompt, picture_source
from tpatch_jax.models.chat import render_requests
from tpatch_jax.models.model import Model

__all__ = ["MOMENTS", "PROTOCOLS", "Forms", "Setup", "unedited"]

EDITS = ("rewrite_new", "reliability")
REPHRASED = ("paraphrase_new", "generalization")
ELSEWHERE = ("neighborhood_true", "locality", "locality_answer", "relation_specificity")
ACCURACY = ("accuracy",)
RULE = "rephrasing_"
SAVE_EVERY = 10
SAID = 300
"""So many records at most are shown with what the model says of its own accord before and after."""
COUNTED = 8
"""After so many single edits at most it is counted what a generated token costs."""
HEAT = 48
"""So many records at most are shown in the heat map of activations."""

Lines = list[dict[str, Any]]
Texts = Mapping[int, Sequence[str | None]]
Facts = Mapping[int, Lines]
UNCHANGED = "chat_questions_unchanged"
FEW_QUESTIONS = 4
"""So many unrelated questions are asked after each single edit, others after the next; all after edits together."""


class Forms(NamedTuple):
    """What is measured of answers that go on freely, form by form; see `tpatch_jax.evaluation.forms`.

    Attributes:
        prompts: the requests as they are put to the model, record after record.
        samples: so many answers to each are drawn as well.
        seed: the first of their seeds.
        told: what the unedited model answers to unrelated questions in a chat; empty where none are asked.
    """

    prompts: Sequence[FormPrompt] = ()
    samples: int = 0
    seed: int = 0
    told: Sequence[Sequence[int]] = ()


class Setup(NamedTuple):
    """What every method and protocol shares.

    Attributes:
        model: the unedited model.
        records: what is edited and asked.
        train: records that are only asked; whether their answers are right makes TrainR.
        held_out: records that are never edited; their locality questions, or the answers to themselves, make TestR.
        base: the unedited model's answers to all probes.
        numbers: the number of each probe among the texts of ``base``.
        text: the unedited model on running text, if there is any.
        rng: a typed random key.
        contaminated: of each record which probes are contaminated, by the kinds of which any is.
        generate: whether GE is measured.
        every: after so many edits of a stream all edits so far are asked again.
        tell: called with what is being done, how much is done, and how much there is.
        said: what the unedited model says of its own accord after the prompts of the first records' requests.
        facts: other facts about the edited subjects, record after record.
        told: what the unedited model says to each, in tokens.
        forms: what is asked freely, form by form.
        cache: folder where the unedited model's answers are kept, if they are.
    """

    model: Model
    records: Sequence[Record]
    train: Sequence[Record]
    held_out: Sequence[Record]
    base: Base
    numbers: Mapping[Probe, int]
    text: Base | None
    rng: Array
    contaminated: Sequence[Mapping[str, Sequence[bool]]]
    generate: bool
    every: int
    tell: Callable[[str, int, int], None]
    said: Sequence[Sequence[str | None]] = ()
    facts: Sequence[OtherFact] = ()
    told: Sequence[Sequence[int]] = ()
    forms: Forms = Forms()
    cache: Path | None = None


class Edited(NamedTuple):
    """A method with the edits so far."""

    method: Method
    editor: Editor
    state: Any

    @property
    def patches(self) -> LayerPatches | None:
        return self.method.patches(self.state)

    @property
    def model(self) -> Model | None:
        return self.method.model(self.state) if self.method.model is not None else None

    @property
    def adapters(self) -> Mapping[int, Adapter] | None:
        return self.method.adapters(self.state) if self.method.adapters is not None else None

    @property
    def routing(self) -> Routing | None:
        return self.method.routing(self.state) if self.method.routing is not None else None

    def is_certified(self, model: Model) -> bool:
        """Whether it is known on which tokens an edit acts, and everything else stays as it was, bit for bit."""
        return self.patches is not None or (self.method.adapters is not None and acts_forward(model))


def _look(setup: Setup, edited: Edited, base: Base, texts: Sequence[int] | None = None, whole: bool = False) -> Outcome:
    patches, adapters, routing = edited.patches, edited.adapters, edited.routing
    if routing is not None:
        return routed_scores(base, routing, texts, whole)
    if patches is not None:
        return patched_scores(setup.model, base, patches, texts)
    if adapters is not None and acts_forward(setup.model):
        return adapted_scores(setup.model, base, adapters, texts)
    if (model := edited.model) is not None:
        return model_scores(model, base, texts)
    return apply_scores(setup.model, base, partial(edited.editor.apply, edited.state), texts)


def _texts(setup: Setup, records: Sequence[Record], kinds: Sequence[str] | None = None) -> list[int]:
    numbers = [
        setup.numbers[probe]
        for record in records
        for kind, probes in record.probes.items()
        if kinds is None or kind in kinds
        for probe in probes
    ]
    return list(dict.fromkeys(numbers))


def _scores(setup: Setup, record: Record, outcome: Outcome) -> dict[str, list[Score]]:
    asked = setup.base.asked
    return {kind: [score(asked, outcome, setup.numbers[p]) for p in probes] for kind, probes in record.probes.items()}


def _figures(
    setup: Setup,
    number: int,
    outcome: Outcome,
    model: Model | None,
    said: Texts,
    facts: Facts,
    free: Facts,
    replies: Sequence[str] | None = None,
    routing: Routing | None = None,
) -> dict[str, Any]:
    """Everything that one record shows: figures, mean NLL of each kind of probe, and what was written freely."""
    record = setup.records[number]
    before, after = _scores(setup, record, setup.base.outcome), _scores(setup, record, outcome)
    texts = []
    if setup.generate and model is not None:
        texts = continuations(model, record, jax.random.fold_in(setup.rng, number), routing)
    figures = metrics.record_figures(before, after, texts, setup.contaminated[number])
    figures |= specificity_figures(facts.get(number, ()))
    spoken = free.get(number, ())
    figures |= form_figures(*_sampled(spoken))
    nll = {kind: [one.nll for one in scores] for kind, scores in after.items()}
    line: dict[str, Any] = {
        "asked": _asked(setup, number, said),
        "probes": _probes(record, before, after),
        "figures": figures,
        "nll": {kind: float(np.mean(values)) for kind, values in nll.items() if values and not np.isnan(values).any()},
    }
    if record.questions and model is not None:
        replies = answers(model, [record], routing)[0] if replies is None else replies
        figures["mquake"] = float(metrics.any_answered(replies, record.answers, record.questions, record.old_answers))
        line["answers"] = list(replies)
    if number in facts:
        line["other_facts"] = facts[number]
    if spoken:
        line["forms"] = list(spoken)
    if texts:
        line["texts"] = texts
    return line


def _say(setup: Setup, numbers: Sequence[int], model: Model | None, routing: Routing | None) -> Texts:
    """What a model says of its own accord after the requests of those of some records that are shown so."""
    if model is setup.model and routing is None:
        return {number: setup.said[number] for number in numbers if number < len(setup.said)}
    shown = [number for number in numbers if number < len(setup.said)] if model is not None else []
    requests = [request for number in shown for request in setup.records[number].requests]
    prompts = [request.prompt for request in render_requests(setup.model, requests)]
    texts = iter(sentences(model, prompts, routing) if model is not None and prompts else ())
    return {number: [next(texts) for _ in setup.records[number].requests] for number in shown}


def _other_facts(setup: Setup, numbers: Sequence[int], model: Model | None, routing: Routing | None) -> Facts:
    """What became of other facts about the edited subjects of some records; of records that have any."""
    wanted = set(numbers)
    places = [place for place, fact in enumerate(setup.facts) if fact.number in wanted and model is not None]
    if model is None or not places:
        return {}
    facts, before = [setup.facts[place] for place in places], [setup.told[place] for place in places]
    unchanged = model is setup.model and routing is None
    lines = compare_facts(setup.model, facts, before, before if unchanged else continue_facts(model, facts, routing))
    of_records: dict[int, Lines] = {}
    for fact, line in zip(facts, lines, strict=True):
        of_records.setdefault(fact.number, []).append(line)
    return of_records


def _free(setup: Setup, numbers: Sequence[int], model: Model | None, routing: Routing | None) -> Facts:
    """What a model says freely to some records' requests, form by form; of records that are asked so."""
    wanted, forms = set(numbers), setup.forms
    prompts = [prompt for prompt in forms.prompts if prompt.number in wanted and model is not None]
    if model is None or not prompts:
        return {}
    of_records: dict[int, Lines] = {}
    for seed in (None, *(forms.seed + number for number in range(forms.samples))):
        ask = partial(answer_forms, model, prompts, routing, seed=seed)
        if model is setup.model and routing is None:
            asked = [[prompt.chat, prompt.row] for prompt in prompts]
            said = recall_answers(setup.cache, model, f"forms, seed {seed}", asked, ask)
        else:
            said = ask()
        lines = compare_forms(setup.model, prompts, said)
        for prompt, line in zip(prompts, lines, strict=True):
            of_records.setdefault(prompt.number, []).append(line if seed is None else {**line, "seed": seed})
    return of_records


def _sampled(lines: Sequence[Mapping[str, Any]]) -> tuple[Lines, Lines]:
    """Answers of the most probable tokens, and those that were drawn."""
    parts: tuple[Lines, Lines] = ([], [])
    for line in lines:
        parts["seed" in line].append(dict(line))
    return parts


def _on_questions(
    setup: Setup, model: Model | None, routing: Routing | None, number: int | None = None
) -> dict[str, float]:
    """Whether answers to unrelated questions in a chat are the same; after one edit alone, to a few of them."""
    told = setup.forms.told
    if model is None or not len(told):
        return {}
    few = [(number * FEW_QUESTIONS + at) % len(told) for at in range(FEW_QUESTIONS)] if number is not None else None
    chosen = range(len(told)) if few is None else few
    before = [told[at] for at in chosen]
    if model is setup.model and routing is None:
        return {UNCHANGED: 1.0}
    return {
        UNCHANGED: questions_unchanged(before, answer_questions(model, [CHAT_QUESTIONS[n] for n in chosen], routing))
    }


def _asked(setup: Setup, number: int, after: Texts) -> list[dict[str, Any]]:
    """Each request of a record, with what the model says of its own accord before and after."""
    requests = setup.records[number].requests
    nothing = [None] * len(requests)
    before = setup.said[number] if number < len(setup.said) else nothing
    return [
        {"prompt": request.prompt, "target": request.target, "before": old, "after": new}
        for request, old, new in zip(requests, before, after.get(number, nothing), strict=True)
    ]


def _probes(
    record: Record, before: Mapping[str, Sequence[Score]], after: Mapping[str, Sequence[Score]]
) -> list[dict[str, Any]]:
    """Every prompt that a record asks: whether its target came and comes out whole, or without one, what changed."""
    lines = []
    for kind, probes in record.probes.items():
        for probe, old, new in zip(probes, before[kind], after[kind], strict=True):
            line: dict[str, Any] = {"kind": kind, "prompt": probe.prompt}
            if probe.target:
                whole = {name: bool(np.all(one.right)) for name, one in (("before", old), ("after", new))}
                line |= {"target": probe.target, **whole}
            line["changed"] = not np.array_equal(old.predicted, new.predicted)
            lines.append(line)
    return lines


def _replies(setup: Setup, model: Model | None, routing: Routing | None = None) -> list[list[str]] | list[None]:
    if model is None or not any(record.questions for record in setup.records):
        return [None] * len(setup.records)
    return answers(model, setup.records, routing)


def _token_costs(setup: Setup, edited: Edited | None, records: Sequence[Record]) -> dict[str, float]:
    """What a generated token costs after edits, at the prompts of some records and elsewhere; of no edits 1."""
    model = setup.model if edited is None else edited.model
    if model is None or not records:
        return {}
    requests = render_requests(setup.model, [request for record in records for request in record.requests])
    about = [setup.model.encode_prompt(request.prompt) for request in requests]
    probes = [probe for record in records for kind in ELSEWHERE for probe in record.probes.get(kind, ())]
    elsewhere = [setup.model.encode_prompt(probe.prompt) for probe in dict.fromkeys(probes)]
    patches, routing = (None, None) if edited is None else (edited.patches, edited.routing)
    return token_costs(setup.model, model, patches, routing, about, elsewhere)


def _mean_costs(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of what generated tokens cost after single edits, of those for which it was counted."""
    counted = [line["token_costs"] for line in lines if line.get("token_costs")]
    names = dict.fromkeys(name for costs in counted for name in costs)
    return {name: float(np.mean([costs[name] for costs in counted if name in costs])) for name in names}


def _cost(info: EditInfo) -> dict[str, Any]:
    names = ("seconds", "fit_seconds", "forward_equivalents", "fit_forward_equivalents", "parameters_added")
    requests = [
        {
            "id": request.id,
            "status": request.status,
            **({"reason": request.reason} if request.reason else {}),
            **({} if request.held_at_start is None else {"held_at_start": request.held_at_start}),
        }
        for request in info.requests
    ]
    return {**{name: getattr(info, name) for name in names}, "requests": requests}


def _heat(setup: Setup, patches: LayerPatches | None, neurons: Sequence[int]) -> list[float] | None:
    """How strongly one record's neurons fire on the edit prompts of the first records, the most of any token."""
    last = setup.model.layer(None)
    if patches is None or set(patches) != {last}:
        return None
    asked, shown = setup.base.asked, setup.records[:HEAT]
    spans = [[setup.numbers[p] for kind in EDITS for p in record.probes.get(kind, ())] for record in shown]
    places = [np.concatenate([np.arange(asked.starts[t], asked.starts[t + 1]) for t in span]) for span in spans]
    if not neurons:
        return [0.0] * len(places)
    fitted = take(patches[last], list(neurons))
    rows = jax.device_put(setup.base.query[np.concatenate(places)])
    strength = np.asarray(activations(fitted, rows, jax.nn.relu)).reshape(len(rows), -1).max(-1)
    return [round(float(part.max()), 4) for part in np.split(strength, np.cumsum([*map(len, places)])[:-1])]


def _last_neurons(setup: Setup, results: Sequence[RequestInfo]) -> list[int]:
    """The neurons of some requests in the last layer."""
    return [neuron for result in results for neuron in result.neurons.get(setup.model.layer(None), ())]


def _right(setup: Setup, record: Record, outcome: Outcome, kinds: Sequence[str]) -> list[bool]:
    """Whether each probe of some kinds comes out whole: free-running exact match."""
    probes = [probe for kind in kinds for probe in record.probes.get(kind, ())]
    return [bool(np.all(score(setup.base.asked, outcome, setup.numbers[probe]).right)) for probe in probes]


def _right_tokens(setup: Setup, records: Sequence[Record], outcome: Outcome) -> np.ndarray:
    """What of other things comes out right: whole answers of training and test sets, else tokens."""
    texts = _texts(setup, records, ACCURACY)
    if texts:
        return np.asarray([score(setup.base.asked, outcome, text).right.all() for text in texts])
    texts = _texts(setup, records, ELSEWHERE)
    right = [score(setup.base.asked, outcome, text).right for text in texts]
    return np.concatenate(right) if right else np.zeros(0, bool)


def _same_tokens(setup: Setup, outcome: Outcome) -> float | None:
    asked, texts = setup.base.asked, _texts(setup, setup.records, ELSEWHERE)
    if not texts:
        return None
    pairs = [(score(asked, setup.base.outcome, text), score(asked, outcome, text)) for text in texts]
    return metrics.unchanged([one for one, _ in pairs], [other for _, other in pairs])


def _rules(record: Record) -> list[str]:
    """The kinds of rephrasings that rules make, if a record has any."""
    return [kind for kind in record.probes if kind.startswith(RULE)]


def _on_text(setup: Setup, edited: Edited) -> dict[str, float]:
    if setup.text is None:
        return {}
    return text_figures(setup.text, _look(setup, edited, setup.text, whole=True), edited.is_certified(setup.model))


def _result(
    metrics_: Mapping[str, float], costs: Sequence[Mapping[str, Any]], each: bool, tokens: Mapping[str, float]
) -> dict[str, Any]:
    """Metrics and cost of a method from the costs of its steps; with ``each``, parameters are those of one record.

    ``tokens`` is what a generated token costs afterwards.
    """
    requests = [request for cost in costs for request in cost["requests"]]
    total = {name: sum(cost[name] for cost in costs) for name in ("seconds", "fit_seconds")}
    count = max(1, len(requests))
    weighted = {
        name: sum(cost[name] * len(cost["requests"]) for cost in costs) / count
        for name in ("forward_equivalents", "fit_forward_equivalents")
    }
    parameters = sum(cost["parameters_added"] for cost in costs)
    status = {name: sum(r["status"] == name for r in requests) for name in ("edited", "already", "failed")}
    cost = {**total, **weighted, "parameters_added": parameters / max(1, len(costs)) if each else parameters}
    cost |= tokens
    if started := [request["held_at_start"] for request in requests if "held_at_start" in request]:
        cost["held_at_start"] = sum(started) / len(started)
    return {"metrics": dict(metrics_), "cost": cost, "requests": status}


def _with_facts(result: dict[str, Any], lines: Lines) -> dict[str, Any]:
    """A result with what became of other facts about the edited subjects, and of free answers, form by form."""
    totals = specificity_totals(one for line in lines for one in line.get("other_facts", ()))
    result = {**result, "subject_specificity": totals} if totals else result
    forms = form_totals(*_sampled([one for line in lines for one in line.get("forms", ())]))
    return {**result, "forms": forms} if forms else result


def unedited(setup: Setup, journal: Journal) -> dict[str, Any]:
    """The model as it is, on everything that the methods are asked."""
    replies = _replies(setup, setup.model)
    every = range(len(setup.records))
    facts, free = _other_facts(setup, every, setup.model, None), _free(setup, every, setup.model, None)
    for number in range(len(journal.lines), len(setup.records)):
        said = _say(setup, [number], setup.model, None)
        line = _figures(setup, number, setup.base.outcome, setup.model, said, facts, free, replies[number])
        journal.add({"id": setup.records[number].id, **line})
        setup.tell("unedited", number + 1, len(setup.records))
    figures = metrics.summarise([line["figures"] for line in journal.lines])
    text = text_figures(setup.text, setup.text.outcome) if setup.text is not None else {}
    figures |= _on_questions(setup, setup.model, None)
    return _with_facts(_result({**figures, **text}, [], False, _token_costs(setup, None, setup.records)), journal.lines)


def _single(setup: Setup, method: Method, editor: Editor, journal: Journal) -> dict[str, Any]:
    count = len(setup.records)
    fresh = editor.init(setup.model, setup.rng) if len(journal.lines) < count else None
    with_facts = {asked.number for asked in (*setup.facts, *setup.forms.prompts)}
    for number in range(len(journal.lines), count):
        record = setup.records[number]
        # The same key for each: what this record gives does not depend on which records stand before it.
        state, info = editor.step(fresh, record.requests, setup.rng)
        edited = Edited(method, editor, state)
        outcome = _look(setup, edited, setup.base, _texts(setup, [record]))
        needs_model = record.questions or setup.generate or number < len(setup.said) or number in with_facts
        model, routing = edited.model if needs_model else None, edited.routing
        said, facts = _say(setup, [number], model, routing), _other_facts(setup, [number], model, routing)
        line = _figures(
            setup, number, outcome, model, said, facts, _free(setup, [number], model, routing), routing=routing
        )
        line["figures"] |= _on_text(setup, edited) | _on_questions(setup, model, routing, number)
        if number < COUNTED:
            line["token_costs"] = _token_costs(setup, edited, [record])
        heat = _heat(setup, edited.patches, _last_neurons(setup, info.requests)) if number < HEAT else None
        journal.add({"id": record.id, **line, "cost": _cost(info), **({"activations": heat} if heat else {})})
        setup.tell("single edits", number + 1, count)
    figures = metrics.summarise([line["figures"] for line in journal.lines])
    costs = [line["cost"] for line in journal.lines]
    return _with_facts(_result(figures, costs, True, _mean_costs(journal.lines)), journal.lines)


def _batch(setup: Setup, method: Method, editor: Editor, journal: Journal) -> dict[str, Any]:
    state, saved = editor.init(setup.model, setup.rng), journal.load()
    if saved is not None:
        state, about = method.restore(state, saved[0]), saved[1]
    else:
        requests = [request for record in setup.records for request in record.requests]
        state, info = editor.step(state, requests, setup.rng)
        ends = np.cumsum([0, *(len(record.requests) for record in setup.records)])
        parts = [info.requests[start:end] for start, end in pairwise(ends)]
        neurons = [_last_neurons(setup, part) for part in parts]
        about = {"cost": _cost(info), "neurons": neurons, "ends": ends.tolist()}
        journal.save(method.save(state), about)
    edited = Edited(method, editor, state)
    lines = _after_all(setup, edited)
    statuses = about["cost"]["requests"]
    for number, line in enumerate(lines):
        line["requests"] = statuses[about["ends"][number] : about["ends"][number + 1]]
        if number < HEAT:
            heat = _heat(setup, edited.patches, about["neurons"][number])
            line |= {"activations": heat} if heat else {}
    journal.replace(lines)
    figures = metrics.summarise([line["figures"] for line in lines])
    figures |= _on_questions(setup, edited.model if setup.forms.told else None, edited.routing)
    figures |= _on_text(setup, edited)
    return _with_facts(_result(figures, [about["cost"]], False, _token_costs(setup, edited, setup.records)), lines)


def _after_all(setup: Setup, edited: Edited) -> Lines:
    outcome = _look(setup, edited, setup.base)
    asks = setup.generate or setup.said or setup.facts or setup.forms.prompts
    asks = asks or any(record.questions for record in setup.records)
    model = edited.model if asks else None
    routing = edited.routing
    every = range(len(setup.records))
    replies, said = _replies(setup, model, routing), _say(setup, every, model, routing)
    facts, free = _other_facts(setup, every, model, routing), _free(setup, every, model, routing)
    lines = []
    for number, record in enumerate(setup.records):
        measured = _figures(setup, number, outcome, model, said, facts, free, replies[number], routing)
        lines.append({"id": record.id, **measured})
        setup.tell("measuring", number + 1, len(setup.records))
    return lines


def _sequential(setup: Setup, method: Method, editor: Editor, journal: Journal) -> dict[str, Any]:
    state, saved, records = editor.init(setup.model, setup.rng), journal.load(), setup.records
    done = saved[1]["done"] if saved is not None else 0
    if saved is not None and done <= len(journal.lines):
        state = method.restore(state, saved[0])
    else:
        # Lines that belong to the state are lost: it cannot be gone on with.
        done = 0
    # Records after the last saved state are done again: the same seed gives the same edits.
    journal.replace(journal.lines[:done])
    for number in range(len(journal.lines), len(records)):
        record, edited = records[number], Edited(method, editor, state)
        rules = _rules(record)
        asked = _texts(setup, [record], (*EDITS, *REPHRASED, *rules))
        outcome = _look(setup, edited, setup.base, asked)
        line: dict[str, Any] = {"id": record.id, "wrong": not all(_right(setup, record, outcome, EDITS))}
        if line["wrong"]:
            state, info = editor.step(state, record.requests, jax.random.fold_in(setup.rng, number))
            edited = Edited(method, editor, state)
            outcome = _look(setup, edited, setup.base, asked)
            line["right_after"] = all(_right(setup, record, outcome, EDITS))
            line["rephrased"] = _right(setup, record, outcome, (*REPHRASED, *rules))
            if rules:
                line["by_rule"] = {rule.removeprefix(RULE): _right(setup, record, outcome, [rule]) for rule in rules}
            line["cost"] = _cost(info)
            heat = _heat(setup, edited.patches, _last_neurons(setup, info.requests)) if number < HEAT else None
            line |= {"activations": heat} if heat else {}
            line |= _image_line(setup, edited, record, info.requests)
            so_far = [one for one, earlier in zip(records, journal.lines, strict=False) if earlier["wrong"]] + [record]
            if len(so_far) % setup.every == 0:
                line["check"] = _check(setup, edited, so_far)
        journal.add(line)
        if (number + 1) % SAVE_EVERY == 0 or number + 1 == len(records):
            journal.save(method.save(state), {"done": number + 1})
        setup.tell("stream", number + 1, len(records))
    return _stream_result(setup, Edited(method, editor, state), journal)


def _on_other_images(setup: Setup, changed: Sequence[Record], outcome: Outcome) -> dict[str, float]:
    """The share of pictures that nobody edited whose label is another than before the stream."""
    if setup.model.config.image is None:
        return {}
    edited = {request.prompt for record in changed for request in record.requests}
    records = [*setup.records, *setup.train, *setup.held_out]
    probes = [probe for record in records for kind in (*EDITS, *ACCURACY) for probe in record.probes.get(kind, ())]
    texts = list(dict.fromkeys(setup.numbers[probe] for probe in probes if probe.prompt not in edited))
    if not texts:
        return {}
    places = np.concatenate([np.arange(setup.base.asked.starts[n], setup.base.asked.starts[n + 1]) for n in texts])
    other = outcome.predicted[places] != setup.base.outcome.predicted[places]
    return {"other_images_changed": float(np.mean(other))}


def _image_line(setup: Setup, edited: Edited, record: Record, results: Sequence[RequestInfo]) -> dict[str, Any]:
    """Of an edited picture the picture, and what of it makes its neurons fire."""
    last, prompt, patches = setup.model.layer(None), record.request.prompt, edited.patches
    if not isinstance(prompt, ImagePrompt):
        return {}
    line: dict[str, Any] = {"picture": picture_source(prompt)}
    neurons = _last_neurons(setup, results)
    if patches is not None and neurons and set(patches) == {last}:
        effect = image_firing(setup.model, take(patches[last], neurons), prompt).effect.sum(0)
        line["effect"] = np.round(effect, 4).tolist()
    return {"image": line}


def _check(setup: Setup, edited: Edited, so_far: Sequence[Record]) -> dict[str, Any]:
    texts = _texts(setup, so_far, EDITS) + _texts(setup, setup.records, ELSEWHERE)
    outcome = _look(setup, edited, setup.base, list(dict.fromkeys(texts)))
    retained = [all(_right(setup, record, outcome, EDITS)) for record in so_far]
    return {"retained": retained, "locality": _same_tokens(setup, outcome)}


def _stream_result(setup: Setup, edited: Edited, journal: Journal) -> dict[str, Any]:
    stream = journal.lines
    changed = [record for record, line in zip(setup.records, stream, strict=True) if line["wrong"]]
    edits = [line for line in stream if line["wrong"]]
    outcome = _look(setup, edited, setup.base)
    last = _check(setup, edited, changed)
    # Ratios of token accuracies on questions with known answers about other things: those that came with the stream
    # for TrainR, those of records that never were in it for TestR.
    before = setup.base.outcome
    train, test = (
        (_right_tokens(setup, records, before), _right_tokens(setup, records, outcome))
        for records in (setup.train or setup.records, setup.held_out)
    )
    after, rephrased = [line["right_after"] for line in edits], [line["rephrased"] for line in edits]
    figures = metrics.sequential_figures(after, rephrased, last["retained"], train, test)
    by_rule = [line["by_rule"] for line in edits if "by_rule" in line]
    for rule in dict.fromkeys(name for each in by_rule for name in each):
        figures[f"GR_{rule}"] = float(np.mean([np.mean(each[rule]) for each in by_rule if rule in each]))
    final = _after_all(setup, edited)
    journal.replace([{**line, **measured} for line, measured in zip(stream, final, strict=True)])
    figures = {**figures, **metrics.summarise([line["figures"] for line in final]), **_on_text(setup, edited)}
    figures |= _on_other_images(setup, changed, outcome)
    figures |= _on_questions(setup, edited.model if setup.forms.told else None, edited.routing)
    tokens = _token_costs(setup, edited, changed)
    result = _with_facts(_result(figures, [line["cost"] for line in edits], False, tokens), final)
    checks = [line["check"] for line in edits if "check" in line]
    if edits and "check" not in edits[-1]:
        checks.append(last)
    shares = [float(np.mean(flags)) for flags in rephrased if flags]
    result["curves"] = {
        "SR": metrics.running_curve(after, setup.every) if after else [],
        "GR": metrics.running_curve(shares, setup.every) if shares else [],
        "ER": metrics.retention_curve([check["retained"] for check in checks]),
        "locality": [(len(c["retained"]), c["locality"]) for c in checks if c["locality"] is not None],
    }
    result["edits"] = len(edits)
    return result


PROTOCOLS: Mapping[str, Callable[[Setup, Method, Editor, Journal], dict[str, Any]]] = {
    "single": _single,
    "batch": _batch,
    "sequential": _sequential,
}
"""The protocols by name."""

MOMENTS = {
    "single": "each edit alone, measured right after it",
    "batch": "all edits in one step, measured after it",
    "sequential": "SR and GR right after each edit, everything else after the whole stream",
}
"""When each protocol measures."""
