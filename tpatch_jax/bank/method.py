"""What a bank asks of an editing method: functions over edits and NumPy arrays."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tpatch_jax.bank.assembly import Held
from tpatch_jax.bank.segments import Arrays
from tpatch_jax.bank.state import Guard
from tpatch_jax.requests import EditRequest

__all__ = ["Engine", "Result", "Stepped"]


class Result(NamedTuple):
    """What became of one request.

    Attributes:
        held: whether it holds.
        reason: why not, and how to mend it.
        evidence: what the model said before, status, losses, margin, steps, site.
        neurons: its neurons.
        piece: what later fits need to know about it; empty if it does not hold.
    """

    held: bool
    reason: str
    evidence: Mapping[str, Any]
    neurons: Arrays
    piece: Arrays


class Stepped(NamedTuple):
    """What fitting some requests gave.

    Attributes:
        results: one for each request.
        changed: earlier neurons that gave way: from the row to its new key and bias.
    """

    results: list[Result]
    changed: dict[int, tuple[np.ndarray, np.ndarray]]


class Engine(NamedTuple):
    """What a bank asks of an editing method.

    Attributes:
        problems: requests that cannot be worked on, by position, with the reason.
        step: ``(held, requests, guards)``: fit requests beside what is held, silent on the guarded prompts.
        broken: ids of held edits that do not come out, from what is known about them.
        near: ids of the held edits that are nearest to some requests in query space.
        guards_broken: guarded prompts whose answers do not come out.
        verify: ids of held edits that do not come out when their prompts are read anew.
    """

    problems: Callable[[Sequence[EditRequest]], dict[int, str]]
    step: Callable[[Held, Sequence[EditRequest], Sequence[Guard]], Stepped]
    broken: Callable[[Held], list[str]]
    near: Callable[[Held, Sequence[EditRequest]], list[str]]
    guards_broken: Callable[[Held, Sequence[Guard]], list[Guard]]
    verify: Callable[[Held], list[str]]
