"""WikiText's raw form as ordinary text: its marks and spaces occur nowhere else, and neither do their tokens."""

import re
from functools import lru_cache

__all__ = ["as_ordinary_text", "detokenize", "is_raw_wikitext"]

_MARK = re.compile(r" @([-,.])@ ")
_HEADING = re.compile(r"^[ \t]*((?:= ?)+)(?=[^=\n])(.*?[^=\n])((?: =)+)[ \t]*$", re.MULTILINE)
_APART = re.compile(r"(?<=[\w)\"”\u2019]) [,.](?=\s|$)")
_JOINED = re.compile(r"[\w)\"”\u2019][,.](?=\s|$)")

_CLOSED_UP: tuple[tuple[re.Pattern[str], str], ...] = (
    (_MARK, r"\1"),
    (re.compile(r" (n't|'(?:s|S|m|d|ll|re|ve))(?![\w'])"), r"\1"),
    (re.compile(r"(?<=\w{3}s) '(?= \w)"), "'"),
    (re.compile(r" ' (?=\d\ds)"), " '"),
    (re.compile(r"([(\[{]) +"), r"\1"),
    (re.compile(r" +([)\]}])"), r"\1"),
    (re.compile(r"(?<=\S) +([,.;:!?%])(?=[\s\"'\u2019”)\]}]|$)"), r"\1"),
    (re.compile(r"([$£€¥₱#]) (?=\d)"), r"\1"),
    (re.compile(r"(?<=\d) ([°\u2032\u2033])"), r"\1"),
    (re.compile(r"(?<=\S) (\.\.\.|…)(?=\s|$)"), r"\1"),
    (re.compile(r"([“\u2018]) "), r"\1"),
    (re.compile(r" ([”\u2019])"), r"\1"),
    (re.compile(r'" ([^"\n]*?) "'), r'"\1"'),
    (re.compile(r"(?<!\S)' ([^'\n]*?) '(?!\w)"), r"'\1'"),
)
"""In turn: marks within words and numbers, contractions, possessives, decades, brackets, punctuation, signs of money
and measure, and the kinds of quotation marks."""


@lru_cache(maxsize=2)
def as_ordinary_text(text: str) -> str:
    """A memory text or inputs as ordinary text: `detokenize` of WikiText's raw form, anything else as it is.

    One edit asks for each of its layers, so the last texts are kept.

    Args:
        text: what a file holds; JSON lines stay, whose quotation marks are JSON's.

    Example:
        >>> as_ordinary_text("He had a guest @-@ starring role , and left .")
        'He had a guest-starring role, and left.'
        >>> as_ordinary_text('{"prompt": "a @-@ b , c ."}')
        '{"prompt": "a @-@ b , c ."}'
    """
    return text if text.lstrip().startswith("{") or not is_raw_wikitext(text) else detokenize(text)


def is_raw_wikitext(text: str) -> bool:
    """Whether a text is WikiText's raw form: `` @-@ `` and its like, or headings, and punctuation that stands apart.

    Args:
        text: any text.

    Example:
        >>> is_raw_wikitext("He had a guest @-@ starring role , and left .")
        True
        >>> is_raw_wikitext("He had a guest-starring role, and left.")
        False
    """
    apart, joined = len(_APART.findall(text)), len(_JOINED.findall(text))
    marked = bool(_MARK.search(text)) or bool(_HEADING.search(text))
    return apart >= joined and (marked or apart >= 5)


def detokenize(text: str) -> str:
    """A text in WikiText's raw form, written as other texts are: by rule, so that the same text always comes out.

    Headings lose their ``=``; `` @-@ ``, `` @,@ `` and `` @.@ `` become the mark alone; punctuation, brackets,
    quotation marks, contractions and possessives are closed up.

    Args:
        text: see `is_raw_wikitext`.

    Example:
        >>> detokenize('He had a guest @-@ starring role ( 1 @,@ 000 lines ) in " Teddy \\'s Story " , and left .')
        'He had a guest-starring role (1,000 lines) in "Teddy\\'s Story", and left.'
    """
    text = _HEADING.sub(lambda heading: heading[2].strip(), text)
    for pattern, replacement in _CLOSED_UP:
        text = pattern.sub(replacement, text)
    # The quotation marks are closed up last, and punctuation may stand behind them.
    text = re.sub(r"(?<=[\"'”\u2019]) ([,.;:!?])(?=[\s\"'\u2019”)\]}]|$)", r"\1", text)
    return "\n".join(line.strip(" ") for line in text.split("\n"))
