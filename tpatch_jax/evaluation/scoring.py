"""What a model, edited or not, makes of many probes, without running it more often than needed.

The unedited model reads every probe once; what its last layer leaves at the scored positions is kept (also on disk, by
content). A patch in that layer changes each position by itself: its neurons are tried on the kept queries, and only
positions on which one fires get new logits. A patch in an earlier layer has only the texts run again on which a
neuron fires. Both hold because such patches are evaluated with ReLU, so that a silent neuron adds exactly nothing (a
patch that is merged, or attached with SiLU or GELU, leaks a hair below its threshold). Patches without a sharp
threshold, as the joint recipe makes them, are evaluated as they are merged: see `apply_scores`. An adapter is silent
where it gives its network's output back, so that texts on which it never acts are not run again either.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tpatch_jax.core import ffn
from tpatch_jax.core.adapters import Adapter
from tpatch_jax.core.int8 import float_type
from tpatch_jax.core.layers import LayerPatches
from tpatch_jax.core.patch import Patch, contribution, preactivations, sized
from tpatch_jax.core.sizes import power_of_two
from tpatch_jax.editors.base import Routing
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.metrics import Score
from tpatch_jax.evaluation.records import Probe
from tpatch_jax.models import networks
from tpatch_jax.models.collection import Sites, batches, collect_once, pad_rows
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.fingerprint import fingerprint
from tpatch_jax.models.model import Model
from tpatch_jax.models.networks import Batch
from tpatch_jax.models.patching import attach, attach_adapters, by_layer
from tpatch_jax.models.rows import place_in
from tpatch_jax.requests import join_target
from tpatch_jax.storage.files import replace_folder
from tpatch_jax.typing import CountProgress

__all__ = [
    "Base",
    "Outcome",
    "ScoredPrompts",
    "acts_forward",
    "adapted_scores",
    "apply_scores",
    "ask",
    "base_scores",
    "correct_outputs",
    "model_scores",
    "patched_scores",
    "read_scores",
    "routed_scores",
    "score",
    "which_fire",
]

VERSION = 1
LOGIT_ROWS = 256
QUERY_ROWS = 4096
TEXTS_AT_ONCE = 256
MOST_CACHED = 1 << 30


class ScoredPrompts(NamedTuple):
    """Texts in tokens, and where their next token is looked at.

    Attributes:
        rows: token ids of each text.
        positions: the positions of each text at which the next token counts.
        wanted: the true next token at each, ``[positions]`` int, text after text; -1 where none is known.
        starts: where each text's positions begin in ``wanted``, ``[texts + 1]``.
    """

    rows: list[list[int]]
    positions: list[range]
    wanted: np.ndarray
    starts: np.ndarray


class Outcome(NamedTuple):
    """What a model says at every position of an `ScoredPrompts`.

    Attributes:
        log_p: of the wanted token, ``[positions]``; ``nan`` where none is wanted.
        predicted: the most probable token, ``[positions]`` int.
        fires: whether any neuron fires where it could change the position, ``[positions]`` bool.
        here: whether one fires at the position itself, ``[positions]`` bool; in the last layer that is the same.
    """

    log_p: np.ndarray
    predicted: np.ndarray
    fires: np.ndarray
    here: np.ndarray


class Base(NamedTuple):
    """What the unedited model says, and what its last layer leaves: ``[positions, d]`` float32 each.

    Attributes:
        asked: what was asked.
        outcome: what it says.
        query: the last FFN's input.
        output: its output.
        residual: the residual stream beside it.
    """

    asked: ScoredPrompts
    outcome: Outcome
    query: np.ndarray
    output: np.ndarray
    residual: np.ndarray


def ask(model: Model, probes: Sequence[Probe]) -> ScoredPrompts:
    """Probes in tokens. Prompt and target are tokenized separately, as the editors and greedy decoding have them.

    Args:
        model: whose tokenizer and context count.
        probes: what is asked; a probe without a target is looked at after its prompt only.

    Returns:
        One text a probe.

    Raises:
        TPatchError: a probe has no tokens, or more than the model reads.
    """
    rows, positions, wanted = [], [], []
    for probe in probes:
        prompt = model.encode_prompt(probe.prompt)
        target = model.encode_target(probe.prompt, join_target(probe.prompt, probe.target)) if probe.target else []
        if not prompt:
            raise TPatchError(
                f"the probe {probe.prompt!r} for {probe.target!r} has an empty prompt; take its record out"
            )
        if reason := model.excess(prompt, target):
            raise TPatchError(f"the probe {probe.prompt[:60]!r} is too long ({reason}, or take its record out)")
        rows.append(prompt + target)
        positions.append(range(len(prompt) - 1, len(prompt) + len(target) - 1 if target else len(prompt)))
        wanted.extend(target or [-1])
    starts = np.cumsum([0, *map(len, positions)])
    return ScoredPrompts(rows, positions, np.asarray(wanted, np.int32), starts)


def score(asked: ScoredPrompts, outcome: Outcome, text: int) -> Score:
    """The `Score` of one text.

    Args:
        asked: what was asked.
        outcome: what a model says to it.
        text: the text's number.
    """
    span = slice(int(asked.starts[text]), int(asked.starts[text + 1]))
    wanted, predicted = asked.wanted[span], outcome.predicted[span]
    if (wanted < 0).any():
        return Score(float("nan"), np.zeros(0, bool), predicted)
    return Score(float(-np.mean(outcome.log_p[span], dtype=np.float64)), predicted == wanted, predicted)


@partial(jax.jit, static_argnames="config")
def read_scores(
    config: NetworkConfig, weights: Any, residual: Array, output: Array, wanted: Array
) -> tuple[Array, Array]:
    """Of each row the log-probability of what is wanted, and what is said."""
    logits = networks.finish(config, weights, {"residual": residual}, output)
    hit = jnp.take_along_axis(logits, wanted[:, None], -1)[:, 0]
    return hit - jax.nn.logsumexp(logits, -1), jnp.argmax(logits, -1)


@jax.jit
def which_fire(patch: Patch, query: Array) -> Array:
    """Which rows fire some neuron."""
    z = jnp.max(preactivations(patch, query), -1)
    if z.ndim == 2:
        # Padding of whole texts is silent whatever it says.
        z = jnp.max(jnp.where(jnp.any(query != 0, -1), z, -1), -1)
    return z > 0


@jax.jit
def _changes(adapter: Adapter, query: Array, output: Array) -> Array:
    return jnp.any(adapter.contribute(query, output) != output, -1)


@jax.jit
def correct_outputs(patch: Patch, query: Array, output: Array) -> Array:
    """What a feed-forward network says with the neurons of a patch."""
    return output + contribution(patch, query, jax.nn.relu)


@jax.jit
def _pick(logits: Array, lane: Array, place: Array, wanted: Array) -> tuple[Array, Array]:
    chosen = logits[lane, place].astype(jnp.float32)
    hit = jnp.take_along_axis(chosen, wanted[:, None], -1)[:, 0]
    return hit - jax.nn.logsumexp(chosen, -1), jnp.argmax(chosen, -1)


def _chunks(total: int, most: int):
    """Slices of at most ``most`` rows with the power of two that each is padded to, so that few sizes compile."""
    for first in range(0, total, most):
        count = min(most, total - first)
        yield slice(first, first + count), power_of_two(count, 8, most) - count


def _padded(array: np.ndarray, missing: int, dtype: Any = None) -> Array:
    # Put as it is: `jnp.asarray` would compile a program for each new shape.
    return jax.device_put(np.asarray(pad_rows(array, missing), dtype))


def _dtype(model: Model) -> Any:
    return float_type(model.params)


def _read_all(
    model: Model, residual: np.ndarray, output: np.ndarray, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of the wanted token and argmax of each row, never with more than a few rows of logits at once."""
    weights, dtype = networks.final_weights(model.config, model.params), _dtype(model)
    log_p, predicted = np.zeros(len(wanted), np.float32), np.zeros(len(wanted), np.int32)
    for span, missing in _chunks(len(wanted), LOGIT_ROWS):
        arrays = (_padded(array[span], missing, dtype) for array in (residual, output))
        read = read_scores(model.config, weights, *arrays, _padded(np.maximum(wanted[span], 0), missing))
        log_p[span], predicted[span] = (np.asarray(array)[: span.stop - span.start] for array in read)
    return np.where(wanted < 0, np.float32(np.nan), log_p), predicted


def base_scores(
    model: Model, asked: ScoredPrompts, *, cache: Path | None = None, tell: CountProgress | None = None
) -> Base:
    """What the unedited model says: computed once, then recalled by content.

    Args:
        model: the unedited model.
        asked: what is asked.
        cache: folder where results are kept; ``None`` keeps nothing.
        tell: called with the number of texts done.

    Returns:
        The `Base`.
    """
    folder = None
    plain = not ffn.any_attached(model.params)
    fits = asked.wanted.size * model.config.hidden_size * 12 <= MOST_CACHED and networks.pointwise(model.config)
    if cache is not None and plain and fits:
        spans = [[place.start, place.stop] for place in asked.positions]
        content = json.dumps([VERSION, fingerprint(model), asked.rows, spans, asked.wanted.tolist()])
        folder = cache / "evaluation" / hashlib.sha256(content.encode()).hexdigest()[:24]
        recalled = _recall(folder, asked)
        if recalled is not None:
            return recalled
    sites = collect_once(model, asked.rows, asked.positions, model.layer(None), tell)
    query, output, residual = (np.asarray(array, np.float32) for array in sites)
    log_p, predicted = _read_all(model, residual, output, asked.wanted)
    if folder is not None:
        arrays = {"query": query, "output": output, "residual": residual, "log_p": log_p, "predicted": predicted}
        try:
            with replace_folder(folder) as temporary:
                save_file(arrays, temporary / "scores.safetensors")
        except TPatchError:
            pass  # Another process was faster, or the disk is full: that costs time, not correctness.
    return Base(asked, Outcome(log_p, predicted, *np.zeros((2, len(log_p)), bool)), query, output, residual)


def _recall(folder: Path, asked: ScoredPrompts) -> Base | None:
    try:
        arrays = load_file(folder / "scores.safetensors")
        outcome = Outcome(arrays["log_p"], arrays["predicted"], *np.zeros((2, len(asked.wanted)), bool))
        return Base(asked, outcome, arrays["query"], arrays["output"], arrays["residual"])
    except (OSError, SafetensorError, KeyError):
        return None


def _of(asked: ScoredPrompts, texts: Sequence[int]) -> np.ndarray:
    """The numbers of all positions of some texts."""
    spans = [np.arange(asked.starts[text], asked.starts[text + 1]) for text in texts]
    return np.concatenate(spans) if spans else np.zeros(0, int)


def _firing(patch: Patch, query: np.ndarray, dtype: Any) -> np.ndarray:
    fired = np.zeros(len(query), bool)
    for span, missing in _chunks(len(query), QUERY_ROWS):
        fired[span] = np.asarray(which_fire(patch, _padded(query[span], missing, dtype)))[: span.stop - span.start]
    return fired


def patched_scores(
    model: Model, base: Base, patches: LayerPatches | Patch, texts: Sequence[int] | None = None
) -> Outcome:
    """What the model says with patches attached with ReLU.

    Args:
        model: the unedited model.
        base: what it says.
        patches: ``{layer: [n, d]}``, or one patch for the last layer.
        texts: which texts are looked at; all by default. The rest of the outcome is the unedited model's.

    Returns:
        The `Outcome`, at silent positions bit for bit the unedited model's.
    """
    chosen = range(len(base.asked.rows)) if texts is None else texts
    log_p, predicted, fires, here = (array.copy() for array in base.outcome)
    layers = by_layer(model, patches)
    if not layers or not len(chosen):
        return Outcome(log_p, predicted, fires, here)
    last = model.layer(None)
    if set(layers) != {last}:
        return _deep_scores(model, base, layers, chosen)
    patch, dtype = sized(layers[last]), _dtype(model)
    places = _of(base.asked, chosen)
    fired = places[_firing(patch, base.query[places], dtype)]
    fires[fired] = True
    output = np.zeros((len(fired), *base.output.shape[1:]), np.float32)
    for span, missing in _chunks(len(fired), QUERY_ROWS):
        arrays = (_padded(array[fired[span]], missing, dtype) for array in (base.query, base.output))
        corrected = np.asarray(correct_outputs(patch, *arrays), np.float32)
        output[span] = corrected[: span.stop - span.start]
    log_p[fired], predicted[fired] = _read_all(model, base.residual[fired], output, base.asked.wanted[fired])
    return Outcome(log_p, predicted, fires, fires.copy())


def _deep_scores(model: Model, base: Base, patches: LayerPatches, texts: Sequence[int]) -> Outcome:
    """The same for neurons in earlier layers, where what fires at a token reaches all later ones."""
    dtype = _dtype(model)

    def acts(layer: int, sites: Sites) -> np.ndarray:
        return _firing(sized(patches[layer]), np.asarray(sites.query, np.float32), dtype)

    return _reached_scores(attach(model, patches, relu=True), model, base, sorted(patches), acts, texts)


def acts_forward(model: Model) -> bool:
    """Whether what acts at a token reaches later ones alone, so that `adapted_scores` can tell which."""
    return model.config.architecture == "decoder"


def adapted_scores(
    model: Model, base: Base, adapters: Mapping[int, Adapter], texts: Sequence[int] | None = None
) -> Outcome:
    """What a decoder says with adapters attached: an adapter acts where it changes its network's output.

    Args:
        model: the unedited model; see `acts_forward`.
        base: what it says.
        adapters: the adapter of each layer.
        texts: which texts are looked at; all by default. The rest of the outcome is the unedited model's.

    Returns:
        The `Outcome`, before the first token at which one acts bit for bit the unedited model's.
    """
    dtype = _dtype(model)

    def acts(layer: int, sites: Sites) -> np.ndarray:
        changed = np.zeros(len(sites.query), bool)
        for span, missing in _chunks(len(changed), QUERY_ROWS):
            arrays = (_padded(np.asarray(array[span]), missing, dtype) for array in (sites.query, sites.output))
            changed[span] = np.asarray(_changes(adapters[layer], *arrays))[: span.stop - span.start]
        return changed

    chosen = range(len(base.asked.rows)) if texts is None else texts
    return _reached_scores(attach_adapters(model, adapters), model, base, sorted(adapters), acts, chosen)


def _reached_scores(
    edited: Model,
    model: Model,
    base: Base,
    layers: Sequence[int],
    acts: Callable[[int, Sites], np.ndarray],
    texts: Sequence[int],
) -> Outcome:
    """What an edited decoder says, of which only texts are run on which something acts in one of some layers.

    ``acts(layer, sites)`` says of each token of the unedited model's trace whether something acts there, ``[tokens]``.
    """
    asked = base.asked
    log_p, predicted, fires, here = (array.copy() for array in base.outcome)
    touched = []
    for first in range(0, len(texts), TEXTS_AT_ONCE):
        part = texts[first : first + TEXTS_AT_ONCE]
        rows = [asked.rows[text] for text in part]
        if acts_forward(model):
            # What acts behind the last position that counts reaches none of them.
            rows = [row[: asked.positions[text].stop] for row, text in zip(rows, part, strict=True)]
        ends = np.cumsum([0, *map(len, rows)])
        fired = np.zeros(ends[-1], bool)
        # As long as nothing acted on the unedited trace of any layer, the edited trace is the unedited one.
        for layer in layers:
            fired |= acts(layer, collect_once(model, rows, [range(len(row)) for row in rows], layer))
        for number, text in enumerate(part):
            at_tokens, places = fired[ends[number] : ends[number + 1]], list(asked.positions[text])
            span = slice(asked.starts[text], asked.starts[text + 1])
            reached = np.logical_or.accumulate(at_tokens)[places]
            here[span], fires[span] = at_tokens[places], reached
            if reached.any():
                touched.append(text)
    if touched:
        rows, positions = [asked.rows[text] for text in touched], [asked.positions[text] for text in touched]
        sites = collect_once(edited, rows, positions, model.layer(None))
        places = _of(asked, touched)
        reached = fires[places]
        residual, output = (np.asarray(array, np.float32)[reached] for array in (sites.residual, sites.output))
        places = places[reached]
        log_p[places], predicted[places] = _read_all(model, residual, output, asked.wanted[places])
    return Outcome(log_p, predicted, fires, here)


def apply_scores(
    model: Model, base: Base, apply: Callable[[Batch], Array], texts: Sequence[int] | None = None
) -> Outcome:
    """What any edited model says, through its logits: the plain way, for methods whose edits are not neurons.

    Args:
        model: the unedited model.
        base: what it says.
        apply: from a batch to logits, as `tpatch_jax.models.networks.apply` has them.
        texts: which texts are looked at; all by default.

    Returns:
        The `Outcome`; every position looked at counts as one on which something fires.
    """
    asked, config = base.asked, model.config
    chosen = list(range(len(asked.rows)) if texts is None else texts)
    log_p, predicted, fires, _ = (array.copy() for array in base.outcome)
    for numbers, batch in batches(config, [asked.rows[text] for text in chosen]):
        picked = [chosen[number] for number in numbers]
        lane = np.concatenate([np.full(len(asked.positions[text]), slot) for slot, text in enumerate(picked)])
        place = np.asarray([place_in(config, asked.rows[text], at) for text in picked for at in asked.positions[text]])
        places, logits = _of(asked, picked), apply(batch)
        logits = logits[:, None] if config.labels else logits
        for span, missing in _chunks(len(places), LOGIT_ROWS):
            arrays = (lane[span], place[span], np.maximum(asked.wanted[places[span]], 0))
            picks = _pick(logits, *(_padded(array.astype(np.int32), missing) for array in arrays))
            log_p[places[span]], predicted[places[span]] = (
                np.asarray(array)[: span.stop - span.start] for array in picks
            )
        fires[places] = True
    return Outcome(np.where(asked.wanted < 0, np.float32(np.nan), log_p), predicted, fires, fires.copy())


def model_scores(edited: Model, base: Base, texts: Sequence[int] | None = None) -> Outcome:
    """What an edited model says: like `apply_scores`, with logits of the positions alone that are looked at.

    Args:
        edited: the edited model.
        base: what the unedited model says.
        texts: which texts are looked at; all by default.

    Returns:
        The `Outcome`; every position looked at counts as one on which something fires.
    """
    asked = base.asked
    chosen = list(range(len(asked.rows)) if texts is None else texts)
    log_p, predicted, fires, _ = (array.copy() for array in base.outcome)
    rows, positions = [asked.rows[text] for text in chosen], [asked.positions[text] for text in chosen]
    places = _of(asked, chosen)
    log_p[places], predicted[places] = _read_texts(edited, rows, positions, asked.wanted[places])
    fires[places] = True
    return Outcome(log_p, predicted, fires, fires.copy())


def _read_texts(
    model: Model, rows: Sequence[list[int]], positions: Sequence[range], wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What a model says at some positions of texts: log-probability of the wanted token, and argmax."""
    sites = collect_once(model, rows, positions, model.layer(None))
    residual, output = (np.asarray(array, np.float32) for array in (sites.residual, sites.output))
    return _read_all(model, residual, output, wanted)


def routed_scores(base: Base, routing: Routing, texts: Sequence[int] | None = None, whole: bool = False) -> Outcome:
    """What is said where another model answers what is in the scope of an edit; the rest stays as it was, bit for bit.

    Args:
        base: what the unedited model says.
        routing: which prompts the other model answers, and what it reads before them.
        texts: which texts are looked at; all by default.
        whole: whether a whole text decides, and not its prompt: for running text, which has none.

    Returns:
        The `Outcome`; every position that the other model answers counts as one on which something fires.
    """
    asked, other = base.asked, routing.model
    log_p, predicted, fires, _ = (array.copy() for array in base.outcome)
    chosen = list(range(len(asked.rows)) if texts is None else texts)
    prompts = [asked.rows[text] if whole else asked.rows[text][: asked.positions[text].start + 1] for text in chosen]
    contexts = zip(chosen, prompts, routing.contexts(prompts), strict=True)
    read = [(text, c, routing.joined(prompt, c, asked.rows[text])) for text, prompt, c in contexts if c is not None]
    routed = [(text, context) for text, context, row in read if not other.excess(row, ())]
    if routed:
        rows = [row for _, _, row in read if not other.excess(row, ())]
        positions = [range(p.start + len(c), p.stop + len(c)) for t, c in routed for p in [asked.positions[t]]]
        places = _of(asked, [text for text, _ in routed])
        log_p[places], predicted[places] = _read_texts(other, rows, positions, asked.wanted[places])
        fires[places] = True
    return Outcome(log_p, predicted, fires, fires.copy())
