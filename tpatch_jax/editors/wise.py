"""WISE: a side memory, a copy of one feed-forward network's value matrix, and a switch between the two.

Edits are trained into the copy alone. What a prompt moves between copy and original, ``Δ(x)``, tells whether an edit is
meant: it is trained to be large on edits and small elsewhere, and where it is below a threshold the unedited model
answers, bit for bit. Where the authors' paper leaves a choice, or their code differs from it, this file reads them so:

- ``Δ(x) = mean over tokens of ‖a(x)·(W' − W)‖``, ``a`` the network's hidden neurons, over the prompt's tokens but the
  first, whose state looks like no other. The prompt decides for the whole answer; in their code each decoded token
  decides for itself.
- The margins α, β, γ of the routing loss are in units of the length of the network's unedited output on running text,
  in the proportion of the authors' 5, 20, 10, so that they suit networks of other sizes.
- What is out of scope is running text; theirs are questions of the data set's training part.
- Edits are trained one after the other, in batches, too: nothing else is defined. Each is seen behind a few short texts
  (10 of them in their code).
- Knowledge is sharded: after ``shard_edits`` edits a new copy with another random mask of trainable parameters begins,
  and copies are put together by TIES merging. One copy is merged with nothing.

Source: Wang et al., "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models",
NeurIPS 2024; Yadav et al., "TIES-Merging", NeurIPS 2023.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from tpatch_jax.core import ffn
from tpatch_jax.core.checks import check_positive, check_range, text_generator
from tpatch_jax.core.flops import count_flops
from tpatch_jax.core.sizes import power_of_two, round_up
from tpatch_jax.editors.base import EditInfo, Editor, EditorFunctions, RequestInfo, Routing
from tpatch_jax.editors.one_layer import check_one_layer
from tpatch_jax.editors.reading import Item, check_requests, read_item
from tpatch_jax.editors.registry import Method, register_editor
from tpatch_jax.editors.repeats import step_once
from tpatch_jax.editors.rome.hidden_moment import sampled_contexts
from tpatch_jax.editors.routed import apply_routed, routed_answers
from tpatch_jax.editors.tpatcher.last_site import forward_seconds
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import networks
from tpatch_jax.models.collection import batches, collect
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.memory_text import memory_rows
from tpatch_jax.models.model import Model
from tpatch_jax.models.networks import Batch, Trace
from tpatch_jax.models.rows import row_length, tokens_array
from tpatch_jax.requests import EditRequest
from tpatch_jax.typing import Arrays, Params, Progress

__all__ = [
    "WISE_PRESETS",
    "WiseSettings",
    "WiseState",
    "check_wise",
    "merge_shards",
    "restore_memory",
    "routing",
    "routing_activations",
    "save_memory",
    "side_memory",
    "wise",
]

HEIGHT = 0.87
"""How far up ``layer=auto`` is; the authors take layer 27 of the 32 of Llama-2-7B."""

CONTEXT_TOKENS = 8
"""The texts before a prompt have so many tokens."""

HELD, HELD_TOKENS = 64, 16
"""So many pieces of running text are out of scope, of so many tokens each."""

DECAY = 1e-5
"""The authors' weight decay."""


@dataclass(frozen=True)
class WiseSettings:
    """Options of WISE; the defaults are its authors' but for the number of contexts and the units of the margins.

    Attributes:
        layer: ``"auto"``, 0.87 of the way up, or a number.
        edit_steps: at most so many steps of gradient descent for an edit.
        sgd_rate: the learning rate.
        total_enough: an edit is done once it holds and its loss, with the routing's, is below this.
        alpha: ``Δ`` out of scope is trained to be at most this, in units of the unedited output's length.
        beta: ``Δ`` of an edit is trained to be at least this.
        gamma: and to be so much larger than out of scope.
        scope_ratio: a prompt is in scope from this share of the least ``Δ`` of any edit on.
        mask_share: the share of the copy's parameters that a shard trains.
        max_change: how far a parameter may go from its unedited value.
        shard_edits: so many edits share a copy.
        density: the share of each copy's changes, the largest ones, that stay when several are merged.
        contexts: so many short texts stand before an edit's prompt, one at a time, besides none.
        keep_failed: keep the copy's change if an edit does not hold in the end, as the authors do.

    Raises:
        TPatchError: a value makes no sense.
    """

    layer: str = "auto"
    edit_steps: int = 70
    sgd_rate: float = 1.0
    total_enough: float = 0.02
    alpha: float = 0.25
    beta: float = 1.0
    gamma: float = 0.5
    scope_ratio: float = 0.88
    mask_share: float = 0.2
    max_change: float = 1.0
    shard_edits: int = 500
    density: float = 0.53
    contexts: int = 4
    keep_failed: bool = True

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.layer != "auto" and not self.layer.isdigit():
            raise TPatchError(f"layer {self.layer!r} is not a layer; use layer=auto or a number")
        check_range(self, ("edit_steps", "shard_edits"), 1)
        check_range(self, ("contexts", "total_enough", "alpha", "gamma"), 0)
        check_positive(self, ("sgd_rate", "beta", "scope_ratio", "mask_share", "max_change", "density"))
        check_range(self, ("scope_ratio", "mask_share", "density"), 0, 1)
        if self.alpha >= self.beta:
            raise TPatchError(
                f"alpha is {self.alpha} and beta {self.beta}, so that edits are no farther off than other texts; give "
                "an alpha below beta"
            )


WISE_PRESETS: Mapping[str, WiseSettings] = {"default": WiseSettings()}
"""Named settings of WISE: ``default``.

Source: Wang et al. 2024, and the configuration for Llama-2-7B in their code.
"""


class WiseState(NamedTuple):
    """What an edited model is made of.

    Attributes:
        model: the unedited model, which never changes.
        layer: whose value matrix is copied.
        unit: the length of that network's output on running text, by which margins are measured.
        contexts: short texts to put before a prompt.
        held: pieces of running text, in tokens.
        rng: a typed random key, of which the masks are drawn.
        shards: the copies, float32, of which the last is trained, ``[h, d]`` each.
        edits: how many edits are in all copies.
        least: the least ``Δ`` of any edit when it was trained; infinite without edits.
        settings: the editor's options.
    """

    model: Model
    layer: int
    unit: float
    contexts: tuple[str, ...]
    held: tuple[tuple[int, ...], ...]
    rng: Array
    shards: tuple[Float[Array, "neurons d"], ...]
    edits: int
    least: float
    settings: WiseSettings

    @property
    def main(self) -> Float[Array, "neurons d"]:
        """The unedited value matrix, float32."""
        return jnp.asarray(self.model.params["layers"][self.layer]["ffn"]["down"]["kernel"], jnp.float32)


def wise(
    settings: WiseSettings = WISE_PRESETS["default"],
    *,
    memory: str | Path | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Editor:
    """The WISE editor: no parameter changes, edits are trained into a copy of one value matrix.

    Minimises ``−log p(target) + max(0, Δ(x_i) − α) + max(0, β − Δ(x_e)) + max(0, γ − Δ(x_e) + Δ(x_i))`` for the edit's
    prompt ``x_e`` and a text ``x_i`` out of scope, by gradient descent on a random part of the copy. A prompt whose
    ``Δ`` is at least ``scope_ratio`` times the least one of any edit is answered with the copy, any other by the
    unedited model, bit for bit. There is no undo but the state from before.

    ``apply`` knows no prompts, so a row is decided on as a whole, padding (zeros at the end) left out; an evaluation
    and generation decide on the prompt.

    Args:
        settings: its options.
        memory: a text file of which pieces are out of scope; by default text is sampled from the model.
        cache: folder where sampled texts are kept between runs.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        The `Editor`; its state is a `WiseState`.

    Raises:
        TPatchError: on ``init``, where the model is no decoder, has no such layer, something is attached there, or its
            weights are in INT8.

    Source: Wang et al. 2024; `tpatch_jax.editors.wise` says how it is read.

    Example:
        >>> editor = wise(WiseSettings(contexts=10))
        >>> state = editor.init(model, jax.random.key(0))  # doctest: +SKIP
        >>> state, info = editor.step(state, requests, jax.random.key(0))  # doctest: +SKIP
    """

    def init(model: Model, rng: Array) -> WiseState:
        layer = check_wise(model, settings)
        rows = memory_rows(model, memory, cache=cache, progress=progress)[:HELD]
        held = tuple(tuple(row[: HELD_TOKENS + len(model.start)]) for row in rows)
        contexts = sampled_contexts(model, [(CONTEXT_TOKENS, settings.contexts)]) if settings.contexts else ()
        output = collect(model, held, [range(1, len(row)) for row in held], layer).output
        unit = float(np.mean(np.linalg.norm(np.asarray(output, np.float32), axis=-1)))
        return WiseState(model, layer, unit, contexts, held, rng, (), 0, math.inf, settings)

    def step(state: WiseState, requests: Sequence[EditRequest], rng: Array) -> tuple[WiseState, EditInfo]:
        return step_once(state.model, requests, lambda given: _step(state, given, progress))

    def apply(state: WiseState, batch: Batch) -> Array:
        return apply_routed(state.model, routing(state), batch)

    return EditorFunctions(init, step, apply)


def check_wise(model: Model, settings: WiseSettings) -> int:
    """Make sure that a model can get a side memory with these options.

    Returns:
        The layer.

    Raises:
        TPatchError: it is no decoder, has no such layer, something is attached there, or its weights are in INT8.
    """
    if model.config.architecture != "decoder":
        raise TPatchError(
            f"WISE needs a decoder, and {model.name!r} is an {model.config.architecture}; use method tpatcher"
        )
    return check_one_layer(model, settings.layer, HEIGHT, "WISE", "copies")


# --- the side memory ---


def merge_shards(
    main: Float[Array, "neurons d"], shards: Sequence[Float[Array, "neurons d"]], density: float
) -> Float[Array, "neurons d"]:
    """TIES merging: of each copy's changes the largest stay, signs are voted on, and what agrees is averaged.

    Args:
        main: what the copies were made of.
        shards: the copies.
        density: the share of changes that stay, of each.

    Source: Yadav et al. 2023.

    Example:
        >>> main = jnp.zeros((1, 4))
        >>> shards = [jnp.asarray([[4.0, 1.0, -2.0, 0.0]]), jnp.asarray([[2.0, 0.0, 3.0, 0.5]])]
        >>> merge_shards(main, shards, 0.5).tolist()
        [[3.0, 0.0, 3.0, 0.0]]
    """
    changes = jnp.stack([shard - main for shard in shards])
    size = jnp.abs(changes).reshape(len(shards), -1)
    kept = max(1, round(density * size.shape[1]))
    least = jnp.sort(size, -1)[:, size.shape[1] - kept, None, None]
    changes = jnp.where(jnp.abs(changes) >= jnp.maximum(least, jnp.finfo(jnp.float32).tiny), changes, 0.0)
    sign = jnp.sign(jnp.sum(changes, 0))
    agree = (jnp.sign(changes) == sign) & (changes != 0)
    return main + jnp.sum(jnp.where(agree, changes, 0.0), 0) / jnp.maximum(jnp.sum(agree, 0), 1)


def side_memory(state: WiseState) -> Float[Array, "neurons d"]:
    """The side memory's value matrix, float32: the only copy, or all of them merged; without edits the original.

    Args:
        state: after some steps.
    """
    if len(state.shards) < 2:
        return state.shards[0] if state.shards else state.main
    return merge_shards(state.main, state.shards, state.settings.density)


def _with_kernel(state: WiseState, kernel: Float[Array, "neurons d"]) -> Model:
    """The model with another value matrix; it shares all other arrays with the unedited one."""
    layers = dict(state.model.params["layers"])
    network = layers[state.layer]["ffn"]
    down = {**network["down"], "kernel": kernel.astype(network["down"]["kernel"].dtype)}
    layers[state.layer] = {**layers[state.layer], "ffn": {**network, "down": down}}
    return state.model.with_params({**state.model.params, "layers": layers})


# --- routing ---


@jax.jit
def _moves(
    hidden: Float[Array, "rows tokens neurons"], change: Float[Array, "neurons d"], counted: Float[Array, "rows tokens"]
) -> Float[Array, "rows"]:
    """``Δ``: the mean of ``‖a·(W' − W)‖`` over the tokens that count."""
    # Where nothing has changed yet, the length has no slope.
    length = jnp.sqrt(jnp.sum(jnp.square(jnp.matmul(hidden, change)), -1) + 1e-12)
    return jnp.sum(length * counted, -1) / jnp.maximum(jnp.sum(counted, -1), 1e-6)


def _counted(lengths: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    """The tokens of prompts of some lengths that count, ``[rows, tokens]``: all but the first, if there are others."""
    counted = np.zeros(shape, np.float32)
    for lane, length in enumerate(lengths):
        counted[lane, min(1, length - 1) : length] = 1
    return counted


def routing_activations(state: WiseState, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """``Δ`` of prompts in tokens, ``[prompts]``.

    Args:
        state: after some steps.
        prompts: token ids of each.
    """
    config, network = state.model.config, ffn.detach(state.model.params["layers"][state.layer]["ffn"])
    change, moves = side_memory(state) - state.main, np.zeros(len(prompts))
    for numbers, batch in batches(config, prompts):
        traced = state.model.trace(batch, state.layer)
        counted = _counted([len(prompts[number]) for number in numbers], traced.query.shape[:2])
        moved = _moves(_hidden(network, traced.query, config.activation), change, jax.device_put(counted))
        moves[numbers] = np.asarray(moved)[: len(numbers)]
    return moves


@partial(jax.jit, static_argnames="activation")
def _hidden(network: Params, query: Array, activation: str) -> Array:
    return ffn.hidden(dict(network), query, activation).astype(jnp.float32)


def routing(state: WiseState) -> Routing:
    """Which prompts the side memory answers; it reads nothing beside them.

    Args:
        state: after some steps.
    """

    def contexts(prompts: Sequence[Sequence[int]]) -> list[list[int] | None]:
        threshold = state.least * state.settings.scope_ratio
        if math.isinf(threshold):
            return [None] * len(prompts)
        written = [number for number, prompt in enumerate(prompts) if len(prompt)]
        inside = np.zeros(len(prompts), bool)
        inside[written] = routing_activations(state, [prompts[number] for number in written]) >= threshold
        return [[] if there else None for there in inside]

    answering = _with_kernel(state, side_memory(state)) if state.shards else state.model
    return Routing(answering, contexts, decision_flops=partial(_decision_flops, state))


def _decision_flops(state: WiseState, prompt: Sequence[int]) -> float:
    """FLOPs of ``Δ`` of one prompt, for which everything up to the layer is run; without edits nothing is."""
    if math.isinf(state.least):
        return 0.0
    config, layer = state.model.config, state.layer

    def move(params: Params, change: Array, tokens: Array, counted: Array) -> Array:
        query = networks.trace(config, params, tokens, layer).query
        hidden = ffn.hidden(ffn.detach(params["layers"][layer]["ffn"]), query, config.activation)
        return _moves(hidden.astype(jnp.float32), change, counted)

    change = jax.ShapeDtypeStruct(state.main.shape, jnp.float32)
    tokens, counted = (jax.ShapeDtypeStruct((1, len(prompt)), kind) for kind in (jnp.int32, jnp.float32))
    return count_flops(move, state.model.params, change, tokens, counted)


# --- training ---


class _Lesson(NamedTuple):
    """What an edit is trained on: its prompt behind each context, and in the last row the text out of scope.

    Attributes:
        places: where in each row a token of the target is said, ``[rows, tokens]`` int.
        wanted: that token, ``[tokens]`` int.
        weight: how much it counts in the row's loss, ``[rows, tokens]``; 0 is padding, and of the last row.
        counted: which tokens make ``Δ``, ``[rows, tokens]``.
        edit: which rows are the edit's, ``[rows]``; their weights add up to 1.
        out: which row is out of scope, ``[rows]``.
    """

    places: Int[Array, "rows targets"]
    wanted: Int[Array, "targets"]
    weight: Float[Array, "rows targets"]
    counted: Float[Array, "rows tokens"]
    edit: Float[Array, "rows"]
    out: Float[Array, "rows"]


def _lesson(item: Item, held: Sequence[int]) -> tuple[Array, _Lesson]:
    """An edit in tokens, and what it is trained on."""
    rows = [*item.rows, list(held)]
    lanes, length = power_of_two(len(rows)), row_length(max(map(len, rows)))
    count, size = len(item.target), round_up(len(item.target), 2)
    places, weight = np.zeros((2, lanes, size))
    wanted = np.zeros(size, np.int32)
    wanted[:count] = item.target
    for lane in range(len(item.rows)):
        places[lane, :count] = item.places(lane)
        weight[lane, :count] = 1 / (count * len(item.rows))
    edit, out = np.zeros((2, lanes), np.float32)
    edit[: len(item.rows)], out[len(item.rows)] = 1 / len(item.rows), 1
    counted = _counted([*item.starts, len(held)], (lanes, length))
    tokens = tokens_array([*rows, *[[0]] * (lanes - len(rows))], length)
    arrays = (places.astype(np.int32), wanted, weight.astype(np.float32), counted, edit, out)
    return tokens, _Lesson(*map(jax.device_put, arrays))


class _Fit(NamedTuple):
    """How an edit was trained: the copy, the steps it took, its loss with the routing's, ``Δ`` of the edit."""

    kernel: Float[Array, "neurons d"]
    steps: Int[Array, ""]
    nll: Float[Array, ""]
    total: Float[Array, ""]
    move: Float[Array, ""]


@partial(jax.jit, static_argnames=("config", "layer", "steps"))
def _fit(
    config: NetworkConfig,
    layer: int,
    steps: int,
    params: Params,
    arrays: tuple[Array, Array, Mapping[str, Array]],
    main: Float[Array, "neurons d"],
    start: Float[Array, "neurons d"],
    mask: Bool[Array, "neurons d"],
    lesson: _Lesson,
    margins: Float[Array, "3"],
    options: Float[Array, "3"],
) -> _Fit:
    """Gradient descent on the copy until the edit holds and the loss is low, or the steps are over."""
    query, output, context = arrays
    traced = Trace(query=query, output=output, context=context, layer=layer)
    hidden = ffn.hidden(ffn.detach(params["layers"][layer]["ffn"]), query, config.activation).astype(jnp.float32)
    alpha, beta, gamma = margins
    rate, most, enough = options

    def losses(kernel: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        moved = output + jnp.matmul(hidden, kernel - main).astype(output.dtype)
        stream = networks.hidden(config, params, traced, moved)
        logits = networks.logits(config, params, networks.take_tokens(stream, lesson.places))
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        said = jnp.take_along_axis(log_p, jnp.broadcast_to(lesson.wanted, lesson.places.shape)[..., None], -1)[..., 0]
        wrong = (jnp.argmax(log_p, -1) != lesson.wanted) & (lesson.weight > 0)
        nll = -jnp.sum(said * lesson.weight)
        moves = _moves(hidden, kernel - main, lesson.counted)
        outside = jnp.sum(moves * lesson.out)
        margin = jax.nn.relu(beta - moves) + jax.nn.relu(gamma - moves + outside)
        routed = jax.nn.relu(outside - alpha) + jnp.sum(margin * lesson.edit)
        return nll + routed, (nll, wrong.any(), jnp.sum(moves * lesson.edit))

    def going(carry: tuple[_Fit, Array]) -> Array:
        return ~carry[1]

    def advance(carry: tuple[_Fit, Array]) -> tuple[_Fit, Array]:
        now, _ = carry
        (total, (nll, wrong, move)), gradient = jax.value_and_grad(losses, has_aux=True)(now.kernel)
        done = (~wrong & (total <= enough)) | ~jnp.isfinite(total) | (now.steps == steps)
        further = now.kernel - rate * (gradient + DECAY * now.kernel) * mask
        further = jnp.clip(further, main - most, main + most)
        kernel = jnp.where(done, now.kernel, further)
        return _Fit(kernel, now.steps + ~done, nll, total, move), done

    zero = jnp.zeros((), jnp.float32)
    begun = _Fit(start, jnp.zeros((), jnp.int32), zero, zero, zero)
    return jax.lax.while_loop(going, advance, (begun, jnp.asarray(False)))[0]


def draw_mask(state: WiseState, shard: int) -> Array:
    """Which parameters a shard trains, drawn at random."""
    key = jax.random.fold_in(state.rng, shard)
    return jax.random.bernoulli(key, jnp.float32(state.settings.mask_share), state.main.shape)


def _with_edit(state: WiseState, item: Item) -> tuple[WiseState, _Fit]:
    """The state with one more edit in its last copy."""
    model, settings = state.model, state.settings
    shards = state.shards
    if state.edits >= len(shards) * settings.shard_edits:
        shards = (*shards, state.main)
    # Drawn from the prompt, so that it does not depend on the edit's place in the list.
    held = state.held[int(text_generator(item.texts[0]).integers(len(state.held)))]
    tokens, lesson = _lesson(item, held)
    traced = model.trace(tokens, state.layer)
    margins = jnp.asarray([settings.alpha, settings.beta, settings.gamma], jnp.float32) * state.unit
    options = jnp.asarray([settings.sgd_rate, settings.max_change, settings.total_enough], jnp.float32)
    fit = _fit(
        model.config, state.layer, settings.edit_steps, model.params, (traced.query, traced.output, traced.context),
        state.main, shards[-1], draw_mask(state, len(shards) - 1), lesson, margins, options,
    )  # fmt: skip
    if not bool(jnp.isfinite(fit.total)):
        return state, fit
    least = min(state.least, float(fit.move))
    return state._replace(shards=(*shards[:-1], fit.kernel), edits=state.edits + 1, least=least), fit


# --- one step ---


def _answers(state: WiseState, requests: Sequence[EditRequest]) -> tuple[list[bool], list[bool]]:
    """Whether each target comes out, and whether its prompt is in scope."""
    routes = routing(state)
    contexts = routes.contexts([state.model.encode_prompt(request.prompt) for request in requests])
    return routed_answers(state.model, routes, requests, contexts), [context is not None for context in contexts]


def _step(state: WiseState, requests: list[EditRequest], progress: Progress | None) -> tuple[WiseState, EditInfo]:
    began, model = time.perf_counter(), state.model
    names = [request.name(number) for number, request in enumerate(requests)]
    problems = check_requests(model, requests, False)
    good = [number for number in range(len(requests)) if number not in problems]
    items = [read_item(model, number, requests[number], state.contexts, False) for number in good]
    asked = [requests[number] for number in good]
    before, _ = _answers(state, asked)
    fitting, after, fits = time.perf_counter(), state, {}
    for done, (item, held) in enumerate(zip(items, before, strict=True)):
        if progress:
            progress("training the side memory", done, len(items))
        if not held:
            after, fits[item.position] = _with_edit(after, item)
    fit_seconds = time.perf_counter() - fitting
    held, inside = _answers(after, asked)
    kept = state.settings.keep_failed or all(held)
    results = {number: RequestInfo(names[number], False, "failed", why) for number, why in problems.items()}
    for slot, number in enumerate(good):
        fit = fits.get(number)
        right = held[slot] if kept else before[slot]
        reason = "" if right else _reason(fit, held[slot], inside[slot], kept, state.settings)
        status = "failed" if not right else "already" if fit is None else "edited"
        losses = {} if fit is None else {"nll": float(fit.nll), "total": float(fit.total)}
        steps = 0 if fit is None else int(fit.steps)
        results[number] = RequestInfo(names[number], right, status, reason, steps=steps, losses=losses)
    added = (len(after.shards) - len(state.shards)) * state.main.size if kept else 0
    seconds = time.perf_counter() - began
    unit = forward_seconds(model, items)
    scale = 1 / (len(requests) * unit) if unit else 0.0
    ordered = tuple(results[number] for number in range(len(requests)))
    info = EditInfo(ordered, seconds, fit_seconds, seconds * scale, fit_seconds * scale, added)
    return after if kept else state, info


def _reason(fit: _Fit | None, held: bool, inside: bool, kept: bool, settings: WiseSettings) -> str:
    """Why an edit does not hold, and how to mend it."""
    fate = "the change was kept" if kept else "nothing was kept"
    if fit is None:
        return f"it held before, and another edit of this step changed that; {fate}; edit them one by one"
    if not math.isfinite(float(fit.total)):
        return f"the loss is not finite after {int(fit.steps)} steps, and {fate}; lower sgd_rate"
    if held:
        return "another request of this step does not hold, and nothing was kept; edit them one by one"
    if not inside:
        return f"its prompt is out of the side memory's scope, and {fate}; raise edit_steps, or lower scope_ratio"
    if int(fit.steps) >= settings.edit_steps:
        return f"the target does not come out after {int(fit.steps)} steps, and {fate}; raise edit_steps or sgd_rate"
    return f"a later edit of this step changed what it says, and {fate}; edit fewer at once, or lower mask_share"


# --- resuming ---


def save_memory(state: WiseState) -> Arrays:
    """The copies, how many edits they hold, and the least ``Δ`` of these, as arrays.

    Args:
        state: after some steps.
    """
    shape = (0, *state.main.shape)
    shards = np.stack([np.asarray(shard) for shard in state.shards]) if state.shards else np.zeros(shape, np.float32)
    return {"shards": shards, "edits": np.asarray([state.edits]), "least": np.asarray([state.least])}


def restore_memory(state: WiseState, arrays: Arrays) -> WiseState:
    """The inverse of `save_memory`.

    Args:
        state: fresh, from ``init`` with the same settings, model and random key.
        arrays: what was saved.

    Raises:
        TPatchError: the arrays belong to another model.
    """
    shards = np.asarray(arrays["shards"], np.float32)
    if shards.shape[1:] != state.main.shape:
        raise TPatchError(
            f"the saved copies are {shards.shape[1:]} and the model's value matrix {state.main.shape}; take the same "
            "model and layer"
        )
    return state._replace(
        shards=tuple(jnp.asarray(shard) for shard in shards),
        edits=int(arrays["edits"][0]),
        least=float(arrays["least"][0]),
    )


register_editor(
    Method(
        name="wise",
        presets=WISE_PRESETS,
        build=lambda settings, memory, cache, progress: wise(settings, memory=memory, cache=cache, progress=progress),
        model=lambda state: state.model,
        save=save_memory,
        restore=restore_memory,
        routing=routing,
        check=check_wise,
        undo="none",
        stock_checkpoint=False,
    )
)
