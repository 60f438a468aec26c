"""What an edited model writes freely: continuations for GE, answers to MQuAKE's questions, and to each request."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from jax import Array

from tpatch_jax.editors.base import Routing
from tpatch_jax.evaluation.records import Record
from tpatch_jax.models.chat import stops_after
from tpatch_jax.models.generation import Stops, sample, stops_of_each
from tpatch_jax.models.model import Model
from tpatch_jax.models.sentences import continue_rows, first_sentence, say

__all__ = ["answers", "continuations", "sentences", "write"]

LANES = 16
ANSWER_TOKENS = 16
TEXT_TOKENS = 100
TOP_K = 5


def _writers(
    model: Model, routing: Routing | None, prompts: Sequence[list[int]]
) -> Iterator[tuple[Model, list[int], list[list[int]]]]:
    """Which model continues which prompts, and what it reads: the prompt, with an edit where there is one."""
    contexts = [None] * len(prompts) if routing is None else routing.contexts(prompts)
    rows = [
        prompt if context is None or routing is None else routing.joined(prompt, context, prompt)
        for context, prompt in zip(contexts, prompts, strict=True)
    ]
    unrouted = [number for number, context in enumerate(contexts) if context is None]
    if unrouted:
        yield model, unrouted, [rows[number] for number in unrouted]
    other = [number for number in range(len(prompts)) if contexts[number] is not None]
    if routing is not None and other:
        yield routing.model, other, [rows[number] for number in other]


def continuations(model: Model, record: Record, rng: Array, routing: Routing | None = None) -> list[str]:
    """A record's openings continued for GE: top-k 5 samples of at most 100 tokens, or until the model ends the text.

    Args:
        model: the model, edited or not.
        record: its ``generation`` openings.
        rng: a typed random key.
        routing: which openings another model continues.

    Returns:
        The texts, openings included.
    """
    prompts = [model.encode_prompt(text) for text in record.generation]
    if not prompts:
        return []
    count, texts = max(1, TEXT_TOKENS - min(map(len, prompts))), [""] * len(prompts)
    for writer, numbers, rows in _writers(model, routing, prompts):
        sampled = sample(writer.config, writer.params, rows, count, rng, top_k=TOP_K, stops=writer.stops)
        for number, row in zip(numbers, sampled, strict=True):
            texts[number] = model.decode((prompts[number] + row)[:TEXT_TOKENS])
    return texts


def answers(model: Model, records: Sequence[Record], routing: Routing | None = None) -> list[list[str]]:
    """What a model answers, greedily and in at most 16 tokens, to the questions of records.

    Args:
        model: the model, edited or not.
        records: their ``questions``.
        routing: which questions another model answers.

    Returns:
        For each record its answers, ``[questions]`` texts.
    """
    prompts = [model.encode_prompt(question) for record in records for question in record.questions]
    texts = [model.decode(row) for row in write(model, prompts, routing)]
    ends = np.cumsum([0, *(len(record.questions) for record in records)])
    return [texts[start:end] for start, end in pairwise(ends)]


def write(
    model: Model,
    prompts: Sequence[list[int]],
    routing: Routing | None = None,
    most: int = ANSWER_TOKENS,
    lanes: int = LANES,
    *,
    stops: Stops | None = None,
    draw: tuple[Array, float] | None = None,
) -> list[list[int]]:
    """The tokens that follow prompts, greedily or drawn; none follow one that is too long for the model that continues
    it.

    Args:
        model: the model, edited or not.
        prompts: what it reads, in tokens.
        routing: which prompts another model continues.
        most: so many tokens at most.
        lanes: so many prompts are run together.
        stops: tokens that end an answer, of all prompts or for each of them; by default those that end a text of the
            model that writes.
        draw: a typed random key and the temperature, if tokens are drawn.
    """
    said: list[list[int]] = [[] for _ in prompts]
    for writer, numbers, rows in _writers(model, routing, prompts):
        # What stands before a prompt for another model may leave no room in it; then that says nothing.
        fitting = [at for at, row in enumerate(rows) if not writer.excess(row, [0])]
        each = stops_of_each(writer.stops if stops is None else stops, len(prompts))
        ends = [each[numbers[at]] for at in fitting]
        written = continue_rows(writer, [rows[at] for at in fitting], most, lanes=lanes, stops=ends, draw=draw)
        for at, row in zip(fitting, written, strict=True):
            said[numbers[at]] = row
    return said


def sentences(model: Model, prompts: Sequence[str], routing: Routing | None = None) -> list[str | None]:
    """What a model says of its own accord after prompts, up to the end of the sentence and in at most 16 tokens.

    Args:
        model: the model, edited or not.
        prompts: what it reads.
        routing: which prompts another model continues.

    Returns:
        A text for each; ``None`` for a prompt that the model cannot read.
    """
    if routing is None:
        return say(model, prompts, ANSWER_TOKENS)
    rows = [model.encode_prompt(prompt) for prompt in prompts]
    written = write(model, rows, routing, stops=stops_after(model, prompts))
    return [first_sentence(model.continuation(row, tokens)) for row, tokens in zip(rows, written, strict=True)]
