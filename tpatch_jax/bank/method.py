"""What a bank asks of an editing method: functions over edits and NumPy arrays."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from tpatch_jax.bank.assembly import Held
from tpatch_jax.bank.segments import Arrays
from tpatch_jax.bank.state import Guard
from tpatch_jax.models.model import Model
from tpatch_jax.requests import EditRequest

__all__ = ["Engine", "Result", "Stepped"]


class Result(NamedTuple):
    """What became of one request.

    Attributes:
        held: whether it holds.
        reason: why not, and how to mend it.
        evidence: status, losses, margin, steps, site.
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
        changed: held neurons whose threshold was raised: from the row to its new key and bias.
    """

    results: list[Result]
    changed: dict[int, tuple[np.ndarray, np.ndarray]]


class Engine(Protocol):
    """What a bank asks of an editing method."""

    def model(self, held: Held) -> Model:
        """The model with all held edits active."""
        ...

    def problems(self, requests: Sequence[EditRequest]) -> dict[int, str]:
        """Requests that cannot be worked on, by position, with the reason."""
        ...

    def step(self, held: Held, requests: Sequence[EditRequest], guards: Sequence[Guard]) -> Stepped:
        """Fit requests beside what is held, silent on the guarded prompts."""
        ...

    def broken(self, held: Held) -> list[str]:
        """Ids of held edits that do not come out, from what is known about them."""
        ...

    def near(self, held: Held, requests: Sequence[EditRequest]) -> list[str]:
        """Ids of the held edits that are nearest to some requests in query space."""
        ...

    def guards_broken(self, held: Held, guards: Sequence[Guard]) -> list[Guard]:
        """Guarded prompts whose answers do not come out."""
        ...

    def verify(self, held: Held) -> list[str]:
        """Ids of held edits that do not come out when their prompts are read anew."""
        ...
