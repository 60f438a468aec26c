"""Every figure against a case worked out by hand, and what must hold of any."""

import math
from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.metrics import (
    Score,
    answered,
    any_answered,
    certificate,
    exact_match,
    generation_entropy,
    harmonic_mean,
    magnitude,
    n_gram_entropy,
    next_token_agreement,
    perplexity,
    record_figures,
    retention_curve,
    running_curve,
    sequential_figures,
    success,
    summarise,
    token_accuracy,
    unchanged,
    words,
)

LN2 = math.log(2)
SHARES = st.floats(0, 1)
FLAGS = st.lists(st.booleans(), min_size=1, max_size=6)


def score(nll: float = 1.0, right: str = "1", predicted: tuple[int, ...] | None = None) -> Score:
    """`right` as in "101"; the argmax ids are that unless given."""
    flags = [flag == "1" for flag in right]
    return Score(nll, np.array(flags, bool), np.array(flags if predicted is None else predicted, int))


def nlls(*values: float) -> list[Score]:
    return [score(value) for value in values]


SCORE_LISTS = st.lists(
    st.builds(score, st.floats(0, 20), st.text("01", min_size=1, max_size=5)), min_size=1, max_size=5
)


# CounterFact


def test_success_is_a_share_of_prompts_and_a_tie_is_none() -> None:
    assert success(nlls(1.0), nlls(2.0)) == 1.0
    assert success(nlls(2.0), nlls(1.0)) == 0.0
    assert success(nlls(1.5), nlls(1.5)) == 0.0
    assert success(nlls(1.0, 3.0, 2.0, 0.5), nlls(2.0, 1.0, 2.0, 0.6)) == 0.5


def test_magnitude_is_a_difference_of_probabilities() -> None:
    assert magnitude(nlls(LN2), nlls(2 * LN2)) == pytest.approx(1 / 2 - 1 / 4)
    assert magnitude(nlls(3 * LN2), nlls(LN2)) == pytest.approx(1 / 8 - 1 / 2)
    assert magnitude(nlls(LN2, 3 * LN2), nlls(2 * LN2, LN2)) == pytest.approx((1 / 4 - 3 / 8) / 2)


def counterfact_record() -> dict[str, list[Score]]:
    return {
        "rewrite_new": [score(LN2, "11")],
        "rewrite_true": [score(2 * LN2, "0")],
        "paraphrase_new": [score(LN2, "10"), score(3 * LN2, "11")],
        "paraphrase_true": [score(2 * LN2, "0"), score(LN2, "1")],
        "neighborhood_new": [score(LN2, "00"), score(2 * LN2, "00"), score(2 * LN2, "00"), score(3 * LN2, "00")],
        "neighborhood_true": [
            score(2 * LN2, "11", (5, 6)),
            score(2 * LN2, "10", (5, 0)),
            score(LN2, "11", (5, 6)),
            score(LN2, "00", (1, 2)),
        ],
    }


def test_a_counterfact_record() -> None:
    after = counterfact_record()
    before = {"neighborhood_true": [score(right="11", predicted=ids) for ids in ((5, 6), (5, 6), (4, 7), (1, 2))]}
    figures = record_figures(before, after, texts=["a b c"])
    assert figures == pytest.approx(
        {
            "ES": 1.0,  # 2 ln 2 > ln 2
            "EM": 1 / 2 - 1 / 4,
            "rewrite_acc": 1.0,
            "PS": 1 / 2,  # the second paraphrase prefers the true target
            "PM": ((1 / 2 - 1 / 4) + (1 / 8 - 1 / 2)) / 2,
            "paraphrase_acc": 1 / 2,  # the first has a wrong token
            "NS": 2 / 4,  # the first prefers the new target, the second is a tie
            "NM": ((1 / 4 - 1 / 2) + 0 + (1 / 2 - 1 / 4) + (1 / 2 - 1 / 8)) / 4,
            "neighborhood_acc": 2 / 4,
            "reliability": 1.0,
            "exact": 1.0,
            "generalization": (1 / 2 + 1) / 2,
            "generalization_exact": 1 / 2,
            "locality": (1 + 1 / 2 + 0 + 1) / 4,
            "GE": 100 * (2 / 3 * 1 + 4 / 3 * 0) / 2,  # two bigrams, one trigram
        }
    )


def test_the_summary_takes_means_within_a_record_first_and_s_of_the_means() -> None:
    # Three paraphrases in the first record, one in the second: records weigh the same.
    first = {"paraphrase_new": nlls(1, 1, 1), "paraphrase_true": nlls(2, 2, 0.5)}
    second = {"paraphrase_new": nlls(1), "paraphrase_true": nlls(0.5)}
    for record, es in ((first, 2.0), (second, 2.0)):
        record |= {"rewrite_new": nlls(1), "rewrite_true": nlls(es)}
    third = {"rewrite_new": nlls(1), "rewrite_true": nlls(0.5)}
    records = [record_figures({}, record) for record in (first, second, third)]
    summary = summarise([{**records[0], "NS": 0.5}, records[1], records[2]])
    assert summary["ES"] == pytest.approx(2 / 3)
    assert summary["PS"] == pytest.approx((2 / 3 + 0) / 2)
    assert summary["NS"] == 0.5
    assert summary["S"] == pytest.approx(3 / (3 / 2 + 3 + 2))


def test_the_summary_has_no_s_without_its_three_parts() -> None:
    assert summarise([{"ES": 1.0, "PS": 1.0}]) == {"ES": 1.0, "PS": 1.0}
    assert summarise([]) == {}


def test_s_is_0_where_a_part_is() -> None:
    assert summarise([{"ES": 1.0, "PS": 1.0, "NS": 0.0}])["S"] == 0.0
    assert harmonic_mean([1.0, 1 / 2, 1 / 4]) == pytest.approx(3 / 7)


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=5))
def test_the_harmonic_mean_lies_between_the_least_and_the_arithmetic_mean(values: list[float]) -> None:
    mean = harmonic_mean(values)
    assert min(values) - 1e-9 <= mean <= sum(values) / len(values) + 1e-9


@given(SCORE_LISTS)
def test_wanted_and_other_exclude_each_other(scores: list[Score]) -> None:
    other = scores[::-1]
    assert success(scores, other) + success(other, scores) <= 1
    assert success(scores, scores) == 0
    assert magnitude(scores, other) == pytest.approx(-magnitude(other, scores))


# GE


def test_words() -> None:
    assert words("He can't, won't; it's O'Neil's 3.5-metre \"pot\"...") == [
        *["He", "ca", "n't", ",", "wo", "n't", ";", "it", "'s", "O'Neil", "'s", "3.5-metre", '"', "pot", '"', "..."],
    ]
    assert words("1,000 at 10:30, and/or e.g. this") == ["1,000", "at", "10:30", ",", "and/or", "e.g", ".", "this"]
    assert words("It it") == ["It", "it"]
    assert words("") == []


def test_n_gram_entropy_by_hand() -> None:
    # Bigrams of a b a b a: ab, ba, ab, ba; trigrams: aba, bab, aba.
    assert n_gram_entropy(list("ababa"), 2) == pytest.approx(1.0)
    assert n_gram_entropy(list("ababa"), 3) == pytest.approx(2 / 3 * math.log2(3 / 2) + 1 / 3 * math.log2(3))
    assert n_gram_entropy(list("aaaa"), 2) == 0
    assert n_gram_entropy(list("abcde"), 2) == pytest.approx(2.0)
    assert n_gram_entropy(["a"], 2) == 0


def test_generation_entropy_is_the_mean_over_texts_in_hundredths() -> None:
    trigram = 2 / 3 * math.log2(3 / 2) + 1 / 3 * math.log2(3)
    varied = (2 / 3 * 1.0 + 4 / 3 * trigram) / 2
    assert generation_entropy(["a b a b a"]) == pytest.approx(100 * varied)
    assert generation_entropy(["a b a b a", "a a a a"]) == pytest.approx(100 * varied / 2)


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 3))
def test_entropy_is_at_most_that_of_equal_shares(tokens: list[str], n: int) -> None:
    entropy = n_gram_entropy(tokens, n)
    assert 0 <= entropy <= math.log2(max(len(tokens) - n + 1, 1)) + 1e-9


# zsRE


def test_token_accuracy_weighs_prompts_alike() -> None:
    assert token_accuracy([score(right="1101")]) == 0.75
    assert token_accuracy([score(right="1101"), score(right="0")]) == 0.375


def test_exact_match_asks_for_every_token() -> None:
    assert exact_match([score(right="111")]) == 1
    assert exact_match([score(right="110"), score(right="11"), score(right="0"), score(right="1")]) == 0.5


@given(SCORE_LISTS)
def test_exact_match_is_the_strictest(scores: list[Score]) -> None:
    assert 0 <= exact_match(scores) <= token_accuracy(scores) <= 1


@given(SCORE_LISTS)
def test_a_model_leaves_itself_unchanged(scores: list[Score]) -> None:
    assert unchanged(scores, scores) == 1


def test_zsre_as_in_easyedit() -> None:
    after = {
        "reliability": [score(right="110")],
        "generalization": [score(right="11")],
        "portability": [score(right="01")],
        "locality": [score(right="00", predicted=(4, 5, 6, 7))],  # all wrong, yet three of four as before
    }
    before = {"locality": [score(right="00", predicted=(4, 5, 6, 8))]}
    assert record_figures(before, after) == pytest.approx(
        {
            "reliability": 2 / 3,
            "exact": 0.0,
            "generalization": 1.0,
            "generalization_exact": 1.0,
            "portability": 1 / 2,
            "portability_exact": 0.0,
            "locality": 3 / 4,
        }
    )


def test_zsre_as_in_rome_measures_locality_by_the_answer() -> None:
    after = {"reliability": [score(right="10")], "locality_answer": [score(right="1110")]}
    assert record_figures({}, after) == {"reliability": 0.5, "exact": 0.0, "locality": 0.75, "locality_exact": 0.0}


def test_locality_without_an_answer_looks_at_the_next_token() -> None:
    def next_token(token: int) -> Score:
        return Score(math.nan, np.zeros(0, bool), np.array([token]))

    before = {"locality": [next_token(1), next_token(2)]}
    assert record_figures(before, {"locality": [next_token(1), next_token(3)]}) == {"locality": 0.5}


def test_kinds_that_cannot_be_measured() -> None:
    with pytest.raises(
        TPatchError, match="locality compares with the unedited model; give its scores of the 'locality'"
    ):
        record_figures({}, {"locality": [score()]})
    with pytest.raises(TPatchError, match="no figure is made of probes of the kind 'rewrite'"):
        record_figures({}, {"rewrite": [score()]})
    with pytest.raises(TPatchError, match="1 scores against 2"):
        record_figures({}, {"rewrite_new": nlls(1), "rewrite_true": nlls(1, 2)})
    with pytest.raises(TPatchError, match="a probe without a target"):
        token_accuracy([score(right="")])
    with pytest.raises(TPatchError, match="1 predictions before and 2 after"):
        unchanged([score(right="1")], [score(right="11")])
    with pytest.raises(TPatchError, match="a mean over nothing"):
        success([], [])
    assert record_figures({}, {"locality": []}) == {}


# KnowEdit


def test_a_knowedit_record() -> None:
    after = {
        "portability_reasoning": [score(right="11"), score(right="10")],
        "portability_subject_aliasing": [score(right="0")],
        "relation_specificity": [score(right="10", predicted=(3, 4)), score(right="11", predicted=(5, 6))],
    }
    before = {"relation_specificity": [score(right="10", predicted=(3, 9)), score(right="11", predicted=(5, 6))]}
    assert record_figures(before, after) == pytest.approx(
        {
            "relation_specificity": (1 / 2 + 1) / 2,
            "relation_specificity_acc": (1 / 2 + 1) / 2,
            "relation_specificity_exact": 1 / 2,
            "portability": (1 + 1 / 2 + 0) / 3,
            "portability_exact": 1 / 3,
            "portability_reasoning": 3 / 4,
            "portability_subject_aliasing": 0.0,
        }
    )


def test_relation_specificity_and_its_accuracy_differ() -> None:
    figures = record_figures(
        {"relation_specificity": [score(right="11", predicted=(1, 2))]},
        {"relation_specificity": [score(right="01", predicted=(9, 2))]},
    )
    assert figures["relation_specificity"] == 0.5
    figures = record_figures(
        {"relation_specificity": [score(right="00", predicted=(7, 8))]},
        {"relation_specificity": [score(right="00", predicted=(7, 8))]},
    )
    assert (figures["relation_specificity"], figures["relation_specificity_acc"]) == (1.0, 0.0)


# MQuAKE


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" New Holland", True),
        (" new holland.", True),
        ("The New Holland", True),
        (" It is New Holland, I think", True),
        ("\n\n New Holland\nQuestion: What?", True),
        (" I do not know.\nNew Holland", False),
        (" New Hollander", False),
        (" Holland", False),
        (" AU", True),
        (" au.", True),
        (" A.U.", True),
        (" go au pair", False),
        ("", False),
        (" .", False),
    ],
)
def test_an_answer_or_an_alias(text: str, right: bool) -> None:
    assert answered(text, ["New Holland", "AU", "!"]) is right


@pytest.mark.parametrize(
    ("text", "accepted", "question", "old", "right"),
    [
        # The question's own words do not count, but for the whole text.
        (" The author of Roma is", ["Roma", "Rome"], "Who wrote Roma?", [], False),
        (" Who wrote the book Roma?", ["Roma"], "Who wrote the book Roma?", [], False),
        (" Roma", ["Roma"], "Who wrote Roma?", [], True),
        (" It is Rome, as Roma says", ["Roma", "Rome"], "Who wrote Roma?", [], True),
        # A part of the old answer is no new one.
        (" American English", ["English"], "", ["American English"], False),
        (" They speak American English.", ["English"], "", ["American English"], False),
        (" They speak English, not American English.", ["English"], "", ["American English"], True),
        (" American English", ["American English"], "", ["English"], True),
        (" English", ["Arabic", "English"], "", ["English"], False),
        # Words, whole.
        (" a harbour", ["ar", "Arabic"], "", [], False),
        (" Arabica", ["Arabic"], "", [], False),
        (" N/A", ["North America", "NA"], "", [], False),
        (" The north-american one", ["North American"], "", [], True),
        (" \u5317\u4eac\u3002", ["\u5317\u4eac"], "", [], True),
    ],
)
def test_what_is_no_answer(text: str, accepted: list[str], question: str, old: list[str], right: bool) -> None:
    assert answered(text, accepted, question, old) is right
    assert any_answered([" nothing", text], accepted, ["What?", question], old) is right


def test_clean_figures_leave_contaminated_probes_out() -> None:
    good, bad = score(0.5, "11", (1, 2)), score(2.0, "00", (3, 4))
    after = {
        "rewrite_new": [good],
        "neighborhood_true": [good, bad],
        "neighborhood_new": [bad, good],
        "portability_reasoning": [bad, good],
        "portability_aliasing": [bad],
    }
    before = {**after, "neighborhood_true": [good, good]}
    plain = record_figures(before, after)
    marks = dict.fromkeys(("neighborhood_true", "neighborhood_new"), (False, True))
    figures = record_figures(before, after, contaminated={**marks, "portability_reasoning": (True, False)})
    assert {name: value for name, value in figures.items() if not name.endswith("_clean")} == plain
    clean = {name: value for name, value in figures.items() if name.endswith("_clean")}
    assert (plain["NS"], plain["locality"], plain["portability"]) == (0.5, 0.5, pytest.approx(1 / 3))
    assert clean == {
        "NS_clean": 1.0,
        "NM_clean": pytest.approx(math.exp(-0.5) - math.exp(-2)),
        "neighborhood_acc_clean": 1.0,
        "locality_clean": 1.0,
        "portability_clean": 0.5,
        "portability_exact_clean": 0.5,
        "portability_reasoning_clean": 1.0,
    }
    # A record without a clean probe of a kind has no clean figure of it.
    none = record_figures(before, after, contaminated=dict.fromkeys(marks, (True, True)))
    assert not {"NS_clean", "locality_clean"} & none.keys()
    assert summarise([{"ES": 1.0, "PS": 1.0, "NS": 0.0, "NS_clean": 1.0}])["S_clean"] == 1.0


def test_any_of_three() -> None:
    assert any_answered([" Bern", " Rome", " Bern"], ["Rome"])
    assert not any_answered([" Bern", " Bern", " Bern"], ["Rome"])
    assert not any_answered([], ["Rome"])


def test_multi_hop_under_teacher_forcing() -> None:
    after = {"multi_hop": [score(right="11"), score(right="01"), score(right="00")]}
    assert record_figures({}, after) == pytest.approx({"multi_hop": 0.5, "multi_hop_exact": 1 / 3})


# Sequential editing


def test_sequential_figures_by_hand() -> None:
    figures = sequential_figures(
        edited=[True, True, False, True],
        rephrased=[[True, False], [True, True, True], [], [False]],
        retained=np.array([True, False, False, False]),
        train=(np.array([1, 1, 1, 1, 0], bool), np.array([1, 1, 1, 0, 0], bool)),
        test=(np.array([1, 0, 1, 0], bool), np.array([1, 1, 1, 0], bool)),
    )
    assert figures == pytest.approx(
        {"SR": 3 / 4, "GR": (1 / 2 + 1 + 0) / 3, "ER": 1 / 4, "TrainR": 3 / 4, "TestR": 3 / 2}
    )


def test_sequential_figures_that_are_not_defined_are_left_out() -> None:
    never_right = (np.zeros(3, bool), np.ones(3, bool))
    assert sequential_figures([], [], [], train=never_right) == {}
    assert sequential_figures([True], [[]], [True]) == {"SR": 1.0, "ER": 1.0}


def test_running_curve() -> None:
    assert running_curve([True, False, True, True, True], every=2) == [(2, 0.5), (4, 0.75), (5, 0.8)]
    assert running_curve([True, False], every=2) == [(2, 0.5)]
    assert running_curve([True], every=50) == [(1, 1.0)]
    assert running_curve([], every=50) == []


@given(st.lists(SHARES, min_size=1, max_size=20), st.integers(1, 7))
def test_the_curve_ends_in_the_figure(values: list[float], every: int) -> None:
    curve = running_curve(values, every)
    assert curve[-1] == (len(values), pytest.approx(float(np.mean(values))))
    assert all(0 < b - a <= every for (a, _), (b, _) in pairwise(curve))


def test_retention_curve() -> None:
    checks = [[True, True], np.array([True, False, True, True]), []]
    assert retention_curve(checks) == [(2, 1.0), (4, 0.75)]


# General ability and the certificate


def test_perplexity() -> None:
    assert perplexity([LN2, LN2, 4 * LN2]) == pytest.approx(4.0)
    assert perplexity(np.zeros(3)) == 1.0


def test_next_token_agreement() -> None:
    assert next_token_agreement(np.array([1, 2, 3, 4, 5]), np.array([1, 0, 3, 4, 0])) == 0.6


@pytest.mark.parametrize(("reach", "tokens"), [("token", 7 / 9), ("causal", 5 / 9), ("prompt", 2 / 9)])
def test_certificate_by_hand(reach: Literal["token", "causal", "prompt"], tokens: float) -> None:
    fires = [[False, True, False, False], [False, False], [False, False, True]]
    # Certified: all but the two that fire; the 1 + 2 + 2 before the first that fires; the silent prompt's 2.
    assert certificate(fires, reach) == pytest.approx({"certificate_tokens": tokens, "certificate_prompts": 1 / 3})


@given(st.lists(FLAGS, min_size=1, max_size=5))
def test_a_wider_reach_certifies_no_more_tokens(fires: list[list[bool]]) -> None:
    token, causal, prompt = (certificate(fires, reach) for reach in ("token", "causal", "prompt"))
    assert token["certificate_tokens"] >= causal["certificate_tokens"] >= prompt["certificate_tokens"]
    assert token["certificate_prompts"] == prompt["certificate_prompts"]
