"""What an edit did: each request with its margin and losses, and what the model says before and after."""

from collections import Counter
from collections.abc import Sequence

from tpatch_jax.core.layers import LayerPatches
from tpatch_jax.core.patch import Patch
from tpatch_jax.display.console import format_count
from tpatch_jax.display.markup import number, shorten
from tpatch_jax.display.patch import check_requests
from tpatch_jax.display.view import Rows, Shown, compose
from tpatch_jax.editors.base import EditInfo
from tpatch_jax.models import generation
from tpatch_jax.models.chat import render_requests, stops_after
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach
from tpatch_jax.requests import EditRequest

__all__ = ["answers", "show_edit"]

LEAST_TOKENS = 4


def answers(model: Model, prompts: Sequence[str], tokens: int) -> list[str]:
    """What a model says after each prompt: a label, or so many greedy tokens."""
    if model.config.labels:
        return model.classify(prompts)
    rows = [model.encode_prompt(prompt) for prompt in prompts]
    said = generation.greedy(model.config, model.params, rows, tokens, stops_after(model, prompts))
    return [model.continuation(read, new) for read, new in zip(rows, said, strict=True)]


def _said(model: Model, patches: LayerPatches | Patch, requests: Sequence[EditRequest]) -> Rows:
    kinds: list[tuple[int, str, str, str]] = []
    asked = render_requests(model, requests)
    for position, request in enumerate(asked):
        kinds.append((position, "edit", request.prompt, request.target))
        kinds += [(position, "rephrase", prompt, request.target) for prompt in request.rephrases]
        kinds += [(position, "elsewhere", prompt, "") for prompt in dict.fromkeys([*request.locality, *request.keep])]
    prompts = [prompt for _, _, prompt, _ in kinds]
    lengths = [len(model.encode_target(r.prompt, r.continuation)) for r in asked]
    tokens = max([LEAST_TOKENS, *lengths])
    before, after = answers(model, prompts, tokens), answers(attach(model, patches), prompts, tokens)
    rows = []
    for (position, kind, prompt, target), old, new in zip(kinds, before, after, strict=True):
        # Of a target that ends a chat's turn, the end is not said.
        target = requests[position].target if target else ""
        good = new == old if kind == "elsewhere" else new.strip().startswith(target.strip())
        texts = [shorten(prompt, 160), old.strip(), new.strip(), target]
        rows.append([requests[position].name(position), kind, *texts, "yes" if good else "no"])
    columns = ["request", "asked", "prompt", "before", "after", "target", "as wanted"]
    return Rows(columns, rows, judged=("as wanted",))


def show_edit(
    info: EditInfo, requests: Sequence[EditRequest], model: Model | None, patches: LayerPatches | Patch | None
) -> Shown:
    """What an edit did.

    Args:
        info: what it returned.
        requests: what was asked for, in the same order; may be missing.
        model: the model before the edit; with it, the patch and the requests, both models are asked.
        patches: what it returned.

    Raises:
        TPatchError: the requests are others.
    """
    if requests:
        check_requests(requests, info)
    counts = Counter(result.status for result in info.requests)
    names = {"edited": "edited", "already": "right already", "failed": "failed"}
    title = f"Edit: {format_count(len(info.requests), 'request')}, " + ", ".join(
        f"{counts[status]} {name}" for status, name in names.items() if counts[status]
    )
    notes = [
        f"{info.seconds:.1f} s, {number(info.forward_equivalents)} forward equivalents per request (fitting "
        f"{number(info.fit_forward_equivalents)}), {info.parameters_added:,} parameters"
    ]
    if info.held_at_start is not None:
        notes.append(f"{info.held_at_start:.0%} of predicted values said their target before any step")
    tables = [_said(model, patches, requests)] if requests and model is not None and patches is not None else []
    # What the first table says already, the second need not.
    texts_too = requests and not tables
    rows = []
    for position, result in enumerate(info.requests):
        held = "yes" if result.held else f"no: {result.reason}"
        texts = [shorten(requests[position].prompt, 160), requests[position].target] if texts_too else []
        where = [result.site if result.neurons else "", str(sum(map(len, result.neurons.values()))), str(result.steps)]
        losses = ", ".join(f"{name} {value:.2g}" for name, value in result.losses.items())
        rows.append([result.id, *texts, held, number(result.margin), *where, losses])
    columns = ["request", *(["prompt", "target"] if texts_too else []), "held", "margin", "site", "neurons", "steps"]
    tables.append(Rows([*columns, "losses"], rows, ("margin", "neurons", "steps"), ("held",)))
    return compose(title, notes, tables)
