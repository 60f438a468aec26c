"""Time, memory and compilations, measured."""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from jax import monitoring

from tpatch_jax.errors import TPatchError
from tpatch_jax.storage.process import COMPILED

__all__ = ["compilations", "median_and_spread", "peak_bytes", "seconds_of"]

_counters: list[list[int]] = []


def _count(event: str, duration_secs: float, **_: Any) -> None:
    if event == COMPILED:
        for counter in _counters:
            counter[0] += 1


@contextmanager
def compilations() -> Iterator[list[int]]:
    """Counts the programs that are compiled inside, those that a persistent cache holds included.

    Yields:
        A list whose one entry is the count so far.

    Example:
        >>> with compilations() as count:
        ...     _ = jax.jit(lambda x: x * 3 + 1)(jax.numpy.ones(7))
        >>> count[0] >= 1
        True
    """
    if not getattr(_count, "listens", False):
        monitoring.register_event_duration_secs_listener(_count)
        _count.listens = True  # type: ignore[attr-defined]
    counter = [0]
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def peak_bytes() -> int:
    """The most memory that was ever in use: of the accelerator if there is one, else of this process.

    Raises:
        TPatchError: there is no accelerator, and the system is not Unix, which alone says this of a process.
    """
    statistics_ = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if statistics_ and "peak_bytes_in_use" in statistics_:
        return int(statistics_["peak_bytes_in_use"])
    try:
        import resource
    except ImportError:
        raise TPatchError("the memory of a process is not known on this system; measure on Linux or macOS") from None
    # Kilobytes, but bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def seconds_of(runs: Mapping[Any, Callable[[], Any]], repeats: int) -> dict[Any, list[float]]:
    """Seconds of several things, each warm and run in turn, so that a slow moment strikes all alike.

    Args:
        runs: what to run, by name; what it returns is waited for.
        repeats: how often.

    Returns:
        The seconds of every repeat, by name.

    Example:
        >>> len(seconds_of({"nothing": lambda: None}, 3)["nothing"])
        3
    """
    for run in runs.values():
        jax.block_until_ready(run())
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - began)
    return seconds


def median_and_spread(values: Sequence[float]) -> dict[str, float]:
    """The median of some figures, and between which two the middle half of them lies.

    Example:
        >>> median_and_spread([1.0, 2.0, 9.0])["median"]
        2.0
    """
    if len(values) == 1:
        return dict.fromkeys(("median", "lower", "upper"), float(values[0]))
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "lower": lower, "upper": upper}
