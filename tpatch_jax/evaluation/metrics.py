"""The published figures of model editing, as formulas over the scores of probes; no model runs here.

Everywhere: the mean within a record first, over its prompts, then over the records. ``t`` runs over the tokens of a
target, which is scored under teacher forcing: each token after the true ones before it.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.comparing import names, plain_words

__all__ = [
    "Score",
    "answered",
    "any_answered",
    "certificate",
    "exact_match",
    "generation_entropy",
    "harmonic_mean",
    "magnitude",
    "n_gram_entropy",
    "next_token_agreement",
    "perplexity",
    "record_figures",
    "retention_curve",
    "running_curve",
    "sequential_figures",
    "success",
    "summarise",
    "token_accuracy",
    "unchanged",
    "words",
]


class Score(NamedTuple):
    """What a model makes of one probe.

    Attributes:
        nll: ``NLL = mean_t -log p(t)``, natural logarithm.
        right: whether the argmax is the target's token, ``[tokens]`` bool.
        predicted: the argmax ids, ``[tokens]`` int. For a probe without a target: the one after the prompt, ``[1]``,
            with an empty `right` and ``nan`` for `nll`.

    Example:
        >>> Score(0.7, np.array([True, False]), np.array([3, 9])).nll
        0.7
    """

    nll: float
    right: np.ndarray
    predicted: np.ndarray


def success(wanted: Sequence[Score], other: Sequence[Score]) -> float:
    """ES, PS and NS of one record: how often the wanted target is likelier than the other; a tie is no success.

    ``mean_i [NLL(other_i) > NLL(wanted_i)]``. In ES and PS the wanted target is the new one, in NS the true one.

    Args:
        wanted: scores of the wanted target on each prompt, ``[prompts]``.
        other: scores of the other target on the same prompts, ``[prompts]``.

    Returns:
        A share.

    Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT", section 3.3 and its code.

    Example:
        >>> score = lambda nll: Score(nll, np.array([True]), np.array([0]))
        >>> success([score(1.0), score(2.0)], [score(3.0), score(2.0)])
        0.5
    """
    return _mean([a.nll < b.nll for a, b in _pairs(wanted, other)])


def magnitude(wanted: Sequence[Score], other: Sequence[Score]) -> float:
    """EM, PM and NM of one record: by how much the wanted target is likelier than the other.

    ``mean_i exp(-NLL(wanted_i)) - exp(-NLL(other_i))``: a difference of probabilities per token (geometric means).

    Args:
        wanted: scores of the wanted target on each prompt, ``[prompts]``; see `success`.
        other: scores of the other target on the same prompts, ``[prompts]``.

    Returns:
        A number in ``[-1, 1]``.

    Source: Meng et al. 2022, section 3.3 and its code.

    Example:
        >>> score = lambda nll: Score(nll, np.array([True]), np.array([0]))
        >>> round(magnitude([score(0.0)], [score(math.log(4))]), 6)
        0.75
    """
    return _mean([math.exp(-a.nll) - math.exp(-b.nll) for a, b in _pairs(wanted, other)])


def token_accuracy(scores: Sequence[Score]) -> float:
    """Reliability, generalization and portability of one record: the share of target tokens whose argmax is right.

    ``mean_i mean_t right_it``.

    Args:
        scores: of the target on each prompt, ``[prompts]``.

    Returns:
        A share.

    Source: EasyEdit (Wang et al. 2023), and Meng et al. 2022, section 3.2, for zsRE.

    Example:
        >>> token_accuracy([Score(0.7, np.array([True, False]), np.array([3, 9]))])
        0.5
    """
    return _mean([_mean(_scored(score)) for score in scores])


def exact_match(scores: Sequence[Score]) -> float:
    """Free-running exact match of one record, and CounterFact's ``acc`` variants: every target token's argmax is right.

    ``mean_i all_t right_it``. It is computed under teacher forcing and yet is the figure for greedy decoding from the
    prompt alone: if every argmax after the true tokens is right, then greedy decoding produces the first target token,
    hence stands where teacher forcing stood, produces the second, and so on, which gives the target; if one is wrong,
    the first wrong one is also what greedy decoding produces at that place. This needs the target to be tokenized as
    the continuation of the prompt's tokens, and asks nothing of what follows the target: the model need not stop there.

    Args:
        scores: of the target on each prompt, ``[prompts]``.

    Returns:
        A share.

    Source: Meng et al. 2023, "Mass-Editing Memory in a Transformer", its code, for the ``acc`` variants.

    Example:
        >>> exact_match([Score(0.7, np.array([True, False]), np.array([3, 9]))])
        0.0
    """
    return _mean([bool(np.all(_scored(score))) for score in scores])


def unchanged(before: Sequence[Score], after: Sequence[Score]) -> float:
    """Locality and relation specificity of one record: the share of tokens whose argmax the edit leaves as it was.

    ``mean_i mean_t [predicted_it before = predicted_it after]``, right or not, over the span of the ground truth.

    Args:
        before: scores of the unedited model on each prompt, ``[prompts]``.
        after: scores of the edited model on the same prompts, ``[prompts]``.

    Returns:
        A share.

    Source: EasyEdit (Wang et al. 2023); Zhang et al. 2024 (KnowEdit).

    Example:
        >>> score = lambda *ids: Score(0.7, np.array([True, False]), np.array(ids))
        >>> unchanged([score(3, 9)], [score(3, 8)])
        0.5
    """
    return _mean([next_token_agreement(a.predicted, b.predicted) for a, b in _pairs(before, after)])


def record_figures(
    before: Mapping[str, Sequence[Score]],
    after: Mapping[str, Sequence[Score]],
    texts: Sequence[str] = (),
    contaminated: Mapping[str, Sequence[bool]] | None = None,
) -> dict[str, float]:
    """All figures that one record allows.

    ======================================  ====================================================================
    kinds of probes                         figures
    ======================================  ====================================================================
    rewrite_new, rewrite_true               ES, EM (`success`, `magnitude`); rewrite_acc (`exact_match`)
    paraphrase_new, paraphrase_true         PS, PM, paraphrase_acc
    neighborhood_true, neighborhood_new     NS, NM; neighborhood_acc, with the true target
    reliability or rewrite_new              reliability (`token_accuracy`); exact (`exact_match`)
    generalization or paraphrase_new        generalization, generalization_exact
    rephrasing_*                            the same over all, and generalization_* of each kind (`exact_match`)
    portability and portability_*           portability, portability_exact, over all; and each kind's own
    locality or neighborhood_true           locality (`unchanged`)
    locality_answer                         locality (`token_accuracy`: ROME's zsRE), locality_exact
    keep                                    keep (`unchanged`)
    relation_specificity                    relation_specificity (`unchanged`), relation_specificity_acc, ..._exact
    multi_hop                               multi_hop (`token_accuracy`), multi_hop_exact
    generated texts                         GE (`generation_entropy`)
    ======================================  ====================================================================

    What is said freely about the edited subjects is measured in `tpatch_jax.evaluation.subject_specificity`.

    CounterFact so has the figures of both protocols: the capitals and ``acc`` are ROME's and MEMIT's, the others
    EasyEdit's. A figure over probes of which some are contaminated has beside it ``<figure>_clean``, over the others.

    Args:
        before: the unedited model's scores by kind of probe (`tpatch_jax.evaluation.records.Record.probes`),
            ``[prompts]`` each; only the kinds measured by `unchanged` are looked at.
        after: the edited model's, on the same probes; an unedited model's figures have it twice.
        texts: what the edited model generated, prompts included.
        contaminated: for each kind of which clean figures are wanted, whether each probe is contaminated, ``[prompts]``
            (`tpatch_jax.evaluation.contamination`).

    Returns:
        Figures by name.

    Raises:
        TPatchError: a kind that no figure is made of, or a kind of locality without the scores before.

    Source: as named at each formula.

    Example:
        >>> score = lambda nll: [Score(nll, np.array([True, False]), np.array([3, 9]))]
        >>> figures = record_figures({}, {"rewrite_new": score(1.0), "rewrite_true": score(2.0)})
        >>> {name: round(value, 3) for name, value in figures.items()}
        {'ES': 1.0, 'EM': 0.233, 'rewrite_acc': 0.0, 'reliability': 0.5, 'exact': 0.0}
    """
    after = {kind: scores for kind, scores in after.items() if scores}
    figures = _figures(before, after)
    if contaminated:
        clean_before, clean_after = (
            {kind: _clean(scores, contaminated.get(kind, ())) for kind, scores in side.items()}
            for side in (before, after)
        )
        clean = _figures(clean_before, {kind: scores for kind, scores in clean_after.items() if scores})
        touched = {name for kind in contaminated for name in _names_of(kind)}
        figures |= {f"{name}_clean": value for name, value in clean.items() if name in touched}
    if texts:
        figures["GE"] = generation_entropy(texts)
    return figures


def _clean(scores: Sequence[Score], contaminated: Sequence[bool]) -> list[Score]:
    marks = contaminated or [False] * len(scores)
    return [score for score, mark in zip(scores, marks, strict=True) if not mark]


def _names_of(kind: str) -> list[str]:
    """The figures that are made of a kind of probes that may be contaminated."""
    if kind.startswith("portability"):
        return ["portability", "portability_exact", kind]
    parts = [(part, letter) for part, letter, *kinds in _CONTRASTS if kind in kinds]
    contrasts = [name for part, letter in parts for name in (f"{letter}S", f"{letter}M", f"{part}_acc")]
    accuracies = [name for of, *both in _ACCURACIES if of == kind for name in both]
    return contrasts + accuracies + [name for of, name in _UNCHANGED if of == kind]


def _figures(before: Mapping[str, Sequence[Score]], after: Mapping[str, Sequence[Score]]) -> dict[str, float]:
    for kind in after:
        if kind not in _KINDS and not kind.startswith(("portability_", "rephrasing_", "accuracy")):
            raise TPatchError(f"no figure is made of probes of the kind {kind!r}; the kinds are {', '.join(_KINDS)}")
    figures: dict[str, float] = {}
    for part, letter, wanted, other in _CONTRASTS:
        if wanted in after and other in after:
            figures[f"{letter}S"] = success(after[wanted], after[other])
            figures[f"{letter}M"] = magnitude(after[wanted], after[other])
        if wanted in after:
            figures[f"{part}_acc"] = exact_match(after[wanted])
    for kind, name, exact in _ACCURACIES:
        if kind in after:
            figures[name] = token_accuracy(after[kind])
            figures[exact] = exact_match(after[kind])
    rules = [kind for kind in after if kind.startswith("rephrasing_")]
    if rules:
        scores = [score for kind in rules for score in after[kind]]
        figures["generalization"], figures["generalization_exact"] = token_accuracy(scores), exact_match(scores)
        for kind in rules:
            figures[f"generalization_{kind.removeprefix('rephrasing_')}"] = exact_match(after[kind])
    asked = [kind for kind in after if kind.startswith("portability")]
    if asked:
        scores = [score for kind in asked for score in after[kind]]
        figures["portability"] = token_accuracy(scores)
        figures["portability_exact"] = exact_match(scores)
        for kind in asked:
            figures[kind] = token_accuracy(after[kind])
    for kind, name in _UNCHANGED:
        if kind in after:
            if kind not in before:
                raise TPatchError(
                    f"{name} compares with the unedited model; give its scores of the {kind!r} probes too"
                )
            figures[name] = unchanged(before[kind], after[kind])
    return figures


# part, letter, the wanted target's kind, the other's
_CONTRASTS = (
    ("rewrite", "E", "rewrite_new", "rewrite_true"),
    ("paraphrase", "P", "paraphrase_new", "paraphrase_true"),
    ("neighborhood", "N", "neighborhood_true", "neighborhood_new"),
)
# kind, token accuracy's name, exact match's name
_ACCURACIES = (
    ("rewrite_new", "reliability", "exact"),
    ("reliability", "reliability", "exact"),
    ("paraphrase_new", "generalization", "generalization_exact"),
    ("generalization", "generalization", "generalization_exact"),
    ("locality_answer", "locality", "locality_exact"),
    ("relation_specificity", "relation_specificity_acc", "relation_specificity_exact"),
    ("multi_hop", "multi_hop", "multi_hop_exact"),
)
# kind, name
_UNCHANGED = (
    ("neighborhood_true", "locality"),
    ("locality", "locality"),
    ("relation_specificity", "relation_specificity"),
    ("keep", "keep"),
)
_KINDS = tuple(
    dict.fromkeys(
        [kind for _, _, *kinds in _CONTRASTS for kind in kinds]
        + [kind for kind, *_ in (*_ACCURACIES, *_UNCHANGED)]
        + ["portability"]
    )
)


def summarise(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The figures of a data set: each the mean over the records that have it, and S.

    ``S = harmonic mean of ES, PS and NS``, of their means over the records, where all three are there; ``S_clean`` the
    same with ``NS_clean``.

    Args:
        records: figures of each record, e.g. from `record_figures`.

    Returns:
        Figures by name, in the order of their first appearance.

    Source: Meng et al. 2022, section 3.3.

    Example:
        >>> summarise([{"ES": 1.0, "PS": 0.5, "NS": 1.0}, {"ES": 1.0}])
        {'ES': 1.0, 'PS': 0.5, 'NS': 1.0, 'S': 0.75}
    """
    values: dict[str, list[float]] = {}
    for figures in records:
        for name, value in figures.items():
            values.setdefault(name, []).append(value)
    summary = {name: _mean(figures) for name, figures in values.items()}
    if {"ES", "PS", "NS"} <= summary.keys():
        summary["S"] = harmonic_mean([summary["ES"], summary["PS"], summary["NS"]])
        if "NS_clean" in summary:
            summary["S_clean"] = harmonic_mean([summary["ES"], summary["PS"], summary["NS_clean"]])
    return summary


def harmonic_mean(values: Sequence[float]) -> float:
    """The harmonic mean, 0 where a value is 0.

    ``n / sum_i 1/x_i``.

    Args:
        values: ``[n]``, none negative.

    Returns:
        A number between the least and the greatest value.

    Source: Meng et al. 2022, section 3.3, for S.

    Example:
        >>> harmonic_mean([1.0, 0.5, 1.0])
        0.75
    """
    return 0.0 if min(values) == 0 else len(values) / sum(1 / value for value in values)


# A word keeps its inner hyphens, points and slashes, a number its commas and colons; "n't" and the like are words.
_WORD = re.compile(
    r"\w+?(?=n't\b)|n't\b|'(?:s|m|d|ll|re|ve)\b|\w+(?:[-./]\w+|[,:]\d+|'(?!(?:s|m|d|ll|re|ve)\b)\w+)*|\.{3}|--|\S",
    re.IGNORECASE,
)


def words(text: str) -> list[str]:
    """The words and punctuation marks of a text, much as NLTK's ``word_tokenize`` gives them to the published GE.

    Contractions come apart (``do n't``, ``it 's``), a hyphenated word, a number and an abbreviation's inner points stay
    together, every other mark stands alone. It differs from NLTK in a few rare forms (``gonna``, ``U.S.`` before
    another word, the two kinds of quotation marks); over 400 paragraphs of WikiText the mean GE was 646.5 with these
    words and 646.3 with NLTK's.

    Args:
        text: any text.

    Returns:
        The words in order, in their own case.

    Source: Meng et al. 2022, its code, for the use of NLTK's words.

    Example:
        >>> words("It's 1,000 well-made pots, isn't it?")
        ['It', "'s", '1,000', 'well-made', 'pots', ',', 'is', "n't", 'it', '?']
    """
    return _WORD.findall(text)


def n_gram_entropy(tokens: Sequence[str], n: int) -> float:
    """``H_n``, the entropy of a text's n-grams: low where it repeats itself.

    ``H_n = -sum_g f(g)·log2 f(g)``, with ``f(g)`` the share of n-gram ``g`` among all; 0 where the text is shorter than
    n.

    Args:
        tokens: ``[words]``.
        n: the length of an n-gram.

    Returns:
        Bits.

    Source: Zhang et al. 2018, "Generating Informative and Diverse Conversational Responses".

    Example:
        >>> n_gram_entropy(["a", "b", "a", "c", "a"], 2)
        2.0
    """
    counts = np.array(list(Counter(zip(*(tokens[i:] for i in range(n)), strict=False)).values()), float)
    if not counts.size:
        return 0.0
    shares = counts / counts.sum()
    return float(np.sum(shares * np.log2(1 / shares)))


def generation_entropy(texts: Sequence[str]) -> float:
    """GE of one record: how fluent its generated texts are, as far as repetition shows.

    ``GE = 100 · mean_texts (2/3·H_2 + 4/3·H_3) / 2``, over `words`.

    Args:
        texts: what was generated, prompts included as in the published code: top-k 5 samples of at most 100 tokens. A
            text that the model ends is not gone on with, where the published code samples on.

    Returns:
        Hundredths of a bit, the unit of the published tables.

    Source: Meng et al. 2022, section 3.3, and its code.

    Example:
        >>> round(generation_entropy(["one two three"]), 2)
        33.33
    """
    tokens = [words(text) for text in texts]
    return 100 * _mean([(2 / 3 * n_gram_entropy(text, 2) + 4 / 3 * n_gram_entropy(text, 3)) / 2 for text in tokens])


# An accepted answer of so few characters ("it" for Italian) is a word of every text: it must be the whole text.
_SHORT = 3


def answered(text: str, accepted: Sequence[str], question: str = "", old: Sequence[str] = ()) -> bool:
    """Whether a generated text gives one of the accepted answers.

    The text counts up to the end of its first line that is not blank, for a model that was not told to stop goes on
    with the next question. Text and answers are compared in lower case, without punctuation, articles (a, an, the) and
    superfluous white space. An answer is given if it is the whole text, or, where it is longer than three characters,
    stands in it as whole words. The question's own words do not count, since a model that repeats the question answers
    nothing: what the question names must be the whole text. Nor does a part of the old answer's name ("English" in
    "American English") count.

    Args:
        text: what the model generated after the question.
        accepted: the answer and its aliases.
        question: what was asked.
        old: the answer before the edit and its aliases.

    Returns:
        Whether one is given.

    Source: Zhong et al. 2023 (MQuAKE), and its code, which compares an extracted answer for equality; the
    normalisation is that of SQuAD (Rajpurkar et al. 2016).

    Example:
        >>> answered(" It is the Arabic language.\\nQuestion: Who", ["ar", "Arabic"])
        True
        >>> answered(" it", ["Italian", "it"]), answered(" it is", ["Italian", "it"])
        (True, False)
        >>> answered(" It is American English.", ["English"], old=["American English"])
        False
    """
    given = _normalise(next((line for line in text.splitlines() if line.strip()), ""))
    before = {name for name in map(_normalise, old) if name}
    wanted = {answer for answer in map(_normalise, accepted) if answer} - before
    if given in wanted:
        return True
    for name in sorted(before, key=len, reverse=True):
        if any(names(name, answer) for answer in wanted):
            given = _without(given, name)
    asked = _normalise(question)
    return any(len(answer) > _SHORT and not names(asked, answer) and names(given, answer) for answer in wanted)


def _without(text: str, phrase: str) -> str:
    """The text with a mark, which is no word, in the place of a phrase."""
    return f" {text} ".replace(f" {phrase} ", " | ").strip()


def _normalise(text: str) -> str:
    return " ".join(word for word in plain_words(text).split() if word not in ("a", "an", "the"))


def any_answered(
    texts: Sequence[str], accepted: Sequence[str], questions: Sequence[str] = (), old: Sequence[str] = ()
) -> bool:
    """MQuAKE's any-of-three rule: a case counts if any of its questions is answered.

    ``any_i answered(text_i, accepted, question_i, old)``; the figure ``mquake`` is the share of cases that count.

    Args:
        texts: what was generated after each question of the case, ``[questions]``.
        accepted: the new answer and its aliases.
        questions: what was asked, ``[questions]``; none where only the texts are known.
        old: the answer before the edits and its aliases.

    Returns:
        Whether the case counts.

    Source: Zhong et al. 2023 (MQuAKE), on multi-hop accuracy.

    Example:
        >>> any_answered([" English", " Arabic", " French"], ["Arabic"])
        True
    """
    asked = questions or [""] * len(texts)
    return any(answered(text, accepted, question, old) for text, question in zip(texts, asked, strict=True))


def sequential_figures(
    edited: Sequence[bool] | np.ndarray,
    rephrased: Sequence[Sequence[bool] | np.ndarray],
    retained: Sequence[bool] | np.ndarray,
    train: tuple[np.ndarray, np.ndarray] | None = None,
    test: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, float]:
    """SR, GR, ER, TrainR and TestR of a stream of edits.

    - ``SR = mean_i edited_i``: the edited example is right immediately after its edit.
    - ``GR = mean_i mean_j rephrased_ij``: its rephrasings are right immediately after its edit.
    - ``ER = mean_i retained_i``: it is right at the end of the stream.
    - ``TrainR, TestR = accuracy after the stream ÷ accuracy before it``; above 1 where editing helps.

    Args:
        edited: ``[edits]`` bool, one for each example that was wrong when it came.
        rephrased: ``[edits]`` lists of bool, ``[rephrasings]`` each; an edit without rephrasings does not count in GR.
        retained: ``[edits]`` bool.
        train: whether each training input is right, before and after, ``[inputs]`` bool each.
        test: the same for the test set.

    Returns:
        The figures that are defined: none of an empty list, and no ratio to an accuracy of 0.

    Source: Huang et al. 2023, section 5, experimental settings.

    Example:
        >>> sequential_figures([True, True], [[True, False], [True]], [True, False])
        {'SR': 1.0, 'GR': 0.75, 'ER': 0.5}
    """
    figures = {}
    shares = [_mean(flags) for flags in rephrased if len(flags)]
    for name, flags in (("SR", edited), ("GR", shares), ("ER", retained)):
        if len(flags):
            figures[name] = _mean(flags)
    for name, sides in (("TrainR", train), ("TestR", test)):
        if sides is not None and np.any(sides[0]):
            figures[name] = _mean(sides[1]) / _mean(sides[0])
    return figures


def running_curve(values: Sequence[float] | np.ndarray, every: int = 50) -> list[tuple[int, float]]:
    """A figure measured right after each edit, over the number of edits: SR and GR as curves.

    ``y_k = mean_{i ≤ k} x_i`` for every `every`-th ``k`` and the last.

    Args:
        values: ``[edits]`` bool, or shares.
        every: the distance of the points.

    Returns:
        Pairs of the number of edits and the mean up to there.

    Source: Huang et al. 2023, section 5.

    Example:
        >>> running_curve([True, False, True, True, True], every=2)
        [(2, 0.5), (4, 0.75), (5, 0.8)]
    """
    counts = list(range(every, len(values) + 1, every))
    if len(values) % every:
        counts.append(len(values))
    return [(count, _mean(values[:count])) for count in counts]


def retention_curve(checks: Sequence[Sequence[bool] | np.ndarray]) -> list[tuple[int, float]]:
    """ER over the number of edits: at each check all edits so far are evaluated again.

    ``y_k = mean_{i ≤ k} right_i`` after edit ``k``.

    Args:
        checks: for each check, whether each edit so far is still right, ``[edits so far]`` bool.

    Returns:
        Pairs of the number of edits and the share that is right.

    Source: Huang et al. 2023, section 5, which checks every 50 edits.

    Example:
        >>> retention_curve([[True, True], [True, False, True, True]])
        [(2, 1.0), (4, 0.75)]
    """
    return [(len(flags), _mean(flags)) for flags in checks if len(flags)]


def perplexity(nlls: Sequence[float] | np.ndarray) -> float:
    """Perplexity of a text.

    ``exp(mean_t -log p(t))``.

    Args:
        nlls: ``-log p`` of each token given those before it, ``[tokens]``, natural logarithm.

    Returns:
        A number from 1 up.

    Source: Jelinek et al. 1977, "Perplexity: a measure of the difficulty of speech recognition tasks".

    Example:
        >>> round(perplexity([math.log(2), math.log(8)]), 6)
        4.0
    """
    return math.exp(_mean(nlls))


def next_token_agreement(before: np.ndarray, after: np.ndarray) -> float:
    """The share of next-token predictions that the edits leave as they were.

    ``mean_t [argmax before = argmax after]``.

    Args:
        before: argmax ids of the unedited model, ``[tokens]`` int.
        after: those of the edited model after the same tokens, ``[tokens]`` int.

    Returns:
        A share.

    Source: none; it is locality, as in `unchanged`, over running text.

    Example:
        >>> next_token_agreement(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5]))
        0.75
    """
    before, after = np.asarray(before), np.asarray(after)
    if before.shape != after.shape:
        raise TPatchError(
            f"{before.shape[0]} predictions before and {after.shape[0]} after; make both over the same tokens"
        )
    return _mean(before == after)


def certificate(
    fires: Sequence[Sequence[bool] | np.ndarray], reach: Literal["token", "causal", "prompt"] = "token"
) -> dict[str, float]:
    """The locality certificate: the share of tokens and prompts whose output is the base model's by construction.

    A token is certified if no neuron fires where its output could come to know of it. `reach` says where that is:

    - ``token``: at the token itself; the patched layer is the last, so that nothing mixes tokens after it;
    - ``causal``: at the token or before it; an earlier layer of a decoder;
    - ``prompt``: anywhere in the prompt; an earlier layer of an encoder.

    ``certificate_tokens`` is the certified share of all tokens, ``certificate_prompts`` the share of prompts on which
    no neuron fires at all. Both hold only where a silent neuron adds exactly nothing, which is so with ReLU.

    Args:
        fires: for each prompt, whether any neuron fires at each token, ``[tokens]`` bool.
        reach: see above.

    Returns:
        ``certificate_tokens`` and ``certificate_prompts``.

    Source: none; it follows from the patched FFN's formula, Huang et al. 2023, section 4.1.

    Example:
        >>> certificate([[False, True], [False, False]])
        {'certificate_tokens': 0.75, 'certificate_prompts': 0.5}
    """
    tainted, touched = [], []
    for prompt in fires:
        fired = np.asarray(prompt, bool)
        touched.append(bool(fired.any()))
        if reach == "causal":
            fired = np.logical_or.accumulate(fired)
        elif reach == "prompt":
            fired = np.full_like(fired, touched[-1])
        tainted.extend(fired)
    return {
        "certificate_tokens": 1 - _mean(tainted),
        "certificate_prompts": 1 - _mean(touched),
    }


def _mean(values: Sequence[float] | np.ndarray) -> float:
    if not len(values):
        raise TPatchError("a mean over nothing; give one prompt, token or record or more")
    return float(np.mean(np.asarray(values, float)))


def _scored(score: Score) -> np.ndarray:
    if not len(score.right):
        raise TPatchError("a probe without a target has no right tokens; only a locality probe can do without")
    return np.asarray(score.right, bool)


def _pairs(first: Sequence[Score], second: Sequence[Score]) -> list[tuple[Score, Score]]:
    if len(first) != len(second):
        raise TPatchError(
            f"{len(first)} scores against {len(second)}; give both for the same prompts, in the same order"
        )
    return list(zip(first, second, strict=True))
