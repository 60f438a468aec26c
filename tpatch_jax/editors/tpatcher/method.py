"""T-Patcher among the editing methods: how an evaluation sees and keeps its edits."""

import jax.numpy as jnp
import numpy as np

from tpatch_jax.core.patch import Patch, sized
from tpatch_jax.editors.registry import Method, register_editor
from tpatch_jax.editors.tpatcher.editor import TPatcherState, site_layer, tpatcher
from tpatch_jax.editors.tpatcher.previous import load_earlier, save_earlier
from tpatch_jax.editors.tpatcher.settings import PRESETS, TPatcherSettings
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach
from tpatch_jax.typing import Arrays

__all__ = ["is_silent"]

SHARP = 64.0
"""From this sharpness on a neuron below its threshold is as good as silent, whatever activates it."""


def is_silent(model: Model, settings: TPatcherSettings) -> bool:
    """Whether a patch is silent below its threshold, so that measuring it with ReLU measures what is merged, too."""
    sharp = settings.fit.recipe == "staged" and settings.fit.sharpness >= SHARP
    return sharp or model.config.activation == "relu"


def _patch(state: TPatcherState) -> Patch | None:
    return state.patch if is_silent(state.model, state.settings) else None


def _model(state: TPatcherState) -> Model:
    # Few sizes, so that a new number of neurons seldom compiles the network anew.
    return attach(state.model, sized(state.patch), relu=is_silent(state.model, state.settings))


def _save(state: TPatcherState) -> Arrays:
    arrays = {name: np.asarray(value) for name, value in state.patch._asdict().items() if value is not None}
    return {**arrays, **save_earlier(state.earlier)}


def _restore(state: TPatcherState, arrays: Arrays) -> TPatcherState:
    patch = Patch(**{name: jnp.asarray(arrays[name]) for name in Patch._fields if name in arrays})
    return state._replace(patch=patch, earlier=load_earlier(arrays))


register_editor(
    Method(
        name="tpatcher",
        presets=PRESETS,
        build=lambda settings, memory, cache, progress: tpatcher(
            settings, memory=memory, cache=cache, progress=progress
        ),
        model=_model,
        save=_save,
        restore=_restore,
        patch=_patch,
        check=site_layer,
        activation=lambda model, settings: "relu" if is_silent(model, settings) else model.config.activation,
    )
)
