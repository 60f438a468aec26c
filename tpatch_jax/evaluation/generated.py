"""What an edited model writes freely: continuations for GE, and answers to MQuAKE's questions."""

from collections.abc import Sequence
from itertools import pairwise

import jax
import numpy as np
from jax import Array

from tpatch_jax.evaluation.records import Record
from tpatch_jax.models.generation import greedy, sample
from tpatch_jax.models.model import Model

__all__ = ["answers", "continuations"]

LANES = 16
ANSWER_TOKENS = 16
TEXT_TOKENS = 100
TOP_K = 5


def continuations(model: Model, record: Record, key: Array) -> list[str]:
    """A record's openings continued for GE: top-k 5 samples of at most 100 tokens, the opening included.

    Args:
        model: the model, edited or not.
        record: its ``generation`` openings.
        key: a typed random key.

    Returns:
        The texts, openings included.
    """
    prompts = [model.encode_prompt(text) for text in record.generation]
    if not prompts:
        return []
    count = max(1, TEXT_TOKENS - min(map(len, prompts)))
    found = sample(model.config, model.params, prompts, count, key, top_k=TOP_K, stops=model.stops)
    return [model.decode((prompt + row)[:TEXT_TOKENS]) for prompt, row in zip(prompts, found, strict=True)]


def answers(model: Model, records: Sequence[Record]) -> list[list[str]]:
    """What a model answers, greedily and in at most 16 tokens, to the questions of records.

    Args:
        model: the model, edited or not.
        records: their ``questions``.

    Returns:
        For each record its answers, ``[questions]`` texts.
    """
    prompts = [model.encode_prompt(question) for record in records for question in record.questions]
    texts = [""] * len(prompts)
    # Neighbours in length share a batch, so that little of it is padding.
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    for first in range(0, len(order), LANES):
        part = order[first : first + LANES]
        with jax.default_matmul_precision("highest"):
            found = greedy(model.config, model.params, [prompts[n] for n in part], ANSWER_TOKENS, model.stops)
        for number, row in zip(part, found, strict=True):
            texts[number] = model.decode(row)
    ends = np.cumsum([0, *(len(record.questions) for record in records)])
    return [texts[start:end] for start, end in pairwise(ends)]
