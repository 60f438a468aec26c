"""Patches of several layers: a plain dict from a layer's number to the `Patch` of that layer.

The numbers are the dict's keys, which JAX keeps apart from the arrays: such a dict can be differentiated, mapped over
and passed into ``jit`` as it is.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from tpatch_jax.core.arguments import describe
from tpatch_jax.core.patch import Patch, concatenate, take
from tpatch_jax.errors import TPatchError

__all__ = [
    "LayerPatches",
    "Neurons",
    "concatenate_layers",
    "count_neurons",
    "flat_positions",
    "flatten_layers",
    "split_layers",
    "take_layers",
]

LayerPatches = Mapping[int, Patch]
"""From a layer's number, negative ones counted from the end, to the patch of that layer, ``[n, d]``."""

Neurons = Mapping[int, Sequence[int]]
"""From a layer's number to positions of neurons in that layer's patch."""


def count_neurons(patches: LayerPatches) -> int:
    """How many neurons the patches of all layers have together.

    Args:
        patches: ``{layer: [n, d]}``.

    Example:
        >>> from tpatch_jax.core.patch import create
        >>> count_neurons({3: create(4, 2), 5: create(4, 1)})
        3
    """
    return sum(patch.key.shape[0] for patch in patches.values())


def flatten_layers(patches: LayerPatches) -> tuple[Patch, Int[np.ndarray, "neurons"]]:
    """All neurons as one patch, lower layers first, and the layer of each: what tables and files hold.

    Args:
        patches: ``{layer: [n, d]}``, at least one layer.

    Returns:
        One patch ``[N, d]``, and layers ``[N]`` int.

    Example:
        >>> from tpatch_jax.core.patch import create
        >>> patch, layer = flatten_layers({5: create(4, 1), 3: create(4, 2)})
        >>> patch.key.shape, layer.tolist()
        ((3, 4), [3, 3, 5])
    """
    layers = sorted(patches)
    counts = [patches[layer].key.shape[0] for layer in layers]
    return concatenate([patches[layer] for layer in layers]), np.repeat(np.asarray(layers, np.int32), counts)


def flat_positions(patches: LayerPatches, neurons: Neurons) -> list[int]:
    """Positions by layer as positions in the one patch that `flatten_layers` makes.

    Args:
        patches: ``{layer: [n, d]}``.
        neurons: positions, by layer; those of a layer without a patch stand behind all others.

    Example:
        >>> from tpatch_jax.core.patch import create
        >>> flat_positions({3: create(4, 2), 5: create(4, 1)}, {5: [0], 3: [1]})
        [1, 2]
    """
    first, positions = 0, []
    for layer in sorted(patches):
        positions += [first + position for position in neurons.get(layer, ())]
        first += patches[layer].key.shape[0]
    return positions + [first] * sum(len(chosen) for layer, chosen in neurons.items() if layer not in patches)


def split_layers(patch: Patch, layer: Int[np.ndarray, "neurons"] | Sequence[int]) -> dict[int, Patch]:
    """The inverse of `flatten_layers`: neurons of one layer stay in their order.

    Args:
        patch: ``[N, d]``.
        layer: the layer of each neuron, ``[N]`` int.

    Returns:
        A patch for each layer that has neurons.

    Example:
        >>> from tpatch_jax.core.patch import create
        >>> {layer: part.key.shape[0] for layer, part in split_layers(create(4, 3), [5, 3, 5]).items()}
        {3: 1, 5: 2}
    """
    layers = np.asarray(layer)
    return {int(number): take(patch, np.flatnonzero(layers == number)) for number in np.unique(layers)}


def take_layers(patches: LayerPatches, neurons: Neurons) -> dict[int, Patch]:
    """Some neurons of some layers.

    Args:
        patches: ``{layer: [n, d]}``.
        neurons: which ones, by layer.

    Example:
        >>> from tpatch_jax.core.patch import create
        >>> take_layers({3: create(4, 2), 5: create(4, 1)}, {3: [1]})[3].key.shape
        (1, 4)
    """
    return {layer: take(patches[layer], chosen) for layer, chosen in neurons.items()}


def concatenate_layers(parts: Iterable[LayerPatches]) -> dict[int, Patch]:
    """All neurons of several patches, layer by layer, in order.

    Args:
        parts: each ``{layer: [n, d]}``.

    Returns:
        A patch for each layer that any of them has.

    Raises:
        TPatchError: the widths differ, or it is no list of such dicts.

    Example:
        >>> from tpatch_jax.core.patch import create
        >>> concatenate_layers([{3: create(4, 2)}, {3: create(4, 1), 5: create(4, 1)}])[3].key.shape
        (3, 4)
    """
    if isinstance(parts, Mapping | Patch | str) or not isinstance(parts, Iterable):
        raise TPatchError(
            f"concatenate_layers takes a list of {{layer: patch}}, not {describe(parts)}; put it into one"
        )
    by_layer: dict[int, list[Patch]] = {}
    for part in parts:
        if not isinstance(part, Mapping) or not all(isinstance(patch, Patch) for patch in part.values()):
            raise TPatchError(
                f"concatenate_layers takes dicts from layers to patches, not {describe(part)}; use concatenate for "
                "patches of one layer"
            )
        for layer, patch in part.items():
            by_layer.setdefault(layer, []).append(patch)
    # One alone is not copied.
    return {
        layer: patches[0] if len(patches) == 1 else concatenate(patches) for layer, patches in sorted(by_layer.items())
    }
