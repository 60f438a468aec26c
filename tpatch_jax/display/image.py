"""A picture, its label before and after, and which of its patches make which neuron fire."""

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from tpatch_jax.core.layers import LayerPatches
from tpatch_jax.core.patch import Patch
from tpatch_jax.display.markup import Child, element, number
from tpatch_jax.display.patch import Owner
from tpatch_jax.display.view import Rows, Shown, compose
from tpatch_jax.evaluation.image_firing import image_firing
from tpatch_jax.images import ImagePrompt, picture_source
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach

__all__ = ["picture", "show_image"]

MOST_NEURONS, MOST_PATCHES = 8, 5
WIDTH = "10em"


def picture(source: str, effect: Sequence[Sequence[float]] | None = None) -> Element:
    """A picture, and over it how far covering each of its patches lets a neuron fall: the stronger, the more colour.

    Args:
        source: of the picture, as `tpatch_jax.images.picture_source` makes it; without one the patches stand alone.
        effect: ``[rows, columns]``.
    """
    parts: list[Child] = []
    if source:
        style = f"display: block; width: {WIDTH}; image-rendering: pixelated"
        parts.append(element("img", src=source, alt="the picture", style=style))
    if effect is not None and len(effect):
        strongest = max(max(map(max, effect)), 1e-30)
        cells = []
        for row, values in enumerate(effect):
            for column, value in enumerate(values):
                shade = 0.65 * max(0.0, value) / strongest
                title = f"row {row}, column {column}: {number(float(value))}"
                cells.append(element("i", title=title, style=f"background: rgba(235, 120, 30, {shade:.2f})"))
        place = "position: absolute; inset: 0" if source else f"width: {WIDTH}; aspect-ratio: 1"
        grid = f"{place}; display: grid; grid-template: repeat({len(effect)}, 1fr) / repeat({len(effect[0])}, 1fr)"
        parts.append(element("div", *cells, style=grid))
    return element("div", *parts, style=f"position: relative; width: {WIDTH}")


def show_image(model: Model, patches: LayerPatches | Patch, image: ImagePrompt, owners: Mapping[int, Owner]) -> Shown:
    """What neurons make of a picture; see `tpatch_jax.evaluation.image_firing`.

    Args:
        model: an image classifier without the patches.
        patches: ``{layer: [n, d]}``, or one patch for the last layer.
        image: the picture.
        owners: the request of each neuron, as far as it is known.

    Raises:
        TPatchError: the model reads no images, or the picture cannot be read by it.
    """
    firing = image_firing(model, patches, image)
    (before,), (after,) = (each.classify([image]) for each in (model, attach(model, patches, relu=True)))
    neurons = [n for n in np.argsort(-firing.activation).tolist() if firing.activation[n] > 0]
    title = f"{image.source or image}: {before} before, {after} with the patch"
    notes = [f"{len(neurons):,} of {len(firing.activation):,} neurons fire; activations are q·k + b."]
    if neurons:
        notes.append(
            "Beside each neuron the patches of the picture that make it fire: so far its activation falls when the "
            "patch is covered with the picture's mean."
        )
    rows, pictures, source = [], [], picture_source(image)
    for neuron in neurons[:MOST_NEURONS]:
        effect = firing.effect[neuron]
        told = [_patch(effect, int(place)) for place in np.argsort(-effect, axis=None)[:MOST_PATCHES]]
        owner = owners.get(neuron, Owner("", "", ""))
        row = [str(neuron), number(float(firing.activation[neuron])), "; ".join(told)]
        rows.append([*row, owner.id, owner.target] if owners else row)
        caption = element("figcaption", f"neuron {neuron}", class_="faint")
        pictures.append(element("figure", picture(source, effect.tolist()), caption, style="margin: 0"))
    shown: list[Any] = pictures or [picture(source)]
    columns = ["neuron", "activation", "strongest patches", *(["request", "target"] if owners else [])]
    strip = element("div", *shown, style="display: flex; flex-wrap: wrap; gap: 1em")
    return compose(title, notes, [Rows(columns, rows, ("neuron", "activation"))], [strip])


def _patch(effect: np.ndarray, place: int) -> str:
    row, column = divmod(place, effect.shape[1])
    return f"row {row}, column {column}: {number(float(effect[row, column]))}"
