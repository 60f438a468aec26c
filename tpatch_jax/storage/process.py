"""What a process of the command line does before its work: it keeps compiled programs, and gives memory back."""

import contextlib
import ctypes
from functools import cache
from typing import Any

import jax
from jax import monitoring

from tpatch_jax.storage.cache import cache_folder

__all__ = ["COMPILED", "prepare_process"]

COMPILED = "/jax/core/compile/backend_compile_duration"
"""What JAX calls the event that a program is compiled, or read from the persistent cache."""

MAPPED_FROM, KEPT = -3, -1
"""glibc's names for the size from which memory is taken from the system piece by piece (``M_MMAP_THRESHOLD``), and for
how much of it stays at hand after it was freed (``M_TRIM_THRESHOLD``)."""

LARGE, AT_HAND = 2**24, 2**26
"""What a program needs for its steps is less than this, and there again for the next one: taking it from the system
anew, page by page, took up to a quarter of a forward pass."""


def prepare_process() -> None:
    """Keep compiled programs between runs, and give back memory that is no longer needed."""
    _keep_compilations()
    _return_freed_memory()


def _keep_compilations() -> None:
    """Keep compiled programs between runs of the command: a second run starts at once."""
    folder = cache_folder() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if jax.default_backend() == "cpu":
        # For the sake of what a GPU keeps there the folder's name is part of what a program is asked for by, so that a
        # cache that was moved, or restored elsewhere, would hold nothing.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


@cache
def _return_freed_memory() -> None:
    """Let memory go back to the system when it is freed, as far as the C library can be told to (glibc).

    By itself it keeps what it once had, in pieces, and a process that works on one array after the other grows. Large
    arrays are told apart from the rest, and what compiling a program needed is asked back after each.
    """
    with contextlib.suppress(OSError, AttributeError, ValueError):
        library = ctypes.CDLL(None)
        library.mallopt(MAPPED_FROM, LARGE)
        library.mallopt(KEPT, AT_HAND)
        trim = library.malloc_trim

        def compiled(event: str, duration_secs: float, **_: Any) -> None:
            if event == COMPILED:
                trim(0)

        monitoring.register_event_duration_secs_listener(compiled)
