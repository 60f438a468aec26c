"""What fires where: every neuron of a patch on every token of a text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tpatch_jax.core import ffn
from tpatch_jax.core.layers import LayerPatches, split_layers
from tpatch_jax.core.patch import Patch
from tpatch_jax.display.markup import element, number
from tpatch_jax.display.patch import Owner, arrays_of
from tpatch_jax.display.view import Rows, Shown, compose
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import generation
from tpatch_jax.models.collection import batches
from tpatch_jax.models.embedded import EmbeddedToken
from tpatch_jax.models.model import Model
from tpatch_jax.models.networks import Trace
from tpatch_jax.models.patching import attach
from tpatch_jax.models.rows import split_row
from tpatch_jax.models.shapes import merged_neurons

__all__ = ["activations_at", "activations_on", "firings", "show_tokens", "strip", "tell", "token_texts"]

ANSWER_TOKENS, MOST_FIRINGS = 32, 200


def token_texts(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text of each token by itself, with the space that it begins with; ``[·]`` of an embedding."""
    texts = []
    for token in tokens:
        if isinstance(token, EmbeddedToken):
            texts.append("[·]")
            continue
        name, text = str(tokenizer.convert_ids_to_tokens(int(token))), tokenizer.decode([int(token)])
        # SentencePiece's kind of tokenizer drops the space of what stands alone.
        texts.append(f" {text}" if name.startswith("\u2581") and not text.startswith(" ") else text or name)
    return texts


def _row(model: Model, edited: Model, text: str) -> list[int]:
    row = model.encode_prompt(text)
    if not row:
        raise TPatchError("the text is empty; give one with at least one token")
    if reason := model.excess(row, ()):
        raise TPatchError(f"{text[:40]!r}: {reason}")
    if model.config.architecture == "encoder-decoder":
        # Patches are in the decoder, so its tokens are those that the corrected model answers.
        row = row + generation.greedy(edited.config, edited.params, [row], ANSWER_TOKENS, edited.stops)[0]
    return row


def activations_on(model: Model, patches: LayerPatches | Patch, text: str) -> tuple[list[int], np.ndarray]:
    """The activation of every neuron on every token, with all of the patch attached.

    ``max(0, q·k + b)``; a neuron in an earlier layer changes the queries that later ones see.

    Args:
        model: the model without the patch.
        patches: ``{layer: [n, d]}``, or one patch for the last layer.
        text: what a decoder or a classifier reads; what an encoder-decoder is asked, whose tokens are those of its
            greedy answer.

    Returns:
        The token ids, and ``[tokens, n]`` activations.

    Raises:
        TPatchError: the model holds a patch already, or the text is empty or too long.
    """
    if ffn.any_attached(model.params):
        raise TPatchError("a patch is attached to this model; give the one without, `tp.detach(model)`")
    if merged_neurons(model.config, model.params):
        raise TPatchError("a patch is merged into this model; give the one without, which `tp.unmerge` returns")
    whole, places = arrays_of(patches)
    last = model.layer(None)
    layers = np.asarray([last if layer is None else model.layer(layer) for layer in places], int)
    edited = attach(model, split_layers(whole, layers), relu=True)
    row = _row(model, edited, text)
    read, written = split_row(model.config, row)
    tokens = list(written or read)
    activations = np.zeros((len(tokens), len(whole.bias)), np.float32)
    _, batch = next(iter(batches(model.config, [row])))
    for layer in np.unique(layers).tolist():
        chosen = np.flatnonzero(layers == layer)
        query = np.asarray(edited.trace(batch, layer).query[0, : len(tokens)], np.float32)
        activations[:, chosen] = _activations(whole, chosen, query)
    return tokens, activations


def _activations(patch: Patch, chosen: np.ndarray, query: np.ndarray) -> np.ndarray:
    key, bias = (np.asarray(array, np.float32)[chosen] for array in (patch.key, patch.bias))
    return np.maximum(query @ key.T + bias, 0)


def activations_at(patches: LayerPatches | Patch, traced: Trace) -> np.ndarray:
    """The activation ``max(0, q·k + b)`` of a patch's neurons on a trace, ``[batch, tokens, n]``.

    Neurons of another layer than the trace's stay at zero; those of one patch are taken to be in its layer.
    """
    (whole, layers), query = arrays_of(patches), np.asarray(traced.query, np.float32)
    activations = np.zeros((*query.shape[:2], len(whole.bias)), np.float32)
    here = np.asarray([layer is None or layer == traced.layer for layer in layers], bool)
    activations[..., here] = _activations(whole, np.flatnonzero(here), query)
    return activations


def strip(texts: Sequence[str], activations: np.ndarray, owners: Mapping[int, Owner]) -> Any:
    """Tokens one after the other, coloured by the strongest activation on each, which touching one tells.

    Args:
        texts: of each token.
        activations: ``[tokens, n]``.
        owners: the request of each neuron, as far as it is known.
    """
    most, spans = max(float(activations.max(initial=0.0)), 1e-30), []
    for position, (text, row) in enumerate(zip(texts, activations, strict=True)):
        firing = np.flatnonzero(row > 0)
        said = [f"neuron {n}{_of(owners, n)}: {number(float(row[n]))}" for n in firing[np.argsort(-row[firing])][:8]]
        said += ["…"] * (len(firing) > 8)
        shade = 0.2 + 0.7 * float(row.max(initial=0.0)) / most if len(firing) else 0
        style = f"background: rgba(235, 120, 30, {shade:.2f})" if len(firing) else None
        title = f"token {position}: " + ("; ".join(said) or "silent")
        spans.append(element("span", text.replace("\n", "⏎"), title=title, style=style))
    return element("div", *spans, class_="tokens")


def _of(owners: Mapping[int, Owner], neuron: int) -> str:
    return f" of {owners[neuron].id}" if neuron in owners else ""


def firings(texts: Sequence[str], activations: np.ndarray, owners: Mapping[int, Owner]) -> Rows:
    """Which neuron fires at which token, how strongly, and for which request."""
    columns = ["token", "text", "neuron", "activation"]
    rows: list[list[str]] = []
    for position, neuron in np.argwhere(activations > 0)[:MOST_FIRINGS].tolist():
        row = [str(position), texts[int(position)].strip(), str(neuron), number(float(activations[position, neuron]))]
        owner = owners.get(neuron, Owner("", "", ""))
        rows.append([*row, owner.id, owner.target] if owners else row)
    return Rows(columns + ["request", "target"] * bool(owners), rows, ("token", "neuron", "activation"))


def tell(activations: np.ndarray) -> str:
    """How many neurons fire, and at how many tokens."""
    tokens, neurons = activations.shape
    firing = activations > 0
    if not firing.any():
        return f"None of {neurons:,} neurons fires on any of {tokens:,} tokens."
    shown = f" The first {MOST_FIRINGS} firings are listed." * (int(firing.sum()) > MOST_FIRINGS)
    fired, at = int(firing.any(0).sum()), int(firing.any(1).sum())
    told = f"{fired:,} of {neurons:,} neurons fire, at {at:,} of {tokens:,} tokens"
    return f"{told}; activations are max(0, q·k + b).{shown}"


def show_tokens(model: Model, patches: LayerPatches | Patch, text: str, owners: Mapping[int, Owner]) -> Shown:
    """What fires where on a text; see `activations_on`."""
    tokens, activations = activations_on(model, patches, text)
    texts = token_texts(model.tokenizer, tokens)
    marked = "".join(f"[{one}]" if row.any() else one for one, row in zip(texts, activations, strict=True))
    rows, strips = [firings(texts, activations, owners)], [strip(texts, activations, owners)]
    shown = compose("What fires where", [tell(activations)], rows, strips)
    title, rest = shown.text.split("\n", 1)
    return Shown(shown.html, "\n".join([title, f"  {marked}", rest]))
