"""LocFT-BF: plain fine-tuning of one layer's down projection, breadth first over all edits.

Fine-tuning did badly in tables of editors because each edit was trained until it held before the next one was seen, of
parameters in a bad place, and without a token that ends the answer. This is the ordinary way instead: epochs over all
edits, in mini-batches that are drawn anew for each epoch, one optimiser for all of them.

Where the authors' paper leaves a choice, or a stream of edits asks for one, this file reads them so:

- A step trains on the edits that it is given and on those of earlier steps (``replay``), from the parameters that the
  step before left: so a stream is breadth first, too. Without replay it is what the authors show to fail.
- A mini-batch whose loss is below ``loss_enough`` makes no step, and training ends after an epoch whose mean is below
  it, as in their code. A target that is a whole turn of a chat ends already, and gets no other end.
- Which layer is best they find by trying all (22 of 32 of Llama-3-8B, 6 of 28 of Qwen2.5-7B); ``auto`` is 0.7 of the
  way up, as in the former.

Source: Yang et al., "Fine-tuning Done Right in Model Editing", ICLR 2026.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tpatch_jax.core.checks import check_range
from tpatch_jax.editors.base import EditInfo, Editor, EditorFunctions, RequestInfo
from tpatch_jax.editors.fine_tuning.examples import Group, grouped
from tpatch_jax.editors.fine_tuning.step import ADAM, Lesson, edit_losses, look, rounded, splice
from tpatch_jax.editors.one_layer import check_one_layer
from tpatch_jax.editors.reading import Item, check_requests, read_item
from tpatch_jax.editors.registry import Method, register_editor
from tpatch_jax.editors.repeats import step_once
from tpatch_jax.editors.stored import name_request, requests_from_array, requests_to_array
from tpatch_jax.editors.tpatcher.last_site import forward_seconds
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.model import Model
from tpatch_jax.models.networks import Batch
from tpatch_jax.requests import EditRequest
from tpatch_jax.typing import Arrays, Params, Progress

__all__ = ["LOCFT_PRESETS", "LocftSettings", "LocftState", "check_locft", "locft", "restore_kernel", "save_kernel"]

HEIGHT = 0.7
"""How far up ``layer=auto`` is; the authors take layer 22 of the 32 of Llama-3-8B."""


@dataclass(frozen=True)
class LocftSettings:
    """Options of LocFT-BF; the defaults are its authors' but for the layer, which they choose for each model.

    Attributes:
        layer: ``"auto"``, 0.7 of the way up, or a number.
        adam_rate: Adam's learning rate.
        epochs: at most so often each edit is trained on in a step.
        batch_size: so many edits share one step of Adam.
        loss_enough: training ends after an epoch with a mean loss below this, in nats a token.
        end_token: train on the token that ends a text behind the target as well.
        replay: train on the edits of earlier steps as well.
        keep_failed: keep the change if an edit does not hold in the end, as the authors do. Otherwise all of the step's
            change is taken back.

    Raises:
        TPatchError: a value makes no sense.
    """

    layer: str = "auto"
    adam_rate: float = 5e-4
    epochs: int = 25
    batch_size: int = 100
    loss_enough: float = 0.01
    end_token: bool = True
    replay: bool = True
    keep_failed: bool = True

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.layer != "auto" and not self.layer.isdigit():
            raise TPatchError(f"layer {self.layer!r} is not a layer; use layer=auto or a number")
        check_range(self, ("epochs", "batch_size"), 1)
        if not 0 < self.adam_rate < math.inf:
            raise TPatchError(f"adam_rate is {self.adam_rate}; give a positive number, such as 5e-4")
        check_range(self, ("loss_enough",), 0)


LOCFT_PRESETS: Mapping[str, LocftSettings] = {"default": LocftSettings()}
"""Named settings of LocFT-BF: ``default``, its authors' for down projections.

Source: Yang et al. 2026, and the configurations in their code.
"""


class LocftState(NamedTuple):
    """What an edited model is made of.

    Attributes:
        model: the unedited model.
        edited: the model with what was trained.
        layer: whose down projection that is.
        trained: that part of the parameters, float32 whatever the model's type.
        requests: the edits so far, which later steps train on again.
    """

    model: Model
    edited: Model
    layer: int
    trained: Params
    requests: tuple[EditRequest, ...]


def locft(settings: LocftSettings = LOCFT_PRESETS["default"], *, progress: Progress | None = None) -> Editor:
    """The LocFT-BF editor: fine-tuning of one down projection, breadth first.

    Minimises ``mean over edits of mean over target and end of −log p(token)`` with Adam in mini-batches, epoch after
    epoch over all edits so far, until the loss of an epoch is low. There is no undo but the state from before.

    Args:
        settings: its options.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        The `Editor`; its state is a `LocftState`.

    Raises:
        TPatchError: on ``init``, where the model has no such layer, or something is attached there.

    Source: Yang et al. 2026; `tpatch_jax.editors.locft` says how it is read.

    Example:
        >>> editor = locft(LocftSettings(epochs=40))
        >>> state = editor.init(model, jax.random.key(0))  # doctest: +SKIP
        >>> state, info = editor.step(state, [EditRequest("The capital of France is", "Lyon")], key)  # doctest: +SKIP
        >>> state.edited.generate("The capital of France is")  # doctest: +SKIP
        ' Lyon'
    """

    def init(model: Model, rng: Array) -> LocftState:
        layer = check_locft(model, settings)
        kernel = model.params["layers"][layer]["ffn"]["down"]["kernel"]
        return LocftState(model, model, layer, _part(layer, jnp.asarray(kernel, jnp.float32)), ())

    def step(state: LocftState, requests: Sequence[EditRequest], rng: Array) -> tuple[LocftState, EditInfo]:
        return step_once(state.model, requests, lambda given: _step(state, given, rng, settings, progress))

    def apply(state: LocftState, batch: Batch) -> Array:
        return state.edited.apply(batch)

    return EditorFunctions(init, step, apply)


def check_locft(model: Model, settings: LocftSettings) -> int:
    """Make sure that a model can be fine-tuned with these options.

    Returns:
        The layer.

    Raises:
        TPatchError: it has no such layer, something is attached there, its weights are in INT8, or no token ends a
            text.
    """
    layer = check_one_layer(model, settings.layer, HEIGHT, "LocFT", "trains")
    if settings.end_token and model.config.architecture == "decoder" and not model.stops:
        raise TPatchError(f"{model.name!r} names no token that ends a text; train without it (end_token=false)")
    return layer


def _part(layer: int, kernel: Any) -> Params:
    """A down projection as a part of a model's parameters."""
    return {"layers": {layer: {"ffn": {"down": {"kernel": kernel}}}}}


def _edited(model: Model, trained: Params) -> Model:
    return model.with_params(splice(model.params, rounded(model.params, trained)))


# --- training ---


def _with_end(model: Model, item: Item, wanted: bool) -> Item:
    """An edit that says the end of the text behind its target; one that ends already, or is a label, stays as it is."""
    if not wanted or model.config.architecture != "decoder":
        return item
    if item.target[-1] in model.stops or model.excess(item.rows[0], [0]):
        return item
    return item._replace(target=[*item.target, model.end], rows=[[*row, model.end] for row in item.rows])


@partial(jax.jit, static_argnames="config")
def _gradient(config: NetworkConfig, trained: Params, params: Params, lesson: Lesson) -> tuple[Array, Params]:
    """``Σ weight·(−log p)`` of some edits, and its gradient; a weight is 1/tokens, so that edits count alike."""

    def loss_of(trained: Params) -> Array:
        losses = edit_losses(config, splice(params, rounded(params, trained)), lesson)[0]
        return jnp.sum(losses * lesson.weight)

    return jax.value_and_grad(loss_of)(trained)


@jax.jit
def _moved(trained: Params, moments: Any, parts: tuple[Params, ...], rate: Array, count: Array) -> tuple[Params, Any]:
    """One step of Adam along the mean of the gradients of so many edits, of which sums over parts are given."""
    gradient = jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]) / count, *parts)
    updates, moments = ADAM.update(gradient, moments)
    return jax.tree.map(lambda now, update: now - rate * update, trained, updates), moments


class _Trained(NamedTuple):
    """Where training ended: the part, how many steps of Adam it took, and the mean loss of the last epoch."""

    trained: Params
    updates: int
    loss: float


def _train(
    state: LocftState, items: Sequence[Item], rng: Array, settings: LocftSettings, progress: Progress | None
) -> _Trained:
    """Epochs over all edits in mini-batches, drawn anew for each, until the loss of one is low."""
    config, params, generator = state.model.config, state.model.params, _generator(rng)
    trained, moments = state.trained, ADAM.init(state.trained)
    updates, loss = 0, math.inf
    for epoch in range(settings.epochs):
        if progress:
            progress("fine-tuning", epoch, settings.epochs)
        order, total = generator.permutation(len(items)), 0.0
        for first in range(0, len(items), settings.batch_size):
            batch = [items[number] for number in order[first : first + settings.batch_size]]
            # What is too large for one pass shares a step all the same: gradients of its parts add up.
            lessons = [group.lesson for group in _groups(state.model, batch, settings)]
            losses, parts = zip(*(_gradient(config, trained, params, lesson) for lesson in lessons), strict=True)
            loss = float(sum(losses))
            total += loss
            if loss / len(batch) >= settings.loss_enough:
                trained, moments = _moved(trained, moments, parts, settings.adam_rate, len(batch))
                updates += 1
        loss = total / len(items)
        if loss < settings.loss_enough or not math.isfinite(loss):
            break
    if progress:
        progress("fine-tuning", settings.epochs, settings.epochs)
    return _Trained(trained, updates, loss)


def _generator(rng: Array) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.key_data(rng)).ravel().tolist())


def _groups(model: Model, items: Sequence[Item], settings: LocftSettings) -> list[Group]:
    return grouped(model, items, settings.batch_size, True)


def _holds(model: Model, trained: Params, items: Sequence[Item], settings: LocftSettings) -> tuple[Any, Any]:
    """Of each edit whether its target comes out, and its loss, without the token that ends it."""
    held, loss = np.zeros(len(items), bool), np.zeros(len(items))
    for group in _groups(model, items, settings) if items else ():
        each, right = (
            np.asarray(array)[: len(group.owner)] for array in look(model.config, trained, model.params, group.lesson)
        )
        for number in np.unique(group.owner):
            rows = group.owner == number
            held[number], loss[number] = right[rows].all(), each[rows].mean()
    return held, loss


# --- one step ---


def _step(
    state: LocftState, requests: list[EditRequest], rng: Array, settings: LocftSettings, progress: Progress | None
) -> tuple[LocftState, EditInfo]:
    began, model = time.perf_counter(), state.model
    names = [request.name(position) for position, request in enumerate(requests)]
    problems = check_requests(model, requests, False)
    good = [position for position in range(len(requests)) if position not in problems]
    items = [read_item(model, position, requests[position], (), False) for position in good]
    taken = {request.id for request in state.requests}
    named = [name_request(requests[position], names[position], taken) for position in good]
    # A later edit of the same prompt stands in the place of an earlier one.
    changed = {request.prompt for request in named}
    earlier = [request for request in state.requests if request.prompt not in changed] if settings.replay else []
    before, _ = _holds(model, state.trained, items, settings)
    fitting, trained = time.perf_counter(), _Trained(state.trained, 0, 0.0)
    if not before.all():
        again = [read_item(model, number, request, (), False) for number, request in enumerate(earlier)]
        everything = [_with_end(model, item, settings.end_token) for item in (*again, *items)]
        trained = _train(state, everything, rng, settings, progress)
    fit_seconds = time.perf_counter() - fitting
    held, losses = _holds(model, trained.trained, items, settings)
    sound = math.isfinite(trained.loss)
    kept = sound and (settings.keep_failed or bool(held.all()))
    if kept:
        edits = (*earlier, *named) if settings.replay else (*state.requests, *named)
        state = state._replace(requests=edits)
        if trained.updates:
            state = state._replace(trained=trained.trained, edited=_edited(model, trained.trained))
    results = {position: RequestInfo(names[position], False, "failed", why) for position, why in problems.items()}
    for number, position in enumerate(good):
        right = bool(held[number] if kept else before[number])
        status = "failed" if not right else "already" if before[number] else "edited"
        reason = "" if right else _reason(trained, sound, kept, bool(held[number]), settings)
        loss = {"l_e": float(losses[number])}
        results[position] = RequestInfo(names[position], right, status, reason, steps=trained.updates, losses=loss)
    seconds = time.perf_counter() - began
    unit = forward_seconds(model, items)
    scale = 1 / (len(names) * unit) if unit else 0.0
    ordered = tuple(results[position] for position in range(len(names)))
    return state, EditInfo(ordered, seconds, fit_seconds, seconds * scale, fit_seconds * scale, 0)


def _reason(trained: _Trained, sound: bool, kept: bool, held: bool, settings: LocftSettings) -> str:
    """Why an edit does not hold, and how to mend it."""
    after = f"after {trained.updates} updates"
    if not sound:
        return f"the loss is not finite {after}, and nothing was kept; lower adam_rate, which is {settings.adam_rate:g}"
    if held:
        return "another request of this step does not hold, and nothing was kept; edit them one by one"
    fate = "the change was kept all the same" if kept else "nothing was kept"
    return f"its target does not come out {after}, and {fate}; raise epochs or adam_rate, or try another layer"


# --- resuming ---


def save_kernel(state: LocftState) -> Arrays:
    """The trained down projection, float32, and the edits as JSON in UTF-8.

    Args:
        state: after some steps.
    """
    kernel = np.asarray(jax.tree.leaves(state.trained)[0])
    return {"kernel": kernel, "requests": requests_to_array(state.requests)}


def restore_kernel(state: LocftState, arrays: Arrays) -> LocftState:
    """The inverse of `save_kernel`.

    Args:
        state: fresh, from ``init`` with the same settings and model.
        arrays: what was saved.

    Raises:
        TPatchError: the array belongs to another model.
    """
    kernel, shape = jnp.asarray(arrays["kernel"], jnp.float32), jax.tree.leaves(state.trained)[0].shape
    if kernel.shape != shape:
        raise TPatchError(f"the saved down projection is {kernel.shape} and the model's {shape}; take the same model")
    trained = _part(state.layer, kernel)
    requests = requests_from_array(arrays["requests"])
    return state._replace(trained=trained, edited=_edited(state.model, trained), requests=requests)


register_editor(
    Method(
        name="locft",
        presets=LOCFT_PRESETS,
        build=lambda settings, memory, cache, progress: locft(settings, progress=progress),
        model=lambda state: state.edited,
        save=save_kernel,
        restore=restore_kernel,
        check=check_locft,
        undo="none",
        stock_checkpoint=True,
    )
)
