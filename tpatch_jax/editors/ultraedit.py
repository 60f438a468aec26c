"""UltraEdit: an update in closed form from one forward and one backward pass, with features normalised as they come.

For every token of a target, and each of some linear maps ``y = xW`` inside feed-forward networks, a feature is what the
map reads there, the key ``k``, and the gradient ``g`` of ``−log p(target)`` by what it says there. All features so far
give a running mean and deviation, ``(k̂, ĝ) = ((k, g) − μ)/σ``. Then, with the rows of a step's tokens side by side::

    v = −η·‖k̂‖²·ĝ        ΔW = (KᵀK + αI)⁻¹·KᵀV

There is no loop over steps of an optimiser, no text of a memory, and no subject; what is kept between steps is ``μ``,
``σ`` and how many tokens they are of, and no key. Where the authors' code leaves a choice, this file reads it so:

- Maps of one shape share one mean and deviation, as in their code; the paper speaks of a feature alone.
- The deviation is exact. Their code adds ``n·s²`` of each part, which is ``n/(n − 1)`` too much, and no number where a
  part is a single token.
- The loss is summed over tokens, not averaged within groups of ten edits: the features of an edit do not depend on
  which others come with it. A factor would drop out by the normalisation.
- With one token and one map there is nothing to normalise by: ``σ`` is zero, so is ``k̂``, and the step changes nothing.

Source: Gu et al., "UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Language Models", TMLR 2026, and
its published code.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from tpatch_jax.core import ffn
from tpatch_jax.core.checks import check_positive
from tpatch_jax.core.patch import product
from tpatch_jax.core.sizes import power_of_two
from tpatch_jax.editors.base import EditInfo, Editor, EditorFunctions, RequestInfo
from tpatch_jax.editors.reading import Item, check_requests, read_item
from tpatch_jax.editors.registry import Method, register_editor
from tpatch_jax.editors.repeats import step_once
from tpatch_jax.editors.rome.state import check_model, says
from tpatch_jax.editors.tpatcher.last_site import forward_seconds
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import networks
from tpatch_jax.models.collection import batches
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.model import Model
from tpatch_jax.models.networks import Batch
from tpatch_jax.models.stack import embed_batch, enter_block, leave_block, run_block, without_ffn
from tpatch_jax.requests import EditRequest
from tpatch_jax.typing import Arrays, Params, Progress

__all__ = [
    "ULTRAEDIT_PRESETS",
    "RunningMoments",
    "UltraEditSettings",
    "UltraEditState",
    "absorb",
    "begin_moments",
    "pseudo_values",
    "ridge_update",
    "ultraedit",
    "ultraedit_maps",
]

Place: TypeAlias = tuple[int, str]
"""A linear map that is edited: its layer, and which of ``"up"``, ``"gate"`` and ``"down"`` it is."""

NAMES = ("up", "gate", "down")

LEAST_ROWS = 8
"""A step counts as so many tokens at least, so that few sizes are compiled."""

EPSILON = float(np.finfo(np.float32).eps)
"""Added to a deviation, as the authors do."""


@dataclasses.dataclass(frozen=True)
class UltraEditSettings:
    """Options of UltraEdit.

    Attributes:
        maps: ``"auto"``, see `ultraedit_maps`, or names such as ``"down:20-22"`` and ``"gate:11-15,up:18-24"``.
        rate: ``η``; 0 takes `ultraedit_rate`'s for the model.
        ridge: ``α``; the authors' is 1.
        keep_failed: keep the update of a request whose target does not come out, as the authors do. Without it the
            step is done again without such requests, since a batch's updates cannot be told apart.

    Raises:
        TPatchError: a value makes no sense.
    """

    maps: str = "auto"
    rate: float = 0.0
    ridge: float = 1.0
    keep_failed: bool = True

    def __post_init__(self) -> None:
        """Checks the values."""
        check_positive(self, ("ridge",))
        if self.rate != 0:
            check_positive(self, ("rate",))
        if self.maps != "auto":
            _read_maps(self.maps)


ULTRAEDIT_PRESETS: Mapping[str, UltraEditSettings] = {"default": UltraEditSettings()}
"""Named settings of UltraEdit: ``default``."""

_KNOWN: Mapping[tuple[str, int, int, int], str] = {
    ("gptj", 28, 4096, 16384): "down:18-26",
    ("llama", 32, 4096, 14336): "gate:11-15,up:18-24",
    ("mistral", 32, 4096, 14336): "down:29-30",
    ("qwen2", 28, 3584, 18944): "gate:18-26,up:18-26",
    ("phi3", 40, 5120, 17920): "down:30-38",
    ("gemma3", 62, 5376, 21504): "gate:52-60,up:52-60",
}
"""Maps by family, layers, width and hidden neurons: GPT-J, Llama-3-8B, Mistral-7B, Qwen2.5-7B, Phi-4, Gemma-3-27B."""

AUTHORS_RATE = 1e-6
"""``η`` of the authors' code, for models of 6 to 27 billion parameters."""

SMALL_RATE = 1e-3
"""``η`` of other models: of 1e-6, 1e-4, 1e-3 and 1e-2 the one with which eight CounterFact records of a step hold on
SmolLM2-135M.

``‖k̂‖²`` grows with how many numbers a key has, so that a narrower network moves less for the same ``η``.
"""


def _read_maps(wanted: str) -> tuple[Place, ...]:
    """The maps that a setting names, without looking at a network."""
    places: set[Place] = set()
    for part in (part.strip() for part in wanted.split(",")):
        name, _, numbers = part.partition(":")
        first, _, last = numbers.partition("-")
        last = last or first
        if name not in NAMES or not first.isdigit() or not last.isdigit() or int(first) > int(last):
            raise TPatchError(f"maps {wanted!r}: {part!r} names none; use maps=auto or some such as gate:11-15,down:20")
        places |= {(layer, name) for layer in range(int(first), int(last) + 1)}
    return tuple(sorted(places))


def ultraedit_maps(config: NetworkConfig, wanted: str = "auto") -> tuple[Place, ...]:
    """The linear maps that UltraEdit changes: the authors' where they name some, else the upper down projections.

    Those are of the layers from two thirds of the way up to the last but one, as the authors take them of GPT-J.

    Args:
        config: the network's description.
        wanted: ``"auto"`` or names with layers.

    Returns:
        Of each its layer and its name, in order.

    Raises:
        TPatchError: it is neither, or the network lacks one of them.
    """
    if wanted == "auto":
        known = _KNOWN.get((config.family, config.layers, config.hidden_size, config.ffn_width))
        last = max(0, config.layers - 2)
        wanted = known or f"down:{min(last, 2 * config.layers // 3)}-{last}"
    places = _read_maps(wanted)
    for layer, name in places:
        if layer >= config.layers:
            raise TPatchError(f"maps {wanted!r}: layer {layer} does not exist; use 0 to {config.layers - 1}")
        if name == "gate" and not config.gated:
            raise TPatchError(f"maps {wanted!r}: the networks of {config.family} have no gate; use up or down")
    return places


def ultraedit_rate(config: NetworkConfig, wanted: float = 0.0) -> float:
    """``η``: the authors' for the models that they name, else one for small models.

    Args:
        config: the network's description.
        wanted: a number; 0 asks for the model's.
    """
    known = (config.family, config.layers, config.hidden_size, config.ffn_width) in _KNOWN
    return wanted or (AUTHORS_RATE if known else SMALL_RATE)


# --- the algebra ---


class RunningMoments(NamedTuple):
    """Mean and scatter of all rows so far, as Chan et al. put parts together.

    Attributes:
        rows: how many.
        mean: ``μ``, ``[n]``.
        scatter: ``Σ (x − μ)²``, ``[n]``.
    """

    rows: Float[Array, ""]
    mean: Float[Array, " features"]
    scatter: Float[Array, " features"]

    @property
    def deviation(self) -> Float[Array, " features"]:
        """``σ`` of a sample; zero of one row."""
        return jnp.sqrt(self.scatter / jnp.maximum(self.rows - 1, EPSILON))


def begin_moments(features: int) -> RunningMoments:
    """The moments of no row."""
    return RunningMoments(jnp.zeros(()), jnp.zeros(features), jnp.zeros(features))


@jax.jit
def absorb(
    moments: RunningMoments, rows: Float[Array, "rows features"], there: Float[Array, " rows"]
) -> RunningMoments:
    """The moments with some more rows.

    Args:
        moments: of the rows before.
        rows: ``[rows, n]``.
        there: 1 for each row that counts, 0 for padding, ``[rows]``.

    Example:
        >>> moments = absorb(begin_moments(1), jnp.array([[1.0], [3.0], [5.0]]), jnp.ones(3))
        >>> moments.mean.tolist(), moments.deviation.tolist()
        ([3.0], [2.0])
    """
    new = jnp.sum(there)
    count = moments.rows + new
    mean = jnp.sum(rows * there[:, None], 0) / jnp.maximum(new, 1)
    away = mean - moments.mean
    scatter = jnp.sum(jnp.square(rows - mean) * there[:, None], 0)
    share = new / jnp.maximum(count, 1)
    return RunningMoments(
        count, moments.mean + away * share, moments.scatter + scatter + jnp.square(away) * moments.rows * share
    )


@jax.jit
def pseudo_values(
    moments: RunningMoments,
    keys: Float[Array, "rows inner"],
    gradients: Float[Array, "rows outer"],
    rate: float | Float[Array, ""],
) -> Float[Array, "rows outer"]:
    """``v = −η·‖k̂‖²·ĝ``: how the output of a map shall move at each token.

    Args:
        moments: of keys and gradients side by side.
        keys: ``k``, ``[rows, in]``.
        gradients: ``g``, ``[rows, out]``.
        rate: ``η``.

    Example:
        >>> moments = absorb(begin_moments(2), jnp.array([[1.0, 4.0], [3.0, 0.0], [5.0, -4.0]]), jnp.ones(3))
        >>> pseudo_values(moments, jnp.array([[1.0]]), jnp.array([[4.0]]), 0.5).round(3).tolist()
        [[-0.5]]
    """
    inner = keys.shape[1]
    normalised = (jnp.concatenate([keys, gradients], 1) - moments.mean) / (moments.deviation + EPSILON)
    return -rate * jnp.sum(jnp.square(normalised[:, :inner]), 1, keepdims=True) * normalised[:, inner:]


@jax.jit
def ridge_update(
    keys: Float[Array, "rows inner"], values: Float[Array, "rows outer"], ridge: float | Float[Array, ""]
) -> Float[Array, "inner outer"]:
    """``(KᵀK + αI)⁻¹·KᵀV``, by whichever of ``KᵀK`` and ``KKᵀ`` is smaller; rows of zeros change nothing.

    Args:
        keys: ``K``, ``[rows, in]``.
        values: ``V``, ``[rows, out]``.
        ridge: ``α``.

    Example:
        >>> ridge_update(jnp.array([[1.0, 0.0]]), jnp.array([[4.0]]), 1.0).round(3).tolist()
        [[2.0], [0.0]]
    """
    with jax.default_matmul_precision("highest"):
        few = keys.shape[0] < keys.shape[1]
        gram = keys @ keys.T if few else keys.T @ keys
        factor = jax.scipy.linalg.cho_factor(gram + ridge * jnp.eye(gram.shape[0], dtype=gram.dtype))
        if few:
            return keys.T @ jax.scipy.linalg.cho_solve(factor, values)
        return jax.scipy.linalg.cho_solve(factor, keys.T @ values)


# --- keys and gradients ---


class Said(NamedTuple):
    """Where the targets of a batch are said.

    Attributes:
        lane: which text, ``[rows]`` int.
        place: at which of its tokens, ``[rows]`` int.
        wanted: the token of the target, ``[rows]`` int.
        weight: 1, or 0 of padding, ``[rows]``.
    """

    lane: Array
    place: Array
    wanted: Array
    weight: Array


class Features(NamedTuple):
    """What one map reads and how the loss depends on what it says, ``[tokens, in]`` and ``[tokens, out]`` float32."""

    key: np.ndarray
    gradient: np.ndarray


@partial(jax.jit, static_argnames="activation")
def _probed(
    params: Params, query: Float[Array, "batch tokens hidden"], probes: dict[str, Array], activation: str
) -> tuple[Array, Array]:
    """A feed-forward network's hidden neurons and its output, with something added to what its maps say."""

    def say(name: str, x: Array) -> Array:
        entry = params[name]
        y = product(x, entry["kernel"].astype(x.dtype))
        y = y + entry["bias"].astype(x.dtype) if "bias" in entry else y
        return y + probes[name].astype(y.dtype) if name in probes else y

    act = ffn.ACTIVATIONS[activation]
    inner = act(say("gate", query)) * say("up", query) if "gate" in params else act(say("up", query))
    return inner, say("down", inner)


@partial(jax.jit, static_argnames="config")
def _loss(config: NetworkConfig, params: Params, stream: Array, said: Said) -> Float[Array, ""]:
    """``Σ −log p(wanted)`` from the residual stream after the last block."""
    log_probs = jax.nn.log_softmax(networks.logits(config, params, stream[said.lane, said.place]))
    return -jnp.sum(jnp.take_along_axis(log_probs, said.wanted[:, None], -1)[:, 0] * said.weight)


def _run(
    model: Model, places: Sequence[Place], batch: Batch, said: Said
) -> tuple[dict[Place, Array], dict[Place, Array]]:
    """One forward and one backward pass: keys and gradients of all maps at some positions, ``[rows, in or out]``."""
    config, layers = model.config, model.params["layers"]
    names = {layer: [name for at, name in places if at == layer] for layer, _ in places}

    def loss(probes: dict[Place, Array]) -> tuple[Array, dict[Place, Array]]:
        keys: dict[Place, Array] = {}
        _, x, positions, around = embed_batch(config, model.params, batch)
        for index in range(config.layers):
            kind, weights = config.kind(index), layers[index]
            if index not in names:
                x, _ = run_block(config, kind, weights, x, positions, None, around)
                continue
            residual, query, _ = enter_block(config, kind, weights, x, positions, None, around)
            added = {name: probes[index, name] for name in names[index]}
            inner, output = _probed(weights["ffn"], query, added, config.activation)
            keys |= {
                (index, name): (inner if name == "down" else query)[said.lane, said.place] for name in names[index]
            }
            x = leave_block(config, kind, without_ffn(weights), residual, output)
        return _loss(config, networks.final_weights(config, model.params), x, said), keys

    shape = batch.shape  # pyright: ignore[reportAttributeAccessIssue]
    probes = {at: jnp.zeros((*shape, layers[at[0]]["ffn"][at[1]]["kernel"].shape[1])) for at in places}
    gradients, keys = jax.grad(loss, has_aux=True)(probes)
    return keys, {at: gradient[said.lane, said.place] for at, gradient in gradients.items()}


def collect_features(model: Model, items: Sequence[Item], places: Sequence[Place]) -> list[dict[Place, Features]]:
    """Keys and gradients of each item, at the tokens where its target is said.

    Args:
        model: the model, with the edits so far; a decoder.
        items: the requests in tokens.
        places: the maps.
    """
    result: list[dict[Place, Features]] = [{} for _ in items]
    for numbers, batch in batches(model.config, [item.rows[0] for item in items]):
        owner = np.concatenate([np.full(len(items[number].target), number) for number in numbers])
        lane = np.concatenate([np.full(len(items[n].target), slot) for slot, n in enumerate(numbers)])
        place = np.concatenate([np.asarray(items[number].places(0)) for number in numbers])
        wanted = np.concatenate([np.asarray(items[number].target) for number in numbers])
        missing = power_of_two(len(owner), LEAST_ROWS) - len(owner)
        weight = np.pad(np.ones(len(owner), np.float32), (0, missing))
        lane, place, wanted = (np.pad(array, (0, missing)).astype(np.int32) for array in (lane, place, wanted))
        keys, gradients = _run(model, places, batch, Said(*map(jax.device_put, (lane, place, wanted, weight))))
        for at in places:
            key, gradient = (np.asarray(array, np.float32)[: len(owner)] for array in (keys[at], gradients[at]))
            for number in numbers:
                result[number][at] = Features(key[owner == number], gradient[owner == number])
    return result


# --- the editor ---


class UltraEditState(NamedTuple):
    """What an edited model is made of.

    Attributes:
        model: the unedited model.
        kernels: the changed maps, by layer and name, ``[in, out]``.
        moments: of all features so far, by the shape of their map.
        settings: the editor's options, as they are meant for this model.
    """

    model: Model
    kernels: Mapping[Place, Float[Array, "inner outer"]]
    moments: Mapping[tuple[int, int], RunningMoments]
    settings: UltraEditSettings


def edited_model(state: UltraEditState) -> Model:
    """The model with the edits so far: it shares all arrays but the changed maps with the unedited one."""
    layers = dict(state.model.params["layers"])
    for (layer, name), kernel in state.kernels.items():
        network = layers[layer]["ffn"]
        layers[layer] = {**layers[layer], "ffn": {**network, name: {**network[name], "kernel": kernel}}}
    return state.model.with_params({**state.model.params, "layers": layers}) if state.kernels else state.model


def check_ultraedit(model: Model, settings: UltraEditSettings) -> tuple[Place, ...]:
    """Make sure that UltraEdit can edit a model with these options.

    Returns:
        The maps.

    Raises:
        TPatchError: the model is no decoder, has no such map, or a patch is attached to one's layer.
    """
    check_model(model, "UltraEdit", ())
    places = ultraedit_maps(model.config, settings.maps)
    check_model(model, "UltraEdit", sorted({layer for layer, _ in places}))
    return places


def ultraedit(
    settings: UltraEditSettings = ULTRAEDIT_PRESETS["default"], *, progress: Progress | None = None
) -> Editor:
    """The UltraEdit editor: one forward and one backward pass for a step, and an update in closed form.

    ``ΔW = (KᵀK + αI)⁻¹·KᵀV`` with ``v = −η·‖k̂‖²·ĝ`` for each of some linear maps; `tpatch_jax.editors.ultraedit` has
    the rest. Nothing can be taken out again but by going back to an earlier state, which holds the maps from before.

    Args:
        settings: its options.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        The `Editor`; its state is an `UltraEditState`.

    Raises:
        TPatchError: on ``init``, where the model is no decoder, has no such map, or a patch is attached to its layer.

    Source: Gu et al. 2026.

    Example:
        >>> editor = ultraedit(UltraEditSettings(maps="down:20-28"))
        >>> state = editor.init(model, jax.random.key(0))  # doctest: +SKIP
        >>> state, info = editor.step(state, requests, jax.random.key(0))  # doctest: +SKIP
    """

    def init(model: Model, rng: Array) -> UltraEditState:
        places = check_ultraedit(model, settings)
        settled = dataclasses.replace(
            settings,
            maps=",".join(f"{name}:{layer}" for layer, name in places),
            rate=ultraedit_rate(model.config, settings.rate),
        )
        return UltraEditState(model, {}, MappingProxyType({}), settled)

    def step(state: UltraEditState, requests: Sequence[EditRequest], rng: Array) -> tuple[UltraEditState, EditInfo]:
        return step_once(state.model, requests, lambda given: _step(state, given, progress))

    def apply(state: UltraEditState, batch: Batch) -> Array:
        return edited_model(state).apply(batch)

    return EditorFunctions(init, step, apply)


def _padded(arrays: Sequence[np.ndarray]) -> Array:
    """All rows, and zeros behind them up to one of few sizes."""
    rows = np.concatenate(arrays)
    return jax.device_put(np.pad(rows, ((0, power_of_two(len(rows), LEAST_ROWS) - len(rows)), (0, 0))))


def _updated(state: UltraEditState, features: Sequence[Mapping[Place, Features]]) -> UltraEditState:
    """The state with one update from some requests' features."""
    places = _read_maps(state.settings.maps)
    rows = {
        at: (_padded([each[at].key for each in features]), _padded([each[at].gradient for each in features]))
        for at in places
    }
    count = sum(len(each[places[0]].key) for each in features)
    there = jnp.asarray(np.arange(len(rows[places[0]][0])) < count, jnp.float32)
    moments = dict(state.moments)
    for key, gradient in rows.values():
        shape = key.shape[1], gradient.shape[1]
        before = moments.get(shape, begin_moments(sum(shape)))
        moments[shape] = absorb(before, jnp.concatenate([key, gradient], 1), there)
    kernels, params = dict(state.kernels), edited_model(state).params["layers"]
    for (layer, name), (key, gradient) in rows.items():
        kernel = params[layer]["ffn"][name]["kernel"]
        known = moments[key.shape[1], gradient.shape[1]]
        # The rows of padding are no features, though normalising makes some of them.
        value = pseudo_values(known, key, gradient, state.settings.rate) * there[:, None]
        added = ridge_update(key, value, state.settings.ridge)
        kernels[layer, name] = (kernel.astype(jnp.float32) + added).astype(kernel.dtype)
    return state._replace(kernels=kernels, moments=moments)


def _step(
    state: UltraEditState, requests: list[EditRequest], progress: Progress | None
) -> tuple[UltraEditState, EditInfo]:
    names = [request.name(position) for position, request in enumerate(requests)]
    problems = check_requests(state.model, requests, False)
    items = [read_item(state.model, n, one, (), False) for n, one in enumerate(requests) if n not in problems]
    unit = forward_seconds(state.model, items)
    began = time.perf_counter()
    if progress:
        progress("collecting gradients", 0, len(items))
    features = collect_features(edited_model(state), items, _read_maps(state.settings.maps)) if items else []
    going, lost = list(range(len(items))), {}
    while True:
        after = _updated(state, [features[number] for number in going]) if going else state
        fit_seconds = time.perf_counter() - began
        finite = all(bool(jnp.isfinite(kernel).all()) for kernel in after.kernels.values())
        held = says(edited_model(after), items)
        # A batch's updates cannot be told apart: those that do not hold go, and the others are written anew.
        away = [number for number in going if not finite or not (state.settings.keep_failed or held[number])]
        if not away:
            break
        why = "the target does not come out after the update" if finite else "the update is not finite"
        lost |= dict.fromkeys(away, f"{why}; nothing was kept; try another rate, or other maps")
        going = [number for number in going if number not in away]
    results = {number: RequestInfo(names[number], False, "failed", why) for number, why in problems.items()}
    for number, item in enumerate(items):
        reason = lost.get(number, "")
        if not held[number] and not reason:
            reason = (
                "the target does not come out after the update, which was kept (keep_failed); try another rate, or "
                "other maps"
            )
        right = held[number] and not reason
        results[item.position] = RequestInfo(
            names[item.position], held[number], "edited" if right else "failed", reason, steps=1
        )
    seconds = time.perf_counter() - began
    scale = 1 / (max(1, len(names)) * unit) if unit else 0.0
    ordered = tuple(results[position] for position in range(len(names)))
    return after, EditInfo(ordered, seconds, fit_seconds, seconds * scale, fit_seconds * scale, 0)


# --- resuming ---


def save_updates(state: UltraEditState) -> Arrays:
    """The changed maps and the moments as arrays, float32.

    Args:
        state: after some steps.
    """
    kernels = {
        f"kernel-{layer}-{name}": np.asarray(kernel, np.float32) for (layer, name), kernel in state.kernels.items()
    }
    moments = {
        f"{part}-{shape[0]}-{shape[1]}": np.asarray(array)
        for shape, each in state.moments.items()
        for part, array in zip(RunningMoments._fields, each, strict=True)
    }
    return kernels | moments


def restore_updates(state: UltraEditState, arrays: Mapping[str, np.ndarray]) -> UltraEditState:
    """The inverse of `save_updates`.

    Args:
        state: fresh, from ``init`` with the same settings and model.
        arrays: what was saved.
    """
    kernels: dict[Place, Array] = {}
    parts: dict[tuple[int, int], dict[str, Array]] = {}
    for title, array in arrays.items():
        kind, first, second = title.split("-")
        if kind == "kernel":
            kernel = state.model.params["layers"][int(first)]["ffn"][second]["kernel"]
            kernels[int(first), second] = jnp.asarray(array, kernel.dtype)
        else:
            parts.setdefault((int(first), int(second)), {})[kind] = jax.device_put(array)
    return state._replace(kernels=kernels, moments={shape: RunningMoments(**each) for shape, each in parts.items()})


register_editor(
    Method(
        name="ultraedit",
        presets=ULTRAEDIT_PRESETS,
        build=lambda settings, memory, cache, progress: ultraedit(settings, progress=progress),
        model=edited_model,
        save=save_updates,
        restore=restore_updates,
        check=check_ultraedit,
        undo="none",
        stock_checkpoint=True,
    )
)
