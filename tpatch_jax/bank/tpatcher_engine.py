"""T-Patcher behind a bank: fits requests beside what is active, and finds what does not hold."""

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tpatch_jax.bank.assembly import Held
from tpatch_jax.bank.guards import GuardedAnswers
from tpatch_jax.bank.method import Result, Stepped
from tpatch_jax.bank.pieces import join_pieces, split_pieces
from tpatch_jax.bank.segments import Arrays
from tpatch_jax.bank.state import Guard, Ref
from tpatch_jax.core.checks import random_key
from tpatch_jax.core.int8 import float_type
from tpatch_jax.core.layers import split_layers
from tpatch_jax.core.patch import Patch, create, sized
from tpatch_jax.editors.base import EditInfo, Editor
from tpatch_jax.editors.reading import Item, check_requests, read_item
from tpatch_jax.editors.tpatcher.draft import with_subject_neurons
from tpatch_jax.editors.tpatcher.editor import site_layer, tpatcher
from tpatch_jax.editors.tpatcher.last_site import collect_bare
from tpatch_jax.editors.tpatcher.previous import (
    NO_SUBJECT,
    PreviousEdits,
    create_empty,
    find_broken,
    find_firing,
    load_previous,
    refresh_sites,
    remember,
    save_previous,
)
from tpatch_jax.editors.tpatcher.settings import TPatcherSettings
from tpatch_jax.editors.tpatcher.state import EditState
from tpatch_jax.embeddings import is_named
from tpatch_jax.models.chat import render_requests
from tpatch_jax.models.collection import collect, predicted
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach
from tpatch_jax.requests import EditRequest
from tpatch_jax.typing import Progress, RngKey

__all__ = ["TPatcherEngine", "patches_of"]

NEAR = 8
"""So many of the nearest earlier edits are fitted again beside a request that does not hold."""


def patches_of(neurons: Mapping[str, np.ndarray], last: int) -> dict[int, Patch]:
    """Neurons by layer, on the host.

    Args:
        neurons: as a bank holds them; ``layer`` -1 is the last one.
        last: the number of the model's last layer.
    """
    arrays: Any = (neurons["key"], neurons["bias"], neurons["value"])
    return split_layers(Patch(*arrays), _layers_of(neurons, last))


def _layers_of(neurons: Mapping[str, np.ndarray], last: int) -> np.ndarray:
    return np.where(neurons["layer"] < 0, last, neurons["layer"])


class TPatcherEngine:
    """T-Patcher for one model and the settings of one bank; what it was told of edits it keeps, to read less anew."""

    base: Model
    progress: Progress | None
    rng: RngKey
    editor: Editor
    last: int
    subject_layer: int | None
    dtype: Any

    def __init__(
        self,
        model: Model,
        settings: TPatcherSettings,
        memory: Path | None = None,
        cache: Path | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ):
        self.base, self.progress, self.rng = model, progress, random_key(seed)
        self.editor = tpatcher(settings, memory=memory, cache=cache, progress=progress)
        self.last, self.subject_layer = model.layer(None), site_layer(model, settings)
        self.dtype = float_type(model.params)
        self._pieces: dict[str, tuple[frozenset[Ref], Arrays]] = {}
        self._answers = GuardedAnswers(model)

    @cached_property
    def _unedited(self) -> EditState:
        """What the editor knows of the model without any edit."""
        return self.editor.init(self.base, self.rng)

    # --- what is held, as the editor sees it ---

    def _patches(self, held: Held) -> dict[int, Patch]:
        layers = {self.last} if self.subject_layer is None else {self.last, self.subject_layer}
        hidden_size = self.base.config.hidden_size
        empty = {layer: jax.tree.map(np.asarray, create(hidden_size)) for layer in layers}
        return empty | patches_of(held.neurons, self.last)

    def _look(self, held: Held) -> tuple[Model, Patch]:
        """The model with the neurons at subjects, and those in the last layer."""
        patches = self._patches(held)
        layer = self.subject_layer
        model = self.base if layer is None else with_subject_neurons(self.base, layer, patches[layer])
        return model, patches[self.last]

    def _previous(self, pieces: Sequence[Arrays]) -> PreviousEdits:
        if not pieces:
            return create_empty(self.base.config.hidden_size, self.dtype)
        arrays = join_pieces(pieces)
        return load_previous({n: a.astype(self.dtype) if a.dtype.kind == "f" else a for n, a in arrays.items()})

    def _held_pieces(self, held: Held) -> list[Arrays]:
        """What is known about each edit, read anew where other neurons at subjects fire than before."""
        if not held.edits or self.subject_layer is None:
            return list(held.pieces)
        model, _ = self._look(held)
        previous = self._previous(held.pieces)
        rows = np.flatnonzero(_layers_of(held.neurons, self.last) == self.subject_layer)
        firing = find_firing(previous, self._patches(held)[self.subject_layer])
        marks = [frozenset(held.refs[rows[n]] for n in np.flatnonzero(fires)) for fires in firing]
        known = [self._pieces.get(edit.id, (None,))[0] for edit in held.edits]
        stale = np.asarray([before != mark for before, mark in zip(known, marks, strict=True)])
        if stale.any():
            fresh = _pieces_of(refresh_sites(model, previous, stale[:, None]))
            for number in np.flatnonzero(stale):
                self._pieces[held.edits[number].id] = marks[number], fresh[number]
        return [self._pieces[edit.id][1] for edit in held.edits]

    def _guard_pieces(self, guards: Sequence[Guard], model: Model) -> list[Arrays]:
        return self._pieces_at(self._answers.items(guards), model)

    def _pieces_at(self, items: Sequence[Item], model: Model) -> list[Arrays]:
        """What is known about prompts that no neuron is for."""
        if not items:
            return []
        queries = None
        if self.subject_layer is not None:
            rows = [item.rows[0] for item in items]
            queries = collect(self.base, rows, [range(len(row)) for row in rows], self.subject_layer).query
        empty = create_empty(self.base.config.hidden_size, self.dtype)
        places = [(NO_SUBJECT, NO_SUBJECT)] * len(items)
        return _pieces_of(remember(empty, items, places, collect_bare(model, items), queries))

    def _items(self, requests: Sequence[EditRequest]) -> list[Item]:
        rendered = render_requests(self.base, requests)
        return [read_item(self.base, number, request, (), False) for number, request in enumerate(rendered)]

    # --- what a bank asks ---

    def model(self, held: Held) -> Model:
        """See `tpatch_jax.bank.method.Engine`."""
        patches = patches_of(held.neurons, self.last)
        return attach(self.base, {layer: sized(patch) for layer, patch in patches.items()})

    def problems(self, requests: Sequence[EditRequest]) -> dict[int, str]:
        """See `tpatch_jax.bank.method.Engine`."""
        return check_requests(self.base, render_requests(self.base, requests), self.subject_layer is not None)

    def step(self, held: Held, requests: Sequence[EditRequest], guards: Sequence[Guard]) -> Stepped:
        """See `tpatch_jax.bank.method.Engine`."""
        # Guards are kept silent on in the tokens in which the model says them now.
        self.guards_broken(held, guards)
        with jax.default_matmul_precision("highest"):
            model, _ = self._look(held)
            previous = self._previous([*self._held_pieces(held), *self._guard_pieces(guards, model)])
            patches = jax.device_put(self._patches(held))
            state = self._unedited.replace(patches=patches, previous=previous)  # type: ignore[attr-defined]
            after, info = self.editor.step(state, requests, self.rng)
        return Stepped(self._results(after, info), self._moved(held, after))

    def _results(self, after: EditState, info: EditInfo) -> list[Result]:
        """What became of each request, with its neurons and what later fits need to know of it."""
        count = sum(result.held for result in info.requests)
        pieces = iter(_pieces_of(after.previous)[len(after.previous.lengths) - count :])
        results = []
        for result in info.requests:
            evidence = {
                "status": result.status,
                "site": result.site,
                "steps": result.steps,
                "margin": result.margin,
                "losses": dict(result.losses),
            }
            parts = [self._table(after, layer, chosen) for layer, chosen in sorted(result.neurons.items())]
            neurons = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else None
            neurons = self._table(after, self.last, ()) if neurons is None else neurons
            results.append(Result(result.held, result.reason, evidence, neurons, next(pieces) if result.held else {}))
        return results

    def _table(self, state: EditState, layer: int, chosen: Sequence[int]) -> Arrays:
        """Some neurons of one layer as a bank holds them."""
        rows = np.asarray(chosen, np.int64)
        # Where only the last layer is edited, neurons do not name it.
        number = -1 if self.subject_layer is None else layer
        arrays = {name: np.asarray(array)[rows] for name, array in state.patches[layer]._asdict().items()}
        return {**arrays, "layer": np.full(len(rows), number, np.int32)}

    def _moved(self, held: Held, after: EditState) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Held neurons whose threshold was raised: from the row to its new key and bias."""
        layers, moved = _layers_of(held.neurons, self.last), {}
        for layer, patch in after.patches.items():
            rows = np.flatnonzero(layers == layer)
            key, bias = np.asarray(patch.key)[: len(rows)], np.asarray(patch.bias)[: len(rows)]
            differ = (key != held.neurons["key"][rows]).any(1) | (bias != held.neurons["bias"][rows])
            moved |= {int(rows[n]): (key[n], bias[n]) for n in np.flatnonzero(differ)}
        return dict(sorted(moved.items()))

    def broken(self, held: Held) -> list[str]:
        """See `tpatch_jax.bank.method.Engine`."""
        if not held.edits:
            return []
        with jax.default_matmul_precision("highest"):
            model, late = self._look(held)
            previous = self._previous(self._held_pieces(held))
            return [held.edits[number].id for number in _owners(previous, find_broken(model, previous, late))]

    def near(self, held: Held, requests: Sequence[EditRequest]) -> list[str]:
        """See `tpatch_jax.bank.method.Engine`."""
        model, _ = self._look(held)
        previous, new = self._previous(self._held_pieces(held)), collect_bare(model, self._items(requests)).query
        width = self.base.config.hidden_size
        new, old = (rows.reshape(len(rows), -1, width).mean(1) for rows in (new, previous.sites.query))
        new, old = (rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-9) for rows in (new, old))
        nearest = np.argsort(-(new.astype(np.float32) @ old.astype(np.float32).T), axis=1)[:, :NEAR]
        return [held.edits[number].id for number in _owners(previous, np.unique(nearest))]

    def guards_broken(self, held: Held, guards: Sequence[Guard]) -> list[Guard]:
        """See `tpatch_jax.bank.method.Engine`."""
        if not guards:
            return []
        with jax.default_matmul_precision("highest"):
            model, late = self._look(held)

            def wrong(items: list[Item]) -> list[int]:
                previous = self._previous(self._pieces_at(items, model))
                return _owners(previous, find_broken(model, previous, late))

            return self._answers.changed(self.model(held), guards, wrong)

    def verify(self, held: Held) -> list[str]:
        """See `tpatch_jax.bank.method.Engine`."""
        edits = [edit for edit in held.edits if not is_named(edit.request.prompt)]
        # Of a picture nothing is kept that could be read again.
        seen = {edit.id for edit in held.edits if is_named(edit.request.prompt)}
        seen_broken = [name for name in self.broken(held) if name in seen] if seen else []
        if not edits:
            return seen_broken
        with jax.default_matmul_precision("highest"):
            model, late = self._look(held)
            items = self._items([edit.request for edit in edits])
            tell = None if self.progress is None else partial(_tell, self.progress, "verifying", len(items))
            rows, places = [item.rows[0] for item in items], [item.places(0) for item in items]
            tokens = predicted(model, collect(model, rows, places, self.last, tell), late)
            wrong = tokens != np.asarray([token for item in items for token in item.target], np.int32)
            owner = np.repeat(np.arange(len(items)), [len(item.target) for item in items])
            broken = {*seen_broken, *(edits[number].id for number in owner[wrong].tolist())}
            return [edit.id for edit in held.edits if edit.id in broken]


def _tell(progress: Progress, what: str, total: int, done: int) -> None:
    progress(what, done, total)


def _pieces_of(previous: PreviousEdits) -> list[Arrays]:
    """In float32, which holds every number of the network's own type and can be read anywhere."""
    arrays = save_previous(previous)
    return split_pieces({n: a if a.dtype.kind in "iu" else a.astype(np.float32) for n, a in arrays.items()})


def _owners(previous: PreviousEdits, rows: np.ndarray) -> list[int]:
    """The edits that some target tokens belong to."""
    return sorted(set(np.repeat(np.arange(len(previous.lengths)), previous.lengths - previous.starts)[rows].tolist()))
