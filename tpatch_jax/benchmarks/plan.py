"""What many edits of large models would cost: ``tpatch bench --plan``, arithmetic from measured constants.

Time is counted in forward passes, as `tpatch_jax.benchmarks.bench` measures it, plus the search for hard negatives,
which alone grows with the square of the number of edits.
"""

from typing import NamedTuple

__all__ = ["MACHINES", "MEASURED", "NETWORKS", "Cost", "Machine", "Measured", "Network", "cost", "plan"]

GIB = 2**30


class Network(NamedTuple):
    """A decoder.

    Attributes:
        name: as in the table.
        parameters: how many.
        width: ``d``.
        layers: how many.
        vocabulary: ``V``.
    """

    name: str
    parameters: float
    width: int
    layers: int
    vocabulary: int


class Machine(NamedTuple):
    """Several devices as a mesh.

    Attributes:
        name: as in the table.
        data: devices along ``"data"``, over which lanes and memory rows are split.
        model: devices along ``"model"``, over which weights are split.
        speed: of one device, bfloat16 operations a second at its peak.
        memory: of one device, bytes.
    """

    name: str
    data: int
    model: int
    speed: float
    memory: float


class Measured(NamedTuple):
    """What was measured on SmolLM2-135M with 4,096 edits of CounterFact in the last layer.

    Attributes:
        forwards: forward passes an edit, from request to patch.
        tokens: tokens of one such pass, padded.
        neurons: neurons an edit.
        rows: query rows an edit, in all its contexts.
        searches: how often a lane looks for its hard negatives.
        queries: query rows of unrelated text, and inside the prompts.
        share: of a device's peak speed that a forward pass reaches. This one is assumed, not measured.
    """

    forwards: float = 4.2
    tokens: int = 16
    neurons: float = 1.06
    rows: float = 4.3
    searches: int = 5
    queries: int = 48_000
    share: float = 0.3


class Cost(NamedTuple):
    """What a number of edits costs.

    Attributes:
        network: its name.
        machine: its name.
        edits: how many.
        seconds: all edits, in one call.
        weights: bytes of each device, bfloat16.
        memory: bytes of each device for query rows, float32.
        patches: bytes of each device for merged neurons, bfloat16, split like the weights.
        disk: bytes that each process keeps in files meanwhile, of what was collected, float32.
        wider: parameters that the merged neurons add, over those of the network.
        fits: whether a device has room for all of it, and a tenth to spare.
    """

    network: str
    machine: str
    edits: int
    seconds: float
    weights: float
    memory: float
    patches: float
    disk: float
    wider: float
    fits: bool


NETWORKS = (
    Network("7B", 6.7e9, 4096, 32, 32_000),
    Network("70B", 69e9, 8192, 80, 32_000),
)
MACHINES = (
    Machine("8 x H100", 4, 2, 989e12, 80e9),
    Machine("16 x TPU v5p", 4, 4, 459e12, 95e9),
)
MEASURED = Measured()


def cost(network: Network, machine: Machine, edits: int, measured: Measured = MEASURED) -> Cost:
    """Time and memory of so many edits in the last layer.

    ``seconds = (E·f·t·2P + E·n·s·(r·E + m)·2d) / (devices · speed · share)``

    Args:
        network: ``P`` parameters, width ``d``.
        machine: the devices.
        edits: ``E``.
        measured: ``f`` forward passes of ``t`` tokens, ``n`` neurons, ``r`` rows an edit, ``s`` searches, ``m`` rows
            of unrelated text.

    Example:
        >>> estimate = cost(NETWORKS[0], MACHINES[0], 10_000)
        >>> estimate.fits, round(estimate.weights / 2**30)
        (True, 6)
    """
    width, neurons = network.width, edits * measured.neurons
    rows = edits * measured.rows + measured.queries
    passes = edits * measured.forwards * measured.tokens * 2 * network.parameters
    search = neurons * measured.searches * rows * 2 * width
    seconds = (passes + search) / (machine.data * machine.model * machine.speed * measured.share)
    weights = 2 * network.parameters / machine.model
    memory = 4 * width * rows / machine.data
    patches = 2 * 2 * width * neurons / machine.model
    return Cost(
        network.name,
        machine.name,
        edits,
        seconds,
        weights,
        memory,
        patches,
        3 * 4 * width * edits * measured.rows,
        2 * width * neurons / network.parameters,
        weights + memory + patches < 0.9 * machine.memory,
    )


def plan(edits: tuple[int, ...] = (10_000, 100_000, 1_000_000)) -> list[Cost]:
    """`cost` of every network on every machine for several numbers of edits."""
    return [cost(network, machine, count) for network in NETWORKS for machine in MACHINES for count in edits]
