"""Requests that a method keeps beside its edits: under names of their own, and as arrays."""

import json
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from tpatch_jax.errors import TPatchError
from tpatch_jax.requests import EditRequest
from tpatch_jax.typing import Arrays

__all__ = ["find_kept", "name_request", "requests_from_array", "requests_to_array", "restore_stored", "save_stored"]

S = TypeVar("S")


def name_request(request: EditRequest, name: str, taken: set[str | None]) -> EditRequest:
    """The request under a name that no other has, by which it can be forgotten, without what only measures.

    Args:
        request: the request.
        name: what it is called if no other is.
        taken: the names of the others; the one that is given joins them.

    Example:
        >>> name_request(EditRequest("The capital of France is", "Lyon"), "a", {"a"}).id
        'a (2)'
    """
    chosen, number = name, 2
    while chosen in taken:
        chosen, number = f"{name} ({number})", number + 1
    taken.add(chosen)
    return EditRequest(request.prompt, request.target, request.subject, id=chosen, join=request.join)


def find_kept(requests: Sequence[EditRequest], names: Sequence[str], where: str) -> list[int]:
    """The places of the requests that stay when some are forgotten.

    Args:
        requests: what is kept beside the edits, each under a name that no other has.
        names: ids of those that are forgotten.
        where: what holds them, for the message.

    Raises:
        TPatchError: there is no edit of that name.

    Example:
        >>> find_kept([EditRequest("a", "b", id="x"), EditRequest("c", "d", id="y")], ["x"], "memory")
        [1]
    """
    known = [request.id for request in requests]
    for name in names:
        if name not in known:
            raise TPatchError(f"no edit {name!r} is in the {where}; it holds {', '.join(map(str, known)) or 'none'}")
    return [number for number, name in enumerate(known) if name not in names]


def requests_to_array(requests: Sequence[EditRequest]) -> np.ndarray:
    """Requests as JSON in UTF-8, ``[bytes]``.

    Example:
        >>> request = EditRequest("It costs $", "20", join="none")
        >>> requests_from_array(requests_to_array([request])) == (request,)
        True
    """
    fields = [[one.prompt, one.target, one.subject, one.id, one.join] for one in requests]
    return np.frombuffer(json.dumps(fields).encode(), np.uint8)


def requests_from_array(array: np.ndarray) -> tuple[EditRequest, ...]:
    """The inverse of `requests_to_array`; what was kept before requests said how they are joined is read as well."""
    fields = json.loads(array.tobytes())
    return tuple(EditRequest(*one[:3], id=one[3], join=one[4] if len(one) > 4 else None) for one in fields)


def save_stored(state: Any, *names: str) -> Arrays:
    """Some arrays of a state by their names, and its requests as JSON in UTF-8.

    Args:
        state: a named tuple that has them and ``requests``.
        names: of the arrays.
    """
    return {**{name: getattr(state, name) for name in names}, "requests": requests_to_array(state.requests)}


def restore_stored(state: S, arrays: Arrays, *names: str) -> S:
    """The inverse of `save_stored`.

    Args:
        state: a fresh one.
        arrays: what was saved.
        names: of the arrays.
    """
    read = {name: np.array(arrays[name]) for name in names}
    return state._replace(requests=requests_from_array(arrays["requests"]), **read)  # type: ignore[attr-defined]
