"""What ROME and MEMIT want a model's layer to say at a subject: an offset trained through the rest of the network.

Only what comes after the subject is run again (`tpatch_jax.models.networks.fork`), for several requests together.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from tpatch_jax.core.int8 import float_type
from tpatch_jax.core.lanes import minimise_lanes
from tpatch_jax.core.products import PRECISIONS, is_bfloat16_faster, rounds_products
from tpatch_jax.core.sizes import power_of_two, round_up
from tpatch_jax.editors.reading import Item, subject_token
from tpatch_jax.editors.subject_rows import (
    ForkedRows,
    PromptRow,
    fork_rows,
    known_rows,
    prompt_row,
    rounded_around,
    runner,
)
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.model import Model
from tpatch_jax.requests import EditRequest
from tpatch_jax.typing import Params, Progress

__all__ = [
    "Forked",
    "OffsetInfo",
    "OffsetProblem",
    "OffsetState",
    "ValueSettings",
    "check_value",
    "fork_requests",
    "round_network",
    "train_offsets",
    "train_together",
    "value_program",
    "value_rows",
]


class ValueSettings(NamedTuple):
    """Options of an offset, the authors' values but for ``value_extra_steps``, of which they have none.

    ``value_steps`` is a name of T-Patcher's `FitSettings` as well: on the command line a change of it goes to both
    methods, if one call evaluates both. No other name is.

    Attributes:
        value_steps: the loss is looked at so often, with a step of Adam between each two looks.
        value_extra_steps: so often more at most, while the target's negative log-likelihood alone is not below
            ``value_enough``: on a small model targets of several tokens need it.
        value_rate: Adam's learning rate.
        value_closeness: weight of the divergence from the unedited model where the subject stands alone.
        value_decay: weight of ``‖δ‖/‖v₀‖²``.
        value_enough: an offset is done once its whole loss is below this.
        clamp: ``‖δ‖`` is at most so many times ``‖v₀‖``; 0 takes what the authors took for the model.
        offset_precision: of the products by which offsets are trained: ``"float32"``; ``"bfloat16"``, summed in
            float32; ``"auto"`` takes the latter where devices multiply those faster. Keys and ``v₀`` are of the
            model's precision in any case.
    """

    value_steps: int = 20
    value_extra_steps: int = 20
    value_rate: float = 0.5
    value_closeness: float = 0.0625
    value_decay: float = 0.5
    value_enough: float = 0.05
    clamp: float = 0.0
    offset_precision: str = "auto"


def check_value(settings: ValueSettings) -> None:
    """Make sure that the values of these options make sense.

    Raises:
        TPatchError: one does not.

    Example:
        >>> check_value(ValueSettings())
    """
    for name, least in (("value_steps", 1), ("value_extra_steps", 0)):
        if getattr(settings, name) < least:
            raise TPatchError(f"{name} is {getattr(settings, name)}; give {least} or more")
    if not 0 < settings.value_rate < math.inf:
        raise TPatchError(f"value_rate is {settings.value_rate}; give a positive number, such as 0.5")
    if settings.offset_precision not in PRECISIONS:
        raise TPatchError(
            f"offset_precision {settings.offset_precision!r} does not exist; use one of {', '.join(PRECISIONS)}"
        )
    for name in ("value_closeness", "value_decay", "value_enough", "clamp"):
        if not 0 <= getattr(settings, name) < math.inf:
            raise TPatchError(f"{name} is {getattr(settings, name)}; give 0 or a positive number")


class Forked(NamedTuple):
    """Rows of some requests, equally many each, cut at one layer at their subjects; the last of each is neutral.

    Attributes:
        rows: all rows of each.
        wanted: the tokens wanted there, ``[requests, rows - 1, places]``.
        weight: of each in its request's loss, ``[requests, rows - 1, places]``; those of a request sum to one.
    """

    rows: ForkedRows
    wanted: Int[Array, "requests rows places"]
    weight: Float[Array, "requests rows places"]


class OffsetInfo(NamedTuple):
    """How it went, for each request.

    Attributes:
        steps: steps of Adam taken.
        nll: mean negative log-likelihood of the target at the end, in nats.
        closeness: divergence from the unedited model at the end, in nats.
    """

    steps: Int[np.ndarray, " requests"]
    nll: Float[np.ndarray, " requests"]
    closeness: Float[np.ndarray, " requests"]


def value_rows(model: Model, request: EditRequest, item: Item) -> list[PromptRow]:
    """A request's prompt and target in each of its contexts, the bare one first, then ``{subject} is a``.

    Of the last one the authors' code looks at what is said right after the subject, where their paper has the end of
    the text; nothing behind the subject reaches that place.
    """
    subject = request.subject or ""
    alone = f"{subject} is a"
    last = subject_token(model, alone, len(subject))
    neutral = PromptRow(model.encode_prompt(alone)[: last + 1], last, [last], [])
    return [*(prompt_row(model, request, item, number, "subject") for number in range(len(item.texts))), neutral]


def fork_requests(model: Model, rows: Sequence[Sequence[PromptRow]], layer: int) -> Forked:
    """Some requests' rows run up to a layer's FFN, and from their subjects on.

    Args:
        model: the model, with the edits so far.
        rows: from `value_rows`, of each request.
        layer: the layer.
    """
    count = round_up(max(len(row.wanted) for each in rows for row in each), 2)
    shape = (len(rows), len(rows[0]) - 1, count)
    wanted, weight = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for lane, each in enumerate(rows):
        for number, row in enumerate(each[:-1]):
            wanted[lane, number, : len(row.wanted)] = row.wanted
            weight[lane, number, : len(row.wanted)] = 1 / ((len(each) - 1) * len(row.wanted))
    return Forked(fork_rows(model, rows, layer, count), jax.device_put(wanted), jax.device_put(weight))


def round_network(model: Model, layer: int, settings: ValueSettings) -> Params | None:
    """The network around a layer's FFN with its matrices in bfloat16, if offsets are trained with such products.

    Args:
        model: the model.
        layer: the layer, of whose FFN none of it depends.
        settings: options.
    """
    dtype = float_type(model.params)
    rounds = rounds_products(settings.offset_precision, model.config.hidden_size, dtype, is_bfloat16_faster())
    return rounded_around(model, layer) if rounds else None


def _length(x: Float[Array, "*rows d"]) -> Float[Array, "*rows"]:
    """``‖x‖`` along the last axis, of which the gradient at zero is zero, as in torch."""
    square = jnp.sum(jnp.square(x), -1)
    there = square > 0
    return jnp.where(there, jnp.sqrt(jnp.where(there, square, 1)), 0)


class OffsetProblem(NamedTuple):
    """What each request's offset is trained on: its rows, the tokens wanted there, their weights, and ``‖v₀‖``."""

    rows: Any
    wanted: Int[Array, "requests rows places"]
    weight: Float[Array, "requests rows places"]
    scale: Float[Array, " requests"]


class OffsetState(NamedTuple):
    """Of each request: its losses when last looked at, and what the model says without an offset where its subject
    stands alone, as log-probabilities.
    """

    nll: Float[Array, " requests"]
    closeness: Float[Array, " requests"]
    reference: Float[Array, "requests vocabulary"]


class _Report(NamedTuple):
    """What one look at the loss gives, for each request."""

    whole: Float[Array, " requests"]
    nll: Float[Array, " requests"]
    closeness: Float[Array, " requests"]
    alone: Float[Array, "requests vocabulary"]


def train_offsets(
    model: Model,
    forked: Forked,
    scale: Float[Array, " requests"],
    settings: ValueSettings,
    *,
    stream: bool = False,
    rounded: Params | None = None,
) -> tuple[Float[np.ndarray, "requests d"], OffsetInfo]:
    """What to add to a layer's output at each subject for the model to say the targets.

    ``min_δ  mean NLL(target) + c·KL(now ‖ before) + w·‖δ‖/‖v₀‖²`` by Adam from zero, with ``‖δ‖ ≤ clamp·‖v₀‖`` after
    each step. It ends where the loss is low enough, after ``value_steps`` where the target's NLL is, and else after
    ``value_extra_steps`` more. Requests never couple.

    Args:
        model: the model, with the edits so far.
        forked: from `fork_requests`, of the layer.
        scale: ``‖v₀‖`` of the bare prompts, ``[requests]``.
        settings: options.
        stream: add to the block's output (MEMIT) rather than to the FFN's (ROME).
        rounded: from `round_network`; what else the model's products are made of.

    Returns:
        ``δ``, ``[requests, d]``, and an `OffsetInfo`.

    Source: Meng et al. 2022, equation 4 and the authors' published code for the penalty; Meng et al. 2023.
    """
    fork, requests = forked.rows.fork, scale.shape[0]
    program = value_program(settings)
    loss = Partial(program.loss, runner(model, fork.layer, stream=stream, rounded=rounded))
    places = forked.rows.places
    # Of the neutral row one place is read.
    read = jnp.concatenate([places[:, :-1].reshape(requests, -1), places[:, -1, :1]], 1)
    problem = OffsetProblem(known_rows(forked.rows, read), forked.wanted, forked.weight, scale)
    zero, unknown = jnp.zeros(requests), jnp.zeros((requests, model.config.vocabulary))
    start, state = jnp.zeros((requests, fork.output.shape[-1]), jnp.float32), OffsetState(zero, zero, unknown)
    steps = settings.value_steps + settings.value_extra_steps - 1
    result = minimise_lanes(loss, program.project, program.stop, start, problem, state, program.optimiser, steps)
    return result.moves, OffsetInfo(result.steps, result.state.nll, result.state.closeness)


def train_together(
    model: Model,
    rows: Sequence[Sequence[PromptRow]],
    layer: int,
    before: Float[np.ndarray, "requests d"],
    order: Sequence[int],
    together: int,
    settings: ValueSettings,
    progress: Progress | None,
    what: str,
) -> list[tuple[Float[np.ndarray, " d"], OffsetInfo, int]]:
    """`train_offsets` of the stream, for a few requests at a time.

    Args:
        model: the model, with the edits so far.
        rows: from `value_rows`, of each request.
        layer: the layer.
        before: the stream after its block at the subject of each bare prompt, ``[requests, d]``.
        order: all requests, those of similar lengths beside each other, so that little is padding.
        together: so many at a time.
        settings: options.
        progress: called with ``what``, how much is done, and how much there is.
        what: is being done.

    Returns:
        Of each request its offset, how the training of its chunk went, and its lane there.
    """
    trained: dict[int, tuple[np.ndarray, OffsetInfo, int]] = {}
    rounded = round_network(model, layer, settings)
    for first in range(0, len(order), together):
        if progress:
            progress(what, first, len(order))
        chunk = order[first : first + together]
        # Lanes come in few numbers; one that stands in twice is dropped again.
        lanes = [*chunk, *[chunk[-1]] * (power_of_two(len(chunk)) - len(chunk))]
        forked = fork_requests(model, [rows[number] for number in lanes], layer)
        scale = jnp.linalg.norm(jax.device_put(before[lanes]), axis=-1)
        offsets, info = train_offsets(model, forked, scale, settings, stream=True, rounded=rounded)
        for lane, number in enumerate(chunk):
            trained[number] = offsets[lane], info, lane
    return [trained[number] for number in range(len(order))]


class _Program(NamedTuple):
    """The functions of one loop, the same objects for the same settings, so that ``jit`` recognises them."""

    loss: Callable[..., tuple[Array, _Report]]
    project: Callable[..., Array]
    stop: Callable[..., tuple[OffsetState, Array]]
    optimiser: optax.GradientTransformation


@lru_cache(maxsize=16)
def value_program(settings: ValueSettings) -> _Program:
    """What offsets are trained by: one object for the same settings, so that ``jit`` recognises it."""

    def loss(
        run: Partial,
        offsets: Float[Array, "requests d"],
        problem: OffsetProblem,
        state: OffsetState,
        number: Int[Array, ""],
    ) -> tuple[Float[Array, ""], _Report]:
        each = problem.wanted.shape[1] + 1
        log_probs = run(problem.rows, jnp.repeat(offsets[:, None], each, axis=1))
        said = log_probs[:, :-1].reshape(*problem.wanted.shape, -1)
        nll = -jnp.take_along_axis(said, problem.wanted[..., None], -1)[..., 0]
        nll = jnp.sum(nll * problem.weight, (1, 2))
        alone = log_probs[:, -1]
        # At the start both are the same, where the divergence and its gradient are zero.
        before = jnp.where(number == 0, jax.lax.stop_gradient(alone), state.reference)
        close = jnp.where(number == 0, 0.0, jnp.sum(jnp.exp(alone) * (alone - before), -1))
        decay = settings.value_decay * _length(offsets) / jnp.square(problem.scale)
        whole = nll + settings.value_closeness * close + decay
        return jnp.sum(whole), _Report(whole, nll, close, alone)

    def project(offsets: Float[Array, "requests d"], problem: OffsetProblem) -> Float[Array, "requests d"]:
        longest = settings.clamp * problem.scale
        return offsets * jnp.minimum(1.0, longest / jnp.maximum(_length(offsets), longest))[:, None]

    def stop(
        offsets: Array, problem: OffsetProblem, state: OffsetState, report: _Report, number: Int[Array, ""]
    ) -> tuple[OffsetState, Bool[Array, " requests"]]:
        reference = jnp.where(number == 0, report.alone, state.reference)
        ended = (report.whole < settings.value_enough) | ~jnp.isfinite(report.whole)
        ended |= (number >= settings.value_steps - 1) & (report.nll < settings.value_enough)
        return OffsetState(report.nll, report.closeness, reference), ended

    return _Program(loss, project, stop, optax.adam(settings.value_rate))
