"""What an edit does to its requests: the answer, the rephrasings, and the prompts that must not change."""

import contextlib
from collections.abc import Callable, Sequence

import numpy as np

from tpatch_jax.core.devices import automatically
from tpatch_jax.core.layers import LayerPatches
from tpatch_jax.core.patch import Patch
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.chat import render_requests
from tpatch_jax.models.collection import collect_once, predicted
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach, by_layer
from tpatch_jax.requests import EditRequest, join_target

__all__ = ["measure", "predictions"]


def predictions(
    model: Model,
    patches: LayerPatches | Patch | Model | None,
    rows: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The most probable next token at chosen positions, without and with a patch.

    A patch in the last layer changes each position by itself, so both come from one pass; a patch further down takes
    a second one.

    Args:
        model: the model without the patch.
        patches: the neurons, ``{layer: [n, d]}`` or one patch for the last layer; ``None`` for none. Or the edited
            model itself, which has the same tokenizer.
        rows: token ids of each text.
        positions: which positions of each text.
        progress: called with the number of texts done.

    Returns:
        Two arrays of token ids, text after text, position after position.
    """
    layer = model.layer(None)
    sites = collect_once(model, rows, positions, layer, progress)
    before = predicted(model, sites)
    if isinstance(patches, Model):
        return before, predicted(patches, collect_once(patches, rows, positions, layer, progress))
    layers = {} if patches is None else by_layer(model, patches)
    if not layers:
        return before, before
    if set(layers) == {layer}:
        return before, predicted(model, sites, layers[layer])
    model = attach(model, layers)
    return before, predicted(model, collect_once(model, rows, positions, layer, progress))


@automatically
def measure(
    model: Model,
    patches: LayerPatches | Patch | Model,
    requests: Sequence[EditRequest],
    progress: Callable[[int], None] | None = None,
) -> dict[str, float | None]:
    """The share of requests, rephrasings and unrelated prompts that come out as they should, all patches active.

    A target comes out of greedy decoding from the prompt alone exactly if each of its tokens is the most probable one
    after the prompt and the target tokens before it; so one pass over prompt and target decides it. A request that
    shall hold in a chat is asked there, with the end of the turn as the target's last token.

    Args:
        model: the model without the patch.
        patches: the neurons, ``{layer: [n, d]}`` or one patch for the last layer; or the edited model itself.
        requests: the requests; those that failed count as well.
        progress: called with the number of texts done.

    Returns:
        ``exact, token_accuracy, rephrase_exact, rephrase_token_accuracy`` (token figures are means over prompts of the
        share of target tokens), ``locality`` (share of ``locality`` prompts whose next token is unchanged) and
        ``locality_tokens`` (share of all their positions); ``None`` where there is nothing to measure. ``keep``, the
        share of ``keep`` prompts whose next token is unchanged, is there only if a request has any.
    """
    rows: list[list[int]] = []
    positions: list[range] = []
    wanted: list[list[int]] = []
    kinds: list[str] = []
    shares: dict[str, list[float]] = {"edit": [], "rephrase": []}

    def add(kind: str, prompt: str, target: str, join: str | None = None) -> None:
        start, answer = [], []
        # What holds a token that the model does not know cannot be asked, and a label that a classifier does not have
        # never comes out.
        with contextlib.suppress(TPatchError):
            start = model.encode_prompt(prompt)
            answer = model.encode_target(prompt, join_target(prompt, target, join)) if target else []
        row = start + answer
        if not start or model.excess(start, answer) or (kind in shares and not answer):
            rows.append([0])
            positions.append(range(0))
            wanted.append([])
        else:
            rows.append(row)
            spoken = range(len(row)) if model.config.architecture == "decoder" else range(len(row) - 1, len(row))
            positions.append(range(len(start) - 1, len(row) - 1) if answer else spoken)
            wanted.append(answer)
        kinds.append(kind)

    for request in render_requests(model, requests):
        add("edit", request.prompt, request.target, request.join)
        for text in request.rephrases:
            add("rephrase", text, request.target, request.join)
        for text in request.locality:
            add("locality", text, "")
        for text in request.keep:
            add("keep", text, "")
    before, after = predictions(model, patches, rows, positions, progress)
    ends = np.cumsum([len(places) for places in positions])
    next_token: dict[str, list[bool]] = {"locality": [], "keep": []}
    tokens: list[np.ndarray] = []
    for kind, answer, places, end in zip(kinds, wanted, positions, ends, strict=True):
        span = slice(end - len(places), end)
        if kind in next_token:
            if len(places):
                same = before[span] == after[span]
                next_token[kind].append(bool(same[-1]))
                if kind == "locality":
                    tokens.append(same)
        else:
            shares[kind].append(float(np.mean(after[span] == np.asarray(answer))) if answer else 0.0)
    result: dict[str, float | None] = {}
    for kind, prefix in (("edit", ""), ("rephrase", "rephrase_")):
        each = shares[kind]
        result[f"{prefix}exact"] = float(np.mean([share == 1.0 for share in each])) if each else None
        result[f"{prefix}token_accuracy"] = float(np.mean(each)) if each else None
    result["locality"] = float(np.mean(next_token["locality"])) if next_token["locality"] else None
    result["locality_tokens"] = float(np.concatenate(tokens).mean()) if tokens else None
    if next_token["keep"]:
        result["keep"] = float(np.mean(next_token["keep"]))
    return result
