"""Edits a tiny model on several devices; `test_devices` runs it in processes of their own and compares.

``python on_devices.py FOLDER TEXT OUT MESH… [PROCESS:PORT]``: a mesh is ``alone`` for one device, or ``8x1`` for eight
devices along "data" and one along "model"; the last argument makes it one of two processes.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial

import tpatch_jax as tp
from tpatch_jax.core import ffn
from tpatch_jax.core import fit as fitting
from tpatch_jax.core import lanes as stepping
from tpatch_jax.core.devices import automatic, host, shard_rows
from tpatch_jax.core.fit import FitProblem, FitSettings
from tpatch_jax.core.recipes.staged import Staged
from tpatch_jax.core.values import KeptRows, TargetRows, ValueTrainingSettings, train_values
from tpatch_jax.editors.tpatcher.settings import PRESETS, TPatcherSettings
from tpatch_jax.evaluation.measure import measure
from tpatch_jax.models.rows import tokens_array

PROMPTS = ("bdkvxw", "cqyrfz", "jgomps", "kcujlq", "xyrgod")
TARGETS = ("ab", "q", "h", "z", "m")
REQUESTS = [tp.EditRequest(*pair) for pair in zip(PROMPTS, TARGETS, strict=True)]
"""Eleven tokens in all, with the spaces before them: eight devices do not divide them."""


def settings() -> TPatcherSettings:
    base = PRESETS["default"]
    fit = dataclasses.replace(base.fit, key_steps=24, value_steps=8, rounds=2, negatives=32, lanes=2)
    return dataclasses.replace(base, site="last", fit=fit, attempts=1)


def edit(folder: str, text: str, out: Path, shape: str) -> dict[str, Any]:
    """Load, edit, measure, merge and save on one mesh; what the devices held is written down."""
    mesh = None
    if shape != "alone":
        data, model = map(int, shape.split("x"))
        mesh = jax.make_mesh((data, model), ("data", "model"))
    seen: dict[str, list[int]] = {"lanes": [], "rows": []}
    whole = fitting.settle_many

    def watched(lanes: Any, memory: Any, *rest: Any) -> Any:
        for name, array in (("lanes", lanes.query), ("rows", memory.query)):
            parts = [part.data for part in array.addressable_shards] if mesh else [array]
            largest = max(part.shape[0] for part in parts)
            seen[name].extend((largest, array.shape[0]))
        return whole(lanes, memory, *rest)

    fitting.settle_many = watched  # pyright: ignore[reportAttributeAccessIssue]
    try:
        loaded = tp.load_model(folder, mesh=mesh)
        patches, info = tp.edit(loaded, REQUESTS, settings=settings(), memory=text, cache=False)
    finally:
        fitting.settle_many = whole
    tp.save_patches(out / shape / "patches", loaded, patches, REQUESTS, info)
    tp.save_model(tp.merge(loaded, patches), out / shape / "model")
    exact = measure(loaded, patches, REQUESTS)["exact"]
    held = [request.held for request in info.requests]
    return {"seen": seen, "held": held, "exact": exact, "values": values(mesh), "improved": improved(mesh)}


def exchanges(text: str) -> list[str]:
    """Between which devices a compiled program sends something."""
    return re.findall(r"(?:replica_groups|source_target_pairs)=(\S+?),? ", text)


def said(head: jax.Array, known: jax.Array, added: jax.Array) -> jax.Array:
    """What a network that is one matrix says."""
    return jax.nn.log_softmax((known + added) @ head)


def values(mesh: Mesh | None) -> dict[str, Any]:
    """Sixteen values trained through a matrix: what they are, their steps, and which devices talked to which."""
    rng, lanes = np.random.default_rng(0), 16
    known = rng.normal(size=(lanes, 3, 8)).astype(np.float32)
    head = jnp.asarray(2 * np.eye(8) + 0.2, jnp.float32)
    wanted = np.repeat(rng.integers(0, 8, (lanes, 1, 1)), 2, 1).astype(np.int32)
    activity = rng.uniform(0.5, 1, (lanes, 2)).astype(np.float32)
    targets = TargetRows(jnp.asarray(activity), jnp.asarray(wanted), jnp.full((lanes, 2, 1), 0.5))
    kept = KeptRows(jnp.asarray(0.1 * activity[:, :1]), said(head, jnp.asarray(known[:, 2:]), jnp.zeros(())))
    if mesh is not None:
        mesh = automatic(mesh)
        head = jax.device_put(head, NamedSharding(mesh, PartitionSpec(None, "model")))
    settings = ValueTrainingSettings(steps=60, longest=8.0, enough=0.2, farthest=0.03)
    groups: set[str] = set()
    shapes: list[list[int]] = []
    whole = stepping.advance_lanes

    def watched(*given: Any) -> Any:
        compiled = whole.lower(*given).compile()
        groups.update(exchanges(compiled.as_text()))
        count = given[1].ended.shape[0]
        shapes.append([count, max(part.data.shape[0] for part in given[2].known.addressable_shards)])
        # The number of steps and the mesh are static.
        return compiled(*given[:4])

    stepping.advance_lanes = watched  # pyright: ignore[reportAttributeAccessIssue]
    try:
        given = jnp.asarray(known), targets, kept, Partial(said, head), jnp.ones(lanes), settings
        trained, info = train_values(*given, jnp.zeros((lanes, 8)), mesh)
    finally:
        stepping.advance_lanes = whole
    return {
        "values": trained.tolist(), "steps": info.steps.tolist(), "loss": info.loss.tolist(),
        "closeness": info.closeness.tolist(), "groups": sorted(groups), "shapes": shapes,
    }  # fmt: skip


def logits(head: jax.Array, context: jax.Array, output: jax.Array) -> jax.Array:
    """The rest of a network that is one matrix."""
    return (context + output) @ head


def improved(mesh: Mesh | None) -> dict[str, Any]:
    """Sixteen values of the last layer improved: what they are, their steps, and which devices talked to which."""
    rng, lanes = np.random.default_rng(0), 16
    context, query = (rng.normal(size=(lanes, 2, 8)).astype(np.float32) for _ in range(2))
    target, zeros = rng.integers(0, 8, lanes).astype(np.int32), np.zeros((lanes, 8), np.float32)
    head = jnp.asarray(2 * np.eye(8) + 0.2, jnp.float32)
    problem = FitProblem(query, 0 * query, 0 * query, context, target, zeros, np.full(lanes, 2.0, np.float32))
    ones = np.ones(lanes, np.float32)
    settled = Staged(query.mean(1), ones, zeros, ones < 0, 0 * target, ones, {})
    if mesh is not None:
        mesh = automatic(mesh)
        head = jax.device_put(head, NamedSharding(mesh, PartitionSpec(None, "model")))
    given = *shard_rows((settled, problem), mesh), Partial(logits, head)
    compiled = fitting.improve_many.lower(*given, FitSettings(value_steps=24), jax.nn.relu, mesh).compile()
    after = jax.tree.map(host, compiled(*given))
    groups = sorted(set(exchanges(compiled.as_text())))
    return {"values": after.value.tolist(), "steps": after.steps.tolist(), "groups": groups}


def axes(folder: str, saved: Path) -> dict[str, float]:
    """How far logits with attached patches are from those on one device, by axis types and who placed the weights."""
    one = tp.load_model(folder)
    patches = tp.load_patches(saved, one)
    tokens = tokens_array([[number + 5, 6, 7, 8] for number in range(8)], 8)
    wanted, found = np.asarray(tp.attach(one, patches).apply(tokens)), {}
    network = ffn.attach(one.params["layers"][2]["ffn"], patches[2])
    query = one.trace(tokens).query
    out = np.asarray(ffn.apply(network, query, one.config.activation))
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
        rows, everywhere = (NamedSharding(mesh, PartitionSpec(*names)) for names in (("data",), ()))
        columns, lines = (NamedSharding(mesh, PartitionSpec(*names)) for names in ((None, "model"), ("model", None)))
        with jax.set_mesh(mesh):
            batch = jax.device_put(tokens, rows)
            models = {
                "loaded": tp.load_model(folder, mesh=mesh),
                "own": one.with_params(jax.device_put(one.params, everywhere)),
            }
            for name, model in models.items():
                logits = tp.attach(model, patches).apply(batch)
                assert logits.sharding.mesh.axis_types == mesh.axis_types
                found[f"{kind.name} {name}"] = float(np.abs(np.asarray(logits) - wanted).max())
            split = jax.device_put(network, everywhere)
            for part, place in (("gate", columns), ("up", columns), ("down", lines)):
                split[part]["kernel"] = jax.device_put(split[part]["kernel"], place)
            run = jax.jit(lambda network, query: ffn.apply(network, query, one.config.activation))
            found[f"{kind.name} arrays"] = float(
                np.abs(np.asarray(run(split, jax.device_put(query, rows))) - out).max()
            )
    return found


def main(folder: str, text: str, out: str, *shapes: str) -> None:
    if ":" in shapes[-1]:
        *shapes, process = shapes
        number, port = process.split(":")
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(number))
    jax.config.update("jax_disable_most_optimizations", True)
    found: dict[str, Any] = {shape: edit(folder, text, Path(out), shape) for shape in shapes}
    if shapes[0] == "alone":
        found["axes"] = axes(folder, Path(out) / "alone" / "patches")
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
