"""What an editor knows about a model before any edit: queries of unrelated text, and how contexts move a query.

By default the text is sampled from the model itself, if it is a decoder. Collected once per model, layer and text, then
cached.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors import SafetensorError
from safetensors.numpy import load_file, save, save_file

from tpatch_jax.core.memory import NO_ANSWER, nuisance_scatter
from tpatch_jax.editors.input_memory import collect_inputs
from tpatch_jax.embeddings import EmbeddingPrompt
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.collection import collect, predicted
from tpatch_jax.models.derived import derive_once
from tpatch_jax.models.inputs import read_inputs
from tpatch_jax.models.memory_text import cache_of, keep_folder, memory_folder, memory_texts, text_mark
from tpatch_jax.models.model import Model
from tpatch_jax.storage.embedding_file import read_embedding_file
from tpatch_jax.storage.image_file import is_image_file
from tpatch_jax.typing import Progress

__all__ = ["PACKED", "ModelMemory", "collect_model_memory", "find_names", "pack_memory"]

PREFIX_LENGTHS = (5, 10, 5, 10, 8, 6, 10)
FILES = ("arrays.safetensors", "background.json")
PACKED, TEXTS = ".safetensors", "texts"
"""How the names of files from `pack_memory` end, and the array in them that holds texts."""
PASSAGES, PASSAGE_WORDS = 4, 32
"""A passage is made of so many texts, and has so many words at most."""

LEAST_TEXTS = 2048
"""So many queries of text stand in a memory of embeddings at least, if there are."""

SPANS = 96
SPAN_CONTEXTS = 6


class ModelMemory(NamedTuple):
    """What is known about a model before any edit.

    Attributes:
        query: queries of unrelated text at the edited layer, ``[rows, d]``.
        nuisance: how a query moves when only the context before it changes, ``[d, d]``.
        prefixes: short texts to put before a prompt; of a model that reads whole inputs, other inputs.
        names: names found in the texts, to stand in for a subject.
        centres: of a classifier what stands beside the last FFN and what comes out of it, together, mean over the
            inputs of each label, ``[labels, d]``.
        answers: of an encoder-decoder the token that it says at each query, of an image classifier the label, of
            embeddings the token behind them, ``[rows]`` int: a patch that says the same need not stay silent there.
        rewordings: of an encoder-decoder the wordings that its memory has for one question; see
            `tpatch_jax.editors.rewordings`.
        passage: a longer text to put before a prompt; empty for a model that reads whole inputs.
        cache: folder where what else is derived from the model is kept; ``None`` keeps nothing.
    """

    query: Array
    nuisance: Array
    prefixes: tuple[str, ...]
    names: tuple[str, ...]
    centres: Array | None = None
    answers: Array | None = None
    rewordings: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    passage: str = ""
    cache: Path | None = None


def collect_model_memory(
    model: Model,
    layer: int,
    text: str | Path | None = None,
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
    texts: list[list[int]] | None = None,
) -> ModelMemory:
    """Collect or recall what an editor needs to know about a model.

    Args:
        model: the model.
        layer: the edited layer.
        text: a UTF-8 text file for the memory, of which a decoder reads the first 16,384 tokens; by default text is
            sampled from the model itself, which only a decoder can. Other models read one input a line; see
            `tpatch_jax.models.inputs`. An ``.npz`` holds a decoder's embeddings, which stand in the memory beside text
            that it samples; see `tpatch_jax.storage.embedding_file`.
        cache: folder where results are kept; ``None`` keeps nothing.
        progress: called with what is being done, how much is done, and how much there is.
        texts: a list for the texts in tokens, which the first of several layers fills and the others read; without a
            cache they would be sampled for each.

    Returns:
        The `ModelMemory`.

    Raises:
        TPatchError: the text file is missing, not UTF-8, or too short; or the file of embeddings is none.
    """
    cache = cache_of(model, cache)
    if text is not None and Path(text).suffix == PACKED:
        return _unpacked(Path(text), model.config.hidden_size)._replace(cache=cache)
    if text is not None and is_image_file(text) and model.config.architecture == "decoder":
        groups = read_embedding_file(text, model.config.hidden_size)
        known = collect_model_memory(model, layer, cache=cache, progress=progress, texts=texts)
        return _beside_embeddings(model, layer, known, groups, progress)
    mark = text_mark(model, text) if cache is not None else ""
    folder = memory_folder(cache, f"{mark} {layer}")
    if folder is not None and (known := _recall(model, folder, cache)):
        return known
    rows = texts or memory_texts(model, text, memory_folder(cache, mark), progress)
    if texts is not None:
        texts[:] = rows
    if model.config.architecture == "decoder" or text is None:
        result = _collect(model, layer, rows, progress)
    else:
        report = (lambda done: progress("collecting memory", done, len(rows))) if progress else None
        result = ModelMemory(*collect_inputs(model, layer, rows, read_inputs(text), report))
    if folder is not None:
        _save(folder, result)
    return result._replace(cache=cache)


def _collect(model: Model, layer: int, rows: list[list[int]], progress: Progress | None) -> ModelMemory:
    report = (lambda done: progress("collecting memory", done, len(rows))) if progress else None
    # A text's first token is the same in all of them and looks like no other query.
    query = collect(model, rows, [range(1, len(row)) for row in rows], layer, report).query
    texts = [model.decode(row[1:]) for row in rows]
    words = [text.split() for text in texts if len(text.split()) >= 16]
    prefixes = []
    for sentence, length in zip(words, PREFIX_LENGTHS, strict=False):
        prefixes.append(" ".join(sentence[:length]).strip(" .,;:!?") + ".")
    spans, positions = [], []
    for sentence in words[len(PREFIX_LENGTHS) :][:SPANS]:
        for prefix in ["", *prefixes][:SPAN_CONTEXTS]:
            ids = model.encode_prompt(f"{prefix} {' '.join(sentence[:12])}".strip())
            spans.append(ids)
            positions.append(range(len(ids) - 3, len(ids)))
    if spans and all(len(ids) >= 3 for ids in spans):
        contexts = min(SPAN_CONTEXTS, 1 + len(prefixes))
        sites = collect(model, spans, positions, layer).query
        groups = sites.reshape(-1, contexts, 3, sites.shape[-1]).swapaxes(1, 2).reshape(-1, contexts, sites.shape[-1])
        nuisance = nuisance_scatter(groups)
    else:
        nuisance = jax.device_put(np.eye(query.shape[-1], dtype=np.float32))
    names = find_names(texts)
    passage = " ".join(" ".join(texts[-PASSAGES:]).split()[:PASSAGE_WORDS])
    known = tuple(prefixes), names
    return ModelMemory(query.astype(jnp.float32), nuisance, *known, passage=passage)


def _beside_embeddings(
    model: Model, layer: int, known: ModelMemory, groups: list[list[EmbeddingPrompt]], progress: Progress | None
) -> ModelMemory:
    """A memory of texts with embeddings in it, where what is asked of them is answered.

    Texts are as many as they at most, or a key would look away from what tells texts apart, not things.
    """
    rows = [model.encode_prompt(prompt) for group in groups for prompt in group]
    report = (lambda done: progress("collecting memory", done, len(rows))) if progress else None
    sites = collect(model, rows, [range(len(row) - 1, len(row)) for row in rows], layer, report)
    seen, texts = np.asarray(sites.query, np.float32), np.asarray(known.query, np.float32)
    texts = texts[:: -(-len(texts) // max(len(seen), LEAST_TEXTS))]
    nuisance, shapes, answers = known.nuisance, len(groups[0]), None
    if shapes > 1:
        nuisance = nuisance_scatter(jax.device_put(seen.reshape(len(groups), shapes, -1)))
    if layer == model.layer(None):
        # Answers are often few: a neuron may fire where its target is said anyway.
        said = predicted(model, sites)
        answers = jax.device_put(np.concatenate([said, np.full(len(texts), NO_ANSWER, np.int32)]))
    query = jax.device_put(np.concatenate([seen, texts]))
    return known._replace(query=query, nuisance=nuisance, answers=answers)


def find_names(texts: Sequence[str]) -> tuple[str, ...]:
    """Names of several words in texts, each once, at most 200 of them.

    Args:
        texts: running text.

    Example:
        >>> find_names(["In Rome she met Ada Lovelace, who knew Charles Babbage."])
        ('Ada Lovelace', 'Charles Babbage')
    """
    names = re.findall(r"(?<=[a-z,] )[A-Z][a-z]+(?: [A-Z][a-z]+)+", "\n".join(texts))
    return tuple(dict.fromkeys(names))[:200]


def _parts(result: ModelMemory) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a memory, and its texts."""
    fields = {"query": result.query, "nuisance": result.nuisance, "centres": result.centres}
    fields["answers"] = result.answers
    texts = {"prefixes": result.prefixes, "names": result.names, "passage": result.passage}
    arrays = {name: np.asarray(array) for name, array in fields.items() if array is not None}
    return arrays, {**texts, "rewordings": dict(result.rewordings)}


def _joined(arrays: Mapping[str, np.ndarray], texts: Mapping[str, Any]) -> ModelMemory:
    """The inverse of `_parts`."""
    query, nuisance = (jax.device_put(arrays[name]) for name in ("query", "nuisance"))
    centres, answers = (jax.device_put(arrays[name]) if name in arrays else None for name in ("centres", "answers"))
    rewordings = {frame: tuple(others) for frame, others in texts["rewordings"].items()}
    named = tuple(texts["prefixes"]), tuple(texts["names"])
    return ModelMemory(query, nuisance, *named, centres, answers, rewordings, str(texts["passage"]))


def pack_memory(memory: ModelMemory) -> bytes:
    """A memory as one file, which `collect_model_memory` reads in the place of texts or pictures.

    Args:
        memory: the memory.
    """
    arrays, texts = _parts(memory)
    written = json.dumps(texts, ensure_ascii=False).encode()
    return save({**arrays, TEXTS: np.frombuffer(written, np.uint8)})


def _unpacked(path: Path, hidden_size: int) -> ModelMemory:
    """The inverse of `pack_memory`."""
    try:
        arrays = load_file(path)
        known = _joined(arrays, json.loads(arrays[TEXTS].tobytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise TPatchError(
            f"{path} holds no memory that can be read ({error}); give the file that it was made from"
        ) from None
    if known.query.shape[-1] != hidden_size:
        raise TPatchError(
            f"{path} is the memory of a model {known.query.shape[-1]} wide, and this one is {hidden_size}"
        )
    return known


def _save(folder: Path, result: ModelMemory) -> None:
    def write(temporary: Path) -> None:
        arrays, texts = _parts(result)
        save_file(arrays, temporary / FILES[0])
        (temporary / FILES[1]).write_text(json.dumps(texts, ensure_ascii=False, indent=1), "utf-8")

    keep_folder(folder, write)


def _recall(model: Model, folder: Path, cache: Path | None) -> ModelMemory | None:
    """What `_save` wrote, read once for a model as long as the files stay what they are."""

    def load() -> ModelMemory | None:
        known = _load(folder)
        return None if known is None else known._replace(cache=cache)

    try:
        stats = [(folder / name).stat() for name in FILES]
    except OSError:
        return load()
    state = tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats)
    return derive_once(model, "memory", (folder, state), load)


def _load(folder: Path) -> ModelMemory | None:
    """What `_save` wrote, if anything; a damaged folder is removed, so that it is made again."""
    if not folder.exists():
        return None
    try:
        return _joined(load_file(folder / FILES[0]), json.loads((folder / FILES[1]).read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        shutil.rmtree(folder, ignore_errors=True)
        return None
