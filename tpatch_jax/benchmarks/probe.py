"""One measurement of editing in a process of its own, whose peak memory is then that of this work alone.

``python -m tpatch_jax.benchmarks.probe`` reads one JSON object from its input and prints one.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tpatch_jax.benchmarks.edits_to_time import edits_to_time
from tpatch_jax.benchmarks.gauges import compilations, peak_bytes
from tpatch_jax.errors import TPatchError
from tpatch_jax.requests import EditRequest

__all__ = ["measure_edits", "probe"]

WARM = 256
"""Up to so many edits all of them are done once before they are timed; beyond, so many."""


def probe(model: str, site: str, count: int, repeats: int, file: str | None, dtype: str | None) -> dict[str, Any]:
    """Edit a model in another process and measure it.

    Args:
        model: as for `tpatch_jax.load_model`.
        site: ``"last"`` or ``"subject"``.
        count: how many edits in one call.
        repeats: how often, after a warm-up.
        file: see `edits_to_time`.
        dtype: of the weights.

    Returns:
        ``seconds``, ``fit_seconds``, ``forward_equivalents``, ``fit_forward_equivalents`` (each a list), ``peak``
        (bytes), ``patch`` (bytes), ``compilations`` after the warm-up, and the shares ``exact`` and
        ``locality_tokens`` with all edits active.

    Raises:
        TPatchError: the other process failed.
    """
    given = {"model": model, "site": site, "count": count, "repeats": repeats, "file": file, "dtype": dtype}
    # A GPU's memory is shared with this process, so nothing is set aside.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(
        [sys.executable, "-m", "tpatch_jax.benchmarks.probe"],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise TPatchError(f"measuring {count} edits at site={site} failed: {last}; ask for fewer edits")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _measure(model: str, site: str, count: int, repeats: int, file: str | None, dtype: str | None) -> dict[str, Any]:
    from tpatch_jax.models.model import load_model
    from tpatch_jax.storage.process import prepare_process

    prepare_process()
    loaded, requests = load_model(model, dtype=dtype), edits_to_time(count, file)
    with jax.default_matmul_precision("highest"):
        return measure_edits(loaded, site, requests, repeats)


def measure_edits(model: Any, site: str, requests: Sequence[EditRequest], repeats: int) -> dict[str, Any]:
    """Edit a model in this process and measure it.

    Args:
        model: the model.
        site: ``"last"`` or ``"subject"``.
        requests: what is edited, in one call.
        repeats: how often, after a warm-up.

    Returns:
        See `probe`.
    """
    from tpatch_jax.editors.tpatcher.editor import tpatcher
    from tpatch_jax.editors.tpatcher.settings import PRESETS
    from tpatch_jax.evaluation.measure import measure
    from tpatch_jax.storage.cache import cache_folder

    editor = tpatcher(dataclasses.replace(PRESETS["default"], site=site), cache=cache_folder())
    key = jax.random.key(0)
    state = editor.init(model, key)
    editor.step(state, requests[:WARM], key)
    infos, after = [], state
    with compilations() as compiled:
        for _ in range(repeats):
            after, info = editor.step(state, requests, key)
            infos.append(info)
    peak = peak_bytes()
    quality = measure(model, after.patches, requests)
    return {
        "seconds": [info.seconds for info in infos],
        "fit_seconds": [info.fit_seconds for info in infos],
        "forward_equivalents": [info.forward_equivalents for info in infos],
        "fit_forward_equivalents": [info.fit_forward_equivalents for info in infos],
        "peak": peak,
        "patch": sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(after.patches)),
        "compilations": compiled[0],
        "exact": quality["exact"],
        "locality_tokens": quality["locality_tokens"],
    }


if __name__ == "__main__":
    print(json.dumps(_measure(**json.load(sys.stdin))))
