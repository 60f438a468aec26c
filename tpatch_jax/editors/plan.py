"""From requests to what an edit works on: each request that can be read, as inputs, with the places that matter."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from tpatch_jax.editors.reading import Item
from tpatch_jax.requests import EditRequest

__all__ = ["EditPlan", "plan_edits"]


class EditPlan(NamedTuple):
    """What an edit works on. Only its maker knows whether an input is tokens or something else, and what a place sees.

    Attributes:
        requests: all requests, in order.
        items: those that can be worked on, each in every context that it is seen in.
        problems: why the others cannot be, by their position in ``requests``.
    """

    requests: tuple[EditRequest, ...]
    items: tuple[Item, ...]
    problems: dict[int, str]

    @property
    def names(self) -> list[str]:
        """What reports call the requests."""
        return [request.name(position) for position, request in enumerate(self.requests)]

    def request_of(self, item: Item) -> EditRequest:
        """The request that an item was made from."""
        return self.requests[item.position]


def plan_edits(
    requests: Sequence[EditRequest],
    check: Callable[[Sequence[EditRequest]], dict[int, str]],
    read: Callable[[Iterable[tuple[int, EditRequest]]], Iterable[Item]],
) -> EditPlan:
    """The requests that can be worked on, as inputs of a model.

    Args:
        requests: what the user wants.
        check: requests that cannot be worked on, by position, with the reason.
        read: pairs of position and request, one after the other, to each request as inputs.
    """
    problems = check(requests)
    pairs = ((position, request) for position, request in enumerate(requests) if position not in problems)
    return EditPlan(tuple(requests), tuple(read(pairs)), problems)
