"""What is derived from a model's weights: made once, kept with the model, and gone with it."""

from collections.abc import Callable, Hashable
from typing import TypeVar

from tpatch_jax.models.fingerprint import fingerprint
from tpatch_jax.models.model import Model

__all__ = ["derive_once"]

T = TypeVar("T")

MOST = 8
"""Of one kind so many values are kept at most, the latest ones."""


def derive_once(model: Model, kind: str, key: Hashable, make: Callable[[], T]) -> T:
    """What ``make()`` gives, from an earlier call for the same model, kind and key if there was one.

    It is kept with the model itself, so nothing of it outlives the model; with other weights it is made anew.

    Args:
        model: what it is derived from; its fingerprint is taken once.
        kind: what is made.
        key: whatever else it depends on.
        make: makes it; ``None`` is not kept.

    Example:
        >>> derive_once(model, "answer", 1, lambda: 42)  # doctest: +SKIP
        42
    """
    whole = fingerprint(model), key
    kept: dict[Hashable, T] = vars(model).setdefault("_derived", {}).setdefault(kind, {})
    # Put in again, so that the one used longest ago comes first.
    result = kept.pop(whole) if whole in kept else make()
    if result is not None:
        kept[whole] = result
        for old in list(kept)[:-MOST]:
            del kept[old]
    return result
