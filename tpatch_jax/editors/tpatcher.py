"""T-Patcher as an editor: from requests to neurons in the last feed-forward layer.

One neuron for each target token that the model gets wrong. The model runs once over each prompt in a few contexts;
everything after that happens on the queries that those passes leave (`tpatch_jax.fitting`).
"""

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from tpatch_jax import ffn
from tpatch_jax.editors.background import Background, background
from tpatch_jax.editors.editor import EditInfo, Editor, RequestInfo
from tpatch_jax.editors.reading import Item, check_requests, read_item, swapped_prompts
from tpatch_jax.editors.subject_site import SubjectNeuron, SubjectSettings, fit_subjects, subject_layer
from tpatch_jax.errors import TPatchError
from tpatch_jax.fitting import FitInfo, FitSettings, Lane, fit_many
from tpatch_jax.memory import Memory, create_memory, extend, nuisance_scatter
from tpatch_jax.models import decoder
from tpatch_jax.models.collection import Sites, argmax_logits, collect
from tpatch_jax.models.model import Model, attach
from tpatch_jax.objective import Weights
from tpatch_jax.patch import Patch, concatenate, contribution, create, join, pad, preactivations, take
from tpatch_jax.requests import EditRequest, as_requests
from tpatch_jax.sizes import power_of_two

__all__ = ["PRESETS", "TPatcherSettings", "TPatcherState", "edit", "tpatcher"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TPatcherSettings:
    """Options of the T-Patcher editor.

    Attributes:
        site: where patches go: ``"last"``, the mistaken token in the last layer; ``"subject"``, the last token of the
            subject in an earlier layer, completed in the last layer where that does not say the whole target. A request
            without a subject is edited in the last layer in any case.
        layer: of the subject site: ``"auto"``, a third of the way up, or a number.
        fit: how a patch in the last layer is fitted.
        subject: how a patch at the subject is fitted.
        contexts: in how many contexts each prompt is seen, the bare one included.
        swaps: how many versions of a prompt with another subject a patch must stay silent on (needs a subject).
        other_edits: whether the other edits' queries are negatives as well.
        attempts: how often what does not hold yet is fitted again, in the presence of what does.
        most_tokens: at most so many wrong target tokens of one request get a neuron.
        nuisance_weight: how strongly the key avoids directions in which only the context shows.
        shrinkage: of the covariance behind the whitened key.
        train_on_rephrases: use the requests' rephrases as further contexts; otherwise they only measure.
    """

    site: str = "last"
    layer: str = "auto"
    fit: FitSettings = field(default_factory=FitSettings)
    subject: SubjectSettings = field(default_factory=SubjectSettings)
    contexts: int = 4
    swaps: int = 4
    other_edits: bool = True
    attempts: int = 3
    most_tokens: int = 64
    nuisance_weight: float = 0.8
    shrinkage: float = 0.1
    train_on_rephrases: bool = False


PRESETS: Mapping[str, TPatcherSettings] = {
    "default": TPatcherSettings(fit=FitSettings(weights=Weights(memory=5.0, hardest=32))),
    "paper": TPatcherSettings(
        fit=FitSettings(
            recipe="joint",
            weights=Weights(activation=1.0, memory=10.0, limit=0.0, margin=0.0, hardest=1000, label_smoothing=0.1),
            learning_rate=0.01,
            weight_decay=0.01,
        ),
        contexts=1,
        swaps=0,
        other_edits=False,
        attempts=1,
        most_tokens=5,
    ),
}
"""Named settings: ``default``, this library's best, and ``paper``, the values of the paper's zsRE experiments."""


class Earlier(NamedTuple):
    """The edits of earlier steps: what the cut gave at each of their target tokens, and the token wanted there.

    Attributes:
        sites: ``[rows, d]`` each.
        wanted: ``[rows]`` int.
    """

    sites: Sites
    wanted: Array


class _Note(NamedTuple):
    """How the fit of one neuron went."""

    site: str
    steps: int
    margin: float
    losses: Mapping[str, float]


class TPatcherState(NamedTuple):
    """What an edited model is made of.

    Attributes:
        model: the model without the patch.
        patch: the neurons so far, ``[n, d]``.
        background: what is known about the unedited model at its last layer.
        deep: the same at the layer of the subject site, if that is used.
        earlier: the edits of earlier steps, on which later patches stay silent and which they must not break.
        settings: the editor's options.
    """

    model: Model
    patch: Patch
    background: Background
    deep: Background | None
    earlier: Earlier
    settings: TPatcherSettings


def _direction(model: Model, tokens: Array) -> Array:
    """Where each token's value starts: the direction that raises its logit most against all others.

    With ``U`` the unembedding seen through the final norm's scale and ``M = UᵀU/V``, it is ``M⁻¹·u_token``.
    """
    table = decoder.unembedding(model.config, model.params).astype(jnp.float32)
    moment = table.T @ table / table.shape[0]
    moment = moment + 0.01 * jnp.trace(moment) / moment.shape[0] * jnp.eye(moment.shape[0])
    return jnp.linalg.solve(moment, table[tokens].T).T


def _resume(model: Model) -> Partial:
    return Partial(decoder.finisher(model.config), decoder.final_weights(model.config, model.params))


def _added(model: Model, patch: Patch, query: Array) -> Array:
    """What a patch adds to the FFN's output; silent neurons fill it up to one of few sizes."""
    patch = pad(patch, power_of_two(patch.key.shape[0], 64))
    return contribution(patch, query, ffn.ACTIVATIONS[model.config.activation])


def _scale(model: Model, residual: Array, output: Array, beside: Array) -> Array:
    """What a value of medium strength measures: the residual stream's norm, mean over contexts, ``[lanes]``.

    Where another neuron fires it has to be outdone, so the stream with that neuron counts; but only up to four times
    the unedited stream, or in a long sequence each value would outgrow the last without end.
    """

    def norm(output: Array) -> Array:
        hidden = decoder.leave_last(model.config, model.params, residual, output)
        return jnp.mean(jnp.linalg.norm(hidden.astype(jnp.float32), axis=-1), -1)

    return jnp.minimum(norm(beside), 4 * norm(output))


def _patched(model: Model, sites: Sites, patch: Patch) -> Array:
    """The residual stream after the last block with the patch active, ``[rows, d]``."""
    return decoder.leave_last(
        model.config, model.params, sites.residual, sites.output + _added(model, patch, sites.query)
    )


def tpatcher(
    settings: TPatcherSettings = PRESETS["default"],
    *,
    memory: str | Path | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Editor:
    """The T-Patcher editor.

    Args:
        settings: its options.
        memory: a text file for the query memory; by default text is sampled from the model.
        cache: folder where memories are kept between runs.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        The `Editor`; its state is a `TPatcherState`.

    Raises:
        TPatchError: a setting does not exist.

    Source: Huang et al. 2023.
    """
    if settings.site not in ("last", "subject"):
        raise TPatchError(f"site {settings.site!r} does not exist; use site=last or site=subject")
    if settings.layer != "auto" and not settings.layer.isdigit():
        raise TPatchError(f"layer {settings.layer!r} is not a layer; use layer=auto or a number")
    if settings.fit.recipe not in ("staged", "joint"):
        raise TPatchError(f"recipe {settings.fit.recipe!r} does not exist; use 'staged' or 'joint'")
    if settings.fit.output_bias and settings.fit.recipe == "staged":
        raise TPatchError("output_bias trains without a threshold, which the staged recipe needs; use recipe=joint")

    def init(model: Model, key: Array) -> TPatcherState:
        known = background(model, model.layer(None), memory, cache=cache, progress=progress)
        width = model.config.width
        dtype = jax.tree.leaves(model.params)[0].dtype
        empty = jnp.zeros((0, width), dtype)
        nothing = Earlier(Sites(empty, empty, empty), jnp.zeros(0, jnp.int32))
        patch, deep = create(width), None
        if settings.site == "subject":
            layer = model.layer(subject_layer(model.config.layers, settings.layer))
            if layer == model.layer(None):
                raise TPatchError(
                    f"layer {layer} is the last one, where a subject can no longer be heard; use site=last"
                )
            deep = background(model, layer, memory, cache=cache, progress=progress)
            patch = patch._replace(layer=jnp.zeros(0, jnp.int32))
        return TPatcherState(model, patch, known, deep, nothing, settings)

    def step(state: TPatcherState, requests: Sequence[EditRequest], key: Array) -> tuple[TPatcherState, EditInfo]:
        return _step(state, as_requests(requests), key, progress)

    def apply(state: TPatcherState, tokens: Array) -> Array:
        return attach(state.model, state.patch).apply(tokens)

    return Editor(init, step, apply)


def _step(
    state: TPatcherState, requests: list[EditRequest], key: Array, progress: Progress | None
) -> tuple[TPatcherState, EditInfo]:
    began = time.perf_counter()
    model, settings, known = state.model, state.settings, state.background
    if settings.site == "subject" and state.earlier.wanted.size:
        raise TPatchError("site=subject edits in one step for now; give all requests together, or use site=last")
    problems = check_requests(model, requests, settings.site)
    prefixes = known.prefixes[: settings.contexts - 1]
    good = [position for position in range(len(requests)) if position not in problems]
    items = [read_item(model, position, requests[position], prefixes, settings.train_on_rephrases) for position in good]
    if not items:
        return state, _info(requests, problems, {}, {}, {}, began, 0.0, 0.0, model)

    layer = model.layer(None)
    deep, below = create(model.config.width), []
    unedited = model
    fit_seconds = 0.0
    if settings.site == "subject":
        fitted = time.perf_counter()
        deep, below = _fit_subjects(state, items, requests, progress)
        fit_seconds = time.perf_counter() - fitted
        model = attach(model, deep) if below else model

    # One pass over every prompt in every context: all that training will ever see of the model.
    rows = [row for item in items for row in item.rows]
    places = [range(start - 1, start - 1 + len(item.target)) for item in items for start in item.starts]
    report = (lambda done: progress("reading prompts", done, len(rows))) if progress else None
    sites = collect(model, rows, places, layer, report)
    unit = _forward_seconds(model, [item.rows[0] for item in items])

    # Index of (item, context, token) in the rows of `sites`, and what each row should be followed by.
    table, offset = [], 0
    answers = np.zeros(sites.query.shape[0], np.int32)
    for item in items:
        span = np.arange(len(item.rows) * len(item.target)).reshape(len(item.rows), -1) + offset
        table.append(span)
        answers[span] = np.asarray(item.target)
        offset += span.size
    bare = np.concatenate([span[0] for span in table])
    bare_sites = Sites(*(field[bare] for field in sites))
    wanted = answers[bare]
    owner = np.concatenate([np.full(span.shape[1], number) for number, span in enumerate(table)])
    token = np.concatenate([np.arange(span.shape[1]) for span in table])

    memory = _memory(state, sites, answers, table)
    negatives = _negatives(state, items, {p: requests[p] for p in good}, memory.mean, progress)
    act = ffn.ACTIVATIONS[model.config.activation]
    resume = _resume(model)
    patch, lanes, fits = state.patch._replace(layer=None), np.zeros(0, np.int64), []
    first_neuron = state.patch.key.shape[0]

    def wrong(patch: Patch) -> np.ndarray:
        return np.flatnonzero(argmax_logits(model, _patched(model, bare_sites, patch)) != wanted)

    missing = wrong(patch)
    already = set(range(len(items))) - set(owner[missing].tolist())
    for attempt in range(settings.attempts):
        missing = missing[token[missing] < settings.most_tokens]
        if not len(missing):
            break
        fitted = time.perf_counter()
        chosen = np.stack([table[owner[row]][: settings.contexts, token[row]] for row in missing])
        if settings.train_on_rephrases:
            chosen = _with_rephrases(table, owner, token, missing)
        queries = sites.query[chosen]
        beside = sites.output[chosen] + _added(model, patch, queries)
        targets = jnp.asarray(wanted[missing])
        lane = Lane(
            queries.astype(jnp.float32),
            beside.astype(jnp.float32),
            negatives[owner[missing]] * (token[missing] == 0)[:, None, None]
            + memory.mean * (token[missing] > 0)[:, None, None],
            {"residual": sites.residual[chosen]},
            targets,
            _direction(model, targets),
            _scale(model, sites.residual[chosen], sites.output[chosen], beside),
        )
        # Folded by what is asked for, so that a result does not depend on its neighbours.
        names = [f"{requests[items[owner[row]].position]} {token[row]} {attempt}" for row in missing]
        folds = jnp.asarray([zlib.crc32(name.encode()) for name in names], jnp.uint32)
        keys = jax.vmap(lambda fold: jax.random.fold_in(key, fold))(folds)
        said = f"fitting, attempt {attempt + 1}" if attempt else "fitting"
        tell = partial(_tell, progress, said, len(missing)) if progress else None
        found, info = fit_many(lane, memory, resume, keys, settings.fit.harder(attempt), act, tell)
        fit_seconds += time.perf_counter() - fitted
        finite = np.isfinite(np.asarray(found.value)).all((1, 2)) & np.isfinite(np.asarray(found.key)).all((1, 2))
        keep = np.flatnonzero(finite)
        size = found.key.shape[1]
        patch = concatenate([patch._replace(layer=None), join(take(found, keep))])
        lanes = np.concatenate([lanes, np.repeat(missing[keep], size)])
        fits.extend(_one(info, int(lane_number)) for lane_number in keep for _ in range(size))
        missing = wrong(patch)

    # What does not hold is taken out; that may free or trip others, so look until it is stable.
    dropped: set[int] = set(owner[missing].tolist())
    harmful: set[int] = set()
    earlier = state.earlier
    lost_before = _broken(model, earlier, state.patch)
    while True:
        alive = np.array([owner[lane] not in dropped for lane in lanes], bool)
        final = concatenate([state.patch._replace(layer=None), take(patch, np.flatnonzero(alive) + first_neuron)])
        broken = set(owner[wrong(final)].tolist()) - dropped
        lost = np.setdiff1d(_broken(model, earlier, final), lost_before)
        if len(lost) and alive.any():
            # The new neuron that acts most strongly where an earlier edit broke has to go.
            added = take(patch, np.flatnonzero(alive) + first_neuron)
            strength = act(preactivations(added, earlier.sites.query[lost])) * jnp.linalg.norm(added.value, axis=1)
            culprits = lanes[np.flatnonzero(alive)[np.asarray(jnp.argmax(jnp.abs(strength), 1))]]
            harmful |= set(owner[culprits].tolist())
            broken |= set(owner[culprits].tolist())
        if not broken:
            break
        dropped |= broken
        gone = {items[number].position for number in broken}
        if any(neuron.position in gone for neuron in below):
            # Without a neuron further down the last layer sees something else.
            below = [neuron for neuron in below if neuron.position not in gone]
            model = attach(unedited, take(deep, [neuron.neuron for neuron in below])) if below else unedited
            bare_sites = collect(
                model,
                [item.rows[0] for item in items],
                [range(item.starts[0] - 1, item.starts[0] - 1 + len(item.target)) for item in items],
                layer,
            )

    neurons: dict[int, list[int]] = {}
    notes: dict[int, list[_Note]] = {}
    for number, neuron in enumerate(below):
        neurons.setdefault(neuron.position, []).append(first_neuron + number)
        notes.setdefault(neuron.position, []).append(_Note("subject", neuron.steps, neuron.margin, neuron.losses))
    kept = np.flatnonzero(alive)
    for number, lane in enumerate(kept):
        position, fit = items[owner[lanes[lane]]].position, fits[lane]
        neurons.setdefault(position, []).append(first_neuron + len(below) + number)
        losses = {term: float(getattr(fit, term)) for term in ("l_e", "l_a", "l_m1", "l_m2")}
        notes.setdefault(position, []).append(_Note("last", int(fit.steps), float(fit.margin), losses))
    if settings.site == "subject":
        where = jnp.full(final.key.shape[0], layer, jnp.int32)
        deep = take(deep, [neuron.neuron for neuron in below])
        final = concatenate([deep, final._replace(layer=where)]) if below else final._replace(layer=where)
    for number in sorted(dropped):
        count = len(items[number].target)
        bad = [int(token[row]) for row in missing if owner[row] == number]
        which = f"target token {bad[0] + 1} of {count} still comes out wrong" if bad else "another edit breaks it"
        which = "it would break an earlier edit" if number in harmful else which
        problems[items[number].position] = (
            f"{which} after {settings.attempts} attempts; try more attempts, or give the request a subject"
        )
    # One that held, was disturbed by another edit and got a neuron for it counts as edited: its neurons need an owner.
    before = {items[number].position for number in already if number not in dropped} - set(neurons)
    # What holds joins the memory, so that later patches stay silent on it and are checked against it.
    holds = np.flatnonzero(~np.isin(owner, sorted(dropped)))
    sites_now = Sites(*(jnp.concatenate([old, new[holds]]) for old, new in zip(earlier.sites, bare_sites, strict=True)))
    wanted_now = jnp.concatenate([earlier.wanted, jnp.asarray(wanted[holds])])
    state = state._replace(patch=final, earlier=Earlier(sites_now, wanted_now))
    return state, _info(requests, problems, neurons, notes, before, began, fit_seconds, unit, model)


def _fit_subjects(
    state: TPatcherState, items: Sequence[Item], requests: Sequence[EditRequest], progress: Progress | None
) -> tuple[Patch, list[SubjectNeuron]]:
    """Neurons at the subjects of those requests that have one and do not hold already."""
    model, settings = state.model, state.settings
    places = [range(item.starts[0] - 1, item.starts[0] - 1 + len(item.target)) for item in items]
    sites = collect(model, [item.rows[0] for item in items], places, model.layer(None))
    said = argmax_logits(model, decoder.leave_last(model.config, model.params, sites.residual, sites.output))
    ends = np.cumsum([len(item.target) for item in items])[:-1]
    chosen = [
        item
        for item, found in zip(items, np.split(said, ends), strict=True)
        if requests[item.position].subject and found.tolist() != item.target
    ]
    if not chosen or state.deep is None:
        return create(model.config.width), []
    layer = subject_layer(model.config.layers, settings.layer)
    nothing = (jnp.zeros((0, model.config.width)), jnp.zeros(0, jnp.int32))
    none = create(model.config.width)
    return fit_subjects(model, none, layer, state.deep, chosen, requests, nothing, settings.subject, progress)


def _tell(progress: Progress, said: str, total: int, done: int) -> None:
    progress(said, done, total)


def _broken(model: Model, earlier: Earlier, patch: Patch) -> np.ndarray:
    """The rows of earlier edits whose wanted token does not come out."""
    return np.flatnonzero(argmax_logits(model, _patched(model, earlier.sites, patch)) != np.asarray(earlier.wanted))


def _one(info: FitInfo, lane: int) -> FitInfo:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[lane], info)


def _with_rephrases(table: list[np.ndarray], owner: np.ndarray, token: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Rows of every context of each wrong token, the last one repeated where a request has fewer rephrases."""
    most = max(len(table[owner[row]]) for row in missing)
    picks = [table[owner[row]][np.minimum(np.arange(most), len(table[owner[row]]) - 1), token[row]] for row in missing]
    return np.stack(picks)


def _memory(
    state: TPatcherState,
    sites: Sites,
    answers: np.ndarray,
    table: list[np.ndarray],
) -> Memory:
    """Background queries, earlier edits, and the other edits of this batch."""
    settings, known = state.settings, state.background
    nuisance = known.nuisance
    if settings.fit.recipe == "staged" and settings.contexts > 1:
        groups = [sites.query[span[: settings.contexts].T] for span in table]
        own = nuisance_scatter(jnp.concatenate(groups))
        # The edits' own contexts tell more than the general ones, the more of them there are.
        share = min(0.9, sum(group.shape[0] for group in groups) / 200)
        nuisance = share * own / jnp.trace(own) + (1 - share) * nuisance / jnp.trace(nuisance)
    memory = create_memory(known.query, nuisance, weight=settings.nuisance_weight, shrinkage=settings.shrinkage)
    query, answer = state.earlier.sites.query, state.earlier.wanted
    if settings.other_edits:
        query, answer = jnp.concatenate([query, sites.query]), jnp.concatenate([answer, jnp.asarray(answers)])
    return extend(memory, query, answer, power_of_two(query.shape[0], 64)) if query.shape[0] else memory


def _negatives(
    state: TPatcherState,
    items: Sequence[Item],
    requests: Mapping[int, EditRequest],
    mean: Array,
    progress: Progress | None,
) -> Array:
    """The query after each prompt about other subjects, ``[items, swaps, d]``; the mean where there is none."""
    model, count = state.model, state.settings.swaps
    swapped = swapped_prompts(model, requests, state.background.names, count)
    result = np.broadcast_to(np.asarray(mean), (len(items), count, mean.shape[0])).copy()
    places = [
        (number, slot) for number, item in enumerate(items) for slot in range(len(swapped.get(item.position, ())))
    ]
    rows = [model.encode_prompt(swapped[items[number].position][slot]) for number, slot in places]
    if rows:
        report = (lambda done: progress("reading other subjects", done, len(rows))) if progress else None
        found = collect(model, rows, [[len(row) - 1] for row in rows], model.layer(None), report).query
        result[tuple(np.asarray(places).T)] = np.asarray(found, np.float32)
    return jnp.asarray(result)


def _forward_seconds(model: Model, rows: list[list[int]], most: int = 64) -> float:
    """Seconds of one forward pass per request over its prompt and target, compiled and warm."""
    rows = rows[:: max(1, len(rows) // most)][:most]
    places = [[len(row) - 1] for row in rows]

    def run() -> None:
        sites = collect(model, rows, places, model.layer(None))
        argmax_logits(model, sites.residual + sites.output)

    run()
    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) / len(rows)


def _info(
    requests: Sequence[EditRequest],
    problems: Mapping[int, str],
    neurons: Mapping[int, list[int]],
    notes: Mapping[int, list[_Note]],
    already: Any,
    began: float,
    fit_seconds: float,
    unit: float,
    model: Model,
) -> EditInfo:
    results = []
    for position, request in enumerate(requests):
        name = request.name(position)
        if position in problems:
            results.append(RequestInfo(name, False, "failed", problems[position]))
        elif position in already:
            results.append(RequestInfo(name, True, "already"))
        else:
            fits = notes.get(position, [])
            terms = fits[0].losses if fits else ()
            results.append(
                RequestInfo(
                    name,
                    True,
                    "edited",
                    neurons=tuple(neurons.get(position, ())),
                    steps=max((fit.steps for fit in fits), default=0),
                    losses={term: float(np.mean([fit.losses[term] for fit in fits])) for term in terms},
                    margin=min((fit.margin for fit in fits), default=None),
                    site="subject" if any(fit.site == "subject" for fit in fits) else "last",
                )
            )
    seconds = time.perf_counter() - began
    count = max(1, len(requests))
    scale = 1 / (count * unit) if unit else 0.0
    added = sum(map(len, neurons.values())) * (2 * model.config.width + 1)
    return EditInfo(tuple(results), seconds, fit_seconds, seconds * scale, fit_seconds * scale, added)


def edit(
    model: Model,
    requests: Sequence[EditRequest | dict[str, Any]],
    *,
    settings: TPatcherSettings | str = "default",
    memory: str | Path | None = None,
    seed: int = 0,
    cache: bool = True,
    progress: Progress | None = None,
) -> tuple[Patch, EditInfo]:
    """Correct a model: fit the neurons that make it say each request's target after its prompt.

    Args:
        model: the model; not changed. Apply the result with `tpatch_jax.attach` or `tpatch_jax.merge`.
        requests: what to correct.
        settings: options, or the name of a preset: ``"default"`` or ``"paper"``.
        memory: a text file whose queries the patch stays silent on; by default text is sampled from the model, once.
        seed: the same seed gives the same patch on one machine.
        cache: keep the memory on disk between runs.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        The patch, ``[n, d]``, with one neuron per wrong target token, and an `EditInfo` that says what became of each
        request. Requests that do not hold are reported there and leave no neuron.

    Raises:
        TPatchError: there is no request, or a setting does not exist.

    Source: Huang et al. 2023.

    Example:
        >>> import tpatch_jax as tp
        >>> model = tp.load_model("smollm2-135m")  # doctest: +SKIP
        >>> patch, info = tp.edit(model, [tp.EditRequest("The capital of France is", "Lyon")])  # doctest: +SKIP
        >>> tp.merge(model, patch).generate("The capital of France is", 1)  # doctest: +SKIP
        ' Lyon'
    """
    from tpatch_jax.models.sources import cache_folder

    if not requests:
        raise TPatchError("there is no request to edit; give at least one EditRequest")
    if isinstance(settings, str):
        if settings not in PRESETS:
            raise TPatchError(f"preset {settings!r} does not exist; choose from {', '.join(sorted(PRESETS))}")
        settings = PRESETS[settings]
    key = jax.random.key(seed)
    with jax.default_matmul_precision("highest"):
        editor = tpatcher(settings, memory=memory, cache=cache_folder() if cache else None, progress=progress)
        state, info = editor.step(editor.init(model, key), as_requests(requests), key)
    return state.patch, info
