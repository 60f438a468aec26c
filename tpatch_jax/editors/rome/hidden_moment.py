"""What ROME and MEMIT know of a model before any edit: ``C`` of a layer's hidden neurons, and texts to put before a
prompt.

``C = E[k·kᵀ]``, uncentred, of the inputs of the down projection over all tokens of general text. Collected once per
model, layer and text; what is done is kept on disk, so that an interrupted collection goes on.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tpatch_jax.core import ffn
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.collection import batches
from tpatch_jax.models.fingerprint import fingerprint
from tpatch_jax.models.generation import sample
from tpatch_jax.models.memory_text import LENGTH, beginning, cache_of, first_token, memory_rows, read_memory_text
from tpatch_jax.models.model import Model
from tpatch_jax.storage.files import replace_folder
from tpatch_jax.typing import Params, PathLike, Progress, TokenIds

__all__ = ["hidden_moment", "moment_rows", "sampled_contexts", "sum_moments"]

VERSION = 1
SAVE_EVERY = 64
"""After so many texts what is done is kept."""

STARTS = ("The", "Therefore", "Because", "I", "You")
"""How contexts begin, in turn."""

TOP = 5
"""Contexts are drawn from so many most probable tokens."""


def moment_rows(
    model: Model,
    text: PathLike | None = None,
    tokens: int = 65536,
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """The texts behind ``C``, in tokens.

    Args:
        model: the model.
        text: a UTF-8 text file; by default the memory's texts, which the model itself says.
        tokens: at most so many tokens of the file, from its start.
        cache: folder where sampled texts are kept; ``None`` keeps nothing.
        progress: called with what is being done, how much is done, and how much there is.

    Raises:
        TPatchError: the text file is missing, not UTF-8, or too short.
    """
    rows = memory_rows(model, text, cache=cache, progress=progress)
    if text is None:
        return rows
    # The memory takes only the first few texts of a file; inverting C wants more.
    ids = beginning(model, read_memory_text(text), tokens)
    return [[*model.start, *ids[first : first + LENGTH]] for first in range(0, len(ids), LENGTH)]


@partial(jax.jit, static_argnames="activation")
def sum_moments(
    params: Params, query: Float[Array, "rows tokens d"], there: Float[Array, "rows tokens"], activation: str
) -> Float[Array, "hidden_neurons hidden_neurons"]:
    """``Σ k·kᵀ`` over the tokens that are no padding: ``[h, h]``."""
    keys = ffn.hidden(dict(params), query, activation).astype(jnp.float32) * there[..., None]
    return jnp.einsum("bth,bti->hi", keys, keys, precision="highest")


def hidden_moment(
    model: Model,
    layer: int,
    rows: Sequence[TokenIds],
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Float[Array, "hidden_neurons hidden_neurons"]:
    """``C = E[k·kᵀ]`` of one layer's hidden neurons.

    Args:
        model: the model, a decoder.
        layer: the layer.
        rows: token ids of each text; all tokens count, the first ones too.
        cache: folder where the sum so far is kept; ``None`` keeps nothing.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        ``[h, h]``, float32.

    Raises:
        TPatchError: the texts have fewer tokens than the layer has hidden neurons, so that ``C`` has no inverse.

    Source: Meng et al. 2022, section 3.1.

    Example:
        >>> hidden_moment(model, 10, moment_rows(model)).shape  # doctest: +SKIP
        (1536, 1536)
    """
    params, total = model.params["layers"][layer]["ffn"], sum(map(len, rows))
    width = ffn.width(params)
    if total < width:
        raise TPatchError(
            f"the text for the second moment has {total} tokens, layer {layer} has {width} hidden neurons: too few to "
            "tell them apart; give a longer text file (memory, and moment_tokens)"
        )
    folder, cache = None, cache_of(model, cache)
    if cache is not None:
        content = json.dumps([VERSION, fingerprint(model), layer, [list(map(int, row)) for row in rows]])
        folder = cache / "moments" / hashlib.sha256(content.encode()).hexdigest()[:24]
    done, moment = _recall(folder, width)
    while done < len(rows):
        if progress:
            progress(f"collecting statistics of layer {layer}", done, len(rows))
        part = rows[done : done + SAVE_EVERY]
        for numbers, batch in batches(model.config, part):
            query = model.trace(batch, layer).query
            there = np.zeros(query.shape[:2], np.float32)
            for lane, number in enumerate(numbers):
                there[lane, : len(part[number])] = 1
            moment = moment + sum_moments(ffn.detach(params), query, jax.device_put(there), model.config.activation)
        done += len(part)
        _keep(folder, done, moment)
    return moment / total


def _recall(folder: Path | None, width: int) -> tuple[int, Array]:
    """How many texts were done in an earlier run, and their sum; what is damaged is done again."""
    for path in sorted(folder.glob("[0-9]*"), reverse=True) if folder is not None else ():
        try:
            moment = load_file(path / "sum.safetensors")["sum"]
            if moment.shape == (width, width):
                return int(path.name), jax.device_put(moment)
        except (OSError, ValueError, KeyError, SafetensorError):
            pass
        shutil.rmtree(path, ignore_errors=True)
    return 0, jnp.zeros((width, width), jnp.float32)


def _keep(folder: Path | None, done: int, moment: Array) -> None:
    if folder is None:
        return
    older = list(folder.glob("[0-9]*"))
    try:
        # Names of one length, so that the last one in order is the latest.
        with replace_folder(folder / f"{done:09d}") as temporary:
            save_file({"sum": np.asarray(moment)}, temporary / "sum.safetensors")
    except TPatchError:
        # Another process was faster, or the disk is full: that costs time, not correctness.
        return
    for path in older:
        shutil.rmtree(path, ignore_errors=True)


def sampled_contexts(model: Model, counts: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """Short texts sampled from the model itself, to put before a prompt: each ends with a full stop.

    Args:
        model: the model, a decoder.
        counts: for each length in tokens how many texts.

    Returns:
        The texts, always the same of one model.

    Source: Meng et al. 2022 and 2023: ``text. prompt``, drawn from the 5 most probable tokens; the starts are those of
    the later paper's code.
    """
    texts = []
    for number, (length, count) in enumerate(counts):
        begun = [STARTS[n % len(STARTS)] for n in range(count)]
        rng = jax.random.fold_in(jax.random.key(0), number)
        # After what parts the texts it was trained on a model writes as in running text.
        prompts = [[first_token(model), *model.encode(start)] for start in begun]
        continuations = sample(model.config, model.params, prompts, length, rng, top_k=TOP, stops=model.stops)
        for start, more in zip(begun, continuations, strict=True):
            # The start is a part of the length.
            row = [*model.encode(start), *more][:length]
            texts.append(" ".join(model.decode(row).split()) + ".")
    return tuple(texts)
