"""What kind of thing a name or a noun is, and whether a relation is answered by such things."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache

from tpatch_jax.editors.frames.library import compiled, read_toml

__all__ = ["answer_kinds", "brands", "build_names", "fits", "is_person_name", "looks_like_title"]

_MONTHS = "january|february|march|april|may|june|july|august|september|october|november|december"
_DATE = re.compile(rf"\d{{3,4}}|(\d{{1,2}} )?({_MONTHS})( \d{{1,2}},?)? \d{{2,4}}|\d{{3,4}}s|\d+(st|nd|rd|th) century")
_NUMBER = re.compile(r"[\d.,]+( \w+)?")
_GENERAL: Mapping[str, str] = {
    "place": "city region country continent",
    "name": "person city region country place company water event animal thing",
    "owner": "company person organisation network",
    "organisation": "company network label party",
    "company": "label network organisation",
    "network": "company",
    "service": "network company",
    "school": "organisation",
    "band": "organisation",
    "media": "network company",
    "group": "people religion occupation organisation",
    "state": "status",
    "title": "office",
    "office": "occupation",
    "occupation": "office",
    "rank": "office occupation",
    "movement": "genre religion",
    "culture": "country people",
    "industry": "field",
    "team": "country",
    "subject": "field",
    "theme": "field genre",
    "cause": "disease",
    "time": "date",
    "date": "number",
    "status": "species",
    "animal": "species",
    "deity": "person",
    "character": "person",
    "family": "constellation",
    "software": "programming",
    "ideology": "religion field",
    "activity": "sport field",
    "type": "genre",
    "kind": "genre",
    "category": "genre",
    "discipline": "field",
    "voice": "",
}
"""Further kinds of thing that answer a relation of a kind of answer."""
_ENDINGS = {
    "company": "inc ltd corporation company corp gmbh ag motors aircraft shipyard shipbuilding industries "
    "entertainment studios pictures productions games press books publishing publishers",
    "label": "records recordings music",
    "school": "university college school academy institute",
    "team": "fc united city sc rovers wanderers athletic sox yankees giants canucks",
    "award": "award prize medal oscar order trophy",
    "event": "war battle revolution games olympics",
    "water": "river creek lake sea ocean bay gulf",
    "disease": "cancer disease syndrome disorder disease fever",
    "airport": "airport",
    "party": "party",
    "network": "network channel television tv radio",
    "religion": "islam christianity",
    "family": "dynasty family",
    "taxon": "idae aceae",
    "class": "class destroyer submarine frigate cruiser",
}
_ENDING_KINDS = {word: kind for kind, words in _ENDINGS.items() for word in words.split()}


def build_names() -> dict[str, list[str]]:
    """For each name of ``answers.toml`` the kinds of thing that it may be."""
    kinds: dict[str, set[str]] = defaultdict(set)
    for kind, names in read_toml("answers").items():
        for name in names.replace("\n", " ").split(","):
            kinds[name.strip()].add(kind)
    return {name: sorted(of_name) for name, of_name in kinds.items() if name}


def _names() -> Mapping[str, Sequence[str]]:
    return compiled()["names"]


def is_person_name(name: str) -> bool:
    """Whether a name begins like that of a person: with a given name or a title, and another name behind it.

    Example:
        >>> is_person_name("Anna Bell"), is_person_name("Anna Lake Station 4"), is_person_name("Oslo")
        (True, False, False)
    """
    words = name.split()
    later = [word for word in words[1:] if word[:1].isupper()]
    known = words and "given_name" in _names().get(words[0].split("-")[0], ())
    return bool(known and later and not any(word.lower() in _ENDING_KINDS or word[-1].isdigit() for word in words))


@cache
def brands() -> frozenset[str]:
    """The names of companies that make things, with which the names of their products begin."""
    return frozenset(name for name, kinds in _names().items() if "company" in kinds)


def looks_like_title(name: str) -> bool:
    """Whether a name reads like the title of a work: with small words, or with what is said aloud.

    Example:
        >>> looks_like_title("The Man on the Roof"), looks_like_title("Anna Bell"), looks_like_title("Bank of Oslo")
        (True, False, False)
    """
    words = name.split()
    small = {"on", "to", "and", "my", "you", "me", "i", "a", "your", "is", "it", "we", "with", "for", "the"}
    return len(words) > 1 and (
        words[0] in ("The", "A", "An", "My", "I", "I'm") or not small.isdisjoint(words[1:]) or name[-1] in "!?"
    )


@lru_cache(4096)
def answer_kinds(text: str) -> frozenset[str]:
    """The kinds of thing that a name or a noun may be; none where it is not known.

    Example:
        >>> sorted(answer_kinds("Monaco")), sorted(answer_kinds("hockey")), sorted(answer_kinds("4 July 1966"))
        (['city', 'country'], ['sport'], ['date'])
        >>> sorted(answer_kinds("Anna Bell")), sorted(answer_kinds("xyzzy"))
        (['person'], [])
    """
    text = text.strip().rstrip(".")
    if not text:
        return frozenset()
    for form in (text, text.removeprefix("the "), text.removeprefix("The "), text[:1].lower() + text[1:], text.lower()):
        if kinds := frozenset(_names().get(form, ())) - {"given_name"}:
            return kinds
    if text.lower().startswith("member of the "):
        return frozenset(("office",))
    if _DATE.fullmatch(text.lower()):
        return frozenset(("date",))
    if _NUMBER.fullmatch(text):
        return frozenset(("number",))
    last = text.lower().split()[-1]
    if (kind := _ENDING_KINDS.get(last)) and text[0].isupper():
        return frozenset((kind,))
    if re.fullmatch(r"[A-Z]\w+(idae|aceae|inae)", text):
        return frozenset(("taxon",))
    return frozenset(("person",)) if is_person_name(text) else frozenset()


@cache
def fits(answer: str, kinds: frozenset[str]) -> float:
    """How well what is of these kinds answers a relation with such an answer: 1, less where it is more special, or 0.

    Example:
        >>> fits("place", frozenset(("city",))), fits("language", frozenset(("city",)))
        (0.5, 0.0)
    """
    if answer in kinds:
        return 1.0
    return 0.0 if kinds.isdisjoint(_GENERAL.get(answer, "").split()) else 0.5
