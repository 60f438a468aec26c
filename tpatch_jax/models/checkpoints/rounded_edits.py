"""Edits that outlive rounding: what a tool's INT8 takes from a neuron's input and from an answer's margin, given back.

Dynamic quantisation with one scale for each tensor rounds weights once and activations anew for each text. It takes a
part of what a neuron at a subject receives, mostly in the same direction, and of a target's margin over other tokens.
Both can be known before a tool does it: each request's text is run through the rounded network here.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tpatch_jax.core import ffn
from tpatch_jax.core.patch import product
from tpatch_jax.core.products import round_inputs, round_tensor
from tpatch_jax.core.sizes import power_of_two
from tpatch_jax.models import networks
from tpatch_jax.models.blocks import Around
from tpatch_jax.models.config import LayerKind, NetworkConfig
from tpatch_jax.models.model import Model
from tpatch_jax.models.rows import tokens_array
from tpatch_jax.models.stack import embed_batch, enter_block, leave_block
from tpatch_jax.typing import Params, Progress

__all__ = ["AskedRow", "RoundedAnswers", "ask_rounded", "can_strengthen", "round_weights", "strengthen_edits"]

AskedRow = tuple[Sequence[int], range]
"""A prompt and its target in tokens, and the positions after which the target's tokens come."""

INT8 = 127
LEVELS = (127.0, 255.0, 0.0)
"""Steps in which activations are rounded: torch's, onnxruntime's, and none, where a tool rounds weights alone."""

LANES, LEAST = 8, 16
"""So many texts run together, of as many tokens as a power of two, at least so many; each is rounded by itself."""

AIM = 3.0
"""A target's logit shall be so far above all others, however it is rounded."""

FACTORS = (1.15, 1.3, 1.5, 1.75, 2.0)
"""By what a value is multiplied at most, the least that is enough."""


class RoundedAnswers(NamedTuple):
    """What became of some requests.

    Attributes:
        inputs: of each request, what the neurons of each layer receive, ``[tokens, neurons]``.
        margins: by how much the target's logit is above all others, at the token where that is least, ``[requests]``.
    """

    inputs: list[dict[int, np.ndarray]]
    margins: Float[np.ndarray, " requests"]


def round_weights(model: Model, head: bool = False) -> Model:
    """The model with the matrices of its layers rounded to INT8, one scale each.

    ``round(w/s)·s`` with ``s = max|w|/127``.

    Args:
        model: the model; not changed.
        head: whether that with which the head multiplies is rounded as well.
    """

    def rounded(entry: Any) -> Any:
        if not isinstance(entry, Mapping):
            return entry
        result = {name: rounded(part) for name, part in entry.items()}
        return {name: _rounded(part) if name in ("kernel", "embedding") else part for name, part in result.items()}

    params = {**model.params, "layers": rounded(model.params["layers"])}
    if head:
        # The same table is read token by token at the start, which no tool rounds: so it is the head's alone.
        params = {**params, **rounded(networks.final_weights(model.config, model.params))}
    return model.with_params(params)


def _rounded(matrix: Array) -> Array:
    scale = jnp.max(jnp.abs(matrix)) / INT8
    return jnp.where(scale > 0, jnp.round(matrix / jnp.where(scale > 0, scale, 1)) * scale, matrix)


def can_strengthen(model: Model) -> bool:
    """Whether `strengthen_edits` can do anything for a model: one that writes, with a plain stack of blocks."""
    config = model.config
    plain = not (config.encoder or config.mixture or config.latent or config.labels)
    return config.architecture == "decoder" and plain


def strengthen_edits(
    model: Model,
    neurons: Mapping[int, Int[np.ndarray, " n"]],
    asked: Sequence[AskedRow],
    progress: Progress | None = None,
) -> Model:
    """The model with edits that hold when a tool rounds weights and activations with one scale for each tensor.

    First each neuron's bias grows by as much as rounding takes from its input on the text where it fires. Then the
    neurons of a request whose target is not likeliest by a margin of `AIM` logits, rounded in any of three ways, say it
    up to twice as strongly; the least of some factors that is enough, or the best. Nothing else changes.

    Args:
        model: merged patches are in it, in the form in which it is written.
        neurons: which neurons of which layer are patches', those that stand for a part of one among them.
        asked: the requests' texts.
        progress: called with what is being done, how much is done, and how much there is.

    Source: after Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
    section 4.2, where biases make up for errors on average; here for those at the texts that matter.
    """
    if not asked or not neurons or not can_strengthen(model):
        return model
    tell = progress or (lambda what, done, total: None)
    what, rows = "trying rounded networks", list(range(len(asked)))
    whole = ask_rounded(model, model, neurons, asked, rows, 0.0)
    rounded = _tried(model, neurons, asked, rows, lambda done: tell(what, done, 3 + len(FACTORS)))
    for layer in neurons:
        short = np.zeros(len(neurons[layer]), np.float32)
        for number in rows:
            sound = whole.inputs[number][layer]
            for run in rounded:
                taken = np.where(sound > 0, sound - run.inputs[number][layer], 0)
                short = np.maximum(short, taken.max(0))
        model = _changed(model, layer, "gate" if model.config.gated else "up", neurons[layer], short, np.add)
    if not model.config.gated:
        return model
    firing = [{layer: (inputs > 0).any(0) for layer, inputs in one.items()} for one in whole.inputs]
    best = _least(model, neurons, asked, rows)
    chosen, weak = np.ones(len(asked)), [number for number in rows if best[number] < AIM]
    for step, factor in enumerate(FACTORS):
        tell(what, 3 + step, 3 + len(FACTORS))
        if not weak:
            break
        tried = np.ones(len(asked))
        tried[weak] = factor
        margins = _least(_scaled(model, neurons, firing, tried), neurons, asked, weak)
        better = [number for at, number in enumerate(weak) if margins[at] > best[number]]
        best[weak] = np.maximum(best[weak], margins)
        chosen[better] = factor
        weak = [number for number in weak if best[number] < AIM]
    return _scaled(model, neurons, firing, chosen)


def _scaled(
    model: Model,
    neurons: Mapping[int, Int[np.ndarray, " n"]],
    firing: Sequence[Mapping[int, Any]],
    factors: np.ndarray,
) -> Model:
    """Each request's neurons as many times as strong, by their constants in ``up``: as biases these are not rounded."""
    for layer, places in neurons.items():
        times = np.ones(len(places), np.float32)
        for one, factor in zip(firing, factors, strict=True):
            times = np.where(one[layer], np.maximum(times, factor), times)
        model = _changed(model, layer, "up", places, times, np.multiply)
    return model


def _changed(
    model: Model,
    layer: int,
    name: str,
    places: Int[np.ndarray, " n"],
    by: np.ndarray,
    change: Callable[..., np.ndarray],
) -> Model:
    """The model with other biases of some neurons."""
    entry = model.params["layers"][layer]["ffn"]
    bias = np.array(entry[name]["bias"])
    bias[places] = change(bias[places], by.astype(bias.dtype))
    network = {**entry, name: {**entry[name], "bias": jnp.asarray(bias)}}
    layers = {**model.params["layers"], layer: {**model.params["layers"][layer], "ffn": network}}
    return model.with_params({**model.params, "layers": layers})


def _tried(
    model: Model,
    neurons: Mapping[int, Int[np.ndarray, " n"]],
    asked: Sequence[AskedRow],
    rows: Sequence[int],
    report: Callable[[int], None] = lambda done: None,
) -> list[RoundedAnswers]:
    """The requests in the networks that tools make of a model, one after the other."""
    light, runs = round_weights(model, head=True), []
    for number, levels in enumerate(LEVELS):
        report(number)
        runs.append(ask_rounded(model, light, neurons, asked, rows, levels))
    return runs


def _least(
    model: Model, neurons: Mapping[int, Int[np.ndarray, " n"]], asked: Sequence[AskedRow], rows: Sequence[int]
) -> np.ndarray:
    """The least margin of each request, as it is and in all rounded networks."""
    runs = [ask_rounded(model, model, neurons, asked, rows, 0.0), *_tried(model, neurons, asked, rows)]
    return np.min([run.margins for run in runs], 0)


def ask_rounded(
    model: Model,
    rounded: Model,
    neurons: Mapping[int, Int[np.ndarray, " n"]],
    asked: Sequence[AskedRow],
    rows: Sequence[int],
    levels: float,
) -> RoundedAnswers:
    """Some requests' texts in a network whose activations are rounded, each text by itself.

    Args:
        model: whose embeddings the texts begin with, which no tool rounds.
        rounded: the same with other matrices, such as those of `round_weights`.
        neurons: the neurons of each layer of which it is told what they receive.
        asked: the requests' texts.
        rows: the numbers of those that are run.
        levels: steps of activations, see `tpatch_jax.core.products.round_tensor`; 0 rounds none.

    Returns:
        The `RoundedAnswers`, in the order of ``rows``.
    """
    config, layers = model.config, _of_one_width(rounded.params["layers"])
    tail, steps = networks.final_weights(config, rounded.params), jnp.float32(levels)
    inputs: list[dict[int, np.ndarray]] = [{} for _ in rows]
    margins = np.full(len(rows), np.inf)
    texts = [asked[number][0][:-1] for number in rows]
    together: dict[int, list[int]] = {}
    for at, text in enumerate(texts):
        together.setdefault(power_of_two(len(text), LEAST), []).append(at)
    for length, numbers in sorted(together.items()):
        for first in range(0, len(numbers), LANES):
            chosen = numbers[first : first + LANES]
            lanes = [texts[at] for at in [*chosen, *[chosen[-1]] * (LANES - len(chosen))]]
            valid = jax.device_put(
                np.arange(length)[:, None] < np.asarray([len(text) for text in lanes])[:, None, None]
            )
            _, x, positions, around = embed_batch(config, model.params, tokens_array(lanes, length))
            for index in range(config.layers):
                of_block = (config, config.kind(index), layers[index], x, positions[:1], around, steps, valid)
                x, query = _rounded_block(*of_block)
                if index in neurons:
                    reader = layers[index]["ffn"]["gate" if config.gated else "up"]
                    part = {name: leaf[..., neurons[index]] for name, leaf in reader.items()}
                    received = np.asarray(_neuron_inputs(part, query, steps, valid))
                    for lane, at in enumerate(chosen):
                        inputs[at][index] = received[lane, : len(texts[at])]
            for lane, at in enumerate(chosen):
                said = np.asarray(_rounded_logits(config, tail, x[lane : lane + 1], steps, valid[lane]))[0]
                margins[at] = _margin(said, *asked[rows[at]])
    return RoundedAnswers(inputs, margins)


def _margin(said: np.ndarray, row: Sequence[int], spots: range) -> float:
    """By how much the logit of each token that is wanted is above all others, at the token where that is least."""
    there, wanted = np.arange(len(spots)), np.asarray(row[spots.start + 1 : spots.stop + 1])
    said = said[spots.start : spots.stop].copy()
    right = said[there, wanted]
    said[there, wanted] = -np.inf
    return float(np.min(right - said.max(1), initial=np.inf))


def _of_one_width(layers: Mapping[int, Params]) -> dict[int, Params]:
    """The layers with silent neurons up to the widest network, so that one program runs all of them."""
    widest = max(ffn.width(layer["ffn"]) for layer in layers.values())

    def wider(name: str, entry: Params, missing: int) -> Params:
        # Of `down` it is the rows that are neurons, and its bias is of the output.
        rows = ((0, missing), (0, 0)) if name == "down" else ((0, 0), (0, missing))
        pads = {"kernel": rows} if name == "down" else {"kernel": rows, "bias": ((0, missing),)}
        return {part: jnp.pad(array, pads[part]) if part in pads else array for part, array in entry.items()}

    result = {}
    for index, layer in layers.items():
        missing = widest - ffn.width(layer["ffn"])
        network = {name: wider(name, entry, missing) for name, entry in layer["ffn"].items()}
        result[index] = {**layer, "ffn": network} if missing else layer
    return result


@partial(jax.jit, static_argnames=("config", "kind"))
def _rounded_block(
    config: NetworkConfig,
    kind: LayerKind,
    params: Params,
    x: Float[Array, "texts tokens hidden"],
    positions: Int[Array, "1 tokens"],
    around: Around,
    levels: Float[Array, ""],
    valid: Bool[Array, "texts tokens 1"],
) -> tuple[Float[Array, "texts tokens hidden"], Float[Array, "texts tokens hidden"]]:
    """The residual stream after a block that reads rounded activations, and the input of its feed-forward network."""

    def run(params: Params, row: Float[Array, "1 tokens hidden"]) -> tuple[Array, Array]:
        residual, query, output = enter_block(config, kind, params, row, positions, None, around)
        return leave_block(config, kind, params, residual, output), query

    after, query = jax.vmap(lambda row, valid: round_inputs(run, levels, valid)(params, row[None]))(x, valid)
    return after[:, 0], query[:, 0]


@jax.jit
def _neuron_inputs(
    reader: Params,
    query: Float[Array, "texts tokens hidden"],
    levels: Float[Array, ""],
    valid: Bool[Array, "texts tokens 1"],
) -> Float[Array, "texts tokens neurons"]:
    rounded = jax.vmap(lambda row, valid: round_tensor(row, levels, valid))(query, valid)
    return product(rounded, reader["kernel"]) + reader["bias"]


@partial(jax.jit, static_argnames="config")
def _rounded_logits(
    config: NetworkConfig,
    weights: Params,
    hidden: Float[Array, "1 tokens hidden"],
    levels: Float[Array, ""],
    valid: Bool[Array, "tokens 1"],
) -> Float[Array, "1 tokens vocabulary"]:
    return round_inputs(lambda weights, hidden: networks.logits(config, weights, hidden), levels, valid)(
        weights, hidden
    )
