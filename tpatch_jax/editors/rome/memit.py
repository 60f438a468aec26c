"""MEMIT as an editor: many requests at once, each shared out over several feed-forward layers."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tpatch_jax.core import ffn
from tpatch_jax.core.checks import check_range
from tpatch_jax.editors.base import EditInfo, Editor, EditorFunctions
from tpatch_jax.editors.locating import with_spelling
from tpatch_jax.editors.reading import Item
from tpatch_jax.editors.repeats import step_once
from tpatch_jax.editors.rome.hidden_moment import hidden_moment, moment_rows, sampled_contexts
from tpatch_jax.editors.rome.rank_one import damped, distribute_update
from tpatch_jax.editors.rome.rome import rome_layer
from tpatch_jax.editors.rome.state import (
    Attempt,
    RomeState,
    check_model,
    check_moment,
    edited,
    read_requests,
    report,
    says,
)
from tpatch_jax.editors.rome.subject_value import ValueSettings, check_value, train_together, value_rows
from tpatch_jax.editors.subject_rows import PromptRow
from tpatch_jax.editors.tpatcher.last_site import forward_seconds
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import networks
from tpatch_jax.models.collection import batches, collect
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.model import Model
from tpatch_jax.models.networks import Batch
from tpatch_jax.requests import EditRequest
from tpatch_jax.typing import PathLike, Progress, RngKey

__all__ = [
    "MEMIT_PRESETS",
    "MemitSettings",
    "check_layers",
    "check_memit",
    "memit",
    "memit_layers",
    "memit_weight",
    "step_layers",
    "subject_keys",
    "subject_streams",
]

CONTEXTS = ((10, 5),)
"""Contexts besides the bare prompt: for each length in tokens how many."""

HEIGHT = 5
"""So many layers are edited where the authors name none."""


@dataclass(frozen=True)
class MemitSettings:
    """Options of MEMIT, the authors' values but for the extra steps of `ValueSettings`.

    Attributes:
        layers: ``"auto"``, see `memit_layers`, or numbers such as ``"6,7,8"``.
        moment_weight: ``"auto"``, see `memit_weight`, or ``λ`` as a whole number.
        value: how the stream's new values are trained, at the last of the layers.
        aligned: later steps keep what earlier ones wrote: each adds the difference of two solutions made at one time,
            of all edits so far and of those before, where the authors' code knows of general text alone.
        keep_failed: keep the update of a request whose target does not come out, as the authors do. Without it the
            step is done again without such requests, since a batch's updates cannot be told apart.
        moment_tokens: at most so many tokens of a memory text count for ``C``.
        ridge: as for `tpatch_jax.editors.rome.rome.RomeSettings`.
        together: so many values are trained together at most.

    Raises:
        TPatchError: a value makes no sense.
    """

    layers: str = "auto"
    moment_weight: str = "auto"
    value: ValueSettings = field(default_factory=lambda: ValueSettings(value_steps=25, clamp=0.75))
    aligned: bool = False
    keep_failed: bool = True
    moment_tokens: int = 65536
    ridge: float = 1e-4
    together: int = 8

    def __post_init__(self) -> None:
        """Checks the values."""
        check_value(self.value)
        check_moment(self.moment_tokens, self.ridge)
        check_range(self, ("together",), 1)


MEMIT_PRESETS: Mapping[str, MemitSettings] = {"default": MemitSettings()}
"""Named settings of MEMIT: ``default``, its authors' for GPT-J, with extra steps for targets that these do not reach.

Source: Meng et al. 2023, appendix B.
"""

_KNOWN: Mapping[tuple[str, int, int], tuple[tuple[int, ...], int]] = {
    ("gpt2", 48, 1600): ((13, 14, 15, 16, 17), 20000),
    ("gptj", 28, 4096): ((3, 4, 5, 6, 7, 8), 15000),
    ("gpt_neox", 44, 6144): ((6, 7, 8, 9, 10), 20000),
    ("llama", 32, 4096): ((4, 5, 6, 7, 8), 15000),
    ("llama", 30, 576): ((6, 7, 8, 9, 10), 1536),
}
"""Layers and ``λ`` by family, layers and width: GPT-2 XL, GPT-J, GPT-NeoX-20B, Llama-2-7B; SmolLM2-135M as we tried it
on a few CounterFact records, where nothing is tuned.
"""


def memit_layers(config: NetworkConfig, wanted: str = "auto") -> tuple[int, ...]:
    """The layers that MEMIT edits: the authors' where they name some, else five that end at ROME's.

    Args:
        config: the network's description.
        wanted: ``"auto"`` or numbers, with commas between them.

    Raises:
        TPatchError: it is neither, or the network lacks one of them.

    Source: Meng et al. 2023 for GPT-2 XL, GPT-J and GPT-NeoX; Llama-2-7B as toolkits have it.
    """
    if wanted == "auto":
        known = _KNOWN.get((config.family, config.layers, config.hidden_size))
        last = rome_layer(config)
        return known[0] if known else tuple(range(max(0, last + 1 - HEIGHT), last + 1))
    parts = [part.strip() for part in wanted.split(",")]
    for part in parts:
        if not part.isdigit() or int(part) >= config.layers:
            raise TPatchError(f"layers {wanted!r}: {part!r} does not exist; use layers=auto or some of 0 to "
                              f"{config.layers - 1} such as 3,4,5")  # fmt: skip
    return tuple(sorted({int(part) for part in parts}))


def memit_weight(config: NetworkConfig, wanted: str = "auto") -> int:
    """``λ``, the weight of what the network says to general text: the authors', else the number of hidden neurons.

    A typical key has ``kᵀC⁻¹k = h``, so that with ``λ = h`` it moves half the way; GPT-J's is 15,000 with 16,384.

    Args:
        config: the network's description.
        wanted: ``"auto"`` or a whole number.

    Raises:
        TPatchError: it is neither.
    """
    if wanted == "auto":
        known = _KNOWN.get((config.family, config.layers, config.hidden_size))
        return known[1] if known else config.ffn_width
    if not wanted.isdigit() or not int(wanted):
        raise TPatchError(f"moment_weight {wanted!r} is no weight; use moment_weight=auto or a positive whole number")
    return int(wanted)


def check_memit(model: Model, settings: MemitSettings) -> tuple[tuple[int, ...], int]:
    """Make sure that MEMIT can edit a model with these options.

    Args:
        model: the model.
        settings: the options.

    Returns:
        The layers and ``λ``.

    Raises:
        TPatchError: the model is no decoder, its feed-forward networks do not write into the stream directly, it has no
            such layer, or a patch is attached to it; or the weight is none.
    """
    layers = check_layers(model, "MEMIT", settings.layers)
    return layers, memit_weight(model.config, settings.moment_weight)


def check_layers(model: Model, method: str, wanted: str) -> tuple[int, ...]:
    """Make sure that updates can be shared out over some layers of a model.

    Args:
        model: the model.
        method: its name, for messages.
        wanted: as for `memit_layers`.

    Returns:
        The layers.

    Raises:
        TPatchError: as `check_memit`.
    """
    check_model(model, method, ())
    if model.config.sandwich or model.config.post_norm:
        raise TPatchError(
            f"{method} writes into the residual stream, and in {model.config.family} a norm stands between it and the "
            "feed-forward network; use method rome"
        )
    if model.config.residual_scale != 1:
        raise TPatchError(
            f"{method} writes into the residual stream, and {model.config.family} scales what its feed-forward "
            "networks add to it; use method rome"
        )
    if model.config.residual_gates:
        raise TPatchError(
            f"{method} writes into the residual stream, and {model.config.family} scales that from block to block; use "
            "method rome"
        )
    layers = memit_layers(model.config, wanted)
    check_model(model, method, layers)
    return layers


def memit(
    settings: MemitSettings = MEMIT_PRESETS["default"],
    *,
    memory: PathLike | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Editor:
    """The MEMIT editor.

    For each request a value of the residual stream after the last of some layers, at the subject's last token, with
    which the model says the target; then in one layer after the other, lowest first, an equal share of what is still
    missing there, for all requests at once: see `distribute_update`. Keys are the mean of the
    bare prompt's and of the mean of five sampled contexts'. With ``aligned`` later steps keep what earlier ones wrote.
    Nothing can be taken out again but by going back to an earlier state, which holds the down projections from before.

    Where it differs from the authors' code: ``C`` is of fewer tokens, and of text that the model itself says unless
    ``memory`` names a file, with a small ridge; it is solved in float32; a bracket or quotation mark at a subject's end
    that shares its token with what follows is passed over; a value whose target is not reached in the authors' 25 steps
    takes up to 20 more (``value_extra_steps=0`` takes none). Where a norm stands between the feed-forward network and
    the stream (Gemma 2 and 3) what is written into the one does not arrive in the other, so such models are refused.

    Args:
        settings: its options.
        memory: a text file for ``C``; by default text is sampled from the model.
        cache: folder where statistics are kept between runs.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        The `Editor`; its state is a `tpatch_jax.editors.rome.state.RomeState`.

    Raises:
        TPatchError: on ``init``, where the model is no decoder, its feed-forward networks do not write into the stream
            directly, it has no such layer, or a patch is attached to it.

    Source: Meng et al. 2023, section 4.

    Example:
        >>> editor = memit()
        >>> state = editor.init(model, jax.random.key(0))  # doctest: +SKIP
        >>> state, info = editor.step(state, requests, jax.random.key(0))  # doctest: +SKIP
    """

    def init(model: Model, rng: RngKey) -> RomeState:
        layers, weight = check_memit(model, settings)
        value = settings.value if settings.value.clamp else settings.value._replace(clamp=0.75)
        rows = moment_rows(model, memory, settings.moment_tokens, cache=cache, progress=progress)
        moments = {
            layer: damped(hidden_moment(model, layer, rows, cache=cache, progress=progress), settings.ridge)
            for layer in layers
        }
        settled = replace(settings, layers=",".join(map(str, layers)), moment_weight=str(weight), value=value)
        return RomeState(model, {}, moments, sampled_contexts(model, CONTEXTS), settled)

    def step(state: RomeState, requests: Sequence[EditRequest], rng: RngKey) -> tuple[RomeState, EditInfo]:
        def run(given: list[EditRequest]) -> tuple[RomeState, EditInfo]:
            return step_layers(state, with_spelling(state.model, given), "MEMIT", _write, progress)

        return step_once(state.model, requests, run)

    def apply(state: RomeState, batch: Batch) -> Float[Array, "..."]:
        return edited(state).apply(batch)

    return EditorFunctions(init, step, apply)


Write: TypeAlias = Callable[[RomeState, int, Array, Array], RomeState]
"""How one layer takes its share: ``(state, layer, keys [n, h], residuals [n, d]) -> state``."""


def _write(state: RomeState, layer: int, keys: Array, residuals: Array) -> RomeState:
    network = edited(state).params["layers"][layer]["ffn"]
    weight, earlier = float(state.settings.moment_weight), state.earlier.get(layer)
    state = state.with_network(
        layer, distribute_update(network, keys, residuals, state.moments[layer], weight, earlier)
    )
    return state.with_keys(layer, keys) if state.settings.aligned else state


class _Aim(NamedTuple):
    """One request: its rows, where the stream should be after the last layer, ``[d]``, and how that was found."""

    item: Item
    rows: list[PromptRow]
    goal: np.ndarray
    attempt: Attempt


def _cut(rows: Sequence[PromptRow]) -> tuple[list[list[int]], list[list[int]]]:
    """Rows up to their subjects, behind which nothing reaches them, and the place of each subject."""
    return [row.tokens[: row.subject + 1] for row in rows], [[row.subject] for row in rows]


def subject_streams(model: Model, rows: Sequence[PromptRow], layer: int) -> Float[np.ndarray, "rows d"]:
    """The residual stream after a layer's block at the subject of each row, ``[rows, d]``."""
    tokens, places = _cut(rows)
    result = np.zeros((len(rows), model.config.hidden_size), np.float32)
    for numbers, batch in batches(model.config, tokens):
        stream = networks.residuals(model.config, model.params, batch)[layer]
        for lane, number in enumerate(numbers):
            result[number] = np.asarray(stream[lane, places[number][0]], np.float32)
    return result


def subject_keys(
    model: Model, rows: Sequence[Sequence[PromptRow]], layer: int
) -> Float[Array, "requests hidden_neurons"]:
    """The mean of each bare prompt's key and of the mean of its other contexts', ``[requests, h]``."""
    query = collect(model, *_cut([row for each in rows for row in each]), layer).query
    network = model.params["layers"][layer]["ffn"]
    keys = ffn.hidden(network, jax.device_put(query), model.config.activation).astype(jnp.float32)
    keys = keys.reshape(len(rows), -1, keys.shape[-1])
    return (keys[:, 0] + jnp.mean(keys[:, 1:], 1)) / 2 if keys.shape[1] > 1 else keys[:, 0]


def _aims(
    state: RomeState, items: Sequence[Item], requests: Sequence[EditRequest], progress: Progress | None
) -> list[_Aim]:
    model, settings = edited(state), state.settings
    last = max(state.layers)
    rows = [value_rows(model, requests[item.position], item) for item in items]
    before = subject_streams(model, [each[0] for each in rows], last)
    order = sorted(range(len(items)), key=lambda n: (len(items[n].target), max(len(row.tokens) for row in rows[n])))
    trained = train_together(
        model, rows, last, before, order, settings.together, settings.value, progress, "training values"
    )
    aims = []
    for number, (offset, info, lane) in enumerate(trained):
        reason = (
            "" if np.isfinite(offset).all() else "the value is not finite; nothing was kept; try a smaller value_rate"
        )
        aims.append(_Aim(items[number], rows[number][:-1], before[number] + offset, Attempt(info, lane, reason)))
    return aims


def _written(state: RomeState, aims: Sequence[_Aim], write: Write, progress: Progress | None) -> RomeState:
    """Every layer in turn takes its share of what is still missing after the last one."""
    layers = state.layers
    for number, layer in enumerate(layers):
        if progress:
            progress("writing layers", number, len(layers))
        model = edited(state)
        missing = np.stack([aim.goal for aim in aims]) - subject_streams(
            model, [aim.rows[0] for aim in aims], layers[-1]
        )
        keys = subject_keys(model, [aim.rows for aim in aims], layer)
        state = write(state, layer, keys, jnp.asarray(missing / (len(layers) - number), jnp.float32))
    return state


def step_layers(
    state: RomeState, requests: list[EditRequest], method: str, write: Write, progress: Progress | None
) -> tuple[RomeState, EditInfo]:
    """Edit some requests at once, each shared out over the layers of a state.

    Args:
        state: the edits so far.
        requests: all different, with their subjects spelt as their prompts do.
        method: its name, for messages.
        write: how one layer takes its share.
        progress: called with what is being done, how much is done, and how much there is.
    """
    settings, names = state.settings, [request.name(position) for position, request in enumerate(requests)]
    items, problems = read_requests(state, requests, method)
    unit = forward_seconds(state.model, items)
    began = time.perf_counter()
    aims = _aims(state, items, requests, progress)
    fit_seconds = time.perf_counter() - began
    attempts = {aim.item.position: aim.attempt for aim in aims}
    going = [aim for aim in aims if not aim.attempt.reason]
    while True:
        after = _written(state, going, write, progress) if going else state
        finite = all(bool(jnp.isfinite(kernel).all()) for kernel in after.down_projections.values())
        held = dict(zip((item.position for item in items), says(edited(after), items), strict=True))
        # A batch's updates cannot be told apart: those that do not hold go, and the others are written anew.
        lost = {
            aim.item.position for aim in going if not finite or not (settings.keep_failed or held[aim.item.position])
        }
        if not lost:
            break
        why = "the target does not come out after the update" if finite else "the update is not finite"
        for position in lost:
            setting = "moment_weight" if state.moments else "weight or null_space"
            reason = f"{why}; nothing was kept; try other layers or another {setting}"
            attempts[position] = attempts[position]._replace(reason=reason)
        going = [aim for aim in going if aim.item.position not in lost]
    times = (time.perf_counter() - began, fit_seconds, unit)
    return after, report(names, problems, attempts, held, settings.keep_failed, times)
