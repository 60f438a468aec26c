"""Edits timed in a process of its own, by whichever build of this library the process imports.

Run as a file, with ``PYTHONPATH`` naming the build: one JSON object from its input, one to its output. It imports
nothing else of the library than its public names, which older builds have too.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["time_edits"]


def time_edits(
    model: str, dtype: str | None, site: str, calls: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Edit one model in several calls, each from the unedited model, and time each.

    Args:
        model: as for `tpatch_jax.load_model`.
        dtype: of the weights.
        site: ``"last"`` or ``"subject"``.
        calls: of each call the requests, as arguments of `tpatch_jax.EditRequest`.

    Returns:
        ``package`` (where the library was imported from), ``device``, ``cpu_seconds`` and ``seconds`` of each call,
        ``held`` (how many requests of each call hold), and ``peak`` (bytes that the process took at most, ``None``
        where the system does not say).
    """
    import jax

    import tpatch_jax as tp

    loaded = tp.load_model(model, dtype=dtype)
    settings = dataclasses.replace(tp.PRESETS["default"], site=site)
    figures: dict[str, list[float]] = {"cpu_seconds": [], "seconds": [], "held": []}
    for requests in calls:
        given = [tp.EditRequest(**request) for request in requests]
        cpu, began = time.process_time(), time.perf_counter()
        _, info = tp.edit(loaded, given, settings=settings)
        figures["cpu_seconds"].append(time.process_time() - cpu)
        figures["seconds"].append(time.perf_counter() - began)
        figures["held"].append(sum(request.held for request in info.requests))
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {"package": tp.__path__[0], "device": device, **figures, "peak": _peak()}


def _peak() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    print(json.dumps(time_edits(**json.load(sys.stdin))))
