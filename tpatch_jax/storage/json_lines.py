"""Files with one JSON object a line: read, with messages that name the line at fault."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tpatch_jax.errors import TPatchError

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


def read_json_lines(path: str | Path, noun: str) -> Iterator[JsonLine]:
    """The lines of a file, one after the other.

    Args:
        path: the file, UTF-8; empty lines are passed over.
        noun: what a line holds, for messages, such as ``"request"``.

    Raises:
        TPatchError: the file is missing or not UTF-8, or a line is not JSON.

    Example:
        >>> [line.value for line in read_json_lines("requests.jsonl", "request")]  # doctest: +SKIP
        [{'prompt': 'The capital of France is', 'target': 'Lyon'}]
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise TPatchError(f"{path} does not exist; give a file with one JSON {noun} a line") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise TPatchError(f"{path} cannot be read ({reason}); give a file with one JSON {noun} a line") from None
    for number, line in enumerate(content.split(b"\n"), 1):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise TPatchError(f"{where}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise TPatchError(f"{where}: not JSON ({error.msg}, column {error.colno}); one object a line") from None
        except (ValueError, RecursionError) as error:  # a number of too many digits, too many brackets
            raise TPatchError(f"{where}: not JSON that can be read ({error}); one object a line") from None
        yield JsonLine(number, where, value)
