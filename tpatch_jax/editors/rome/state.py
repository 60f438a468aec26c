"""Edits that change the down projections of some layers: what ROME, MEMIT and AlphaEdit share.

Such an edit cannot be taken out again but by keeping the down projections from before.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tpatch_jax.core import ffn
from tpatch_jax.editors.base import EditInfo, RequestInfo
from tpatch_jax.editors.locating import locate_subject
from tpatch_jax.editors.one_layer import check_no_experts
from tpatch_jax.editors.reading import Item, check_requests, read_item
from tpatch_jax.editors.rome.rank_one import null_projection
from tpatch_jax.editors.rome.subject_value import OffsetInfo
from tpatch_jax.editors.tpatcher.last_site import collect_bare
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.collection import predicted
from tpatch_jax.models.model import Model
from tpatch_jax.models.quantising import check_float
from tpatch_jax.requests import EditRequest
from tpatch_jax.typing import Arrays, Params

__all__ = [
    "Attempt",
    "RomeState",
    "check_model",
    "check_moment",
    "edited",
    "null_space",
    "read_requests",
    "report",
    "restore",
    "save",
    "says",
]


class RomeState(NamedTuple):
    """What an edited model is made of.

    Attributes:
        model: the unedited model.
        down_projections: the kernels of the down projections that edits changed, by layer, ``[h, d]``.
        moments: ``C`` of the unedited model at each layer that is edited, ``[h, h]``.
        contexts: texts to put before a prompt.
        settings: the editor's options, as they are meant for this model.
        projections: ``P`` at each layer whose updates stay in a null space, ``[h, h]``; of other methods empty.
        earlier: ``Σ k·kᵀ`` of the keys written so far at each layer where later updates have to keep them, ``[h, h]``.
    """

    model: Model
    down_projections: Mapping[int, Float[Array, "hidden_neurons d"]]
    moments: Mapping[int, Float[Array, "hidden_neurons hidden_neurons"]]
    contexts: tuple[str, ...]
    settings: Any
    projections: Mapping[int, Float[Array, "hidden_neurons hidden_neurons"]] = MappingProxyType({})
    earlier: Mapping[int, Float[Array, "hidden_neurons hidden_neurons"]] = MappingProxyType({})

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are edited, lowest first."""
        return tuple(sorted({*self.moments, *self.projections}))

    def with_network(self, layer: int, params: Params) -> "RomeState":
        """The same with the down projection of another feed-forward network in one layer."""
        return self._replace(down_projections={**self.down_projections, layer: params["down"]["kernel"]})

    def with_keys(self, layer: int, keys: Float[Array, "edits hidden_neurons"]) -> "RomeState":
        """The same with some more keys, ``[n, h]``, that later updates of one layer have to keep."""
        added = jnp.matmul(keys.T, keys, precision="highest")
        before = self.earlier.get(layer)
        return self._replace(earlier={**self.earlier, layer: added if before is None else before + added})


class Attempt(NamedTuple):
    """How one request went: its offset's fit, its place there, and why it could not be kept, if so."""

    info: OffsetInfo
    lane: int
    reason: str = ""


def edited(state: RomeState) -> Model:
    """The model with the edits so far: it shares all arrays but the changed down projections with the unedited one."""
    if not state.down_projections:
        return state.model
    layers = dict(state.model.params["layers"])
    for layer, kernel in state.down_projections.items():
        network = layers[layer]["ffn"]
        layers[layer] = {**layers[layer], "ffn": {**network, "down": {**network["down"], "kernel": kernel}}}
    return state.model.with_params({**state.model.params, "layers": layers})


def save(state: RomeState) -> Arrays:
    """The changed down projections as arrays, float32, and what later updates have to keep."""
    kernels = {f"kernel-{layer}": np.asarray(kernel, np.float32) for layer, kernel in state.down_projections.items()}
    return kernels | {f"earlier-{layer}": np.asarray(keys) for layer, keys in state.earlier.items()}


def restore(state: RomeState, arrays: Mapping[str, np.ndarray]) -> RomeState:
    """A fresh state with the down projections that `save` gave."""
    down_projections, earlier = {}, {}
    for name, array in arrays.items():
        kind, _, number = name.rpartition("-")
        layer = int(number)
        if kind == "earlier":
            earlier[layer] = jax.device_put(array)
            continue
        down_projections[layer] = jnp.asarray(array, state.model.params["layers"][layer]["ffn"]["down"]["kernel"].dtype)
    return state._replace(down_projections=down_projections, earlier=earlier)


def check_model(model: Model, method: str, layers: Sequence[int]) -> None:
    """Make sure that a model can be edited this way.

    Raises:
        TPatchError: it is no decoder, one of the layers is a mixture of experts, a patch is attached to one, or its
            weights are in INT8.
    """
    check_float(model, method)
    if model.config.architecture != "decoder":
        raise TPatchError(
            f"{method} needs a decoder, and {model.name!r} is an {model.config.architecture}; use method tpatcher"
        )
    for layer in layers:
        check_no_experts(model, layer, method)
        if ffn.attached(model.params["layers"][layer]["ffn"]):
            raise TPatchError(f"a patch is attached to layer {layer}, which {method} edits; merge or detach it first")


def check_moment(moment_tokens: int, ridge: float) -> None:
    """Make sure that the options of ``C`` make sense.

    Raises:
        TPatchError: one does not.
    """
    if moment_tokens < 1:
        raise TPatchError(f"moment_tokens is {moment_tokens}; give 1 or more")
    if not 0 <= ridge < math.inf:
        raise TPatchError(f"ridge is {ridge}; give 0 or a positive number")


def null_space(
    moment: Float[Array, "hidden_neurons hidden_neurons"], layer: int, threshold: float
) -> Float[Array, "hidden_neurons hidden_neurons"]:
    """``P`` of one layer; see `tpatch_jax.editors.rome.rank_one.null_projection`.

    Raises:
        TPatchError: general text uses every direction, so that no update could be made.
    """
    projection = null_projection(moment, threshold)
    if not bool(projection.any()):
        raise TPatchError(
            f"general text uses every direction of layer {layer}'s hidden neurons: none has an eigenvalue below "
            f"null_space, which is {threshold:g}; raise it"
        )
    return projection


def read_requests(state: RomeState, requests: Sequence[EditRequest], method: str) -> tuple[list[Item], dict[int, str]]:
    """Requests in tokens, in all contexts.

    Args:
        state: the model and the contexts.
        requests: the requests.
        method: its name, for messages.

    Returns:
        Those that can be worked on; and of the others, by position, the reason and how to mend it.
    """
    problems = check_requests(state.model, requests, False)
    for position, request in enumerate(requests):
        if position in problems:
            continue
        if request.subject is None:
            problems[position] = f"{method} edits at a request's subject and this one has none; give it one"
        elif (count := len(locate_subject(state.model, request.prompt, request.subject))) > 1:
            problems[position] = f"the subject {request.subject!r} occurs {count} times in the prompt; name it once"
    items = [
        read_item(state.model, position, request, state.contexts, False)
        for position, request in enumerate(requests)
        if position not in problems
    ]
    return items, problems


def says(model: Model, items: Sequence[Item]) -> list[bool]:
    """Whether the model says each request's target after its bare prompt."""
    if not items:
        return []
    tokens = predicted(model, collect_bare(model, items))
    ends = np.cumsum([len(item.target) for item in items])[:-1]
    return [part.tolist() == item.target for part, item in zip(np.split(tokens, ends), items, strict=True)]


def report(
    names: Sequence[str],
    problems: Mapping[int, str],
    attempts: Mapping[int, Attempt],
    held: Mapping[int, bool],
    keep_failed: bool,
    times: tuple[float, float, float],
) -> EditInfo:
    """What became of each request, and what all of them cost.

    Args:
        names: of the requests.
        problems: the reason of each that was not worked on, by position.
        attempts: how the others went.
        held: whether the model says their targets after the whole step.
        keep_failed: whether an update stays whose target does not come out.
        times: seconds of the whole edit, of the fitting, and of one forward pass over one request.
    """
    fate = "the update was kept (keep_failed); try another layer"
    if not keep_failed:
        # Of those that did not come out at once nothing was kept, and they have their reason.
        fate = "a later edit of this step undid it, and the update was kept; give fewer requests at once"
    results = []
    for position, name in enumerate(names):
        if position in problems:
            results.append(RequestInfo(name, False, "failed", problems[position], site="subject"))
            continue
        (info, lane, reason), right = attempts[position], held[position]
        if not right and not reason:
            reason = f"the target does not come out after the edits; {fate}"
        losses = {"nll": float(info.nll[lane]), "kl": float(info.closeness[lane])}
        results.append(
            RequestInfo(
                name,
                right,
                "edited" if right and not reason else "failed",
                reason,
                steps=int(info.steps[lane]),
                losses=losses,
                site="subject",
            )
        )
    seconds, fit_seconds, unit = times
    scale = 1 / (max(1, len(names)) * unit) if unit else 0.0
    return EditInfo(tuple(results), seconds, fit_seconds, seconds * scale, fit_seconds * scale, 0)
