"""The interface that every editing method shares: three functions, and what they pass between them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jax import Array

from tpatch_jax.core.devices import automatically
from tpatch_jax.core.layers import Neurons
from tpatch_jax.models.model import Model
from tpatch_jax.models.networks import Batch
from tpatch_jax.requests import EditRequest

__all__ = ["EditInfo", "Editor", "EditorFunctions", "RequestInfo", "Routing"]


class RequestInfo(NamedTuple):
    """What became of one request.

    Attributes:
        id: the request's id.
        held: whether the edited model says the target after the prompt.
        status: ``"edited"``, ``"already"`` (it held before; nothing was added) or ``"failed"``.
        reason: why it failed, whether something was kept all the same, and how to mend it; of an edit that holds, why
            it is in the last layer where the subject was asked for; else empty.
        neurons: positions of its neurons, by layer, in the patch of that layer.
        steps: optimiser steps, the most of any of its neurons.
        losses: the terms of the objective, means over its neurons; where values are predicted, ``said_at_start``, too:
            1 if the target was surely said before any step, else 0.
        margin: the least margin of its neurons; see `tpatch_jax.core.fit.FitInfo`.
        site: ``"last"`` or ``"subject"``: where its neurons are.
        continuation: its target as it continues the prompt, with the space between them, if there is one; in a chat
            up to the end of the turn.
        form: where it was asked to hold: ``"bare"``, ``"chat"`` or ``"both"``.
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
    continuation: str = ""
    form: str = "bare"

    @property
    def held_at_start(self) -> bool | None:
        """Whether the value that was predicted for its subject said the target before any step on it.

        ``None`` where nothing was predicted.
        """
        said = self.losses.get("said_at_start")
        return None if said is None else self.held and len(self.neurons) == 1 and said == 1.0


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

    @property
    def held_at_start(self) -> float | None:
        """The share of edits with a predicted value that said their target before any step on it.

        ``None`` where no value was predicted; see ``tpatch learn``.
        """
        held = [request.held_at_start for request in self.requests if request.held_at_start is not None]
        return sum(held) / len(held) if held else None


@runtime_checkable
class Editor(Protocol):
    """An editing method: three functions, and a state that goes from one to the next.

    Whatever has these three is an editor, a module or an object alike; ``Editor(init, step, apply)`` makes one of three
    functions (see `EditorFunctions`). A state is a value: ``step`` returns a new one, and going back to an earlier one
    undoes what came after it. Sequential editing is a loop over ``step``; batch editing is one ``step``.

    Example:
        >>> editor = Editor(
        ...     init=lambda model, rng: model,
        ...     step=lambda state, requests, rng: (state, EditInfo((), 0.0, 0.0, 0.0, 0.0, 0)),
        ...     apply=lambda state, batch: state.apply(batch),
        ... )
        >>> isinstance(editor, Editor)
        True
    """

    def init(self, model: Model, rng: Array, /) -> Any:
        """A state without edits.

        Args:
            model: the model to edit; never changed.
            rng: a typed random key.

        Raises:
            TPatchError: the method cannot edit this model.
        """
        ...

    def step(self, state: Any, requests: Sequence[EditRequest], rng: Array, /) -> tuple[Any, EditInfo]:
        """The state with some more requests edited, and what became of each.

        A request that does not hold is reported and is no error. Of T-Patcher it leaves no trace in the state; of the
        others it does, unless their ``keep_failed`` is off.

        Args:
            state: from ``init`` or an earlier step; not changed.
            requests: what to correct.
            rng: a typed random key; the same one gives the same edits.
        """
        ...

    def apply(self, state: Any, batch: Batch, /) -> Array:
        """Logits of the edited model, as `tpatch_jax.models.networks.apply` has them.

        Args:
            state: the edits so far.
            batch: what to run the model on.
        """
        ...

    def __new__(cls, *functions: Any, **named: Any) -> Any:
        """An editor of three functions; a class that inherits from the protocol is made as any other."""
        return EditorFunctions(*functions, **named) if cls is Editor else super().__new__(cls)


@dataclass(frozen=True)
class EditorFunctions:
    """The simple way to make an `Editor`: three functions, which are called as it says there.

    Attributes:
        init: ``(model, rng) -> state``.
        step: ``(state, requests, rng) -> (state, info)``.
        apply: ``(state, batch) -> logits``.
    """

    init: Callable[[Model, Array], Any]
    step: Callable[[Any, Sequence[EditRequest], Array], tuple[Any, EditInfo]]
    apply: Callable[[Any, Batch], Array]

    def __post_init__(self) -> None:
        """Each runs whatever the types of a mesh's axes are."""
        for name in ("init", "step", "apply"):
            object.__setattr__(self, name, automatically(getattr(self, name)))


class Routing(NamedTuple):
    """Edits that another model answers: what is in the scope of one goes there, and the base model never sees it.

    Attributes:
        model: the other model; it has the base model's tokenizer.
        contexts: from prompts in tokens to what the other model reads beside each, or ``None`` where the base model
            answers.
        place: from a prompt in tokens to where in it the context stands; by default before all of it.
        decision_flops: from a prompt in tokens to the FLOPs of deciding on it; by default a decision counts as free.
    """

    model: Model
    contexts: Callable[[Sequence[Sequence[int]]], list[list[int] | None]]
    place: Callable[[Sequence[int]], int] = lambda prompt: 0
    decision_flops: Callable[[Sequence[int]], float] = lambda prompt: 0.0

    def joined(self, prompt: Sequence[int], context: Sequence[int], row: Sequence[int]) -> list[int]:
        """A row that begins with a prompt, with the prompt's context in its place."""
        at = self.place(prompt)
        return [*row[:at], *context, *row[at:]]
