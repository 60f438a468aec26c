"""Which values of settings make sense, and the random key of a seed."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpatch_jax.core.arguments import describe
from tpatch_jax.errors import TPatchError
from tpatch_jax.typing import RngKey

__all__ = ["as_key", "check_positive", "check_range", "check_types", "random_key", "text_generator"]


def text_generator(text: str) -> np.random.Generator:
    """A generator of random numbers that a text alone determines.

    What is drawn for a request so does not depend on its place in a list.

    Example:
        >>> int(text_generator("Peru").integers(10)) == int(text_generator("Peru").integers(10))
        True
    """
    return np.random.default_rng(list(text.encode("utf-8", "replace")))


def random_key(seed: int) -> RngKey:
    """The typed random key of a seed.

    Raises:
        TPatchError: the seed is none of ``0 … 2³² - 1``; any other would stand for one of these.
    """
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise TPatchError(f"seed is {describe(seed)}; give a whole number, 0 to {2**32 - 1}")
    if not 0 <= seed < 2**32:
        raise TPatchError(f"seed {seed} is out of range; give 0 to {2**32 - 1}")
    return jax.random.key(seed)


def as_key(rng: Any) -> RngKey:
    """A typed random key that a caller gives.

    Raises:
        TPatchError: it is something else.
    """
    if not isinstance(rng, jax.Array) or not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        raise TPatchError(f"{describe(rng)} is no typed random key; give jax.random.key(0)")
    return rng


def check_types(settings: Any) -> None:
    """Make sure that each setting is of the type of its default, and those within others, too.

    Args:
        settings: a dataclass or named tuple whose fields have defaults.

    Raises:
        TPatchError: one is of another type; it names the first.
    """
    for name, default in _defaults(settings):
        value = getattr(settings, name)
        if dataclasses.is_dataclass(default) or hasattr(default, "_fields"):
            kind = type(default).__name__
            if not isinstance(value, type(default)):
                raise TPatchError(f"setting {name!r} is {describe(value)}; give {kind}(…), or its settings by name")
            check_types(value)
            continue
        # Of what has no default of its own, nothing is known.
        kind, article = next((entry for entry in _KINDS if isinstance(default, entry[0])), (object, ""))
        if not isinstance(value, kind) or (isinstance(value, bool) and kind in (Integral, Real)):
            raise TPatchError(f"setting {name!r} is {describe(value)}; give {article} such as {default!r}")


_KINDS: tuple[tuple[Any, str], ...] = (
    (bool | np.bool_, "true or false"),
    (Integral, "a whole number"),
    (Real, "a number"),
    (str, "a text"),
)


def _defaults(settings: Any) -> Iterator[tuple[str, Any]]:
    """The fields of settings with their defaults."""
    if hasattr(settings, "_field_defaults"):
        yield from settings._field_defaults.items()
        return
    for field in dataclasses.fields(settings):
        if field.default_factory is not dataclasses.MISSING:
            yield field.name, field.default_factory()
        elif field.default is not dataclasses.MISSING:
            yield field.name, field.default


def _number(name: str, value: Any) -> Any:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TPatchError(f"{name} is {describe(value)}; give a number")
    return value


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
        value = _number(name, getattr(settings, name))
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
        value = _number(name, getattr(settings, name))
        if not (math.isfinite(value) and least <= value <= most):
            bounds = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
            raise TPatchError(f"{name} is {value}; give {bounds}")
