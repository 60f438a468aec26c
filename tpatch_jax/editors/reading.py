"""From requests to tokens: what can be worked on, in which contexts, and where in each the subject stands."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from tpatch_jax.audio import AudioPrompt
from tpatch_jax.core.checks import text_generator
from tpatch_jax.editors.locating import locate_subject, replace_subject
from tpatch_jax.embeddings import EmbeddingPrompt
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.chat import render_request
from tpatch_jax.models.inputs import audio_contexts, embedding_contexts, image_contexts, input_contexts
from tpatch_jax.models.model import Model
from tpatch_jax.requests import EditRequest

__all__ = [
    "Item",
    "check_requests",
    "contradicting",
    "prompt_tokens",
    "read_item",
    "read_request",
    "subject_token",
    "swapped_prompts",
    "target_tokens",
    "with_shared_numbers",
]


class Item(NamedTuple):
    """One request as a model reads it: for each context the whole input, and where in it the target begins.

    Attributes:
        position: its place in the list of requests.
        target: the target's tokens.
        rows: prompt and target in each context, the bare prompt first.
        starts: where in each row the target begins.
        texts: the prompt in each context.
        rephrases: so many of them, the last ones, are rephrases and do not hold the prompt.
        taught: numbers of target tokens that get a neuron if the target does not come out, though they may come out
            after those before them: others may hear them otherwise.
    """

    position: int
    target: list[int]
    rows: list[list[int]]
    starts: list[int]
    texts: list[str]
    rephrases: int = 0
    taught: tuple[int, ...] = ()

    def places(self, context: int) -> range:
        """The positions in a row whose next token is the target's."""
        return range(self.starts[context] - 1, self.starts[context] - 1 + len(self.target))


def target_tokens(model: Model, request: EditRequest) -> list[int]:
    """A request's target in tokens, as it follows the prompt."""
    return model.encode_target(request.prompt, request.continuation)


def prompt_tokens(model: Model, prompt: str) -> tuple[int, ...]:
    """What the tokenizer makes of a prompt: prompts are the same if this is. White space at their ends does not count.

    Raises:
        TPatchError: it holds a token that the model does not know.
    """
    return tuple(model.encode_prompt(prompt.strip()))


def read_request(model: Model, request: EditRequest) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """A request's prompt and target in tokens, by which two are told apart; ``None`` if it cannot be read.

    Args:
        model: whose tokenizer reads: it may lower-case, or join letters and their accents.
        request: what the user wants.
    """
    if not request.prompt.strip() or not request.target.strip():
        return None
    try:
        request = render_request(model, request)
        # As if the target stood after the same prompt, whatever white space this one ends with.
        alone = dataclasses.replace(request, prompt=request.prompt.strip(), target=request.target.strip())
        return prompt_tokens(model, request.prompt), tuple(target_tokens(model, alone))
    except TPatchError:
        return None


def contradicting(model: Model, requests: Sequence[EditRequest]) -> dict[int, int]:
    """Requests that want something else after the same prompt as an earlier one, by what the tokenizer makes of them.

    Args:
        model: whose tokenizer reads.
        requests: in order; those that cannot be read contradict nothing.

    Returns:
        From the position of the later request to the position of the first one that it contradicts.
    """
    first: dict[tuple[int, ...], tuple[int, tuple[int, ...]]] = {}
    later = {}
    for position, request in enumerate(requests):
        if (read := read_request(model, request)) is not None:
            prompt, target = read
            earlier, wanted = first.setdefault(prompt, (position, target))
            if wanted != target:
                later[position] = earlier
    return later


def _lost(model: Model, what: str, text: str) -> str:
    """What is wrong with a text of which the tokenizer loses characters; empty if it keeps all."""
    lost = model.lost(text)
    if not lost:
        return ""
    names = ", ".join(map(repr, lost))
    return (
        f"the {what} {text!r} has characters that the tokenizer of {model.name!r} does not know: {names}; write it "
        "without them, or take a model that knows them"
    )


def _kept_reason(
    model: Model, request: EditRequest, position: int, edited: Mapping[tuple[int, ...], int], names: Sequence[str]
) -> str:
    """Why a request cannot keep one of its prompts; empty if it can keep them all."""
    for text in request.keep:
        try:
            reason = _lost(model, "kept prompt", text) or model.excess(model.encode_prompt(text), [0])
            other = edited.get(prompt_tokens(model, text))
        except TPatchError as error:
            return f"the kept prompt {text!r} cannot be read: {error}"
        if other is not None:
            whose = "its prompt" if other == position else f"the prompt of {names[other]!r}"
            return f"it keeps {text!r}, which the tokenizer reads like {whose}; take it out of 'keep'"
        if reason:
            return f"it keeps {text!r}: {reason}"
    return ""


def check_requests(model: Model, requests: Sequence[EditRequest], subjects: bool) -> dict[int, str]:
    """Requests that cannot be worked on, at their subjects or elsewhere, with the reason; all others go on."""
    problems = {}
    for position, earlier in contradicting(model, requests).items():
        name, before = requests[earlier].name(earlier), requests[earlier].prompt.strip()
        spelt = "" if before == requests[position].prompt.strip() else f", which the tokenizer reads like {before!r},"
        problems[position] = f"contradicts {name!r}: the same prompt{spelt} with another target; keep one of them"
    edited: dict[tuple[int, ...], int] = {}
    if any(request.keep for request in requests):
        for position, request in enumerate(requests):
            if (read := read_request(model, request)) is not None:
                edited.setdefault(read[0], position)
    called = [request.name(position) for position, request in enumerate(requests)]
    for position, request in enumerate(requests):
        subject = request.subject
        spans = locate_subject(model, request.prompt, subject) if subject else []
        if isinstance(request.prompt, AudioPrompt) and request.prompt.problem:
            problems[position] = request.prompt.problem
        elif subjects and isinstance(request.prompt, EmbeddingPrompt):
            problems[position] = "a prompt with embeddings is edited in the last layer alone; use site=last"
        elif not request.prompt.strip():
            problems[position] = "the prompt is empty; write the text that the model should continue"
        elif not request.target.strip():
            problems[position] = "the target is empty; write what the model should say"
        elif subject is not None and not spans:
            problems[position] = f"the subject {subject!r} is not in the prompt; copy it as it stands there"
        elif subjects and len(spans) > 1:
            problems[position] = (
                f"the subject {subject!r} occurs {len(spans)} times in the prompt; name it once, or use site=last"
            )
        else:
            try:
                target = target_tokens(model, request)
                reason = _lost(model, "prompt", request.prompt)
                # A classifier's target is the number of a label, which nothing reads.
                reason = reason or ("" if model.config.labels else _lost(model, "target", request.target))
                reason = reason or model.excess(model.encode_prompt(request.prompt), target)
                reason = reason or _kept_reason(model, request, position, edited, called)
            except TPatchError as error:
                reason = str(error)
            if reason:
                # What the tokenizer loses may be all by which two prompts differ.
                collision = f"; {problems[position]}" if position in problems else ""
                problems[position] = f"{reason}{collision}"
    return problems


def read_item(
    model: Model,
    position: int,
    request: EditRequest,
    prefixes: Sequence[str],
    rephrases: bool,
    wordings: Sequence[str] = (),
) -> Item:
    """A request in tokens, bare and in each context; one that the model cannot read is the bare prompt again.

    A decoder sees the prompt behind each prefix; a model that reads whole inputs sees as many other `wordings` and,
    where these are fewer, `input_contexts`.
    """
    target = target_tokens(model, request)
    if model.config.image is not None:
        return _read_image(model, position, request, target, len(prefixes), rephrases)
    if isinstance(request.prompt, AudioPrompt):
        return _read_audio(model, position, request, request.prompt, target, len(prefixes), rephrases)
    if isinstance(request.prompt, EmbeddingPrompt):
        contexts: list[str] = [*embedding_contexts(request.prompt, len(prefixes))]
    elif model.config.architecture == "decoder":
        # A prompt that begins with the token which begins a text keeps it in front.
        begin = model.begun(request.prompt)
        contexts = [f"{begin}{prefix} {request.prompt[len(begin) :]}" for prefix in prefixes]
    else:
        given = list(wordings)[: len(prefixes)]
        contexts = [*given, *input_contexts(request.prompt, tuple(prefixes), len(prefixes) - len(given))]
    texts = [request.prompt, *contexts]
    also = list(request.rephrases) if rephrases else []
    texts += also
    bare = model.encode_prompt(request.prompt)
    rows, starts = [bare + target], [len(bare)]
    for number, text in enumerate(texts[1:], 1):
        try:
            prompt = model.encode_prompt(text)
            fits = not model.excess(prompt, target)
        except TPatchError:
            prompt, fits = bare, False
        if not fits:
            texts[number], prompt = request.prompt, bare
        rows.append(prompt + target)
        starts.append(len(prompt))
    return Item(position, target, rows, starts, texts, len(also))


def _read_image(
    model: Model, position: int, request: EditRequest, target: list[int], contexts: int, rephrases: bool
) -> Item:
    """A request about an image, in as many `image_contexts` as a decoder's has prefixes."""
    image, bare = model.config.image, model.encode_prompt(request.prompt)
    also = [model.encode_prompt(other) for other in request.rephrases] if rephrases else []
    prompts = [bare, *(image_contexts(image, bare, contexts) if image is not None else []), *also]
    texts = [request.prompt] * (1 + contexts) + [*request.rephrases][: len(also)]
    return Item(
        position, target, [[*prompt, *target] for prompt in prompts], [len(bare)] * len(prompts), texts, len(also)
    )


def _read_audio(
    model: Model,
    position: int,
    request: EditRequest,
    prompt: AudioPrompt,
    target: list[int],
    contexts: int,
    rephrases: bool,
) -> Item:
    """A request about a recording, in as many `audio_contexts`; all tokens of what it corrects get neurons."""
    also = list(request.rephrases) if rephrases else []
    prompts = [model.encode_prompt(one) for one in (prompt, *audio_contexts(prompt, contexts), *also)]
    texts, rows = [request.prompt] * (1 + contexts) + also, [[*read, *target] for read in prompts]
    taught: tuple[int, ...] = ()
    if prompt.place is not None:
        first, last = prompt.place
        # Transcripts begin with a space, which their first token holds.
        ends = [len(model.decode(target[: number + 1])) - 1 for number in range(len(target) - 1)]
        begins = [0, *ends]
        taught = tuple(
            n for n, (begin, end) in enumerate(zip(begins, ends, strict=False)) if end > first and begin < last
        )
    return Item(position, target, rows, [len(read) for read in prompts], texts, len(also), taught)


def with_shared_numbers(items: Iterable[Item]) -> list[Item]:
    """The items with each token's number in memory once; tokenizers make it anew each time it occurs.

    Args:
        items: from `read_item`, one after the other.
    """
    numbers: dict[int, int] = {}
    once = lambda row: [numbers.setdefault(token, token) for token in row]  # noqa: E731
    return [item._replace(rows=list(map(once, item.rows)), target=once(item.target)) for item in items]


def subject_token(model: Model, text: str, end: int) -> int:
    """The last token of what ends at ``end``, by the tokenizer's own offsets.

    A bracket or quotation mark at the end that shares its token with what follows is passed over, for no rephrasing
    repeats that token. One with a token of its own is a part of the subject: "Disney+" is not "Disney".

    Args:
        model: the model.
        text: a prompt, as `Model.encode_prompt` reads it.
        end: where in the text the subject ends.
    """
    spans: Sequence[tuple[int, int]] = ()
    if getattr(model.tokenizer, "is_fast", False):
        spans = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    whole = model.encode_prompt(text)
    before = len(whole) - len(model.encode(text)) if model.config.architecture == "decoder" else len(model.start)
    while True:
        holding = [number for number, (first, last) in enumerate(spans) if first < end <= last]
        # Without offsets: the last token of what comes before, which is the same unless a token straddles the end.
        alone = model.encode_prompt(text[:end])
        shared = spans[holding[-1]][1] > end if holding else whole[: len(alone)] != alone
        sign = end > 1 and not text[end - 1].isalnum() and text[end - 2 : end - 1].strip()
        if not (shared and sign):
            return before + holding[-1] if holding else len(alone) - 1
        end -= 1


_NAME = re.compile(r"(?<=\s)[A-Z][\w'\u2019-]*(?:\s+[A-Z][\w'\u2019-]*)*")


def _subject(request: EditRequest) -> str | None:
    """The request's subject, or the last name in its prompt: good enough for choosing negatives."""
    if request.subject:
        return request.subject
    if isinstance(request.prompt, EmbeddingPrompt):
        # What the text is about stands in the embeddings.
        return None
    names = _NAME.findall(request.prompt)
    return names[-1] if names else None


def swapped_prompts(
    model: Model,
    requests: Mapping[int, EditRequest],
    names: Sequence[str],
    count: int,
    wanted: Mapping[int, EditRequest] | None = None,
) -> dict[int, list[str]]:
    """Each prompt about other subjects, of all requests or the wanted: what its patch must stay silent on."""
    subjects = {position: _subject(request) for position, request in requests.items()}
    pool = sorted({*(subject for subject in subjects.values() if subject), *names})
    result = {}
    for position, request in (requests if wanted is None else wanted).items():
        subject = subjects[position]
        others = [name for name in pool if name != subject]
        if subject and others:
            # Drawn from the request's own text, so that they do not depend on its place in the list.
            picks = text_generator(request.prompt).permutation(len(others))[:count]
            texts = [replace_subject(request.prompt, subject, others[pick]) for pick in picks]
            fitting = [text for text in texts if not model.excess(model.encode_prompt(text), ())]
            if fitting:
                result[position] = fitting
    return result
