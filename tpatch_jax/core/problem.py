"""What a fit works on and what it reports: the lane, the options, the outcome."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tpatch_jax.core.checks import check_positive, check_range, check_types
from tpatch_jax.core.objective import Weights
from tpatch_jax.errors import TPatchError

__all__ = ["FitInfo", "FitProblem", "FitSettings", "Head", "held"]

Head = Callable[[Any, Float[Array, "contexts d"]], Float[Array, "contexts vocabulary"]]
"""The network after the cut: ``(context, output [contexts, d])`` to logits ``[contexts, vocabulary]``."""


class FitProblem(NamedTuple):
    """What one patch is fitted on; a batch of lanes has a leading axis.

    Attributes:
        query: the edit's queries, the bare prompt first, then its prefixed contexts: ``[contexts, d]``.
        output: the FFN's output at those queries, other active patches included: ``[contexts, d]``.
        negative: queries on which this patch in particular must stay silent, such as the same prompt about another
            subject: ``[own_negatives, d]``, possibly none.
        context: what ``head`` needs beside the output, with leading axis ``contexts``.
        target: the token or label to say, a scalar int.
        direction: where the value starts, ``[d]``; its length does not matter.
        scale: the length that a value of medium strength has, a scalar; the residual stream's norm is a good one.
    """

    query: Float[Array, "*lanes contexts d"]
    output: Float[Array, "*lanes contexts d"]
    negative: Float[Array, "*lanes own_negatives d"]
    context: Any
    target: Int[Array, "*lanes"]
    direction: Float[Array, "*lanes d"]
    scale: Float[Array, "*lanes"]


class FitInfo(NamedTuple):
    """How a fit went; a batch has a leading axis.

    Attributes:
        held: whether the bare prompt, the first context, gives the target.
        steps: optimiser steps taken.
        margin: the least pre-activation on the edit's own queries minus the largest on memory rows, in units of the
            mean pre-activation on its own queries; negative when they could not be parted.
        l_e: edit loss at the end, in nats.
        l_a: activation loss.
        l_m1: first memory loss.
        l_m2: second memory loss.
    """

    held: Bool[Array, "*lanes"]
    steps: Int[Array, "*lanes"]
    margin: Float[Array, "*lanes"]
    l_e: Float[Array, "*lanes"]
    l_a: Float[Array, "*lanes"]
    l_m1: Float[Array, "*lanes"]
    l_m2: Float[Array, "*lanes"]


@dataclass(frozen=True)
class FitSettings:
    """Options of a fit, hashable so that they are static under ``jit``.

    Attributes:
        recipe: ``"staged"`` or ``"joint"``.
        weights: weights and margins of the objective.
        learning_rate: Adam's, for all parameters (joint).
        value_learning_rate: Adam's for the value, in units of the lane's scale (staged); ``0`` means 0.05.
        weight_decay: so much of each parameter is added to its gradient (joint).
        clip: the gradient's largest norm.
        key_steps: steps on the activation and memory losses (staged).
        key_rate: length of the first of them, in units of the key's first length; they shrink to nothing (staged).
        value_steps: most steps on the edit loss for a lane that misses its target (staged).
        rounds: how often hard negatives are mined during the key steps.
        negatives: how many memory rows each lane trains against.
        split: where the threshold lies between the hardest negative (0) and the edit's own queries (1).
        overshoot: the value's length over the shortest that holds, so that a weaker activation still says the target.
        sharpness: ``s`` of ``act(s·z)/s``, a power of two; it is folded into the patch.
        value_limit: the value's largest length, in units of the lane's scale.
        least_steps: no early stop before (joint).
        most_steps: stop here at the latest (joint).
        patience: steps between looks at the held-out memory loss (joint).
        value_spread: standard deviation of the initial value (joint).
        output_bias: the other reading of the patch, ``a·v + b`` with an ungated scalar ``b`` in place of the key bias
            (joint). It is stored as a second neuron that is always on.
        eager: where an edit cannot be parted from the hardest negative, fire on its queries' mean and not only on the
            first (staged): where no single query decides what is said.
        lanes: how many lanes are fitted at a time at most; a power of two. Their logits are in memory together.

    Raises:
        TPatchError: a value makes no sense.
    """

    recipe: str = "staged"
    weights: Weights = field(default_factory=Weights)
    learning_rate: float = 0.01
    value_learning_rate: float = 0.0
    weight_decay: float = 0.0
    clip: float = 5.0
    key_steps: int = 64
    key_rate: float = 0.2
    value_steps: int = 24
    rounds: int = 4
    negatives: int = 128
    split: float = 0.8
    overshoot: float = 2.25
    sharpness: float = 256.0
    value_limit: float = 16.0
    least_steps: int = 150
    most_steps: int = 2000
    patience: int = 25
    value_spread: float = 10.0
    output_bias: bool = False
    eager: bool = False
    lanes: int = 16

    def __post_init__(self) -> None:
        """Checks the values."""
        check_types(self)
        if self.recipe not in ("staged", "joint"):
            raise TPatchError(f"recipe {self.recipe!r} does not exist; use 'staged' or 'joint'")
        check_range(self, ("rounds", "negatives", "patience", "most_steps", "lanes"), 1)
        check_range(self, ("key_steps", "value_steps", "least_steps"), 0)
        check_range(self, ("value_learning_rate", "weight_decay", "value_spread"), 0.0)
        check_positive(self, ("learning_rate", "key_rate", "overshoot", "sharpness"))
        check_positive(self, ("clip", "value_limit"), bounded=False)
        check_range(self, ("split",), 0.0, 1.0)
        check_range(self.weights, ("least_active", "hardest"), 1)
        check_range(self.weights, ("limit", "margin"), -1e9)
        check_range(self.weights, ("activation", "memory", "label_smoothing", "entropy"), 0.0)


def held(logits: Float[Array, "rows vocabulary"], target: Int[Array, ""]) -> Bool[Array, " rows"]:
    """Whether each row of logits, ``[rows, vocabulary]``, says the target: ``[rows]`` bool.

    Example:
        >>> held(jnp.eye(3), jnp.array(1)).tolist()
        [False, True, False]
    """
    return jnp.argmax(logits, -1) == target
