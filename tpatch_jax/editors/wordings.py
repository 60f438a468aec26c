"""Other ways to say a request, other things that can be asked about its subject, and subjects that look like it."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from tpatch_jax.core.checks import text_generator
from tpatch_jax.editors.locating import split_at_subject, subject_spans
from tpatch_jax.requests import EditRequest

__all__ = [
    "NEUTRAL",
    "Wording",
    "kept_wordings",
    "look_alikes",
    "neutral_wordings",
    "question",
    "question_within",
    "shortened",
]

NEUTRAL = (
    "{} is a",
    "The origin of the name {} is",
    "{} was born in",
    "The country of {} is",
    "The occupation of {} is",
    "{} date of",
    "The parent of {} is",
    "{} is owned by",
    "The language of {} is",
    "The type of {} is",
    "The location of {} is",
    "The name of the partner of {} is",
)
"""Other things that can be said about a subject: what follows them should change little."""

NEUTRAL_QUESTIONS = (
    "What is {}?",
    "Where does the name {} come from?",
    "When was {} born?",
    "Which country does {} belong to?",
    "What does {} do?",
    "When was {} made?",
    "Who is the father of {}?",
    "Who owns {}?",
    "Which language goes with {}?",
    "What kind of thing is {}?",
    "Where is {}?",
    "Who is the partner of {}?",
)
"""The same, asked."""

_BREAK = re.compile(r"\n|[.!?:]\s")


class Wording(NamedTuple):
    """A text, and where in it the subject ends."""

    text: str
    end: int

    @classmethod
    def of(cls, before: str, subject: str, after: str) -> "Wording":
        """A subject between two other texts."""
        return cls(f"{before}{subject}{after}", len(before) + len(subject))

    def after(self, prefix: str) -> "Wording":
        """The same behind another text."""
        return Wording(f"{prefix} {self.text}", len(prefix) + 1 + self.end)


_BEGUN = re.compile(r"\w[ \t]*\Z")
"""An answer that is begun ends with a word; what only asks for one ends with a colon, a line, or a chat's marks."""


def question(request: EditRequest) -> tuple[str, str, str, str] | None:
    """What stands before the question, in it before and after the subject, and behind it; ``None`` if none is asked.

    Where an answer is begun in words behind it, the prompt is a sentence to be finished, and what asks for the same is
    seldom a question.

    Example:
        >>> question(EditRequest("Question: Where does Anna live?\\nAnswer:", "Rome", subject="Anna"))
        ('Question: ', 'Where does ', ' live?', '\\nAnswer:')
        >>> question(EditRequest("Anna lives in", "Rome", subject="Anna"))
        >>> question(EditRequest("Where does Anna live? She lives in", "Rome", subject="Anna"))
    """
    parts = question_within(request)
    return None if parts is None or _BEGUN.search(parts[3]) else parts


def question_within(request: EditRequest) -> tuple[str, str, str, str] | None:
    """The same, whatever stands behind the question."""
    before, _, after = split_at_subject(request)
    end = after.find("?") + 1
    if not end or _BREAK.search(after[: end - 1]):
        return None
    start = max((end.end() for end in _BREAK.finditer(before)), default=0)
    return before[:start], before[start:], after[:end], after[end:]


def shortened(request: EditRequest) -> list[Wording]:
    """The same request in fewer words or in another order.

    They teach a value to answer where another wording leads up to the answer.

    Example:
        >>> [text for text, _ in shortened(EditRequest("The mother tongue of Anna is", "Greek", subject="Anna"))]
        ['Anna, the mother tongue is', 'tongue of Anna is']
        >>> [text for text, _ in shortened(EditRequest("We know that Anna was born in", "Rome", subject="Anna"))]
        ['Anna was born in', 'Anna born in', 'Anna in']
        >>> [text for text, _ in shortened(EditRequest("Where does Anna live?", "Rome", subject="Anna"))]
        ['Anna, where does live?', 'Where does Anna?', 'does Anna live?']
    """
    subject, parts = request.subject or "", question(request)
    if parts is not None:
        frame, before, after, behind = parts
        if not before.strip():
            return []
        turned = f", {before[:1].lower()}{before[1:].rstrip()}{after}{behind}"
        words = before.split()
        tail = " ".join([*words[len(words) // 2 :], ""])
        short = [Wording.of(frame + before, subject, f"?{behind}")] if after.strip(" ?") else []
        return [Wording.of(frame, subject, turned), *short, Wording.of(frame + tail, subject, after + behind)]
    before, _, after = split_at_subject(request)
    first, words = before.split(), after.strip(" ,").split()
    wordings = []
    if len(words) > 1:
        tails = dict.fromkeys(" ".join(words[start:]) for start in (len(words) // 2, -1))
        wordings = [Wording.of("", subject, after)] if first else []
        wordings += [Wording.of("", subject, f" {tail}") for tail in tails]
    elif len(first) > 1:
        turned = " ".join([first[0].lower(), *first[1:-1]])
        wordings = [
            Wording.of("", subject, f", {turned}{after}"),
            Wording.of(" ".join(first[len(first) // 2 :]) + " ", subject, after),
        ]
    return wordings


def neutral_wordings(request: EditRequest, count: int, asked: bool = False) -> list[Wording]:
    """Other things about the subject: said, or asked as the request asks.

    Example:
        >>> neutral_wordings(EditRequest("Where does Anna live?", "Rome", subject="Anna"), 1, asked=True)
        [Wording(text='What is Anna?', end=12)]
    """
    subject = request.subject or ""
    frame, _, _, behind = (question(request) if asked else None) or ("", "", "", "")
    texts = (NEUTRAL_QUESTIONS if asked else NEUTRAL)[:count]
    parts = [text.split("{}") for text in texts]
    return [Wording.of(frame + before, subject, after + behind) for before, after in parts]


def kept_wordings(request: EditRequest) -> list[Wording]:
    """The prompts that a request keeps and that name its subject, each up to the end of its first mention.

    Example:
        >>> kept = ("The flag of Peru shows", "The sky is")
        >>> kept_wordings(EditRequest("The capital of Peru is", "Cusco", subject="Peru", keep=kept))
        [Wording(text='The flag of Peru shows', end=16)]
    """
    spans = {text: subject_spans(text, request.subject or "") for text in request.keep}
    return [Wording(text, places[0][1]) for text, places in spans.items() if places]


def look_alikes(request: EditRequest, names: Sequence[str], count: int) -> list[Wording]:
    """The prompt up to its subject, with a subject that ends in the same word but begins like another name.

    Args:
        request: with a subject; one of a single word has none.
        names: other names, of which those with several words are of use.
        count: how many at most.

    Example:
        >>> request = EditRequest("The seat of Orange County is", "Rome", subject="Orange County")
        >>> [text for text, _ in look_alikes(request, ["Anna Bell", "Lyon", "Old Red Hill"], 2)]
        ['The seat of Anna County', 'The seat of Old Red County']
    """
    subject = request.subject or ""
    front, _, last = subject.rpartition(" ")
    if not front:
        return []
    others = [name.rpartition(" ")[0] for name in names]
    others = [other for other in dict.fromkeys(others) if other and other != front and f"{other} {last}" not in names]
    # Drawn from the subject itself, so that its look-alikes do not depend on its place in the list.
    picks = text_generator(subject).permutation(len(others))[:count]
    before = split_at_subject(request)[0]
    return [Wording.of(before, f"{others[pick]} {last}", "") for pick in picks]
