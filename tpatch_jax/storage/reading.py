"""Files that a command reads more than once, pipes such as ``<(…)`` among them."""

import stat
from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from tpatch_jax.errors import TPatchError

__all__ = ["read_bytes", "read_npz", "read_text"]

_PIPED: dict[tuple[int, int], bytes] = {}


def read_bytes(path: str | Path) -> bytes:
    """What a file holds. What comes through a pipe is kept, for a pipe gives it only once.

    Args:
        path: a file, or a pipe such as a shell's ``<(…)`` or ``/dev/stdin``; reading the same pipe again in this
            process gives what the first reading gave.

    Raises:
        OSError: it cannot be read.

    Example:
        >>> read_bytes("requests.jsonl")  # doctest: +SKIP
        b'{"prompt": "The capital of France is", "target": "Lyon"}'
    """
    key = _pipe(path)
    if key is None:
        return Path(path).read_bytes()
    if key not in _PIPED:
        _PIPED[key] = Path(path).read_bytes()
    return _PIPED[key]


def read_text(path: str | Path, encoding: str = "utf-8", most: int | None = None) -> str:
    """The same as text, with line feeds for all line ends.

    Args:
        path: a file or a pipe; see `read_bytes`.
        encoding: its encoding.
        most: so many characters from the start, of a long file no more is read; all when absent.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is not in the encoding.

    Example:
        >>> read_text("memory.txt", most=9)  # doctest: +SKIP
        'The sun i'
    """
    if _pipe(path) is None:
        with Path(path).open(encoding=encoding) as file:
            return file.read(most)
    text = read_bytes(path).decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    return text[:most]


def read_npz(path: Path, wanted: Callable[[str], bool]) -> tuple[dict[str, np.ndarray], str]:
    """Arrays of an ``.npz``, none of them of objects.

    Args:
        path: the file.
        wanted: whether an array is read, by its name.

    Returns:
        The arrays by name, and the names of all that are there, for a message.

    Raises:
        TPatchError: it cannot be read.

    Example:
        >>> read_npz(Path("chests.npz"), lambda name: name.endswith("_images"))  # doctest: +SKIP
    """
    try:
        # Opened here, for NumPy leaves a file open that turns out to be no archive.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if wanted(name)}, ", ".join(file.files) or "nothing"
    except (OSError, ValueError, BadZipFile, EOFError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise TPatchError(
            f"{path} is no .npz that can be read ({reason}); write it by numpy.savez, no objects in it"
        ) from None


def _pipe(path: str | Path) -> tuple[int, int] | None:
    """By what a pipe is known, whatever name it is opened by; ``None`` for a file."""
    status = Path(path).stat()
    piped = stat.S_ISFIFO(status.st_mode) or stat.S_ISSOCK(status.st_mode)
    return (status.st_dev, status.st_ino) if piped else None
