"""Finetuning: makes a classifier of an encoder, or a question answerer of an encoder-decoder, for editing later."""

import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from tpatch_jax import ffn
from tpatch_jax.errors import TPatchError
from tpatch_jax.files import check_vacant, replace_folder, write_text
from tpatch_jax.finetuning_data import Example, Row, choose_labels, lessons, plan, read_data, tokenize
from tpatch_jax.finetuning_start import named_labels, read_start
from tpatch_jax.models import networks
from tpatch_jax.models.checkpoint import read_settings
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families import configure
from tpatch_jax.models.fingerprint import fingerprint
from tpatch_jax.models.model import Model, save_model
from tpatch_jax.models.sources import resolve_model

__all__ = ["FinetuneInfo", "FinetuneSettings", "finetune"]

Params = dict[Any, Any]
Report = Callable[[str, int, int], None]
Examples = str | Path | Sequence[tuple[str, str]]

RECORD = "tpatch_finetune.json"
"""In the folder of the model: how it was made. In the unfinished folder: what it belongs to."""

_SAVE_SECONDS = 120.0
_EPOCH_SECONDS = 15.0
"""Work of less than this is not worth a checkpoint at the end of an epoch."""

_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template.jinja", "generation_config.json"),
)


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
    checkpoint_steps: int = 0

    def __post_init__(self) -> None:
        """Checks the values."""
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0), ("checkpoint_steps", 0)):
            if getattr(self, name) < least:
                raise TPatchError(f"{name} is {getattr(self, name)}; give {least} or more")
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise TPatchError(f"{name} is {value}; give a positive number")
        if not 0 <= self.warmup < 1 or not 0 <= self.weight_decay < math.inf:
            raise TPatchError("warmup is a share of the steps, from 0 to below 1, and weight_decay is not negative")

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return self.learning_rate or (1e-3 if self.from_scratch else 5e-5)


@dataclass(frozen=True)
class FinetuneInfo:
    """What `finetune` did.

    Attributes:
        output: the folder of the model.
        examples: how many it was trained on.
        labels: what a classifier tells apart; empty of an encoder-decoder.
        steps: how many steps were taken, earlier runs included.
        epochs: how often each example was seen.
        losses: the mean loss of each epoch's steps, as it was before each.
        train_accuracy: the share of training examples that come out right: the label, or the whole answer token by
            token, which is what greedy generation gives.
        validation_accuracy: the same of the validation examples; ``None`` without any.
        seconds: the time of training, earlier runs included.
        resumed: after how many steps this run began; 0 is at the start.
    """

    output: Path
    examples: int
    labels: tuple[str, ...]
    steps: int
    epochs: int
    losses: tuple[float, ...]
    train_accuracy: float
    validation_accuracy: float | None
    seconds: float
    resumed: int = 0

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values; ``loss`` is that of the last epoch."""
        fields = dataclasses.asdict(self)
        return {**fields, "output": str(self.output), "loss": self.losses[-1], "seconds": round(self.seconds, 1)}


def finetune(
    model: str | Path | Model,
    examples: Examples,
    output: str | Path,
    *,
    settings: FinetuneSettings = FinetuneSettings(),
    validation: Examples = (),
    labels: Sequence[str] | None = None,
    prompt_field: str = "prompt",
    target_field: str = "target",
    dtype: str | None = None,
    progress: Report | None = None,
) -> FinetuneInfo:
    """Train a classifier or a question answerer and write its folder.

    AdamW on the mean cross-entropy ``-log p(answer | prompt)`` of labels or answer tokens, without dropout. Unfinished
    work is kept in ``OUTPUT.partial``: the same call goes on there and ends with the same bits.

    Args:
        model: an encoder with or without a classification head, or an encoder-decoder: its folder, a hub id, or a
            loaded `Model`. From scratch a folder with ``config.json`` is enough; without a tokenizer there, one is
            trained on the examples.
        examples: pairs of prompt and target, or a file with one JSON object a line. A classifier's targets are names
            of labels.
        output: the folder for the model; must not exist yet, or be empty.
        settings: how it is trained.
        validation: examples to measure on, like ``examples``.
        labels: what a classifier shall tell apart, in this order; examples of other labels are left out. By default
            the model's own if they name all that occur, else all that occur, sorted.
        prompt_field: the key of the prompt in files.
        target_field: the key of the target in files.
        dtype: ``"float32"`` (the default) or ``"bfloat16"`` for what is written; training is in float32.
        progress: called with what is being done, how much of it is done, and how much there is.

    Returns:
        The `FinetuneInfo`; `tpatch_jax.load_model` reads the folder.

    Raises:
        TPatchError: the model is a decoder, unknown or has no weights; the data are empty, malformed, too long or have
            other labels; the folder is taken, or its unfinished work is of another training; or the loss is not finite.

    Example:
        >>> pairs = [("The sun shines.", "dry"), ("It rains.", "wet")]
        >>> finetune("minilm", pairs, "weather").train_accuracy  # doctest: +SKIP
        1.0

    Source: Loshchilov and Hutter 2019 for AdamW; Huang et al. 2023, section 5.1, for the two tasks.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise TPatchError(f"dtype {dtype!r} is not supported; use 'float32' or 'bfloat16'")
    output = Path(output)
    check_vacant(output)
    data, held_out = (read_data(source, prompt_field, target_field) for source in (examples, validation))
    if not data.examples:
        raise TPatchError("there is no example to learn from; give one or more")
    start, chosen, asked = _begin(model, data.examples, held_out.examples, settings, labels)
    if held_out.examples and not asked:
        raise TPatchError(f"no validation example has one of the labels {', '.join(labels or ())}; give others")
    rows, asked_rows = tokenize(start, chosen), tokenize(start, asked)
    record = {
        "model": fingerprint(start),
        "labels": list(start.config.labels),
        "data": data.sha256,
        "validation": held_out.sha256 if asked else None,
        "tokens": hashlib.sha256(json.dumps([rows, asked_rows]).encode()).hexdigest(),
        "settings": {**dataclasses.asdict(settings), "learning_rate": settings.rate},
    }
    partial_folder = output.with_name(f"{output.name}.partial")
    run = _train(start, rows, settings, partial_folder, record, progress)
    kind = jnp.dtype(dtype or "float32")
    trained = start.with_params(jax.tree.map(lambda leaf: leaf.astype(kind), run.params))
    size, per_epoch = min(settings.batch_size, len(rows)), len(run.losses) // settings.epochs
    info = FinetuneInfo(
        output,
        len(rows),
        start.config.labels,
        len(run.losses),
        settings.epochs,
        tuple(float(np.mean(part)) for part in np.split(run.losses, settings.epochs)),
        _accuracy(trained, rows, size, "measuring", progress),
        _accuracy(trained, asked_rows, size, "validating", progress) if asked else None,
        run.seconds,
        run.resumed,
    )
    _write(trained, info, {**record, "steps_per_epoch": per_epoch})
    shutil.rmtree(partial_folder, ignore_errors=True)
    return info


def _begin(
    model: str | Path | Model,
    examples: Sequence[Example],
    validation: Sequence[Example],
    settings: FinetuneSettings,
    labels: Sequence[str] | None,
) -> tuple[Model, list[Example], list[Example]]:
    """The model to train and the examples that are used."""
    folder = None if isinstance(model, Model) else resolve_model(str(model))
    known = model.settings if isinstance(model, Model) else read_settings(Path(folder or ""))
    # The labels are not known yet; which kind of network it is does not depend on them.
    kind = configure({**known, "id2label": {"0": "0", "1": "1"}}).architecture
    if kind == "decoder":
        raise TPatchError(
            f"a {known['model_type']} is a decoder, and finetune makes classifiers of encoders and question answerers "
            "of encoder-decoders; use another tool for decoders"
        )
    chosen, asked = list(examples), list(validation)
    if kind == "encoder":
        names = choose_labels(examples, labels, named_labels(known))
        if labels is not None:
            chosen, asked = ([one for one in part if one.target.strip() in names] for part in (chosen, asked))
    elif labels is not None:
        raise TPatchError("labels are what a classifier tells apart, and this is an encoder-decoder; leave them out")
    else:
        names = None
    if not isinstance(model, Model):
        texts = (text for example in chosen for text in (example.prompt, example.target.strip()))
        folder = Path(folder or "")
        return read_start(folder, known, names, settings.from_scratch, texts, settings.seed), chosen, asked
    if settings.from_scratch or (names or ()) != model.config.labels:
        raise TPatchError("a loaded model is trained as it is; for other labels or from scratch give its folder")
    if any(ffn.attached(layer["ffn"]) for layer in model.params["layers"].values()):
        raise TPatchError("a patch is attached to the model; merge or detach it before training")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.params)
    return model.with_params(params), chosen, asked


# --- training ---


class _Run(NamedTuple):
    """What training gave."""

    params: Params
    losses: np.ndarray
    seconds: float
    resumed: int


def _logits(config: NetworkConfig, params: Params, batch: Any) -> Array:
    """`networks.apply`, but of a classifier's last FFN only what the head reads."""
    if not config.labels or not networks.pointwise(config):
        return networks.apply(config, params, batch)
    last, rows = config.layers - 1, batch.shape[0]
    traced = networks.trace(config, params, batch, last)
    first = networks.gather(traced, jnp.arange(rows), jnp.zeros(rows, jnp.int32))
    output = ffn.apply(params["layers"][last]["ffn"], first.query, config.activation)
    return networks.resume(config, params, first, output)


@lru_cache(maxsize=8)
def _optimizer(settings: FinetuneSettings, steps: int) -> optax.GradientTransformation:
    """The same object every time, so that ``jit`` recognises it."""
    warmup = max(1, round(settings.warmup * steps))

    def rate(step: Any) -> Array:
        # The last step still learns something, and so does the first.
        rising, falling = (step + 1) / warmup, (steps - step) / (steps - warmup + 1)
        return settings.rate * jnp.minimum(rising, falling)

    matrices = partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    decayed = optax.adamw(rate, weight_decay=settings.weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(settings.clip), decayed)


@partial(jax.jit, static_argnames=("config", "optimizer"), donate_argnames=("params", "state"))
def _step(
    config: NetworkConfig,
    optimizer: optax.GradientTransformation,
    params: Params,
    state: Any,
    batch: Any,
    answer: Array,
    weight: Array,
) -> tuple[Params, Any, Array]:
    """One step; the loss is NaN if it or the gradient is not finite."""

    def loss_of(params: Params) -> Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(_logits(config, params, batch), answer)
        return jnp.sum(losses * weight) / jnp.sum(weight)

    loss, gradient = jax.value_and_grad(loss_of)(params)
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
        found = json.loads((folder / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise TPatchError(f"{folder} is in the way and holds no unfinished training; remove it")
    # How often work is saved changes nothing in it.
    passed_over = {"settings": None, "checkpoint_steps": None}
    before, now = ({**entry, **entry.get("settings", {}), **passed_over} for entry in (found, record))
    if other := sorted(name for name in {*before, *now} if before.get(name) != now.get(name)):
        raise TPatchError(
            f"{folder} holds an unfinished training with other {', '.join(other)}; "
            "use the same model, data and settings to resume it, or remove that folder"
        )


def _train(
    start: Model,
    rows: Sequence[Row],
    settings: FinetuneSettings,
    folder: Path,
    record: dict[str, Any],
    progress: Report | None,
) -> _Run:
    import orbax.checkpoint as ocp

    config, size = start.config, min(settings.batch_size, len(rows))
    per_epoch = len(plan(rows, size))
    total = per_epoch * settings.epochs
    optimizer = _optimizer(settings, total)
    # The step donates its buffers, and those of the model are not ours.
    params = jax.tree.map(jnp.copy, start.params)
    state, losses, before = optimizer.init(params), np.zeros(total, np.float32), 0.0
    _claim(folder, record)
    with _manager(folder) as manager:

        def work(seconds: float) -> dict[str, Any]:
            return {"params": params, "state": state, "losses": losses, "seconds": np.asarray(seconds)}

        resumed = manager.latest_step() or 0
        if resumed:
            try:
                found = manager.restore(resumed, args=ocp.args.StandardRestore(work(0.0)))
            # orbax has errors of many kinds for a file that is cut short
            except Exception as error:
                raise TPatchError(f"{folder} is damaged ({error}); remove it and start again") from error
            params, state, losses = found["params"], found["state"], np.array(found["losses"])
            before = float(found["seconds"])
        began = saved = time.monotonic()
        for epoch in range(resumed // per_epoch, settings.epochs):
            batches = plan(rows, size, np.random.default_rng([settings.seed, epoch]))
            first = max(0, resumed - epoch * per_epoch)
            for done, lesson in enumerate(lessons(config, rows, size, batches[first:]), epoch * per_epoch + first + 1):
                params, state, loss = _step(config, optimizer, params, state, *lesson)
                losses[done - 1] = loss
                if not np.isfinite(losses[done - 1]):
                    kept = f"the work up to step {manager.latest_step()} is in {folder}; " * bool(manager.latest_step())
                    raise TPatchError(
                        f"the loss is not finite in step {done} of {total}; {kept}lower the learning rate, which is "
                        f"{settings.rate:g} (--learning-rate), and remove {folder} to start with another"
                    )
                if progress:
                    progress("training", done, total)
                now = time.monotonic()
                every = settings.checkpoint_steps
                due = done % every == 0 if every else now - saved >= _SAVE_SECONDS
                if due or (done % per_epoch == 0 and now - saved >= _EPOCH_SECONDS):
                    _save(manager, done, work(before + now - began), folder)
                    saved = time.monotonic()
        return _Run(params, losses, before + time.monotonic() - began, resumed)


def _save(manager: Any, done: int, work: dict[str, Any], folder: Path) -> None:
    import orbax.checkpoint as ocp

    try:
        manager.save(done, args=ocp.args.StandardSave(work))
    # a full disk is a ValueError from the store below orbax
    except (OSError, ValueError) as error:
        raise TPatchError(f"cannot write {folder}: {error}; free some room and try again") from error


# --- after training ---


@partial(jax.jit, static_argnames="config")
def _right(config: NetworkConfig, params: Params, batch: Any, answer: Array, weight: Array) -> Array:
    """Which rows come out whole: ``[rows]`` bool."""
    right = (jnp.argmax(_logits(config, params, batch), -1) == answer) | (weight == 0)
    return jnp.all(right.reshape(right.shape[0], -1), 1)


def _accuracy(model: Model, rows: Sequence[Row], size: int, what: str, progress: Report | None) -> float:
    batches = plan(rows, size)
    right = 0
    taught = lessons(model.config, rows, size, batches)
    for done, (bucket, lesson) in enumerate(zip(batches, taught, strict=True), 1):
        right += int(np.asarray(_right(model.config, model.params, *lesson))[: len(bucket.numbers)].sum())
        if progress:
            progress(what, done, len(batches))
    return right / len(rows)


def _write(model: Model, info: FinetuneInfo, record: dict[str, Any]) -> None:
    from transformers.models.auto import modeling_auto

    tables = (
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    )
    settings = {name: entry for name, entry in model.settings.items() if name != "_name_or_path"}
    settings["architectures"] = [tables[not info.labels][settings["model_type"]]]
    result = {name: entry for name, entry in info.to_json().items() if name not in ("output", "labels", "resumed")}
    with replace_folder(info.output) as temporary:
        save_model(dataclasses.replace(model, folder=None, settings=settings), temporary)
        if model.folder is None:
            model.tokenizer.save_pretrained(temporary)
        for path in sorted(model.folder.iterdir()) if model.folder else ():
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in _TOKENIZER_FILES):
                shutil.copyfile(path, temporary / path.name)
        write_text(temporary / RECORD, json.dumps({**record, **result}, indent=2) + "\n")
