"""The editing method of a bank, for one model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpatch_jax.bank.editor_engine import EditorEngine
from tpatch_jax.bank.method import Engine
from tpatch_jax.bank.tpatcher_engine import TPatcherEngine
from tpatch_jax.editors.registry import find_method
from tpatch_jax.models.model import Model
from tpatch_jax.storage.settings import change
from tpatch_jax.typing import Progress

__all__ = ["TPATCHER", "create_engine", "method_of", "settings_of"]

TPATCHER = "tpatcher"
"""The method of banks whose manifest names none."""


def method_of(manifest: Mapping[str, Any]) -> str:
    """The name of the method that a bank's edits are made with."""
    return manifest.get("method", TPATCHER)


def settings_of(manifest: Mapping[str, Any]) -> Any:
    """The editor's options that a bank was made with."""
    return change(find_method(method_of(manifest)).presets[manifest["preset"]], manifest["settings"])


def create_engine(
    model: Model,
    manifest: Mapping[str, Any],
    *,
    memory: Path | None = None,
    cache: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Engine:
    """The editing method of one bank, for one model.

    Args:
        model: the model.
        manifest: the bank's, for its method and settings.
        memory: a text file on which patches stay silent.
        cache: folder where query memories are kept.
        seed: the same seed gives the same edits.
        progress: called with what is being done, how much is done, and how much there is.

    Raises:
        TPatchError: there is no such method, or its edits cannot be kept in a bank.
    """
    settings, given = settings_of(manifest), (memory, cache, seed, progress)
    if method_of(manifest) == TPATCHER:
        return TPatcherEngine(model, settings, *given)
    return EditorEngine(model, find_method(method_of(manifest)), settings, *given)
