"""The journal: lines of JSON, each sealed with the digest of itself and the one before.

A line that is altered, missing or out of place breaks the chain; the first line is chained to the manifest. The head
says how many lines there are at least, so that lines missing at the end are noticed too.
"""

import json
from typing import Any, NamedTuple

from tpatch_jax.bank.layout import digest

__all__ = ["Chain", "Line", "read_chain", "seal"]

_MARK = b', "check": "'


class Line(NamedTuple):
    """One line of a journal.

    Attributes:
        record: what it says.
        content: its bytes, newline included.
        check: its seal.
    """

    record: dict[str, Any]
    content: bytes
    check: str


class Chain(NamedTuple):
    """What a journal's bytes hold.

    Attributes:
        lines: those that are whole, from the start to the first that is not.
        torn: whether the rest is the beginning of a line, as a crash leaves it.
        problem: what is wrong with the line after the last good one, else empty.
    """

    lines: tuple[Line, ...]
    torn: bool
    problem: str


def seal(record: dict[str, Any], previous: str) -> Line:
    """A record as the line that follows the one sealed ``previous``.

    Example:
        >>> seal({"n": 1}, "").content[:9]
        b'{"n": 1, '
    """
    body = json.dumps(record, ensure_ascii=False)[:-1].encode()
    check = digest(previous.encode() + body)
    return Line(record, body + _MARK + check.encode() + b'"}\n', check)


def _unseal(content: bytes, previous: str) -> Line | None:
    body, _, rest = content.rpartition(_MARK)
    check = digest(previous.encode() + body)
    if rest != check.encode() + b'"}\n':
        return None
    return Line(json.loads(body + b"}"), content, check)


def read_chain(content: bytes, start: str) -> Chain:
    """The lines of a journal, as far as each follows from the one before.

    Args:
        content: the journal's bytes.
        start: the seal that the first line is chained to: the manifest's.

    Example:
        >>> first = seal({"n": 1}, "start")
        >>> chain = read_chain(first.content + b'{"n": 2', "start")
        >>> len(chain.lines), chain.torn
        (1, True)
    """
    lines: list[Line] = []
    whole, _, rest = content.rpartition(b"\n")
    parts = [part + b"\n" for part in whole.split(b"\n")] if whole else []
    for part in [*parts, rest] if rest else parts:
        line = _unseal(part, lines[-1].check if lines else start)
        if line is None:
            torn = not part.endswith(b"\n")
            return Chain(tuple(lines), torn, f"line {len(lines) + 1} is not what was written")
        lines.append(line)
    return Chain(tuple(lines), False, "")
