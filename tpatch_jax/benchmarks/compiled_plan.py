"""What editing a large network would cost on TPUs that are not here: its programs, compiled for them by their compiler.

Compiled, not run. Memory is the compiler's count. Time is a roofline: the longest of what a program's products, its
traffic with memory and its traffic with other chips take at the chips' published peaks. What the host does between
programs is not in it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from tpatch_jax.benchmarks.other_programs import other_programs
from tpatch_jax.benchmarks.program_costs import ProgramCosts, program_costs
from tpatch_jax.benchmarks.programs import Places, Program, edit_programs, sites_of
from tpatch_jax.benchmarks.topology import Chip, Compiled, Topology, compile_lowered, create_mesh, describe_topology
from tpatch_jax.core.devices import DATA_AXIS
from tpatch_jax.editors.tpatcher.settings import TPatcherSettings
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.shapes import parameter_shapes
from tpatch_jax.models.sharding import MODEL_AXIS
from tpatch_jax.typing import Progress

__all__ = ["EDITS", "compile_plan", "compile_programs", "list_programs", "roofline", "split_weights"]

EDITS = (1, 100, 10_000)
"""How many edits in one call are planned for, unless others are asked for."""

SHARE = 0.4
"""So much of a chip's memory the weights may take, or more chips share them."""


def split_weights(config: NetworkConfig, topology: Topology, dtype: str) -> int:
    """Over how many devices weights are split: the fewest on which they leave room for all else.

    Args:
        config: the network's description.
        topology: the devices.
        dtype: of the weights.
    """
    size = sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(config))) * jax.numpy.dtype(dtype).itemsize
    devices, parts = len(topology.devices), 1
    while size / parts > SHARE * topology.chip.memory and devices % (2 * parts) == 0:
        parts *= 2
    return parts


def _bytes_by_array(tree: Any) -> dict[int, int]:
    """The bytes of each array on each device, by which array it is."""
    return {
        id(leaf): int(leaf.dtype.itemsize * _size(leaf.sharding.shard_shape(leaf.shape)))
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.ShapeDtypeStruct)
    }


def _size(shape: Sequence[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def roofline(costs: ProgramCosts, chip: Chip) -> tuple[float, str]:
    """The seconds that a program takes at the least, and what bounds it: compute, memory, or interconnect.

    Args:
        costs: of one run, on each device.
        chip: its published peaks.

    Example:
        >>> roofline(ProgramCosts(flops=2e12, passes=2e12, bytes=1e9), Chip(1e12, 1e12, 1e9, 1e9))
        (2.0, 'compute')
    """
    sides = {
        "compute": costs.passes / chip.flops,
        "memory": costs.bytes / chip.bandwidth,
        "interconnect": costs.collective_bytes / chip.interconnect,
    }
    bound = max(sides, key=lambda side: sides[side])
    return sides[bound], bound


def compile_programs(
    programs: Sequence[Program],
    params: Any,
    topology: Topology,
    progress: Progress | None = None,
    known: dict[Any, Compiled | str] | None = None,
) -> list[dict[str, Any]]:
    """Compile programs and say what each costs.

    Args:
        programs: the programs.
        params: the network's parameters, which lie in memory whether or not a program reads them.
        topology: the devices.
        progress: called with what is being done, how much is done, and how much there is.
        known: programs that were compiled already, to which these are added.

    Returns:
        For each program ``name``, ``topology``, whether it ``compiled`` (else ``error``), ``memory_bytes_per_chip``,
        all weights included, and whether that ``fits``; of one run on one device ``flops``, ``bytes``,
        ``collective_bytes``, ``collective_bytes_over`` (the same by the axes of the mesh) and ``collectives``; the
        roofline ``seconds`` and what they are ``bound`` by; ``compile_seconds`` of the processor.
    """
    known = {} if known is None else known
    weights = _bytes_by_array(params)
    rows = []
    for number, program in enumerate(programs):
        if progress is not None:
            progress("compiling", number, len(programs))
        rows.append(_row(program, weights, topology, known))
    return rows


def _row(
    program: Program, weights: Mapping[int, int], topology: Topology, known: dict[Any, Compiled | str]
) -> dict[str, Any]:
    leaves, structure = jax.tree.flatten((program.args, dict(program.kwargs)))
    key = program.function, tuple(leaves), structure
    if new := key not in known:
        try:
            known[key] = compile_lowered(program.function, *program.args, **program.kwargs)
        except Exception as error:  # whatever the compiler says is the answer
            known[key] = str(error).strip() or type(error).__name__
    compiled = known[key]
    row = {"name": program.name, "topology": topology.name, "compiled": not isinstance(compiled, str)}
    if isinstance(compiled, str):
        numbers = ("memory_bytes_per_chip", "flops", "bytes", "seconds", "collective_bytes", "compile_seconds")
        return {**row, "error": compiled.splitlines()[0][:400], "fits": False, "bound": None} | dict.fromkeys(numbers)
    costs = program_costs(compiled.text, program.trips, _mesh_of(leaves))
    seconds, bound = roofline(costs, topology.chip)
    given = {id(leaf) for leaf in leaves}
    beside = {**weights, **_bytes_by_array(program.resident)}
    resident = sum(size for array, size in beside.items() if array not in given)
    memory = compiled.arguments + compiled.results + compiled.temporary + resident
    return {
        **row,
        "memory_bytes_per_chip": memory,
        "temporary_bytes_per_chip": compiled.temporary,
        "fits": memory <= topology.chip.memory,
        "flops": costs.flops,
        "bytes": costs.bytes,
        "seconds": seconds,
        "bound": bound,
        "collective_bytes": costs.collective_bytes,
        "collectives": dict(costs.collectives),
        "collective_bytes_over": dict(costs.over),
        "compile_seconds": compiled.seconds if new else 0.0,
    }


def _mesh_of(leaves: Sequence[Any]) -> Mapping[str, int]:
    """The axes of the mesh on which a program's arguments lie, with their sizes."""
    places = (getattr(leaf, "sharding", None) for leaf in leaves)
    return next((dict(place.mesh.shape) for place in places if isinstance(place, NamedSharding)), {})


def list_programs(config: NetworkConfig, edits: int = 100, dtype: str = "bfloat16") -> list[dict[str, Any]]:
    """Every program that edits of a network run, other methods, generation and evaluation among them; none is compiled.

    Args:
        config: the network's description.
        edits: how many in one call.
        dtype: of its weights.

    Returns:
        For each program its ``name``, and how often it ``runs`` at each site in that call: nowhere, if it is one that
        runs once for a model, or of another method.

    Example:
        >>> from tpatch_jax.benchmarks.network_shapes import network_shape
        >>> names = [program["name"] for program in list_programs(network_shape("SmolLM2-135M")[1])]
        >>> "values: steps" in names, "ROME: solve" in names
        (True, True)
    """
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), (DATA_AXIS, MODEL_AXIS))
    places = Places(config, mesh, dtype)
    programs = [*edit_programs(places, edits, every=True), *other_programs(places)]
    return [{"name": program.name, "runs": dict(program.runs)} for program in programs]


def compile_plan(
    name: str,
    config: NetworkConfig,
    topology: str | Topology,
    *,
    dtype: str = "bfloat16",
    edits: Sequence[int] = EDITS,
    every: bool = False,
    settings: TPatcherSettings | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compile what edits of a network run, for TPUs that need not be there or for devices that are, and add it up.

    Args:
        name: of the network.
        config: its description.
        topology: such as ``"v5e:2x4"``, or the devices.
        dtype: of its weights.
        edits: how many in one call.
        every: the other methods, generation and evaluation as well.
        settings: the editor's options.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        ``programs`` (`compile_programs`, each with the number of ``edits`` that it is compiled for and how often it
        ``runs`` at each site), ``edits_per_second`` by site for the number of edits in the middle, ``plan`` by site and
        number of edits (``edits_per_second``, ``seconds``, ``memory_bytes_per_chip``, ``fits``, and
        ``forward_equivalents`` per edit), and the ``mesh``.

    Raises:
        TPatchError: libtpu is missing, or there is no such topology.
    """
    described = describe_topology(topology) if isinstance(topology, str) else topology
    mesh = create_mesh(described, split_weights(config, described, dtype))
    places = Places(config, mesh, dtype)
    known: dict[Any, Compiled | str] = {}
    rows: list[dict[str, Any]] = []
    plan: dict[str, dict[str, Any]] = {site: {} for site in sites_of(config)}
    for count in edits:
        programs = edit_programs(places, count, settings, every=every)
        compiled = compile_programs(programs, places.params, described, progress, known)
        unit = _forward_seconds(compiled, config)
        for row, program in zip(compiled, programs, strict=True):
            row |= {"edits": count, "runs": dict(program.runs)}
        for site, by_count in plan.items():
            by_count[str(count)] = _added(compiled, site, count, unit)
        rows += compiled
    if every:
        rows += compile_programs(other_programs(places), places.params, described, progress, known)
    middle = str(sorted(edits)[len(edits) // 2])
    return {
        "model": name,
        "topology": described.name,
        "dtype": dtype,
        "mesh": dict(mesh.shape),
        "hosts": described.hosts,
        "programs": rows,
        "edits_per_second": {site: by_count[middle]["edits_per_second"] for site, by_count in plan.items()},
        "edits": int(middle),
        "plan": plan,
    }


def _forward_seconds(rows: Sequence[Mapping[str, Any]], config: NetworkConfig) -> float:
    """The roofline of one forward pass over one request, of a full batch."""
    names = {"reading: embeddings": 1.0, "last layer: what is said": 1.0}
    each = {row["name"]: row["seconds"] for row in rows}
    blocks = [seconds for name, seconds in each.items() if name.startswith("reading: block") and seconds]
    rest = sum(times * (each.get(name) or 0.0) for name, times in names.items())
    whole = rest + config.layers * (sum(blocks) / max(1, len(blocks)))
    return whole / 64


def _added(rows: Sequence[Mapping[str, Any]], site: str, edits: int, unit: float) -> dict[str, Any]:
    """All runs at one site together."""
    running = [(row, row["runs"].get(site, 0.0)) for row in rows]
    running = [(row, times) for row, times in running if times]
    if not all(row["compiled"] for row, _ in running):
        return dict.fromkeys(("edits_per_second", "seconds", "memory_bytes_per_chip", "forward_equivalents")) | {
            "fits": False
        }
    seconds = sum(times * row["seconds"] for row, times in running)
    return {
        "edits_per_second": edits / seconds,
        "seconds": seconds,
        "memory_bytes_per_chip": max(row["memory_bytes_per_chip"] for row, _ in running),
        "fits": all(row["fits"] for row, _ in running),
        "forward_equivalents": seconds / edits / unit if unit else None,
    }
