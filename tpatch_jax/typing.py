"""Types that many modules share.

Shapes of arrays are written with jaxtyping, ``Float[Array, "rows hidden"]``: for readers and editors, not checked when
the code runs.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jax import Array
from jaxtyping import Key

__all__ = ["Activation", "Arrays", "CountProgress", "Params", "PathLike", "Progress", "RngKey", "TokenIds"]

Params: TypeAlias = dict[Any, Any]
"""A nested dict of arrays; names are strings, layers are integers."""

Arrays: TypeAlias = dict[str, np.ndarray]
"""Named arrays on the host, as a file holds them."""

TokenIds: TypeAlias = Sequence[int]
"""The token ids of one text."""

RngKey: TypeAlias = Key[Array, ""]
"""One typed random key, as ``jax.random.key`` makes it."""

Activation: TypeAlias = Callable[[Array], Array]
"""An activation function, elementwise."""

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called as work goes on, with what is being done, how much of it is done, and how much there is."""

CountProgress: TypeAlias = Callable[[int], None]
"""Called as work goes on, with how much of it is done."""

PathLike: TypeAlias = str | Path
"""A file or a folder."""
