"""T-Patcher behind a bank: fits requests beside what is active, and finds what does not hold."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache as remembered
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpatch_jax.bank.assembly import Held, take_neurons
from tpatch_jax.bank.method import Engine, Result, Stepped
from tpatch_jax.bank.pieces import join_pieces, split_pieces
from tpatch_jax.bank.segments import Arrays
from tpatch_jax.bank.state import Guard, Ref
from tpatch_jax.core.checks import random_key
from tpatch_jax.core.patch import Patch, sized
from tpatch_jax.editors.reading import Item, check_requests, read_item
from tpatch_jax.editors.tpatcher.editor import TPatcherState, site_layer, tpatcher
from tpatch_jax.editors.tpatcher.last_site import collect_bare
from tpatch_jax.editors.tpatcher.previous import (
    NO_SUBJECT,
    PreviousEdits,
    broken,
    fires,
    load_earlier,
    nothing,
    refreshed,
    remember,
    save_earlier,
)
from tpatch_jax.editors.tpatcher.settings import PRESETS, TPatcherSettings
from tpatch_jax.models.collection import collect, predicted
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach
from tpatch_jax.requests import EditRequest
from tpatch_jax.storage.settings import change

__all__ = ["create_engine", "patch_of", "settings_of"]

Progress = Callable[[str, int, int], None]
NEAR = 8
"""So many of the nearest earlier edits are fitted again beside a request that does not hold."""


def _tell(progress: Progress, what: str, total: int, done: int) -> None:
    progress(what, done, total)


def settings_of(manifest: Mapping[str, Any]) -> TPatcherSettings:
    """The editor's options that a bank was made with."""
    return change(PRESETS[manifest["preset"]], manifest["settings"])


def patch_of(neurons: Mapping[str, np.ndarray]) -> Patch:
    """Neurons as a patch on the host; ``layer`` -1 means that they do not name it."""
    layer = neurons["layer"]
    named = layer if len(layer) and layer[0] >= 0 else None
    arrays: Any = (neurons["key"], neurons["bias"], neurons["value"], named)
    return Patch(*arrays)


def create_engine(
    model: Model,
    manifest: Mapping[str, Any],
    *,
    memory: Path | None = None,
    cache: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Engine:
    """T-Patcher for one model and the settings of one bank.

    Args:
        model: the model.
        manifest: the bank's, for its settings.
        memory: a text file on which patches stay silent.
        cache: folder where query memories are kept.
        seed: the same seed gives the same patches.
        progress: called with what is being done, how much is done, and how much there is.
    """
    settings, key = settings_of(manifest), random_key(seed)
    editor = tpatcher(settings, memory=memory, cache=cache, progress=progress)
    known: dict[str, tuple[frozenset[Ref], Arrays]] = {}
    last, layer, hidden_size = model.layer(None), site_layer(model, settings), model.config.hidden_size
    dtype = jax.tree.leaves(model.params)[0].dtype

    @remembered
    def fresh() -> TPatcherState:
        return editor.init(model, key)

    def split(held: Held) -> tuple[np.ndarray, np.ndarray]:
        layers = held.neurons["layer"]
        deep = (layers >= 0) & (layers != last)
        return np.flatnonzero(deep), np.flatnonzero(~deep)

    def parts(held: Held) -> tuple[Model, Patch, Patch]:
        """The model with the neurons at subjects, those neurons, and those in the last layer."""
        rows = split(held)
        deep, late = (patch_of(take_neurons(held.neurons, chosen)) for chosen in rows)
        return (attach(model, sized(deep)) if len(rows[0]) else model), deep, late._replace(layer=None)

    def pieces(held: Held) -> list[Arrays]:
        """What is known about each edit, read anew where other neurons at subjects fire than before."""
        rows, _ = split(held)
        if not held.edits or layer is None:
            return list(held.pieces)
        deeper, deep, _ = parts(held)
        earlier = earlier_of(held.pieces)
        touched = fires(earlier, deep) if len(rows) else np.zeros((len(held.edits), 0), bool)
        marks = [frozenset(held.refs[rows[n]] for n in np.flatnonzero(own)) for own in touched]
        stale = np.asarray([known.get(e.id, (None,))[0] != mark for e, mark in zip(held.edits, marks, strict=True)])
        if stale.any():
            fresh_pieces = pieces_of(refreshed(deeper, earlier, stale[:, None]))
            for number in np.flatnonzero(stale):
                known[held.edits[number].id] = marks[number], fresh_pieces[number]
        return [known[edit.id][1] for edit in held.edits]

    def earlier_of(found: Sequence[Arrays]) -> PreviousEdits:
        if not found:
            return nothing(hidden_size, dtype)
        floats = {name: a.astype(dtype) if a.dtype.kind == "f" else a for name, a in join_pieces(found).items()}
        return load_earlier(floats)

    def pieces_of(earlier: PreviousEdits) -> list[Arrays]:
        """In float32, which holds every number of the network's own type and can be read anywhere."""
        arrays = save_earlier(earlier)
        return split_pieces({n: a if a.dtype.kind in "iu" else a.astype(np.float32) for n, a in arrays.items()})

    def items_of(requests: Sequence[EditRequest]) -> list[Item]:
        return [read_item(model, number, request, (), False) for number, request in enumerate(requests)]

    def guard_pieces(guards: Sequence[Guard], deeper: Model) -> list[Arrays]:
        if not guards:
            return []
        items = []
        for number, guard in enumerate(guards):
            # An answer is what comes next to the letter, which need not begin with a space.
            prompt, answer = model.encode_prompt(guard.prompt), model.encode_target(guard.prompt, guard.answer)
            items.append(Item(number, answer, [prompt + answer], [len(prompt)], [guard.prompt]))
        heard = None
        if layer is not None:
            heard = collect(model, [i.rows[0] for i in items], [range(len(i.rows[0])) for i in items], layer).query
        none = [(NO_SUBJECT, NO_SUBJECT)] * len(items)
        found = remember(nothing(hidden_size, dtype), items, none, collect_bare(deeper, items), heard)
        return pieces_of(found)

    def problems(requests: Sequence[EditRequest]) -> dict[int, str]:
        return check_requests(model, requests, layer is not None)

    def step(held: Held, requests: Sequence[EditRequest], guards: Sequence[Guard]) -> Stepped:
        with jax.default_matmul_precision("highest"):
            deeper, _, late = parts(held)
            state = fresh()
            patch = patch_of(held.neurons)
            if state.patch.layer is not None and patch.layer is None:
                patch = patch._replace(layer=held.neurons["layer"])
            earlier = earlier_of([*pieces(held), *guard_pieces(guards, deeper)])
            state = state._replace(patch=jax.tree.map(jnp.asarray, patch), earlier=earlier)
            after, info = editor.step(state, requests, key)
            said = said_before(deeper, late, requests, [result.held for result in info.requests])
        new = jax.tree.map(np.asarray, after.patch)
        old = len(held.refs)
        layers = np.full(len(new.bias), -1, np.int32) if new.layer is None else new.layer.astype(np.int32)
        neurons = {"key": new.key, "bias": new.bias, "value": new.value, "layer": layers}
        count = sum(result.held for result in info.requests)
        tail = iter(pieces_of(after.earlier)[len(after.earlier.lengths) - count :])
        results = []
        for result, before in zip(info.requests, said, strict=True):
            evidence = {
                "status": result.status,
                "said_before": before,
                "site": result.site,
                "steps": result.steps,
                "margin": result.margin,
                "losses": dict(result.losses),
            }
            own = take_neurons(neurons, result.neurons)
            results.append(Result(result.held, result.reason, evidence, own, next(tail) if result.held else {}))
        moved = (new.key[:old] != held.neurons["key"]).any(1) | (new.bias[:old] != held.neurons["bias"])
        return Stepped(results, {int(row): (new.key[row], new.bias[row]) for row in np.flatnonzero(moved)})

    def said_before(
        deeper: Model, late: Patch, requests: Sequence[EditRequest], chosen: Sequence[bool]
    ) -> list[str | None]:
        """What the model said in the place of each target, for those chosen."""
        items = items_of([request for request, wanted in zip(requests, chosen, strict=True) if wanted])
        if not items:
            return [None] * len(requests)
        found = predicted(deeper, collect_bare(deeper, items), late)
        ends = np.cumsum([len(item.target) for item in items])[:-1]
        if model.config.labels:
            texts = [model.config.labels[int(number)] for number in found]
        else:
            texts = [model.decode(part) for part in np.split(found, ends)]
        rest = iter(texts)
        return [next(rest) if wanted else None for wanted in chosen]

    def owners(earlier: PreviousEdits, rows: np.ndarray) -> list[int]:
        return sorted(set(np.repeat(np.arange(len(earlier.lengths)), earlier.lengths - earlier.starts)[rows].tolist()))

    def lost(held: Held) -> list[str]:
        if not held.edits:
            return []
        with jax.default_matmul_precision("highest"):
            deeper, _, late = parts(held)
            earlier = earlier_of(pieces(held))
            return [held.edits[number].id for number in owners(earlier, broken(deeper, earlier, late))]

    def near(held: Held, requests: Sequence[EditRequest]) -> list[str]:
        deeper, _, _ = parts(held)
        earlier, own = earlier_of(pieces(held)), collect_bare(deeper, items_of(requests)).query
        own, other = (one.reshape(len(one), -1, hidden_size).mean(1) for one in (own, earlier.sites.query))
        own, other = (one / np.maximum(np.linalg.norm(one, axis=-1, keepdims=True), 1e-9) for one in (own, other))
        nearest = np.argsort(-(own.astype(np.float32) @ other.astype(np.float32).T), axis=1)[:, :NEAR]
        return [held.edits[number].id for number in owners(earlier, np.unique(nearest))]

    def guards_broken(held: Held, guards: Sequence[Guard]) -> list[Guard]:
        if not guards:
            return []
        with jax.default_matmul_precision("highest"):
            deeper, _, late = parts(held)
            earlier = earlier_of(guard_pieces(guards, deeper))
            return [guards[number] for number in owners(earlier, broken(deeper, earlier, late))]

    def verify(held: Held) -> list[str]:
        if not held.edits:
            return []
        with jax.default_matmul_precision("highest"):
            deeper, _, late = parts(held)
            items = items_of([edit.request for edit in held.edits])
            total = len(items)
            tell = None if progress is None else partial(_tell, progress, "verifying", total)
            sites = collect(deeper, [i.rows[0] for i in items], [i.places(0) for i in items], last, tell)
            wrong = predicted(deeper, sites, late) != np.asarray([token for i in items for token in i.target], np.int32)
            owner = np.repeat(np.arange(total), [len(item.target) for item in items])
            return [held.edits[number].id for number in sorted(set(owner[wrong].tolist()))]

    return Engine(problems, step, lost, near, guards_broken, verify)
