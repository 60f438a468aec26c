"""Editing methods by name: what an evaluation needs to know about each besides its `Editor`.

A method's file registers it, so that adding one touches no other file::

    register_editor(Method(name="mine", presets={"default": MySettings()}, build=…, model=…, save=…, restore=…))

Those of this package are imported when `METHODS` is first looked into; ``tpatch eval --method mine`` works once the
file that registers it is imported.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from tpatch_jax.core.adapters import Adapter
from tpatch_jax.core.layers import LayerPatches
from tpatch_jax.editors.base import Editor, Routing
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.model import Model
from tpatch_jax.requests import EditRequest
from tpatch_jax.storage.settings import change_each
from tpatch_jax.typing import Arrays, Progress

__all__ = ["METHODS", "Method", "find_method", "method_settings", "register_editor"]

_MODULES = (
    "tpatcher.method",
    "fine_tuning.editor",
    "rome.method",
    "serac.editor",
    "grace",
    "retrieval",
    "locft",
    "wise",
    "rome.alphaedit",
    "ultraedit",
    "neuraldb",
)
"""The modules of this package that register methods, in the order in which they are listed."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """An editing method as `tpatch eval` uses it.

    How an evaluation looks at an edited model depends on what an edit is: neurons (``patches``), adapters, another
    model (``routing``); where none of these is given it asks the edited ``model``, and without one `Editor.apply`.

    Attributes:
        name: what ``--method`` calls it.
        presets: its settings by name, each a dataclass; ``default`` is among them.
        build: ``(settings, memory text file or None, cache folder or None, progress or None) -> Editor``.
        model: ``state -> Model``, the edited model, which is asked and writes freely, or the base of a ``routing``;
            ``None`` where it is no plain model.
        save: ``state -> arrays``, what a run that is interrupted needs besides `Editor.init`.
        restore: ``(fresh state, arrays) -> state``, its inverse.
        patches: ``state -> {layer: Patch}``, where edits are neurons that add nothing below their threshold: then only
            what they fire on is run again. ``None`` of a state whose neurons have no such threshold.
        adapters: ``state -> {layer: Adapter}``, where edits join feed-forward networks in another way: then only texts
            on which one acts are run again.
        routing: ``state -> Routing``, where another model answers what is in the scope of an edit: then only that is
            run, through the other model.
        check: ``(model, settings)``, raises where the method cannot work on a model, before anything is measured.
        learnt: ``(model, settings) -> text``, what tells apart networks that the method brings along, on whose contents
            figures depend besides; of most methods empty.
        activation: ``(model, settings) -> name``, what activates its neurons in an evaluation; ``None`` where edits
            are no neurons.
        rows: ``state -> {request's id: arrays}``, what each edit is made of: rows of ``key [n, d]``, ``bias [n]``,
            ``value [n, d]``, ``layer [n]``. With ``with_rows`` its edits can be kept in a bank.
        with_rows: ``(fresh state, requests, arrays of each) -> state``, its inverse, for any choice of the edits.
        undo: whether one edit can be taken out again, others staying: ``"exact"``, ``"approximate"`` or ``"none"``;
            empty where it is not said.
        stock_checkpoint: whether an edited model can be a checkpoint of its family, which needs nothing of this
            library; ``None`` where it is not said.
    """

    name: str
    presets: Mapping[str, Any]
    build: Callable[[Any, str | Path | None, Path | None, Progress | None], Editor]
    model: Callable[[Any], Model] | None
    save: Callable[[Any], Arrays]
    restore: Callable[[Any, Arrays], Any]
    patches: Callable[[Any], LayerPatches | None] = lambda state: None
    adapters: Callable[[Any], Mapping[int, Adapter]] | None = None
    routing: Callable[[Any], Routing] | None = None
    check: Callable[[Model, Any], object] = lambda model, settings: None
    learnt: Callable[[Model, Any], str] = lambda model, settings: ""
    activation: Callable[[Model, Any], str | None] = lambda model, settings: None
    rows: Callable[[Any], Mapping[str, Arrays]] | None = None
    with_rows: Callable[[Any, Sequence[EditRequest], Sequence[Arrays]], Any] | None = None
    undo: Literal["", "exact", "approximate", "none"] = ""
    stock_checkpoint: bool | None = None

    @property
    def properties(self) -> dict[str, Any]:
        """What a report says of the method besides its figures; what is not said is left out."""
        said = {"undo": self.undo or None, "stock_checkpoint": self.stock_checkpoint}
        return {name: value for name, value in said.items() if value is not None}


_REGISTERED: dict[str, Method] = {}


def register_editor(method: Method) -> Method:
    """Make a method known by its name, to `find_method`, `tpatch_jax.evaluation.runner.evaluate` and ``tpatch eval``.

    Args:
        method: the method; registering the same one again changes nothing.

    Returns:
        The method.

    Raises:
        TPatchError: another method has this name, or it has no preset ``"default"``.

    Example:
        >>> register_editor(find_method("tpatcher")).name
        'tpatcher'
    """
    if _REGISTERED.get(method.name, method) is not method:
        raise TPatchError(f"a method {method.name!r} is registered already; give this one another name")
    if "default" not in method.presets:
        raise TPatchError(f"the method {method.name!r} has no preset 'default'; add one to its presets")
    _REGISTERED[method.name] = method
    return method


class _Methods(Mapping[str, Method]):
    """What is registered, the methods of this package included; they are imported when this is first looked into."""

    def _all(self) -> dict[str, Method]:
        for module in _MODULES:
            import_module(f"tpatch_jax.editors.{module}")
        return _REGISTERED

    def __getitem__(self, name: str) -> Method:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


METHODS: Mapping[str, Method] = _Methods()
"""The methods by name, those that others registered among them."""


def find_method(name: str) -> Method:
    """A method by its name.

    Raises:
        TPatchError: there is none of that name; the nearest one is suggested.

    Example:
        >>> find_method("tpatcher").name
        'tpatcher'
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(METHODS)}"
        raise TPatchError(f"there is no method {name!r}; {hint}")
    return METHODS[name]


def method_settings(
    methods: Iterable[str], preset: str = "default", changes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Each method's settings: its preset, with changes.

    Args:
        methods: names from `METHODS`.
        preset: a method without a preset of this name keeps its default.
        changes: new values by name; ``rome.value_steps`` goes to ROME alone, and must where several have such a
            setting.

    Returns:
        Settings by the method's name.

    Raises:
        TPatchError: no method has such a preset or setting, several have the setting, or a value has the wrong type.

    Example:
        >>> method_settings(["tpatcher"], changes={"attempts": 1})["tpatcher"].attempts
        1
        >>> changed = method_settings(["rome", "memit"], changes={"rome.value_steps": 5})
        >>> changed["rome"].value.value_steps, changed["memit"].value.value_steps
        (5, 25)
    """
    chosen = [find_method(name) for name in methods]
    presets = sorted({name for method in chosen for name in method.presets})
    if chosen and preset not in presets:
        raise TPatchError(f"preset {preset!r} does not exist; choose from {', '.join(presets)}")
    base = {method.name: method.presets.get(preset, method.presets["default"]) for method in chosen}
    return change_each(base, changes or {}, METHODS)
