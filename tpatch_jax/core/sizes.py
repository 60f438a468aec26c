"""Sizes in steps, so that a new number of things seldom needs a new compilation."""

__all__ = ["FEW", "few_or_most", "in_blocks", "in_halves", "in_steps", "pieces", "power_of_two", "round_up"]

FEW = 4
"""The smaller of two sizes."""
PART = 4096
"""So many rows of a large array are copied at a time."""


def power_of_two(count: int, least: int = 1, most: int | None = None) -> int:
    """The power of two that holds ``count``, at least ``least`` and at most ``most``.

    Args:
        count: how many things there are.
        least: the smallest size.
        most: the largest size; the caller then works in parts.

    Example:
        >>> power_of_two(5), power_of_two(5, 16), power_of_two(5, most=4)
        (8, 16, 4)
    """
    size = max(least, 1 << max(0, count - 1).bit_length())
    return size if most is None else min(size, most)


def round_up(count: int, step: int) -> int:
    """The multiple of ``step`` that holds ``count``, at least one ``step``.

    Example:
        >>> round_up(9, 4), round_up(0, 4)
        (12, 4)
    """
    return max(1, -(-count // step)) * step


def in_halves(count: int, least: int) -> int:
    """A power of two that holds ``count``, or three quarters of it if they do.

    Args:
        count: how many things there are.
        least: the smallest size, a power of two.

    Example:
        >>> in_halves(5, 4), in_halves(7, 4), in_halves(2, 4)
        (6, 8, 4)
    """
    size = power_of_two(count, least)
    return 3 * size // 4 if size > least and count <= 3 * size // 4 else size


def in_blocks(count: int, least: int, block: int) -> int:
    """A power of two up to ``block``, then multiples of it: doubling what is large would be felt in memory.

    Args:
        count: how many things there are.
        least: the smallest size.
        block: a power of two.

    Example:
        >>> in_blocks(5, 2, 16), in_blocks(33, 2, 16)
        (8, 48)
    """
    return power_of_two(count, least) if count <= block else round_up(count, block)


def few_or_most(count: int, most: int) -> int:
    """One of two sizes that hold ``count`` things: four, or the most there may be at a time.

    Args:
        count: how many things there are.
        most: the larger size.

    Example:
        >>> few_or_most(3, 16), few_or_most(5, 16), few_or_most(2, 1)
        (4, 16, 1)
    """
    return min(FEW, most) if count <= FEW else most


def in_steps(count: int, most: int) -> list[int]:
    """Sizes that hold ``count`` things together, of two kinds: the most there may be at a time, and four.

    Args:
        count: how many things there are.
        most: the larger size; a part that fills three quarters of it takes it whole.

    Example:
        >>> in_steps(73, 64), in_steps(55, 64), in_steps(3, 64)
        ([64, 4, 4, 4], [64], [4])
    """
    whole, left = divmod(count, most)
    if 4 * left >= 3 * most:
        whole, left = whole + 1, 0
    few = min(FEW, most)
    return [most] * whole + [few] * -(-left // few)


def pieces(count: int) -> list[slice]:
    """Where an array is cut so that a piece of it takes little memory.

    Args:
        count: its rows.

    Example:
        >>> pieces(5000)
        [slice(0, 4096, None), slice(4096, 5000, None)]
    """
    return [slice(first, min(first + PART, count)) for first in range(0, count, PART)]
