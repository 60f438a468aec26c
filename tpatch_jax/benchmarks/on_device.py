"""Edits on the accelerator that is here, beside what the programs compiled for it say they take at the least."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import jax

from tpatch_jax.benchmarks.compiled_plan import compile_plan, split_weights
from tpatch_jax.benchmarks.edits_to_time import edits_to_time
from tpatch_jax.benchmarks.probe import measure_edits
from tpatch_jax.benchmarks.programs import sites_of
from tpatch_jax.benchmarks.topology import Topology, create_mesh, describe_accelerator
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.checkpoints.folder import read_settings
from tpatch_jax.models.checkpoints.sources import resolve_model
from tpatch_jax.models.families.registry import configure
from tpatch_jax.models.model import Model, load_model
from tpatch_jax.storage.process import prepare_process
from tpatch_jax.typing import Progress

__all__ = ["bench_device"]


def bench_device(
    name: str,
    edits: Sequence[int],
    repeats: int,
    file: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Edit on the accelerator that is here, and compile the same programs for it.

    Args:
        name: of the model, as for `tpatch_jax.load_model`.
        edits: how many in one call.
        repeats: how often each call is timed, after one that is not.
        file: what is edited; see `edits_to_time`.
        dtype: of the weights; ``None`` keeps the checkpoint's.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        ``accelerator`` (``kind``, ``platform``, ``devices``; ``None`` where there is none, and then nothing else but
        ``model``, ``ran``, which is false, and the ``reason``). ``ran``, ``dtype`` and ``mesh``; ``edits`` by site and
        number of edits: ``ms_per_edit``, ``exact``, ``locality_tokens``, ``peak_memory_bytes`` (of the fullest device
        since the process began; ``None`` where it does not say) and ``predicted`` (``ms_per_edit`` and
        ``memory_bytes_per_chip`` of the compiled programs, ``None`` where the device's peaks are not known).

    Raises:
        TPatchError: the model is no decoder, or its weights are INT8.
    """
    described = describe_accelerator()
    if described is None:
        reason = f"JAX finds no accelerator here, only {jax.default_backend()}, so nothing was run"
        return {"model": name, "accelerator": None, "ran": False, "reason": reason}
    prepare_process()
    model = _load(name, dtype, described)
    width = str(jax.tree.leaves(model.params)[0].dtype)
    sites = sites_of(model.config)
    measured: dict[str, dict[str, Any]] = {site: {} for site in sites}
    total, done = len(sites) * len(edits), 0
    # The fewest first: the peak of what comes later is then its own.
    for count in sorted(set(edits)):
        requests = edits_to_time(count, file)
        for site in sites:
            if progress is not None:
                progress("editing", done, total)
            figures = measure_edits(model, site, requests, repeats)
            measured[site][str(count)] = {
                "ms_per_edit": 1000 * statistics.median(figures["seconds"]) / count,
                "exact": figures["exact"],
                "locality_tokens": figures["locality_tokens"],
                "peak_memory_bytes": _peak(described),
                "predicted": None,
            }
            done += 1
    if math.isfinite(described.chip.flops):
        plan = compile_plan(name, model.config, described, dtype=width, edits=sorted(set(edits)), progress=progress)
        for site, by_count in measured.items():
            for count, figures in by_count.items():
                figures["predicted"] = _predicted(plan["plan"][site][count], int(count))
    first = described.devices[0]
    return {
        "model": name,
        "accelerator": {"kind": first.device_kind, "platform": first.platform, "devices": len(described.devices)},
        "ran": True,
        "dtype": width,
        "mesh": dict(_mesh(model.config, described, width).shape),
        "edits": measured,
    }


def _mesh(config: Any, described: Topology, dtype: str) -> jax.sharding.Mesh:
    return create_mesh(described, split_weights(config, described, dtype))


def _load(name: str, dtype: str | None, described: Topology) -> Model:
    """The model on all devices, its weights split if one device has not the room."""
    if dtype == "int8":
        raise TPatchError("--device measures float32 and bfloat16; give one of them as --dtype, or leave it out")
    settings = read_settings(resolve_model(name))
    config = configure(settings)
    if config.architecture != "decoder":
        raise TPatchError(f"{name!r} is an {config.architecture}; the benchmark needs a decoder")
    width = dtype or settings.get("dtype") or settings.get("torch_dtype") or "float32"
    mesh = _mesh(config, described, str(width)) if len(described.devices) > 1 else None
    return load_model(name, dtype=dtype, mesh=mesh)


def _peak(described: Topology) -> int | None:
    told = [device.memory_stats() or {} for device in described.devices]
    peaks = [int(stats["peak_bytes_in_use"]) for stats in told if "peak_bytes_in_use" in stats]
    return max(peaks, default=None)


def _predicted(figures: dict[str, Any], count: int) -> dict[str, Any]:
    seconds = figures["seconds"]
    return {
        "ms_per_edit": None if seconds is None else 1000 * seconds / count,
        "memory_bytes_per_chip": figures["memory_bytes_per_chip"],
    }
