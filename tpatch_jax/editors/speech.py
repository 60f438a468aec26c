"""Requests about recordings, as a model of speech reads them: what its transcript says, and what it should say."""

import dataclasses
import difflib
import re
from collections.abc import Sequence

from tpatch_jax.audio import AudioPrompt
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.model import Model
from tpatch_jax.requests import EditRequest

__all__ = ["nearest_words", "spoken_requests"]

LIKE = 0.5
"""Words are taken for the target written wrongly if so much of their letters is the same."""

MORE = 3
"""What is written wrongly may have so many words more or fewer than the target."""


def _letters(text: str) -> str:
    return "".join(re.findall(r"\w", text)).lower()


def nearest_words(said: str, target: str) -> tuple[int, int, float]:
    """The words of a transcript that are most like a target, however they are put apart.

    Args:
        said: the transcript.
        target: what should be said.

    Returns:
        From where to where they stand, without the signs around them, and how much is alike, from 0 to 1.

    Example:
        >>> nearest_words("The patient takes me to prala every day.", "metoprolol")[:2]
        (18, 29)
    """
    words = [match.span() for match in re.finditer(r"\w(?:\S*\w)?", said)]
    wanted, count = _letters(target), len(target.split())
    best = (0, 0, 0.0)
    for first in range(len(words)):
        for last in range(first, min(len(words), first + count + MORE)):
            begin, end = words[first][0], words[last][1]
            ratio = difflib.SequenceMatcher(None, _letters(said[begin:end]), wanted, autojunk=False).ratio()
            if ratio > best[2]:
                best = begin, end, ratio
    return best


def _spans(said: str, words: str) -> list[tuple[int, int]]:
    """Where words stand in a transcript, as whole words."""
    return [match.span() for match in re.finditer(rf"(?<!\w){re.escape(words)}(?!\w)", said)]


def _corrected(said: str, request: EditRequest) -> tuple[str, tuple[int, int]]:
    """The transcript with the target in it, and where the first of it stands.

    Raises:
        TPatchError: it is not clear what the target stands for.
    """
    target = request.target.strip()
    if request.instead_of is None:
        if spans := _spans(said, target):
            return said, spans[0]
        begin, end, ratio = nearest_words(said, target)
        if ratio < LIKE:
            raise TPatchError(
                f"the transcript is {said!r}, in which nothing is like {target!r}; say what it stands for: "
                '"instead_of": …'
            )
        spans = [(begin, end)]
    else:
        spans = _spans(said, request.instead_of)
        if not spans and (there := _spans(said, target)):
            return said, there[0]
        if not spans:
            raise TPatchError(
                f"the transcript is {said!r}, which does not say {request.instead_of!r}; copy 'instead_of' from it"
            )
    # From behind, so that the places before stay where they are.
    for begin, end in reversed(spans):
        said = said[:begin] + target + said[end:]
    return said, (spans[0][0], spans[0][0] + len(target))


def spoken_requests(model: Model, requests: Sequence[EditRequest]) -> list[EditRequest]:
    """Requests about recordings with the whole corrected transcript as their target; others as they are.

    Several requests about one recording are all in its transcript. A request that cannot be read so keeps the reason in
    its prompt's ``problem``.

    Args:
        model: what transcribes, without patches.
        requests: what the user wants; those that were read already stay.
    """
    said: dict[str, str] = {}
    read: dict[int, AudioPrompt] = {}
    for number, request in enumerate(requests):
        prompt = request.prompt
        if not isinstance(prompt, AudioPrompt) or prompt.place is not None or prompt.problem or model.audio is None:
            continue
        try:
            if prompt not in said:
                said[prompt] = model.transcribe(prompt)
            said[prompt], place = _corrected(said[prompt], request)
            read[number] = prompt.placed(place)
        except TPatchError as error:
            read[number] = prompt.placed(None, str(error))
    return [
        request if number not in read else _with_transcript(request, read[number], said.get(request.prompt, ""))
        for number, request in enumerate(requests)
    ]


def _with_transcript(request: EditRequest, prompt: AudioPrompt, whole: str) -> EditRequest:
    """A request with the corrected transcript as its target, or as it is where there is a problem."""
    if prompt.problem or prompt.place is None:
        return dataclasses.replace(request, prompt=prompt, instead_of=None)
    # A later request about the same recording may have moved what an earlier one put there.
    begin = prompt.place[0]
    place = min(_spans(whole, request.target.strip()), key=lambda span: abs(span[0] - begin), default=prompt.place)
    return dataclasses.replace(request, prompt=prompt.placed(place), target=whole, instead_of=None)
