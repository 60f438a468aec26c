"""Whether a new number of edits compiles anything, or leaves anything in memory."""

import dataclasses
import gc
from collections.abc import Sequence

import jax

from tpatch_jax.benchmarks.gauges import compilations
from tpatch_jax.editors.tpatcher.editor import tpatcher
from tpatch_jax.editors.tpatcher.settings import PRESETS, TPatcherSettings
from tpatch_jax.models.model import Model
from tpatch_jax.requests import EditRequest
from tpatch_jax.storage.cache import cache_folder

__all__ = ["recompilations"]


def recompilations(
    model: Model,
    requests: Sequence[EditRequest],
    warm: Sequence[int],
    new: Sequence[int],
    settings: TPatcherSettings = PRESETS["default"],
    memory: str | None = None,
) -> tuple[int, int]:
    """How many programs new numbers of edits compile in the last layer, and how many bytes of arrays they leave.

    Args:
        model: the model.
        requests: what is edited, at least as many as the largest number.
        warm: numbers of edits that are done first.
        new: numbers that follow.
        settings: the editor's options.
        memory: a text file for the query memory.

    Returns:
        Programs compiled after the warm numbers, and the growth of all live arrays meanwhile.
    """
    editor = tpatcher(dataclasses.replace(settings, site="last"), memory=memory, cache=cache_folder())
    key = jax.random.key(0)
    with jax.default_matmul_precision("highest"):
        state = editor.init(model, key)
        for count in warm:
            editor.step(state, requests[:count], key)
        before = _live_bytes()
        with compilations() as compiled:
            for count in new:
                editor.step(state, requests[:count], key)
    return compiled[0], _live_bytes() - before


def _live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())
