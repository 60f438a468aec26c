"""Fine-tuning as an editor: the rival that every editing method is measured against.

Some of the network's parameters are trained on the requests of a step until all of them hold. Nothing is added, so
nothing can be taken out again: the only way back is to keep the arrays from before.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tpatch_jax.core import ffn
from tpatch_jax.editors.base import EditInfo, Editor, EditorFunctions, RequestInfo
from tpatch_jax.editors.fine_tuning.examples import Group, Pool, draw, grouped, read_pool
from tpatch_jax.editors.fine_tuning.settings import FINE_TUNING_PRESETS, FineTuningSettings
from tpatch_jax.editors.fine_tuning.step import ADAM, look, rounded, splice, update
from tpatch_jax.editors.reading import Item, check_requests, read_item
from tpatch_jax.editors.registry import Method, register_editor
from tpatch_jax.editors.repeats import step_once
from tpatch_jax.editors.tpatcher.last_site import forward_seconds
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.model import Model
from tpatch_jax.models.networks import Batch
from tpatch_jax.models.quantising import check_float
from tpatch_jax.requests import EditRequest
from tpatch_jax.typing import Params, Progress

__all__ = ["FineTuningState", "check_fine_tuning", "fine_tuning", "restore_trained", "save_trained"]

_NETWORKS = ("ffn", "experts")
"""What is trained of one layer, by its names in the parameters."""


class FineTuningState(NamedTuple):
    """What an edited model is made of.

    Attributes:
        model: the unedited model.
        edited: the model with what was trained.
        trained: a part of its parameters, float32 whatever the model's type.
        pool: the memory, if KL counts.
    """

    model: Model
    edited: Model
    trained: Params
    pool: Pool | None


def fine_tuning(
    settings: FineTuningSettings = FINE_TUNING_PRESETS["default"],
    *,
    memory: str | Path | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Editor:
    """The editor that trains the network's parameters.

    Minimises ``mean over requests of mean over target tokens of −log p(token) + kl·KL(before || now)`` with Adam, which
    begins anew at each step, until every request of the step comes out or ``passes`` are over. Steps stack: each goes
    on from the parameters that the step before left. There is no undo but the state from before.

    Args:
        settings: its options.
        memory: a text file for KL; by default text is sampled from the model, which only a decoder can.
        cache: folder where texts of the memory are kept between runs.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        The `Editor`; its state is a `FineTuningState`.

    Raises:
        TPatchError: from ``init``, where a setting makes no sense for the model.

    Source: Huang et al. 2023, section 5 (fine-tuning, with KL); Meng et al. 2022, appendix (FT, FT+L).

    Example:
        >>> editor = fine_tuning(FineTuningSettings(scope="all", adam_rate=1e-5))
        >>> state = editor.init(model, jax.random.key(0))  # doctest: +SKIP
        >>> state, info = editor.step(state, [EditRequest("The capital of France is", "Lyon")], key)  # doctest: +SKIP
        >>> state.edited.generate("The capital of France is", 1)  # doctest: +SKIP
        ' Lyon'
    """

    def init(model: Model, rng: Array) -> FineTuningState:
        trained = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), check_fine_tuning(model, settings))
        pool = read_pool(model, memory, cache, progress) if settings.kl else None
        return FineTuningState(model, model, trained, pool)

    def step(state: FineTuningState, requests: Sequence[EditRequest], rng: Array) -> tuple[FineTuningState, EditInfo]:
        return step_once(state.model, requests, lambda given: _step(state, given, rng, settings, progress))

    def apply(state: FineTuningState, batch: Batch) -> Array:
        return state.edited.apply(batch)

    return EditorFunctions(init, step, apply)


def check_fine_tuning(model: Model, settings: FineTuningSettings) -> Params:
    """Make sure that a model can be fine-tuned with these options.

    Args:
        model: the model.
        settings: the options.

    Returns:
        The parameters that are trained, as a part of the model's.

    Raises:
        TPatchError: the model has no such layer, or is too coarse for ``max_change``.
    """
    check_float(model, "fine-tuning")
    first = _part(model, settings.scope)
    if settings.max_change and any(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(first)):
        raise TPatchError(
            f"max_change={settings.max_change:g} is finer than {model.name!r} in {jax.tree.leaves(first)[0].dtype} "
            "can tell; load the model with dtype float32"
        )
    return first


def _part(model: Model, scope: str) -> Params:
    """The part of a model's parameters that is trained; an attached patch stays as it is."""

    def without_patch(layer: Params) -> Params:
        return {name: ffn.detach(entry) if name == "ffn" else entry for name, entry in layer.items()}

    def all_layers(stack: Params) -> Params:
        return {"layers": {index: without_patch(layer) for index, layer in stack["layers"].items()}}

    if scope != "all":
        layer = model.layer(None if scope == "last" else int(scope))
        networks = {name: entry for name, entry in model.params["layers"][layer].items() if name in _NETWORKS}
        return {"layers": {layer: without_patch(networks)}}
    part = all_layers(model.params)
    return {**part, "encoder": all_layers(model.params["encoder"])} if model.config.encoder else part


def _frozen(model: Model, whole_network: bool) -> Params:
    """The parameters that a step reads: few of them where it sees the last feed-forward network alone."""
    if whole_network:
        return model.params
    names = ("embed", "head", "norm", "classifier")
    last = model.layer(None)
    kept = {name: model.params[name] for name in names if name in model.params}
    return {**kept, "layers": {last: model.params["layers"][last]}}


def _look(
    model: Model, trained: Params, frozen: Params, groups: Sequence[Group], count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``l_e`` of each item, whether it holds, and the first of its target's tokens that is wrong."""
    loss, wrong, first = np.zeros(count), np.zeros(count, bool), np.zeros(count, int)
    for group in groups:
        each, right = (
            np.asarray(array)[: len(group.owner)] for array in look(model.config, trained, frozen, group.lesson)
        )
        for number in np.unique(group.owner):
            rows = group.owner == number
            loss[number], wrong[number] = each[rows].mean(), not right[rows].all()
            first[number] = int(np.argmin(right[rows]))
    return loss, ~wrong, first


class _Trained(NamedTuple):
    """Where training ended: the parameters; of each item the loss, whether it holds now and did before, and the first
    token that is wrong; how many updates and seconds it took; KL at the last of them.
    """

    trained: Params
    loss: np.ndarray
    held: np.ndarray
    before: np.ndarray
    first: np.ndarray
    updates: int
    seconds: float
    kl: float | None


def _train(
    state: FineTuningState, items: Sequence[Item], rng: Array, settings: FineTuningSettings, progress: Progress | None
) -> _Trained:
    """Train on the requests until all hold, and to the loss that is asked for."""
    model, pool, whole_network = state.model, state.pool, settings.scope not in ("last", str(state.model.layer(None)))
    frozen = _frozen(model, whole_network)
    groups = grouped(model, items, settings.batch_size, whole_network)
    began = time.perf_counter()
    generator = np.random.default_rng(np.asarray(jax.random.key_data(rng)).ravel().tolist())
    # A step gives its arrays up, and those of the state are still needed.
    trained = jax.tree.map(jnp.copy, state.trained)
    moments, updates, kls = ADAM.init(trained), 0, []
    loss, held, first = _look(model, trained, frozen, groups, len(items))
    before = held
    options = settings.kl, settings.adam_rate, settings.max_change or math.inf
    for done in range(settings.passes):
        low = not settings.loss_enough or bool((loss < settings.loss_enough).all())
        if (held.all() and low) or not np.isfinite(loss).all():
            break
        if progress:
            progress("fine-tuning", done, settings.passes)
        kls = []
        for number in generator.permutation(len(groups)):
            calm = None if pool is None else draw(model, pool, settings.kl_tokens, generator, whole_network)
            trained, moments, losses = update(
                model.config, trained, moments, frozen, groups[number].lesson, calm, *options
            )
            updates += 1
            kls.append(losses.get("kl"))
        loss, held, first = _look(model, trained, frozen, groups, len(items))
    if progress:
        progress("fine-tuning", settings.passes, settings.passes)
    kl = float(np.mean(np.asarray(kls))) if pool is not None and kls else None
    return _Trained(trained, loss, held, before, first, updates, time.perf_counter() - began, kl)


# --- one step ---


def _step(
    state: FineTuningState,
    requests: list[EditRequest],
    rng: Array,
    settings: FineTuningSettings,
    progress: Progress | None,
) -> tuple[FineTuningState, EditInfo]:
    began, model = time.perf_counter(), state.model
    names = [request.name(position) for position, request in enumerate(requests)]
    problems = check_requests(model, requests, False)
    items = [
        read_item(model, position, request, (), False)
        for position, request in enumerate(requests)
        if position not in problems
    ]
    results = {position: RequestInfo(names[position], False, "failed", why) for position, why in problems.items()}
    fit_seconds = 0.0
    if items:
        trained = _train(state, items, rng, settings, progress)
        fit_seconds = trained.seconds
        sound = bool(np.isfinite(trained.loss).all())
        kept = sound and (settings.keep_failed or bool(trained.held.all()))
        if kept and trained.updates:
            edited = model.with_params(splice(model.params, rounded(model.params, trained.trained)))
            state = state._replace(trained=trained.trained, edited=edited)
        for number, item in enumerate(items):
            results[item.position] = _info(names[item.position], item, number, trained, sound, kept, settings)
    seconds = time.perf_counter() - began
    unit = forward_seconds(model, items)
    scale = 1 / (len(names) * unit) if unit else 0.0
    ordered = tuple(results[position] for position in range(len(names)))
    return state, EditInfo(ordered, seconds, fit_seconds, seconds * scale, fit_seconds * scale, 0)


def _info(
    name: str, item: Item, number: int, trained: _Trained, sound: bool, kept: bool, settings: FineTuningSettings
) -> RequestInfo:
    held = bool(trained.held[number]) if kept else bool(trained.before[number])
    losses = {"l_e": float(trained.loss[number])} | ({} if trained.kl is None else {"kl": trained.kl})
    if held:
        status = "already" if trained.before[number] else "edited"
        return RequestInfo(name, True, status, steps=trained.updates, losses=losses)
    after = f"after {trained.updates} updates"
    if not sound:
        reason = (
            f"the loss is not finite {after}, and nothing was kept; lower adam_rate, which is {settings.adam_rate:g}"
        )
    elif trained.held[number]:
        reason = "another request of this step does not hold, and nothing was kept; edit them one by one"
    else:
        token = f"target token {trained.first[number] + 1} of {len(item.target)} still comes out wrong {after}"
        fate = "the change was kept all the same" if kept else "nothing was kept"
        bound = " or max_change" if settings.max_change else ""
        reason = f"{token}, and {fate}; raise passes or adam_rate{bound}"
    return RequestInfo(name, False, "failed", reason, steps=trained.updates, losses=losses)


# --- resuming ---


def save_trained(state: FineTuningState) -> dict[str, np.ndarray]:
    """The trained parameters by their paths: what goes on from where a run stopped.

    Args:
        state: after some steps.

    Returns:
        Arrays by names such as ``"layers/29/ffn/down/kernel"``.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state.trained)
    return {_name(path): np.asarray(leaf) for path, leaf in leaves}


def restore_trained(state: FineTuningState, arrays: Mapping[str, np.ndarray]) -> FineTuningState:
    """The inverse of `save_trained`.

    Args:
        state: fresh, from ``init`` with the same settings and model.
        arrays: what was saved.

    Raises:
        TPatchError: the arrays belong to another scope or model.
    """

    def read(path: Any, leaf: Array) -> Array:
        name = _name(path)
        if name not in arrays or arrays[name].shape != leaf.shape:
            raise TPatchError(f"{name!r} is not among the saved parameters; resume with the same model and scope")
        return jnp.asarray(arrays[name], leaf.dtype)

    trained = jax.tree_util.tree_map_with_path(read, state.trained)
    edited = state.model.with_params(splice(state.model.params, rounded(state.model.params, trained)))
    return state._replace(trained=trained, edited=edited)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


# --- among the methods ---


def _register(name: str, presets: Mapping[str, FineTuningSettings]) -> None:
    register_editor(
        Method(
            name=name,
            presets=presets,
            build=lambda settings, memory, cache, progress: fine_tuning(
                settings, memory=memory, cache=cache, progress=progress
            ),
            model=lambda state: state.edited,
            save=save_trained,
            restore=restore_trained,
            check=check_fine_tuning,
            undo="none",
            stock_checkpoint=True,
        )
    )


_register("ft", FINE_TUNING_PRESETS)
# Variants of fine-tuning are methods as well, so that one report shows them side by side.
for _variant in ("kl", "all", "all-kl", "limit"):
    _register(f"ft-{_variant}", {"default": FINE_TUNING_PRESETS[_variant]})
