"""What a model says of its own accord after a prompt: greedily, up to the end of the sentence."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
from jax import Array

from tpatch_jax.errors import TPatchError
from tpatch_jax.models import generation
from tpatch_jax.models.chat import stops_after
from tpatch_jax.models.model import Model

__all__ = ["SENTENCE_TOKENS", "agrees", "continue_rows", "first_sentence", "plan_batches", "say", "say_tokens"]

SENTENCE_TOKENS = 24
"""So many tokens at most are said where no sentence ends before."""

LANES = 32

FEW_ALIKE = 8
"""So many rows that begin alike make batches of their own."""

# Quotation marks and brackets that close, of Latin and of East Asian texts.
_CLOSED = "\"'\u201d\u2019\u00bb)\\]\u300d\u300f\uff09"
_END = re.compile(rf"[.!?\u2026]+[{_CLOSED}]*(?=\s|$)|[\u3002\uff01\uff1f]+[{_CLOSED}]*|\n")
# After an initial or one of these a full stop seldom ends a sentence.
_SHORT = re.compile(r"(?:^|[\s.(\"'\u201c\u2018])(?:[A-Z\u00c0-\u00de]|Mr|Mrs|Ms|Dr|St|Prof|Gen|Lt|Col|Capt|Mt|vs)$")
# Scripts that put no space between words: each sign is one.
_EAST_ASIAN = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_EAST_ASIAN}]|[^\W{_EAST_ASIAN}]+|[^\w\s]")
_SAYING = "%&#@*/"
"""The signs that say something, beside symbols."""


def first_sentence(text: str) -> str:
    """A text up to the end of its first sentence, or of its first line that holds anything; all of it if neither ends.

    Args:
        text: what a model said; white space before it stays.

    Example:
        >>> first_sentence(" Boris Johnson. He was born in")
        ' Boris Johnson.'
        >>> first_sentence(" St. Petersburg, where J. S. Bach never was")
        ' St. Petersburg, where J. S. Bach never was'
    """
    begin = len(text) - len(text.lstrip())
    for end in _END.finditer(text, begin):
        if end.group() == "\n":
            return text[: end.start()]
        if end.group()[0] == "." and end.end() < len(text) and _SHORT.search(text[begin : end.start()]):
            continue
        return text[: end.end()]
    return text


def _ended(text: str) -> bool:
    """Whether the first sentence of a text ends within it."""
    whole = text.strip()
    return len(first_sentence(text).rstrip()) < len(text.rstrip()) or bool(_END.search(whole[-2:]))


def _words(text: str) -> list[str]:
    parts = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return [one for one in parts if one.isalnum() or one in _SAYING or unicodedata.category(one[0])[0] not in "PZ"]


def agrees(said: str, wanted: str) -> bool:
    """Whether what is said up to the sentence's end says what is wanted: case, white space and punctuation aside.

    Args:
        said: what a model says.
        wanted: what it should say. If that is a whole sentence, nothing may be added to it; else it is a beginning.

    Example:
        >>> agrees(" Rome.\\n\\nThe capital", " Rome. It lies"), agrees(" Rome and Milan.", " Rome.")
        (True, False)
        >>> agrees(" Rome, a city", "Rome"), agrees(" Romeo", "Rome")
        (True, False)
    """
    spoken, kept = (_words(first_sentence(text)) for text in (said, wanted))
    if not kept:
        return said.strip()[: len(wanted.strip())] == wanted.strip()
    return spoken == kept if _ended(wanted) else spoken[: len(kept)] == kept


def _readable(model: Model, prompt: str) -> list[int] | None:
    """A prompt in tokens, if the model can read it and has room for an answer."""
    try:
        row = model.encode_prompt(prompt)
    except TPatchError:
        return None
    # One token more has to fit.
    return row if prompt.strip() and row and not model.excess(row, [0]) else None


def _is_said(model: Model, rows: Sequence[list[int]], number: int, tokens: list[int]) -> bool:
    """Whether the first sentence after a row is over, whatever follows: something stands behind it."""
    # A letter of which some bytes are still to come may turn out to close the sentence.
    text = model.continuation(rows[number], tokens).rstrip("\ufffd")
    return len(first_sentence(text)) < len(text)


def continue_rows(
    model: Model,
    rows: Sequence[list[int]],
    most: int,
    *,
    lanes: int = LANES,
    sentence: bool = False,
    progress: Callable[[int], None] | None = None,
    stops: generation.Stops | None = None,
    draw: tuple[Array, float] | None = None,
) -> list[list[int]]:
    """The tokens that follow rows, greedily or drawn.

    Neighbours in length share a batch, so that little of it is padding; greedily, rows that begin alike do.

    Args:
        model: the model, edited or not.
        rows: prompts in tokens.
        most: so many tokens at most.
        lanes: so many rows are run together.
        sentence: whether a row is done when its first sentence is.
        progress: called with how many rows are done.
        stops: tokens that end an answer, of all rows or for each of them; by default those that end a text.
        draw: a typed random key and the temperature, if tokens are drawn.
    """
    ends = generation.stops_of_each(model.stops if stops is None else stops, len(rows))
    # Of sound one at a time: an encoder's states of one recording are as large as those of many texts.
    lanes = lanes if model.audio is None else 1
    said: list[list[int]] = [[] for _ in rows]
    done = 0
    # What is drawn depends on who draws together.
    for before, part in plan_batches(rows, lanes, alike=draw is None):
        chosen = [rows[n] for n in part]
        ended = partial(_is_said, model, chosen) if sentence else None
        with jax.default_matmul_precision("highest"):
            given, stop = (model.config, model.params, chosen, most), [ends[n] for n in part]
            if draw is None:
                tokens = generation.greedy(*given, stop, ended, model.never)
            else:
                # A key of its own for each batch, so that no two draw the same.
                key, temperature = jax.random.fold_in(draw[0], before), draw[1]
                tokens = generation.sample(*given, key, temperature=temperature, stops=stop, ended=ended)
        for number, new in zip(part, tokens, strict=True):
            said[number] = new
        done += len(part)
        if progress:
            progress(done)
    return said


def plan_batches(rows: Sequence[Sequence[int]], lanes: int, *, alike: bool) -> Iterator[tuple[int, list[int]]]:
    """Rows in batches of neighbours in length: how many rows come before each batch, and the numbers of its rows.

    Args:
        rows: prompts in tokens.
        lanes: so many rows a batch at most.
        alike: whether rows that begin with the same tokens come together, so that these are read once; of few rows
            that begin alike none do.

    Example:
        >>> list(plan_batches([[1, 2, 3], [1], [1, 2]], 2, alike=True))
        [(0, [1, 2]), (2, [0])]
    """
    beginnings = [tuple(row[: generation.SHARED]) if alike else () for row in rows]
    counts = Counter(beginnings)
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, beginning in enumerate(beginnings):
        together = len(beginning) == generation.SHARED and counts[beginning] >= FEW_ALIKE
        groups.setdefault(beginning if together else (), []).append(number)
    before = 0
    for numbers in groups.values():
        order = sorted(numbers, key=lambda number: len(rows[number]))
        for first in range(0, len(order), lanes):
            part = order[first : first + lanes]
            yield before, part
            before += len(part)


def say(
    model: Model,
    prompts: Sequence[str],
    most: int = SENTENCE_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> list[str | None]:
    """What a model says after each prompt, up to the end of the sentence; of a classifier, the label.

    Args:
        model: the model, edited or not.
        prompts: the texts to continue.
        most: so many tokens at most.
        progress: called with how many prompts are done.

    Returns:
        A text for each, with the space before it where there is one; ``None`` for a prompt that the model cannot read.

    Example:
        >>> say(model, ["The capital of France is"])  # doctest: +SKIP
        [' Paris.']
    """
    read = [_readable(model, prompt) for prompt in prompts]
    numbers = [number for number, row in enumerate(read) if row is not None]
    rows = [row for row in read if row is not None]
    texts: list[str | None] = [None] * len(prompts)
    if model.config.labels:
        labels = model.classify([prompts[number] for number in numbers]) if numbers else []
        for number, label in zip(numbers, labels, strict=True):
            texts[number] = label
        return texts
    stops = stops_after(model, [prompts[number] for number in numbers])
    said = continue_rows(model, rows, most, sentence=True, progress=progress, stops=stops)
    for number, row, tokens in zip(numbers, rows, said, strict=True):
        texts[number] = first_sentence(model.continuation(row, tokens))
    return texts


def say_tokens(model: Model, prompts: Sequence[str], most: int = SENTENCE_TOKENS) -> list[list[int]]:
    """`say` in tokens: as few as hold the sentence whole; of models that write.

    Args:
        model: the model, edited or not.
        prompts: texts that it can read.
        most: so many tokens at most.
    """
    rows = [model.encode_prompt(prompt) for prompt in prompts]
    said, sentences = continue_rows(model, rows, most, sentence=True, stops=stops_after(model, prompts)), []
    for row, tokens in zip(rows, said, strict=True):
        text = first_sentence(model.continuation(row, tokens))
        needed = (n for n in range(len(tokens) + 1) if model.continuation(row, tokens[:n]).startswith(text))
        sentences.append(tokens[: next(needed, len(tokens))])
    return sentences
