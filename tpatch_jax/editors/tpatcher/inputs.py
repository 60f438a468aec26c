"""T-Patcher on a network from elsewhere that reads anything: images, features, several arrays at once.

The recipe of `tpatch_jax.editors.tpatcher.tokens`, for a network that says one thing of each input: a class, or the
next token at one position.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tpatch_jax.core.arguments import describe
from tpatch_jax.core.checks import random_key
from tpatch_jax.core.devices import automatically
from tpatch_jax.core.memory import create_memory
from tpatch_jax.core.patch import Patch
from tpatch_jax.editors.base import EditInfo
from tpatch_jax.editors.tpatcher.rounds import find_target_tokens
from tpatch_jax.editors.tpatcher.settings import TPatcherSettings
from tpatch_jax.editors.tpatcher.tokens import (
    LEAST_MEMORY,
    REFERENCES,
    check_foreign,
    create_rounds_input,
    fit_requests,
    report_none,
)
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.foreign.collection import TokenSites
from tpatch_jax.models.foreign.network import Network, as_inputs, shapes_of

__all__ = ["edit_inputs"]

BATCH = 8
MOST_MEMORY = 1 << 14
"""So many queries of the memory are looked at, from all positions of it alike."""


@automatically
def edit_inputs(
    network: Network,
    inputs: Sequence[Any],
    targets: Sequence[int],
    memory: Sequence[Any],
    *,
    position: int = 0,
    answer: int | None = None,
    settings: TPatcherSettings | Mapping[str, Any] | str = "default",
    seed: int = 0,
) -> tuple[Patch, EditInfo]:
    """Correct any network: fit the neurons that make it say each target of its input.

    Args:
        network: from `tpatch_jax.from_nnx` or `tpatch_jax.from_linen`, made with an example of what it reads; not
            changed. Logits ``[batch, classes]``, or ``[batch, positions, classes]`` with ``answer``.
        inputs: one input each, as the example without its batch axis; all of one shape.
        targets: what the network should say of each: the number of a class or token.
        memory: other inputs of that shape, of which the patch must stay silent; the more, the better.
        position: at which position of the FFN a neuron fires, such as that of the class token, 0; -1 is the last.
        answer: which position of the logits counts.
        settings: options, the name of a preset (``"default"`` or ``"paper"``), or changes by name, as of `edit`.
        seed: the same seed gives the same patch on one machine.

    Returns:
        The patch, ``[n, d]``, and an `EditInfo` that says what became of each request. Requests that do not hold on the
        whole network with all patches active are reported there and leave no neuron.

    Raises:
        TPatchError: there is no request, there is too little memory, inputs are not of one shape, a setting does not
            exist, or the network mixes the rows of a batch.

    Source: Huang et al. 2023.

    Example:
        >>> import tpatch_jax as tp
        >>> ends = "layers.11.linear1", "layers.11.linear2"
        >>> network = tp.from_nnx(vit, ends, activation="gelu_tanh", example=images[:2])  # doctest: +SKIP
        >>> patch, info = tp.edit_inputs(network, images[:1], [7], memory=images[1:])  # doctest: +SKIP
        >>> network.attach(patch).apply(images[:1]).argmax()  # doctest: +SKIP
        7
    """
    call = "edit_inputs(network, inputs, targets, memory)"
    settings = check_foreign(network, settings, call)
    for name, given in (("inputs", inputs), ("targets", targets), ("memory", memory)):
        if isinstance(given, str | bytes | Mapping) or not isinstance(given, Sequence | np.ndarray | Array):
            raise TPatchError(f"{call}: {name} is {describe(given)}; give a list")
    if len(inputs) != len(targets):
        raise TPatchError(f"{len(inputs)} inputs and {len(targets)} targets; give each input its own target")
    if not len(inputs):
        raise TPatchError("there is no request to edit; give at least one input and its target")
    with jax.default_matmul_precision("highest"):
        rows = [_row(row, network, f"input {number}") for number, row in enumerate(inputs)]
        known = [_row(row, network, f"memory input {number}") for number, row in enumerate(memory)]
        shapes = {str(shapes_of(row)) for row in [*rows, *known]}
        if len(shapes) > 1:
            raise TPatchError(f"the inputs have {len(shapes)} shapes; give inputs and memory of one shape")
        return _edit(network, rows, targets, known, position, answer, settings, seed)


def _row(row: Any, network: Network, name: str) -> Any:
    """One input as a batch of one."""
    try:
        batch = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], row)
    except (TypeError, ValueError):
        raise TPatchError(f"{name} is {describe(row)}; give arrays, as the example without its batch axis") from None
    try:
        return as_inputs(batch, network.example)
    except TPatchError as error:
        raise TPatchError(f"{name}: {error}") from None


def _batch(rows: Sequence[Any]) -> Any:
    """Inputs in one batch; the last one fills it up, so that one program is compiled."""
    full = [*rows, *([rows[-1]] * (BATCH - len(rows)))]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *full)


def _collect(network: Network, rows: Sequence[Any], position: int) -> tuple[TokenSites, np.ndarray]:
    """What the cut gives at one position of each input, and the FFN's input at all positions, ``[rows, places, d]``."""
    parts, queries = [], []
    for first in range(0, len(rows), BATCH):
        chosen = rows[first : first + BATCH]
        traced, count = network.trace(_batch(chosen)), len(chosen)
        if any(entry.shape[:1] != traced.query.shape[:1] for entry in traced.context.values()):
            raise TPatchError(
                f"what follows {network.path!r} mixes the rows of a batch, so that none can be edited on its own; cut "
                "at the last FFN"
            )
        whole = {**traced.context, "query": traced.query, "output": traced.output}
        places = np.full(count, position % traced.query.shape[1], np.int32)
        context = {name: entry[:count] for name, entry in whole.items()} | {"position": places}
        at = traced.query[:count, position], traced.output[:count, position]
        parts.append(jax.tree.map(np.asarray, TokenSites(*at, context)))
        queries.append(np.asarray(traced.query[:count]))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts), np.concatenate(queries)


def _said(network: Network, rows: Sequence[Any], answer: int | None) -> np.ndarray:
    said = []
    for first in range(0, len(rows), BATCH):
        chosen = rows[first : first + BATCH]
        logits = network.apply(_batch(chosen))[: len(chosen)]
        said.append(np.asarray(jnp.argmax(logits if answer is None else logits[:, answer], -1)))
    return np.concatenate(said)


def _edit(
    network: Network,
    inputs: Sequence[Any],
    targets: Sequence[int],
    memory_rows: Sequence[Any],
    position: int,
    answer: int | None,
    settings: TPatcherSettings,
    seed: int,
) -> tuple[Patch, EditInfo]:
    began = time.perf_counter()
    halves = network.cut(shapes_of(_batch(inputs[:1])))
    _check_places(network, halves.query.shape, halves.logits.shape, position, answer)
    if len(memory_rows) * halves.query.shape[1] < LEAST_MEMORY:
        raise TPatchError(f"the memory has fewer than {LEAST_MEMORY} queries; give more inputs")
    problems = _problems(targets, halves.logits.shape[-1])
    names = [f"edit-{number}" for number in range(len(inputs))]
    positions = [number for number in range(len(inputs)) if number not in problems]
    if not positions:
        return report_none(network, names, problems, began)
    rows = [inputs[number] for number in positions]
    sites, _ = _collect(network, rows, position)
    tokens = find_target_tokens([[int(targets[number])] for number in positions], [1] * len(positions))
    beside, queries = _collect(network, memory_rows, position)
    head = network.finisher_of(shapes_of(inputs[0]), answer)
    some = np.arange(0, len(memory_rows), max(1, len(memory_rows) // REFERENCES))[:REFERENCES]
    references = jax.tree.map(lambda leaf: leaf[some], beside)
    given = create_rounds_input(
        network, settings, tokens, sites, _memory(queries, position, settings), head, references,
        lambda corrected: _said(corrected, rows, answer), [f"input {number}" for number in positions],
    )  # fmt: skip
    return fit_requests(network, given, random_key(seed), settings, positions, names, problems, began)


def _memory(queries: np.ndarray, position: int, settings: TPatcherSettings) -> Any:
    """Queries at the position of the neurons, and as many of all others as there is room for."""
    width = queries.shape[-1]
    there, others = queries[:, position], np.delete(queries, position, 1).reshape(-1, width)
    step = max(1, -(-len(others) // max(1, MOST_MEMORY - len(there))))
    query = jnp.asarray(np.concatenate([there, others[::step]]))
    return create_memory(query, None, weight=settings.nuisance_weight, shrinkage=settings.shrinkage)


def _check_places(
    network: Network, query: tuple[int, ...], logits: tuple[int, ...], position: int, answer: int | None
) -> None:
    if not -query[1] <= position < query[1]:
        raise TPatchError(f"position {position} is none of the {query[1]} that {network.path!r} reads")
    if network.reads_tokens and len(logits) == 3:
        raise TPatchError("the network says something at each of its tokens; edit it with tp.edit_tokens")
    if (len(logits), answer is None) not in ((2, True), (3, False)) or logits[0] != query[0]:
        raise TPatchError(
            f"the network gives {list(logits)} on {query[0]} inputs; edit_inputs needs logits [batch, classes], or "
            "[batch, positions, classes] and answer=, the position that counts: pick them with call="
        )
    if answer is not None and not -logits[1] <= answer < logits[1]:
        raise TPatchError(f"answer {answer} is none of the {logits[1]} positions of the logits")


def _problems(targets: Sequence[int], classes: int) -> dict[int, str]:
    """The targets that the network cannot say, by position."""
    problems = {}
    for number, target in enumerate(targets):
        if isinstance(target, bool) or not isinstance(target, int | np.integer):
            problems[number] = f"the target is {describe(target)}; give the number of a class"
        elif not 0 <= target < classes:
            problems[number] = f"the target {target} is none of the network's classes, 0 to {classes - 1}"
    return problems
