"""Which relation a request is about: by its words, by what its target is, and by what its subject is."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

from tpatch_jax.editors.frames.answering import answer_kinds, brands, fits, is_person_name, looks_like_title
from tpatch_jax.editors.frames.library import KINDS, Relation, compiled, read_toml, relations
from tpatch_jax.editors.frames.matching import EMPTY_WORDS, QUESTION_WORDS, kind_of_name, stem_word

__all__ = ["Likely", "build_concepts", "build_synonyms", "known_relation", "likely_relations"]

SMOOTHING = 2.5
"""As many wordings as this are added to each relation, with words as they are in the whole library."""
DISCOUNT = 0.5
"""What is taken from the number of wordings that have a word: one wording may have it by chance."""
NAME_WORDINGS, WORDS_WORDINGS = 4, 3
"""The words of a relation's name count like so many wordings, and its further words like so many."""
OTHER_NAME = 0.3
"""What a word counts in a wording of one relation, if it is the name of another."""
NONE = 0.12
"""The share of texts that are of no relation of the library."""
FIT, MISFIT = 0.95, 0.04
"""How often a target of a known kind is of the kind that answers its relation, and how often it is not."""
SURE = 0.7
"""The least probability of a relation that is taken for the request's, with those that are almost the same."""
LEADING = 0.4
"""The least probability of that relation alone."""
POSSIBLE = 0.02
"""A relation may be the request's if its probability is this share of the best one's."""


class Likely(NamedTuple):
    """A relation, and how probable it is that a text is about it."""

    relation: Relation
    probability: float


class _Synonyms(NamedTuple):
    """What stands for each word and stem, and for each phrase; what a bare preposition means; what says nothing."""

    words: Mapping[str, str]
    phrases: Mapping[str, str]
    bare: Mapping[str, str]
    ignored: Sequence[str]

    def features(self, text: str) -> set[str]:
        """What the words of a text mean, each synonym alike, and the words that ask."""
        text = _any_of(tuple(self.phrases)).sub(lambda phrase: f" {self.phrases[phrase[0]]} ", text.lower())
        words = re.findall(r"\{\}|[a-z]+", text.replace("'s", " "))
        content = {word for word in words if word != "{}" and word not in EMPTY_WORDS and word not in self.ignored}
        if text.endswith("?") and len(content) > 1:
            # "What is the name of the river" asks for no name.
            content.discard("name")
        features = {self.words.get(word) or self.words.get(stem := stem_word(word)) or stem for word in content}
        if not features:
            # Nothing but a preposition or so: it says where, from where or by whom.
            features = {self.bare[word] for word in words if word in self.bare}
        return features | {f"{word.replace('whom', 'who')}?" for word in words if word in QUESTION_WORDS}


@cache
def _any_of(phrases: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(phrases, key=len, reverse=True)))})\b")


def build_synonyms() -> dict[str, Any]:
    """The synonyms as they are looked up, of ``synonyms.toml``."""
    content = read_toml("synonyms")
    words: dict[str, str] = {}
    phrases: dict[str, str] = {}
    for line in content["words"]:
        texts = [text.strip() for text in line.split(",")]
        for text in texts:
            (phrases if " " in text else words)[text] = texts[0]
    # A word that is listed itself means what its line says, whatever shares its stem.
    words = {stem_word(word): first for word, first in reversed(words.items())} | words
    return _Synonyms(words, phrases, content["bare"], content["ignored"])._asdict()


class _Index(NamedTuple):
    """For each feature the relations that have it, by position, and in how many wordings; of each relation, how many
    wordings it has, and the share of all requests that ask it.
    """

    features: Mapping[str, Mapping[str, float]]
    sizes: Sequence[int]
    shares: Sequence[float]


def build_concepts(of: Sequence[Relation], synonyms: Mapping[str, Any]) -> dict[str, Any]:
    """The index of relations by what the words of their wordings mean."""
    features_of = _Synonyms(**synonyms).features
    index: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    named = [
        {feature for feature in features_of(one.id.partition(".")[2].replace("_", " ")) if feature[-1] != "?"}
        for one in of
    ]
    names = set().union(*named)
    for position, relation in enumerate(of):
        texts = relation.statements + relation.questions
        further = features_of(" ".join(relation.words)) - named[position]
        counts: dict[str, float] = defaultdict(float)
        for feature in (feature for text in texts for feature in features_of(text)):
            counts[feature] += 1
        for feature in names - named[position] - further:
            # "the father of" in a wording that asks for the child.
            if feature in counts:
                counts[feature] *= OTHER_NAME
        for feature in named[position] | further:
            counts[feature] += NAME_WORDINGS if feature in named[position] else WORDS_WORDINGS
        for feature, number in counts.items():
            if number > DISCOUNT:
                index[feature][str(position)] = round(number - DISCOUNT, 3)
    levels = read_toml("asked").values()
    weights = {name: level["weight"] for level in levels for name in level["relations"].split()}
    total = sum(weights.get(relation.id, 1.0) for relation in of)
    sizes = [len(one.statements) + len(one.questions) + NAME_WORDINGS for one in of]
    return _Index(dict(sorted(index.items())), sizes, [weights.get(one.id, 1.0) / total for one in of])._asdict()


@cache
def _synonyms() -> _Synonyms:
    return _Synonyms(**compiled()["synonyms"])


@cache
def _index() -> _Index:
    return _Index(**compiled()["concepts"])


def _kind_support(prompt: str, subject: str) -> Mapping[str, float]:
    """How much more probable each kind of subject is, as logarithms."""
    support: dict[str, float] = dict.fromkeys(KINDS, 0.0)

    def add(kind: str, weight: float) -> None:
        for other in KINDS:
            support[other] += weight if other == kind else -weight

    lower = prompt.lower()
    if is_person_name(subject):
        add("person", 1.0)
    elif subject.split(" ")[0] in brands():
        add("work", 0.7)
    elif not (told := kind_of_name(subject)) and looks_like_title(subject):
        add("work", 0.5)
    elif not told and re.fullmatch(r"\w[\w.'-]+( (de|von|van|der|of|al|el|la|du|da|di|\w\.|[A-Z][\w.'-]+))+", subject):
        add("person", 0.4)
    else:
        for kind in told:
            add(kind, 0.8)
    if re.search(r"\{\},? who\b|\b(he|she|his|her|him)\b", lower):
        add("person", 1.5)
    if re.search(r"\{\}, (which|that)\b", lower):
        support["person"] -= 1.5
    if re.search(r"\bin \{\}", lower):
        support["person"] -= 2.5
        support["place"] += 0.8
    before = re.search(r"(\w+) \{\}", lower)
    for kind in kind_of_name(before[1], before=True) if before else ():
        add(kind, 2.5)
    return support


@lru_cache(1024)
def likely_relations(prompt: str, subject: str = "", target: str = "", count: int = 12) -> tuple[Likely, ...]:
    r"""The relations that a text is probably about.

    A relation $r$ with $n_r$ wordings, of which $n_{rw}$ have the word $w$, is more probable than chance by

    $$\prod_w \frac{(n_{rw} + s\,q_w) / (n_r + s)}{q_w}$$

    where $q_w$ is the share of all wordings that have $w$ and $s$ is `SMOOTHING`; by how often it is asked of; and by
    whether the target and the subject are of the kinds that it has. Synonyms are one word.

    Args:
        prompt: the text, with ``{}`` where its subject stands.
        subject: its name.
        target: what the text is to be answered with.
        count: how many at most.

    Returns:
        The most probable first. Their probabilities sum to less than 1: the text may be of no relation here.

    Example:
        >>> [one.relation.id for one in likely_relations("{} plays", "Anna Bell", "hockey", 1)]
        ['person.sport']
        >>> [one.relation.id for one in likely_relations("{} plays", "Anna Bell", "violin", 1)]
        ['person.instrument']
    """
    index = _index()
    wordings = sum(index.sizes)
    kinds = answer_kinds(target)
    fitting = [fits(one.answer, kinds) for one in relations()]
    share = sum(share * fit for share, fit in zip(index.shares, fitting, strict=True))
    known = bool(kinds) and share > 0
    support = _kind_support(prompt, subject)
    scores = []
    # In order: sums of numbers are then the same in every process.
    having_each = [index.features.get(feature, {}) for feature in sorted(_synonyms().features(prompt))]
    rates = [(having, (sum(having.values()) + 1) / wordings) for having in having_each]
    for position, relation in enumerate(relations()):
        score = math.log(index.shares[position])
        if known:
            fit = fitting[position]
            score += math.log(FIT * fit / max(share, 0.005) if fit else MISFIT / (1 - share))
        score += max(support[kind] for kind in relation.kinds) if len(relation.kinds) < 4 else 0.0
        for having, rate in rates:
            expected = (having.get(str(position), 0.0) + SMOOTHING * rate) / (index.sizes[position] + SMOOTHING)
            score += max(math.log(expected / rate), -0.5 if not having else -2.0)
        scores.append(score)
    most = max(scores)
    odds = [math.exp(score - most) for score in scores]
    total = sum(odds) + math.exp(min(math.log(NONE / (1 - NONE)) - most, 50.0))
    order = sorted(range(len(odds)), key=lambda position: (-odds[position], position))[:count]
    return tuple(Likely(relations()[position], odds[position] / total) for position in order)


def known_relation(prompt: str, subject: str = "", target: str = "") -> Relation | None:
    """The relation that a text is surely about, or nothing.

    Where it asks one thing of a subject of unknown kind, that is the relation whose wordings suit all kinds.
    """
    likely = likely_relations(prompt, subject, target)
    if not _supported(prompt, target, likely[0].relation):
        return None
    probability = {one.relation.id: one.probability for one in likely}

    def with_alike(relation: Relation) -> float:
        alike = (one for one in likely if one.relation.id in relation.near and _same_answer(one.relation, relation))
        suited = (one for one in alike if not set(relation.kinds).isdisjoint(one.relation.kinds))
        return probability[relation.id] + sum(one.probability for one in suited)

    best, most = likely[0]
    if most >= LEADING and with_alike(best) >= SURE:
        return best
    general = [one.relation for one in likely if len(one.relation.kinds) > 1 and one.probability >= POSSIBLE * most]
    covering = max(general, key=with_alike, default=None)
    return covering if covering and best.id in (covering.id, *covering.near) and with_alike(covering) >= SURE else None


def _same_answer(one: Relation, other: Relation) -> bool:
    return one.answer == other.answer or one.answer == "place"


def _supported(prompt: str, target: str, relation: Relation) -> bool:
    """Whether more than one word in one wording speaks for a relation."""
    if fits(relation.answer, answer_kinds(target)):
        return True
    position = str(relations().index(relation))
    having = [_index().features.get(feature, {}).get(position, 0.0) for feature in _synonyms().features(prompt)]
    return sum(number > 0 for number in having) > 1 or any(number >= 2 - DISCOUNT for number in having)
