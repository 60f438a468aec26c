"""Which values of settings make sense, and the random key of a seed."""

import math
from collections.abc import Sequence
from typing import Any

import jax

from tpatch_jax.errors import TPatchError
from tpatch_jax.typing import RngKey

__all__ = ["check_positive", "check_range", "random_key"]


def random_key(seed: int) -> RngKey:
    """The typed random key of a seed.

    Raises:
        TPatchError: the seed is none of ``0 … 2³² - 1``; any other would stand for one of these.
    """
    if not 0 <= seed < 2**32:
        raise TPatchError(f"seed {seed} is out of range; give 0 to {2**32 - 1}")
    return jax.random.key(seed)


def check_positive(settings: Any, names: Sequence[str], *, bounded: bool = True) -> None:
    """Make sure that some settings are positive.

    Args:
        settings: a dataclass or named tuple of numbers.
        names: which of its fields.
        bounded: whether infinity makes no sense.

    Raises:
        TPatchError: one is not; it names the first.
    """
    for name in names:
        value = getattr(settings, name)
        if not value > 0 or (bounded and value == math.inf):
            raise TPatchError(f"{name} is {value}; give a positive number")


def check_range(settings: Any, names: Sequence[str], least: float, most: float = math.inf) -> None:
    """Make sure that some settings are finite and within bounds.

    Args:
        settings: a dataclass or named tuple of numbers.
        names: which of its fields.
        least: the least that makes sense.
        most: the most that does.

    Raises:
        TPatchError: one is not; it names the first.
    """
    for name in names:
        value = getattr(settings, name)
        if not (math.isfinite(value) and least <= value <= most):
            bounds = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
            raise TPatchError(f"{name} is {value}; give {bounds}")
