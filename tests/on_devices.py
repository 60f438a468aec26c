"""Edits a tiny model on several devices; `test_devices` runs it in processes of their own and compares.

``python on_devices.py FOLDER TEXT OUT DATA MODEL [PROCESS PORT]``: a mesh of DATA times MODEL devices, of one process
or of two.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np

import tpatch_jax as tp
from tpatch_jax import fitting
from tpatch_jax.editors.settings import PRESETS, TPatcherSettings
from tpatch_jax.evaluation.measure import measure

PROMPTS = ("bdkvxw", "cqyrfz", "jgomps", "kcujlq", "xyrgod")
TARGETS = ("ab", "q", "h", "z", "m")
REQUESTS = [tp.EditRequest(*pair) for pair in zip(PROMPTS, TARGETS, strict=True)]
"""Eleven tokens in all, with the spaces before them: eight devices do not divide them."""


def settings() -> TPatcherSettings:
    base = PRESETS["default"]
    fit = dataclasses.replace(base.fit, key_steps=24, value_steps=8, rounds=2, negatives=32, lanes=2)
    return dataclasses.replace(base, site="last", fit=fit, attempts=1)


def main(folder: str, text: str, out: str, data: str, model: str, process: str = "", port: str = "") -> None:
    if process:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process))
    jax.config.update("jax_disable_most_optimizations", True)
    mesh = None if data == "0" else jax.make_mesh((int(data), int(model)), ("data", "model"))
    seen: dict[str, list[int]] = {}
    whole = fitting._many_settle

    def watched(lanes, memory, *rest):
        for name, array in (("lanes", lanes.query), ("rows", memory.query)):
            largest = max(part.data.shape[0] for part in array.addressable_shards) if mesh else array.shape[0]
            seen.setdefault(name, []).extend((largest, array.shape[0]))
        return whole(lanes, memory, *rest)

    fitting._many_settle = watched
    loaded = tp.load_model(folder, mesh=mesh)
    patch, info = tp.edit(loaded, REQUESTS, settings=settings(), memory=text, cache=False)
    merged = tp.merge(loaded, patch)
    quality = measure(loaded, patch, REQUESTS)
    said = merged.generate(REQUESTS[0].prompt, 2)
    tp.save_model(merged, Path(out) / "model")
    tp.save_patches(Path(out) / "patches", loaded, patch, REQUESTS, info)
    if jax.process_index() == 0:
        held = [request.held for request in info.requests]
        found = {"seen": seen, "held": held, "quality": quality, "said": said, "devices": jax.device_count()}
        print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
