"""The text behind query memories, in tokens: pieces of a file, texts that the model itself says, or inputs."""

import hashlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tpatch_jax.core import ffn
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.fingerprint import fingerprint, tokenizer_fingerprint
from tpatch_jax.models.generation import greedy, sample
from tpatch_jax.models.inputs import is_recordings, read_inputs
from tpatch_jax.models.model import Model
from tpatch_jax.models.wikitext import as_ordinary_text
from tpatch_jax.storage.files import replace_folder
from tpatch_jax.storage.image_file import is_image_file
from tpatch_jax.storage.reading import read_text
from tpatch_jax.typing import Progress

__all__ = [
    "LENGTH",
    "beginning",
    "cache_of",
    "first_token",
    "keep_folder",
    "memory_folder",
    "memory_rows",
    "memory_texts",
    "read_memory_text",
    "text_mark",
]

_log = logging.getLogger(__name__)
_told: set[str] = set()

VERSION = 6
TEXTS = 256
LENGTH = 64
SPARE = 64
INPUTS = 16_384
"""So many inputs are read at most."""
PIXELS = 2**26
"""Of images only so many that they have no more pixels together."""
LANES = 64
ANSWER_TOKENS = 24


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
    cache = cache_of(model, cache)
    return memory_texts(
        model, text, memory_folder(cache, text_mark(model, text)) if cache is not None else None, progress
    )


def text_mark(model: Model, text: str | Path | None) -> str:
    """What the texts behind a memory depend on, as one line; the cache keeps them under it."""
    if is_image_file(text) and text is not None:
        source = hashlib.sha256(Path(text).read_bytes()).hexdigest() if Path(text).is_file() else "missing"
    elif model.audio is not None and text is not None:
        # Recordings count by what they hold, whatever their files are called.
        source = hashlib.sha256(" ".join(read_inputs(text)).encode()).hexdigest()
    else:
        source = "itself" if text is None else hashlib.sha256(read_memory_text(text).encode()).hexdigest()
    return f"{VERSION} {fingerprint(model)} {tokenizer_fingerprint(model)} {source}"


def cache_of(model: Model, cache: Path | None) -> Path | None:
    """The folder where what is derived from a model is kept: none for one with something attached.

    A fingerprint leaves out what is attached, so that the bare model would take what was derived from the patched one.

    Args:
        model: the model.
        cache: the folder for a bare one.
    """
    return None if ffn.any_attached(model.params) else cache


def memory_folder(cache: Path | None, mark: str) -> Path | None:
    """The folder of the cache that a mark belongs to; none without a cache."""
    return None if cache is None else cache / "background" / hashlib.sha256(mark.encode()).hexdigest()[:24]


def memory_texts(
    model: Model, text: str | Path | None, folder: Path | None, progress: Progress | None
) -> list[list[int]]:
    """The texts behind the memory, in tokens: the same for every layer, so that sampling them is done once."""
    if model.config.image is not None or model.audio is not None:
        # They are read as quickly from their own file, and are nobody's to keep.
        folder = None
    if folder is not None and folder.exists():
        try:
            arrays = load_file(folder / "texts.safetensors")
            return [part.tolist() for part in np.split(arrays["tokens"], np.cumsum(arrays["lengths"])[:-1])]
        except (OSError, ValueError, KeyError, SafetensorError):
            shutil.rmtree(folder, ignore_errors=True)
    if model.config.architecture != "decoder":
        rows = _input_rows(model, text, progress)
    elif text is None:
        rows = _sampled(model, progress)
    else:
        ids = beginning(model, read_memory_text(text), TEXTS * LENGTH)
        starts = range(0, len(ids), LENGTH)
        rows = [[*model.start, *ids[first : first + LENGTH]] for first in starts]
    rows = [row for row in rows if len(row) > 2]
    if sum(map(len, rows)) < 2 * LENGTH:
        raise TPatchError(f"the memory text {text or 'sampled from the model'} is too short; give a longer text file")
    if folder is not None:
        arrays = {"tokens": np.concatenate([np.asarray(row, np.int32) for row in rows])}
        arrays["lengths"] = np.asarray([len(row) for row in rows], np.int32)
        keep_folder(folder, lambda temporary: save_file(arrays, temporary / "texts.safetensors"))
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


def read_memory_text(path: str | Path) -> str:
    """A memory text as ordinary text: one in WikiText's raw form is detokenized by rule, and the log says so.

    The cache keeps what is made of a text under the text that comes out, never under the raw form.

    Args:
        path: a UTF-8 text file.

    Raises:
        TPatchError: it is missing or not UTF-8.

    Example:
        >>> read_memory_text("wikitext-2-raw.test.txt")[:15]  # doctest: +SKIP
        'Robert Boulter\\n'
    """
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise TPatchError(f"the memory text {path} cannot be read ({error}); give a UTF-8 text file") from None
    ordinary = as_ordinary_text(text)
    if ordinary != text and str(path) not in _told:
        _told.add(str(path))
        _log.warning("the memory text %s is WikiText in its raw form; it is detokenized by rule", path)
    return ordinary


def first_token(model: Model) -> int:
    """The token after which a text begins.

    Args:
        model: a decoder.
    """
    tokenizer = model.tokenizer
    token = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.bos_token_id)
    return token if token is not None and token < model.config.vocabulary else tokenizer.eos_token_id or 0


def _sampled(model: Model, progress: Progress | None) -> list[list[int]]:
    rows: list[list[int]] = []
    lanes, first = min(64, TEXTS), first_token(model)
    for done in range(0, TEXTS, lanes):
        if progress:
            progress("sampling memory text", done, TEXTS)
        key, begun = jax.random.fold_in(jax.random.key(0), done), [[first]] * lanes
        texts = sample(model.config, model.params, begun, LENGTH - 1, key, temperature=0.9, stops=model.stops)
        rows.extend([first, *row] for row in texts)
    if progress:
        progress("sampling memory text", TEXTS, TEXTS)
    return rows


def _input_rows(
    model: Model, text: str | Path | None, progress: Callable[[str, int, int], None] | None
) -> list[list[int]]:
    """Inputs in tokens, and what an encoder-decoder answers to them.

    Args:
        model: a classifier or an encoder-decoder.
        text: a file of inputs; see `tpatch_jax.models.inputs.read_inputs`.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        A row for each input that the model can read, at most 16,384.

    Raises:
        TPatchError: there is no file, or it cannot be read.
    """
    if text is None and model.config.image is not None:
        raise TPatchError(
            f"{model.name!r} reads images, of which patches need some to stay silent on; give an .npz with "
            "train_images, for instance those it was trained on (--memory FILE, memory=)"
        )
    if text is None and model.audio is not None:
        raise TPatchError(
            f"{model.name!r} reads sound, and patches need recordings to stay silent on; give a folder of them, or a "
            'file with {"audio": PATH} a line (--memory, memory=)'
        )
    if text is None:
        raise TPatchError(
            f"{model.name!r} is an {model.config.architecture}, which cannot sample text to stay silent on; give a "
            "file of inputs, one a line, for instance those it was trained on (--memory FILE, memory=)"
        )
    if is_recordings(text) and model.audio is None:
        raise TPatchError(f"{text} is a folder, and {model.name!r} reads no recordings; give a file of inputs")
    inputs = read_inputs(text)
    most = INPUTS if model.config.image is None else max(1, min(INPUTS, PIXELS // model.config.image.pixels))
    chosen = np.sort(np.random.default_rng(0).permutation(len(inputs))[:most])
    rows = [model.encode_prompt(inputs[number]) for number in chosen]
    rows = [row for row in rows if not model.excess(row, ())]
    if not model.config.encoder:
        return rows
    # Neighbours in length share a batch, so that little of it is padding.
    order = np.argsort([len(row) for row in rows], kind="stable")
    answered: list[list[int]] = [[] for _ in rows]
    # Of sound one at a time: an encoder's states of one recording are as large as those of many texts.
    lanes, most = (LANES, ANSWER_TOKENS) if model.audio is None else (1, model.config.context - len(model.begin))
    for first in range(0, len(rows), lanes):
        if progress:
            progress("answering inputs", first, len(rows))
        part = order[first : first + lanes]
        prompts = [rows[n] for n in part]
        said = greedy(model.config, model.params, prompts, most, model.stops, never=model.never)
        for number, answer in zip(part, said, strict=True):
            # An answer that was cut off has no end to stay silent on.
            end = [] if len(answer) == most else [model.end]
            answered[number] = [*rows[number], *answer, *end]
    if progress:
        progress("answering inputs", len(rows), len(rows))
    return answered


def keep_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Keep in the cache what ``write`` puts into a folder, if that can be done."""
    try:
        with replace_folder(folder) as temporary:
            write(temporary)
    except TPatchError:
        # Another process was faster, or the disk is full: a cache that cannot be written costs time, not correctness.
        return
