"""A stand-in for T-Patcher that fits in no time: what a bank does with it can be told beforehand. No JAX.

Each edit gets one neuron. A request whose target begins with ``weak`` remembers in its bias how many edits there were;
it no longer comes out when there are two more or fewer, until it is fitted again. Fitting changes the first neuron's
bias, as where a threshold is raised. A target ``bad`` cannot be fitted; ``breaker`` breaks a guard on ``guarded``.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tpatch_jax.bank.assembly import Held, take_neurons
from tpatch_jax.bank.commit import write_bank
from tpatch_jax.bank.layout import FORMAT
from tpatch_jax.bank.method import Engine, Result, Stepped
from tpatch_jax.bank.state import Bank, Guard
from tpatch_jax.requests import EditRequest

WIDTH = 3


def make_bank(folder: Path) -> Path:
    model = {
        "name": "tiny",
        "fingerprint": "0" * 32,
        "family": "llama",
        "width": WIDTH,
        "layers": 2,
        "dtype": "float32",
    }
    write_bank(folder, {"format": FORMAT, "model": model, "preset": "default", "settings": {}}, None)
    return folder


def vector(text: str) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(text.encode())).normal(size=WIDTH).astype(np.float32)


def piece(request: EditRequest) -> dict[str, np.ndarray]:
    tokens = np.frombuffer(f"{request.prompt}{request.target}".encode(), np.uint8).astype(np.int32)
    whole = np.asarray([len(tokens)], np.int32)
    rows = np.stack([vector(request.prompt)])
    arrays = {
        "tokens": tokens,
        "lengths": whole,
        "starts": whole - 1,
        "subjects": whole * 0 - 1,
        "groups": whole * 0 - 1,
    }
    arrays |= {"wanted": whole * 0, "query": rows, "output": rows, "residual": rows, "heard": rows[:0]}
    return {f"earlier_{name}": array for name, array in arrays.items()}


class StandIn:
    """The engine itself; see the top of this file."""

    def problems(self, requests: Sequence[EditRequest]) -> dict[int, str]:
        return {n: "the target is empty" for n, one in enumerate(requests) if not one.target}

    def step(self, held: Held, requests: Sequence[EditRequest], guards: Sequence[Guard]) -> Stepped:
        results = []
        for request in requests:
            bias = np.float32(len(held.edits) + len(requests)) if request.target.startswith("weak") else np.float32(0)
            neurons = {
                "key": vector(request.prompt)[None],
                "bias": np.asarray([bias], np.float32),
                "value": vector(request.target)[None],
                "layer": np.asarray([-1], np.int32),
            }
            good = request.target != "bad"
            neurons = neurons if good else take_neurons(neurons, [])
            evidence = {"status": "edited" if good else "failed", "said_before": None}
            results.append(Result(good, "" if good else "it is bad", evidence, neurons, piece(request) if good else {}))
        changed = {}
        if len(held.refs) and any(result.held for result in results):
            first = next((row for row, n in enumerate(held.owner) if held.edits[n].request.target == "soft"), None)
            if first is not None:
                changed[first] = held.neurons["key"][first] * 2, held.neurons["bias"][first] - 1
        return Stepped(results, changed)

    def broken(self, held: Held) -> list[str]:
        return [
            held.edits[number].id
            for row, number in enumerate(held.owner.tolist())
            if held.edits[number].request.target.startswith("weak")
            and abs(held.neurons["bias"][row] - len(held.edits)) >= 2
        ]

    def near(self, held: Held, requests: Sequence[EditRequest]) -> list[str]:
        return [edit.id for edit in held.edits[-2:]]

    def guards_broken(self, held: Held, guards: Sequence[Guard]) -> list[Guard]:
        there = any(edit.request.target == "breaker" for edit in held.edits)
        return [guard for guard in guards if guard.prompt == "guarded" and there]

    def verify(self, held: Held) -> list[str]:
        return self.broken(held)


ENGINE: Engine = StandIn()


def fake(bank: Bank) -> Engine:
    """What `add_with` and `change_with` call for an engine."""
    return ENGINE
