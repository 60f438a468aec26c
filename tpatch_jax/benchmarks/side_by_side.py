"""This build and another one, side by side: what the same edits cost in each, in processes that take turns."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tpatch_jax
from tpatch_jax.benchmarks.edits_to_time import edits_to_time
from tpatch_jax.errors import TPatchError
from tpatch_jax.storage.cache import cache_folder
from tpatch_jax.typing import Progress

__all__ = ["FULL", "QUICK", "Rounds", "check_build", "compare_builds"]

WORKER = "timed_edits.py"
BUILDS = ("this", "other")


class Rounds(NamedTuple):
    """What a comparison measures.

    Attributes:
        edits: of each site, how many edits in one call.
        rounds: how many processes of each build measure each of them.
        warm: how many calls of a process come first and count for nothing, for they compile.
        timed: how many calls are timed after these, each of other edits.
    """

    edits: Mapping[str, tuple[int, ...]]
    rounds: int
    warm: int
    timed: int


FULL = Rounds({"last": (1, 32), "subject": (1, 32)}, rounds=3, warm=2, timed=3)
QUICK = Rounds({"last": (1, 8), "subject": (1, 4)}, rounds=1, warm=1, timed=2)


def check_build(folder: str | Path) -> Path:
    """The folder that Python is to find a build in: one that holds the package ``tpatch_jax``.

    Raises:
        TPatchError: it holds none.
    """
    path = Path(folder).absolute()
    if not (path / "tpatch_jax" / "__init__.py").is_file():
        raise TPatchError(f"{folder} holds no package tpatch_jax; give the folder of a checkout of this library")
    return path


def compare_builds(
    other: str | Path,
    model: str,
    plan: Rounds,
    file: str | Path | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time the same edits in this build and in another one.

    A process at a time, this build's and the other's in turn, so that a slow hour of the machine strikes both. CPU
    seconds are those of the whole process, on however many cores; bind the command to one for figures that compare.

    Args:
        other: the folder of the other build's checkout.
        model: as for `tpatch_jax.load_model`.
        plan: `FULL` or `QUICK`.
        file: see `edits_to_time`.
        dtype: of the weights.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        ``model``, ``device``, and ``edits``: by site and number of edits, ``cpu_seconds_per_edit``,
        ``first_cpu_seconds`` (of a process's first call, per edit), ``held`` (share of the requests) and
        ``peak_memory`` (bytes), each with the medians of ``this`` and ``other`` build and their ``ratio``.

    Raises:
        TPatchError: the folder holds no build, or one of the processes failed.

    Example:
        >>> compare_builds("../older", "smollm2-135m", QUICK)["edits"]["last"]["1"]  # doctest: +SKIP
    """
    folders = {"this": Path(tpatch_jax.__path__[0]).parent, "other": check_build(other)}
    kinds = [(site, count) for site, counts in plan.edits.items() for count in counts]
    measured: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    total, done, device = len(kinds) * plan.rounds * len(BUILDS), 0, ""
    for turn in range(plan.rounds):
        for site, count in kinds:
            calls = list(_calls(plan, count, file))
            for build in BUILDS if turn % 2 == 0 else BUILDS[::-1]:
                if progress:
                    progress("editing", done, total)
                told = _run(folders[build], {"model": model, "dtype": dtype, "site": site, "calls": calls})
                measured.setdefault((site, count, build), []).append(told)
                device, done = told["device"], done + 1
    if progress:
        progress("editing", done, total)
    edits: dict[str, dict[str, Any]] = {}
    for site, count in kinds:
        runs = [[_figures(one, plan.warm, count) for one in measured[site, count, build]] for build in BUILDS]
        edits.setdefault(site, {})[str(count)] = {
            name: _pair(*([one[name] for one in of_build] for of_build in runs)) for name in runs[0][0]
        }
    return {"model": model, "device": device, "edits": edits}


def _calls(plan: Rounds, count: int, file: str | Path | None) -> Iterator[list[dict[str, Any]]]:
    """The requests of each call, no edit twice."""
    calls = plan.warm + plan.timed
    requests = edits_to_time(calls * count, file)
    for first in range(0, calls * count, count):
        part = requests[first : first + count]
        yield [{"prompt": one.prompt, "target": one.target, "subject": one.subject} for one in part]


def _run(folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """What `timed_edits` says in a process that imports the build in a folder."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": str(cache_folder() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    # With -P the worker's own folder, which is this build's, is not where Python looks first.
    command = [sys.executable, "-P", str(Path(__file__).with_name(WORKER))]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise TPatchError(f"editing with the build in {folder} failed: {last}; see that it runs by itself")
    told = json.loads(done.stdout.strip().splitlines()[-1])
    if Path(told["package"]).resolve() != (folder / "tpatch_jax").resolve():
        raise TPatchError(
            f"Python imports tpatch_jax from {told['package']} instead of {folder}; run the command in an environment "
            "where no other build comes first"
        )
    return told


def _figures(told: Mapping[str, Any], warm: int, count: int) -> dict[str, float]:
    """The figures of one process; see `compare_builds`."""
    return {
        "cpu_seconds_per_edit": statistics.median(told["cpu_seconds"][warm:]) / count,
        "first_cpu_seconds": told["cpu_seconds"][0] / count,
        "held": statistics.mean(told["held"][warm:]) / count,
        "peak_memory": told["peak"] or 0,
    }


def _pair(this: list[float], other: list[float]) -> dict[str, Any]:
    """The medians of both builds, and the first over the second."""
    ours, theirs = statistics.median(this), statistics.median(other)
    return {"this": ours, "other": theirs, "ratio": ours / theirs if theirs else None}
