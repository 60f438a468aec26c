"""From requests to tokens: what can be worked on, in which contexts, and where in each the subject stands."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.inputs import input_contexts
from tpatch_jax.models.model import Model
from tpatch_jax.requests import EditRequest, contradictions

__all__ = ["Item", "check_requests", "read_item", "subject_token", "swapped_prompts", "with_shared_numbers"]


class Item(NamedTuple):
    """One request as a model reads it: for each context the whole input, and where in it the target begins.

    Attributes:
        position: its place in the list of requests.
        target: the target's tokens.
        rows: prompt and target in each context, the bare prompt first.
        starts: where in each row the target begins.
        texts: the prompt in each context.
        rephrases: so many of them, the last ones, are rephrases and do not hold the prompt.
    """

    position: int
    target: list[int]
    rows: list[list[int]]
    starts: list[int]
    texts: list[str]
    rephrases: int = 0

    def places(self, context: int) -> range:
        """The positions in a row whose next token is the target's."""
        return range(self.starts[context] - 1, self.starts[context] - 1 + len(self.target))


def check_requests(model: Model, requests: Sequence[EditRequest], subjects: bool) -> dict[int, str]:
    """Requests that cannot be worked on, at their subjects or elsewhere, with the reason; all others go on."""
    problems = {}
    for position, earlier in contradictions(requests).items():
        problems[position] = (
            f"contradicts {requests[earlier].name(earlier)!r}: the same prompt with another target; keep one of them"
        )
    for position, request in enumerate(requests):
        subject = request.subject
        if not request.prompt.strip():
            problems[position] = "the prompt is empty; write the text that the model should continue"
        elif not request.target.strip():
            problems[position] = "the target is empty; write what the model should say"
        elif subject is not None and (not subject.strip() or subject not in request.prompt):
            problems[position] = f"the subject {subject!r} is not in the prompt; copy it as it stands there"
        elif subjects and subject is not None and request.prompt.count(subject) > 1:
            problems[position] = (
                f"the subject {subject!r} occurs {request.prompt.count(subject)} times in the prompt; name it once, or "
                "use site=last"
            )
        else:
            try:
                target = model.encode_target(request.prompt, request.continuation)
                reason = model.excess(model.encode_prompt(request.prompt), target)
            except TPatchError as error:
                reason = str(error)
            if reason:
                problems[position] = reason
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
    target = model.encode_target(request.prompt, request.continuation)
    if model.config.architecture == "decoder":
        contexts = [f"{prefix} {request.prompt}" for prefix in prefixes]
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


def with_shared_numbers(items: Iterable[Item]) -> list[Item]:
    """The items with each token's number in memory once; tokenizers make it anew each time it occurs.

    Args:
        items: from `read_item`, one after the other.
    """
    numbers: dict[int, int] = {}
    once = lambda row: [numbers.setdefault(token, token) for token in row]  # noqa: E731
    return [item._replace(rows=list(map(once, item.rows)), target=once(item.target)) for item in items]


def subject_token(model: Model, text: str, end: int) -> int:
    """The last token of what ends at ``end`` that holds a letter or digit of it, by the tokenizer's own offsets.

    A bracket or quotation mark at the end often shares its token with what follows, which no rephrasing repeats.

    Args:
        model: the model.
        text: a prompt, as `Model.encode_prompt` reads it.
        end: where in the text the subject ends.
    """
    while end > 1 and not text[end - 1].isalnum() and text[end - 2 : end - 1].strip():
        end -= 1
    if getattr(model.tokenizer, "is_fast", False):
        spans = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        holding = [number for number, (first, last) in enumerate(spans) if first < end <= last]
        if holding:
            return len(model.start) + holding[-1]
    # Without offsets: the last token of what comes before, which is the same unless a token straddles the end.
    return len(model.encode_prompt(text[:end])) - 1


_NAME = re.compile(r"(?<=\s)[A-Z][\w'\u2019-]*(?:\s+[A-Z][\w'\u2019-]*)*")


def _subject(request: EditRequest) -> str | None:
    """The request's subject, or the last name in its prompt: good enough for choosing negatives."""
    if request.subject:
        return request.subject
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
    pool = list(dict.fromkeys([*(subject for subject in subjects.values() if subject), *names]))
    result = {}
    for position, request in (requests if wanted is None else wanted).items():
        subject = subjects[position]
        others = [name for name in pool if name != subject]
        if subject and others:
            # Drawn from the request's own text, so that they do not depend on its place in the list.
            picks = np.random.default_rng(list(request.prompt.encode())).permutation(len(others))[:count]
            texts = [request.prompt.replace(subject, others[pick]) for pick in picks]
            fitting = [text for text in texts if not model.excess(model.encode_prompt(text), ())]
            if fitting:
                result[position] = fitting
    return result
