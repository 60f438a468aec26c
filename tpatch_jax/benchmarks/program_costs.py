"""What a compiled program costs: products, traffic with memory and between devices, every loop as often as it runs.

The compiler's summary takes the body of a loop once, and all traffic alike. So the program that it has made is read
here: its text says how large each array is, where it lies, and how often a loop goes round.
"""

import math
import re
from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

__all__ = ["ProgramCosts", "program_costs"]

_SIZES: Mapping[str, float] = {
    "pred": 1, "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "s64": 8, "u64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
         "opt-barrier", "add-dependency", "domain"}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
                "collective-broadcast")  # fmt: skip
_COPIES = {"copy-start", "slice-start", "dynamic-slice-start"}
_LIBRARY = ("__cublas$gemm", "__cublas$lt$matmul")
"""Products that a GPU's library does."""
NO_AXES: Mapping[str, int] = MappingProxyType({})
"""Of a mesh about which nothing is known."""
_PASSES = {"highest": 6, "high": 3}
"""A product of float32 in so many products of bfloat16."""


class ProgramCosts(NamedTuple):
    """What one run of a program costs each device.

    Attributes:
        flops: operations of matrix products, two for each multiplication with its addition.
        passes: the same in products of bfloat16, of which a more precise product of float32 takes three or six.
        bytes: read from and written to the device's memory; what stays on the chip is not among them.
        collective_bytes: that a device sends to others.
        collectives: how many exchanges there are, by kind.
        over: of ``collective_bytes`` how many go along which axes of the mesh, such as ``"data"`` or ``"data, model"``;
            nothing where the axes are not known.
    """

    flops: float = 0.0
    passes: float = 0.0
    bytes: float = 0.0
    collective_bytes: float = 0.0
    collectives: tuple[tuple[str, float], ...] = ()
    over: tuple[tuple[str, float], ...] = ()

    def plus(self, other: "ProgramCosts", times: float = 1.0) -> "ProgramCosts":
        """The costs of both, the other one so often."""
        sums = (mine + times * theirs for mine, theirs in zip(self[:4], other[:4], strict=True))
        collectives = _sums(self.collectives, other.collectives, times)
        return ProgramCosts(*sums, collectives=collectives, over=_sums(self.over, other.over, times))


def _sums(
    mine: tuple[tuple[str, float], ...], theirs: tuple[tuple[str, float], ...], times: float
) -> tuple[tuple[str, float], ...]:
    """Figures by name, and others by name so often."""
    sums = dict(mine)
    for name, figure in theirs:
        sums[name] = sums.get(name, 0.0) + times * figure
    return tuple(sorted(sums.items()))


class _Array(NamedTuple):
    """An array's type: its shape, its bytes, and whether it lies in the device's memory."""

    shape: tuple[int, ...]
    bytes: float
    in_memory: bool


def _arrays(text: str) -> list[_Array]:
    arrays = []
    for kind, shape, layout in _ARRAY.findall(text):
        size = _SIZES.get(kind, 1.0 if kind.startswith("f8") else 0.0)
        sides = tuple(int(side) for side in shape.split(",") if side)
        arrays.append(_Array(sides, size * math.prod(sides), "S(" not in layout))
    return arrays


def _closing(text: str, start: int) -> int:
    """Where the bracket closes that opens at ``start``."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place
    return len(text) - 1


class _Instruction:
    """One line of a program."""

    def __init__(self, name: str, text: str, root: bool):
        end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
        rest = text[end:].lstrip()
        begin = rest.find("(")
        close = _closing(rest, begin)
        self.name, self.root, self.type_text = name, root, text[:end]
        self.code, self.operands = rest[:begin], _NAME.findall(rest[begin : close + 1])
        self.number = rest[begin + 1 : close] if self.code in ("parameter", "constant") else ""
        self.attributes = rest[close + 1 :]

    @cached_property
    def arrays(self) -> list[_Array]:
        return _arrays(self.type_text)

    @property
    def traffic(self) -> float:
        """Its bytes in the device's memory."""
        return sum(array.bytes for array in self.arrays if array.in_memory)

    def attribute(self, name: str) -> str:
        """The computation or the text that an attribute names, or nothing."""
        match = re.search(rf"\b{name}=%?([\w.\-]+|\{{[^{{}}]*\}})", self.attributes)
        return match.group(1) if match else ""


Computation = dict[str, _Instruction]


def _computations(text: str) -> tuple[dict[str, Computation], str]:
    result: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is not None and (match := _LINE.match(line)):
            root, name, rest = match.groups()
            result[current][name] = _Instruction(name, rest, bool(root))
        elif line.startswith("}"):
            current = None
        elif not line.startswith(" ") and (match := _HEADER.match(line)):
            current = match.group(2)
            result[current] = {}
            entry = current if match.group(1) else entry
    return result, entry


def _numbers(text: str, default: int, sides: int) -> list[int]:
    return [int(part) for part in text.split("x")] if text else [default] * sides


def _meetings(out: int, size: int, stride: int, low: int, base: int, dilate: int, dilated: int) -> int:
    """How many pairs of an output's place and a kernel's place meet an entry of the input, along one side."""
    reach = (base - 1) * dilated + 1
    count = 0
    for place in range(out):
        for offset in range(size):
            at = place * stride - low + offset * dilate
            count += 0 <= at < reach and at % dilated == 0
    return count


def _convolution(line: _Instruction, left: _Array, right: _Array) -> float:
    """Operations of a convolution, as which a TPU writes every product: ``2 · meetings · batch · inputs · outputs``."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.attributes)
    if labels is None:
        return 0.0
    of_left, of_right, of_out = labels.groups()
    out = line.arrays[0].shape
    window = re.search(r"window=\{([^}]*)\}", line.attributes)
    fields = dict(part.split("=") for part in window.group(1).split()) if window else {}
    sides = sum(label.isdigit() for label in of_out)
    size, stride = _numbers(fields.get("size", ""), 1, sides), _numbers(fields.get("stride", ""), 1, sides)
    dilated, dilate = _numbers(fields.get("lhs_dilate", ""), 1, sides), _numbers(fields.get("rhs_dilate", ""), 1, sides)
    pads = fields.get("pad", "")
    low = [int(part.split("_")[0]) for part in pads.split("x")] if pads else [0] * sides
    met = 1
    for side in range(sides):
        label = str(side)
        met *= _meetings(
            out[of_out.index(label)], size[side], stride[side], low[side], left.shape[of_left.index(label)],
            dilate[side], dilated[side],
        )  # fmt: skip
    return 2.0 * met * out[of_out.index("b")] * out[of_out.index("f")] * right.shape[of_right.index("i")]


def _dot(line: _Instruction, left: _Array) -> float:
    """Operations of a product: two for each entry of the result and each entry along what is summed over."""
    summed = line.attribute("lhs_contracting_dims").strip("{}")
    if line.code == "custom-call":
        told = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', line.attributes)
        summed = told.group(1).replace('"', "") if told else ""
    inner = math.prod(left.shape[int(side)] for side in summed.split(",") if side)
    return 2.0 * inner * math.prod(line.arrays[0].shape)


def _lists(text: str) -> list[list[int]]:
    return [[int(number) for number in part.split(",")] for part in re.findall(r"\{([\d,]+)\}", text)]


def _placed(sizes: str, order: str | None) -> np.ndarray:
    """Devices ``0 …`` in an array of these sizes, whose axes are exchanged as it says."""
    shape = [int(size) for size in sizes.split(",")]
    devices = np.arange(math.prod(shape)).reshape(shape)
    return devices.transpose([int(axis) for axis in order.split(",")]) if order else devices


def _groups(line: _Instruction) -> list[list[int]]:
    """Between which devices an exchange goes, in each of the forms that XLA writes; nothing if it does not say."""
    text = line.attributes
    if match := re.search(r"source_target_pairs=\{([\d,{}]*)\}", text):
        return [pair for pair in _lists(match.group(1)) if pair[0] != pair[1]]
    if match := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", text):
        return _lists(match.group(1))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        groups, size, sizes, order = match.groups()
        return _placed(sizes, order).reshape(int(groups), int(size)).tolist()
    match = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", text
    )
    if match is None:
        return []
    axes, sizes, order, along = match.groups()
    named = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    chosen = [number for number, name in enumerate(named) if f"'{name}'" in along]
    devices = _placed(sizes or str(math.prod(named.values())), order).reshape(list(named.values()))
    size = math.prod(devices.shape[axis] for axis in chosen)
    return np.moveaxis(devices, chosen, range(-len(chosen), 0)).reshape(-1, size).tolist()


def _along(groups: list[list[int]], axes: Mapping[str, int]) -> str:
    """The axes of a mesh along which its devices exchange something."""
    sizes, members = tuple(axes.values()), np.asarray(groups)
    if not groups or members.max() >= math.prod(sizes):
        return "unknown"
    places = np.unravel_index(members, sizes)
    moved = [name for name, place in zip(axes, places, strict=True) if np.any(place != place[:, :1])]
    return ", ".join(moved)


def _sent(kind: str, groups: list[list[int]], operands: float) -> float:
    """Bytes that each device sends, by the ring algorithms; nothing where a group is one device."""
    group = len(groups[0]) if groups else 2
    share = (group - 1) / group
    if kind == "collective-permute":
        return operands
    if kind == "all-gather":
        return operands * (group - 1)
    return operands * share * (2 if kind == "all-reduce" else 1)


def _copied(line: _Instruction) -> float:
    """Bytes of a copy, both of whose ends stand in its type; of a slice of a larger array the slice."""
    ends = line.arrays[:2]
    return min(end.bytes for end in ends) * sum(end.in_memory for end in ends)


class _Reader:
    """Adds up a program's costs, each computation once."""

    def __init__(self, text: str, trips: int, axes: Mapping[str, int]):
        self.computations, self.entry = _computations(text)
        self.trips, self.axes = trips, axes
        self.known: dict[tuple[str, bool], ProgramCosts] = {}

    def cost(self, name: str, inside: bool = False) -> ProgramCosts:
        """The costs of a computation; inside a fusion nothing goes through the device's memory."""
        if (name, inside) not in self.known:
            total = ProgramCosts()
            lines = self.computations.get(name, {})
            for line in lines.values():
                total = total.plus(self._line(line, lines, inside))
            self.known[name, inside] = total
        return self.known[name, inside]

    def _line(self, line: _Instruction, lines: Computation, inside: bool) -> ProgramCosts:
        code = line.code
        if code in _FREE or code.endswith(("-done", "-update")):
            return ProgramCosts()
        if code == "while":
            body, condition = (self.cost(line.attribute(part), inside) for part in ("body", "condition"))
            return ProgramCosts().plus(body.plus(condition), self._rounds(line))
        if code == "conditional":
            named = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line.attributes)
            named += _NAME.findall(line.attribute("branch_computations"))
            return max((self.cost(branch, inside) for branch in named), default=ProgramCosts())
        if code in ("call", "async-start"):
            return self.cost(line.attribute("to_apply") or line.attribute("calls"), inside)
        given = [lines[name] for name in line.operands if name in lines]
        kind = next((kind for kind in _COLLECTIVES if code in (kind, f"{kind}-start")), None)
        if kind is not None:
            size = sum(array.bytes for operand in given for array in operand.arrays)
            groups = _groups(line)
            sent = _sent(kind, groups, size)
            over = ((_along(groups, self.axes), sent),) if self.axes and sent else ()
            return ProgramCosts(collective_bytes=sent, collectives=((kind, 1.0),), over=over)
        if code in _COPIES:
            return ProgramCosts(bytes=0.0 if inside else _copied(line))
        within = ProgramCosts()
        if code == "fusion":
            within = self.cost(line.attribute("calls"), True)
        elif code in ("convolution", "dot") or any(f'"{name}' in line.attributes for name in _LIBRARY):
            arrays = [operand.arrays[0] for operand in given[:2]]
            flops = _convolution(line, *arrays) if code == "convolution" else _dot(line, arrays[0])
            asked = re.search(r"operand_precision=\{(\w+)", line.attributes)
            within = ProgramCosts(flops, flops * _PASSES.get(asked.group(1) if asked else "", 1))
        return within if inside else within._replace(bytes=within.bytes + self._traffic(line, given))

    def _traffic(self, line: _Instruction, given: list[_Instruction]) -> float:
        """Bytes that an instruction reads and writes; of what it only takes a slice of, the slice."""
        code, written = line.code, line.traffic
        if code in _SLICES:
            return written + min(written, given[0].traffic) if given else written
        if code == "dynamic-update-slice":
            return 2 * given[1].traffic
        if code != "fusion":
            return written + sum(operand.traffic for operand in given)
        called = self.computations.get(line.attribute("calls"), {})
        root = next((each for each in called.values() if each.root), None)
        if root is not None and root.code == "dynamic-update-slice" and len(root.operands) > 1:
            update = called.get(root.operands[1])
            size = sum(array.bytes for array in update.arrays) if update else 0.0
            return size + sum(
                self._read(called, n, operand) for n, operand in enumerate(given) if written != operand.traffic
            )
        return written + sum(self._read(called, number, operand) for number, operand in enumerate(given))

    def _read(self, called: Computation, number: int, operand: _Instruction) -> float:
        """What a fusion reads of one operand."""
        whole = operand.traffic
        if not whole:
            return 0.0
        parameter = next((e for e in called.values() if e.code == "parameter" and e.number == str(number)), None)
        if parameter is None:
            return whole
        return min(whole, self._taken(called, parameter.name, whole))

    def _taken(self, called: Computation, name: str, whole: float) -> float:
        total = 0.0
        for user in called.values():
            if name not in user.operands:
                continue
            if user.code in _SLICES and user.operands[0] == name:
                total += sum(array.bytes for array in user.arrays)
            elif user.code == "bitcast":
                total += self._taken(called, user.name, whole)
            elif user.code == "fusion":
                inner = self.computations.get(user.attribute("calls"), {})
                place = str(user.operands.index(name))
                parameter = next((e for e in inner.values() if e.code == "parameter" and e.number == place), None)
                total += whole if parameter is None else self._taken(inner, parameter.name, whole)
            else:
                return whole
        return total

    def _rounds(self, line: _Instruction) -> int:
        """How often a loop goes round: as the compiler says, or as its end is written, or as the caller says."""
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', line.attributes):
            return int(match.group(1))
        condition = self.computations.get(line.attribute("condition"), {})
        root = next((each for each in condition.values() if each.root), None)
        if root is not None and root.code == "compare" and "direction=LT" in root.attributes:
            end = condition.get(root.operands[1])
            if end is not None and end.code == "constant" and end.number.isdigit():
                return int(end.number)
        return self.trips


def program_costs(text: str, trips: int = 1, axes: Mapping[str, int] = NO_AXES) -> ProgramCosts:
    """What a compiled program costs each device.

    Args:
        text: the program as the compiler writes it, ``jax.stages.Compiled.as_text()``.
        trips: how often a loop goes round whose end shows only as it runs.
        axes: of the mesh that it was compiled for, by name their sizes, so that it is known along which of them
            devices exchange something.

    Returns:
        The `ProgramCosts`. Elementwise work is not counted, which beside products and traffic takes no time.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> text = jax.jit(jnp.dot).lower(jnp.ones((8, 16)), jnp.ones((16, 4))).compile().as_text()
        >>> program_costs(text).flops
        1024.0
    """
    reader = _Reader(text, trips, axes)
    return reader.cost(reader.entry)
