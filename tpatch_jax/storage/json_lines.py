"""Files with one JSON object a line: read, with messages that name the line at fault."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tpatch_jax.errors import TPatchError
from tpatch_jax.storage.reading import read_bytes

__all__ = ["JsonLine", "read_json_lines"]


class JsonLine(NamedTuple):
    """One line of a file.

    Attributes:
        number: counted from 1.
        where: file and line, as a message begins.
        value: what it holds, not necessarily an object.
    """

    number: int
    where: str
    value: Any


def read_json_lines(
    path: str | Path, noun: str, pass_over: Callable[[str], object] | None = None
) -> Iterator[JsonLine]:
    """The lines of a file, one after the other.

    Args:
        path: the file, UTF-8; empty lines are passed over.
        noun: what a line holds, for messages, such as ``"request"``.
        pass_over: called with what is wrong with a line that cannot be read, which is then passed over; by default it
            is an error.

    Raises:
        TPatchError: the file is missing, or a line is not UTF-8 or not JSON.

    Example:
        >>> [line.value for line in read_json_lines("requests.jsonl", "request")]  # doctest: +SKIP
        [{'prompt': 'The capital of France is', 'target': 'Lyon'}]
    """
    path = Path(path)
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        raise TPatchError(f"{path} does not exist; give a file with one JSON {noun} a line") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise TPatchError(f"{path} cannot be read ({reason}); give a file with one JSON {noun} a line") from None
    for number, line in enumerate(content.split(b"\n"), 1):
        where = f"{path}, line {number}"
        try:
            text = _decoded(line, where, first=number == 1)
            if text.strip():
                yield JsonLine(number, where, _value(text, where))
        except _Unreadable as error:
            if pass_over is None:
                raise TPatchError(str(error)) from None
            pass_over(str(error))


class _Unreadable(Exception):
    """A line that is no JSON."""


def _decoded(line: bytes, where: str, first: bool) -> str:
    try:
        return line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise _Unreadable(f"{where}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None


def _value(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _Unreadable(f"{where}: not JSON ({error.msg}, column {error.colno}); one object a line") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, too many brackets
        raise _Unreadable(f"{where}: not JSON that can be read ({error}); one object a line") from None
