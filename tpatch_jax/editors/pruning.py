"""Patches with fewer neurons that say the same: what says the same is merged, what nothing needs is dropped.

Nothing is taken away on trust. Each change is tried on everything that its edits say (the prompts, in contexts, in
other spellings and wordings), on other things about their subjects, and on the memory; at the end all edits are asked
together, and an edit that has lost anything gets its neurons back.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from tpatch_jax.core import ffn
from tpatch_jax.core.arguments import as_path, check_call, check_kind
from tpatch_jax.core.devices import automatically
from tpatch_jax.core.layers import LayerPatches
from tpatch_jax.core.patch import Patch, sized
from tpatch_jax.core.sizes import power_of_two
from tpatch_jax.editors.base import EditInfo, RequestInfo
from tpatch_jax.editors.model_memory import ModelMemory, collect_model_memory
from tpatch_jax.editors.prune_checks import read_check_rows
from tpatch_jax.editors.prune_trials import UNMOVED, CutRows, Outcome, ask_rows, can_be_cut
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.collection import collect
from tpatch_jax.models.model import Model, check_loaded
from tpatch_jax.models.patching import attach, by_layer, detach
from tpatch_jax.requests import EditRequest, as_requests
from tpatch_jax.storage.cache import cache_folder
from tpatch_jax.typing import Progress

__all__ = ["PruneInfo", "prune_patches"]

ALIKE = 0.98
"""Keys of this cosine recognise the same."""
AUDIBLE = 0.5
"""A prompt is one of a neuron's if it responds there at least this share of its strongest response."""
LOUDER = 1.01
SURE, SHARE = 1.0, 0.5
"""Where a target was said by a margin, at least this share of it has to be left, of margins above `SURE` that of it."""
SAME_LINE = 1 - 1e-6
"""Values of this cosine lie on one line."""
ROUNDS = 4
ROWS_AT_ONCE = 1 << 22
KINDS = ("merged", "dropped", "levelled")


class PruneInfo(NamedTuple):
    """What pruning did, and what it cost.

    Attributes:
        neurons: how many there are now.
        neurons_before: how many there were.
        parameters: how many numbers they are.
        parameters_before: the same before.
        bytes: of their arrays.
        bytes_before: the same before.
        merged: so many went because others with the same key took over their values.
        dropped: so many went because nothing needs them.
        levelled: so many went because an edit holds without the neuron that keeps its response level.
        edits: so many edits held before, and hold.
        prompts: after so many prompts their targets were said before, and are.
        kept: so many prompts should stay as they are, and do.
        memory: on so many queries of unrelated text no response grew.
        restored: ids of edits that got all their neurons back, since together with others they would have been lost.
    """

    neurons: int
    neurons_before: int
    parameters: int
    parameters_before: int
    bytes: int
    bytes_before: int
    merged: int
    dropped: int
    levelled: int
    edits: int
    prompts: int
    kept: int
    memory: int
    restored: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {**self._asdict(), "restored": list(self.restored)}


class _Unit(NamedTuple):
    """Neurons that only make sense together: one, or the two of a level response.

    Attributes:
        layer: their layer.
        key: ``[n, d]``.
        bias: ``[n]``.
        value: ``[n, d]``, all along one line.
    """

    layer: int
    key: Float[np.ndarray, "n hidden"]
    bias: Float[np.ndarray, " n"]
    value: Float[np.ndarray, "n hidden"]

    @property
    def coefficients(self) -> Float[np.ndarray, " n"]:
        """Each value as a multiple of the first one's direction."""
        first = self.value[0].astype(np.float64)
        return self.value.astype(np.float64) @ (first / max(float(np.linalg.norm(first)), 1e-300))


_Change = Mapping[int, _Unit | None]
"""What becomes of some units, by number; ``None`` drops one."""


@automatically
def prune_patches(
    model: Model,
    patches: LayerPatches | Patch,
    requests: Sequence[EditRequest | Mapping[str, Any]],
    info: EditInfo,
    *,
    memory: str | Path | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> tuple[dict[int, Patch], EditInfo, PruneInfo]:
    """Patches with fewer neurons for the same edits.

    Neurons with the same key become one with the sum of their values; neurons that no prompt needs go; and of a pair
    ``act(z)/p − act(z − p)/p``, whose response is level, the second goes where its edits hold without it, the first's
    value then being that at their own prompts. Each step is checked, on the edits' prompts as they are, in contexts, in
    other spellings and wordings, on other things about their subjects, and on unrelated text, where no response may
    grow. Edits that did not hold keep their neurons.

    Args:
        model: the model that the patches are for; not changed.
        patches: the neurons, ``{layer: [n, d]}``, or one patch for the last layer.
        requests: what they are for.
        info: what became of them; see `tpatch_jax.save_patches`, which takes the same.
        memory: a text file for the memory; by default text is sampled from the model, if it is a decoder.
        cache: keep that text on disk between runs, where `tpatch_jax.edit` keeps it.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        The patches, ``info`` with each request's neurons by their new numbers, and the `PruneInfo`.

    Raises:
        TPatchError: requests, info and neurons do not belong together.

    Example:
        >>> import tpatch_jax as tp
        >>> patches, info = tp.edit(model, requests)  # doctest: +SKIP
        >>> fewer, info, pruned = tp.prune_patches(model, patches, requests, info)  # doctest: +SKIP
        >>> pruned.neurons < pruned.neurons_before  # doctest: +SKIP
        True
    """
    call = "prune_patches(model, patches, requests, info)"
    check_loaded(model, call)
    requests = as_requests(requests)
    check_kind(info, EditInfo, call, "an EditInfo; give the second of what `edit` returned")
    memory = None if memory is None else as_path(memory, call, "a text file; give its path")
    check_call(progress=progress)
    layers = {layer: jax.tree.map(np.asarray, patch) for layer, patch in by_layer(model, patches).items()}
    model = detach(model)
    pruner = _Pruner(model, layers, requests, info, _known(model, layers, memory, cache, progress), progress)
    return pruner.run(info)


def _known(
    model: Model, layers: Mapping[int, Patch], memory: Path | None, cache: bool, progress: Progress | None
) -> dict[int, ModelMemory]:
    """What is known about the model at each layer with neurons; nothing of a model that samples no text itself."""
    if model.config.architecture != "decoder" and memory is None:
        return {}
    folder, texts = cache_folder() if cache else None, []
    return {
        layer: collect_model_memory(model, layer, memory, cache=folder, progress=progress, texts=texts)
        for layer in layers
    }


def _joined(units: Sequence["_Unit"]) -> Patch:
    """The neurons of some units, one after the other, on the host."""
    fields: list[Any] = [np.concatenate([getattr(unit, name) for unit in units]) for name in Patch._fields]
    return Patch(*fields)


def _flat(result: RequestInfo) -> tuple[tuple[int, int], ...]:
    return tuple((layer, int(number)) for layer in sorted(result.neurons) for number in result.neurons[layer])


class _Pruner:
    """Units and groups of edits, and what of them stands at present."""

    def __init__(
        self,
        model: Model,
        layers: dict[int, Patch],
        requests: Sequence[EditRequest],
        info: EditInfo,
        known: dict[int, ModelMemory],
        progress: Progress | None,
    ) -> None:
        self.model, self.layers, self.known, self.progress = model, layers, known, progress
        self.results = info.requests
        owned = [_flat(result) for result in info.requests]
        self._check(owned, len(requests))
        distinct = [neurons for neurons in dict.fromkeys(owned) if neurons]
        self.members = [[n for n, neurons in enumerate(owned) if neurons == group] for group in distinct]
        self.units: list[_Unit] = []
        self.group: list[int] = []
        for number, neurons in enumerate(distinct):
            for unit in self._split(neurons):
                self.units.append(unit)
                self.group.append(number)
        # Groups whose neurons were merged stand or fall together.
        self.joined = list(range(len(distinct)))
        self.now: list[_Unit | None] = list(self.units)
        first = known[min(known)] if known else None
        self.rows = read_check_rows(model, [[requests[n] for n in members] for members in self.members], first)
        self.asked = [*self.rows.said, *self.rows.kept]
        self.group_of = np.concatenate([self.rows.said_group, self.rows.kept_group])
        self.kinds: dict[int, str] = {}
        self.cut: CutRows | None = None
        # Of each row: what was said with all neurons, and what was when it was last asked, with which units.
        self.margin = np.full(len(self.asked), np.inf)
        self.token = np.full(len(self.asked), -1, np.int32)
        self.lost = np.zeros(len(self.asked), bool)
        self.asked_at = np.full(len(self.asked), -1)
        self.states: list[list[_Unit | None]] = []
        self.loudness: dict[int, tuple[_Unit, float]] = {}

    def _check(self, owned: Sequence[tuple[tuple[int, int], ...]], requests: int) -> None:
        there = {(layer, n) for layer, patch in self.layers.items() for n in range(patch.key.shape[0])}
        named = [neuron for neurons in set(owned) for neuron in neurons]
        if requests != len(owned) or len(named) != len(set(named)) or set(named) != there:
            raise TPatchError(
                f"info is of {len(owned)} requests with {len(set(named))} neurons, and {requests} requests and "
                f"{len(there)} neurons are given; give what one edit returned, or what one folder of patches holds"
            )

    def _split(self, neurons: Sequence[tuple[int, int]]) -> list[_Unit]:
        """A group's neurons as units: two in turn with one key and opposite values are a level response."""
        units, at = [], 0
        while at < len(neurons):
            layer, number = neurons[at]
            patch, pair = self.layers[layer], False
            if at + 1 < len(neurons) and neurons[at + 1][0] == layer:
                other = neurons[at + 1][1]
                pair = np.array_equal(patch.key[number], patch.key[other]) and np.array_equal(
                    patch.value[number], -patch.value[other]
                )
            chosen = [number, neurons[at + 1][1]] if pair else [number]
            units.append(_Unit(layer, *(np.asarray(leaf)[chosen] for leaf in patch)))
            at += len(chosen)
        return units

    def component(self, group: int) -> int:
        """The first of the groups that stand or fall with this one."""
        while self.joined[group] != group:
            group = self.joined[group]
        return group

    def groups_with(self, groups: set[int]) -> set[int]:
        """Some groups, and those that stand or fall with them."""
        wanted = {self.component(group) for group in groups}
        return {group for group in range(len(self.members)) if self.component(group) in wanted}

    def _patches(self, units: Sequence[_Unit | None]) -> dict[int, Patch]:
        """The neurons of some units, by layer."""
        there = [unit for unit in units if unit is not None]
        parts = {layer: [unit for unit in there if unit.layer == layer] for layer in self.layers}
        return {layer: jax.device_put(sized(_joined(some))) for layer, some in parts.items() if some}

    def corrected(self, units: Sequence[_Unit | None]) -> Model:
        """The model with some units attached."""
        patches = self._patches(units)
        return attach(self.model, patches) if patches else self.model

    def failing(self, units: Sequence[_Unit | None], groups: set[int] | None = None) -> set[int]:
        """The groups, of some or of all, for which units say too little.

        A target that was said has to be said still, with enough of its margin; what should stay has to be what it was,
        or what the unedited model says. Asked is only what hears a change; of each group the row that hears it most
        comes first, and the others only where that is well.
        """
        rows = np.flatnonzero(self.matters)
        if groups is not None:
            rows = rows[np.isin(self.group_of[rows], list(groups))]
        heard = self._movement(self.units, units, rows)
        rows, heard = rows[heard > UNMOVED], heard[heard > UNMOVED]
        known = np.zeros(len(rows), bool)
        for number in np.unique(self.asked_at[rows][self.asked_at[rows] >= 0]).tolist():
            same = np.flatnonzero(self.asked_at[rows] == number)
            known[same] = self._movement(self.states[number], units, rows[same]) <= UNMOVED
        failing = set(self.group_of[rows[known & self.lost[rows]]].tolist())
        left = ~known & ~np.isin(self.group_of[rows], list(failing))
        rows, heard = rows[left], heard[left]
        most: dict[int, tuple[float, int]] = {}
        for row, by in zip(rows.tolist(), heard.tolist(), strict=True):
            if row < len(self.rows.said):
                group = int(self.group_of[row])
                most[group] = max(most.get(group, (-1.0, row)), (by, row))
        first = np.asarray(sorted(row for _, row in most.values()), int)
        failing |= self._ask_for_lost(units, first)
        rest = np.setdiff1d(rows, first)
        return failing | self._ask_for_lost(units, rest[~np.isin(self.group_of[rest], list(failing))])

    def _ask_for_lost(self, units: Sequence[_Unit | None], rows: Int[np.ndarray, " rows"]) -> set[int]:
        """The groups of those of some rows that units say too little to."""
        if not len(rows):
            return set()
        said = rows < len(self.rows.said)
        unknown = rows[~said & (self.token[rows] < 0)]
        self.token[unknown] = self._ask(self.units, unknown).token
        now = self._ask(units, rows)
        before, lost = self.margin[rows], np.zeros(len(rows), bool)
        lost[said] = ~(now.margin >= SHARE * np.minimum(before, SURE))[said]
        changed = np.flatnonzero(~said & (now.token != self.token[rows]))
        lost[changed] = now.token[changed] != self._ask([], rows[changed]).token
        self.lost[rows], self.asked_at[rows] = lost, len(self.states)
        self.states.append(list(units))
        return set(self.group_of[rows[lost]].tolist())

    def _ask(self, units: Sequence[_Unit | None], rows: Int[np.ndarray, " rows"]) -> Outcome:
        """What is said to some rows with some units."""
        if not len(rows):
            return Outcome(np.zeros(0), np.zeros(0, np.int32))
        if self.cut is None:
            return ask_rows(self.corrected(units), [self.asked[row] for row in rows.tolist()])
        return self.cut.ask(self._patches(units), rows)

    def _movement(
        self, before: Sequence[_Unit | None], after: Sequence[_Unit | None], rows: Int[np.ndarray, " rows"]
    ) -> Float[np.ndarray, " rows"]:
        """How far rows hear that units change, as a share of what the network says; infinite where that is unknown."""
        changed = [(one, other) for one, other in zip(before, after, strict=True) if one is not other]
        if not changed:
            return np.zeros(len(rows))
        layers = {unit.layer for pair in changed for unit in pair if unit is not None}
        if self.cut is None or layers != {self.cut.layer}:
            return np.full(len(rows), np.inf)
        # Responses along one line are subtracted, others counted each as a change.
        parts: list[list[tuple[_Unit, float]]] = []
        for one, other in changed:
            here, there = ([] if unit is None else [(unit, sign)] for unit, sign in ((one, -1.0), (other, 1.0)))
            parts += [here + there] if here and there and _on_one_line(here[0][0], there[0][0]) else [here, there]
        parts = [part for part in parts if part]
        neurons = [(unit, sign) for part in parts for unit, sign in part]
        key = np.concatenate([unit.key for unit, _ in neurons]).astype(np.float32)
        bias = np.concatenate([unit.bias for unit, _ in neurons]).astype(np.float32)
        coefficient = np.concatenate([sign * unit.coefficients for unit, sign in neurons]).astype(np.float32)
        starts = np.cumsum([0, *(sum(len(unit.bias) for unit, _ in part) for part in parts)])[:-1]

        def change(query: Float[np.ndarray, "n hidden"]) -> Float[np.ndarray, " n"]:
            response = _activate(self.model.config.activation, query @ key.T + bias) * coefficient
            return np.abs(np.add.reduceat(response, starts, axis=1)).sum(1)

        return self.cut.movement(rows, change)

    def attempt(self, kind: str, changes: Sequence[_Change]) -> None:
        """Try changes together, at most one of each component, and keep those whose edits lose nothing by them."""
        taken: set[int] = set()
        chosen: list[tuple[_Change, set[int]]] = []
        for change in changes:
            groups = self.groups_with({self.group[number] for number in change})
            if not groups & (taken | self.settled) and self._is_quiet(change):
                taken |= groups
                chosen.append((change, groups))
        if not chosen:
            return
        trial = list(self.now)
        for change, _ in chosen:
            for number, unit in change.items():
                trial[number] = unit
        failing = self.failing(trial, taken)
        for change, groups in chosen:
            if not groups & failing:
                for number, unit in change.items():
                    self.now[number] = unit
                    self.kinds[number] = kind
                roots = sorted(self.component(group) for group in groups)
                for group in roots if kind == "merged" else ():
                    self.joined[group] = roots[0]

    def _is_quiet(self, change: _Change) -> bool:
        """Whether no changed unit responds more strongly on the memory than what it stands for."""
        for unit in change.values():
            known = self.known.get(unit.layer) if unit is not None else None
            if unit is None or known is None:
                continue
            old = [self.now[each] for each in change]
            before = sum(self._loudest(each, known) for each in old if each is not None)
            scale = float(np.linalg.norm(unit.value[0]))
            if self._loudest(unit, known) > LOUDER * before + 1e-6 * scale:
                return False
        return True

    def _loudest(self, unit: _Unit, known: ModelMemory) -> float:
        """The largest response on unrelated text, computed once for each unit."""
        kept = self.loudness.get(id(unit))
        if kept is None or kept[0] is not unit:
            kept = unit, float(np.max(np.abs(self.responses(unit, np.asarray(known.query))), initial=0))
            self.loudness[id(unit)] = kept
        return kept[1]

    def responses(self, unit: _Unit, query: Float[np.ndarray, "rows hidden"]) -> Float[np.ndarray, " rows"]:
        """How far a unit moves the FFN's output on each query, along its value: ``Σ act(q·k + b)·(v·v̂)``."""
        z = query @ unit.key.T.astype(query.dtype) + unit.bias
        return _activate(self.model.config.activation, z) @ unit.coefficients

    def run(self, info: EditInfo) -> tuple[dict[int, Patch], EditInfo, PruneInfo]:
        """Merge, drop, level, and check everything together."""
        steps: list[tuple[str, Callable[[], Any]]] = [
            ("reading edits", self._begin),
            ("merging neurons", self._merge),
            ("dropping neurons", self._drop),
            ("levelling responses", self._level),
            ("checking all edits", self._settle),
        ]
        for done, (name, step) in enumerate(steps):
            if self.progress:
                self.progress(name, done, len(steps))
            step()
        return self._result(info)

    def _begin(self) -> None:
        if can_be_cut(self.model, self.asked):
            self.cut = CutRows(self.model, self.asked, min(self.layers))
        said = np.arange(len(self.rows.said))
        self.margin[said] = self._ask(self.units, said).margin
        self.matters = self.margin > 0
        # An edit that does not hold keeps what it has: nothing would tell what it needs.
        self.settled = {
            number for number, members in enumerate(self.members) if not any(self.results[n].held for n in members)
        }
        firsts = {int(group): at for at, group in reversed(list(enumerate(self.rows.said_group.tolist())))}
        self.settled |= {group for group, at in firsts.items() if not self.margin[at] > 0}
        self.restored: set[int] = set()

    def _merge(self) -> None:
        """Units of one layer whose keys are alike: the earlier one takes over the value of the later one."""
        changes: list[_Change] = []
        keys = [unit.key[0] / max(float(np.linalg.norm(unit.key[0])), 1e-30) for unit in self.units]
        for layer in self.layers:
            numbers = [n for n, unit in enumerate(self.units) if unit.layer == layer]
            table = np.stack([keys[n] for n in numbers])
            alike = np.triu(table @ table.T > ALIKE, 1)
            for one, other in np.argwhere(alike).tolist():
                first, second = self.units[numbers[one]], self.units[numbers[other]]
                if len(first.bias) == len(second.bias):
                    value = first.value + second.value
                    changes.append({numbers[one]: first._replace(value=value), numbers[other]: None})
        # Of several rounds each takes one partner more.
        for _ in range(ROUNDS):
            left = [change for change in changes if all(self.now[n] is self.units[n] for n in change)]
            if not left:
                break
            changes = left
            self.attempt("merged", changes)

    def _drop(self) -> None:
        """Units that nothing needs: those of zeros, all of an edit at once, then one after the other."""
        zeros = [n for n, unit in enumerate(self.now) if unit is not None and not unit.value.any()]
        for number in zeros:
            # A neuron without a value says nothing, whoever it belongs to.
            self.now[number] = None
            self.kinds[number] = "dropped"
        of_group: dict[int, list[int]] = {}
        for number, unit in enumerate(self.now):
            if unit is not None:
                of_group.setdefault(self.component(self.group[number]), []).append(number)
        self.attempt("dropped", [dict.fromkeys(numbers) for numbers in of_group.values()])
        for place in range(max(map(len, of_group.values()), default=0)):
            # The first key of an edit is its own spelling's, which goes last.
            later = [numbers[::-1][place] for numbers in of_group.values() if len(numbers) > max(place, 1)]
            still = [number for number in later if self.now[number] is not None]
            alone = {self.component(self.group[n]) for n in still if self._remaining(of_group, n) < 2}
            self.attempt(
                "dropped", [{number: None} for number in still if self.component(self.group[number]) not in alone]
            )

    def _remaining(self, of_group: Mapping[int, Sequence[int]], number: int) -> int:
        return sum(self.now[n] is not None for n in of_group[self.component(self.group[number])])

    def _level(self) -> None:
        """One neuron in place of two, where the response need not be level: as strong as it was where it was asked."""
        pairs = self._of_two(range(len(self.now)))
        if not pairs or self.model.config.architecture != "decoder":
            return
        queries = self._queries_of_pairs(pairs)
        for way in (np.median, np.min):
            singles = {n: self._single(self._at(n), queries.get(n), way) for n in self._of_two(pairs)}
            by_component: dict[int, _Change] = {}
            for number, single in singles.items():
                if single is not None:
                    component = self.component(self.group[number])
                    by_component[component] = {**by_component.get(component, {}), number: single}
            # All of an edit at once, then what is left one after the other.
            self.attempt("levelled", list(by_component.values()))
            for place in range(max(map(len, by_component.values()), default=0)):
                parts = [list(change.items())[place] for change in by_component.values() if len(change) > max(place, 1)]
                self.attempt("levelled", [{n: single} for n, single in parts if self._of_two([n])])

    def _of_two(self, numbers: Sequence[int]) -> list[int]:
        """Those of some units that are still a pair."""
        return [n for n in numbers if (unit := self.now[n]) is not None and len(unit.bias) == 2]

    def _queries_of_pairs(self, pairs: Sequence[int]) -> dict[int, Float[np.ndarray, "rows hidden"]]:
        """Of each pair the query of each of its prompts at which it responds most strongly."""
        result: dict[int, Float[np.ndarray, "rows hidden"]] = {}
        for layer in {self._at(n).layer for n in pairs}:
            chosen = [n for n in pairs if self._at(n).layer == layer]
            groups = sorted({g for n in chosen for g in self.groups_with({self.group[n]})})
            rows = np.flatnonzero(np.isin(self.rows.said_group, groups))
            queries = self._queries(layer, rows)
            for number in chosen:
                theirs = np.isin(self.group_of[rows], list(self.groups_with({self.group[number]})))
                unit, loudest = self._at(number), []
                for at in np.flatnonzero(theirs):
                    z = queries[at] @ unit.key[0].astype(np.float32) + np.float32(unit.bias[0])
                    loudest.append((float(z.max()), queries[at][int(z.argmax())]))
                top = max((z for z, _ in loudest), default=0.0)
                if top > 0:
                    result[number] = np.stack([part for z, part in loudest if z > AUDIBLE * top])
        return result

    def _queries(self, layer: int, rows: Int[np.ndarray, " rows"]) -> list[Float[np.ndarray, "tokens hidden"]]:
        """What a layer's feed-forward network reads of some rows."""
        if self.cut is not None and self.cut.layer == layer:
            return [self.cut.queries(row) for row in rows.tolist()]
        tokens = [self.asked[row].tokens for row in rows.tolist()]
        query = collect(self.corrected(self.now), tokens, [range(len(row)) for row in tokens], layer).query
        return np.split(np.asarray(query, np.float32), np.cumsum([len(row) for row in tokens])[:-1])

    def _at(self, number: int) -> _Unit:
        unit = self.now[number]
        assert unit is not None
        return unit

    def _single(
        self, unit: _Unit, query: Float[np.ndarray, "rows hidden"] | None, way: Callable[[np.ndarray], Any]
    ) -> _Unit | None:
        """The first neuron of a pair, its value such that it responds as the pair does at one of its queries."""
        if query is None:
            return None
        first = unit._replace(key=unit.key[:1], bias=unit.bias[:1], value=unit.value[:1])
        alone, level = self.responses(first, query), self.responses(unit, query)
        strength = way(alone)
        if not strength > 0:
            return None
        share = float(np.median(level) / strength)
        return first._replace(value=(first.value * share).astype(unit.value.dtype))

    def _settle(self) -> None:
        """Ask all edits together; those that have lost anything get their neurons back."""
        for _ in range(ROUNDS):
            failing = self.groups_with(self.failing(self.now)) - self.restored
            if not failing:
                break
            self._restore(failing)
        else:
            if self.failing(self.now):
                self._restore(set(range(len(self.members))))

    def _restore(self, groups: set[int]) -> None:
        self.restored |= groups
        for number, group in enumerate(self.group):
            if group in groups:
                self.now[number] = self.units[number]
                self.kinds.pop(number, None)

    def _result(self, info: EditInfo) -> tuple[dict[int, Patch], EditInfo, PruneInfo]:
        patches: dict[int, Patch] = {}
        places: dict[int, dict[int, list[int]]] = {group: {} for group in range(len(self.members))}
        for layer in sorted(self.layers):
            parts, first = [], 0
            for number, unit in enumerate(self.now):
                if unit is None or unit.layer != layer:
                    continue
                numbers = range(first, first + len(unit.bias))
                # What was merged belongs to all edits that it says.
                for group in self.groups_with({self.group[number]}):
                    places[group].setdefault(layer, []).extend(numbers)
                parts.append(unit)
                first = numbers.stop
            if parts:
                patches[layer] = jax.device_put(_joined(parts))
        neurons: dict[int, dict[int, tuple[int, ...]]] = {
            n: {layer: tuple(some) for layer, some in places[group].items()}
            for group, members in enumerate(self.members)
            for n in members
        }
        results = tuple(one._replace(neurons=neurons.get(n, {})) for n, one in enumerate(info.requests))
        count, size, stored = _sizes(patches)
        before_count, before_size, before_stored = _sizes(self.layers)
        lost: dict[str, int] = dict.fromkeys(KINDS, 0)
        for number, kind in self.kinds.items():
            unit = self.now[number]
            lost[kind] += len(self.units[number].bias) - (0 if unit is None else len(unit.bias))
        said = self.margin[: len(self.rows.said)] > 0
        pruned = PruneInfo(
            neurons=count,
            neurons_before=before_count,
            parameters=size,
            parameters_before=before_size,
            bytes=stored,
            bytes_before=before_stored,
            merged=lost["merged"],
            dropped=lost["dropped"],
            levelled=lost["levelled"],
            edits=sum(result.held for result in info.requests),
            prompts=int(said.sum()),
            kept=len(self.rows.kept),
            memory=sum(len(known.query) for known in self.known.values()),
            restored=tuple(self.results[n].id for group in sorted(self.restored) for n in self.members[group]),
        )
        return patches, info._replace(requests=results, parameters_added=size), pruned


def _on_one_line(one: _Unit, other: _Unit) -> bool:
    """Whether two units move an output along one line, towards the same side."""
    first, second = (unit.value[0].astype(np.float64) for unit in (one, other))
    length = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) >= SAME_LINE * length > 0


def _sizes(patches: Mapping[int, Patch]) -> tuple[int, int, int]:
    """Neurons, numbers and bytes."""
    leaves = [leaf for patch in patches.values() for leaf in patch]
    count = sum(patch.bias.shape[0] for patch in patches.values())
    return count, sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves)


def _activate(name: str, z: Float[np.ndarray, "rows n"]) -> Float[np.ndarray, "rows n"]:
    """An activation of many numbers, in pieces of few sizes, so that little is compiled."""
    flat, parts = z.reshape(-1).astype(np.float32), []
    for first in range(0, flat.size, ROWS_AT_ONCE):
        part = flat[first : first + ROWS_AT_ONCE]
        padded = np.pad(part, (0, power_of_two(part.size) - part.size))
        parts.append(np.asarray(_compiled(name, padded))[: part.size])
    return np.concatenate([np.zeros(0, np.float32), *parts]).reshape(z.shape)


def _act(name: str, z: Any) -> Any:
    return ffn.ACTIVATIONS[name](z)


_compiled = jax.jit(_act, static_argnums=0)
