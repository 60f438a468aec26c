"""General ability on running text: perplexity, predictions left as they were, and the locality certificate."""

from pathlib import Path

import numpy as np

from tpatch_jax.core.layers import LayerPatches
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.metrics import certificate, next_token_agreement, perplexity
from tpatch_jax.evaluation.scoring import Base, Outcome, ScoredPrompts, model_scores, patched_scores
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach
from tpatch_jax.storage.reading import read_text

__all__ = ["WINDOW", "patch_figures", "read_windows", "text_figures"]

WINDOW = 256
"""Tokens of a window; a model reads each window on its own, without what stands before it."""


def read_windows(model: Model, path: str | Path, most: int) -> ScoredPrompts:
    """The start of a text file in windows of `WINDOW` tokens (fewer where the model reads fewer).

    Every token of a window but its first is predicted from those before it in the window.

    Args:
        model: whose tokenizer and context count.
        path: a UTF-8 text file.
        most: at most so many tokens of it are read, from its start.

    Returns:
        One text a window.

    Raises:
        TPatchError: the file cannot be read, or has fewer than two tokens.
    """
    if most < 2:
        raise TPatchError(f"{most} tokens of text leave nothing to predict; give 2 or more")
    try:
        # A token seldom has more than a few characters: so a long file is never tokenized whole.
        text = read_text(path, most=most * 16)
    except (OSError, UnicodeDecodeError) as error:
        raise TPatchError(f"the text {path} cannot be read ({error}); give a UTF-8 text file") from None
    ids = model.encode(text)[:most]
    window = min(WINDOW, model.config.context)
    begin = len(model.start)
    rows = [[*model.start, *ids[first : first + window - begin]] for first in range(0, len(ids), window - begin)]
    rows = [row for row in rows if len(row) > begin + 1]
    if not rows:
        raise TPatchError(f"the text {path} has {len(ids)} tokens; give a longer text file")
    positions = [range(begin, len(row) - 1) for row in rows]
    wanted = np.concatenate([np.asarray(row[begin + 1 :], np.int32) for row in rows])
    return ScoredPrompts(rows, positions, wanted, np.cumsum([0, *map(len, positions)]))


def text_figures(base: Base, outcome: Outcome, certified: bool = True) -> dict[str, float]:
    """The figures of one model on running text.

    Args:
        base: what the unedited model says.
        outcome: what the edited model says.
        certified: whether `Outcome.fires` says where the edit could change anything.

    Returns:
        ``perplexity, next_token_agreement``, and if certified ``certificate_tokens, certificate_prompts``, where a
        prompt is a window, and ``silent_tokens``, the share of tokens at which no neuron fires. A neuron in an earlier
        layer reaches the tokens after it as well, which then are not certified.
    """
    figures = {
        "perplexity": perplexity(-outcome.log_p.astype(np.float64)),
        "next_token_agreement": next_token_agreement(base.outcome.predicted, outcome.predicted),
    }
    if certified:
        # `fires` already holds whatever reaches a position, from earlier tokens too where the layer mixes them.
        figures |= certificate(np.split(outcome.fires, base.asked.starts[1:-1]))
        figures["silent_tokens"] = 1 - float(np.mean(outcome.here))
    return figures


def patch_figures(model: Model, base: Base, patches: LayerPatches) -> dict[str, float]:
    """What saved patches do to running text, activated as the network is: as they are merged and exported.

    Args:
        model: the unedited model.
        base: what it says.
        patches: ``{layer: [n, d]}``.

    Returns:
        The figures of `text_figures`, with ``perplexity_unedited``, ``perplexity_ratio``, the edited model's over it,
        and ``next_tokens_unchanged``, the share of positions whose likeliest next token stays.
    """
    said = model_scores(attach(model, patches), base)
    # Where a neuron is above its threshold; an activation other than ReLU leaks a hair below it.
    acts = patched_scores(model, base, patches)
    figures = text_figures(base, said._replace(fires=acts.fires, here=acts.here))
    before = perplexity(-base.outcome.log_p.astype(np.float64))
    return figures | {
        "perplexity_unedited": before,
        "perplexity_ratio": figures["perplexity"] / before,
        "next_tokens_unchanged": figures["next_token_agreement"],
    }
