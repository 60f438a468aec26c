"""Patches in a model: beside its FFNs (`attach`) or inside their parameters (`merge`), and out again."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from tpatch_jax.core import ffn
from tpatch_jax.core.adapters import Adapter
from tpatch_jax.core.patch import Patch, concatenate, take
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.model import Model
from tpatch_jax.models.shapes import merged_neurons

__all__ = ["attach", "attach_adapters", "detach", "merge", "unmerge"]


def _by_layer(model: Model, patch: Patch) -> dict[int, Patch]:
    """A patch split by the layers that its neurons name, the last layer when they name none."""
    if patch.layer is None:
        return {model.layer(None): patch}
    layers = np.asarray(patch.layer)
    found = {model.layer(int(layer)): take(patch, np.flatnonzero(layers == layer)) for layer in np.unique(layers)}
    return {layer: part._replace(layer=None) for layer, part in found.items()}


def _change(model: Model, patch: Patch, change: Any) -> Model:
    if not isinstance(patch, Patch):
        raise TPatchError(f"a {type(patch).__name__} is no patch; of what `edit` returns the first is the patch")
    layers = dict(model.params["layers"])
    for index, part in _by_layer(model, patch).items():
        layers[index] = {**layers[index], "ffn": change(layers[index]["ffn"], part)}
    return model.with_params({**model.params, "layers": layers})


def attach(model: Model, patch: Patch, *, relu: bool = False) -> Model:
    """Put a patch beside the feed-forward networks of a model; nothing inside them changes.

    Args:
        model: the model; not changed.
        patch: its neurons, ``[n, d]``; each goes to the layer that it names, or to the last.
        relu: activate them with ReLU, so that a silent neuron contributes exactly nothing.

    Returns:
        A model that shares all arrays with the given one.

    Raises:
        TPatchError: the patch has another width, or names a layer that the model lacks.
    """
    return _change(model, patch, lambda params, part: ffn.attach(params, part, relu=relu))


def attach_adapters(model: Model, adapters: Mapping[int, Adapter]) -> Model:
    """Put adapters beside the feed-forward networks of a model; nothing inside them changes.

    Args:
        model: the model; not changed.
        adapters: the adapter of each layer; one that a layer has already makes room for it.

    Returns:
        A model that shares all arrays with the given one.

    Raises:
        TPatchError: the model lacks a layer, or one of them is no adapter.
    """
    layers = dict(model.params["layers"])
    for index, adapter in adapters.items():
        layer = model.layer(index)
        layers[layer] = {**layers[layer], "ffn": ffn.attach_adapter(layers[layer]["ffn"], adapter)}
    return model.with_params({**model.params, "layers": layers})


def detach(model: Model) -> Model:
    """The model without any attached patch or adapter."""
    layers = {index: {**layer, "ffn": ffn.detach(layer["ffn"])} for index, layer in model.params["layers"].items()}
    return model.with_params({**model.params, "layers": layers})


def merge(model: Model, patch: Patch) -> Model:
    """Put a patch inside the parameters of a model: its FFN gets ``n`` neurons wider.

    Args:
        model: the model; not changed.
        patch: its neurons, ``[n, d]``; each goes to the layer that it names, or to the last.

    Returns:
        A plain model without anything attached for these neurons.

    Raises:
        TPatchError: the patch has another width, or names a layer that the model lacks.

    Source: Huang et al. 2023, section 4.1; `tpatch_jax.core.ffn.merge` has the formulas for each kind of network.
    """
    return _change(model, patch, ffn.merge)


def unmerge(model: Model, neurons: Mapping[int, int] | None = None) -> tuple[Model, Patch]:
    """Take merged neurons out of a model again: the inverse of `merge`, bit for bit for the model.

    The patch comes back in the model's precision.

    Args:
        model: a model with merged neurons; not changed.
        neurons: how many to take out of which layers; by default all that were merged.

    Returns:
        The model before the merge, and the patch, whose neurons name their layers.

    Raises:
        TPatchError: nothing was merged, or not that many neurons.
    """
    merged = merged_neurons(model.config, model.params)
    neurons = merged if neurons is None else {model.layer(index): count for index, count in neurons.items()}
    if not neurons:
        raise TPatchError(f"nothing is merged into {model.name!r}; unmerge takes out what `merge` put in")
    layers, patches = dict(model.params["layers"]), []
    for index, count in sorted(neurons.items()):
        if count > merged.get(index, 0):
            raise TPatchError(
                f"layer {index} of {model.name!r} holds {merged.get(index, 0)} merged neurons, not {count}"
            )
        added = not model.config.ffn_bias and count == merged.get(index)
        network, patch = ffn.unmerge(layers[index]["ffn"], count, added_bias=added)
        layers[index] = {**layers[index], "ffn": network}
        patches.append(patch._replace(layer=jnp.full(count, index, jnp.int32)))
    return model.with_params({**model.params, "layers": layers}), concatenate(patches)
