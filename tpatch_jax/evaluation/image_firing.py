"""Which parts of a picture make a neuron fire: each patch is covered in turn, and the neuron asked again."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from tpatch_jax.core.layers import LayerPatches
from tpatch_jax.core.patch import Patch
from tpatch_jax.errors import TPatchError
from tpatch_jax.images import ImagePrompt
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import by_layer

__all__ = ["ImageFiring", "image_firing"]

AT_ONCE = 64


class ImageFiring(NamedTuple):
    """What neurons make of a picture.

    Attributes:
        activation: ``q·k + b`` of each neuron where the label is decided, above 0 where it fires; of a classifier that
            reads the mean of all positions the mean of ``max(0, q·k + b)``.
        effect: how far that falls when a patch is covered, ``[n, rows, columns]``: what makes the neuron fire is large.
    """

    activation: Float[np.ndarray, " n"]
    effect: Float[np.ndarray, "n rows columns"]


def image_firing(model: Model, patches: LayerPatches | Patch, image: ImagePrompt) -> ImageFiring:
    """Cover each patch of a picture with the picture's mean, and see what that does to neurons.

    Args:
        model: an image classifier without the patches.
        patches: ``{layer: [n, d]}``, or one patch for the last layer; each neuron by itself.
        image: the picture.

    Raises:
        TPatchError: the model reads no images, or the picture cannot be read by it.

    Example:
        >>> image_firing(model, patches, tp.read_image("chest.png")).effect.shape  # doctest: +SKIP
        (1, 7, 7)
    """
    read = model.config.image
    if read is None:
        raise TPatchError(f"{model.name!r} reads no images; give an image classifier")
    pixels = np.asarray(model.encode_prompt(image)[: read.pixels], np.int32).reshape(*read.size, read.channels)
    (rows, columns), (height, width) = read.grid, read.patch
    covered = np.repeat(pixels[None], 1 + rows * columns, 0)
    mean = np.rint(pixels.mean((0, 1))).astype(np.int32)
    for number in range(rows * columns):
        down, right = height * (number // columns), width * (number % columns)
        covered[1 + number, down : down + height, right : right + width] = mean
    flat = covered.reshape(len(covered), -1)
    missing = -len(flat) % AT_ONCE
    flat = np.concatenate([flat, np.repeat(flat[:1], missing, 0)])
    layers = by_layer(model, patches)
    values = [_values(model, layer, patch, flat)[: len(covered)] for layer, patch in sorted(layers.items())]
    if not values:
        return ImageFiring(np.zeros(0, np.float32), np.zeros((0, rows, columns), np.float32))
    whole = np.concatenate(values, 1)
    effect = (whole[0] - whole[1:]).T.reshape(-1, rows, columns)
    return ImageFiring(whole[0], effect)


def _values(model: Model, layer: int, patch: Patch, images: np.ndarray) -> np.ndarray:
    """``[images, n]``."""
    key, bias = (np.asarray(array, np.float32) for array in (patch.key, patch.bias))
    values: list[Any] = []
    for first in range(0, len(images), AT_ONCE):
        query = model.trace(jax.device_put(images[first : first + AT_ONCE]), layer).query
        if model.config.pooling == "first":
            values.append(np.asarray(query[:, 0], np.float32) @ key.T + bias)
        else:
            values.append(np.maximum(np.asarray(query, np.float32) @ key.T + bias, 0).mean(1))
    return np.concatenate(values)
