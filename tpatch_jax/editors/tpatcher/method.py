"""T-Patcher among the editing methods: how an evaluation sees and keeps its edits."""

import jax
import numpy as np

from tpatch_jax.core.layers import LayerPatches, flatten_layers, split_layers
from tpatch_jax.core.patch import Patch, sized
from tpatch_jax.editors.registry import Method, register_editor
from tpatch_jax.editors.tpatcher.editor import site_layer, tpatcher
from tpatch_jax.editors.tpatcher.previous import load_previous, save_previous
from tpatch_jax.editors.tpatcher.settings import PRESETS, TPatcherSettings
from tpatch_jax.editors.tpatcher.state import EditState
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


def _patches(state: EditState) -> LayerPatches | None:
    return state.patches if is_silent(state.model, state.settings) else None


def _model(state: EditState) -> Model:
    # Few sizes, so that a new number of neurons seldom compiles the network anew.
    patches = {layer: sized(patch) for layer, patch in state.patches.items()}
    return attach(state.model, patches, relu=is_silent(state.model, state.settings))


def _save(state: EditState) -> Arrays:
    patch, layer = flatten_layers(state.patches)
    arrays = {name: np.asarray(array) for name, array in patch._asdict().items()}
    return {**arrays, "layer": layer, **save_previous(state.previous)}


def _restore(state: EditState, arrays: Arrays) -> EditState:
    patch = Patch(**{name: jax.device_put(arrays[name]) for name in Patch._fields})
    # Of neurons in the last layer alone the layer was not always told.
    layer = arrays.get("layer", np.full(len(patch.bias), state.model.layer(None)))
    patches = {**state.patches, **split_layers(patch, layer)}
    return state.replace(patches=patches, previous=load_previous(arrays))  # type: ignore[attr-defined]


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
        patches=_patches,
        check=site_layer,
        activation=lambda model, settings: "relu" if is_silent(model, settings) else model.config.activation,
        undo="exact",
        stock_checkpoint=True,
    )
)
