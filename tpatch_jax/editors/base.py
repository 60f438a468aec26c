"""The interface that every editing method shares: two pure-looking functions and what they pass between them."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from jax import Array

from tpatch_jax.core.layers import Neurons
from tpatch_jax.models.model import Model
from tpatch_jax.models.networks import Batch
from tpatch_jax.requests import EditRequest

__all__ = ["EditInfo", "Editor", "RequestInfo", "Routing"]


class RequestInfo(NamedTuple):
    """What became of one request.

    Attributes:
        id: the request's id.
        held: whether the edited model says the target after the prompt.
        status: ``"edited"``, ``"already"`` (it held before; nothing was added) or ``"failed"``.
        reason: why it failed, whether something was kept all the same, and how to mend it; else empty.
        neurons: positions of its neurons, by layer, in the patch of that layer.
        steps: optimiser steps, the most of any of its neurons.
        losses: the terms of the objective, means over its neurons.
        margin: the least margin of its neurons; see `tpatch_jax.core.fit.FitInfo`.
        site: ``"last"`` or ``"subject"``: where its neurons are.
    """

    id: str
    held: bool
    status: str
    reason: str = ""
    neurons: Neurons = MappingProxyType({})
    steps: int = 0
    losses: Mapping[str, float] = MappingProxyType({})
    margin: float | None = None
    site: str = "last"


class EditInfo(NamedTuple):
    """What became of a list of requests, and what it cost.

    Attributes:
        requests: one `RequestInfo` for each, in order.
        seconds: wall time of the whole edit.
        fit_seconds: wall time of the fitting alone.
        forward_equivalents: ``seconds`` ÷ the time of one forward pass over a request's prompt and target, per request.
        fit_forward_equivalents: the same for the fitting alone.
        parameters_added: how many numbers the patch holds.
    """

    requests: tuple[RequestInfo, ...]
    seconds: float
    fit_seconds: float
    forward_equivalents: float
    fit_forward_equivalents: float
    parameters_added: int

    @property
    def failed(self) -> tuple[RequestInfo, ...]:
        """The requests that did not hold."""
        return tuple(request for request in self.requests if request.status == "failed")


class Editor(NamedTuple):
    """An editing method.

    Attributes:
        init: ``(model, key) -> state``.
        step: ``(state, requests, key) -> (state, info)``; of T-Patcher, requests that do not hold leave no trace in the
            state; of the others they do, unless ``keep_failed`` is off.
        apply: ``(state, batch) -> logits``, as `tpatch_jax.models.networks.apply` has them.
    """

    init: Callable[[Model, Array], Any]
    step: Callable[[Any, Sequence[EditRequest], Array], tuple[Any, EditInfo]]
    apply: Callable[[Any, Batch], Array]


class Routing(NamedTuple):
    """Edits that another model answers: what is in the scope of one goes there, and the base model never sees it.

    Attributes:
        model: the other model; it has the base model's tokenizer.
        contexts: from prompts in tokens to what the other model reads before each, or ``None`` where the base model
            answers.
    """

    model: Model
    contexts: Callable[[Sequence[Sequence[int]]], list[list[int] | None]]
