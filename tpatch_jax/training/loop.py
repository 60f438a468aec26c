"""The loop of fine-tuning: its settings, its steps, its checkpoints, and how much comes out right."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float

from tpatch_jax.core.checks import check_range, check_types
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import networks
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.model import Model
from tpatch_jax.storage.files import write_text
from tpatch_jax.training.data import Bucket, Lesson, TrainingRow, lessons, plan, plan_pairs
from tpatch_jax.typing import Params

__all__ = [
    "RECORD",
    "FinetuneSettings",
    "Report",
    "Run",
    "accuracy",
    "contrastive_loss",
    "cross_entropy_loss",
    "learn",
    "logits",
    "make_optimizer",
    "right_rows",
    "take_step",
    "train",
]

Report = Callable[[str, int, int], None]
Loss = Callable[..., Array]
"""From what is trained and the parts of a lesson to a number; compiled once for each object."""

RECORD = "tpatch_finetune.json"
"""In the folder of the model: how it was made. In the unfinished folder: what it belongs to."""

_SAVE_SECONDS = 120.0
_EPOCH_SECONDS = 15.0
"""Work of less than this is not worth a checkpoint at the end of an epoch."""


@dataclass(frozen=True)
class FinetuneSettings:
    """How a model is trained.

    Attributes:
        epochs: how often each example is seen.
        batch_size: examples a step.
        learning_rate: the highest; ``None`` is 5e-5, or 1e-3 from scratch.
        seed: the same seed gives the same weights.
        from_scratch: start from random weights, for which a ``config.json`` is enough.
        weight_decay: of matrices and embeddings.
        warmup: the share of steps in which the learning rate rises; then it falls to 0, both linearly.
        clip: the longest gradient.
        image_copies: of images so many changed copies of each are learnt as well: moved, turned, brighter or darker,
            noisy; see `tpatch_jax.models.inputs.image_contexts`.
        image_contrast: weight of `contrastive_loss` on the queries of the last layer, where patches recognise a
            picture: copies of one shall be alike and those of others different. Each step then takes its examples in
            two forms. Without copies, or at 0, there is none.
        checkpoint_steps: work is saved every so many steps; 0 is every two minutes. It also is at the end of an epoch,
            unless it was in the 15 seconds before.

    Raises:
        TPatchError: a value makes no sense.
    """

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float | None = None
    seed: int = 0
    from_scratch: bool = False
    weight_decay: float = 0.01
    warmup: float = 0.06
    clip: float = 1.0
    image_copies: int = 9
    image_contrast: float = 1.0
    checkpoint_steps: int = 0

    def __post_init__(self) -> None:
        """Checks the values."""
        check_types(self)
        check_range(self, ("epochs", "batch_size"), 1)
        check_range(self, ("seed", "image_copies", "checkpoint_steps"), 0)
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int | float) or not 0 < value < math.inf):
                raise TPatchError(f"{name} is {value}; give a positive number")
        check_range(self, ("image_contrast",), 0.0)
        if not 0 <= self.warmup < 1 or not 0 <= self.weight_decay < math.inf:
            raise TPatchError("warmup is a share of the steps, from 0 to below 1, and weight_decay is not negative")

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return self.learning_rate or (1e-3 if self.from_scratch else 5e-5)


class Run(NamedTuple):
    """What training gave.

    Attributes:
        params: the trained parameters.
        losses: of each step, ``[steps]``.
        seconds: earlier runs included.
        resumed: after how many steps this run began.
    """

    params: Params
    losses: np.ndarray
    seconds: float
    resumed: int


def logits(config: NetworkConfig, params: Params, batch: Any) -> Array:
    """`networks.apply`, but of a classifier's last FFN only what the head reads."""
    if not config.labels or not networks.pointwise(config):
        return networks.apply(config, params, batch)
    return _decide(config, params, batch)[0]


def _decide(config: NetworkConfig, params: Params, batch: Any) -> tuple[Array, Array]:
    """A classifier's logits, and the last layer's query where the label is decided, or its mean: ``[rows, d]``."""
    last, rows = config.layers - 1, batch.shape[0]
    traced = networks.trace(config, params, batch, last)
    if networks.pointwise(config):
        traced = networks.gather(traced, jnp.arange(rows), jnp.zeros(rows, jnp.int32))
    output = networks.feed_forward(config, config.kind(last), params["layers"][last], traced.query)
    return networks.resume(config, params, traced, output), traced.query.mean(1)


@lru_cache(maxsize=8)
def make_optimizer(settings: FinetuneSettings, steps: int) -> optax.GradientTransformation:
    """The same object every time, so that ``jit`` recognises it."""
    warmup = max(1, round(settings.warmup * steps))

    def rate(step: Any) -> Array:
        # The last step still learns something, and so does the first.
        rising, falling = (step + 1) / warmup, (steps - step) / (steps - warmup + 1)
        return settings.rate * jnp.minimum(rising, falling)

    matrices = partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    decayed = optax.adamw(rate, weight_decay=settings.weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(settings.clip), decayed)


@lru_cache(maxsize=8)
def cross_entropy_loss(config: NetworkConfig) -> Loss:
    """The mean cross-entropy of labels or answer tokens, the same object every time."""

    def loss_of(params: Params, batch: Any, answer: Array, weight: Array) -> Array:
        return _mean_cross_entropy(logits(config, params, batch), answer, weight)

    return loss_of


def _mean_cross_entropy(said: Array, answer: Array, weight: Array) -> Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(said, answer)
    return jnp.sum(losses * weight) / jnp.sum(weight)


TEMPERATURE = 0.1


def contrastive_loss(query: Float[Array, "rows d"]) -> Float[Array, ""]:
    """How hard it is to tell the other form of each row: ``-log softmax(cos(qᵢ, qⱼ)/τ)``, mean over all rows.

    Row ``i`` of the first half and row ``i`` of the second are two forms of the same; all others are others.

    Args:
        query: ``[2·n, d]``.

    Example:
        >>> float(contrastive_loss(jnp.tile(jnp.eye(4), (2, 1)))) < 1e-3
        True

    Source: Chen et al. 2020, the NT-Xent loss; without their projection, for a key reads the query itself.
    """
    rows = query.shape[0]
    unit = query * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(query), -1, keepdims=True), 1e-12))
    alike = unit @ unit.T / TEMPERATURE
    alike = jnp.where(jnp.eye(rows, dtype=bool), -jnp.inf, alike)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(alike, jnp.roll(jnp.arange(rows), rows // 2)))


@lru_cache(maxsize=8)
def _contrasted(config: NetworkConfig, contrast: float) -> Loss:
    """The mean cross-entropy of labels and `contrastive_loss`, the same object every time."""

    def loss_of(params: Params, batch: Any, answer: Array, weight: Array) -> Array:
        said, query = _decide(config, params, batch)
        return _mean_cross_entropy(said, answer, weight) + contrast * contrastive_loss(query)

    return loss_of


@partial(jax.jit, static_argnames=("loss_of", "optimizer"), donate_argnames=("params", "state"))
def take_step(
    loss_of: Loss, optimizer: optax.GradientTransformation, params: Params, state: Any, lesson: Sequence[Any]
) -> tuple[Params, Any, Array]:
    """One step; the loss is NaN if it or the gradient is not finite."""
    loss, gradient = jax.value_and_grad(loss_of)(params, *lesson)
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((loss, gradient))]))
    updates, state = optimizer.update(gradient, state, params)
    params = jax.tree.map(jnp.add, params, updates)
    return params, state, jnp.where(finite, loss, jnp.nan)


def _manager(folder: Path) -> Any:
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder.absolute() / "steps", options=options)


def _claim(folder: Path, record: dict[str, Any]) -> None:
    """Begin unfinished work in a folder, or make sure that what is there belongs to this training."""
    if not folder.exists():
        try:
            folder.mkdir(parents=True)
            write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")
        except OSError as error:
            raise TPatchError(f"cannot write {folder}: {error.strerror}; choose another output folder") from error
        return
    try:
        saved = json.loads((folder / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        saved = None
    if not isinstance(saved, dict):
        raise TPatchError(f"{folder} is in the way and holds no unfinished training; remove it")
    # How often work is saved changes nothing in it.
    passed_over = {"settings": None, "checkpoint_steps": None}
    before, now = ({**entry, **entry.get("settings", {}), **passed_over} for entry in (saved, record))
    if other := sorted(name for name in {*before, *now} if before.get(name) != now.get(name)):
        raise TPatchError(
            f"{folder} holds an unfinished training with other {', '.join(other)}; "
            "use the same model, data and settings to resume it, or remove that folder"
        )


def train(
    start: Model,
    rows: Sequence[TrainingRow],
    settings: FinetuneSettings,
    folder: Path,
    record: dict[str, Any],
    progress: Report | None,
    forms: int = 1,
) -> Run:
    """Train on labels or answers, from where unfinished work ends.

    Args:
        start: the model to start from.
        rows: examples in tokens; of pictures in several forms all in their first, then each one's others.
        settings: how it is trained.
        folder: for unfinished work.
        record: what that work belongs to.
        progress: called with what is being done, how much of it is done, and how much there is.
        forms: in how many forms each picture is there.

    Returns:
        The `Run`.

    Raises:
        TPatchError: the folder's work is of another training or damaged, or the loss is not finite.
    """
    config, size = start.config, min(settings.batch_size, len(rows))
    contrasted = forms > 1 and settings.image_contrast > 0
    if contrasted:
        size = 2 * min(settings.batch_size, len(rows) // forms)

    def planned(shuffle: np.random.Generator | None = None) -> list[Bucket]:
        return plan_pairs(rows, forms, size // 2, shuffle) if contrasted else plan(rows, size, shuffle)

    def taught(epoch: int, first: int) -> Iterator[Lesson]:
        batches = planned(np.random.default_rng([settings.seed, epoch]))
        return lessons(config, rows, size, batches[first:])

    loss_of = _contrasted(config, settings.image_contrast) if contrasted else cross_entropy_loss(config)
    return learn(start.params, loss_of, len(planned()), taught, settings, folder, record, progress)


def learn(
    start: Params,
    loss_of: Loss,
    per_epoch: int,
    lessons: Callable[[int, int], Iterable[Sequence[Any]]],
    settings: FinetuneSettings,
    folder: Path,
    record: dict[str, Any],
    progress: Report | None,
    what: str = "training",
) -> Run:
    """Minimise any loss, from where unfinished work ends.

    Args:
        start: what is trained, as it is at first; not changed.
        loss_of: ``(params, *lesson) -> loss``; give the same object every time.
        per_epoch: how many lessons an epoch has.
        lessons: ``(epoch, first) -> lessons`` of that epoch from the ``first`` on, the same whenever it is asked.
        settings: how it is trained.
        folder: for unfinished work.
        record: what that work belongs to.
        progress: called with what is being done, how much of it is done, and how much there is.
        what: what is being done.

    Returns:
        The `Run`.

    Raises:
        TPatchError: the folder's work is of another training or damaged, or the loss is not finite.
    """
    import orbax.checkpoint as ocp

    total = per_epoch * settings.epochs
    optimizer = make_optimizer(settings, total)
    # The step donates its buffers, and those of the model are not ours.
    params = jax.tree.map(jnp.copy, start)
    state, losses, before = optimizer.init(params), np.zeros(total, np.float32), 0.0
    _claim(folder, record)
    with _manager(folder) as manager:

        def work(seconds: float) -> dict[str, Any]:
            return {"params": params, "state": state, "losses": losses, "seconds": np.asarray(seconds)}

        resumed = manager.latest_step() or 0
        if resumed:
            try:
                restored = manager.restore(resumed, args=ocp.args.StandardRestore(work(0.0)))
            # orbax has errors of many kinds for a file that is cut short
            except Exception as error:
                raise TPatchError(f"{folder} is damaged ({error}); remove it and start again") from error
            params, state, losses = restored["params"], restored["state"], np.array(restored["losses"])
            before = float(restored["seconds"])
        began = saved = time.monotonic()
        for epoch in range(resumed // per_epoch, settings.epochs):
            first = max(0, resumed - epoch * per_epoch)
            for done, lesson in enumerate(lessons(epoch, first), epoch * per_epoch + first + 1):
                params, state, loss = take_step(loss_of, optimizer, params, state, tuple(lesson))
                losses[done - 1] = loss
                if not np.isfinite(losses[done - 1]):
                    kept = f"the work up to step {manager.latest_step()} is in {folder}; " * bool(manager.latest_step())
                    raise TPatchError(
                        f"the loss is not finite in step {done} of {total}; {kept}lower the learning rate, which is "
                        f"{settings.rate:g} (--learning-rate), and remove {folder} to start with another"
                    )
                if progress:
                    progress(what, done, total)
                now = time.monotonic()
                every = settings.checkpoint_steps
                due = done % every == 0 if every else now - saved >= _SAVE_SECONDS
                if due or (done % per_epoch == 0 and now - saved >= _EPOCH_SECONDS):
                    _save(manager, done, work(before + now - began), folder)
                    saved = time.monotonic()
        return Run(params, losses, before + time.monotonic() - began, resumed)


def _save(manager: Any, done: int, work: dict[str, Any], folder: Path) -> None:
    import orbax.checkpoint as ocp

    try:
        manager.save(done, args=ocp.args.StandardSave(work))
    # a full disk is a ValueError from the store below orbax
    except (OSError, ValueError) as error:
        raise TPatchError(f"cannot write {folder}: {error}; free some room and try again") from error


@partial(jax.jit, static_argnames="config")
def right_rows(config: NetworkConfig, params: Params, batch: Any, answer: Array, weight: Array) -> Array:
    """Which rows come out whole: ``[rows]`` bool."""
    right = (jnp.argmax(logits(config, params, batch), -1) == answer) | (weight == 0)
    return jnp.all(right.reshape(right.shape[0], -1), 1)


def accuracy(model: Model, rows: Sequence[TrainingRow], size: int, what: str, progress: Report | None) -> float:
    """The share of examples that come out right: the label, or every token of the answer."""
    batches = plan(rows, size)
    right = 0
    taught = lessons(model.config, rows, size, batches)
    for done, (bucket, lesson) in enumerate(zip(batches, taught, strict=True), 1):
        right += int(np.asarray(right_rows(model.config, model.params, *lesson))[: len(bucket.numbers)].sum())
        if progress:
            progress(what, done, len(batches))
    return right / len(rows)
