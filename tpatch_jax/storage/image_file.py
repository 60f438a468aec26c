"""Files of many pictures: an ``.npz`` with ``train_images``, ``train_labels``, ``val_images`` and so on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tpatch_jax.errors import TPatchError
from tpatch_jax.images import ImagePrompt, as_image
from tpatch_jax.storage.reading import read_npz

__all__ = ["PARTS", "ImagePart", "is_image_file", "named_labels", "read_image_file", "read_image_part"]

PARTS = ("train", "val", "stream")
"""What the names of arrays begin with; before ``_images`` and ``_labels``."""


class ImagePart(NamedTuple):
    """One part of a file of pictures.

    Attributes:
        name: one of `PARTS`.
        images: the pictures, as prompts.
        labels: of each the number of its label, or the label's name, as a text; empty if the file has none.
    """

    name: str
    images: tuple[ImagePrompt, ...]
    labels: tuple[str, ...]


def is_image_file(path: object) -> bool:
    """Whether a path is that of a file of pictures, by its ending."""
    return isinstance(path, str | Path) and Path(path).suffix.lower() == ".npz"


def read_image_file(path: str | Path) -> dict[str, ImagePart]:
    """Read a file of pictures, whichever parts it has.

    Args:
        path: an ``.npz`` with ``<part>_images [n, height, width]`` or ``[n, height, width, channels]`` of bytes, and
            ``<part>_labels [n]``, numbers or names, of parts among `PARTS`.

    Returns:
        The parts, in the order of `PARTS`.

    Raises:
        TPatchError: it cannot be read, has none of the arrays, or they do not go together; the message names them.

    Example:
        >>> sorted(read_image_file("chests.npz"))  # doctest: +SKIP
        ['stream', 'train', 'val']
    """
    path = Path(path)
    if not path.is_file():
        raise TPatchError(f"{path} {'is no file' if path.exists() else 'does not exist'}; give an .npz of pictures")
    names = {f"{part}_{kind}" for part in PARTS for kind in ("images", "labels")}
    arrays, there = read_npz(path, names.__contains__)
    parts = {part: _part(path, part, arrays) for part in PARTS if f"{part}_images" in arrays}
    if not parts:
        names = ", ".join(f"{part}_images" for part in PARTS)
        raise TPatchError(f"{path} has none of the arrays {names}; it has {there}: name its pictures so")
    return parts


def _part(path: Path, part: str, arrays: Mapping[str, np.ndarray]) -> ImagePart:
    images, labels = arrays[f"{part}_images"], arrays.get(f"{part}_labels")
    shape = list(images.shape)
    if images.ndim not in (3, 4) or not len(images):
        raise TPatchError(
            f"{path}: {part}_images is {shape}; give pictures [n, height, width] or [n, height, width, 3]"
        )
    prompts = tuple(as_image(image, f"{path}, {part}_images {number}") for number, image in enumerate(images))
    if labels is None:
        return ImagePart(part, prompts, ())
    if labels.size != len(images) or labels.shape[0] != len(images):
        raise TPatchError(
            f"{path}: {part}_images has {len(images)} pictures and {part}_labels is {list(labels.shape)}; give one "
            "label for each"
        )
    if labels.dtype.kind not in "iubU":
        raise TPatchError(f"{path}: {part}_labels is {labels.dtype}; give numbers of labels, or their names")
    if labels.dtype.kind == "i" and labels.min() < 0:
        raise TPatchError(f"{path}: {part}_labels has {labels.min()}; labels are counted from 0")
    flat = labels.reshape(-1)
    return ImagePart(part, prompts, tuple(map(str, (flat if labels.dtype.kind == "U" else flat.astype(int)).tolist())))


def read_image_part(path: str | Path, parts: Sequence[str], labels: bool = True) -> ImagePart:
    """The first of some parts that a file of pictures has.

    Args:
        path: the file.
        parts: names among `PARTS`, in order of preference.
        labels: whether it has to have labels.

    Raises:
        TPatchError: as `read_image_file`; or it has none of them, or no labels.
    """
    there = read_image_file(path)
    part = next((there[name] for name in parts if name in there), None)
    if part is None:
        raise TPatchError(
            f"{path} has {', '.join(f'{name}_images' for name in there)} and no {parts[0]}_images; name its pictures so"
        )
    if labels and not part.labels:
        raise TPatchError(f"{path} has {part.name}_images and no {part.name}_labels; give a label for each picture")
    return part


def named_labels(labels: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Labels by their names, where they were numbers of known ones.

    Args:
        labels: as a file of pictures holds them.
        known: the names of labels, in the order of their numbers.

    Example:
        >>> named_labels(("0", "1", "1"), ("normal", "pneumonia"))
        ('normal', 'pneumonia', 'pneumonia')
    """
    if set(labels) <= set(known) or not all(label.isdecimal() and int(label) < len(known) for label in labels):
        return tuple(labels)
    return tuple(known[int(label)] for label in labels)
