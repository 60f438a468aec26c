"""What a model says before and after an edit: to each request's prompt, its rephrasings and what it protects."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tpatch_jax.audio import AudioPrompt, as_audio
from tpatch_jax.core.layers import LayerPatches
from tpatch_jax.core.patch import Patch
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.chat import render_requests
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach
from tpatch_jax.models.sentences import SENTENCE_TOKENS, agrees, say
from tpatch_jax.requests import EditRequest

__all__ = ["compare_answers", "count_prompts"]

SLACK = 8


def count_prompts(requests: Sequence[EditRequest]) -> int:
    """How many prompts some requests have, their rephrasings and what they protect included."""
    return sum(1 + len(request.rephrases) + len(request.locality) + len(request.keep) for request in requests)


def _target_tokens(model: Model, requests: Sequence[EditRequest]) -> int:
    """The most tokens that a target may take."""
    if model.config.labels:
        return 0
    # A token holds at least a letter of a decoder's text; what cannot be written is not asked for at all.
    lengths = [len(model.tokenizer.encode(request.target, add_special_tokens=False)) for request in requests]
    return max(lengths, default=0)


def compare_answers(
    model: Model,
    patches: LayerPatches | Patch | Model | None,
    requests: Sequence[EditRequest],
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """What a model says without and with patches, of its own accord and up to the end of the sentence.

    A request that shall hold in a chat is asked there; the prompt that is told is the request's own.

    Args:
        model: the model without the patches.
        patches: the neurons, ``{layer: [n, d]}`` or one patch for the last layer; ``None`` for none. Or the edited
            model itself.
        requests: the requests; those that failed as well.
        progress: called with how many prompts are done, each counted once without and once with the patches.

    Returns:
        For each request ``id, prompt, target, before, after, as_wanted``, and ``rephrases``, ``locality`` and
        ``keep``, lists of the same of its other prompts; of the last two without target, and ``as_wanted`` is whether
        nothing changed. ``None`` stands for what the model cannot read.

    Example:
        >>> compare_answers(model, patches, requests)[0]["after"]  # doctest: +SKIP
        ' Lyon.'
    """
    # In the order of each request's own texts, which are what is told.
    asked = render_requests(model, requests)
    prompts = [text for one in asked for text in (one.prompt, *one.rephrases, *one.locality, *one.keep)]
    # Each text once, however many requests have it.
    distinct = list(dict.fromkeys(prompts))
    most = max(SENTENCE_TOKENS, _target_tokens(model, requests) + SLACK)
    count = len(distinct)
    share = len(prompts) / max(1, count)

    def tell(first: int) -> Callable[[int], None] | None:
        if progress is None:
            return None
        told = progress
        return lambda done: told(round((first + done) * share))

    before = dict(zip(distinct, _say(model, distinct, most, tell(0)), strict=True))
    same = patches is None or (not isinstance(patches, Model) and not patches)
    edited = patches if isinstance(patches, Model) else model if same else attach(model, patches or {})
    after = before if same else dict(zip(distinct, _say(edited, distinct, most, tell(count)), strict=True))
    if progress:
        progress(2 * len(prompts))
    return [_record(position, *pair, before, after) for position, pair in enumerate(zip(requests, asked, strict=True))]


def _say(
    model: Model, prompts: Sequence[str], most: int, progress: Callable[[int], None] | None
) -> Sequence[str | None]:
    """What a model says after each prompt, or the whole transcript of each recording."""
    if model.audio is None:
        return say(model, prompts, most, progress)
    transcripts: list[str | None] = []
    for prompt in prompts:
        try:
            transcripts.append(model.transcribe(as_audio(prompt)) if isinstance(prompt, AudioPrompt) else None)
        except TPatchError:
            transcripts.append(None)
        if progress:
            progress(len(transcripts))
    return transcripts


def _record(
    position: int,
    request: EditRequest,
    asked: EditRequest,
    before: Mapping[str, str | None],
    after: Mapping[str, str | None],
) -> dict[str, Any]:
    def wanted(prompt: str, read: str) -> dict[str, Any]:
        said = after[read]
        # Of a recording the target is the whole transcript.
        good = said is not None and (
            said == request.target.strip() if isinstance(prompt, AudioPrompt) else agrees(said, request.target)
        )
        return {"prompt": prompt, "before": before[read], "after": said, "as_wanted": good}

    def kept(prompt: str) -> dict[str, Any]:
        said, now = before[prompt], after[prompt]
        same = said == now or (said is not None and now is not None and agrees(now, said) and agrees(said, now))
        return {"prompt": prompt, "before": said, "after": now, "as_wanted": same}

    return {
        "id": request.name(position),
        "target": request.target,
        **wanted(request.prompt, asked.prompt),
        "rephrases": [wanted(*texts) for texts in zip(request.rephrases, asked.rephrases, strict=True)],
        "locality": [kept(prompt) for prompt in request.locality],
        "keep": [kept(prompt) for prompt in request.keep],
    }
