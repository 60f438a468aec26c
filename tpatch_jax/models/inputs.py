"""Inputs of models that do not write running text: whole claims and questions, one at a time.

A classifier and an encoder-decoder cannot sample text to stay silent on, so it is the user's to give: one input a line.
Their prompts are seen in other contexts than a decoder's: a text before them would be read as a part of them.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from tpatch_jax.audio import AudioPrompt, as_audio, change_audio
from tpatch_jax.core.checks import text_generator
from tpatch_jax.embeddings import EmbeddingPrompt
from tpatch_jax.errors import TPatchError
from tpatch_jax.images import as_image, change_image
from tpatch_jax.models.config import ImageInput
from tpatch_jax.models.image_reader import pixels_of
from tpatch_jax.models.wikitext import as_ordinary_text
from tpatch_jax.storage.image_file import PARTS, is_image_file, read_image_part
from tpatch_jax.storage.reading import read_text
from tpatch_jax.typing import TokenIds

__all__ = [
    "FIELDS",
    "audio_contexts",
    "embedding_contexts",
    "image_contexts",
    "input_contexts",
    "is_recordings",
    "read_inputs",
]

FIELDS = ("prompt", "text", "claim", "question", "sentence", "input", "src")
"""In JSON lines, the first of these that is there is the input."""


RECORDINGS = (".wav", ".flac", ".ogg", ".mp3")
"""Endings of files that are recordings."""


def is_recordings(path: str | Path | None) -> bool:
    """Whether a path is that of a folder, which then holds recordings."""
    return path is not None and Path(path).is_dir()


def read_inputs(path: str | Path) -> list[str]:
    """The inputs in a file: one a line, or one JSON object a line; or the pictures of an ``.npz``; or a folder's
    recordings.

    Args:
        path: the file, UTF-8; empty lines and repeated inputs are passed over. In JSON lines the input is the first of
            `FIELDS` that an object has, or the picture or recording at the path under ``"image"`` or ``"audio"``. Of an
            ``.npz`` the pictures of its first part are the inputs; see `tpatch_jax.storage.image_file`.

    Returns:
        The inputs in order.

    Raises:
        TPatchError: the file cannot be read, holds no input, or a line has none of the fields.
    """
    if is_recordings(path):
        files = sorted(file for file in Path(path).iterdir() if file.suffix.lower() in RECORDINGS)
        if not files:
            raise TPatchError(
                f"{path} holds no recording; give a folder with files that end in {', '.join(RECORDINGS)}"
            )
        return list(dict.fromkeys(as_audio(file, "the memory") for file in files))
    if is_image_file(path):
        return list(dict.fromkeys(read_image_part(path, PARTS, labels=False).images))
    try:
        # By line feeds alone: JSON leaves other breaks as they are.
        text = read_text(path, "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TPatchError(f"the memory text {path} cannot be read ({error}); give a UTF-8 text file") from None
    lines = as_ordinary_text(text).split("\n")
    lines = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    folder = Path(path).parent
    inputs = dict.fromkeys(_input(line, f"{path}, line {number}", folder) for number, line in lines)
    if not inputs:
        raise TPatchError(f"{path} holds no input; give a file with one input a line")
    return list(inputs)


def _input(line: str, where: str, folder: Path) -> str:
    if not line.startswith("{"):
        return line
    try:
        record = json.loads(line)
    except ValueError:
        return line
    if isinstance(record.get("image"), str):
        return as_image(record["image"], where, folder)
    if isinstance(record.get("audio"), str):
        return as_audio(record["audio"], where, folder)
    for name in FIELDS:
        if isinstance(record.get(name), str) and record[name].strip():
            return record[name].strip()
    raise TPatchError(f"{where}: none of the fields {', '.join(FIELDS)} holds a text; name the input by one of them")


def input_contexts(text: str, others: tuple[str, ...], count: int) -> list[str]:
    """An input in other shapes that say the same, or nearly: what its patch should hear as well.

    In turn a word is left out, several are, the input begins in its middle, and another input stands before or behind
    it. Only the shorter half of the words is ever left out, for the longer ones tell inputs apart. What happens to
    which words is drawn from the text itself.

    Args:
        text: the input.
        others: other inputs.
        count: how many.

    Example:
        >>> input_contexts("The sun is a star.", ("Water is wet.",), 5)[3:]
        ['Water is wet. The sun is a star.', 'The sun is a star. Water is wet.']
    """
    rng, words = text_generator(text), text.split()
    short = sorted(range(len(words)), key=lambda number: (len(words[number]), number))[: max(1, len(words) // 2)]

    def without(out: set[int]) -> str:
        return " ".join(word for number, word in enumerate(words) if number not in out)

    shapes = []
    for number in range(count):
        kind, other = number % 5, others[number // 5 % len(others)] if others else ""
        if len(words) < 3 or (kind > 2 and not other):
            shapes.append(text)
        elif kind == 0:
            shapes.append(without({short[int(rng.integers(len(short)))]}))
        elif kind == 1:
            several = max(1, len(short) * 2 // 3)
            shapes.append(without({short[pick] for pick in rng.permutation(len(short))[:several]}))
        elif kind == 2:
            middle = int(rng.integers(1, len(words)))
            shapes.append(" ".join([*words[middle:], *words[:middle]]))
        else:
            shapes.append(f"{other} {text}" if kind == 3 else f"{text} {other}")
    return shapes


MOVED, TURNED, BRIGHTER, NOISE = 2.5, 5.0, 0.15, 5.0
"""How far a picture is changed at most: in pixels, degrees, as a share of its brightness, and the noise's deviation."""


def image_contexts(image: ImageInput, row: TokenIds, count: int) -> list[list[int]]:
    """A picture in other shapes that show the same: what its patch should hear as well.

    Each is moved, turned, made brighter or darker, and noisy, all by amounts that are drawn from the picture itself.

    Args:
        image: what the network reads.
        row: the picture in tokens.
        count: how many.
    """
    pixels, rest = pixels_of(image, row), list(row[image.pixels :])
    rng = np.random.default_rng(np.frombuffer(hashlib.sha256(pixels.tobytes()).digest(), np.uint32))
    rows = []
    for _ in range(count):
        down, right, degrees, brightness, noise = rng.uniform(-1, 1, 5)
        changed = change_image(
            pixels,
            down=MOVED * down,
            right=MOVED * right,
            degrees=TURNED * degrees,
            brightness=1 + BRIGHTER * brightness,
            noise=abs(NOISE * noise) * rng.standard_normal(pixels.shape),
        )
        rows.append([*changed.reshape(-1).tolist(), *rest])
    return rows


CHANGES = (
    {"speed": 1.1},
    {"speed": 0.9},
    {"gain": 0.4, "noise": 0.03},
    {"speed": 1.2, "noise": 0.02},
    {"speed": 0.83, "gain": 1.5},
    {"speed": 1.05, "noise": 0.08},
    {"speed": 0.95, "gain": 0.6},
)
"""How a recording is changed, in turn: arguments of `tpatch_jax.audio.change_audio`."""


def audio_contexts(prompt: AudioPrompt, count: int, most: float = 30.0) -> list[AudioPrompt]:
    """A recording in other forms in which the same is said: what its patch should fire on as well.

    In turn it is faster and so higher, slower and lower, fainter, louder, noisy; by `CHANGES`. The noise is drawn from
    the recording itself.

    Args:
        prompt: the recording.
        count: how many.
        most: none is longer, in seconds; what would be stays as it is.

    Example:
        >>> import numpy as np
        >>> [round(one.seconds, 2) for one in audio_contexts(AudioPrompt(np.ones(16_000, np.float32)), 2)]
        [0.91, 1.11]
    """
    rng, shapes = text_generator(str(prompt)), []
    for number in range(count):
        change = CHANGES[number % len(CHANGES)]
        fits = prompt.seconds / change.get("speed", 1.0) <= most
        shapes.append(AudioPrompt(change_audio(prompt.samples, **change, rng=rng)) if fits else prompt)
    return shapes


SHAKEN = 0.2
"""How far embeddings are moved at most, as a share of their own standard deviation."""


def embedding_contexts(prompt: EmbeddingPrompt, count: int) -> list[EmbeddingPrompt]:
    """A prompt with embeddings that are nearly the same: what its patch should hear as well.

    What else shows the same only their maker knows: a request's ``rephrases`` say it, with ``train_on_rephrases``.

    Args:
        prompt: the prompt.
        count: how many.
    """
    rng, size = text_generator(prompt), SHAKEN * float(np.std(prompt.embeddings))
    return [
        EmbeddingPrompt(
            prompt.text,
            prompt.embeddings + size * (number + 1) / count * rng.standard_normal(prompt.embeddings.shape),
            prompt.positions,
        )
        for number in range(count)
    ]
