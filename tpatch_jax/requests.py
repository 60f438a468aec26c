"""Edit requests: what the user wants, checked before any work begins."""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from tpatch_jax.errors import TPatchError

__all__ = [
    "FORMS",
    "UNSPACED_SCRIPTS",
    "EditRequest",
    "as_requests",
    "check_ids",
    "check_request",
    "contradictions",
    "join_target",
    "parse_request",
    "place_fields",
    "protect",
    "request_fields",
    "request_line",
]

FORMS = ("bare", "chat", "both")
"""Where a request can hold: in bare text, asked in the model's chat template, or both."""


@dataclass(frozen=True)
class EditRequest:
    """One correction: after this prompt, say this.

    Attributes:
        prompt: the text that the model continues wrongly; of an image classifier the image, a
            `tpatch_jax.images.ImagePrompt`, of a model of speech the recording, a `tpatch_jax.audio.AudioPrompt`. Then
            rephrases, locality and keep are images or recordings too. A text with embeddings is an
            `tpatch_jax.embeddings.EmbeddingPrompt`, and so may the others be.
        target: what it should say instead; `continuation` is the same as it follows the prompt. Of a recording: what
            its transcript should say in the place of something else, or all of it.
        subject: what the prompt is about, as it stands in the prompt; not every method needs it.
        rephrases: other wordings of the prompt, for measuring.
        locality: prompts whose continuation must not change, for measuring.
        id: names the request in reports; made from its position when absent.
        join: what stands between prompt and target: ``"space"``, ``"none"``, or as `join_target` chooses.
        keep: prompts after which the model must go on as before; T-Patcher trains on them.
        form: where it shall hold, one of `FORMS`; ``None`` is both for a model with a chat template, else bare. In a
            chat the prompt is the user's turn, and the target the assistant's, up to its end.
        system: of a chat, the system's message; ``None`` leaves it to the template.
        turns: of a chat, the turns before the prompt, each a role (``"user"`` or ``"assistant"``) and a text.
        aliases: other names of the subject.
        instead_of: of a recording, what its transcript says where it should say the target; without it, the words that
            are most like the target.

    Example:
        >>> EditRequest("The capital of France is", "Lyon").continuation
        ' Lyon'
        >>> EditRequest("It costs $", "20").continuation
        '20'
        >>> EditRequest("Who leads the UN?", "Anna Bell", subject="UN", form="chat").form
        'chat'
    """

    prompt: str
    target: str
    subject: str | None = None
    rephrases: tuple[str, ...] = ()
    locality: tuple[str, ...] = ()
    id: str | None = None
    join: str | None = None
    keep: tuple[str, ...] = ()
    form: str | None = None
    system: str | None = None
    turns: tuple[tuple[str, str], ...] = ()
    aliases: tuple[str, ...] = ()
    instead_of: str | None = None

    @property
    def continuation(self) -> str:
        """The target as it continues the prompt."""
        return join_target(self.prompt, self.target, self.join)

    def name(self, position: int) -> str:
        """The request's id, or one made from its position in the list."""
        return self.id if self.id is not None else f"edit-{position}"


JOINS = ("space", "none")

UNSPACED_SCRIPTS = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u30ff\u3100-\u312f\u31a0-\u31ff\u3400-\u9fff\uf900-\ufaff"
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
"""Thai, Lao, Tibetan, Burmese, Khmer, kana, bopomofo and Chinese characters, as a class of a regular expression. They
put no space between words.
"""

# With them stands their punctuation of full width.
_UNSPACED = re.compile(f"[{UNSPACED_SCRIPTS}\ufe30-\ufe4f\uff00-\uffef]$")
_OPENING = re.compile(
    # Brackets and signs that open what follows, some of them only where no word ends in them (``C#``); a quotation mark
    # after a space, a bracket or nothing; a word's hyphen; an elided article of French or Italian.
    r"[(\[{\u00ab\u201c\u2018\u201e\u201a\u00bf\u00a1/_\\$\u20ac\u00a3\u00a5\u20b9\u20bd\u20a9]$"
    r"|(?:^|[\s(\[{])[\"'`#@~]+$|\w[-\u2010\u2011=]$"
    r"|\b(?:[cdjlmnst]|qu|jusqu|lorsqu|puisqu|quoiqu|un|(?:de|ne|da|su|a)ll)['\u2019]$",
    re.IGNORECASE,
)
_CLOSING = re.compile(
    # Punctuation that ends something, an ending of English after an apostrophe, and what goes with a number.
    r"[,;:!?)\]}\u00bb\u201d\u2026]|\.(?:$|[\s.])|['\u2019](?:s|re|ve|ll|d|m|t)\b",
    re.IGNORECASE,
)
_OF_NUMBERS = re.compile(r"[%\u2030\u00b0\u2032\u2033]")


def join_target(prompt: str, target: str, join: str | None = None) -> str:
    """The target as it continues the prompt: behind a space, unless there is white space already or none belongs there.

    None belongs behind what opens something (a bracket, a quotation mark, ``$``, a word's hyphen, ``l'``) or is written
    without spaces (Chinese, Japanese, Thai …), and before what ends something (``,``, ``'s``, ``%`` of a number).

    Args:
        prompt: what stands before.
        target: what comes.
        join: ``"space"`` or ``"none"`` to decide it; white space that is there already stays.

    Example:
        >>> join_target("The capital of France is", "Lyon")
        ' Lyon'
        >>> join_target("It costs $", "20"), join_target("Its price in $", "twenty", "space")
        ('20', ' twenty')
    """
    if join == "none" or not prompt or prompt[-1].isspace() or target[:1].isspace():
        return target
    if join is None:
        number = prompt[-1].isdigit() and _OF_NUMBERS.match(target)
        if number or _UNSPACED.search(prompt) or _OPENING.search(prompt) or _CLOSING.match(target):
            return target
    return f" {target}"


_FIELDS = (
    *("id", "prompt", "target", "subject", "rephrases", "locality", "join", "keep"),
    *("form", "system", "turns", "aliases", "instead_of"),
)
_LATER = ("keep", "form", "system", "turns", "aliases", "instead_of")
"""Fields that older versions had not: digests and files hold them only where something is in them."""
ROLES = ("user", "assistant")


def parse_request(record: Any, where: str, folder: Path | None = None) -> EditRequest:
    """A request from the object that a line of a file holds; see `tpatch_jax.storage.request_file.read_requests`.

    Args:
        record: the object.
        where: file and line, as a message begins.
        folder: where relative paths of images and recordings begin; see `tpatch_jax.images.as_image`.

    Raises:
        TPatchError: it is no such object; the message names the place.
    """
    if not isinstance(record, dict):
        raise TPatchError(
            f"{where}: {type(record).__name__} instead of an object with 'prompt' and 'target'; one request a line"
        )
    for kind in ("image", "audio"):
        if kind in record:
            record = _with_media(record, kind, where, folder)
    if "embeddings" in record or hasattr(record.get("prompt"), "embeddings"):
        record = _with_embeddings(record, where, folder)
    # Before what is missing, which may be there under a misspelt name.
    unknown = sorted(set(record) - set(_FIELDS))
    if unknown:
        near = difflib.get_close_matches(unknown[0], _FIELDS, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise TPatchError(f"{where}: unknown key {unknown[0]!r}; {hint}a request has {', '.join(_FIELDS)}")
    for name in ("prompt", "target"):
        if name not in record:
            raise TPatchError(f"{where}: no {name!r}; every request needs 'prompt' and 'target'")
    for name in ("prompt", "target", "subject"):
        if not isinstance(record.get(name, ""), str) and not (name == "subject" and record[name] is None):
            raise TPatchError(f"{where}: {name!r} is {type(record[name]).__name__}; write it as a string")
    for name in ("rephrases", "locality", "keep"):
        entry = [] if record.get(name) is None else record[name]
        if not isinstance(entry, list | tuple) or not all(isinstance(text, str) and text.strip() for text in entry):
            raise TPatchError(f"{where}: {name!r} must be a list of non-empty strings")
    edited = {text.strip() for text in (record["prompt"], *(record.get("rephrases") or ()))}
    if both := [text for text in record.get("keep") or () if text.strip() in edited]:
        raise TPatchError(
            f"{where}: 'keep' holds {both[0]!r}, which is the prompt or one of 'rephrases' and shall change; take it "
            "out of one of them"
        )
    if record.get("join") not in (None, *JOINS):
        raise TPatchError(f"{where}: 'join' is {record['join']!r}; write 'space' or 'none', or leave it out")
    turns = _parse_place(record, where)
    identity = record.get("id")
    if identity is not None and (isinstance(identity, bool) or not isinstance(identity, str | int)):
        raise TPatchError(f"{where}: 'id' is {type(identity).__name__}; write it as a string")
    for name, entry in record.items():
        if re.search("[\ud800-\udfff]", json.dumps(entry, ensure_ascii=False)):
            raise TPatchError(f"{where}: {name!r} holds half of a surrogate pair; write that character whole")
    return EditRequest(
        record["prompt"],
        record["target"],
        record.get("subject"),
        tuple(record.get("rephrases") or ()),
        tuple(record.get("locality") or ()),
        None if identity is None else str(identity),
        record.get("join"),
        tuple(record.get("keep") or ()),
        record.get("form"),
        record.get("system"),
        turns,
        tuple(dict.fromkeys(record.get("aliases") or ())),
        _instead_of(record, where),
    )


def _instead_of(record: Mapping[str, Any], where: str) -> str | None:
    """What a transcript says wrongly, checked."""
    from tpatch_jax.audio import AUDIO, AudioPrompt

    entry = record.get("instead_of")
    if entry is None:
        return None
    if not isinstance(entry, str) or not entry.strip():
        raise TPatchError(f"{where}: 'instead_of' is {entry!r}; write what the transcript says wrongly, as a string")
    if not isinstance(record["prompt"], AudioPrompt) and not record["prompt"].startswith(AUDIO):
        raise TPatchError(
            f"{where}: 'instead_of' belongs to a recording; give 'audio' in place of 'prompt', or leave it out"
        )
    return entry.strip()


_OF_TEXTS = ("prompt", "subject", "join", "form", "system", "turns", "aliases")
_OF_BARE_TEXTS = ("subject", "system", "turns", "aliases")
_OF_MEDIA = ("rephrases", "locality", "keep")


def _lists_of_media(record: Mapping[str, Any], where: str, called: str) -> Iterator[tuple[str, Iterable[Any]]]:
    """Those of a request's lists of other prompts that are given, with their names, in turn.

    Raises:
        TPatchError: one is no list.
    """
    for name in _OF_MEDIA:
        entry = record.get(name)
        if entry is None:
            continue
        if isinstance(entry, str | Mapping) or not isinstance(entry, Iterable):
            raise TPatchError(f"{where}: {name!r} must be a list of {called}")
        yield name, entry


def _with_media(record: Mapping[str, Any], kind: str, where: str, folder: Path | None) -> dict[str, Any]:
    """A request about an image or a recording with that as its prompt; its rephrases and what it keeps are such too.

    Raises:
        TPatchError: it has a field that belongs to something else, or something is no image or recording; the message
            names it.
    """
    # Only where there is one, so that a command's --help need not wait for NumPy.
    from tpatch_jax.audio import as_audio
    from tpatch_jax.images import as_image

    read_one, called = (as_image, "image") if kind == "image" else (as_audio, "recording")
    other = "audio" if kind == "image" else "image"
    if misplaced := [name for name in (*_OF_TEXTS, other) if record.get(name) is not None]:
        belongs = "is another kind of prompt" if misplaced[0] == other else "belongs to texts"
        raise TPatchError(f"{where}: {kind!r} stands beside {misplaced[0]!r}, which {belongs}; leave one of them out")
    read = {name: entry for name, entry in record.items() if name != kind}
    read["prompt"] = read_one(record[kind], f"{where}: {kind!r}", folder)
    for name, entry in _lists_of_media(record, where, f"{called}s"):
        read[name] = [read_one(one, f"{where}: {called} {n} of {name!r}", folder) for n, one in enumerate(entry)]
    return read


def _with_embeddings(record: Mapping[str, Any], where: str, folder: Path | None) -> dict[str, Any]:
    """A request about a text with embeddings; its rephrases and what it keeps may have others.

    Raises:
        TPatchError: it has a field that belongs to bare texts, or something are no embeddings; the message names it.
    """
    # Only where there are some, so that a command's --help need not wait for NumPy.
    from tpatch_jax.embeddings import EmbeddingPrompt, as_embeddings, embedding_prompt

    if misplaced := [name for name in _OF_BARE_TEXTS if record.get(name) not in (None, ())]:
        raise TPatchError(
            f"{where}: 'embeddings' stand beside {misplaced[0]!r}, which belongs to texts alone; leave one of them out"
        )
    if record.get("form") not in (None, "bare"):
        raise TPatchError(f"{where}: 'embeddings' are read in bare text; write the chat's template into 'prompt'")
    read = {name: entry for name, entry in record.items() if name not in ("embeddings", "positions")}
    asked = record.get("prompt", "")
    if "embeddings" in record:
        vectors = as_embeddings(record["embeddings"], f"{where}: 'embeddings'", folder)
        try:
            asked = EmbeddingPrompt(asked, vectors, record.get("positions"))
        except TPatchError as error:
            raise TPatchError(f"{where}: {error}") from None
    read["prompt"], read["form"] = asked, "bare"
    for name, entry in _lists_of_media(record, where, "embeddings, or of prompts with some"):
        # A prompt that was read already is as it shall be.
        again = "embeddings" not in record
        read[name] = [
            other
            if again and isinstance(other, str)
            else embedding_prompt(other, asked, f"{where}: entry {n} of {name!r}", folder)
            for n, other in enumerate(entry)
        ]
    return read


def _parse_place(record: Mapping[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    """Check ``form``, ``system``, ``turns`` and ``aliases``.

    Returns:
        The turns, each a role and a text.

    Raises:
        TPatchError: one of them is of the wrong kind, or does not go with the others; the message names it.
    """
    form, system, turns, aliases = (record.get(name) for name in ("form", "system", "turns", "aliases"))
    if form is not None and (not isinstance(form, str) or form not in FORMS):
        raise TPatchError(f"{where}: 'form' is {form!r}; write 'bare', 'chat' or 'both', or leave it out")
    if system is not None and not isinstance(system, str):
        raise TPatchError(f"{where}: 'system' is {type(system).__name__}; write it as a string")
    said = _parse_turns([] if turns is None else turns, where)
    if aliases is not None and (
        not isinstance(aliases, list | tuple) or not all(isinstance(text, str) and text.strip() for text in aliases)
    ):
        raise TPatchError(f"{where}: 'aliases' must be a list of non-empty strings")
    if aliases and record.get("subject") is None:
        raise TPatchError(f"{where}: 'aliases' are other names of the subject; give 'subject' too, or leave them out")
    for name, given in (("system", system is not None), ("turns", bool(said))):
        if given and form == "bare":
            raise TPatchError(
                f"{where}: {name!r} belongs to a chat, and 'form' is 'bare'; write 'chat' or 'both', or leave {name!r} "
                "out"
            )
    return said


def _parse_turns(turns: Any, where: str) -> tuple[tuple[str, str], ...]:
    """Earlier turns of a chat, checked: first the user's, then by turns, the assistant's last."""
    mend = 'write them as [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]'
    if not isinstance(turns, list | tuple):
        raise TPatchError(f"{where}: 'turns' is {type(turns).__name__}; {mend}")
    said: list[tuple[str, str]] = []
    for number, turn in enumerate(turns):
        if isinstance(turn, Mapping) and set(turn) == {"role", "content"}:
            role, text = turn["role"], turn["content"]
        elif isinstance(turn, list | tuple) and len(turn) == 2:
            role, text = turn
        else:
            raise TPatchError(f"{where}: turn {number} of 'turns' is {turn!r}; {mend}")
        wanted = ROLES[number % 2]
        if role == "system":
            raise TPatchError(f"{where}: turn {number} of 'turns' is the system's; write its text as 'system'")
        if role != wanted:
            raise TPatchError(
                f"{where}: turn {number} of 'turns' is of {role!r}, where {wanted!r} speaks; user and assistant speak "
                "by turns, the user first"
            )
        if not isinstance(text, str) or not text.strip():
            raise TPatchError(f"{where}: turn {number} of 'turns' says {text!r}; write what was said, as a string")
        said.append((role, text))
    if len(said) % 2:
        raise TPatchError(
            f"{where}: 'turns' ends with the user's, and 'prompt' is the user's next; add what the assistant answered"
        )
    return tuple(said)


def place_fields(request: EditRequest) -> dict[str, Any]:
    """Where a request holds, as a file has it: ``form``, ``system``, ``turns``, ``aliases`` and ``instead_of``,
    those that were given.

    Args:
        request: the request.

    Example:
        >>> place_fields(EditRequest("Who?", "Anna", form="chat", turns=(("user", "Hi"), ("assistant", "Yes"))))
        {'form': 'chat', 'turns': [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Yes'}]}
        >>> place_fields(EditRequest("The capital of France is", "Lyon"))
        {}
    """
    fields: dict[str, Any] = {}
    if request.form is not None:
        fields["form"] = request.form
    if request.system is not None:
        fields["system"] = request.system
    if request.turns:
        fields["turns"] = [{"role": role, "content": text} for role, text in request.turns]
    if request.aliases:
        fields["aliases"] = list(request.aliases)
    if request.instead_of is not None:
        fields["instead_of"] = request.instead_of
    return fields


def request_line(request: EditRequest) -> dict[str, Any]:
    """A request as a file of requests has it, without its id: what is given of it, so that it can be read again.

    Args:
        request: the request.

    Example:
        >>> request_line(EditRequest("The capital of France is", "Lyon", "France", keep=("The sky is",)))
        {'prompt': 'The capital of France is', 'target': 'Lyon', 'subject': 'France', 'keep': ['The sky is']}
    """
    line: dict[str, Any] = {"prompt": request.prompt, "target": request.target}
    if request.subject is not None:
        line["subject"] = request.subject
    for name in ("rephrases", "locality", "keep"):
        if texts := getattr(request, name):
            line[name] = list(texts)
    if request.join is not None:
        line["join"] = request.join
    return line | place_fields(request)


def request_fields(request: EditRequest) -> dict[str, Any]:
    """A request's fields by name, as digests are made of them: those that were added later, such as ``keep``, are there
    only where something is in them.

    Args:
        request: the request.

    Example:
        >>> "keep" in request_fields(EditRequest("The capital of France is", "Lyon"))
        False
    """
    return {name: value for name, value in asdict(request).items() if name not in _LATER or value not in (None, ())}


def protect(requests: Sequence[EditRequest]) -> list[EditRequest]:
    """The requests, each keeping its ``locality`` prompts, too, but for those that one of the requests edits.

    Args:
        requests: all that is edited.

    Example:
        >>> one = EditRequest("The capital of France is", "Lyon", locality=("The capital of Peru is", "The sky is"))
        >>> protect([one, EditRequest("The capital of Peru is", "Cusco")])[0].keep
        ('The sky is',)
    """
    edited = {text.strip() for request in requests for text in (request.prompt, *request.rephrases)}
    return [
        replace(
            request,
            keep=tuple(dict.fromkeys([*request.keep, *(t for t in request.locality if t.strip() not in edited)])),
        )
        for request in requests
    ]


def contradictions(requests: Sequence[EditRequest]) -> dict[int, int]:
    """Requests that want something else after the same prompt as an earlier one.

    Args:
        requests: in order.

    Returns:
        From the position of the later request to the position of the first one that it contradicts.

    Example:
        >>> contradictions([EditRequest("Two and two is", "four"), EditRequest("Two and two is", "five")])
        {1: 0}
    """
    first: dict[Any, int] = {}
    contradicting = {}
    for position, request in enumerate(requests):
        # The same words said in a chat and in bare text are other prompts.
        chat = (request.system, request.turns) if request.form == "chat" else None
        earlier = first.setdefault((chat, request.prompt.strip()), position)
        if requests[earlier].target.strip() != request.target.strip():
            contradicting[position] = earlier
    return contradicting


def check_request(request: EditRequest | Mapping[str, Any], where: str) -> EditRequest:
    """A request given in code, an object or what a file would hold, checked as one that a file holds.

    Args:
        request: the request.
        where: as a message begins.

    Raises:
        TPatchError: a field is of the wrong type; the message names it.
    """
    if isinstance(request, EditRequest):
        return parse_request({name: getattr(request, name) for name in _FIELDS}, where)
    return parse_request(dict(request) if isinstance(request, Mapping) else request, where)


def as_requests(requests: Iterable[EditRequest | Mapping[str, Any]]) -> list[EditRequest]:
    """Requests given in code, as objects or as the dictionaries that a file would hold.

    Raises:
        TPatchError: it is no list of requests, or a field of one is of the wrong type; the message names the request.
    """
    if isinstance(requests, str | PathLike):
        raise TPatchError(
            f"{str(requests)!r} is no list of requests; give a list of EditRequest, if only of one: read_requests "
            "reads a file of them"
        )
    if isinstance(requests, EditRequest | Mapping | bytes) or not isinstance(requests, Iterable):
        # A whole model has much to say of itself.
        shown = repr(requests) if isinstance(requests, EditRequest | Mapping) else f"a {type(requests).__name__}"
        raise TPatchError(f"{shown[:200]} is no list of requests; give a list of EditRequest, if only of one")
    return [check_request(request, f"request {position}") for position, request in enumerate(requests)]


def check_ids(requests: Sequence[EditRequest]) -> None:
    """Make sure that reports can tell requests apart by their ids, those made from positions among them.

    Raises:
        TPatchError: an id occurs twice.
    """
    first: dict[str, int] = {}
    for position, request in enumerate(requests):
        earlier = first.setdefault(request.name(position), position)
        if earlier != position:
            made = " (made from its position)" * (request.id is None or requests[earlier].id is None)
            raise TPatchError(
                f"request {position}: the id {request.name(position)!r} is that of request {earlier}, too{made}; give "
                "each its own"
            )
