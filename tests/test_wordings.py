"""Other wordings of a request: where its question stands, how it is shortened, what else is asked about its subject."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpatch_jax.editors.wordings import NEUTRAL, look_alikes, neutral_wordings, question, shortened
from tpatch_jax.requests import EditRequest

NAMES = st.text("Abc é", min_size=1, max_size=8).filter(lambda name: name.strip() == name)


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("Question: Where does Ann live?\nAnswer:", ("Question: ", "Where does ", " live?", "\nAnswer:")),
        ("Where does Ann live?", ("", "Where does ", " live?", "")),
        ("He sang. Where does Ann live? A:", ("He sang. ", "Where does ", " live?", " A:")),
        ("<user>\nWhere does Ann live?<end>\n<assistant>", ("<user>\n", "Where does ", " live?", "<end>\n<assistant>")),
        # a sentence to be finished, whatever is asked in front of it
        ("He sang. Where does Ann live? It is in", None),
        ("What does Ann play? They play", None),
        ("Is it so? Ann lives in", None),
        ("Ann lives in", None),
        ("Ann sings. Does he?", None),
        ("Ann\nWho?", None),
    ],
)
def test_the_question_is_the_sentence_about_the_subject(prompt, found):
    assert question(EditRequest(prompt, "Rome", subject="Ann")) == found


@given(NAMES, st.sampled_from(["Who is {}?", "Q: Who likes {} here?\nA:", "{} is from", "The aunt of {} is", "{}"]))
def test_wordings_say_where_their_subject_ends(name, template):
    request = EditRequest(template.format(name), "Rome", subject=name)
    found = [*shortened(request), *neutral_wordings(request, 5), *neutral_wordings(request, 5, asked=True)]
    assert len(found) >= 10
    for text, end in [*found, *(wording.after("So. ") for wording in found)]:
        assert text[:end].endswith(name)
        assert request.prompt not in (text,)


def test_questions_are_asked_in_the_frame_of_the_request_and_statements_are_not():
    request = EditRequest("Question: Where does Ann live?\nAnswer:", "Rome", subject="Ann")
    asked, said = neutral_wordings(request, 12, asked=True), neutral_wordings(request, 12)
    assert all(text.startswith("Question: ") and text.endswith("?\nAnswer:") for text, _ in asked)
    assert [text for text, _ in said] == [text.format("Ann") for text in NEUTRAL]
    assert len({text for text, _ in asked}) == len({text for text, _ in said}) == 12


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("Question: Where does Ann live?\nAnswer:", ["Ann, where does live?", "Where does Ann?", "does Ann live?"]),
        ("Question: Who is Ann?\nAnswer:", ["Ann, who is?", "is Ann?"]),
        ("Question: Ann lives where?\nAnswer:", []),
    ],
)
def test_a_question_in_other_words_stays_one(prompt, found):
    texts = [text for text, _ in shortened(EditRequest(prompt, "Rome", subject="Ann"))]
    assert texts == [f"Question: {text}\nAnswer:" for text in found]


def test_look_alikes_end_like_the_subject_and_are_nobody_named():
    request = EditRequest("Where Maury County lies", "Rome", subject="Maury County")
    names = ["Anna Bell", "Franklin Pierce", "Franklin County", "Lyon", "Maury Povich"]
    found = look_alikes(request, names, 8)
    assert [text for text, _ in found] == ["Where Anna County"]
    assert all(text[:end].endswith(" County") and end == len(text) for text, end in found)
    assert len(look_alikes(request, ["Anna Bell", "Eva Green"], 1)) == 1
    assert look_alikes(EditRequest("Lyon is in", "Italy", subject="Lyon"), names, 8) == []
