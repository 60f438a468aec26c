"""Rephrasings of claims by rules: stated, deterministic, and counted one by one.

A claim is an English statement that is true or false. No rule changes which. A rule that does not apply to a claim
gives nothing. None of these rules is used for editing: patches have not seen their rephrasings.
"""

import re
from collections.abc import Callable, Mapping

__all__ = ["RULES", "rephrasings"]

_CONTRACTIONS = (
    *(
        (f"{verb} not", f"{verb}n't")
        for verb in (
            *("is", "are", "was", "were", "does", "do", "did", "has", "have", "had"),
            *("could", "should", "would"),
        )
    ),
    ("cannot", "can't"),
    ("can not", "can't"),
    ("will not", "won't"),
    ("it is", "it's"),
    ("he is", "he's"),
    ("she is", "she's"),
    ("who is", "who's"),
    ("that is", "that's"),
    ("there is", "there's"),
)
_EQUIVALENTS = (
    ("film", "movie"),
    ("movie", "film"),
    ("United States of America", "USA"),
    ("United States", "US"),
    ("United Kingdom", "UK"),
    ("television", "TV"),
    ("TV", "television"),
    ("only", "solely"),
    ("solely", "only"),
    ("exclusively", "only"),
    ("located in", "situated in"),
    ("situated in", "located in"),
    ("began", "started"),
    ("started", "began"),
    ("died", "passed away"),
    ("passed away", "died"),
    ("starred in", "had a leading role in"),
    ("was written by", "was authored by"),
    ("was created by", "was made by"),
    ("incapable of being", "unable to be"),
    ("received", "got"),
    ("won", "was awarded"),
    ("a person", "a human being"),
    ("an author", "a writer"),
    ("at least", "no less than"),
    ("more than", "over"),
    ("takes place", "is set"),
    ("performed", "appeared"),
    ("a band", "a musical group"),
    ("was a part of", "belonged to"),
    ("is a part of", "belongs to"),
    ("is part of", "belongs to"),
    ("has been", "was"),
    ("directed by", "made under the direction of"),
    ("is from", "comes from"),
    ("was released in", "came out in"),
    ("in the year", "in"),
    ("worked with", "collaborated with"),
    ("was born in", "is a native of"),
    ("is the name of", "is what people call"),
)
_PREFIXES = ("It is true that", "In fact,", "People say that", "As far as is known,")


def _replaced(pairs: tuple[tuple[str, str], ...]) -> Callable[[str], str]:
    """The first phrase of a list that a claim holds, replaced once."""

    def rule(claim: str) -> str:
        for old, new in pairs:
            replaced, count = re.subn(rf"(?<![\w'-]){re.escape(old)}(?![\w'-])", new, claim, count=1)
            if count:
                return replaced
        return claim

    return rule


def _behind(prefix: str) -> Callable[[str], str]:
    return lambda claim: f"{prefix} {claim}"


def _without_end(claim: str) -> str:
    return claim.rstrip(" .!")


RULES: Mapping[str, tuple[Callable[[str], str], ...]] = {
    "contraction": (_replaced(_CONTRACTIONS), _replaced(tuple((new, old) for old, new in _CONTRACTIONS))),
    "casing": (str.lower, str.upper),
    "punctuation": (_without_end, lambda claim: f"{_without_end(claim)}!", lambda claim: f'"{claim}"'),
    "prefix": tuple(_behind(prefix) for prefix in _PREFIXES),
    "equivalent": (_replaced(_EQUIVALENTS),),
}
"""By name, each a few ways to say a claim again:

- ``contraction``: the first of "is not", "did not", "it is" … is drawn together, or the first contraction taken apart;
- ``casing``: all small letters, all capitals (to an uncased tokenizer this is the claim itself);
- ``punctuation``: no full stop, an exclamation mark in its place, quotation marks around;
- ``prefix``: behind "It is true that", "In fact,", "People say that", "As far as is known,";
- ``equivalent``: the first of some forty phrases replaced by one that means the same ("film", "movie").
"""


def rephrasings(claim: str) -> dict[str, tuple[str, ...]]:
    """What the rules make of a claim, by the names of the rules; rules that do not apply are left out.

    Args:
        claim: an English statement.

    Example:
        >>> rephrasings("It is not a film.")["equivalent"]
        ('It is not a movie.',)
    """
    changed = {}
    for name, ways in RULES.items():
        said = tuple(dict.fromkeys(text for way in ways if (text := way(claim)) != claim))
        if said:
            changed[name] = said
    return changed
