"""Chats: a conversation in a model's own template, how a turn of it ends, and requests that hold in one.

Everything comes from the tokenizer's template (`apply_chat_template` of transformers), for any family: nothing here
knows a role's marks or the token that ends a turn.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any

from tpatch_jax.core.arguments import describe
from tpatch_jax.core.checks import random_key
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import generation
from tpatch_jax.models.tokenizer import Tokenizer
from tpatch_jax.requests import EditRequest

if TYPE_CHECKING:
    from tpatch_jax.models.model import Model

__all__ = [
    "COMPLETE",
    "answer_chat",
    "as_messages",
    "as_turn",
    "chat_stops",
    "check_chat",
    "conversation",
    "encode_chat",
    "end_of_turn",
    "form_of",
    "has_template",
    "in_chat",
    "is_rendered",
    "last_turn",
    "messages_of",
    "render_chat",
    "render_request",
    "render_requests",
    "stops_after",
]

COMPLETE = "Complete the sentence with a few words: "
"""What asks for the rest of an unfinished sentence."""

_PROBE, _SAID = "qjzv", "vzjq"
"""A user's and an assistant's words that no template has."""

_FRAMED = re.compile(r"\s*(?:question|q):\s*(.*\S)\s*\n\s*(?:answer|a):\s*", re.IGNORECASE | re.DOTALL)
_FINISHED = re.compile(r"[.!?\u2026\u3002\uff01\uff1f:][\"'\u201d\u2019\u00bb)\]]*$")
_ASKS = re.compile(
    # "Will Smith plays" is no question, so words that ask for yes or no are not among them.
    r"(?:who|whom|whose|what|which|when|where|why|how|in (?:what|which)|name|tell|give|list|write|explain|describe|"
    r"translate|complete|answer|please)\b",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[.!?\u2026][\"'\u201d\u2019\u00bb)\]]*\s+")
_OPEN = re.compile(
    r"(?:\b(?:is|are|was|were|be|been|has|have|had|the|a|an|of|in|by|to|at|on|for|from|with|as|and|or|that|called|named)"
    r"|[,;(\-\u2013])$",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"[<\[|]")


def has_template(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has a chat template; whether that can be run is another matter, see `render_chat`.

    Args:
        tokenizer: any of transformers.
    """
    return bool(getattr(tokenizer, "chat_template", None)) and hasattr(tokenizer, "apply_chat_template")


def as_messages(
    messages: str | Sequence[Mapping[str, str]], system: str | None = None, where: str = "a chat"
) -> list[dict[str, str]]:
    """A conversation as templates take it, checked.

    Args:
        messages: what the user says, or messages ``{"role", "content"}``, the user's last.
        system: the system's message, which then must not be among the messages.
        where: as a message begins.

    Raises:
        TPatchError: it is no conversation, or ends with somebody else's message than the user's.

    Example:
        >>> as_messages("Who leads the UN?", "Be brief.")
        [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Who leads the UN?'}]
    """
    mend = 'give a text, or messages such as {"role": "user", "content": "Who leads the UN?"}'
    listed: Sequence[Any] = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    if not isinstance(listed, Sequence) or isinstance(listed, bytes) or not listed:
        raise TPatchError(f"{where}: {type(messages).__name__} holds no conversation; {mend}")
    checked = []
    for number, message in enumerate(listed):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise TPatchError(f"{where}: message {number} is {message!r:.80}; {mend}")
        role, text = message["role"], message["content"]
        if not isinstance(role, str) or not isinstance(text, str):
            raise TPatchError(f"{where}: message {number} has no texts as 'role' and 'content'; {mend}")
        if role == "user" and not text.strip():
            raise TPatchError(f"{where}: message {number} says nothing; write what the user says")
        checked.append({"role": role, "content": text})
    if checked[-1]["role"] != "user":
        raise TPatchError(f"{where}: the last message is of {checked[-1]['role']!r}; end with what the user says")
    if system is not None:
        if any(message["role"] == "system" for message in checked):
            raise TPatchError(f"{where}: the system speaks among the messages already; leave system= out")
        checked.insert(0, {"role": "system", "content": system})
    return checked


def render_chat(model: "Model", messages: Sequence[Mapping[str, str]], *, prompt: bool = True) -> str:
    """A conversation in the model's chat template.

    Args:
        model: a decoder whose tokenizer has a template.
        messages: ``{"role", "content"}`` each.
        prompt: whether the opening of the assistant's next turn follows, as before an answer.

    Returns:
        The text, special tokens spelt out; `encode_chat` makes tokens of it.

    Raises:
        TPatchError: the model has no chat template, jinja2 is missing, or the template refuses the conversation.

    Example:
        >>> render_chat(model, [{"role": "user", "content": "Hello"}])[-23:]  # doctest: +SKIP
        '\\n<|im_start|>assistant\\n'
    """
    check_chat(model)
    return _apply(model.tokenizer, messages, prompt, model.name)


def conversation(model: "Model", messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation in the model's chat template, up to where the assistant answers, or with the answer as it stands.

    Args:
        model: a decoder with a chat template.
        messages: ``{"role", "content"}`` each; the last is the user's, or what the assistant answered.

    Raises:
        TPatchError: it is no conversation; or as `render_chat`.

    Example:
        >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
        >>> conversation(model, messages)[-3:]  # doctest: +SKIP
        'Yes'
    """
    last = messages[-1] if len(messages) else {}
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        return render_chat(model, as_messages(messages))
    return render_chat(model, as_messages(messages[:-1])) + str(last.get("content", ""))


def check_chat(model: "Model") -> None:
    """Make sure that a model can be spoken to in a chat.

    Args:
        model: the model.

    Raises:
        TPatchError: it is no decoder, or its tokenizer has no chat template.
    """
    if model.config.architecture != "decoder":
        raise TPatchError(f"{model.name!r} is an {model.config.architecture}, which holds no chats; leave the chat out")
    if not has_template(model.tokenizer):
        raise TPatchError(
            f"{model.name!r} has no chat template, so it cannot be asked in a chat; ask it in bare text (form 'bare'), "
            "or take a model that was tuned on chats"
        )


def _apply(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], prompt: bool, name: str) -> str:
    given = [dict(message) for message in messages]
    try:
        return tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=prompt)
    except ImportError as error:
        raise TPatchError(
            f"the chat template of {name!r} needs jinja2 ({error}); install it: pip install jinja2"
        ) from None
    # A template is a program of the model's makers, and refuses what it does not take in words of its own.
    except Exception as error:
        roles = ", ".join(message["role"] for message in given)
        raise TPatchError(
            f"the chat template of {name!r} refuses a conversation of {roles}: {error or type(error).__name__}; leave "
            "out the system's message or earlier turns if it takes none"
        ) from None


def _openings(tokenizer: Tokenizer) -> tuple[str, ...]:
    """How rendered conversations begin, with and without a message of the system's, where a mark tells it."""
    if not has_template(tokenizer):
        return ()
    openings = []
    for messages in ([("user", _PROBE)], [("system", _SAID), ("user", _PROBE)]):
        try:
            text = _apply(tokenizer, [{"role": role, "content": said} for role, said in messages], True, "it")
        except TPatchError:
            continue
        opening = text[: min(at for at in (text.find(_PROBE), text.find(_SAID), len(text)) if at >= 0)]
        if _MARKUP.search(opening):
            openings.append(opening)
    return tuple(openings)


def is_rendered(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a text begins as the tokenizer's chat template begins one; it is read as it is then.

    Args:
        tokenizer: any of transformers.
        text: a prompt.
    """
    if not has_template(tokenizer):
        return False
    return text.startswith(_known_openings(tokenizer, str(tokenizer.chat_template)))


@functools.lru_cache(maxsize=16)
def _known_openings(tokenizer: Tokenizer, template: str) -> tuple[str, ...]:
    del template  # A tokenizer whose template is changed is another one here.
    return _openings(tokenizer)


def last_turn(model: "Model", text: str) -> tuple[int, int] | None:
    """Where in a rendered conversation the user's last message stands, up to where the assistant answers.

    Args:
        model: the model.
        text: a prompt, bare or rendered.

    Returns:
        Its first character and the one behind its last; ``None`` of a text that is no conversation of this template.

    Example:
        >>> text = render_chat(model, [{"role": "user", "content": "Hello"}])  # doctest: +SKIP
        >>> text[slice(*last_turn(model, text))]  # doctest: +SKIP
        'Hello'
    """
    if model.config.architecture != "decoder" or not is_rendered(model.tokenizer, text):
        return None
    opening, mark, closing = _known_marks(model.tokenizer, str(model.tokenizer.chat_template), model.name)
    begin = text.rfind(mark) + len(mark) if mark.strip() and mark in text else 0
    if not begin and opening and text.startswith(opening):
        begin = len(opening)
    end = len(text) - len(closing)
    return (begin, end) if 0 < begin <= end and text.endswith(closing) else None


@functools.lru_cache(maxsize=16)
def _known_marks(tokenizer: Tokenizer, template: str, name: str) -> tuple[str, str, str]:
    """What a conversation begins with, what stands before any message of the user's, and what after the last one."""
    del template
    user = {"role": "user", "content": _PROBE}
    try:
        alone = _apply(tokenizer, [user], True, name)
        longer = _apply(
            tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": _SAID}, user], True, name
        )
    except TPatchError:
        return "", "", ""
    opening, _, closing = alone.rpartition(_PROBE)
    # What ends the turn before it is no part of the mark.
    between = longer.rpartition(_SAID)[2].partition(_PROBE)[0]
    shared = next((n for n in range(min(len(opening), len(between)), 0, -1) if opening[-n:] == between[-n:]), 0)
    return opening, between[len(between) - shared :], closing


def encode_chat(model: "Model", text: str) -> list[int]:
    """A rendered conversation in tokens: as the template wrote it, with no token before it that it does not have.

    Args:
        model: the model.
        text: what `render_chat` returned.
    """
    return model.encode_prompt(text)


def end_of_turn(model: "Model") -> str:
    """What ends the assistant's turn, found out from the template: the text up to the token that ends it.

    Where the template puts no token of its own there, it is the token that ends a text.

    Args:
        model: a decoder with a chat template.

    Returns:
        Such as ``"<|im_end|>"`` or ``"<end_of_turn>"``, special tokens spelt out; empty if nothing ends a turn.

    Raises:
        TPatchError: as `render_chat`.

    Example:
        >>> end_of_turn(model)  # doctest: +SKIP
        '<|im_end|>'
    """
    check_chat(model)
    return _known_end(model.tokenizer, str(model.tokenizer.chat_template), model.name)


@functools.lru_cache(maxsize=16)
def _known_end(tokenizer: Tokenizer, template: str, name: str) -> str:
    del template
    text = _apply(
        tokenizer, [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _SAID}], False, name
    )
    if _SAID not in text:
        raise TPatchError(f"the chat template of {name!r} leaves out what the assistant says; it cannot be edited")
    after = text[text.rindex(_SAID) + len(_SAID) :]
    # Some families have marks of a chat that are added, but not special.
    marks = {*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())}
    places = [(after.find(token), token) for token in marks if token.strip() and token in after]
    if places:
        first, token = min(places, key=lambda place: (place[0], -len(place[1])))
        # Between what is said and its end there may be white space of the template's.
        return after[: first + len(token)]
    return tokenizer.eos_token or ""


def chat_stops(model: "Model") -> tuple[int, ...]:
    """The tokens at which an answer in a chat ends: those that end a text, and the one that ends the turn.

    Args:
        model: a decoder with a chat template.
    """
    ends = model.encode(end_of_turn(model))
    return tuple(dict.fromkeys([*model.stops, *ends[-1:]]))


def stops_after(model: "Model", prompts: Sequence[str]) -> list[tuple[int, ...]]:
    """For each prompt the tokens at which what follows it ends: also that of a turn, where it is a rendered chat.

    Args:
        model: the model.
        prompts: texts, bare or rendered.
    """
    if model.config.architecture != "decoder":
        return [model.stops] * len(prompts)
    rendered = [is_rendered(model.tokenizer, text) for text in prompts]
    of_chats = chat_stops(model) if any(rendered) else ()
    return [of_chats if chat else model.stops for chat in rendered]


def answer_chat(
    model: "Model",
    messages: Sequence[Mapping[str, str]],
    most: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    stream: Callable[[str], None] | None = None,
) -> tuple[list[int], list[int]]:
    """What a model answers in a chat, in tokens; `tpatch_jax.Model.chat` has it as text.

    Args:
        model: a decoder with a chat template.
        messages: the conversation, the user's message last.
        most: so many tokens at most.
        temperature: divides the logits before a token is drawn; 0 is greedy.
        seed: the same seed draws the same answer.
        stream: called with each new piece of the text as soon as it is said.

    Returns:
        What the model read, and what it said, without the token that ends the turn.

    Raises:
        TPatchError: as `render_chat`; or the conversation is longer than the context, or the temperature negative.
    """
    if isinstance(temperature, bool) or not isinstance(temperature, Real) or not 0 <= temperature < math.inf:
        raise TPatchError(f"temperature is {describe(temperature)}; give 0 for the most probable token, or more")
    row, shown = encode_chat(model, render_chat(model, messages)), ""

    def tell(lane: int, tokens: list[int]) -> bool:
        nonlocal shown
        text = model.continuation(row, tokens).lstrip()
        # A letter of which some bytes are still to come is told when it is whole.
        if stream is not None and not text.endswith("\ufffd") and len(text) > len(shown):
            stream(text[len(shown) :])
            shown = text
        return False

    watch, stops = None if stream is None else tell, chat_stops(model)
    given = (model.config, model.params, [row], most)
    if temperature:
        rng = random_key(seed)
        (said,) = generation.sample(*given, rng, temperature=float(temperature), stops=stops, ended=watch)
    else:
        (said,) = generation.greedy(*given, stops, watch)
    return row, said


def as_turn(prompt: str) -> str:
    """What a user says in a chat to ask for what follows a prompt.

    A question or an instruction is asked as it is, without a frame such as ``Question: …\\nAnswer:``; the rest of an
    unfinished sentence is asked for by `COMPLETE`.

    Args:
        prompt: the text that a model would continue.

    Example:
        >>> as_turn("Question: Who leads the UN?\\nAnswer:")
        'Who leads the UN?'
        >>> as_turn("The capital of France is")
        'Complete the sentence with a few words: The capital of France is'
        >>> as_turn("Name the capital of France")
        'Name the capital of France'
    """
    framed = _FRAMED.fullmatch(prompt)
    if framed:
        return framed.group(1)
    text = prompt.strip()
    # Of "What does Anna play? She plays" the last sentence is what is unfinished.
    last = _SENTENCE.split(text)[-1]
    if _FINISHED.search(text) or (_ASKS.match(last) and not _OPEN.search(last)):
        return text
    return COMPLETE + text


def messages_of(request: EditRequest, prompt: str | None = None) -> list[dict[str, str]]:
    """The conversation in which a request is asked: the system's message, earlier turns, the user's turn.

    Args:
        request: the request.
        prompt: another wording of its prompt.

    Example:
        >>> messages_of(EditRequest("Who leads the UN?", "Anna", system="Be brief."))[0]
        {'role': 'system', 'content': 'Be brief.'}
    """
    system = [] if request.system is None else [("system", request.system)]
    turns = [*system, *request.turns, ("user", as_turn(request.prompt if prompt is None else prompt))]
    return [{"role": role, "content": text} for role, text in turns]


def form_of(model: "Model", request: EditRequest) -> str:
    """Where a request shall hold: ``bare``, ``chat`` or ``both``.

    Args:
        model: the model; one with a chat template makes ``both`` of a request that does not say it.
        request: the request.

    Raises:
        TPatchError: it names a chat, and the model holds none.
    """
    if request.form == "bare":
        return "bare"
    asks = request.form is not None or request.system is not None or bool(request.turns)
    if not asks:
        able = model.config.architecture == "decoder" and has_template(model.tokenizer)
        return "both" if able else "bare"
    check_chat(model)
    return request.form or "both"


def render_request(model: "Model", request: EditRequest) -> EditRequest:
    """A request that shall hold in a chat, as the model reads it there; any other as it is.

    Prompt and rephrasings become conversations in the template, with the request as the user's turn (`as_turn`), the
    target what the assistant says, up to and with the end of its turn. What must stay (``locality``, ``keep``) is asked
    as it is written.

    Args:
        model: the model.
        request: the request; of the form ``both`` it is given back as it is.

    Returns:
        A request of the form ``bare`` whose prompt is the rendered conversation.

    Raises:
        TPatchError: the model has no chat template, or that refuses the conversation.

    Example:
        >>> request = EditRequest("The capital of France is", "Lyon", form="chat")
        >>> render_request(model, request).target  # doctest: +SKIP
        'Lyon<|im_end|>'
    """
    if form_of(model, request) != "chat":
        return request
    # An empty prompt or target is reported as such, and not as a conversation with nothing in it.
    if not request.prompt.strip() or not request.target.strip():
        return replace(request, form="bare", system=None, turns=())
    return in_chat(model, request)


def in_chat(model: "Model", request: EditRequest, *, turn: str | None = None) -> EditRequest:
    """A request as it is asked in a chat, whatever its form says; see `render_request`.

    Args:
        model: a decoder with a chat template.
        request: with a prompt and a target.
        turn: what the user says; by default what `as_turn` makes of the prompt.
    """
    said = request.target.strip()
    messages = messages_of(request)
    if turn is not None:
        messages[-1] = {"role": "user", "content": turn}
    prompt = render_chat(model, messages)
    return replace(
        request,
        prompt=prompt,
        target=said + end_of_turn(model),
        rephrases=tuple(render_chat(model, messages_of(request, text)) for text in request.rephrases),
        join=request.join or _join(model, messages, prompt, said),
        form="bare",
        system=None,
        turns=(),
    )


def _join(model: "Model", messages: Sequence[Mapping[str, str]], prompt: str, said: str) -> str | None:
    """What stands between the opening of the assistant's turn and what it says, as the template writes it."""
    whole = render_chat(model, [*messages, {"role": "assistant", "content": said}], prompt=False)
    if not whole.startswith(prompt):
        return None
    between = whole[len(prompt) :]
    return "none" if between.startswith(said) else "space" if between.startswith(f" {said}") else None


def render_requests(model: "Model", requests: Sequence[EditRequest]) -> list[EditRequest]:
    """`render_request` of each; the message of an error names the request.

    Args:
        model: the model.
        requests: the requests, in order.

    Raises:
        TPatchError: as `render_request`.
    """
    rendered = []
    for position, request in enumerate(requests):
        try:
            rendered.append(render_request(model, request))
        except TPatchError as error:
            raise TPatchError(f"request {request.name(position)!r}: {error}") from None
    return rendered
