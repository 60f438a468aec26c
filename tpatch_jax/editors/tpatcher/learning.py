"""Learning where values start: from many requests a network that predicts the value of the next one before any step.

Each step draws a few requests, a few wordings of each that should say its target, and a few frames about its subject
that should stay as they are; what the predicted values do to all of them is what the network is trained on. No request
is edited for it.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.tree_util import Partial

from tpatch_jax.core.arguments import describe
from tpatch_jax.core.checks import check_positive, check_range, check_types, random_key
from tpatch_jax.core.devices import automatically
from tpatch_jax.core.patch import Patch
from tpatch_jax.core.start import PARTS, StartParams, create_start, even_out, start_loss, turn_inputs
from tpatch_jax.core.values import ValueTrainingSettings, train_values
from tpatch_jax.editors.forms import ask_in_chats, chat_rows, other_chats
from tpatch_jax.editors.locating import respell, split_at_subject, with_spelling
from tpatch_jax.editors.model_memory import ModelMemory, collect_model_memory
from tpatch_jax.editors.reading import check_requests, read_item
from tpatch_jax.editors.subject_rows import PromptRow, fitting_rows, runner
from tpatch_jax.editors.tpatcher.start_file import Start
from tpatch_jax.editors.tpatcher.subject_prompts import read_value_rows
from tpatch_jax.editors.tpatcher.subject_settings import SubjectSettings
from tpatch_jax.editors.tpatcher.subject_values import ValueProblem, create_value_problem, predict_start
from tpatch_jax.editors.wordings import Wording
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.chat import has_template
from tpatch_jax.models.fingerprint import fingerprint
from tpatch_jax.models.model import Model, check_loaded
from tpatch_jax.requests import EditRequest, as_requests
from tpatch_jax.storage.cache import cache_folder
from tpatch_jax.typing import Progress

__all__ = ["LearningInfo", "LearningSettings", "learn_start"]

BARE = 0.4
"""So often the wording that should say a target is the bare prompt."""

LONGEST, SPAN, MOST = 32, 16, 4
"""Rows of so many tokens at most, so many of them from the subject on, and targets of so many: few programs."""

NOTHING = (
    "there is no request to learn from; give some with a subject, a short prompt that names it once, and a target of "
    f"at most {MOST} tokens"
)


@dataclass(frozen=True)
class LearningSettings:
    """Options of `learn_start`.

    Attributes:
        steps: of the optimiser.
        lanes: requests a step.
        targets: so many of its wordings that should say its target; each time it may be the bare prompt.
        neutral: so many frames about its subject that should stay as they are.
        chat: of so many of them a step asks in the model's chat template as well, if it has one.
        width: of the network's inner layer.
        rate: the highest learning rate.
        closeness: weight of the divergence from the unedited model.
        evened: features are turned so that all directions vary alike, by what they are for so many requests; 0 leaves
            them as they are.
        held_out: requests about at most so many subjects, and a tenth of all, only measure what was learnt.

    Raises:
        TPatchError: a value makes no sense.
    """

    steps: int = 400
    lanes: int = 8
    targets: int = 1
    neutral: int = 2
    chat: int = 4
    width: int = 512
    rate: float = 5e-4
    closeness: float = 1.5
    evened: int = 1600
    held_out: int = 32

    def __post_init__(self) -> None:
        """Checks the values."""
        check_types(self)
        check_range(self, ("steps", "lanes", "targets", "neutral", "width"), 1)
        check_range(self, ("chat", "evened", "held_out", "closeness"), 0)
        check_positive(self, ("rate",))


class LearningInfo(NamedTuple):
    """What was learnt.

    Attributes:
        requests: so many were learnt from.
        steps: steps taken.
        loss: mean loss of targets over the last steps, in nats.
        divergence: mean divergence of frames that should stay over the last steps, in nats.
        held_out: so many requests were kept to measure.
        said_at_start: the share of those whose target is said with no step at all.
        divergence_at_start: their mean divergence on other frames, in nats.
        seconds: how long it took.
    """

    requests: int
    steps: int
    loss: float
    divergence: float
    held_out: int
    said_at_start: float
    divergence_at_start: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """What ``tpatch learn --json`` prints."""
        return dict(self._asdict())


class _Example(NamedTuple):
    """What is known of one request: rows that should say its target, and rows that should stay."""

    targets: list[PromptRow]
    neutral: list[PromptRow]
    chat: list[PromptRow]
    chat_neutral: list[PromptRow]


def _always(hidden_size: int, lanes: int) -> Patch:
    """Neurons that fire fully everywhere: what a value says is learnt apart from where its key fires."""
    nothing = jnp.zeros((lanes, 1, hidden_size))
    return Patch(nothing, jnp.ones((lanes, 1)), nothing)


def _fits(row: PromptRow, longest: int, span: int) -> bool:
    return len(row.tokens) <= longest and len(row.tokens) - row.subject <= span


def _prompt_wording(request: EditRequest) -> Wording:
    before, subject, after = split_at_subject(request)
    return Wording.of(before, subject, after)


def _example(
    model: Model, known: ModelMemory, request: EditRequest, settings: SubjectSettings, rng: np.random.Generator
) -> _Example | None:
    """The rows of one request; ``None`` if it cannot be learnt from."""
    if not request.subject or check_requests(model, [request], True):
        return None
    item = read_item(model, 0, request, known.prefixes[:3], False)
    if len(item.target) > MOST:
        return None
    prompts, neutral = read_value_rows(model, known, [item], [request], [0], settings)
    rows = [row for row in prompts[0] if _fits(row, LONGEST, SPAN)]
    beside = [row for row in neutral[0] if _fits(row, LONGEST, SPAN)]
    # Whoever asks may not trouble to write names as they are written.
    lower = respell(request, request.subject.lower())
    if lower.subject != request.subject:
        small = fitting_rows(model, [_prompt_wording(lower)], item.target)
        rows += [row for row in small if _fits(row, LONGEST, SPAN)]
    if not rows or rows[0] is not prompts[0][0] or not beside:
        return None
    if not has_template(model.tokenizer):
        return _Example(rows, beside, [], [])
    chat = [*ask_in_chats(model, request, 3), *ask_in_chats(model, request, 1, behind=known.passage)]
    if lower.subject != request.subject:
        chat += ask_in_chats(model, lower, 1)
    said, others = chat_rows(model, chat), chat_rows(model, other_chats(model, request, 4), wanted=False)
    return _Example(
        rows, beside, *([row for row in part if _fits(row, 4 * LONGEST, 2 * SPAN)] for part in (said, others))
    )


def _draw(rows: Sequence[PromptRow], count: int, rng: np.random.Generator, first: float = 0.0) -> list[PromptRow]:
    """Some rows; each is the first one with at least this probability."""
    picks = np.where(rng.random(count) < first, 0, rng.integers(len(rows), size=count))
    return [rows[pick] for pick in picks]


def _read_bare(model: Model, layer: int, drawn: Sequence[_Example]) -> ValueProblem:
    """The bare prompts of some requests, from which values are predicted, and by which they are measured."""
    none: list[list[PromptRow]] = [[] for _ in drawn]
    always = _always(model.config.hidden_size, len(drawn))
    return create_value_problem(model, model, layer, always, [one.targets[:1] for one in drawn], none, none, 1.0)


def _read_rows(
    model: Model, layer: int, targets: Sequence[list[PromptRow]], neutral: Sequence[list[PromptRow]]
) -> ValueProblem:
    """Rows that should say their targets and rows that should stay."""
    always, none = _always(model.config.hidden_size, len(targets)), [[] for _ in targets]
    return create_value_problem(model, model, layer, always, targets, none, neutral, 1.0, False)


@partial(jax.jit, static_argnames="closeness")
def _gradient(
    params: StartParams, problem: ValueProblem, run: Partial, longest: float, closeness: float
) -> tuple[tuple[Array, Array], StartParams]:
    def loss(params: StartParams) -> tuple[Array, tuple[Array, Array]]:
        assert problem.kept is not None
        assert problem.features is not None
        limit = problem.limit(longest)
        rows = problem.known, problem.targets, problem.kept
        return start_loss(params, problem.features, limit, *rows, run, closeness)

    (_, parts), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return parts, gradient


T = TypeVar("T")


def _of_type(name: str, value: T | None, default: T) -> T:
    """An argument, or what stands for it by default."""
    if value is not None and not isinstance(value, type(default)):
        raise TPatchError(f"{name} is {describe(value)}; give a {type(default).__name__}")
    return default if value is None else value


def _optimiser(settings: LearningSettings) -> optax.GradientTransformation:
    warm = min(10, settings.steps // 2)
    rate = optax.warmup_cosine_decay_schedule(0.0, settings.rate, warm, settings.steps, settings.rate / 20)
    return optax.chain(optax.clip_by_global_norm(5.0), optax.adam(rate))


@automatically
def learn_start(
    model: Model,
    requests: Sequence[EditRequest],
    layer: int,
    *,
    settings: LearningSettings | None = None,
    subject: SubjectSettings | None = None,
    memory: str | Path | None = None,
    seed: int = 0,
    start: Start | None = None,
    progress: Progress | None = None,
) -> tuple[Start, LearningInfo]:
    """Learn from requests where the values of later edits start.

    Args:
        model: the model, a decoder; not changed.
        requests: what to learn from; those without a subject, or too long, are left out. Nothing of them is edited.
        layer: of the subject site, whose values are predicted; not the last one.
        settings: options of learning.
        subject: options of the subject site.
        memory: a text file for the contexts that prompts are seen in; by default text is sampled from the model.
        seed: the same seed gives the same network on one machine.
        start: a network to go on from, whose width it keeps; by default a new one.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        The `tpatch_jax.editors.tpatcher.start_file.Start`, and what came of it on requests that were held out.

    Raises:
        TPatchError: nothing can be learnt from the requests, the model is no decoder, the network to go on from is of
            another model or layer, or learning went astray.
    """
    check_loaded(model, "learn_start(model, requests, layer)")
    settings = _of_type("settings", settings, LearningSettings())
    subject = _of_type("subject", subject, SubjectSettings(same=8, neutral=8, chat=0, chat_neutral=0, lower_case=False))
    check_range(subject, ("neutral",), 1)
    wanted, key = as_requests(requests), random_key(seed)
    if model.config.architecture != "decoder":
        raise TPatchError(f"{model.name!r} is an {model.config.architecture}; only decoders are edited at subjects")
    layer, hidden_size = model.layer(layer), model.config.hidden_size
    if layer == model.layer(None):
        raise TPatchError(f"layer {layer} is the last one of {model.name!r}; values at subjects need a lower layer")
    start = _of_type("start", start, Start(create_start(key, hidden_size, settings.width), layer, fingerprint(model)))
    start.check(model, layer)
    given = [request for request in with_spelling(model, wanted) if request.subject]
    if not given:
        raise TPatchError(NOTHING)
    began, rng, params = time.perf_counter(), np.random.default_rng(seed), start.params
    known = collect_model_memory(model, layer, memory, cache=cache_folder(), progress=progress)
    order = [given[place] for place in rng.permutation(len(given))]
    aside, learnt = _hold_out(order, settings)
    examples: dict[int, _Example | None] = {}
    draws = _draw_examples(model, known, learnt, subject, rng, examples, settings.lanes)
    run, longest = runner(model, layer), subject.value.longest
    optimiser, losses = _optimiser(settings), []
    with jax.default_matmul_precision("highest"):
        turn, back = _read_turn(model, layer, draws, min(settings.evened, len(learnt)), progress)
        params = turn_inputs(_with_all_features(params), back)
        state = optimiser.init(params)
        for step in range(settings.steps):
            drawn = next(draws)
            bare = _read_bare(model, layer, drawn)
            said = [_draw(one.targets, settings.targets, rng, BARE) for one in drawn]
            others = [_draw(one.neutral, settings.neutral, rng) for one in drawn]
            problems = [(_read_rows(model, layer, said, others), np.arange(len(drawn)))]
            chats = [lane for lane, one in enumerate(drawn) if one.chat and one.chat_neutral][: settings.chat]
            if settings.chat and len(chats) == settings.chat:
                said = [_draw(drawn[lane].chat, 1, rng) for lane in chats]
                others = [_draw(drawn[lane].chat_neutral, 1, rng) for lane in chats]
                problems.append((_read_rows(model, layer, said, others), np.asarray(chats)))
            # A value is predicted from the bare prompt, wherever it is asked for.
            features, told = jnp.matmul(jax.device_put(bare.features), turn), []
            gradient = jax.tree.map(jnp.zeros_like, params)
            for problem, lanes in problems:
                problem = problem._replace(features=features[lanes], scale=bare.scale[lanes])
                parts, more = _gradient(params, problem, run, longest, settings.closeness)
                gradient = jax.tree.map(jnp.add, gradient, more)
                told.append(jnp.stack(parts))
            losses.append(told[0])
            params, state = _update(params, state, gradient, Partial(optimiser.update))
            if progress:
                progress("learning where values start", step + 1, settings.steps)
        params = turn_inputs(params, turn)
    last = np.asarray(jnp.stack(losses[-20:])).mean(0)
    if not (np.isfinite(last).all() and all(np.isfinite(leaf).all() for leaf in params)):
        raise TPatchError(f"learning went astray: the loss is {last[0]}; give a rate below {settings.rate:g}")
    made = Start(jax.tree.map(np.asarray, params), layer, fingerprint(model))
    said, moved, count = _measure(model, known, aside, layer, params, subject, rng)
    seconds = time.perf_counter() - began
    figures = float(last[0]), float(last[1]), count, said, moved, seconds
    return made, LearningInfo(sum(one is not None for one in examples.values()), settings.steps, *figures)


def _draw_examples(
    model: Model, known: ModelMemory, requests: Sequence[EditRequest], settings: SubjectSettings,
    rng: np.random.Generator, examples: dict[int, _Example | None], count: int,
) -> Iterator[list[_Example]]:  # fmt: skip
    """So many requests that can be learnt from at a time, all of them before one comes again; ``examples`` keeps them.

    Raises:
        TPatchError: none can be learnt from.
    """
    drawn: list[_Example] = []
    while True:
        for place in rng.permutation(len(requests)).tolist():
            if place not in examples:
                examples[place] = _example(model, known, requests[place], settings, rng)
            if (one := examples[place]) is not None:
                drawn.append(one)
            if len(drawn) == count:
                yield drawn
                drawn = []
        if not any(examples.values()):
            raise TPatchError(NOTHING)


def _with_all_features(params: StartParams) -> StartParams:
    """A network that was learnt before slopes were among the features: they count for nothing yet."""
    missing = PARTS * params.direct.shape[1] - len(params.direct)
    inner, direct = (jnp.pad(jax.device_put(leaf), ((0, missing), (0, 0))) for leaf in (params.inner, params.direct))
    return StartParams(inner, jax.device_put(params.bias), jax.device_put(params.outer), direct)


def _read_turn(
    model: Model, layer: int, draws: Iterator[list[_Example]], count: int, progress: Progress | None
) -> tuple[Array, Array]:
    """What `even_out` says of the features of so many requests; for none of them, nothing is turned."""
    parts, read = [], 0
    while read < count:
        parts.append(np.asarray(_read_bare(model, layer, next(draws)).features))
        read += len(parts[-1])
        if progress:
            progress("reading what is known before any step", min(read, count), count)
    if not parts:
        nothing = jnp.eye(PARTS * model.config.hidden_size, dtype=jnp.float32)
        return nothing, nothing
    turn, back = even_out(np.concatenate(parts))
    return jax.device_put(turn), jax.device_put(back)


def _hold_out(requests: list[EditRequest], settings: LearningSettings) -> tuple[list[EditRequest], list[EditRequest]]:
    """Requests about some subjects, which only measure, and all about the others."""
    subjects = list(dict.fromkeys(request.subject for request in requests))
    aside = set(subjects[: min(settings.held_out, len(subjects) // 10)])
    return [r for r in requests if r.subject in aside], [r for r in requests if r.subject not in aside]


@jax.jit
def _update(
    params: StartParams, state: optax.OptState, gradient: StartParams, update: Partial
) -> tuple[StartParams, optax.OptState]:
    changes, state = update(gradient, state, params)
    return optax.apply_updates(params, changes), state  # type: ignore[return-value]


def _measure(
    model: Model, known: ModelMemory, requests: Sequence[EditRequest], layer: int, params: StartParams,
    subject: SubjectSettings, rng: np.random.Generator,
) -> tuple[float, float, int]:  # fmt: skip
    """Of requests that were held out: the share said with no step, the mean divergence on other frames, how many."""
    examples = [_example(model, known, request, subject, rng) for request in requests]
    drawn = [one for one in examples if one is not None]
    said, moved, run = [], [], runner(model, layer)
    settings = ValueTrainingSettings(steps=0, longest=subject.value.longest)
    with jax.default_matmul_precision("highest"):
        for first in range(0, len(drawn), 8):
            part = drawn[first : first + 8]
            lanes = [*part, *[part[-1]] * (8 - len(part))]
            problem = create_value_problem(
                model, model, layer, _always(model.config.hidden_size, 8), [one.targets[:1] for one in lanes],
                [[] for _ in lanes], [_draw(one.neutral, 4, rng) for one in lanes], 1.0,
            )  # fmt: skip
            start = predict_start(params, problem, settings.longest)
            rows = problem.known, problem.targets, problem.kept
            _, info = train_values(*rows, run, problem.scale, settings, start)
            said += info.at_start[: len(part)].tolist()
            moved += info.closeness[: len(part)].tolist()
    return float(np.mean(said or [0.0])), float(np.mean(moved or [0.0])), len(drawn)
