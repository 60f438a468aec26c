"""T-Patcher on a network from elsewhere, at the level of token ids: no tokenizer, no text.

The same recipe as `tpatch_jax.editors.tpatcher.editor`, on a `tpatch_jax.models.foreign.network.Network`: one neuron
for each target token that the network gets wrong, fitted on the arrays that the cut leaves, and checked afterwards on
the network. What that editor reads off its own model is measured here: the direction of a value is a gradient through
the rest.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from tpatch_jax.core.arguments import check_kind, describe
from tpatch_jax.core.checks import random_key
from tpatch_jax.core.devices import automatically
from tpatch_jax.core.fit import FitProblem
from tpatch_jax.core.memory import Memory, create_memory, extend, nuisance_scatter
from tpatch_jax.core.patch import Patch, create, take
from tpatch_jax.core.sizes import power_of_two
from tpatch_jax.editors.base import EditInfo
from tpatch_jax.editors.model_memory import PREFIX_LENGTHS, SPANS
from tpatch_jax.editors.tpatcher.rounds import (
    Checks,
    RoundsInput,
    TargetTokens,
    drop_failures,
    find_target_tokens,
    fit_rounds,
    number_neurons,
    report,
)
from tpatch_jax.editors.tpatcher.settings import TPatcherSettings, as_settings, check_settings
from tpatch_jax.editors.tpatcher.token_problems import create_problems, output_moment
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.foreign.collection import TokenSites, collect_queries, collect_tokens, said
from tpatch_jax.models.foreign.network import Network
from tpatch_jax.requests import EditRequest, contradictions

__all__ = [
    "LEAST_MEMORY",
    "REFERENCES",
    "check_foreign",
    "create_rounds_input",
    "edit_tokens",
    "fit_requests",
    "report_none",
]

Ids = Sequence[int]

LEAST_MEMORY = 32
TAIL = 8
REFERENCES = 4


class _Item(NamedTuple):
    """One request: its place in the list, and its prompt and target in every context."""

    position: int
    target: list[int]
    rows: list[list[int]]


@automatically
def edit_tokens(
    network: Network,
    prompts: Sequence[Ids],
    targets: Sequence[Ids],
    memory: Sequence[Ids],
    *,
    settings: TPatcherSettings | Mapping[str, Any] | str = "default",
    seed: int = 0,
) -> tuple[Patch, EditInfo]:
    """Correct any causal network: fit the neurons that make it say each target after its prompt.

    ``FFN'(q) = FFN(q) + Σ act(q·k + b)·v`` with one neuron per target token that comes out wrong.

    Args:
        network: from `tpatch_jax.from_nnx` or `tpatch_jax.from_linen`; not changed. Logits
            ``[batch, tokens, vocabulary]``, each position blind to what follows.
        prompts: token ids of each prompt.
        targets: token ids of what should follow each prompt.
        memory: token ids of unrelated texts, on which the patch must stay silent; the more, the better.
        settings: options, the name of a preset (``"default"`` or ``"paper"``), or changes by name, as of `edit`.
        seed: the same seed gives the same patch on one machine.

    Returns:
        The patch, ``[n, d]``, and an `EditInfo` that says what became of each request. Requests that do not hold on the
        whole network with all patches active are reported there and leave no neuron.

    Raises:
        TPatchError: there is no request, there is too little memory, a setting does not exist, or the network is not a
            causal language model.

    Source: Huang et al. 2023.

    Example:
        >>> import tpatch_jax as tp
        >>> network = tp.from_nnx(module, "blocks.3.mlp", activation="gelu_tanh")  # doctest: +SKIP
        >>> patch, info = tp.edit_tokens(network, [[5, 3]], [[7]], texts)  # doctest: +SKIP
        >>> network.attach(patch).apply([[5, 3]])[0, -1].argmax()  # doctest: +SKIP
        7
    """
    call = "edit_tokens(network, prompts, targets, memory)"
    settings = check_foreign(network, settings, call)
    if not network.reads_tokens:
        raise TPatchError(f"{call}: the network reads no table of token ids; edit it with tp.edit_inputs")
    for name, rows in (("prompts", prompts), ("targets", targets), ("memory", memory)):
        if isinstance(rows, str | bytes) or not isinstance(rows, Sequence | np.ndarray | Array):
            raise TPatchError(f"{call}: {name} is {describe(rows)}; give lists of token ids, [[5, 3], …]")
        if len(rows) and not isinstance(rows[0], str) and np.ndim(np.asarray(rows[0], object)) == 0:
            raise TPatchError(f"{call}: {name} is one list of token ids; give a list of such lists, [[5, 3], …]")
    if len(prompts) != len(targets):
        raise TPatchError(f"{len(prompts)} prompts and {len(targets)} targets; give each prompt its own target")
    if not len(prompts):
        raise TPatchError("there is no request to edit; give at least one prompt and its target")
    with jax.default_matmul_precision("highest"):
        _check_network(network)
        known = [_ids(row, network.vocabulary, f"memory row {number}") for number, row in enumerate(memory)]
        if sum(max(0, len(row) - 1) for row in known) < LEAST_MEMORY:
            raise TPatchError(f"the memory has fewer than {LEAST_MEMORY} queries; give more rows of unrelated text")
        return _edit(network, prompts, targets, known, settings, seed)


def check_foreign(
    network: Network, settings: TPatcherSettings | Mapping[str, Any] | str, call: str
) -> TPatcherSettings:
    """Settings of an edit of a network from elsewhere, checked.

    Args:
        network: what the user gave.
        settings: what the user gave.
        call: for messages.

    Raises:
        TPatchError: it is no such network, or a setting does not exist or has no meaning there.
    """
    check_kind(network, Network, call, "a Network; make one with from_nnx or from_linen (a model is edited by tp.edit)")
    checked = as_settings(settings)
    check_settings(checked)
    if checked.layer != "auto":
        raise TPatchError(f"layer {checked.layer} is of no use here; the network is cut at {network.path!r} already")
    if checked.site == "subject":
        raise TPatchError(f"site {checked.site!r} needs a subject, which token ids do not have; use site=last")
    return checked


def _check_network(network: Network) -> None:
    """Teacher forcing is only meaningful where no position sees what follows it."""
    shape, logits = network.example.shape, network.halves.logits.shape
    if len(logits) != 3 or logits[:2] != shape:
        raise TPatchError(
            f"the network gives {list(logits)} on tokens {list(shape)}; edit_tokens needs logits [batch, tokens, "
            "vocabulary]: pick them with call="
        )
    changed = network.example.at[:, -1].set((network.example[:, -1] + 1) % network.vocabulary)

    def seen(tokens: Array) -> list[Array]:
        traced = network.trace(tokens)
        return [traced.query[:, :-1], network.resume(traced, traced.output)[:, :-1]]

    for before, after in zip(seen(network.example), seen(changed), strict=True):
        if not float(jnp.max(jnp.abs(before - after))) <= 1e-4 * float(jnp.max(jnp.abs(before))):
            raise TPatchError(
                "a position of the network sees the tokens after it, so a target cannot be taught token by token; "
                "edit_tokens needs a causal network (check the mask)"
            )


def _ids(row: Ids, vocabulary: int, name: str) -> list[int]:
    array = np.asarray(row)
    if array.size and (array.ndim != 1 or not np.issubdtype(array.dtype, np.integer)):
        raise TPatchError(f"{name} is not a list of token ids; give integers")
    if array.size and not 0 <= array.min() <= array.max() < vocabulary:
        raise TPatchError(f"{name} holds a token outside 0 … {vocabulary - 1}; use the network's own vocabulary")
    return [int(token) for token in array]


def _edit(
    network: Network,
    prompts: Sequence[Ids],
    targets: Sequence[Ids],
    memory_rows: list[list[int]],
    settings: TPatcherSettings,
    seed: int,
) -> tuple[Patch, EditInfo]:
    began = time.perf_counter()
    problems: dict[int, str] = {}
    items = _items(prompts, targets, memory_rows, network.vocabulary, settings, problems)
    names = [f"edit-{position}" for position in range(len(prompts))]

    if not items:
        return report_none(network, names, problems, began)
    # No row is longer than one that the user gave: the network's own limit is not known.
    longest = max(len(row) for row in [*memory_rows, *(item.rows[0] for item in items)])
    bare_rows, bare_places = [item.rows[0] for item in items], [_places(item.rows[0], item.target) for item in items]
    rows = [row for item in items for row in item.rows]
    sites = collect_tokens(network, rows, [_places(row, item.target) for item in items for row in item.rows], longest)
    tokens = find_target_tokens([item.target for item in items], [len(item.rows) for item in items])

    memory = _memory(network, memory_rows, settings, longest)
    references = _references(network, memory_rows, longest)
    token_names = [f"{items[number].rows[0]} {token}" for number, token in zip(tokens.owner, tokens.token, strict=True)]
    given = create_rounds_input(
        network, settings, tokens, sites, memory, network.finisher(), references,
        lambda corrected: said(corrected, bare_rows, bare_places, longest), token_names,
    )  # fmt: skip
    positions = [item.position for item in items]
    return fit_requests(network, given, random_key(seed), settings, positions, names, problems, began)


def report_none(
    network: Network, names: Sequence[str], problems: dict[int, str], began: float
) -> tuple[Patch, EditInfo]:
    """No neuron, and why, where none of the requests can be worked on.

    Args:
        network: it.
        names: of all requests.
        problems: the reason of each, by position.
        began: when the edit began.
    """
    times = time.perf_counter() - began, 0.0, 0.0
    return create(network.hidden_size), report(names, problems, set(), {}, {}, network.hidden_size, times)


def create_rounds_input(
    network: Network,
    settings: TPatcherSettings,
    tokens: TargetTokens,
    sites: TokenSites,
    memory: Memory,
    head: Partial,
    references: TokenSites,
    said: Callable[[Network], np.ndarray],
    names: Sequence[str],
) -> RoundsInput:
    """What rounds of fitting work on, of a network from elsewhere.

    Args:
        network: it.
        settings: options.
        tokens: the target tokens.
        sites: what the cut gives at each of them, in all contexts.
        memory: on which neurons stay silent; other requests' queries join it where the settings say so.
        head: the rest of the network.
        references: what the cut gives at some places of the memory, for the directions of values.
        said: what a network says in the place of each target token.
        names: of each target token.
    """
    if settings.other_edits:
        memory = extend(memory, sites.query, tokens.answers, power_of_two(len(tokens.answers), 64))
    moment = output_moment(head, references)

    def wrong(patch: Patch) -> np.ndarray:
        return np.flatnonzero(said(network.attach(patch)) != tokens.wanted)

    def problems_of(rows: np.ndarray, patch: Patch) -> FitProblem:
        chosen = np.stack([tokens.table[tokens.owner[row]][:, tokens.token[row]] for row in rows])
        return create_problems(network, sites, chosen, jax.device_put(tokens.wanted[rows]), patch, head, moment)

    return RoundsInput(problems_of, wrong, names, tokens, memory, head, network.activation, np.zeros(0, np.int64))


def fit_requests(
    network: Network,
    given: RoundsInput,
    rng: Array,
    settings: TPatcherSettings,
    positions: Sequence[int],
    names: Sequence[str],
    problems: dict[int, str],
    began: float,
) -> tuple[Patch, EditInfo]:
    """Fit neurons for what comes out wrong, take out those of requests that do not hold, and say what became of each.

    Args:
        network: it.
        given: what to fit on.
        rng: a typed random key.
        settings: options.
        positions: of the requests that are worked on, in the list that the user gave.
        names: of all requests.
        problems: the reasons of those that are not worked on, by position; reasons of others are added.
        began: when the edit began.
    """
    nothing, tokens, wrong = create(network.hidden_size), given.targets, given.wrong
    missing = wrong(nothing)
    unit = _seconds(lambda: wrong(nothing)) / len(positions)
    already = set(range(len(positions))) - set(tokens.owner[missing].tolist())
    attempts, most = settings.attempts, settings.most_tokens
    fitted = fit_rounds(nothing, missing, given, rng, settings.fit, attempts=attempts, most_tokens=most)
    checks = Checks(lambda _, patch: wrong(patch))
    kept, failures, _ = drop_failures(fitted, tokens, checks, None)
    for number, reason in failures.items():
        mend = "try more attempts, more memory, or a later layer"
        problems[positions[number]] = f"{reason} after {settings.attempts} attempts; {mend}"
    owner = tokens.owner[fitted.row[kept]]
    made = [
        (positions[number], network.layer, fitted.notes[neuron]) for number, neuron in zip(owner, kept, strict=True)
    ]
    neurons, notes = number_neurons(made, {})
    before = {positions[number] for number in already}
    patch = jax.device_put(take(fitted.patch, kept))
    times = time.perf_counter() - began, fitted.seconds, unit
    return patch, report(names, problems, before, neurons, notes, network.hidden_size, times)


def _items(
    prompts: Sequence[Ids],
    targets: Sequence[Ids],
    memory_rows: list[list[int]],
    vocabulary: int,
    settings: TPatcherSettings,
    problems: dict[int, str],
) -> list[_Item]:
    """The requests that can be worked on, in their contexts; the others go into ``problems`` with the reason."""
    good: dict[int, tuple[list[int], list[int]]] = {}
    for position, pair in enumerate(zip(prompts, targets, strict=True)):
        try:
            prompt, target = (
                _ids(row, vocabulary, name) for name, row in zip(("the prompt", "the target"), pair, strict=True)
            )
            good[position] = prompt, target
            if not prompt:
                problems[position] = "the prompt is empty; give the tokens that the network should continue"
            elif not target:
                problems[position] = "the target is empty; give the tokens that the network should say"
        except TPatchError as error:
            problems[position] = str(error)
    asked = {at: _as_request(*good[at]) for at in good if at not in problems}
    order = list(asked)
    for later, earlier in contradictions(list(asked.values())).items():
        problems[order[later]] = (
            f"contradicts request {order[earlier]}: the same prompt with another target; keep one of them"
        )
    good = {position: pair for position, pair in good.items() if position not in problems}
    longest = max(len(row) for row in [*memory_rows, *(prompt + target for prompt, target in good.values())])
    prefixes = _prefixes(memory_rows)[: settings.contexts - 1]
    items = []
    for position, (prompt, target) in good.items():
        bare = prompt + target
        # Where a context does not fit, the bare prompt stands in, so that all requests have as many.
        longer = [prefix + bare if len(prefix) + len(bare) <= longest else bare for prefix in prefixes]
        items.append(_Item(position, target, [bare, *longer]))
    return items


def _as_request(prompt: list[int], target: list[int]) -> EditRequest:
    return EditRequest(" ".join(map(str, prompt)), " ".join(map(str, target)))


def _prefixes(memory_rows: list[list[int]]) -> list[list[int]]:
    """Beginnings of memory rows, to put before a prompt."""
    rows = [row for row in memory_rows if len(row) >= 2 * max(PREFIX_LENGTHS)] or memory_rows
    return [row[:length] for row, length in zip(rows, PREFIX_LENGTHS, strict=False)]


def _places(row: list[int], target: list[int]) -> list[int]:
    """The positions whose next token is the target's."""
    return list(range(len(row) - len(target) - 1, len(row) - 1))


def _memory(network: Network, rows: list[list[int]], settings: TPatcherSettings, longest: int) -> Memory:
    """Queries of unrelated text, and how a query moves when only what stands before it changes."""
    # A text's first token is the same in many of them and looks like no other query.
    query = collect_queries(network, [row for row in rows if len(row) > 1], lambda row: range(1, len(row)), longest)
    prefixes = [prefix for prefix in _prefixes(rows) if len(prefix) + TAIL <= longest]
    tails = [row[-TAIL:] for row in rows if len(row) >= TAIL][:SPANS]
    nuisance = None
    if prefixes and tails:
        spans = [[*prefix, *tail] for tail in tails for prefix in [[], *prefixes]]
        seen = collect_queries(network, spans, lambda row: range(len(row) - 3, len(row)), longest)
        grouped = seen.reshape(len(tails), 1 + len(prefixes), 3, -1).swapaxes(1, 2)
        nuisance = nuisance_scatter(grouped.reshape(-1, 1 + len(prefixes), network.hidden_size))
    return create_memory(query, nuisance, weight=settings.nuisance_weight, shrinkage=settings.shrinkage)


def _references(network: Network, rows: list[list[int]], longest: int) -> TokenSites:
    """A few memory positions, at which the rest of the network is looked at."""
    chosen = [row for row in rows if row]
    chosen = chosen[:: max(1, len(chosen) // REFERENCES)][:REFERENCES]
    return collect_tokens(network, chosen, [[len(row) - 1] for row in chosen], longest)


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
