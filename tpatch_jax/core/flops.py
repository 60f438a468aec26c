"""FLOPs of a function, read from its program before it is compiled: the same on every machine, however busy it is."""

import math
from collections.abc import Callable
from typing import Any

import jax

__all__ = ["count_flops"]


def count_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """FLOPs of one call, as XLA's analysis of the program has them: a product of ``[n, k]`` and ``[k, m]`` is 2nkm.

    Nothing is compiled or run. What the result does not depend on is not counted; the body of a loop counts once.

    Args:
        function: what ``jax.jit`` can trace.
        arguments: its arguments: pytrees of arrays, or of `jax.ShapeDtypeStruct` in their place.

    Returns:
        The number, ``nan`` on a backend that does not tell.

    Example:
        >>> import jax.numpy as jnp
        >>> count_flops(lambda a, b: a @ b, jnp.ones((3, 5)), jnp.ones((5, 7)))
        210.0
    """
    costs = jax.jit(function).lower(*arguments).cost_analysis()
    # A program without any says nothing of them.
    return math.nan if costs is None else float(costs.get("flops", 0.0))
