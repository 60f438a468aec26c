"""Pictures with labels as records: the edit gives a picture its true label, and rules make others that show the same.

The rules, none of which changes what a picture shows; their draws are made from the picture itself, so that they are
always the same:

- ``moved``: by one or two pixels, five ways;
- ``brightness``: a tenth darker, a tenth brighter;
- ``rotated``: by three degrees, either way;
- ``noise``: normal noise of four grey levels, drawn twice.

Edges are drawn out where a picture is moved or turned. Patches are fitted on other changes of the same kinds
(`tpatch_jax.models.inputs.image_contexts`), never on these.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.record import Probe, Record
from tpatch_jax.images import ImagePrompt, change_image
from tpatch_jax.requests import EditRequest
from tpatch_jax.storage.image_file import named_labels, read_image_part

__all__ = ["RULES", "image_rephrasings", "read_image_records"]

MOVES = ((1, 0), (0, -1), (-2, 0), (0, 2), (2, -2))
"""Down and to the right, in pixels."""

Rule = Callable[[np.ndarray, np.random.Generator], Sequence[np.ndarray]]

RULES: Mapping[str, Rule] = {
    "moved": lambda pixels, rng: [change_image(pixels, down=down, right=right) for down, right in MOVES],
    "brightness": lambda pixels, rng: [change_image(pixels, brightness=factor) for factor in (0.9, 1.1)],
    "rotated": lambda pixels, rng: [change_image(pixels, degrees=degrees) for degrees in (-3.0, 3.0)],
    "noise": lambda pixels, rng: [change_image(pixels, noise=4 * rng.standard_normal(pixels.shape)) for _ in range(2)],
}
"""By name; see above."""


def image_rephrasings(image: ImagePrompt) -> dict[str, tuple[ImagePrompt, ...]]:
    """What the rules make of a picture, by the names of the rules; what comes out as it was is left out.

    Args:
        image: the picture.

    Example:
        >>> made = image_rephrasings(ImagePrompt(np.arange(64, dtype=np.uint8).reshape(8, 8)))
        >>> {rule: len(images) for rule, images in made.items()}
        {'moved': 5, 'brightness': 2, 'rotated': 2, 'noise': 2}
    """
    made = {}
    for name, rule in RULES.items():
        digest = hashlib.sha256(f"{name} {image}".encode()).digest()
        changed = rule(image.pixels, np.random.default_rng(np.frombuffer(digest, np.uint32)))
        prompts = dict.fromkeys(map(ImagePrompt, changed))
        if others := tuple(prompt for prompt in prompts if prompt != image):
            made[name] = others
    return made


def read_image_records(
    path: str | Path, labels: Sequence[str], parts: Sequence[str] = ("stream", "val", "train"), *, rules: bool = True
) -> list[Record]:
    """Read pictures of an ``.npz``: the edit gives each its true label.

    Args:
        path: the file; see `tpatch_jax.storage.image_file.read_image_file`.
        labels: the names of the model's labels, in the order of their numbers.
        parts: which part is read, the first of these that is there.
        rules: whether the rules make probes of their own, ``rephrasing_<rule>``.

    Returns:
        The records; ids are ``<part>-<number from 0>``.

    Raises:
        TPatchError: the file cannot be read, has no such part, or a label that the model lacks.

    Example:
        >>> read_image_records("chests.npz", ("normal", "pneumonia"))[0].request.target  # doctest: +SKIP
        'pneumonia'
    """
    part = read_image_part(path, parts)
    targets = named_labels(part.labels, labels)
    records = []
    for number, (image, target) in enumerate(zip(part.images, targets, strict=True)):
        name = f"{part.name}-{number}"
        if target not in labels:
            raise TPatchError(
                f"{path}, {part.name}_labels {number}: the classifier has no label {target!r}; it has "
                f"{', '.join(labels)}"
            )
        probes: dict[str, tuple[Probe, ...]] = {"reliability": (Probe(image, target),)}
        if rules:
            for rule, images in image_rephrasings(image).items():
                probes[f"rephrasing_{rule}"] = tuple(Probe(other, target) for other in images)
        records.append(Record(name, (EditRequest(image, target, id=name),), probes))
    return records
