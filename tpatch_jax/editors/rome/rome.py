"""ROME and R-ROME as editors: a rank-one update of one feed-forward layer for each request, one after the other."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tpatch_jax.core import ffn
from tpatch_jax.core.checks import check_range
from tpatch_jax.editors.base import EditInfo, Editor, EditorFunctions
from tpatch_jax.editors.locating import with_spelling
from tpatch_jax.editors.reading import Item
from tpatch_jax.editors.repeats import step_once
from tpatch_jax.editors.rome.hidden_moment import hidden_moment, moment_rows, sampled_contexts
from tpatch_jax.editors.rome.rank_one import damped, rank_one
from tpatch_jax.editors.rome.state import (
    Attempt,
    RomeState,
    check_model,
    check_moment,
    edited,
    null_space,
    read_requests,
    report,
    says,
)
from tpatch_jax.editors.rome.subject_value import (
    OffsetInfo,
    ValueSettings,
    check_value,
    fork_requests,
    round_network,
    train_offsets,
    value_rows,
)
from tpatch_jax.editors.tpatcher.last_site import forward_seconds
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.model import Model
from tpatch_jax.models.networks import Batch
from tpatch_jax.requests import EditRequest
from tpatch_jax.typing import PathLike, Progress, RngKey

__all__ = [
    "ROME_PRESETS",
    "R_ROME_PRESETS",
    "RomeSettings",
    "Update",
    "check_rome",
    "find_update",
    "rome",
    "rome_layer",
]

CONTEXTS = ((5, 10), (10, 10))
"""Contexts besides the bare prompt: for each length in tokens how many."""


@dataclass(frozen=True)
class RomeSettings:
    """Options of ROME, the authors' values but for the extra steps of `ValueSettings`.

    Attributes:
        layer: ``"auto"``, see `rome_layer`, or a number.
        averaged_key: divide by the mean key as well (R-ROME) and not by the bare prompt's (ROME).
        value: how ``v*`` is trained.
        keep_failed: keep an update whose target does not come out, as the authors do.
        moment_tokens: at most so many tokens of a memory text count for ``C``.
        ridge: what is added to ``C`` before it is inverted, in units of its mean diagonal; see
            `tpatch_jax.editors.rome.rank_one.damped`. The authors, whose text is longer, add nothing.
        null_space: where it is positive, updates stay in the directions of ``C`` whose eigenvalues are below it, as
            AlphaEdit's do, whose authors take 0.02; 0 leaves them as they are.

    Raises:
        TPatchError: a value makes no sense.
    """

    layer: str = "auto"
    averaged_key: bool = False
    value: ValueSettings = field(default_factory=ValueSettings)
    keep_failed: bool = True
    moment_tokens: int = 65536
    ridge: float = 1e-4
    null_space: float = 0.0

    def __post_init__(self) -> None:
        """Checks the values."""
        check_value(self.value)
        check_moment(self.moment_tokens, self.ridge)
        check_range(self, ("null_space",), 0)


ROME_PRESETS: Mapping[str, RomeSettings] = {"default": RomeSettings()}
"""Named settings of ROME: ``default``, its authors', with extra steps for targets that these do not reach.

Source: Meng et al. 2022, appendix E.5.
"""

R_ROME_PRESETS: Mapping[str, RomeSettings] = {"default": RomeSettings(averaged_key=True)}
"""Named settings of R-ROME: ``default``, its authors', which are those of ROME.

Source: Gupta et al. 2024.
"""

_KNOWN: Mapping[tuple[str, int, int], tuple[int, float]] = {
    ("gpt2", 24, 1024): (8, 3.0),
    ("gpt2", 36, 1280): (12, 4.0),
    ("gpt2", 48, 1600): (17, 4.0),
    ("gptj", 28, 4096): (5, 4.0),
    ("llama", 32, 4096): (5, 4.0),
    ("llama", 30, 576): (6, 4.0),
}
"""Layer and clamp by family, layers and width: GPT-2 medium, large and XL, GPT-J, Llama-2-7B; SmolLM2-135M by our own
small sweep over layers 6, 10 and 14 on CounterFact.
"""


def rome_layer(config: NetworkConfig, wanted: str = "auto") -> int:
    """The layer that ROME edits: the authors' where they name one, or the best of a sweep, else a third of the way up.

    Args:
        config: the network's description.
        wanted: ``"auto"`` or a number.

    Raises:
        TPatchError: it is neither, or the network has no such layer.

    Source: Meng et al. 2022 for GPT-2 and GPT-J; Llama-2-7B as toolkits have it.
    """
    if wanted == "auto":
        known = _KNOWN.get((config.family, config.layers, config.hidden_size))
        return known[0] if known else round(config.layers / 3)
    if not wanted.isdigit() or int(wanted) >= config.layers:
        raise TPatchError(f"layer {wanted!r} does not exist; use layer=auto or 0 to {config.layers - 1}")
    return int(wanted)


def check_rome(model: Model, settings: RomeSettings) -> int:
    """Make sure that ROME, or R-ROME, can edit a model with these options.

    Args:
        model: the model.
        settings: the options.

    Returns:
        The layer.

    Raises:
        TPatchError: the model is no decoder, has no such layer, or a patch is attached to it.
    """
    method = _name(settings)
    check_model(model, method, ())
    layer = rome_layer(model.config, settings.layer)
    check_model(model, method, (layer,))
    return layer


def _name(settings: RomeSettings) -> str:
    return "R-ROME" if settings.averaged_key else "ROME"


def _clamp(config: NetworkConfig, clamp: float) -> float:
    return clamp or _KNOWN.get((config.family, config.layers, config.hidden_size), (0, 4.0))[1]


def rome(
    settings: RomeSettings = ROME_PRESETS["default"],
    *,
    memory: PathLike | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Editor:
    """The ROME editor, or R-ROME with ``averaged_key``.

    For each request ``k*``, the mean over 21 contexts of the input of the down projection at the subject's last token,
    and ``v*``, the FFN's output with which the model says the target, trained through the rest of the network; then
    ``W + u·rᵀ``, see `tpatch_jax.editors.rome.rank_one.rank_one`. The requests of a step are edited one after the
    other, each in the model that those before it left. Nothing can be taken out again but by going back to an earlier
    state, which holds the down projection from before.

    What ``memory`` names matters: with ``C = I`` neighbours of a subject are disturbed most, with ``C`` of text that
    the model says by itself less, with ``C`` of encyclopedic text, as the authors have it, least.

    Where it differs from the authors' code: ``C`` is of fewer tokens, and of text that the model itself says unless
    ``memory`` names a file, with a small ridge; contexts begin as those of MEMIT's code do; a bracket or quotation mark
    at a subject's end that shares its token with what follows is passed over; a value whose target is not reached in
    the authors' 20 steps takes up to 20 more (``value_extra_steps=0`` takes none).

    Args:
        settings: its options.
        memory: a text file for ``C``; by default text is sampled from the model.
        cache: folder where statistics are kept between runs.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        The `Editor`; its state is a `tpatch_jax.editors.rome.state.RomeState`.

    Raises:
        TPatchError: on ``init``, where the model is no decoder, has no such layer, or a patch is attached to it.

    Source: Meng et al. 2022; Gupta et al. 2024 for R-ROME.

    Example:
        >>> editor = rome()
        >>> state = editor.init(model, jax.random.key(0))  # doctest: +SKIP
        >>> state, info = editor.step(state, requests, jax.random.key(0))  # doctest: +SKIP
    """

    def init(model: Model, rng: RngKey) -> RomeState:
        layer = check_rome(model, settings)
        value = settings.value._replace(clamp=_clamp(model.config, settings.value.clamp))
        rows = moment_rows(model, memory, settings.moment_tokens, cache=cache, progress=progress)
        moment = hidden_moment(model, layer, rows, cache=cache, progress=progress)
        contexts = sampled_contexts(model, CONTEXTS)
        settled = replace(settings, layer=str(layer), value=value)
        projections = {layer: null_space(moment, layer, settings.null_space)} if settings.null_space else {}
        return RomeState(model, {}, {layer: damped(moment, settings.ridge)}, contexts, settled, projections)

    def step(state: RomeState, requests: Sequence[EditRequest], rng: RngKey) -> tuple[RomeState, EditInfo]:
        return step_once(state.model, requests, lambda given: _step(state, with_spelling(state.model, given), progress))

    def apply(state: RomeState, batch: Batch) -> Float[Array, "..."]:
        return edited(state).apply(batch)

    return EditorFunctions(init, step, apply)


class Update(NamedTuple):
    """What one request's update is made of.

    Attributes:
        key: ``k*``, ``[h]``.
        bare: ``k`` of the bare prompt, ``[h]``.
        value: ``v*``, ``[d]``.
        info: how ``v*`` was trained, of one request.
    """

    key: Float[Array, " hidden_neurons"]
    bare: Float[Array, " hidden_neurons"]
    value: Float[Array, " d"]
    info: OffsetInfo


def find_update(model: Model, layer: int, request: EditRequest, item: Item, settings: ValueSettings) -> Update:
    """``k*`` and ``v*`` of one request.

    Args:
        model: the model, with the edits so far.
        layer: the layer.
        request: the request.
        item: the same in tokens, in all contexts.
        settings: how ``v*`` is trained.
    """
    forked = fork_requests(model, [value_rows(model, request, item)], layer)
    network = model.params["layers"][layer]["ffn"]
    fork, first = forked.rows.fork, forked.rows.first[0]
    keys = ffn.hidden(network, fork.query[0, first[:-1]], model.config.activation).astype(jnp.float32)
    output = fork.output[0, first[0]].astype(jnp.float32)
    rounded = round_network(model, layer, settings)
    offset, info = train_offsets(model, forked, jnp.linalg.norm(output)[None], settings, rounded=rounded)
    return Update(jnp.mean(keys, 0), keys[0], output + jax.device_put(offset[0]), info)


def _step(state: RomeState, requests: list[EditRequest], progress: Progress | None) -> tuple[RomeState, EditInfo]:
    settings, names = state.settings, [request.name(position) for position, request in enumerate(requests)]
    layer, method = int(settings.layer), _name(settings)
    items, problems = read_requests(state, requests, method)
    unit = forward_seconds(state.model, items)
    began, fit_seconds = time.perf_counter(), 0.0
    attempts: dict[int, Attempt] = {}
    for number, item in enumerate(items):
        if progress:
            progress(f"editing with {method}", number, len(items))
        model, fitting = edited(state), time.perf_counter()
        update = find_update(model, layer, requests[item.position], item, settings.value)
        fit_seconds += time.perf_counter() - fitting
        at = update.key if settings.averaged_key else update.bare
        network = model.params["layers"][layer]["ffn"]
        moment, projection = state.moments[layer], state.projections.get(layer)
        after = state.with_network(
            layer, rank_one(network, update.key, update.value, moment, at=at, projection=projection)
        )
        reason = ""
        if not bool(jnp.isfinite(after.down_projections[layer]).all()):
            # Nobody keeps a network of NaN.
            reason = "the update is not finite; nothing was kept; try another layer or a smaller value_rate"
        elif not settings.keep_failed and not says(edited(after), [item])[0]:
            reason = "the target does not come out after the update; nothing was kept; try another layer"
        state = state if reason else after
        attempts[item.position] = Attempt(update.info, 0, reason)
    held = dict(zip((item.position for item in items), says(edited(state), items), strict=True))
    times = (time.perf_counter() - began, fit_seconds, unit)
    return state, report(names, problems, attempts, held, settings.keep_failed, times)
