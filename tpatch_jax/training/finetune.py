"""Finetuning: makes a classifier of an encoder, or a question answerer of an encoder-decoder, for editing later."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpatch_jax.core import ffn
from tpatch_jax.core.arguments import as_path, check_call, check_kind
from tpatch_jax.core.devices import automatically
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.checkpoints.folder import read_settings
from tpatch_jax.models.checkpoints.sources import resolve_model
from tpatch_jax.models.config import ImageInput
from tpatch_jax.models.families.registry import configure
from tpatch_jax.models.fingerprint import fingerprint
from tpatch_jax.models.inputs import image_contexts
from tpatch_jax.models.model import Model, save_model
from tpatch_jax.storage.files import check_vacant, replace_folder, write_text
from tpatch_jax.storage.image_file import named_labels as label_names
from tpatch_jax.storage.image_file import read_image_file
from tpatch_jax.storage.settings import change
from tpatch_jax.training.data import Data, Example, TrainingRow, choose_labels, read_data, tokenize
from tpatch_jax.training.loop import RECORD, FinetuneSettings, Report, accuracy, train
from tpatch_jax.training.start import named_labels, read_start

__all__ = ["FinetuneInfo", "FinetuneSettings", "finetune"]

Examples = str | Path | Sequence[tuple[str, str]]

_DEFAULT = FinetuneSettings()
_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template.jinja", "generation_config.json"),
)


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


@automatically
def finetune(
    model: str | Path | Model,
    examples: Examples,
    output: str | Path,
    *,
    settings: FinetuneSettings | Mapping[str, Any] = _DEFAULT,
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
            of labels. Of a model that reads images an ``.npz`` with ``train_images`` and ``train_labels``; its
            ``val_images`` are what is measured on unless ``validation`` says otherwise.
        output: the folder for the model; must not exist yet, or be empty.
        settings: how it is trained, or what to change in the defaults by name.
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
    call = "finetune(model, examples, output)"
    output = as_path(output, call, "a folder for the model; give its path")
    check_kind(model, str | Path | Model, call, "a model; give its folder, a hub id, or what load_model returned")
    settings = _as_settings(settings)
    if isinstance(labels, str):
        raise TPatchError(f"{call}: labels is one text; give a list of them")
    check_call(progress=progress)
    check_vacant(output)
    data = read_data(examples, prompt_field, target_field)
    if not isinstance(validation, str | Path) and not validation and data.numbered:
        # A file of pictures brings its own.
        held_out = read_data(examples, part="val") if "val" in read_image_file(str(examples)) else read_data(())
    else:
        held_out = read_data(validation, prompt_field, target_field, "val")
    if not data.examples:
        raise TPatchError("there is no example to learn from; give one or more")
    start, chosen, asked = _begin(model, data, held_out, settings, labels)
    if held_out.examples and not asked:
        raise TPatchError(f"no validation example has one of the labels {', '.join(labels or ())}; give others")
    rows, asked_rows = tokenize(start, chosen), tokenize(start, asked)
    image, used = start.config.image, dataclasses.asdict(settings)
    learnt = (
        rows if image is None else [*rows, *(c for row in rows for c in _copies(image, row, settings.image_copies))]
    )
    if image is None:
        del used["image_copies"], used["image_contrast"]
    record = {
        "model": fingerprint(start),
        "labels": list(start.config.labels),
        "data": data.sha256,
        "validation": held_out.sha256 if asked else None,
        "tokens": hashlib.sha256(json.dumps([rows, asked_rows]).encode()).hexdigest(),
        "settings": {**used, "learning_rate": settings.rate},
    }
    partial_folder = output.with_name(f"{output.name}.partial")
    run = train(start, learnt, settings, partial_folder, record, progress, len(learnt) // len(rows))
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
        accuracy(trained, rows, size, "measuring", progress),
        accuracy(trained, asked_rows, size, "validating", progress) if asked else None,
        run.seconds,
        run.resumed,
    )
    _write(trained, info, {**record, "steps_per_epoch": per_epoch})
    shutil.rmtree(partial_folder, ignore_errors=True)
    return info


def _copies(image: ImageInput, row: TrainingRow, count: int) -> list[TrainingRow]:
    """An example with its picture changed in so many ways."""
    return [row._replace(read=tuple(changed)) for changed in image_contexts(image, row.read, count)]


def _as_settings(settings: FinetuneSettings | Mapping[str, Any]) -> FinetuneSettings:
    if isinstance(settings, Mapping):
        return change(_DEFAULT, settings)
    check_kind(settings, FinetuneSettings, "finetune(…, settings=…)", "settings; give FinetuneSettings(epochs=3) or so")
    return settings


def _begin(
    model: str | Path | Model,
    data: Data,
    held_out: Data,
    settings: FinetuneSettings,
    labels: Sequence[str] | None,
) -> tuple[Model, list[Example], list[Example]]:
    """The model to train and the examples that are used."""
    folder = None if isinstance(model, Model) else resolve_model(str(model))
    known = model.settings if isinstance(model, Model) else read_settings(Path(folder or ""))
    names = named_labels(known) if labels is None else labels
    examples, validation = (_with_names(part, names) for part in (data, held_out))
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
    if ffn.any_attached(model.params):
        raise TPatchError("a patch is attached to the model; merge or detach it before training")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.params)
    return model.with_params(params), chosen, asked


def _with_names(data: Data, names: Sequence[str]) -> list[Example]:
    """The examples, whose targets are names of labels where they were numbers."""
    if not data.numbered:
        return list(data.examples)
    targets = label_names([example.target for example in data.examples], names)
    return [example._replace(target=target) for example, target in zip(data.examples, targets, strict=True)]


def _write(model: Model, info: FinetuneInfo, record: dict[str, Any]) -> None:
    from transformers import AutoConfig

    settings = {name: entry for name, entry in model.settings.items() if name != "_name_or_path"}
    # transformers has its table of network classes only where torch is; their names begin as those of configurations.
    family = type(AutoConfig.for_model(settings["model_type"])).__name__.removesuffix("Config")
    task = "ForSequenceClassification" if info.labels else "ForConditionalGeneration"
    settings["architectures"] = [family + (task if model.config.image is None else "ForImageClassification")]
    result = {name: entry for name, entry in info.to_json().items() if name not in ("output", "labels", "resumed")}
    with replace_folder(info.output) as temporary:
        save_model(dataclasses.replace(model, folder=None, settings=settings), temporary)
        if model.folder is None:
            model.tokenizer.save_pretrained(temporary)
        for path in sorted(model.folder.iterdir()) if model.folder else ():
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in _TOKENIZER_FILES):
                shutil.copyfile(path, temporary / path.name)
        write_text(temporary / RECORD, json.dumps({**record, **result}, indent=2) + "\n")
