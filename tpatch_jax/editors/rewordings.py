"""Wordings of the same question, learnt from a memory that asks it of other subjects.

A memory of questions often asks for one fact in several wordings: the same name, the same answer. What stands around
the name is then a frame, and frames that meet at one fact ask the same. A patch learns its
question in those too.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import permutations

__all__ = ["learn_rewordings", "named", "reworded"]

LEAST_SHARE = 0.2
"""Frames that meet at a lesser share of one's facts may only happen to have the same answer there."""
MOST = 8

_ANY_NAME = re.compile(r"[A-Z][\w'\u2019&.-]*(?: (?:(?:of|the|and|de|la|von|van) )?[A-Z0-9][\w'\u2019&.-]*)*")
_NO_NAMES = frozenset(
    (
        *("A", "An", "As", "At", "By", "For", "From", "How", "In", "Is", "It", "Name", "Of", "On", "The", "To", "Was"),
        *("What", "When", "Where", "Which", "Who", "Whom", "Whose", "Why", "With"),
    )
)


def named(text: str) -> str:
    """The longest name in a text: what it is about, as far as that can be seen; empty if there is none.

    Example:
        >>> named("Where was Ada Lovelace born?")
        'Ada Lovelace'
    """
    names = [name.rstrip(".") for name in _ANY_NAME.findall(text)]
    return max((name for name in names if name not in _NO_NAMES), key=len, default="")


def _frame(text: str, name: str) -> str | None:
    return text.replace(name, "{}") if name and text.count(name) == 1 and "{}" not in text else None


def learn_rewordings(facts: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    """Which frames ask the same.

    Args:
        facts: questions with their answers.

    Returns:
        For each frame those that meet it at a fifth of its facts or more, the most frequent first.

    Example:
        >>> facts = [("Where was Ada born?", "London"), ("Ada is from which town?", "London")]
        >>> learn_rewordings(facts)["Where was {} born?"]
        ('{} is from which town?',)
    """
    frames_of: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for text, answer in facts:
        name = named(text)
        if (frame := _frame(text, name)) is not None:
            frames_of[name, answer][frame] = None
    several = [tuple(frames) for frames in frames_of.values() if len(frames) > 1]
    seen = Counter(frame for frames in several for frame in frames)
    met: dict[str, Counter[str]] = defaultdict(Counter)
    for frames in several:
        for one, other in permutations(frames, 2):
            met[one][other] += 1
    rewordings = {}
    for frame, others in met.items():
        alike = tuple(other for other, count in others.most_common(MOST) if count >= LEAST_SHARE * seen[frame])
        if alike:
            rewordings[frame] = alike
    return rewordings


def reworded(text: str, subject: str | None, rewordings: Mapping[str, tuple[str, ...]], count: int) -> list[str]:
    """A question in other wordings.

    Args:
        text: the question.
        subject: what it is about; without one the longest name in it.
        rewordings: from `learn_rewordings`.
        count: how many at most.

    Example:
        >>> reworded("Where was Bob born?", "Bob", {"Where was {} born?": ("{} is from which town?",)}, 4)
        ['Bob is from which town?']
    """
    name = subject or named(text)
    frame = _frame(text, name)
    return [other.replace("{}", name) for other in rewordings.get(frame or "", ())[:count]]
