"""The last layer as a site: what one pass over the prompts gives, and what each patch is fitted on.

The last FFN's input does not depend on a patch there, and it acts on each position alone; so everything that training
needs is collected once.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from tpatch_jax.editors.background import Background
from tpatch_jax.editors.earlier import Earlier
from tpatch_jax.editors.reading import Item, swapped_prompts
from tpatch_jax.editors.rounds import Asked
from tpatch_jax.editors.settings import TPatcherSettings
from tpatch_jax.ffn import ACTIVATIONS
from tpatch_jax.fitting import Lane
from tpatch_jax.memory import Memory, blended, create_memory, extend, nuisance_scatter
from tpatch_jax.models import networks
from tpatch_jax.models.collection import LEAST_TEXT, Sites, collect, predicted, real, single_rows
from tpatch_jax.models.model import Model
from tpatch_jax.patch import Patch, contribution, sized
from tpatch_jax.requests import EditRequest
from tpatch_jax.sizes import power_of_two, round_up

__all__ = [
    "collect_bare",
    "collect_items",
    "create_lanes",
    "forward_seconds",
    "last_memory",
    "moment",
    "resume",
    "starting",
    "swaps",
]

Progress = Callable[[str, int, int], None]

LOUDEST = 8.0
"""A value's scale is at most so many times the unedited residual stream's length."""


def collect_items(model: Model, items: Sequence[Item], progress: Progress | None) -> Sites:
    """Every prompt in every context, once: the rows that `tpatch_jax.editors.rounds.Asked` numbers."""
    rows = [row for item in items for row in item.rows]
    places = [item.places(context) for item in items for context in range(len(item.rows))]
    report = (lambda done: progress("reading prompts", done, len(rows))) if progress else None
    return collect(model, rows, places, model.layer(None), report)


def collect_bare(model: Model, items: Sequence[Item]) -> Sites:
    """The bare prompts alone."""
    return collect(model, [item.rows[0] for item in items], [item.places(0) for item in items], model.layer(None))


def forward_seconds(model: Model, items: Sequence[Item], most: int = 64) -> float:
    """Seconds of one forward pass per request over its prompt and target, compiled and warm."""
    chosen = items[:: max(1, len(items) // most)][:most]
    rows = [item.rows[0] for item in chosen]
    places = [item.places(0)[-1:] for item in chosen]

    def run() -> None:
        predicted(model, collect(model, rows, places, model.layer(None)))

    run()
    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) / len(rows)


def starting(model: Model, known: Background) -> Array:
    """What values are started with: `moment` of the unembedding, or the mean of each label of a classifier."""
    return moment(networks.unembedding(model.config, model.params)) if known.centres is None else known.centres


def _directions(model: Model, spread: Array, targets: np.ndarray) -> Array:
    """Where values start, ``[lanes, d]``: towards the target and away from everything else.

    ``M⁻¹·u_token`` raises a token's logit most against all others; of a classifier it is the way from the mean of all
    labels to that of the target.
    """
    if model.config.labels:
        return spread[targets] - jnp.mean(spread, 0)
    table = networks.unembedding(model.config, model.params)
    return jnp.linalg.solve(spread, table[targets].astype(jnp.float32).T).T


@jax.jit
def moment(table: Array) -> Array:
    """``M = UᵀU/V`` of the unembedding ``U [V, d]``, regularised: ``[d, d]``."""
    table = table.astype(jnp.float32)
    found = table.T @ table / table.shape[0]
    return found + 0.01 * jnp.trace(found) / found.shape[0] * jnp.eye(found.shape[0])


def resume(model: Model) -> Partial:
    """The rest of the network after the last FFN, with its weights kept out of compiled programs."""
    return Partial(networks.finisher(model.config), networks.final_weights(model.config, model.params))


def _scale(model: Model, residual: Array, output: Array, beside: Array) -> Array:
    """What a value of medium strength measures: the residual stream's norm, mean over contexts, ``[lanes]``.

    Where another neuron fires it has to be outdone, so the stream with that neuron counts; but only up to a few times
    the unedited stream, or in a long sequence each value would outgrow the last without end.
    """

    def norm(output: Array) -> Array:
        # Where a norm follows, its output says nothing about how much it takes to move it.
        after = model.config.post_norm
        hidden = residual + output if after else networks.leave_last(model.config, model.params, residual, output)
        return jnp.mean(jnp.linalg.norm(hidden.astype(jnp.float32), axis=-1), -1)

    return jnp.minimum(norm(beside), LOUDEST * norm(output))


def create_lanes(
    model: Model,
    settings: TPatcherSettings,
    sites: Sites,
    asked: Asked,
    negatives: np.ndarray,
    mean: np.ndarray,
    spread: Array,
    rows: np.ndarray,
    patch: Patch,
) -> Lane:
    """What the neurons of some target tokens are fitted on.

    Args:
        model: the model.
        settings: the editor's options.
        sites: from `collect_items`.
        asked: the target tokens.
        negatives: queries on which each request's first neuron must stay silent, ``[requests, swaps, d]``.
        mean: the mean memory query, ``[d]``, which stands for no negative.
        spread: from `starting`.
        rows: the bare rows that want a neuron, ``[lanes]``.
        patch: what is active already.
    """
    owner, token = asked.owner[rows], asked.token[rows]
    most = max(len(asked.table[number]) for number in owner)
    most = most if settings.train_on_rephrases else min(most, settings.contexts)
    # A request that is seen less often repeats its last context.
    chosen = np.stack(
        [
            asked.table[number][np.minimum(np.arange(most), len(asked.table[number]) - 1), place]
            for number, place in zip(owner, token, strict=True)
        ]
    )
    query, output, residual = (field[chosen] for field in sites)
    context: dict[str, Any] = {"residual": residual}
    if query.ndim == 4:
        query, output, context = _by_position(query, output, residual)
    beside = output + contribution(sized(patch, 64), query, ACTIVATIONS[model.config.activation])
    targets = asked.wanted[rows]
    # Only the first token of an answer follows a prompt that another subject could stand in.
    particular = np.where((token == 0)[:, None, None], negatives[owner], mean)
    return Lane(
        jnp.asarray(query, jnp.float32),
        jnp.asarray(beside, jnp.float32),
        jnp.asarray(particular),
        jax.tree.map(jnp.asarray, context),
        jnp.asarray(targets),
        _directions(model, spread, targets),
        _scale(model, context["residual"], output, beside),
    )


def _by_position(query: np.ndarray, output: np.ndarray, residual: np.ndarray) -> tuple[Any, Any, dict[str, Any]]:
    """Whole texts, ``[lanes, contexts, tokens, d]``, as positions ``[lanes, all tokens, d]``, with their context.

    Each text begins again until it is as long as the longest; what is said twice does not count in the mean.
    """
    length = np.any(residual != 0, -1).sum(-1)
    longest = round_up(int(length.max()), 8)
    place = np.arange(longest) % length[..., None]
    lanes, contexts = length.shape
    query, output, residual = (
        np.take_along_axis(array, place[..., None], 2).reshape(lanes, contexts * longest, -1)
        for array in (query, output, residual)
    )
    valid = (np.arange(longest) < length[..., None]).reshape(lanes, -1)
    text = np.broadcast_to(np.repeat(np.arange(contexts, dtype=np.int32), longest), valid.shape)
    return query, output, {"residual": residual, "valid": valid, "text": text}


def last_memory(settings: TPatcherSettings, known: Background, earlier: Earlier, sites: Sites, asked: Asked) -> Memory:
    """Background queries, earlier edits, and the other edits of this batch."""
    nuisance = known.nuisance
    if settings.fit.recipe == "staged" and settings.contexts > 1 and sites.query.ndim == 2:
        groups = [sites.query[span[: settings.contexts].T] for span in asked.table]
        # The edits' own contexts tell more than the general ones, the more of them there are.
        own, share = nuisance_scatter(jnp.asarray(np.concatenate(groups))), min(0.9, len(asked.wanted) / 200)
        nuisance = blended(own, nuisance, share)
    memory = create_memory(known.query, nuisance, weight=settings.nuisance_weight, shrinkage=settings.shrinkage)
    if known.answers is not None:
        memory = memory._replace(answer=known.answers)
    query, owner = single_rows(earlier.sites)
    answer = earlier.wanted[owner]
    if settings.other_edits:
        own, owner = single_rows(sites)
        query, answer = np.concatenate([query, own]), np.concatenate([answer, asked.answers[owner]])
    return extend(memory, query, answer, power_of_two(len(query), 64)) if len(query) else memory


def swaps(
    model: Model,
    items: Sequence[Item],
    requests: Mapping[int, EditRequest],
    names: Sequence[str],
    count: int,
    mean: np.ndarray,
    progress: Progress | None,
) -> np.ndarray:
    """The query after each prompt about other subjects, ``[items, count, d]``; the mean where there is none."""
    swapped = swapped_prompts(model, requests, names, count)
    whole = () if networks.pointwise(model.config) else (LEAST_TEXT,)
    result = np.broadcast_to(mean, (len(items), count, *whole, mean.shape[0])).astype(np.float32)
    places = [(at, slot) for at, item in enumerate(items) for slot in range(len(swapped.get(item.position, ())))]
    rows = [model.encode_prompt(swapped[items[at].position][slot]) for at, slot in places]
    if rows:
        report = (lambda done: progress("reading other subjects", done, len(rows))) if progress else None
        found = collect(model, rows, [[len(row) - 1] for row in rows], model.layer(None), report)
        said = found.query if not whole else np.where(real(found)[..., None], found.query, mean)[:, :LEAST_TEXT]
        result[tuple(np.asarray(places).T)] = said
    return result.reshape(len(items), -1, mean.shape[0])
