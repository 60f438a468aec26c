"""TPUs to compile for without having one: their published figures, and XLA's TPU compiler from the package ``libtpu``.

Nothing runs on them. The compiler says whether a program lowers, what memory it takes, and what it does in which order.
"""

import importlib.util
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from tpatch_jax.core.arguments import describe, install_advice
from tpatch_jax.core.devices import DATA_AXIS
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.sharding import MODEL_AXIS

__all__ = [
    "CHIPS",
    "Chip",
    "Compiled",
    "Topology",
    "compile_lowered",
    "create_mesh",
    "describe_accelerator",
    "describe_topology",
]

LIBTPU = "libtpu>=0.0.42"

ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_LOG_DIR": "disabled",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
)
"""With these libtpu asks no metadata server, takes no lock and writes no log. What is compiled for does not depend on
them."""


class Chip(NamedTuple):
    """One chip as its maker publishes it.

    Attributes:
        flops: operations a second in bfloat16 at the peak.
        bandwidth: bytes a second between the chip and its memory.
        memory: bytes.
        interconnect: bytes a second between a chip and the others, all links together.
    """

    flops: float
    bandwidth: float
    memory: float
    interconnect: float


CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        "v4": Chip(275e12, 1228e9, 32 * 2**30, 300e9),
        "v5e": Chip(197e12, 819e9, 16 * 2**30, 200e9),
        "v5p": Chip(459e12, 2765e9, 95 * 2**30, 600e9),
        "v6e": Chip(918e12, 1640e9, 32 * 2**30, 448e9),
    }
)
"""Published peaks by the name with which a topology begins.

Source: Google Cloud, "TPU architecture" and the pages on each version.
"""


class Topology(NamedTuple):
    """Chips to compile for.

    Attributes:
        name: such as ``"v5e:2x4"``.
        chip: what one device can do; where a chip is two devices, half a chip.
        devices: the devices, or stand-ins of them, which run nothing.
        hosts: how many machines they belong to.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    hosts: int


class Compiled(NamedTuple):
    """What the compiler makes of a program.

    Attributes:
        seconds: of the processor that it took, lowering included.
        arguments: bytes of what goes in, on each device.
        results: bytes of what comes out and is no argument that was given up.
        temporary: bytes in between, at the peak.
        flops: of one pass through the program, as the compiler counts them, loops once.
        text: the program after all passes, as each device runs it.
    """

    seconds: float
    arguments: int
    results: int
    temporary: int
    flops: float
    text: str


@contextmanager
def _environment() -> Iterator[None]:
    """The variables that libtpu reads, as long as it is asked; those that are set stay as they are."""
    added = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


KINDS: Mapping[str, Chip] = MappingProxyType(
    {
        "TPU v6": CHIPS["v6e"],
        "TPU v5 lite": CHIPS["v5e"],
        "TPU v5e": CHIPS["v5e"],
        "TPU v5": CHIPS["v5p"],
        "TPU v4": CHIPS["v4"],
        "H200": Chip(989e12, 4800e9, 141e9, 450e9),
        "H100 PCIe": Chip(756e12, 2000e9, 80e9, 64e9),
        "H100": Chip(989e12, 3350e9, 80e9, 450e9),
        "A100-SXM4-40GB": Chip(312e12, 1555e9, 40e9, 300e9),
        "A100-PCIE-40GB": Chip(312e12, 1555e9, 40e9, 32e9),
        "A100": Chip(312e12, 2039e9, 80e9, 300e9),
        "L40S": Chip(362e12, 864e9, 48e9, 32e9),
        "NVIDIA L4": Chip(121e12, 300e9, 24e9, 32e9),
        "Tesla T4": Chip(65e12, 320e9, 16e9, 16e9),
    }
)
"""Published peaks by a part of what JAX calls a kind of device; the first that is in it counts.

Source: besides those of `CHIPS`, NVIDIA's data sheets, without sparsity; links in one direction.
"""

UNKNOWN = Chip(math.inf, math.inf, math.inf, math.inf)
"""A chip whose peaks are not known here: a roofline on it says nothing."""


def describe_accelerator() -> Topology | None:
    """The accelerators that JAX finds, with their published peaks, or `UNKNOWN`; ``None`` where it finds none.

    Example:
        >>> describe_accelerator() is None or len(describe_accelerator().devices) > 0
        True
    """
    devices = tuple(jax.devices())
    if devices[0].platform == "cpu":
        return None
    kind = devices[0].device_kind
    chip = next((chip for part, chip in KINDS.items() if part in kind), UNKNOWN)
    if room := (devices[0].memory_stats() or {}).get("bytes_limit"):
        chip = chip._replace(memory=float(room))
    return Topology(kind, chip, devices, len({device.process_index for device in devices}))


def describe_topology(name: str) -> Topology:
    """TPUs to compile for, by the name that JAX has for them.

    Args:
        name: ``"VERSION:SHAPE"``, such as ``"v5e:2x4"``, ``"v6e:1x1"`` or ``"v5p:2x2x1"``.

    Raises:
        TPatchError: libtpu is missing, or there is no such topology.

    Example:
        >>> describe_topology("v5e:2x4").chip.memory == 16 * 2**30  # doctest: +SKIP
        True
    """
    version, _, shape = str(name).partition(":")
    if version not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        raise TPatchError(
            f"topology {describe(name)} is none; give VERSION:SHAPE such as v5e:2x4, v6e:1x1 or v5p:2x2x1 (versions "
            f"are {', '.join(CHIPS)})"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise TPatchError(
            f"compiling for {name} needs libtpu, the TPU's compiler, which runs without a TPU; "
            f"{install_advice(LIBTPU, 'tpu')}"
        )
    sides = [int(side) for side in shape.split("x")]
    # Machines hold 2 x 2 chips; of a smaller shape one machine holds all.
    small = {"chips_per_host_bounds": (*(min(2, side) for side in sides[:2]), 1)} if min(sides[:2]) < 2 else {}
    try:
        with _environment():
            described = topologies.get_topology_desc(platform="tpu", topology_name=name, **small)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:200]
        raise TPatchError(f"topology {name!r} cannot be compiled for ({reason}); try v5e:2x4 or v6e:1x1") from None
    devices = tuple(described.devices)
    cores = 1 + max(getattr(device, "core_on_chip", 0) for device in devices)
    chip = Chip(*(figure / cores for figure in CHIPS[version]))
    return Topology(name, chip, devices, len({device.process_index for device in devices}))


def create_mesh(topology: Topology, model: int = 1) -> Mesh:
    """The devices as a mesh with the axes ``"data"`` and ``"model"``.

    Args:
        topology: the devices.
        model: how many of them share the weights; the others repeat them.

    Raises:
        TPatchError: that does not divide the devices.
    """
    count = len(topology.devices)
    if model < 1 or count % model:
        raise TPatchError(f"{count} devices cannot be split into parts of {model}; give a divisor of {count}")
    return Mesh(np.asarray(topology.devices, dtype=object).reshape(-1, model), (DATA_AXIS, MODEL_AXIS))


def compile_lowered(function: Any, *args: Any, **kwargs: Any) -> Compiled:
    """Lower and compile a function for the devices on which its arguments are said to lie.

    Args:
        function: from ``jax.jit``.
        args: what it is called with: `jax.ShapeDtypeStruct` with a sharding in place of arrays.
        kwargs: the same by name.

    Raises:
        Exception: whatever the compiler says of a program that it cannot compile.

    Example:
        >>> import jax.numpy as jnp
        >>> compile_lowered(jax.jit(jnp.dot), jnp.ones((2, 4)), jnp.ones((4, 2))).arguments
        64
    """
    began = time.process_time()
    with _environment():
        compiled = function.lower(*args, **kwargs).compile()
    seconds = time.process_time() - began
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    kept = memory.alias_size_in_bytes
    return Compiled(
        seconds,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - kept,
        memory.temp_size_in_bytes,
        float(costs.get("flops", 0.0)),
        compiled.as_text(),
    )
