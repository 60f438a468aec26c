"""Edits that outlive rounding: what a tool's INT8 takes from a neuron's input and from an answer's margin, given back.

Dynamic quantisation with one scale for each tensor rounds weights once and activations anew for each text. It takes a
part of what a neuron at a subject receives, mostly in the same direction, and of a target's margin over other tokens.
Both can be known before a tool does it: each request's text is run through the rounded network here.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tpatch_jax.core import ffn
from tpatch_jax.core.patch import product
from tpatch_jax.core.per_tensor import INT8
from tpatch_jax.core.products import round_inputs, round_tensor
from tpatch_jax.core.sizes import power_of_two
from tpatch_jax.models import networks
from tpatch_jax.models.blocks import Around
from tpatch_jax.models.checkpoints.outliers import has_plain_blocks
from tpatch_jax.models.config import LayerKind, NetworkConfig
from tpatch_jax.models.model import Model
from tpatch_jax.models.rows import tokens_array
from tpatch_jax.models.stack import embed_batch, enter_block, leave_block
from tpatch_jax.typing import Params, Progress

__all__ = ["AskedRow", "RoundedAnswers", "ask_rounded", "round_weights", "strengthen_edits"]

AskedRow = tuple[Sequence[int], range]
"""A prompt and its target in tokens, and the positions after which the target's tokens come."""

Neurons = Mapping[int, Int[np.ndarray, " n"]]
"""Some neurons of some layers, by number."""

Biases = dict[int, np.ndarray]
"""A number for each of them, layer by layer."""

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


def strengthen_edits(
    model: Model,
    neurons: Neurons,
    asked: Sequence[AskedRow],
    progress: Progress | None = None,
) -> Model:
    """The model with edits that hold when a tool rounds weights and activations with one scale for each tensor.

    First each neuron's bias grows by as much as rounding takes from its input on the text where it fires. Then the
    neurons of a request whose target is not likeliest by a margin of `AIM` logits, rounded in any of three ways, say it
    up to twice as strongly; the least of some factors that is enough, or the best. Nothing else changes.

    Args:
        model: merged patches are in it, in the form in which it is written. What is no plain decoder that writes stays
            as it is.
        neurons: which neurons of which layer are patches', those that stand for a part of one among them.
        asked: the requests' texts.
        progress: called with what is being done, how much is done, and how much there is.

    Source: after Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
    section 4.2, where biases make up for errors on average; here for those at the texts that matter.
    """
    if not asked or not neurons or not has_plain_blocks(model.config) or model.config.labels:
        return model
    tell = progress or (lambda what, done, total: None)
    what, most = "trying rounded networks", 1 + len(FACTORS)
    tell(what, 0, most)
    # Only biases change from here on, which are not rounded: so weights are once.
    sound = model.with_params({**model.params, "layers": _of_one_width(model.params["layers"])})
    light = round_weights(sound, head=True)
    whole = ask_rounded(sound, sound, neurons, asked, 0.0)
    raised = _taken(neurons, whole, [ask_rounded(sound, light, neurons, asked, levels) for levels in LEVELS])
    if not model.config.gated:
        return _with_biases(model, neurons, raised, None)
    firing = [{layer: (inputs > 0).any(0) for layer, inputs in one.items()} for one in whole.inputs]

    def least(factors: np.ndarray, rows: Sequence[int]) -> np.ndarray:
        """The least margin of some requests, as they are and in all rounded networks."""
        times = _times(neurons, firing, factors)
        plain, rounded = (_with_biases(one, neurons, raised, times) for one in (sound, light))
        texts = [asked[number] for number in rows]
        runs = [ask_rounded(plain, plain, neurons, texts, 0.0)]
        runs += [ask_rounded(plain, rounded, neurons, texts, levels) for levels in LEVELS]
        return np.min([run.margins for run in runs], 0)

    chosen = np.ones(len(asked))
    best = least(chosen, range(len(asked)))
    weak = np.flatnonzero(best < AIM)
    for step, factor in enumerate(FACTORS):
        tell(what, 1 + step, most)
        if not len(weak):
            break
        tried = np.ones(len(asked))
        tried[weak] = factor
        margins = least(tried, weak.tolist())
        chosen[weak[margins > best[weak]]] = factor
        best[weak] = np.maximum(best[weak], margins)
        weak = weak[best[weak] < AIM]
    return _with_biases(model, neurons, raised, _times(neurons, firing, chosen))


def _taken(neurons: Neurons, whole: RoundedAnswers, rounded: Sequence[RoundedAnswers]) -> Biases:
    """What rounding takes of each neuron's input where it fires, the most of any request and any rounding."""
    result = {}
    for layer, places in neurons.items():
        result[layer] = np.zeros(len(places), np.float32)
        for number, inputs in enumerate(whole.inputs):
            for run in rounded:
                taken = np.where(inputs[layer] > 0, inputs[layer] - run.inputs[number][layer], 0)
                result[layer] = np.maximum(result[layer], taken.max(0))
    return result


def _times(neurons: Neurons, firing: Sequence[Mapping[int, Any]], factors: np.ndarray) -> Biases:
    """How many times as strong each neuron is, if those of each request are so many times as strong."""
    result = {}
    for layer, places in neurons.items():
        result[layer] = np.ones(len(places), np.float32)
        for one, factor in zip(firing, factors, strict=True):
            result[layer] = np.where(one[layer], np.maximum(result[layer], factor), result[layer])
    return result


def _with_biases(model: Model, neurons: Neurons, raised: Biases, times: Biases | None) -> Model:
    """The model whose patches' neurons fire sooner, and in a gated network by their constants in ``up`` more strongly:
    these are biases, which no tool rounds.
    """
    layers = dict(model.params["layers"])
    for layer, places in neurons.items():
        network = dict(layers[layer]["ffn"])
        changes = {"up": (raised, np.add)} if times is None else {"gate": (raised, np.add), "up": (times, np.multiply)}
        for name, (by, change) in changes.items():
            bias = np.array(network[name]["bias"])
            bias[places] = change(bias[places], by[layer].astype(bias.dtype))
            network[name] = {**network[name], "bias": jnp.asarray(bias)}
        layers[layer] = {**layers[layer], "ffn": network}
    return model.with_params({**model.params, "layers": layers})


def ask_rounded(
    model: Model, rounded: Model, neurons: Neurons, asked: Sequence[AskedRow], levels: float
) -> RoundedAnswers:
    """Some requests' texts in a network whose activations are rounded, each text by itself.

    Args:
        model: whose embeddings the texts begin with, which no tool rounds.
        rounded: the same with other matrices, such as those of `round_weights`.
        neurons: the neurons of each layer of which it is told what they receive.
        asked: the requests' texts.
        levels: steps of activations, see `tpatch_jax.core.products.round_tensor`; 0 rounds none.

    Returns:
        The `RoundedAnswers`.
    """
    config, layers = model.config, rounded.params["layers"]
    tail, steps = networks.final_weights(config, rounded.params), jnp.float32(levels)
    inputs: list[dict[int, np.ndarray]] = [{} for _ in asked]
    margins = np.full(len(asked), np.inf)
    texts = [row[:-1] for row, _ in asked]
    together: dict[int, list[int]] = {}
    for number, text in enumerate(texts):
        together.setdefault(power_of_two(len(text), LEAST), []).append(number)
    for length, numbers in sorted(together.items()):
        for first in range(0, len(numbers), LANES):
            chosen = numbers[first : first + LANES]
            lanes = [texts[number] for number in [*chosen, *[chosen[-1]] * (LANES - len(chosen))]]
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
                    for lane, number in enumerate(chosen):
                        inputs[number][index] = received[lane, : len(texts[number])]
            for lane, number in enumerate(chosen):
                said = np.asarray(_rounded_logits(config, tail, x[lane : lane + 1], steps, valid[lane]))[0]
                margins[number] = _margin(said, *asked[number])
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
