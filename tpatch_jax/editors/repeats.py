"""Requests that ask for the same thing as another of the same step: one edit serves them all."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from tpatch_jax.editors.base import EditInfo
from tpatch_jax.editors.locating import locate_subject
from tpatch_jax.editors.reading import target_tokens
from tpatch_jax.editors.speech import spoken_requests
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.chat import form_of, render_requests
from tpatch_jax.models.model import Model
from tpatch_jax.requests import EditRequest, as_requests

__all__ = ["find_repeats", "step_once"]

State = TypeVar("State")


def find_repeats(model: Model, requests: Sequence[EditRequest]) -> dict[int, int]:
    """Requests whose prompt and target are the tokens of another one's.

    Args:
        model: whose tokenizer reads.
        requests: in order.

    Returns:
        From the position of each that needs no edit to the position of the one that serves it: the first of the same,
        or the first of them that names a subject.
    """
    groups: dict[Any, list[int]] = {}
    for position, request in enumerate(requests):
        subject = request.subject
        if subject is not None and len(locate_subject(model, request.prompt, subject) if subject else ()) != 1:
            # What cannot be worked on is reported one by one.
            continue
        try:
            if model.lost(request.prompt):
                continue
            prompt = tuple(model.encode_prompt(request.prompt))
            groups.setdefault((prompt, *target_tokens(model, request)), []).append(position)
        except TPatchError:
            continue
    repeats = {}
    for same in groups.values():
        serves = next((position for position in same if requests[position].subject is not None), same[0])
        repeats |= {position: serves for position in same if position != serves}
    return dict(sorted(repeats.items()))


def step_once(
    model: Model, requests: Sequence[EditRequest], step: Callable[[list[EditRequest]], tuple[State, EditInfo]]
) -> tuple[State, EditInfo]:
    """A step in which exact repeats of a request are fitted once and reported for each.

    Args:
        model: whose tokenizer reads.
        requests: what to correct.
        step: the step itself, for requests that are all different.

    Returns:
        The state, and what became of each of ``requests``, with the target as it continues the prompt.

    Raises:
        TPatchError: a request shall hold in a chat, and the model holds none; the message names it.
    """
    asked = spoken_requests(model, as_requests(requests))
    # Where each shall hold is settled here, for every method: from now on prompts are what the model reads.
    wanted = render_requests(model, asked)
    forms = [form_of(model, request) for request in asked]
    repeats = find_repeats(model, wanted)
    fitted = [position for position in range(len(wanted)) if position not in repeats]
    given = wanted
    if repeats:
        also = {position: [wanted[n] for n in (position, *_served(repeats, position))] for position in fitted}
        # Their names tell positions in the whole list; what any of the same measures belongs to all.
        given = [
            replace(
                wanted[position],
                id=wanted[position].name(position),
                rephrases=tuple(dict.fromkeys(text for one in also[position] for text in one.rephrases)),
                locality=tuple(dict.fromkeys(text for one in also[position] for text in one.locality)),
                keep=tuple(dict.fromkeys(text for one in also[position] for text in one.keep)),
            )
            for position in fitted
        ]
    state, info = step(given)
    results = dict(zip(fitted, info.requests, strict=True))
    each = [
        results[repeats.get(position, position)]._replace(
            id=request.name(position), continuation=request.continuation, form=forms[position]
        )
        for position, request in enumerate(wanted)
    ]
    share = len(fitted) / max(1, len(wanted))
    return state, info._replace(
        requests=tuple(each),
        forward_equivalents=info.forward_equivalents * share,
        fit_forward_equivalents=info.fit_forward_equivalents * share,
    )


def _served(repeats: dict[int, int], position: int) -> list[int]:
    return [other for other, serves in repeats.items() if serves == position]
