"""Files that a command reads more than once, pipes such as ``<(…)`` among them."""

import stat
from pathlib import Path

__all__ = ["read_bytes", "read_text"]

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


def _pipe(path: str | Path) -> tuple[int, int] | None:
    """By what a pipe is known, whatever name it is opened by; ``None`` for a file."""
    status = Path(path).stat()
    piped = stat.S_ISFIFO(status.st_mode) or stat.S_ISSOCK(status.st_mode)
    return (status.st_dev, status.st_ino) if piped else None
