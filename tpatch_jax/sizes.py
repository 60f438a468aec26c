"""Sizes in steps, so that a new number of things seldom needs a new compilation."""

__all__ = ["power_of_two", "round_up"]


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
