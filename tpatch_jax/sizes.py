"""Sizes in steps, so that a new number of things seldom needs a new compilation."""

__all__ = ["in_blocks", "power_of_two", "round_up"]


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
