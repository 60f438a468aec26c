"""What an editor knows about a model before any edit: queries of unrelated text, and how contexts move a query.

By default the text is sampled from the model itself, if it is a decoder. Collected once per model, layer and text, then
cached.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tpatch_jax.editors.input_background import collect_inputs, input_rows
from tpatch_jax.editors.inputs import read_inputs
from tpatch_jax.errors import TPatchError
from tpatch_jax.files import replace_folder
from tpatch_jax.memory import nuisance_scatter
from tpatch_jax.models.collection import collect
from tpatch_jax.models.fingerprint import fingerprint, tokenizer_fingerprint
from tpatch_jax.models.generation import sample
from tpatch_jax.models.model import Model

__all__ = ["Background", "background", "beginning", "first_token", "memory_rows"]

VERSION = 6
TEXTS = 256
LENGTH = 64
PREFIX_LENGTHS = (5, 10, 5, 10, 8, 6, 10)
SPANS = 96
SPAN_CONTEXTS = 6
SPARE = 64

Progress = Callable[[str, int, int], None]


class Background(NamedTuple):
    """What is known about a model before any edit.

    Attributes:
        query: queries of unrelated text at the edited layer, ``[rows, d]``.
        nuisance: how a query moves when only the context before it changes, ``[d, d]``.
        prefixes: short texts to put before a prompt; of a model that reads whole inputs, other inputs.
        names: names found in the texts, to stand in for a subject.
        centres: of a classifier what stands beside the last FFN and what comes out of it, together, mean over the
            inputs of each label, ``[labels, d]``.
        answers: of an encoder-decoder the token that it says at each query, ``[rows]`` int: a patch that says the same
            need not stay silent there.
        rewordings: of an encoder-decoder the wordings that its memory has for one question; see
            `tpatch_jax.editors.rewordings`.
    """

    query: Array
    nuisance: Array
    prefixes: tuple[str, ...]
    names: tuple[str, ...]
    centres: Array | None = None
    answers: Array | None = None
    rewordings: Mapping[str, tuple[str, ...]] = MappingProxyType({})


def background(
    model: Model,
    layer: int,
    text: str | Path | None = None,
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Background:
    """Collect or recall what an editor needs to know about a model.

    Args:
        model: the model.
        layer: the edited layer.
        text: a UTF-8 text file for the memory, of which a decoder reads the first 16,384 tokens; by default text is
            sampled from the model itself, which only a decoder can. Other models read one input a line; see
            `tpatch_jax.editors.inputs`.
        cache: folder where results are kept; ``None`` keeps nothing.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        The `Background`.

    Raises:
        TPatchError: the text file is missing, not UTF-8, or too short.
    """
    mark = _mark(model, text) if cache is not None else ""
    folder = _folder(cache, f"{mark} {layer}")
    if folder is not None and (found := _load(folder)):
        return found
    rows = _texts(model, text, _folder(cache, mark), progress)
    if model.config.architecture == "decoder" or text is None:
        result = _collect(model, layer, rows, progress)
    else:
        report = (lambda done: progress("collecting memory", done, len(rows))) if progress else None
        result = Background(*collect_inputs(model, layer, rows, read_inputs(text), report))
    if folder is not None:
        _save(folder, result)
    return result


def memory_rows(
    model: Model, text: str | Path | None = None, *, cache: Path | None = None, progress: Progress | None = None
) -> list[list[int]]:
    """The texts behind the memory, in tokens: pieces of a file, or texts that the model itself says.

    Args:
        model: the model.
        text: a UTF-8 text file; by default text is sampled from the model.
        cache: folder where they are kept; ``None`` keeps nothing.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        At most 256 rows of at most 64 tokens, not counting those with which a text begins. Of a model that reads whole
        inputs, one row for each, with the model's own answer.

    Raises:
        TPatchError: the text file is missing, not UTF-8, or too short.
    """
    return _texts(model, text, _folder(cache, _mark(model, text)) if cache is not None else None, progress)


def _mark(model: Model, text: str | Path | None) -> str:
    source = "itself" if text is None else hashlib.sha256(_read(Path(text)).encode()).hexdigest()
    return f"{VERSION} {fingerprint(model)} {tokenizer_fingerprint(model)} {source}"


def _folder(cache: Path | None, mark: str) -> Path | None:
    return None if cache is None else cache / "background" / hashlib.sha256(mark.encode()).hexdigest()[:24]


def _texts(model: Model, text: str | Path | None, folder: Path | None, progress: Progress | None) -> list[list[int]]:
    """The texts behind the memory, in tokens: the same for every layer, so that sampling them is done once."""
    if folder is not None and folder.exists():
        try:
            found = load_file(folder / "texts.safetensors")
            return [part.tolist() for part in np.split(found["tokens"], np.cumsum(found["lengths"])[:-1])]
        except (OSError, ValueError, KeyError, SafetensorError):
            shutil.rmtree(folder, ignore_errors=True)
    if model.config.architecture != "decoder":
        rows = input_rows(model, text, progress)
    elif text is None:
        rows = _sampled(model, progress)
    else:
        ids = beginning(model, _read(Path(text)), TEXTS * LENGTH)
        starts = range(0, len(ids), LENGTH)
        rows = [[*model.start, *ids[first : first + LENGTH]] for first in starts]
    rows = [row for row in rows if len(row) > 2]
    if sum(map(len, rows)) < 2 * LENGTH:
        raise TPatchError(f"the memory text {text or 'sampled from the model'} is too short; give a longer text file")
    if folder is not None:
        arrays = {"tokens": np.concatenate([np.asarray(row, np.int32) for row in rows])}
        arrays["lengths"] = np.asarray([len(row) for row in rows], np.int32)
        _keep(folder, lambda temporary: save_file(arrays, temporary / "texts.safetensors"))
    return rows


def beginning(model: Model, text: str, tokens: int) -> list[int]:
    """The first tokens of a text, of which no more is read than that takes.

    Args:
        model: whose tokenizer reads.
        text: of any length.
        tokens: how many at most.
    """
    read = 8 * (tokens + SPARE)
    while True:
        ids = model.encode(text[:read])
        # Where the text is cut the last tokens may be others than in the whole.
        if read >= len(text) or len(ids) >= tokens + SPARE:
            return ids[:tokens]
        read *= 2


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TPatchError(f"the memory text {path} cannot be read ({error}); give a UTF-8 text file") from None


def first_token(model: Model) -> int:
    """The token after which a text begins.

    Args:
        model: a decoder.
    """
    tokenizer = model.tokenizer
    found = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.bos_token_id)
    return found if found is not None and found < model.config.vocabulary else tokenizer.eos_token_id or 0


def _sampled(model: Model, progress: Progress | None) -> list[list[int]]:
    rows: list[list[int]] = []
    lanes, first = 64, first_token(model)
    for done in range(0, TEXTS, lanes):
        if progress:
            progress("sampling memory text", done, TEXTS)
        key, begun = jax.random.fold_in(jax.random.key(0), done), [[first]] * lanes
        found = sample(model.config, model.params, begun, LENGTH - 1, key, temperature=0.9, stops=model.stops)
        rows.extend([first, *row] for row in found)
    if progress:
        progress("sampling memory text", TEXTS, TEXTS)
    return rows


def _collect(model: Model, layer: int, rows: list[list[int]], progress: Progress | None) -> Background:
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
        nuisance = jnp.eye(query.shape[-1])
    names = re.findall(r"(?<=[a-z,] )[A-Z][a-z]+(?: [A-Z][a-z]+)+", "\n".join(texts))
    return Background(query.astype(jnp.float32), nuisance, tuple(prefixes), tuple(dict.fromkeys(names))[:200])


def _keep(folder: Path, write: Callable[[Path], object]) -> None:
    try:
        with replace_folder(folder) as temporary:
            write(temporary)
    except TPatchError:
        # Another process was faster, or the disk is full: a cache that cannot be written costs time, not correctness.
        return


def _save(folder: Path, result: Background) -> None:
    def write(temporary: Path) -> None:
        found = {"query": result.query, "nuisance": result.nuisance, "centres": result.centres}
        found["answers"] = result.answers
        arrays = {name: np.asarray(array) for name, array in found.items() if array is not None}
        save_file(arrays, temporary / "arrays.safetensors")
        texts = {"prefixes": result.prefixes, "names": result.names, "rewordings": dict(result.rewordings)}
        (temporary / "background.json").write_text(json.dumps(texts, ensure_ascii=False, indent=1), "utf-8")

    _keep(folder, write)


def _load(folder: Path) -> Background | None:
    """What `_save` wrote, if anything; a damaged folder is removed, so that it is made again."""
    if not folder.exists():
        return None
    try:
        arrays = load_file(folder / "arrays.safetensors")
        texts = json.loads((folder / "background.json").read_text("utf-8"))
        query, nuisance = jnp.asarray(arrays["query"]), jnp.asarray(arrays["nuisance"])
        centres = jnp.asarray(arrays["centres"]) if "centres" in arrays else None
        answers = jnp.asarray(arrays["answers"]) if "answers" in arrays else None
        rewordings = {frame: tuple(others) for frame, others in texts["rewordings"].items()}
        named = tuple(texts["prefixes"]), tuple(texts["names"])
        return Background(query, nuisance, *named, centres, answers, rewordings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        shutil.rmtree(folder, ignore_errors=True)
        return None
