"""Texts compared as words: without regard to case, punctuation and spaces."""

import unicodedata

__all__ = ["names", "plain_words"]

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
    text, phrase = plain_words(text), plain_words(phrase)
    if any(unicodedata.east_asian_width(character) == "W" for character in phrase):
        return phrase in text
    return bool(phrase) and f" {phrase} " in f" {text} "
