"""Texts compared as words: without regard to case, punctuation and spaces."""

import unicodedata
from collections.abc import Callable, Iterable

__all__ = ["name_finder", "names", "plain_words"]

_JOINING = frozenset(".'\u2019")
"""Marks within a word: ``U.S.`` is one word, ``and/or`` two."""


def plain_words(text: str) -> str:
    """The words of a text in one case, with one space between them.

    Points and apostrophes fall away, all other punctuation is a space.

    Args:
        text: any text.

    Example:
        >>> plain_words("The U.S., and/or Peru ")
        'the us and or peru'
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    marks = ((mark, unicodedata.category(mark).startswith("P")) for mark in text)
    text = "".join(("" if mark in _JOINING else " ") if is_mark else mark for mark, is_mark in marks)
    return " ".join(text.split())


def names(text: str, phrase: str) -> bool:
    """Whether a phrase stands in a text as whole words; in scripts without spaces, whether it stands there.

    Args:
        text: any text.
        phrase: what is looked for.

    Example:
        >>> names("Who leads the Church of Rome?", "Rome"), names("Who is Jerome?", "Rome")
        (True, False)
    """
    return name_finder([phrase])(text)


def name_finder(phrases: Iterable[str]) -> Callable[[str], bool]:
    """Whether any of some phrases stands in a text, as `names` has it for one: for many phrases and many texts.

    Args:
        phrases: what is looked for.

    Returns:
        From a text to whether one of them stands there.

    Example:
        >>> asks_of = name_finder(["Rome", "Lyon"])
        >>> asks_of("Who leads the Church of Rome?"), asks_of("Who is Jerome?")
        (True, False)
    """
    plain = {plain_words(phrase) for phrase in phrases} - {""}
    wide = {phrase for phrase in plain if any(unicodedata.east_asian_width(sign) == "W" for sign in phrase)}
    spaced = [*wide, *(f" {phrase} " for phrase in plain - wide)]

    def stands_in(text: str) -> bool:
        padded = f" {plain_words(text)} "
        return any(phrase in padded for phrase in spaced)

    return stands_in
