"""Reading requests: what is accepted, and every mistake with its line."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tpatch_jax.errors import TPatchError
from tpatch_jax.requests import (
    EditRequest,
    as_requests,
    contradictions,
    join_target,
    parse_request,
    place_fields,
    protect,
    request_fields,
)
from tpatch_jax.storage.request_file import read_requests

GOOD = b'{"prompt": "The capital of France is", "target": "Lyon"}'


def read(path: Path, content: bytes) -> list[EditRequest]:
    file = path / "requests.jsonl"
    file.write_bytes(content)
    return read_requests(file)


def test_all_fields_are_read(tmp_path: Path):
    record = {"id": 7, "prompt": "p", "target": "t", "subject": "s", "rephrases": ["a", "b"], "locality": ["c"]}
    found = read(tmp_path, json.dumps(record).encode())
    assert found == [EditRequest("p", "t", "s", ("a", "b"), ("c",), "7")]
    assert as_requests([record, found[0]]) == found * 2


def test_optional_fields_may_be_null(tmp_path: Path):
    record = {"id": None, "prompt": "p", "target": "t", "subject": None, "rephrases": None, "locality": None}
    assert read(tmp_path, json.dumps(record).encode()) == [EditRequest("p", "t")]


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD,
        b"\xef\xbb\xbf\n" + GOOD,
        b"\n  \n" + GOOD + b"\n\t\n",
        GOOD + b"\r\n\r\n",
    ],
    ids=["bom", "bom on a blank line", "blank lines", "windows line ends"],
)
def test_marks_and_blank_lines_are_passed_over(tmp_path: Path, content: bytes):
    assert read(tmp_path, content) == [EditRequest("The capital of France is", "Lyon")]


BAD = {
    "malformed": (b'{"prompt": "p", "target"', "not JSON"),
    "two objects": (b'{"prompt": "p", "target": "t"} {}', "not JSON"),
    "array around": (
        b'[{"prompt": "p", "target": "t"}]',
        "list instead of an object with 'prompt' and 'target'; one request a line",
    ),
    "number": (b"3", "int instead of an object"),
    "null": (b"null", "NoneType instead of an object"),
    "no prompt": (b'{"target": "t"}', "no 'prompt'"),
    "no target": (b'{"prompt": "p"}', "no 'target'"),
    "prompt type": (b'{"prompt": 3, "target": "t"}', "'prompt' is int"),
    "prompt null": (b'{"prompt": null, "target": "t"}', "'prompt' is NoneType"),
    "target type": (b'{"prompt": "p", "target": ["t"]}', "'target' is list"),
    "subject type": (b'{"prompt": "p", "target": "t", "subject": {}}', "'subject' is dict"),
    "rephrases type": (b'{"prompt": "p", "target": "t", "rephrases": "r"}', "'rephrases' must be a list"),
    "rephrases false": (b'{"prompt": "p", "target": "t", "rephrases": false}', "'rephrases' must be a list"),
    "rephrases empty text": (b'{"prompt": "p", "target": "t", "rephrases": [" "]}', "'rephrases' must be a list"),
    "locality type": (b'{"prompt": "p", "target": "t", "locality": [1]}', "'locality' must be a list"),
    "keep type": (b'{"prompt": "p", "target": "t", "keep": "k"}', "'keep' must be a list of non-empty strings"),
    "keep number": (b'{"prompt": "p", "target": "t", "keep": ["k", 1]}', "'keep' must be a list"),
    "keep empty text": (b'{"prompt": "p", "target": "t", "keep": [""]}', "'keep' must be a list"),
    "keep object": (b'{"prompt": "p", "target": "t", "keep": {"k": 1}}', "'keep' must be a list"),
    "keep the prompt": (
        b'{"prompt": "p", "target": "t", "keep": ["k", " p "]}',
        "'keep' holds ' p ', which is the prompt or one of 'rephrases' and shall change",
    ),
    "keep a rephrase": (
        b'{"prompt": "p", "target": "t", "rephrases": ["r"], "keep": ["r"]}',
        "'keep' holds 'r', which is the prompt or one of 'rephrases' and shall change",
    ),
    "keep half a surrogate": (
        b'{"prompt": "p", "target": "t", "keep": ["\\ud83d"]}',
        "'keep' holds half of a surrogate pair",
    ),
    "keep misspelt": (b'{"prompt": "p", "target": "t", "kep": []}', "unknown key 'kep'; did you mean 'keep'?"),
    "id type": (b'{"prompt": "p", "target": "t", "id": [1]}', "'id' is list"),
    "id true": (b'{"prompt": "p", "target": "t", "id": true}', "'id' is bool"),
    "unknown key": (b'{"prompt": "p", "target": "t", "answer": "a"}', "unknown key 'answer'"),
    "misspelt key": (b'{"promt": "p", "target": "t"}', "unknown key 'promt'; did you mean 'prompt'? a request has id"),
    "key of another form": (b'{"prompt": "p", "answer": "a"}', "unknown key 'answer'; a request has id"),
    "not UTF-8": (b'{"prompt": "caf\xe9", "target": "t"}', "not UTF-8 at byte 15"),
    "half a surrogate": (b'{"prompt": "p", "target": "\\ud83d"}', "'target' holds half of a surrogate pair"),
    "too deep": (b'{"prompt": ' + b"[" * 100_000, "not JSON"),
    "too long a number": (b'{"prompt": "p", "target": "t", "id": ' + b"9" * 5000 + b"}", "not JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named(tmp_path: Path, name: str):
    line, reason = BAD[name]
    with pytest.raises(TPatchError) as caught:
        read(tmp_path, GOOD + b"\n\n" + line + b"\n" + GOOD)
    assert str(caught.value).startswith(f"{tmp_path / 'requests.jsonl'}, line 3: {reason}")


def test_a_line_is_named_where_requests_come_from_code():
    with pytest.raises(TPatchError, match="request 1: no 'target'"):
        as_requests([{"prompt": "p", "target": "t"}, {"prompt": "p"}])


@pytest.mark.parametrize(("first", "second"), [('"a"', '"a"'), ("1", '"1"')])
def test_an_id_may_be_used_once(tmp_path: Path, first: str, second: str):
    lines = [f'{{"prompt": "p", "target": "t", "id": {text}}}' for text in (first, second)]
    with pytest.raises(TPatchError, match=r"line 3: the id .* was used in line 1"):
        read(tmp_path, "\n\n".join(lines).encode())


def test_requests_without_ids_are_named_by_position(tmp_path: Path):
    requests = read(tmp_path, GOOD + b"\n" + GOOD)
    assert [request.name(position) for position, request in enumerate(requests)] == ["edit-0", "edit-1"]
    assert EditRequest("p", "t", id="mine").name(3) == "mine"


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: bytes):
    with pytest.raises(TPatchError, match="holds no request"):
        read(tmp_path, content)


def test_a_missing_file_is_an_error(tmp_path: Path):
    with pytest.raises(TPatchError, match=r"nothing\.jsonl does not exist"):
        read_requests(tmp_path / "nothing.jsonl")
    with pytest.raises(TPatchError, match="cannot be read"):
        read_requests(tmp_path)


def test_prompts_are_kept(tmp_path: Path):
    lines = [{"prompt": "p", "target": "t", "keep": keep} for keep in (["a", "b"], [], None)]
    kept, *others = read(tmp_path, "\n".join(map(json.dumps, lines)).encode())
    assert kept == EditRequest("p", "t", keep=("a", "b"))
    assert others == [EditRequest("p", "t")] * 2
    assert as_requests([kept]) == [kept]
    with pytest.raises(TPatchError, match="request 0: 'keep' must be a list of non-empty strings"):
        as_requests([EditRequest("p", "t", keep="a")])  # type: ignore[arg-type]
    # A request that keeps nothing, and does not say where it holds, has the digest that it always had.
    later = ("form", "system", "turns", "aliases", "instead_of")
    old = {name: value for name, value in vars(kept).items() if name not in later}
    assert request_fields(kept) == old
    assert request_fields(others[0]) == {name: None if name == "id" else old[name] for name in old if name != "keep"}


TURNS = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


def test_where_a_request_holds_is_read_and_written_again(tmp_path: Path):
    record = {"prompt": "p", "target": "t", "subject": "s", "form": "chat", "system": "y", "turns": TURNS}
    record["aliases"] = ["b", "c", "b"]
    (request,) = read(tmp_path, json.dumps(record).encode())
    turns = (("user", "u"), ("assistant", "a"))
    assert request == EditRequest("p", "t", "s", form="chat", system="y", turns=turns, aliases=("b", "c"))
    assert as_requests([request, {**record, "turns": [["user", "u"], ["assistant", "a"]]}]) == [request] * 2
    assert place_fields(request) == {**{k: record[k] for k in ("form", "system", "turns")}, "aliases": ["b", "c"]}
    assert set(request_fields(request)) == set(vars(request)) - {"keep", "instead_of"}
    empty = {"prompt": "p", "target": "t", "form": None, "system": None, "turns": None, "aliases": None}
    assert read(tmp_path, json.dumps(empty).encode()) == [EditRequest("p", "t")]
    assert place_fields(EditRequest("p", "t")) == {}
    assert hash(request) == hash(as_requests([request])[0])


def place_of(**fields: object) -> dict[str, object]:
    return {"prompt": "p", "target": "t", "subject": "s", **fields}


USER, ASSISTANT = TURNS
BAD_PLACES = {
    "another form": (place_of(form="spoken"), "'form' is 'spoken'; write 'bare', 'chat' or 'both'"),
    "form of another case": (place_of(form="Chat"), "'form' is 'Chat'; write"),
    "form type": (place_of(form=["chat"]), "'form' is ['chat']; write"),
    "form number": (place_of(form=1), "'form' is 1; write"),
    "system type": (place_of(system=["s"]), "'system' is list; write it as a string"),
    "system of bare text": (place_of(form="bare", system="y"), "'system' belongs to a chat, and 'form' is 'bare'"),
    "turns of bare text": (place_of(form="bare", turns=TURNS), "'turns' belongs to a chat, and 'form' is 'bare'"),
    "turns type": (place_of(turns="hi"), "'turns' is str; write them as"),
    "turns object": (place_of(turns={"user": "u"}), "'turns' is dict; write them as"),
    "a turn that is a text": (place_of(turns=["u"]), "turn 0 of 'turns' is 'u'; write them as"),
    "a turn without content": (place_of(turns=[{"role": "user"}]), "turn 0 of 'turns' is {'role': 'user'}; write"),
    "a turn with more": (place_of(turns=[{**USER, "name": "n"}, ASSISTANT]), "turn 0 of 'turns' is"),
    "a turn of three": (place_of(turns=[["user", "u", "x"], ["assistant", "a"]]), "turn 0 of 'turns' is"),
    "a turn that says nothing": (place_of(turns=[{**USER, "content": " "}, ASSISTANT]), "turn 0 of 'turns' says ' '"),
    "a turn that is a number": (place_of(turns=[{**USER, "content": 1}, ASSISTANT]), "turn 0 of 'turns' says 1"),
    "a system's turn": (place_of(turns=[{**USER, "role": "system"}]), "turn 0 of 'turns' is the system's; write its"),
    "the assistant first": (place_of(turns=[ASSISTANT, USER]), "turn 0 of 'turns' is of 'assistant', where 'user'"),
    "the user twice": (place_of(turns=[USER, USER]), "turn 1 of 'turns' is of 'user', where 'assistant'"),
    "another role": (place_of(turns=[{**USER, "role": "tool"}]), "turn 0 of 'turns' is of 'tool', where 'user'"),
    "the user last": (place_of(turns=[USER]), "'turns' ends with the user's, and 'prompt' is the user's next"),
    "aliases type": (place_of(aliases="b"), "'aliases' must be a list of non-empty strings"),
    "aliases number": (place_of(aliases=["b", 1]), "'aliases' must be a list of non-empty strings"),
    "an empty alias": (place_of(aliases=[""]), "'aliases' must be a list of non-empty strings"),
    "aliases of nothing": (
        {"prompt": "p", "target": "t", "aliases": ["b"]},
        "'aliases' are other names of the subject",
    ),
    "half a surrogate in a turn": (
        place_of(turns=[{**USER, "content": "\ud83d"}, ASSISTANT]),
        "'turns' holds half of a surrogate pair",
    ),
    "misspelt": (place_of(forms="chat"), "unknown key 'forms'; did you mean 'form'?"),
}


@pytest.mark.parametrize("name", BAD_PLACES)
def test_a_place_that_cannot_be_is_named(tmp_path: Path, name: str):
    record, reason = BAD_PLACES[name]
    with pytest.raises(TPatchError) as caught:
        read(tmp_path, json.dumps(record).encode())
    assert str(caught.value).startswith(f"{tmp_path / 'requests.jsonl'}, line 1: {reason}")
    with pytest.raises(TPatchError, match="request 0: "):
        as_requests([record])


def test_locality_is_protected_but_for_what_is_edited():
    first = EditRequest("p", "t", locality=("a", " q", "b", "r"), keep=("c", "a"))
    second = EditRequest("q", "t", rephrases=("r",))
    kept, other = protect([first, second])
    assert kept == EditRequest("p", "t", locality=("a", " q", "b", "r"), keep=("c", "a", "b"))
    assert other == second


def test_contradictions_name_the_first_request_with_another_target():
    prompts = [("a", "x"), ("b", "x"), ("a", "x "), (" a ", "y"), ("b", "y"), ("a", "z"), ("A", "y")]
    assert contradictions([EditRequest(*pair) for pair in prompts]) == {3: 0, 4: 1, 5: 0}
    assert contradictions([]) == {}
    # The same words in a chat are another prompt.
    forms = [EditRequest("a", "x", form="chat"), EditRequest("a", "y"), EditRequest("a", "z", form="chat")]
    assert contradictions(forms) == {2: 0}


@pytest.mark.parametrize(
    ("prompt", "target", "joined"),
    [
        ("is", "Lyon", " Lyon"),
        ("is ", "Lyon", "Lyon"),
        ("is", " Lyon", " Lyon"),
        ("is\n", "Lyon", "Lyon"),
        ("", "Lyon", "Lyon"),
        # behind what opens something
        ("It costs $", "20", "20"),
        ("It costs US$", "20", "20"),
        ("It costs €", "20", "20"),
        ("Its name (", "Lyon)", "Lyon)"),
        ('The sign says "', "Stop", "Stop"),
        ("The sign says \u201c", "Stop", "Stop"),
        ("On dit \u00ab", "non", "non"),
        ("The vice-", "president", "president"),
        ("C'est l'", "ami", "ami"),
        ("C\u2019est dell\u2019", "amico", "amico"),
        ("Follow us on @", "tpatch", "tpatch"),
        ("x =", "3", " 3"),
        ("x=", "3", "3"),
        # and behind what only looks like it
        ('He said "Stop"', "and left", " and left"),
        ("The dogs'", "owner is", " owner is"),
        ("It is in C#", "code", " code"),
        ("Lyon -", "a city", " a city"),
        ("The price in 5 $:", "high", " high"),
        # what is written without spaces
        ("法国的首都是", "里昂", "里昂"),
        ("法国的首都是", "Lyon", "Lyon"),
        ("首都\uff1a", "里昂", "里昂"),
        ("フランスの首都は", "リヨン", "リヨン"),
        ("เมืองหลวงคือ", "ลียง", "ลียง"),
        ("In Chinese it is", "里昂", " 里昂"),
        ("프랑스의 수도는", "리옹", " 리옹"),
        ("Столица Франции", "Лион", " Лион"),
        # before what ends something
        ("He left", ", she stayed", ", she stayed"),
        ("The king", "'s brother", "'s brother"),
        ("It grew by 5", "%", "%"),
        ("It grew by", "5%", " 5%"),
        ("It is made with", ".NET", " .NET"),
        ("It is over", ".", "."),
        ("The answer is", "(b)", " (b)"),
        ("It is", "-5", " -5"),
    ],
)
def test_join_target_puts_a_space_where_one_belongs(prompt: str, target: str, joined: str):
    assert join_target(prompt, target) == joined
    assert EditRequest(prompt, target).continuation == joined


@pytest.mark.parametrize(("prompt", "target"), [("It costs $", "20"), ("is", "Lyon"), ("法国的首都是", "里昂")])
def test_a_request_says_how_it_is_joined(prompt: str, target: str):
    assert EditRequest(prompt, target, join="space").continuation == f" {target}"
    assert EditRequest(prompt, target, join="none").continuation == target
    # white space that is there already stays
    assert EditRequest(f"{prompt} ", target, join="space").continuation == target


def test_join_is_read_and_checked():
    assert parse_request({"prompt": "a", "target": "b", "join": "none"}, "line 1").continuation == "b"
    with pytest.raises(TPatchError, match="line 1: 'join' is 'tab'; write 'space' or 'none', or leave it out"):
        parse_request({"prompt": "a", "target": "b", "join": "tab"}, "line 1")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
WORDS = st.lists(TEXT.filter(str.strip), max_size=3).map(tuple)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.builds(EditRequest, TEXT, TEXT, st.none() | TEXT, WORDS, WORDS), min_size=1, max_size=4), st.booleans()
)
def test_what_is_written_is_read_back(tmp_path: Path, requests: list[EditRequest], ascii_only: bool):
    lines = [json.dumps(vars(request), ensure_ascii=ascii_only) for request in requests]
    assert read(tmp_path, "\n".join(lines).encode()) == requests
