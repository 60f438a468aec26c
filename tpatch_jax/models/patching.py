"""Patches in a model: beside its FFNs (`attach`) or inside their parameters (`merge`), and out again."""

from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

from tpatch_jax.core import ffn
from tpatch_jax.core.adapters import Adapter
from tpatch_jax.core.arguments import as_count, check_kind, describe
from tpatch_jax.core.devices import automatically
from tpatch_jax.core.layers import LayerPatches, concatenate_layers
from tpatch_jax.core.patch import Patch
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.model import Model, check_loaded
from tpatch_jax.models.shapes import merged_neurons
from tpatch_jax.typing import Params

__all__ = ["attach", "attach_adapters", "by_layer", "check_patches", "detach", "merge", "unmerge"]


def by_layer(model: Model, patches: LayerPatches | Patch) -> dict[int, Patch]:
    """Patches by the layers of a model, ``0 … layers - 1``; a layer without neurons is left out.

    Args:
        model: the model.
        patches: ``{layer: [n, d]}``, where negative layers count from the end; or one patch for the last layer.

    Raises:
        TPatchError: it is no patch, or the model lacks a layer.
    """
    if isinstance(patches, Patch):
        patches = {-1: patches}
    check_patches(patches)
    named = ({model.layer(layer): patch} for layer, patch in patches.items() if patch.key.shape[0])
    return concatenate_layers(named)


def check_patches(patches: Any, *, alike: bool = True) -> None:
    """Make sure that an argument is patches by layer.

    Args:
        patches: the argument.
        alike: whether key, bias and value have to belong together.

    Raises:
        TPatchError: it is something else, a layer is no number, or a patch does not hold arrays that belong together.
    """
    if not isinstance(patches, Mapping) or not all(
        isinstance(layer, Integral) and not isinstance(layer, bool) and isinstance(patch, Patch)
        for layer, patch in patches.items()
    ):
        raise TPatchError(
            f"{describe(patches)} is no patch; give a Patch, or a dict from layers to patches, which is the "
            "first of what `edit` returns"
        )
    for layer, patch in patches.items():
        shapes = [getattr(leaf, "shape", None) for leaf in patch]
        key = shapes[0]
        if None in shapes or key is None or (alike and (len(key) < 2 or shapes != [key, key[:-1], key])):
            shown = ", ".join("none" if shape is None else str(list(shape)) for shape in shapes)
            raise TPatchError(
                f"the patch of layer {layer} has key, bias and value {shown}; give arrays [n, d], [n] and [n, d]"
            )


def _change(model: Model, patches: LayerPatches | Patch, change: Callable[[Params, Patch], Params]) -> Model:
    layers = dict(model.params["layers"])
    for index, patch in by_layer(model, patches).items():
        layers[index] = {**layers[index], "ffn": change(layers[index]["ffn"], patch)}
    return model.with_params({**model.params, "layers": layers})


@automatically
def attach(model: Model, patches: LayerPatches | Patch, *, relu: bool = False) -> Model:
    """Put patches beside the feed-forward networks of a model; nothing inside them changes.

    ``FFN'(q) = FFN(q) + Σ act(q·k + b)·v``. A pure function: it may be called under ``jit``, ``vmap`` and ``grad``.

    Args:
        model: the model; not changed.
        patches: ``{layer: [n, d]}``, or one patch for the last layer.
        relu: activate them with ReLU, so that a silent neuron contributes exactly nothing.

    Returns:
        A model that shares all arrays with the given one.

    Raises:
        TPatchError: a patch has another width, or the model lacks its layer.
    """
    check_loaded(model, "attach(model, patches)")
    check_kind(relu, bool, "attach(model, patches, relu=…)", "True or False")
    return _change(model, patches, lambda params, patch: ffn.attach(params, patch, relu=relu))


@automatically
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


@automatically
def detach(model: Model) -> Model:
    """The model without any attached patch or adapter."""
    check_loaded(model, "detach(model)")
    layers = {index: {**layer, "ffn": ffn.detach(layer["ffn"])} for index, layer in model.params["layers"].items()}
    return model.with_params({**model.params, "layers": layers})


@automatically
def merge(model: Model, patches: LayerPatches | Patch) -> Model:
    """Put patches inside the parameters of a model: an FFN gets ``n`` neurons wider.

    Args:
        model: the model; not changed.
        patches: ``{layer: [n, d]}``, or one patch for the last layer.

    Returns:
        A plain model without anything attached for these neurons.

    Raises:
        TPatchError: a patch has another width, or the model lacks its layer.

    Source: Huang et al. 2023, section 4.1; `tpatch_jax.core.ffn.merge` has the formulas for each kind of network.
    """
    check_loaded(model, "merge(model, patches)")
    return _change(model, patches, ffn.merge)


@automatically
def unmerge(model: Model, neurons: Mapping[int, int] | None = None) -> tuple[Model, dict[int, Patch]]:
    """Take merged neurons out of a model again: the inverse of `merge`, bit for bit for the model.

    The patches come back in the model's precision. If nothing was merged, and the model was read from a folder where
    patches stand in the place of other neurons (`tpatch_jax.replace_unused`), these come back.

    Args:
        model: a model with merged neurons; not changed.
        neurons: how many to take out of which layers; by default all that were merged.

    Returns:
        The model before the merge, and the patches, ``{layer: [n, d]}``.

    Raises:
        TPatchError: nothing was merged, or not that many neurons.
    """
    check_loaded(model, "unmerge(model, neurons)")
    check_kind(neurons, Mapping | None, "unmerge(model, neurons)", "a dict from layers to how many neurons")
    merged = merged_neurons(model.config, model.params)
    counts = merged
    if neurons is not None:
        counts = {
            model.layer(index): as_count(count, f"layer {index}'s number of neurons", 0)
            for index, count in neurons.items()
        }
    if not counts and model.folder is not None:
        from tpatch_jax.models.checkpoints.replacing import REPLACED, read_replaced, restore_replaced

        if (model.folder / REPLACED).is_file():
            replaced = read_replaced(model.folder)
            return restore_replaced(model, replaced), replaced.patches
    if not counts:
        raise TPatchError(f"nothing is merged into {model.name!r}; unmerge takes out what `merge` put in")
    layers, patches = dict(model.params["layers"]), {}
    for index, count in sorted(counts.items()):
        if count > merged.get(index, 0):
            raise TPatchError(
                f"layer {index} of {model.name!r} holds {merged.get(index, 0)} merged neurons, not {count}"
            )
        added = not model.config.ffn_bias and count == merged.get(index)
        network, patches[index] = ffn.unmerge(layers[index]["ffn"], count, added_bias=added)
        layers[index] = {**layers[index], "ffn": network}
    return model.with_params({**model.params, "layers": layers}), patches
