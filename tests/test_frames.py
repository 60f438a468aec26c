"""The library of frames: its texts, what its matcher hears, and the frames that it gives for a request."""

from collections import Counter
from pathlib import Path

import pytest

from tpatch_jax.editors import frames
from tpatch_jax.editors.frames import (
    KINDS,
    frames_of_kind,
    guess_kind,
    match_relation,
    other_frames,
    relations,
    same_frames,
)
from tpatch_jax.editors.frames.answering import answer_kinds, fits
from tpatch_jax.editors.frames.compiling import compile_library
from tpatch_jax.editors.frames.recognising import known_relation, likely_relations
from tpatch_jax.errors import TPatchError
from tpatch_jax.requests import EditRequest

RELATIONS = {relation.id: relation for relation in relations()}
FORMS = ("statement", "question")

# Half of them were written before the library, the others before they were tried.
PHRASES = [
    tuple(line.split("\t"))
    for line in (Path(__file__).parent / "reference" / "phrases_of_relations.tsv").read_text("utf-8").splitlines()
]
KNOWN = [(ids.split(), phrase) for ids, phrase in PHRASES if ids != "-"]
UNKNOWN = [phrase for ids, phrase in PHRASES if ids == "-"]


def request(template: str, subject: str = "Anna Bell", target: str = "x") -> EditRequest:
    return EditRequest(template.replace("{}", subject), target, subject=subject)


def relation_of(text: str, subject: str = "Anna Bell") -> str:
    frame = text.replace(subject, "{}")
    return next(one.id for one in relations() if frame in one.statements + one.questions)


def test_the_library_is_broad():
    assert len(RELATIONS) == len(relations()) > 450
    assert {kind: len(frames_of_kind(kind)) > 80 for kind in KINDS} == dict.fromkeys(KINDS, True)
    assert sum(len(one.statements) + len(one.questions) for one in relations()) > 3800


@pytest.mark.parametrize("relation", relations(), ids=lambda relation: relation.id)
def test_a_relation_is_well_formed(relation):
    file, _, name = relation.id.partition(".")
    assert file in ("any", *KINDS)
    assert name.replace("_", "").isalpha()
    assert set(relation.kinds) <= set(KINDS)
    assert relation.kinds == (file,) or (file == "any" and len(relation.kinds) > 1)
    assert relation.answer.isalpha()
    assert 5 <= len(relation.statements) <= 14
    assert 3 <= len(relation.questions) <= 6
    for text in relation.statements + relation.questions:
        assert text.count("{}") == 1
        assert "  " not in text
        assert text == text.strip()
        assert text[0].isupper() or text.startswith("{}")
    assert all(text[-1].isalnum() or text.endswith("{}") for text in relation.statements)
    assert all(text.endswith("?") and text.count("?") == 1 for text in relation.questions)
    # Forms differ: not all wordings begin alike.
    assert len({text[:12] for text in relation.statements}) > 2
    assert relation.id not in relation.near
    assert all(relation.id in RELATIONS[other].near for other in relation.near)


def test_no_text_stands_twice_in_the_library():
    texts = Counter(text.lower() for one in relations() for text in one.statements + one.questions)
    assert [text for text, count in texts.items() if count > 1] == []


def test_the_compiled_library_is_that_of_the_files_written_by_hand():
    shipped = Path(frames.__file__).with_name("compiled.json").read_text("utf-8")
    assert shipped == compile_library(), "run python -m tpatch_jax.editors.frames.compiling"


def test_frames_of_a_sort_leave_out_what_suits_others():
    assert RELATIONS["place.mayor"] in frames_of_kind("place", "city")
    assert RELATIONS["place.mayor"] not in frames_of_kind("place", "river")
    assert RELATIONS["any.named_after"] in frames_of_kind("thing", "food")
    with pytest.raises(TPatchError, match=r"'animal'.*person, place"):
        frames_of_kind("animal")


@pytest.mark.parametrize("relation", relations()[::9], ids=lambda relation: relation.id)
def test_a_text_of_the_library_is_matched_with_its_relation(relation):
    for text in relation.statements + relation.questions:
        assert match_relation(text, 1) == [(relation, 1.0)]


def test_phrases_that_are_in_no_library_meet_their_relation():
    texts = {text for one in relations() for text in one.statements + one.questions}
    assert not texts & {phrase for _, phrase in KNOWN}
    # 102 are first, 120 among the first three, and of 115 the kind of subject is guessed.
    ranked = [([match.relation.id for match in match_relation(phrase, 3)], ids) for ids, phrase in KNOWN]
    assert len(KNOWN) == 138
    assert sum(bool(set(near[:1]) & set(ids)) for near, ids in ranked) >= 100
    assert sum(bool(set(near) & set(ids)) for near, ids in ranked) >= 118
    assert sum(guess_kind(phrase) == ids[0].split(".")[0] for ids, phrase in KNOWN) >= 113


@pytest.mark.parametrize("phrase", UNKNOWN)
def test_nothing_is_near_to_what_says_nothing(phrase):
    assert match_relation(phrase) == []
    assert guess_kind(phrase) == "thing"
    assert same_frames(request(phrase), 5) == []


def test_scores_are_shares_in_order_and_the_threshold_cuts_them():
    near = match_relation("The mayor of {} speaks", 50, 0)
    scores = [match.score for match in near]
    assert scores == sorted(scores, reverse=True)
    assert all(0 < score <= 1 for score in scores)
    assert match_relation("The mayor of {} speaks", 50, scores[3]) == [one for one in near if one.score >= scores[3]]
    assert match_relation("The mayor of {} speaks", 2, 0) == near[:2]


@pytest.mark.parametrize(
    ("prompt", "subject", "kind"),
    [
        ("{} grew up in the family of", "Anna Bell", "person"),
        ("The capital of {} is", "Ruritania", "place"),
        ("The chief executive of {} is", "Acme", "organisation"),
        ("The screenplay of {} was written by", "Red Hill", "work"),
        ("Patients with {} suffer from", "glanders", "thing"),
        ("{} and then the rain", "Lake Anna", "place"),
        ("{} and then the rain", "University of Anna", "organisation"),
        ("{} and then the rain", "Anna", "thing"),
    ],
)
def test_the_kind_of_a_subject_is_guessed_from_words_and_name(prompt, subject, kind):
    assert guess_kind(prompt, subject) == kind


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("template", "excluded"),
    [
        ("The mother tongue of {} is", ("person.native_language", "person.languages_spoken")),
        ("Which faith does {} follow?", ("person.religion",)),
        ("{} passed away in the city of", ("person.deathplace", "person.burial_place")),
        ("The prime minister of {} is", ("place.head_of_government", "place.head_of_state")),
        ("The film {} was directed by", ("work.director",)),
    ],
)
def test_other_frames_ask_something_else(template, excluded, form):
    one = request(template)
    frames = other_frames(one, 40, form=form)
    ids = [relation_of(text) for text, _ in frames]
    assert len(set(ids)) == len(ids) == 40
    assert not set(ids) & set(excluded)
    kind = excluded[0].split(".")[0]
    assert all(kind in RELATIONS[name].kinds for name in ids)
    assert all(text[:end].endswith("Anna Bell") for text, end in frames)
    assert all(text.endswith("?") == (form == "question") for text, _ in frames)
    # The same for the same request, and the first of more.
    assert other_frames(one, 7, form=form) == frames[:7]
    assert other_frames(request(template, "Bert Hill"), 7, form=form) != frames[:7]


def test_birthplace_leaves_citizenship_to_be_protected():
    ids = [relation_of(text) for text, _ in other_frames(request("{} was born in the town of"), 500)]
    assert "person.citizenship" in ids
    assert "person.birthplace" not in ids
    assert "person.childhood_home" not in ids


def test_what_suits_the_sort_of_subject_comes_first():
    ids = [relation_of(text, "Ruritania") for text, _ in other_frames(request("The capital of {} is", "Ruritania"), 30)]
    sorts = [RELATIONS[name].sorts for name in ids]
    assert all(not one or {"country", "region"} & set(one) for one in sorts)


def test_a_second_wording_of_a_relation_comes_after_all_relations():
    frames = other_frames(request("The capital of {} is"), 10_000)
    ids = [relation_of(text) for text, _ in frames]
    relations_of_places = len(set(ids))
    assert len(set(ids[:relations_of_places])) == relations_of_places
    assert len(ids) > 4 * relations_of_places
    assert len({text for text, _ in frames}) == len(frames)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("The mother tongue of {} is", "person.native_language"),
        ("On which continent does {} lie?", "place.continent"),
        ("The screenplay of {} was written by", "work.screenwriter"),
    ],
)
def test_same_frames_ask_the_same(template, name, form):
    frames = same_frames(request(template), 20, form=form)
    texts = RELATIONS[name].texts(form)
    assert {text.replace("Anna Bell", "{}") for text, _ in frames} == set(texts) - {template}
    assert all(text[:end].endswith("Anna Bell") for text, end in frames)
    assert same_frames(request(template), 2, form=form) == frames[:2]


@pytest.mark.parametrize("choose", [same_frames, other_frames])
def test_questions_stand_in_the_frame_of_the_request(choose):
    one = request("Question: On which continent does {} lie?\nAnswer:")
    asked, said = choose(one, 3, form="question"), choose(one, 3)
    assert len(asked) == len(said) == 3
    assert all(text.startswith("Question: ") and text.endswith("?\nAnswer:") for text, _ in asked)
    assert all("Question" not in text and "?" not in text for text, _ in said)
    assert all(text[:end].endswith("Anna Bell") for text, end in asked + said)


@pytest.mark.parametrize("choose", [same_frames, other_frames])
def test_without_a_subject_there_are_no_frames_and_other_forms_are_refused(choose):
    assert choose(EditRequest("The mother tongue of Anna is", "x"), 3) == []
    assert choose(EditRequest("The mother tongue of Anna is", "x", subject="Bert"), 3) == []
    assert choose(request("The mother tongue of {} is"), 0) == []
    with pytest.raises(TPatchError, match=r"form is 'chat'; it is 'statement' or 'question'"):
        choose(request("The mother tongue of {} is"), 3, form="chat")


# The same words ask for different things, as the target tells.
BY_TARGET = [
    ("{} plays", "hockey", "person.sport"),
    ("{} plays", "violin", "person.instrument"),
    ("{} plays", "jazz", "person.genre"),
    ("{} plays as a", "goalkeeper", "person.position"),
    ("{} worked in", "Vienna", "person.work_location"),
    ("{} worked in", "botany", "person.field"),
    ("{} works for the", "BBC", "person.employer"),
    ("{} is a follower of", "Islam", "person.religion"),
    ("{} perished in", "Oslo", "person.deathplace"),
    ("{} perished on", "4 May 1821", "person.death_date"),
    ("{} was born around", "1821", "person.birth_date"),
    ("{} was born around", "Oslo", "person.birthplace"),
]
# And as the subject tells.
BY_SUBJECT = [
    ("{} lies in", "Bell Island", "Norway", "place.country any.located_country"),
    ("{} lies in", "Bell Island", "Africa", "place.continent"),
    ("{} lies in", "Bell Island", "Ontario", "place.region any.located_region"),
    ("{} came from", "Anna Bell", "Boston", "person.birthplace any.origin_place"),
    ("{} was started in", "The Bells Orchestra", "Boston", "organisation.place_founded any.origin_place"),
    ("{} was thought up in", "The Bells on the Roof", "Japan", "work.country any.origin_country"),
    ("People in {} speak", "Bell County", "Welsh", "place.spoken_language"),
    ("{} was shown on", "The Bells on the Roof", "NBC", "work.network"),
]


@pytest.mark.parametrize(("template", "target", "name"), BY_TARGET)
def test_the_target_tells_what_is_asked(template, target, name):
    relation = known_relation(template, "Anna Bell", target)
    assert relation is not None
    assert relation.id == name
    wordings = same_frames(request(template, target=target), 20)
    assert {text.replace("Anna Bell", "{}") for text, _ in wordings} == set(relation.statements) - {template}


@pytest.mark.parametrize(("template", "subject", "target", "names"), BY_SUBJECT)
def test_the_subject_tells_what_is_asked(template, subject, target, names):
    relation = known_relation(template, subject, target)
    assert relation is not None
    assert relation.id in names.split()


@pytest.mark.parametrize("target", ["x", "hockey", "Boston", "1821"])
@pytest.mark.parametrize(
    "template", ["{} said with a smile that", "We were waiting for {} when", "{} and then the rain"]
)
def test_a_target_alone_makes_no_relation_known(template, target):
    assert known_relation(template, "Bell", target) is None
    assert same_frames(request(template, target=target), 5) == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("template", "target", "name"), BY_TARGET)
def test_what_the_target_answers_is_not_held_against_it(template, target, name, form):
    ids = {relation_of(text) for text, _ in other_frames(request(template, target=target), 500, form=form)}
    assert len(ids) > 40
    assert not ids & {name, *RELATIONS[name].near}


def test_nothing_that_the_target_could_answer_is_held_where_no_relation_is_known():
    one = request("{} and then", target="Welsh")
    ids = {relation_of(text) for text, _ in other_frames(one, 500)}
    assert len(ids) > 40
    assert not [name for name in ids if RELATIONS[name].answer == "language"]


def test_probabilities_are_in_order_and_leave_room_for_none():
    likely = likely_relations("{} plays", "Anna Bell", "hockey", 500)
    shares = [one.probability for one in likely]
    assert len({one.relation.id for one in likely}) == len(likely) == len(RELATIONS)
    assert shares == sorted(shares, reverse=True)
    assert 0.9 < sum(shares) < 1
    assert sum(one.probability for one in likely_relations("Perhaps {} and perhaps", count=500)) < 0.95


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("Welsh", "language"),
        ("Georgia", "country region"),
        ("the United States", "country"),
        ("Football", "sport"),
        ("bass", "instrument voice"),
        ("12 May 1821", "date"),
        ("May 12, 1821", "date"),
        ("1821", "date"),
        ("12", "number"),
        ("Anna Bell", "person"),
        ("Bell Records", "label"),
        ("University of Bell", ""),
        ("Bell University", "school"),
        ("Bellidae", "taxon"),
        ("Data Deficient", "status"),
        ("member of the Bell House", "office"),
        ("xyzzy", ""),
        ("", ""),
    ],
)
def test_a_target_is_of_the_kinds_that_its_name_tells(text, kinds):
    assert answer_kinds(text) == set(kinds.split())


def test_a_special_answer_fits_a_general_question_less_well():
    city, sport = frozenset({"city"}), frozenset({"sport"})
    assert fits("city", city) > fits("place", city) > fits("language", city) == 0
    assert fits("sport", sport) == 1


def test_an_unlisted_target_leaves_the_words_to_tell():
    relation = known_relation("The mother tongue of {} is", "Anna Bell", "xyzzy")
    assert relation is not None
    assert relation.id == "person.native_language"
