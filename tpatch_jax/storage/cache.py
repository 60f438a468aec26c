"""Where what was fetched, converted or computed is kept between runs."""

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """Where fetched and converted models live: `$TPATCH_CACHE`, `$XDG_CACHE_HOME/tpatch_jax` or `~/.cache/tpatch_jax`.

    Returns:
        The folder, which need not exist yet.

    Example:
        >>> cache_folder().name  # doctest: +SKIP
        'tpatch_jax'
    """
    if chosen := os.environ.get("TPATCH_CACHE"):
        return Path(chosen).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "tpatch_jax"
    return Path.home() / ".cache" / "tpatch_jax"
