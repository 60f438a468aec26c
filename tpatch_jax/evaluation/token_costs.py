"""What an edited model costs afterwards: FLOPs per generated token over those of the unedited model.

Editing is paid once and generation for ever. An answer is a prompt that is read and `ANSWER` tokens that are written
behind it, and its FLOPs are those of everything that runs for it: the decision whether an edit answers (SERAC's
encoder, WISE's activation, an embedding), an edit that stands before the prompt, what stands beside a feed-forward
network, and the network itself. They are read from the programs (`tpatch_jax.core.flops.count_flops`) and not timed, so
they are the same on every machine. Weights that were changed in place cost nothing: such a model has exactly 1.
"""

from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean
from typing import Any

import jax
import jax.numpy as jnp

from tpatch_jax.core.flops import count_flops
from tpatch_jax.core.layers import LayerPatches
from tpatch_jax.editors.base import Routing
from tpatch_jax.models import networks
from tpatch_jax.models.collection import batches
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach

__all__ = ["ANSWER", "answer_flops", "token_costs"]

ANSWER = 16
"""So many tokens are written behind each prompt."""

PROMPTS = 32
"""So many prompts of a kind at most are decided on, at even distances."""


def answer_flops(model: Model, length: int, tokens: int = ANSWER) -> float:
    """FLOPs of reading a prompt and writing some tokens behind it, one after the other, with a key-value cache.

    Args:
        model: a decoder, edited or not.
        length: how many tokens the prompt has.
        tokens: how many are written; the first one comes of reading the prompt.

    Example:
        >>> answer_flops(model, 12) > 12 * 2 * model.parameter_count  # doctest: +SKIP
        True
    """
    leaves, structure = jax.tree.flatten(model.params)
    shapes = tuple(jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    return _answer_flops(model.config, structure, shapes, length, tokens)


@lru_cache(maxsize=256)
def _answer_flops(
    config: NetworkConfig, structure: Any, shapes: tuple[jax.ShapeDtypeStruct, ...], length: int, tokens: int
) -> float:
    """The same of parameters of which only the shapes count, so that it is counted once for all edits of one shape."""
    weights = jax.tree.unflatten(structure, shapes)

    def run(params: Any, ids: jax.Array, positions: jax.Array, cache: Any) -> Any:
        states, cache = networks.decode(config, params, ids, positions, cache)
        return networks.logits(config, networks.final_weights(config, params), states[:, -1]), cache

    cache = jax.eval_shape(lambda params: networks.empty_cache(config, params, 1, length + tokens), weights)
    several, single = (jax.ShapeDtypeStruct((1, count), jnp.int32) for count in (length, 1))
    read = count_flops(run, weights, several, several, cache)
    return read + (tokens - 1) * count_flops(run, weights, single, single, cache)


def _input_flops(model: Model, row: Sequence[int]) -> float:
    """FLOPs of one answer of a network that reads its whole input: a label, or a text that is read as it is written."""
    ((_, batch),) = batches(model.config, [row])
    return count_flops(lambda params, given: networks.apply(model.config, params, given), model.params, batch)


def _chosen(rows: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Prompts at even distances, none of them empty."""
    written = [row for row in rows if len(row)]
    return list(written[:: -(-len(written) // PROMPTS)]) if written else []


def _answer(
    model: Model, edited: Model, routing: Routing | None, prompts: Sequence[Sequence[int]]
) -> tuple[float, float]:
    """FLOPs of answering a prompt of the median length, of the unedited model and of the edited one."""
    prompt = sorted(prompts, key=len)[len(prompts) // 2]
    if model.config.architecture != "decoder":
        return _input_flops(model, prompt), _input_flops(edited, prompt)
    before = answer_flops(model, len(prompt))
    if routing is None:
        return before, answer_flops(edited, len(prompt))
    contexts = routing.contexts(prompts)
    answered = [context for context in contexts if context is not None]
    total = routing.decision_flops(prompt) + (1 - len(answered) / len(prompts)) * answer_flops(edited, len(prompt))
    if answered:
        # Of a mean length: in it the FLOPs are as good as linear.
        longer = len(prompt) + round(fmean(map(len, answered)))
        total += len(answered) / len(prompts) * answer_flops(routing.model, longer)
    return before, total


def token_costs(
    model: Model,
    edited: Model,
    patches: LayerPatches | None,
    routing: Routing | None,
    about: Sequence[Sequence[int]],
    elsewhere: Sequence[Sequence[int]],
) -> dict[str, float]:
    """What a generated token costs once a model is edited.

    Args:
        model: the unedited model.
        edited: the edited one; with ``routing`` the one that answers out of every scope.
        patches: its neurons, if edits are neurons; they count as they are attached, without padding.
        routing: where another model answers.
        about: prompts of edits, in tokens.
        elsewhere: prompts about something else.

    Returns:
        ``token_flops``, FLOPs per generated token after the prompt of an edit, that of reading it among them;
        ``token_forward_equivalents``, the same over the unedited model's; ``token_forward_equivalents_elsewhere``, that
        of other prompts, if there are any.
    """
    edited = edited if patches is None else attach(model, patches)
    costs: dict[str, float] = {}
    for name, rows in (("", _chosen(about)), ("_elsewhere", _chosen(elsewhere))):
        if not rows:
            continue
        before, after = _answer(model, edited, routing, rows)
        costs[f"token_forward_equivalents{name}"] = after / before
        if not name:
            written = ANSWER if model.config.architecture == "decoder" else 1
            costs["token_flops"] = after / written
    return costs
