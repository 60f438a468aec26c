"""Where a subject stands in a text: whole words first, and what the tokenizer reads as the same.

Everything that looks for a subject asks here, so that "Russia" is not looked for in "Russian".
"""

import dataclasses
import re
import unicodedata
from collections.abc import Sequence

from tpatch_jax.models.model import Model
from tpatch_jax.requests import UNSPACED_SCRIPTS, EditRequest

__all__ = [
    "locate_subject",
    "names_subject",
    "replace_subject",
    "respell",
    "split_at_subject",
    "subject_spans",
    "with_spelling",
]

Span = tuple[int, int]

_UNSPACED = re.compile(f"[{UNSPACED_SCRIPTS}]")


def _spaced(character: str) -> bool:
    """Whether a character is of a word, in a script whose words stand apart."""
    return character.isalnum() and not _UNSPACED.match(character)


def _ends_word(text: str, place: int) -> bool:
    """Whether a word may begin or end between two characters of a text."""
    if not 0 < place < len(text):
        return True
    if unicodedata.category(text[place])[0] == "M":
        return False
    before = place - 1
    # An accent of its own belongs to the letter before it.
    while before and unicodedata.category(text[before])[0] == "M":
        before -= 1
    return not (_spaced(text[before]) and _spaced(text[place]))


def subject_spans(text: str, subject: str) -> list[Span]:
    """Where a subject stands in a text, spelt as it is: as whole words, or where it is none, anywhere.

    Args:
        text: a prompt.
        subject: what to look for.

    Example:
        >>> subject_spans("Russian is spoken in Russia by", "Russia")
        [(21, 27)]
        >>> subject_spans("Russian is", "Russia")
        [(0, 6)]
    """
    places = _places(text, subject)
    return _whole_words(text, places) or places


def _places(text: str, subject: str) -> list[Span]:
    places, start = [], text.find(subject) if subject.strip() else -1
    while start >= 0:
        places.append((start, start + len(subject)))
        start = text.find(subject, start + len(subject))
    return places


def _whole_words(text: str, places: Sequence[Span]) -> list[Span]:
    return [span for span in places if all(_ends_word(text, edge) for edge in span)]


def locate_subject(model: Model, text: str, subject: str) -> list[Span]:
    """Where a subject stands in a text as the model reads both: another spelling of the same tokens counts.

    Args:
        model: whose tokenizer reads; one may lower-case, or join letters and their accents.
        text: a prompt.
        subject: what to look for.

    Returns:
        Where each begins and ends in the text; none overlap.

    Example:
        >>> locate_subject(model, "The mayor of PARIS is", "Paris")  # a tokenizer that lower-cases  # doctest: +SKIP
        [(13, 18)]
    """
    places = _places(text, subject)
    spans = _whole_words(text, places)
    wanted = [] if spans or not subject.strip() else _read(model, subject)
    if not wanted:
        return spans or places
    inner = [place for place in range(len(text) + 1) if _ends_word(text, place)]
    least, most, end = len(subject) // 3, 3 * len(subject), 0
    for start in inner:
        if start < end or not text[start : start + 1].strip():
            continue
        for stop in inner:
            part = text[start:stop]
            if max(1, least) <= len(part) <= most and part[-1:].strip() and _read(model, part) == wanted:
                spans.append((start, stop))
                end = stop
                break
    return spans or places


def _read(model: Model, text: str) -> list[int]:
    """A name's tokens; none where the tokenizer loses a part of it, which says nothing about what is the same."""
    return [] if model.lost(text) else model.encode(text.strip())


def names_subject(text: str, subject: str | None) -> bool:
    """Whether a text names a subject.

    Example:
        >>> names_subject("Anna lives in", "Anna")
        True
    """
    return bool(subject) and bool(subject_spans(text, subject or ""))


def split_at_subject(request: EditRequest) -> tuple[str, str, str]:
    """What stands before the subject in the prompt, the subject, and what stands behind it; see `str.partition`.

    Example:
        >>> split_at_subject(EditRequest("Russian is spoken in Russia by", "all", subject="Russia"))
        ('Russian is spoken in ', 'Russia', ' by')
    """
    spans = subject_spans(request.prompt, request.subject or "")
    start, end = spans[0] if spans else (len(request.prompt),) * 2
    return request.prompt[:start], request.prompt[start:end], request.prompt[end:]


def replace_subject(text: str, subject: str, other: str) -> str:
    """A text with another name wherever it names the subject.

    Example:
        >>> replace_subject("Russian is spoken in Russia by", "Russia", "China")
        'Russian is spoken in China by'
    """
    parts, end = [], 0
    for start, stop in subject_spans(text, subject):
        parts += [text[end:start], other]
        end = stop
    return "".join([*parts, text[end:]])


def respell(request: EditRequest, subject: str) -> EditRequest:
    """A request whose prompt and rephrasings spell the subject in another way.

    Args:
        request: with a subject.
        subject: the other spelling.

    Example:
        >>> respell(EditRequest("The capital of Peru is", "Cusco", subject="Peru"), "peru").prompt
        'The capital of peru is'
    """
    named = request.subject or ""
    return dataclasses.replace(
        request,
        prompt=replace_subject(request.prompt, named, subject),
        rephrases=tuple(replace_subject(text, named, subject) for text in request.rephrases),
        subject=subject,
    )


def with_spelling(model: Model, requests: Sequence[EditRequest]) -> list[EditRequest]:
    """The requests with each subject spelt as its prompt spells it.

    Args:
        model: whose tokenizer says what is the same.
        requests: what the user wants.
    """
    spelt = []
    for request in requests:
        spans = locate_subject(model, request.prompt, request.subject) if request.subject else []
        there = request.prompt[slice(*spans[0])] if spans else request.subject
        spelt.append(request if there == request.subject else dataclasses.replace(request, subject=there))
    return spelt
