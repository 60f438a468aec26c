"""The neurons of a bank's active edits, put together from its segments, in plain NumPy."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from tpatch_jax.bank.segments import Arrays, read_segment
from tpatch_jax.bank.state import Bank, BankEdit, Ref, live

__all__ = ["FIELDS", "Held", "Store", "assemble", "empty_neurons", "join_neurons", "take_neurons"]

FIELDS = ("key", "bias", "value", "layer")
"""A neuron's arrays; ``layer`` is always there, -1 where the neurons do not name it."""


class Held(NamedTuple):
    """Edits with their neurons.

    Attributes:
        edits: the edits, in order.
        neurons: their neurons one after the other: ``key [n, d]``, ``bias [n]``, ``value [n, d]``, ``layer [n]``.
        refs: where each neuron came from, and by which line its key and bias were last changed.
        owner: the edit that each neuron belongs to, ``[n]``.
        pieces: what later fits need to know about each edit.
    """

    edits: tuple[BankEdit, ...]
    neurons: Arrays
    refs: tuple[Ref, ...]
    owner: np.ndarray
    pieces: tuple[Arrays, ...]

    def without(self, ids: Iterable[str]) -> "Held":
        """The same without some edits."""
        removed = set(ids)
        if not removed:
            return self
        keep = [number for number, edit in enumerate(self.edits) if edit.id not in removed]
        place = {number: at for at, number in enumerate(keep)}
        rows = [row for row, number in enumerate(self.owner) if int(number) in place]
        return Held(
            tuple(self.edits[number] for number in keep),
            take_neurons(self.neurons, rows),
            tuple(self.refs[row] for row in rows),
            np.asarray([place[int(self.owner[row])] for row in rows], np.int64),
            tuple(self.pieces[number] for number in keep),
        )


class Store(NamedTuple):
    """Segments that were read already, by the number of their line."""

    arrays: dict[int, Arrays]
    pieces: dict[int, dict[str, Arrays]]

    @classmethod
    def new(cls) -> "Store":
        """Nothing was read yet."""
        return cls({}, {})


def empty_neurons(width: int) -> Arrays:
    """No neuron."""
    zeros = np.zeros((0, width), np.float32)
    return {"key": zeros, "bias": np.zeros(0, np.float32), "value": zeros, "layer": np.zeros(0, np.int32)}


def take_neurons(neurons: Mapping[str, np.ndarray], rows: Iterable[int]) -> Arrays:
    """Some neurons, by row."""
    chosen = np.asarray(list(rows), np.int64)
    return {name: neurons[name][chosen] for name in FIELDS}


def join_neurons(parts: Iterable[Mapping[str, np.ndarray]], width: int) -> Arrays:
    """Neurons one after the other."""
    parts = [empty_neurons(width), *parts]
    return {name: np.concatenate([part[name] for part in parts]) for name in FIELDS}


def _load(bank: Bank, store: Store, number: int) -> Arrays:
    from tpatch_jax.bank.pieces import split_pieces

    if number not in store.arrays:
        record = bank.records[number - 1]
        arrays = read_segment(bank.folder, record["segment"])
        names = [entry["id"] for entry in (*record.get("edits", ()), *record.get("refitted", ()))]
        pieces = split_pieces(arrays) if "earlier_lengths" in arrays else []
        store.arrays[number] = arrays
        store.pieces[number] = dict(zip(names, pieces, strict=True)) if pieces else {}
    return store.arrays[number]


def assemble(bank: Bank, edits: Iterable[BankEdit], store: Store) -> Held:
    """Edits with the neurons and thresholds that they have now.

    Args:
        bank: the bank.
        edits: some of its edits that are not lost.
        store: segments that were read already; more are added.
    """
    edits, alive = tuple(edits), live(bank)
    width = bank.manifest["model"]["width"]
    changed: dict[Ref, tuple[int, int]] = {}
    for number in sorted(alive):
        if "segment" in bank.records[number - 1]:
            changes = _load(bank, store, number).get("changed")
            for row, ref in enumerate([] if changes is None else changes.tolist()):
                changed[ref[0], ref[1]] = number, row
    parts, refs, owner, pieces = [], [], [], []
    for at, edit in enumerate(edits):
        line, rows = next((line, rows) for line, rows in reversed(edit.fits) if line in alive)
        if "segment" not in bank.records[line - 1]:
            raise AssertionError(f"line {line} fitted {edit.id!r} and has no segment")
        arrays = _load(bank, store, line)
        part = take_neurons(arrays, rows)
        for slot, row in enumerate(rows):
            by, place = changed.get((line, row), (line, -1))
            if place >= 0:
                source = store.arrays[by]
                part["key"][slot], part["bias"][slot] = source["changed_key"][place], source["changed_bias"][place]
            refs.append((line, row))
            owner.append(at)
        parts.append(part)
        pieces.append(store.pieces[line][edit.id])
    return Held(edits, join_neurons(parts, width), tuple(refs), np.asarray(owner, np.int64), tuple(pieces))
