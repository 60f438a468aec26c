"""What finetuning learns from: examples, their labels, and batches of few shapes."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tpatch_jax.core.arguments import describe
from tpatch_jax.core.sizes import round_up
from tpatch_jax.errors import TPatchError
from tpatch_jax.images import as_image
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.model import Model
from tpatch_jax.models.networks import Pair
from tpatch_jax.models.rows import ASK
from tpatch_jax.storage.image_file import PARTS, is_image_file, read_image_part
from tpatch_jax.storage.json_lines import read_json_lines
from tpatch_jax.storage.reading import read_bytes

__all__ = [
    "Bucket",
    "Data",
    "Example",
    "Lesson",
    "TrainingRow",
    "choose_labels",
    "lessons",
    "plan",
    "plan_pairs",
    "read_data",
    "tokenize",
]

STEP = 8
"""Of how many tokens the length of a batch is a multiple."""


class Example(NamedTuple):
    """A prompt and what the model shall answer.

    Attributes:
        prompt: what an encoder reads.
        target: the answer: a text, or the name of a label.
        where: where it stands, for messages.
    """

    prompt: str
    target: str
    where: str = ""


class Data(NamedTuple):
    """Examples and what identifies them.

    Attributes:
        examples: in order.
        sha256: of the file, or of what was given in code.
        numbered: whether targets are numbers of labels, as texts, as files of pictures may have them.
    """

    examples: tuple[Example, ...]
    sha256: str
    numbered: bool = False


class TrainingRow(NamedTuple):
    """An example in tokens.

    Attributes:
        read: what the encoder reads.
        begin: with what an encoder-decoder's answers begin; of a classifier nothing.
        answer: the answer's tokens, the one that ends it included; of a classifier the number of its label.
    """

    read: tuple[int, ...]
    begin: tuple[int, ...]
    answer: tuple[int, ...]


class Bucket(NamedTuple):
    """Rows that are padded to the same lengths.

    Attributes:
        numbers: which rows.
        read: the length of what the encoder reads.
        written: the length of what the decoder reads; 0 of a classifier.
    """

    numbers: np.ndarray
    read: int
    written: int


class Lesson(NamedTuple):
    """A batch and what should come out.

    Attributes:
        batch: what the network is run on: ``[rows, read]``, or a `Pair` with ``[rows, written]``.
        answer: ``[rows]`` labels, or ``[rows, written]`` tokens, each at the position that says it.
        weight: 1 where an answer counts and 0 at padding, shaped like ``answer``.
    """

    batch: Any
    answer: np.ndarray
    weight: np.ndarray


def read_data(
    source: str | Path | Sequence[tuple[Any, str]],
    prompt_field: str = "prompt",
    target_field: str = "target",
    part: str = "train",
) -> Data:
    """Examples from a file with one JSON object a line, or from pairs given in code.

    Args:
        source: the file, UTF-8, empty lines are passed over; an ``.npz`` of pictures (see
            `tpatch_jax.storage.image_file`); or pairs of prompt and target.
        prompt_field: the key of the prompt; keys that are not asked for may be there, too.
        target_field: the key of the target.
        part: of an ``.npz`` which part is wanted; another one with pictures serves too.

    Returns:
        The `Data`.

    Raises:
        TPatchError: the file cannot be read, or a line is no such object; the message names the line.

    Example:
        >>> read_data([("Paris is in", "France")]).examples[0]
        Example(prompt='Paris is in', target='France', where='example 0')
    """
    if not isinstance(source, str | Path):
        if isinstance(source, Mapping | bytes) or not isinstance(source, Iterable):
            raise TPatchError(f"{describe(source)} is no examples; give pairs of prompt and target, or a file of them")
        examples = []
        for number, pair in enumerate(source):
            if not isinstance(pair, tuple | list) or len(pair) < 2:
                raise TPatchError(f"example {number} is {describe(pair)}; give a pair of prompt and target")
            prompt = pair[0] if isinstance(pair[0], str) else as_image(pair[0], f"example {number}")
            record = {"prompt": prompt, "target": pair[1]}
            examples.append(_example(record, ("prompt", "target"), f"example {number}"))
        text = json.dumps([[example.prompt, example.target] for example in examples])
        return Data(tuple(examples), hashlib.sha256(text.encode()).hexdigest())
    if is_image_file(source):
        chosen = read_image_part(source, (part, *PARTS))
        pairs = zip(chosen.images, chosen.labels, strict=True)
        examples = [Example(*pair, f"{source}, {chosen.name}_images {number}") for number, pair in enumerate(pairs)]
        return Data(tuple(examples), hashlib.sha256(read_bytes(source)).hexdigest(), True)
    path, fields = Path(source), (prompt_field, target_field)
    examples = [_example(line.value, fields, line.where) for line in read_json_lines(path, "object")]
    if not examples:
        raise TPatchError(f"{path} holds no example; put one JSON object a line, with {prompt_field!r} and the like")
    return Data(tuple(examples), hashlib.sha256(read_bytes(path)).hexdigest())


def _example(record: Any, fields: tuple[str, str], where: str) -> Example:
    if not isinstance(record, dict):
        raise TPatchError(f"{where}: {type(record).__name__} instead of an object with {fields[0]!r} and {fields[1]!r}")
    for option, name in zip(("--prompt-field", "--target-field"), fields, strict=True):
        if name not in record:
            raise TPatchError(f"{where}: no {name!r}; add it, or name the key that stands for it with {option}")
        if not isinstance(record[name], str) or not record[name].strip():
            raise TPatchError(f"{where}: {name!r} must be a string with something in it")
        if re.search("[\ud800-\udfff]", record[name]):
            raise TPatchError(f"{where}: {name!r} holds half of a surrogate pair; write that character whole")
    return Example(record[fields[0]], record[fields[1]], where)


def choose_labels(
    examples: Sequence[Example], wanted: Sequence[str] | None = None, known: Sequence[str] = ()
) -> tuple[str, ...]:
    """What a classifier shall tell apart.

    Args:
        examples: their targets are names of labels.
        wanted: these labels in this order.
        known: the labels that the model has; they stay if they name all that occur, for its head knows them.

    Returns:
        The labels: those wanted, or the model's, or all that occur, sorted.

    Raises:
        TPatchError: fewer than two labels, or one is wanted twice or never occurs.

    Example:
        >>> choose_labels([Example("It rains.", "wet"), Example("The sun shines.", "dry")])
        ('dry', 'wet')
    """
    targets = sorted({example.target.strip() for example in examples})
    shown = ", ".join(targets[:8]) + (", …" if len(targets) > 8 else "")
    if wanted is None:
        labels = tuple(known) if set(targets) <= set(known) else tuple(targets)
    else:
        labels = tuple(label.strip() for label in wanted)
        for label in labels:
            if labels.count(label) > 1:
                raise TPatchError(f"the label {label!r} is wanted twice; name each once")
            if label not in targets:
                raise TPatchError(f"no example has the label {label!r}; those of the data are {shown}")
    if len(labels) < 2:
        raise TPatchError(f"a classifier tells two labels or more apart; those of the data are {shown}")
    return labels


def tokenize(model: Model, examples: Sequence[Example]) -> list[TrainingRow]:
    """Examples in tokens.

    Args:
        model: a classifier or an encoder-decoder.
        examples: prompts and targets.

    Raises:
        TPatchError: an example is too long for the model, or its target is none of the labels.
    """
    rows = []
    for example in examples:
        try:
            prompt = model.encode_prompt(example.prompt)
            answer = model.encode_target(example.prompt, example.target)
        except TPatchError as error:
            raise TPatchError(f"{example.where}: {error}") from None
        if reason := model.excess(prompt, answer):
            raise TPatchError(f"{example.where}: {reason}")
        ask = prompt.index(ASK)
        rows.append(TrainingRow(tuple(prompt[:ask]), tuple(prompt[ask + 1 :]), tuple(answer)))
    return rows


def _lengths(row: TrainingRow) -> tuple[int, int]:
    written = len(row.begin) + len(row.answer) - 1
    return round_up(len(row.read), STEP), round_up(written, STEP) if row.begin else 0


def buckets(rows: Sequence[TrainingRow], size: int) -> list[Bucket]:
    """Rows of like lengths together, at least ``size`` of them where there are so many, so that few shapes occur."""
    by_length: dict[tuple[int, int], list[int]] = {}
    for number, row in enumerate(rows):
        by_length.setdefault(_lengths(row), []).append(number)
    buckets, numbers, lengths = [], [], (0, 0)
    for read, written in sorted(by_length):
        numbers += by_length[read, written]
        lengths = max(lengths[0], read), max(lengths[1], written)
        if len(numbers) >= size:
            buckets.append(Bucket(np.asarray(numbers), *lengths))
            numbers, lengths = [], (0, 0)
    return buckets + ([Bucket(np.asarray(numbers), *lengths)] if numbers else [])


def plan(rows: Sequence[TrainingRow], size: int, shuffle: np.random.Generator | None = None) -> list[Bucket]:
    """Which rows stand in which batch of an epoch; as many batches in each.

    Args:
        rows: examples in tokens.
        size: how many rows are in a batch, at most.
        shuffle: draws the order of rows and batches; otherwise it is that of the lengths.
    """
    batches = []
    for bucket in buckets(rows, size):
        numbers = bucket.numbers if shuffle is None else shuffle.permutation(bucket.numbers)
        batches += [bucket._replace(numbers=numbers[first : first + size]) for first in range(0, len(numbers), size)]
    return batches if shuffle is None else [batches[number] for number in shuffle.permutation(len(batches))]


def plan_pairs(
    rows: Sequence[TrainingRow], forms: int, size: int, shuffle: np.random.Generator | None = None
) -> list[Bucket]:
    """`plan` for pictures of one size, of which each batch holds some in two forms: the first forms, then the second.

    In an epoch each form of each picture stands in a batch, and some once more: those that make up an even number of
    forms, and those that fill the last batch.

    Args:
        rows: all pictures in their first form, then the other forms of the first picture, of the second, and so on.
        forms: how many of each there are, two or more.
        size: how many pictures are in a batch, at most as many as there are.
        shuffle: draws the order and which forms go together.

    Example:
        >>> rows = [TrainingRow((0,), (), (0,))] * 8
        >>> [batch.numbers.tolist() for batch in plan_pairs(rows, 2, 2)]
        [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    count, (read, written) = len(rows) // forms, _lengths(rows[0])
    order = np.tile(np.arange(forms), (count, 1))
    if shuffle is not None:
        order = shuffle.permuted(order, axis=1)
    order = np.concatenate([order, order[:, :1]], 1)
    batches = []
    for first in range(0, forms, 2):
        pictures = np.arange(count) if shuffle is None else shuffle.permutation(count)
        for part in np.resize(pictures, (-(-count // size), size)):
            form = order[part, first : first + 2].T
            numbers = np.where(form == 0, part, count + part * (forms - 1) + form - 1)
            batches.append(Bucket(numbers.reshape(-1), read, written))
    return batches


def lessons(
    config: NetworkConfig, rows: Sequence[TrainingRow], size: int, batches: Sequence[Bucket]
) -> Iterator[Lesson]:
    """The batches of a `plan` as arrays of ``size`` rows each; rows that are missing have weight 0.

    Args:
        config: the network's description.
        rows: examples in tokens.
        size: how many rows every batch has.
        batches: from `plan`.

    Yields:
        A `Lesson` each; of an encoder-decoder it reads ``[*begin, *answer[:-1]]`` and should say ``answer``.
    """
    for bucket in batches:
        read = np.full((size, bucket.read), ASK, np.int32)
        # A row of padding alone would have attention see nothing.
        read[:, 0] = 0
        shape = (size, bucket.written) if config.encoder else (size,)
        written, answer, weight = (np.zeros(shape, kind) for kind in (np.int32, np.int32, np.float32))
        for slot, number in enumerate(bucket.numbers):
            row = rows[number]
            read[slot, : len(row.read)] = row.read
            if not config.encoder:
                answer[slot], weight[slot] = row.answer[0], 1
                continue
            inputs = [*row.begin, *row.answer[:-1]]
            said = slice(len(row.begin) - 1, len(inputs))
            written[slot, : len(inputs)] = inputs
            answer[slot, said], weight[slot, said] = row.answer, 1
        yield Lesson(Pair(read, written) if config.encoder else read, answer, weight)  # pyright: ignore
