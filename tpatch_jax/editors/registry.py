"""Editing methods by name, and what an evaluation needs to know about each besides its `Editor`."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from tpatch_jax.core.patch import Patch, sized
from tpatch_jax.editors.base import Editor, Routing
from tpatch_jax.editors.fine_tuning.editor import check_fine_tuning, fine_tuning, restore_trained, save_trained
from tpatch_jax.editors.fine_tuning.settings import FINE_TUNING_PRESETS, FineTuningSettings
from tpatch_jax.editors.rome.memit import MEMIT_PRESETS, check_memit, memit
from tpatch_jax.editors.rome.rome import R_ROME_PRESETS, ROME_PRESETS, check_rome, rome
from tpatch_jax.editors.rome.state import edited, restore, save
from tpatch_jax.editors.serac.editor import SERAC_PRESETS, SeracSettings, restore_memory, routing, save_memory, serac
from tpatch_jax.editors.serac.networks import read_networks
from tpatch_jax.editors.tpatcher.editor import TPatcherState, site_layer, tpatcher
from tpatch_jax.editors.tpatcher.previous import load_earlier, save_earlier
from tpatch_jax.editors.tpatcher.settings import PRESETS, TPatcherSettings
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.fingerprint import fingerprint
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach
from tpatch_jax.storage.settings import change_each

__all__ = ["METHODS", "Method", "find_method", "is_silent", "method_settings"]

Progress = Callable[[str, int, int], None]
Arrays = dict[str, np.ndarray]


class Method(NamedTuple):
    """An editing method as `tpatch eval` uses it.

    Attributes:
        name: what ``--method`` calls it.
        presets: its settings by name; ``default`` is among them.
        build: ``(settings, memory text file or None, cache folder or None, progress or None) -> Editor``.
        patch: ``state -> Patch``, where edits are neurons that add nothing below their threshold: then only what they
            fire on is run again. ``state -> None`` otherwise: then everything is run again through `Editor.apply`.
        model: ``state -> Model``, the edited model for free generation, or the base model of a ``routing``; ``None``
            where it is no plain model.
        save: ``state -> arrays``, what a run that is interrupted needs besides `Editor.init`.
        restore: ``(fresh state, arrays) -> state``, its inverse.
        routing: ``state -> Routing``, where another model answers what is in the scope of an edit: then only that is
            run, through the other model.
        check: ``(model, settings)``, raises where the method cannot work on a model, before anything is measured.
        learnt: ``(model, settings) -> text``, what tells networks of the method's own apart, on whose contents figures
            depend besides; of most methods empty.
    """

    name: str
    presets: Mapping[str, Any]
    build: Callable[[Any, str | Path | None, Path | None, Progress | None], Editor]
    patch: Callable[[Any], Patch | None]
    model: Callable[[Any], Model] | None
    save: Callable[[Any], Arrays]
    restore: Callable[[Any, Arrays], Any]
    routing: Callable[[Any], Routing] | None = None
    check: Callable[[Model, Any], object] = lambda model, settings: None
    learnt: Callable[[Model, Any], str] = lambda model, settings: ""


SHARP = 64.0
"""From this sharpness on a neuron below its threshold is as good as silent, whatever activates it."""


def is_silent(model: Model, settings: TPatcherSettings) -> bool:
    """Whether a patch is silent below its threshold, so that measuring it with ReLU measures what is merged, too."""
    sharp = settings.fit.recipe == "staged" and settings.fit.sharpness >= SHARP
    return sharp or model.config.activation == "relu"


def _tpatcher_patch(state: TPatcherState) -> Patch | None:
    return state.patch if is_silent(state.model, state.settings) else None


def _tpatcher_model(state: TPatcherState) -> Model:
    # Few sizes, so that a new number of neurons seldom compiles the network anew.
    return attach(state.model, sized(state.patch), relu=is_silent(state.model, state.settings))


def _save_tpatcher(state: TPatcherState) -> Arrays:
    arrays = {name: np.asarray(value) for name, value in state.patch._asdict().items() if value is not None}
    return {**arrays, **save_earlier(state.earlier)}


def _restore_tpatcher(state: TPatcherState, arrays: Arrays) -> TPatcherState:
    patch = Patch(**{name: jnp.asarray(arrays[name]) for name in Patch._fields if name in arrays})
    return state._replace(patch=patch, earlier=load_earlier(arrays))


def _no_patch(state: Any) -> None:
    return None


def _fine_tuning(name: str, presets: Mapping[str, FineTuningSettings]) -> Method:
    return Method(
        name,
        presets,
        lambda settings, memory, cache, progress: fine_tuning(settings, memory=memory, cache=cache, progress=progress),
        _no_patch,
        lambda state: state.edited,
        save_trained,
        restore_trained,
        check=check_fine_tuning,
    )


def _serac_networks(model: Model, settings: SeracSettings) -> str:
    found = read_networks(settings.serac, model)
    return f"{fingerprint(found.scope)} {fingerprint(found.counterfactual)}"


# Variants of fine-tuning are methods of their own as well, so that one report shows them side by side.
_VARIANTS = {f"ft-{name}": {"default": FINE_TUNING_PRESETS[name]} for name in ("kl", "all", "all-kl", "limit")}

METHODS: Mapping[str, Method] = {
    "tpatcher": Method(
        "tpatcher",
        PRESETS,
        lambda settings, memory, cache, progress: tpatcher(settings, memory=memory, cache=cache, progress=progress),
        _tpatcher_patch,
        _tpatcher_model,
        _save_tpatcher,
        _restore_tpatcher,
        check=site_layer,
    ),
    **{name: _fine_tuning(name, presets) for name, presets in {"ft": FINE_TUNING_PRESETS, **_VARIANTS}.items()},
    "rome": Method(
        "rome",
        ROME_PRESETS,
        lambda settings, memory, cache, progress: rome(settings, memory=memory, cache=cache, progress=progress),
        _no_patch,
        edited,
        save,
        restore,
        check=check_rome,
    ),
    "r-rome": Method(
        "r-rome",
        R_ROME_PRESETS,
        lambda settings, memory, cache, progress: rome(settings, memory=memory, cache=cache, progress=progress),
        _no_patch,
        edited,
        save,
        restore,
        check=check_rome,
    ),
    "memit": Method(
        "memit",
        MEMIT_PRESETS,
        lambda settings, memory, cache, progress: memit(settings, memory=memory, cache=cache, progress=progress),
        _no_patch,
        edited,
        save,
        restore,
        check=check_memit,
    ),
    "serac": Method(
        "serac",
        SERAC_PRESETS,
        lambda settings, memory, cache, progress: serac(settings, progress=progress),
        _no_patch,
        lambda state: state.model,
        save_memory,
        restore_memory,
        routing,
        learnt=_serac_networks,
    ),
}
"""The methods by name."""


def find_method(name: str) -> Method:
    """A method by its name.

    Raises:
        TPatchError: there is none of that name; the nearest one is suggested.

    Example:
        >>> find_method("tpatcher").name
        'tpatcher'
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(METHODS)}"
        raise TPatchError(f"there is no method {name!r}; {hint}")
    return METHODS[name]


def method_settings(
    methods: Iterable[str], preset: str = "default", changes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Each method's settings: its preset, with changes.

    Args:
        methods: names from `METHODS`.
        preset: a method without a preset of this name keeps its default.
        changes: new values by name; ``rome.value_steps`` goes to ROME alone, and must where several have such a
            setting.

    Returns:
        Settings by the method's name.

    Raises:
        TPatchError: no method has such a preset or setting, several have the setting, or a value has the wrong type.

    Example:
        >>> method_settings(["tpatcher"], changes={"attempts": 1})["tpatcher"].attempts
        1
    """
    chosen = [find_method(name) for name in methods]
    presets = sorted({name for method in chosen for name in method.presets})
    if chosen and preset not in presets:
        raise TPatchError(f"preset {preset!r} does not exist; choose from {', '.join(presets)}")
    base = {method.name: method.presets.get(preset, method.presets["default"]) for method in chosen}
    return change_each(base, changes or {}, METHODS)
