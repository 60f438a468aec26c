"""Short texts that take long to work out and depend on little: worked out once, then kept in the cache."""

import hashlib
from collections.abc import Callable
from contextlib import suppress

from tpatch_jax.storage.cache import cache_folder
from tpatch_jax.storage.files import write_text

__all__ = ["keep_text"]


def keep_text(kind: str, mark: str, make: Callable[[], str], valid: Callable[[str], bool]) -> str:
    """What ``make()`` gives, from an earlier process of the same kind and mark if there was one.

    Args:
        kind: the folder of the cache.
        mark: all that the text depends on.
        make: makes it.
        valid: whether a text that was kept is whole; one that is not is made anew.

    Example:
        >>> keep_text("answers", "6 times 7", lambda: "42", str.isdigit)  # doctest: +SKIP
        '42'
    """
    path = cache_folder() / kind / f"{hashlib.sha256(mark.encode()).hexdigest()[:32]}.txt"
    # A cache that can be neither read nor written costs time, not correctness.
    with suppress(OSError, UnicodeDecodeError):
        text = path.read_text("utf-8")
        if valid(text):
            return text
    text = make()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return text
