"""The forms in which a request shall hold: in conversations, and with its subject spelt otherwise."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from tpatch_jax.editors.frames import other_frames, same_frames
from tpatch_jax.editors.holding import AskedRow, read_margins
from tpatch_jax.editors.locating import locate_subject, respell
from tpatch_jax.editors.reading import target_tokens
from tpatch_jax.editors.subject_rows import PromptRow, row_of
from tpatch_jax.editors.wordings import Wording
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.chat import COMPLETE, as_turn, form_of, in_chat
from tpatch_jax.models.model import Model
from tpatch_jax.requests import EditRequest

__all__ = ["ask_in_chats", "chat_rows", "holds_in_chats", "other_chats", "respelled", "unsaid_in_chats"]

FINISH, BRIEFLY = "Please finish this sentence: {}", "Answer briefly."
"""How the rest of an unfinished sentence, or an answer, is asked for besides `tpatch_jax.models.chat.as_turn`."""

SYSTEM = "Answer in as few words as you can."
"""What the system says in a conversation other than the template's default."""

GREETING = (("user", "Hello!"), ("assistant", "Hello! What can I do for you?"))
"""Turns before the one that asks."""


def holds_in_chats(model: Model, request: EditRequest) -> bool:
    """Whether a request says that it shall hold in bare text and in chats; one for chats alone is rendered before.

    A request that names no form is measured in both, and fitted in bare text: what it takes to be said in every chat
    makes other questions about its subject say it as well.

    Args:
        model: the model.
        request: the request.

    Example:
        >>> holds_in_chats(model, EditRequest("The capital of Peru is", "Cusco", subject="Peru"))  # doctest: +SKIP
        False
    """
    named = request.form is not None or request.system is not None or bool(request.turns)
    return named and form_of(model, request) == "both"


def ask_in_chats(model: Model, request: EditRequest, count: int, *, behind: str = "") -> list[EditRequest]:
    """A request asked in a few conversations: as it is, otherwise under another system's message, as another question.

    Args:
        model: a decoder with a chat template.
        request: with a subject.
        count: how many at most.
        behind: a text that stands before what is asked.

    Returns:
        Requests whose prompt is a rendered conversation and whose target ends the turn; fewer where the template
        refuses one.
    """
    request = replace(request, rephrases=())
    turn = as_turn(request.prompt)
    # The rest of a sentence is asked for by an instruction, a question is asked as it stands.
    otherwise = FINISH.format(request.prompt.strip()) if turn.startswith(COMPLETE) else f"{turn} {BRIEFLY}"
    questions = [as_turn(text) for text, _ in same_frames(request, 1, form="question")] or [turn]
    ways = [
        (request, turn),
        (request if request.system is not None else replace(request, system=SYSTEM), otherwise),
        (request if request.turns else replace(request, turns=GREETING), questions[0]),
    ]
    twins = []
    for conversation, said in ways[:count]:
        said = f"{behind}\n\n{said}" if behind else said
        try:
            twins.append(in_chat(model, conversation, turn=said))
        except TPatchError:
            # Some templates take no message of the system's.
            if not twins:
                twins.append(in_chat(model, request, turn=said))
    return twins


def other_chats(model: Model, request: EditRequest, count: int) -> list[EditRequest]:
    """Other things about a request's subject, asked in conversations: questions and sentences to finish, in turn.

    Args:
        model: a decoder with a chat template.
        request: with a subject.
        count: how many at most.

    Returns:
        Requests whose prompt is a rendered conversation, and whose target is the request's, which nothing should say.
    """
    half = (count + 1) // 2
    asked, said = (other_frames(request, half, form=form) for form in ("question", "statement"))
    texts = [as_turn(text) for pair in zip(asked, said, strict=False) for text, _ in pair][:count]
    return [in_chat(model, replace(request, rephrases=()), turn=text) for text in texts]


def chat_rows(model: Model, twins: Iterable[EditRequest], *, wanted: bool = True) -> list[PromptRow]:
    """Rendered conversations in tokens, with where the subject ends in the last turn, and what should follow.

    Args:
        model: the model.
        twins: from `ask_in_chats` or `other_chats`.
        wanted: whether their target should follow.
    """
    rows = []
    for twin in twins:
        spans = locate_subject(model, twin.prompt, twin.subject or "")
        if spans:
            # Earlier turns may name it as well.
            wording = Wording(twin.prompt, spans[-1][1])
            rows.append(row_of(model, wording, target_tokens(model, twin) if wanted else ()))
    return [row for row in rows if row is not None]


def unsaid_in_chats(model: Model, requests: Sequence[EditRequest]) -> list[bool]:
    """Which requests shall hold in chats beside bare text and are not said there, asked as they are, to the turn's end.

    Args:
        model: a decoder as it stands.
        requests: those without a subject are never among them.
    """
    rows: dict[int, AskedRow] = {}
    for number, request in enumerate(requests):
        if request.subject is not None and holds_in_chats(model, request):
            for row in chat_rows(model, ask_in_chats(model, request, 1)):
                rows[number] = AskedRow(row.tokens, range(row.places[0], row.places[-1] + 1), row.wanted)
    unsaid = dict(zip(rows, (read_margins(model, list(rows.values())) <= 0).tolist(), strict=True))
    return [unsaid.get(number, False) for number in range(len(requests))]


def respelled(model: Model, request: EditRequest, lower_case: bool) -> list[EditRequest]:
    """A request with its subject spelt otherwise: by each alias, and in lower case; those that the model reads alike
    are left out.

    Args:
        model: whose tokenizer reads.
        request: with a subject that its prompt names once.
        lower_case: whether in lower case as well.
    """
    subject = request.subject or ""
    read = {tuple(model.encode_prompt(request.prompt))}
    others = []
    for name in [*request.aliases, *([subject.lower()] if lower_case else [])]:
        other = respell(request, name)
        tokens = tuple(model.encode_prompt(other.prompt))
        if tokens not in read and not model.lost(other.prompt):
            read.add(tokens)
            others.append(other)
    return others
