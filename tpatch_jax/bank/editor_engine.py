"""Any registered editing method behind a bank: what it asks is answered through the `Editor` protocol alone.

A method takes part once its registration says what an edit is made of (``rows``) and how a state is made of edits again
(``with_rows``).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tpatch_jax.bank.assembly import Held, empty_neurons, take_neurons
from tpatch_jax.bank.guards import GuardedAnswers
from tpatch_jax.bank.method import Result, Stepped
from tpatch_jax.bank.state import Guard
from tpatch_jax.core.checks import random_key
from tpatch_jax.editors.base import Editor
from tpatch_jax.editors.reading import Item, check_requests, read_item
from tpatch_jax.editors.registry import Method
from tpatch_jax.embeddings import is_named
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.chat import render_requests
from tpatch_jax.models.collection import collect, predicted
from tpatch_jax.models.model import Model
from tpatch_jax.requests import EditRequest
from tpatch_jax.typing import Progress, RngKey

__all__ = ["EditorEngine"]


class EditorEngine:
    """One method, for one model and the settings of one bank."""

    base: Model
    method: Method
    rng: RngKey
    editor: Editor

    def __init__(
        self,
        model: Model,
        method: Method,
        settings: Any,
        memory: Path | None = None,
        cache: Path | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ):
        if method.rows is None or method.with_rows is None or method.model is None:
            raise TPatchError(f"edits of method {method.name!r} cannot be kept in a bank; use tpatcher or grace")
        self.base, self.method, self.rng = model, method, random_key(seed)
        self.editor = method.build(settings, memory, cache, progress)
        self._guarded = GuardedAnswers(model)

    @cached_property
    def _unedited(self) -> Any:
        return self.editor.init(self.base, self.rng)

    def _state(self, held: Held) -> Any:
        """The editor's state with all held edits."""
        assert self.method.with_rows is not None
        requests = [replace(edit.request, id=edit.id) for edit in held.edits]
        requests = render_requests(self.base, requests)
        rows = [take_neurons(held.neurons, np.flatnonzero(held.owner == number)) for number in range(len(held.edits))]
        return self.method.with_rows(self._unedited, requests, rows)

    def model(self, held: Held) -> Model:
        """See `tpatch_jax.bank.method.Engine`."""
        assert self.method.model is not None
        return self.method.model(self._state(held)) if held.edits else self.base

    def _wrong(self, model: Model, items: Sequence[Item]) -> list[int]:
        """The items whose target does not come out."""
        said = _answers(model, items)
        return [number for number, item in enumerate(items) if said[number].tolist() != list(item.target)]

    def _items(self, requests: Sequence[EditRequest]) -> list[Item]:
        rendered = render_requests(self.base, requests)
        return [read_item(self.base, number, request, (), False) for number, request in enumerate(rendered)]

    def problems(self, requests: Sequence[EditRequest]) -> dict[int, str]:
        """See `tpatch_jax.bank.method.Engine`."""
        named = {
            number: f"a bank of {self.method.name} reads prompts again, and keeps no embeddings; use method=tpatcher"
            for number, request in enumerate(requests)
            if is_named(request.prompt)
        }
        return check_requests(self.base, render_requests(self.base, requests), False) | named

    def step(self, held: Held, requests: Sequence[EditRequest], guards: Sequence[Guard]) -> Stepped:
        """See `tpatch_jax.bank.method.Engine`; guards are checked by the bank after the step."""
        assert self.method.rows is not None
        # Under names that no held edit has, by which their rows are told apart.
        named = [replace(request, id=f"\0{number}") for number, request in enumerate(requests)]
        with jax.default_matmul_precision("highest"):
            state = self._state(held)
            after, info = self.editor.step(state, named, self.rng)
        rows = self.method.rows(after)
        results = []
        for number, result in enumerate(info.requests):
            evidence = {
                "status": result.status,
                "site": result.site,
                "steps": result.steps,
                "margin": result.margin,
                "losses": dict(result.losses),
            }
            none = empty_neurons(self.base.config.hidden_size)
            neurons = rows.get(f"\0{number}", none) if result.held else none
            results.append(Result(result.held, result.reason, evidence, neurons, {}))
        return Stepped(results, {})

    def broken(self, held: Held) -> list[str]:
        """See `tpatch_jax.bank.method.Engine`."""
        if not held.edits:
            return []
        with jax.default_matmul_precision("highest"):
            wrong = self._wrong(self.model(held), self._items([edit.request for edit in held.edits]))
        return [held.edits[number].id for number in wrong]

    def near(self, held: Held, requests: Sequence[EditRequest]) -> list[str]:
        """See `tpatch_jax.bank.method.Engine`: none, since no edit is fitted beside others again."""
        return []

    def guards_broken(self, held: Held, guards: Sequence[Guard]) -> list[Guard]:
        """See `tpatch_jax.bank.method.Engine`."""
        if not guards:
            return []
        with jax.default_matmul_precision("highest"):
            edited = self.model(held)
            return self._guarded.changed(edited, guards, lambda items: self._wrong(edited, items))

    def verify(self, held: Held) -> list[str]:
        """See `tpatch_jax.bank.method.Engine`."""
        return self.broken(held)


def _answers(model: Model, items: Sequence[Item]) -> list[np.ndarray]:
    """What a model says in the place of each target."""
    if not items:
        return []
    rows, places = [item.rows[0] for item in items], [item.places(0) for item in items]
    tokens = predicted(model, collect(model, rows, places, model.layer(None)))
    return np.split(tokens, np.cumsum([len(item.target) for item in items])[:-1])
