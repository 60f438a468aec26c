"""Which relations a text is about, by its words.

Each relation is one document: its wordings of both forms, and, twice, its name and
further words that people use for it. Words are stemmed lightly and weighted by
how few relations have them; where a text and a relation share a word, its weight counts in full if the relation has it
in many wordings and less if it has it in one.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

from tpatch_jax.editors.frames.answering import is_person_name
from tpatch_jax.editors.frames.library import KINDS, Relation, compiled, relations

__all__ = [
    "EMPTY_WORDS",
    "QUESTION_WORDS",
    "THRESHOLD",
    "Match",
    "build_words",
    "guess_kind",
    "kind_of_name",
    "match_relation",
    "stem_word",
]

THRESHOLD = 0.3
"""The least score of a relation that is near."""

QUESTION_WORDS = frozenset(("where", "when", "who", "whom", "whose", "how", "why"))
_EMPTY = """
    a an the of in on at by to for from with as and or is are was were be been being has have had do does did it its
    their they them his her he she this that these those there what which must one not no can could will would may s
    into up out about after before under over than then also so if but only any some all most more much very each every
    i you we my your our me us question answer
"""
EMPTY_WORDS = QUESTION_WORDS | frozenset(_EMPTY.split())
_IRREGULAR = {
    form: base
    for base, forms in {
        "ate": "eaten eat",
        "begin": "began begun",
        "build": "built",
        "buy": "bought",
        "child": "children",
        "choose": "chose chosen",
        "come": "came",
        "die": "died dies dying death dead",
        "draw": "drew drawn",
        "fight": "fought",
        "give": "gave given",
        "grow": "grew grown",
        "hold": "held",
        "keep": "kept",
        "know": "knew known",
        "lead": "led",
        "leave": "left",
        "lie": "lay lies",
        "live": "lived lives",
        "make": "made",
        "pay": "paid",
        "run": "ran",
        "sell": "sold",
        "shoot": "shot",
        "show": "shown",
        "sing": "sang sung",
        "speak": "spoke spoken",
        "spend": "spent",
        "stand": "stood",
        "take": "took taken",
        "teach": "taught",
        "think": "thought",
        "wear": "wore worn",
        "wife": "wives",
        "win": "won",
        "write": "wrote written",
    }.items()
    for form in forms.split()
}
_ENDINGS = ("ing", "ed", "er", "or", "ion", "ly", "al", "ment", "age")
_PAIR_WEIGHT = 0.1
_NAME_WORDINGS = 2

_KIND_WORDS = {
    "person": "mr mrs dr sir lady king queen pope saint prince princess president jr baron baroness earl count "
    "countess duke duchess archbishop bishop emperor empress sultan shah lord marquess viscount ibn bin",
    "place": "county lake river island islands mount mountain mountains bay airport station bridge street castle "
    "tower city kingdom republic province district park valley peninsula sea glacier cape creek falls "
    "canyon desert forest ridge hill hills volcano reef basin plateau coast harbour harbor port dam "
    "tunnel parish governorate oblast raion municipality township village town prefecture voivodeship "
    "canton commune zoo garden gardens museum church cathedral palace tavern hall house theatre theater "
    "stadium arena square road avenue inlet nunatak nunataks monastery abbey temple mosque region "
    "territory territories territorial fort beach railway motorway highway nebula",
    "organisation": "ministry cabinet government regiment squadron "
    "university college school institute inc ltd corporation company group bank party club fc airlines "
    "orchestra band association society agency ministry records league council center centre foundation "
    "studios press radio television broadcasting federation committee commission authority board "
    "secretariat hospital organization organisation union brothers motors airways media boys",
    "work": "symphony sonata",
    "thing": "disease syndrome war battle language award prize virus massacre festival games olympics cup "
    "championship championships revolution paralympics treaty gene protein flight killings",
}
"""Words in a name that tell what it names."""
_LEADING = """
    lake mount cape fort port river castle mr mrs dr sir lady king queen pope saint prince princess president
    baron lord sultan emperor shah radio battle
"""
"""Those of them that may stand before a name."""
_CLASS_WORDS = {
    "person": "actor actress singer writer author poet painter politician player scientist musician composer character "
    "architect artist athlete philosopher journalist bishop emperor man woman boy girl",
    "place": "country state building mountains stadium cathedral church museum capital",
    "organisation": "team firm newspaper airline organisation organization brand label channel",
    "work": "film movie book novel song album series show game opera play poem painting car software program website",
    "thing": "animal plant species dish food metal element substance drug illness currency planet sport holiday god",
}
"""Further words that say what stands behind them: "the film {}"."""
_KIND_OF_WORD = {word: kind for kind, words in _KIND_WORDS.items() for word in words.split()}
_KIND_OF_CLASS = _KIND_OF_WORD | {word: kind for kind, words in _CLASS_WORDS.items() for word in words.split()}
_NAME_VOTE, _CLASS_VOTE = 0.2, 1.0


class Match(NamedTuple):
    """A relation, and how near a text is to it: from 0, no word in common, to 1."""

    relation: Relation
    score: float


def stem_word(word: str) -> str:
    """A word without its ending, so that "designed", "designer" and "designs" are one."""
    if word.endswith("ies") and len(word) > 4:
        word = word[:-3] + "y"
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3 and word not in _IRREGULAR:
        word = word[:-1]
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            word = word.removesuffix(ending)
            break
    if len(word) > 4 and word[-1] == word[-2] and word[-1] not in "ls":
        word = word[:-1]
    if word.endswith("e") and len(word) > 3:
        word = word[:-1]
    return word[:-1] + "i" if word.endswith("y") and len(word) > 3 else word


def _features(text: str) -> dict[str, float]:
    """The words of a text that say what it is about, the words that ask, and, for little, neighbours; their weights."""
    words = re.findall(r"\{\}|[a-z]+", text.lower().replace("'s", " "))
    plain = [word == "{}" or word in EMPTY_WORDS for word in words]
    stems = [word if empty else stem_word(word) for word, empty in zip(words, plain, strict=True)]
    features = {stem: 1.0 for stem, empty in zip(stems, plain, strict=True) if not empty}
    features |= {f"{word}?": 1.0 for word in words if word in QUESTION_WORDS}
    pairs = zip(stems, stems[1:], plain, plain[1:], strict=False)
    return features | {f"{one} {other}": _PAIR_WEIGHT for one, other, *empty in pairs if not all(empty)}


def build_words(of: Sequence[Relation]) -> dict[str, dict[int, int]]:
    """For each feature the relations that have it, by position, and in how many wordings."""
    index: dict[str, Counter[int]] = defaultdict(Counter)
    for position, relation in enumerate(of):
        for text in (*relation.statements, *relation.questions):
            for feature in _features(text):
                index[feature][position] += 1
        name = relation.id.partition(".")[2].replace("_", " ")
        for feature, weight in _features(" ".join((name, *relation.words))).items():
            index[feature][position] += _NAME_WORDINGS * (weight == 1)
    return {feature: dict(having) for feature, having in index.items()}


def _index(feature: str) -> Mapping[int, int]:
    """The relations that have a feature, by position, and in how many wordings."""
    return {int(position): number for position, number in compiled()["words"].get(feature, {}).items()}


@cache
def _positions() -> Mapping[str, int]:
    """Which relation each text of the library is of."""
    all_texts = ((one.statements + one.questions, position) for position, one in enumerate(relations()))
    return {text: position for texts, position in all_texts for text in texts}


def match_relation(prompt: str, count: int = 5, threshold: float = THRESHOLD) -> list[Match]:
    r"""The relations nearest to a text, by its words.

    The score of a relation is

    $$\frac{\sum_w v_w \, n_w / (n_w + 1)}{\sum_w v_w}, \qquad v_w = \log\left(\frac{N + 1}{N_w + 1}\right)^{3/2}$$

    over the words $w$ of the text, of which $n_w$ wordings of the relation and $N_w$ of all $N$ relations have each.
    A relation that shares one word in one wording alone is not near;
    one of whose wordings the text is has 1.

    Args:
        prompt: the text, with ``{}`` where its subject stands; without it the subject's name counts as words.
        count: how many at most.
        threshold: the least score.

    Returns:
        The nearest first; nothing where nothing is near.

    Example:
        >>> [match.relation.id for match in match_relation("The tongue that {} learnt as a child was", 1)]
        ['person.native_language']
        >>> match_relation("{} and then the rain")
        []
    """
    total = len(relations())
    scores: dict[int, float] = defaultdict(float)
    support: Counter[int] = Counter()
    most = 0.0
    for feature, weight in _features(prompt).items():
        having = _index(feature)
        value = weight * math.log((total + 1) / (len(having) + 1)) ** 1.5
        most += value
        for position, wordings in having.items():
            scores[position] += value * wordings / (wordings + 1)
            support[position] += wordings * (weight == 1)
    if (position := _positions().get(prompt)) is not None:
        most = most or 1.0
        scores[position], support[position] = most, 2
    # One word in one wording may be chance.
    near = [(score / most, position) for position, score in scores.items() if score and support[position] > 1]
    near.sort(key=lambda pair: (-pair[0], pair[1]))
    return [Match(relations()[position], score) for score, position in near[:count] if score >= threshold]


def kind_of_name(name: str, *, before: bool = False) -> set[str]:
    """The kinds that the words of a name tell, or, ``before`` a name, the words that say what stands behind them."""
    if before:
        return {_KIND_OF_CLASS[name.lower()]} if name.lower() in _KIND_OF_CLASS else set()
    words = re.findall(r"[^\W\d_]+", name.lower())
    told = {_KIND_OF_WORD[word] for word in words[1:] if word in _KIND_OF_WORD}
    # "Lake Anna" and "University of Anna", but not "Park Chung-hee".
    if (
        words
        and words[0] in _KIND_OF_WORD
        and (words[0] in _LEADING.split() or words[1:2] == ["of"] or len(words) == 1)
    ):
        told.add(_KIND_OF_WORD[words[0]])
    return told


def guess_kind(prompt: str, subject: str = "") -> str:
    """What kind of thing a subject is, guessed from what is said of it and a little from its name.

    Args:
        prompt: the text, with ``{}`` where the subject stands.
        subject: its name; "Lake", "University" and the like in it count.

    Returns:
        One of `KINDS`; ``"thing"`` where nothing is known.

    Example:
        >>> guess_kind("The novelist who wrote {} is"), guess_kind("{} and then the rain", "University of Oslo")
        ('work', 'organisation')
        >>> guess_kind("The film {} is by"), guess_kind("{} and then the rain")
        ('work', 'thing')
    """
    votes: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for relation, score in match_relation(prompt, 8):
        # A relation of all kinds says nothing about the subject.
        for kind in relation.kinds if len(relation.kinds) < len(KINDS) else ():
            votes[kind] += score**2 / len(relation.kinds)
    for kind in {"person"} if is_person_name(subject) else kind_of_name(subject):
        votes[kind] += _NAME_VOTE
    before = re.search(r"(\w+) \{\}", prompt.lower())
    if before and before[1] in _KIND_OF_CLASS:
        votes[_KIND_OF_CLASS[before[1]]] += _CLASS_VOTE
    best = max(votes, key=lambda kind: votes[kind])
    return best if votes[best] else "thing"
