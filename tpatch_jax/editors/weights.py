"""Edits that change weights: the model that a method makes of another one, which can be saved as any model is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from tpatch_jax.editors.base import EditInfo
from tpatch_jax.editors.registry import METHODS, Method, find_method
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.model import Model
from tpatch_jax.models.quantising import check_float
from tpatch_jax.requests import EditRequest
from tpatch_jax.storage.cache import cache_folder
from tpatch_jax.typing import Progress

__all__ = ["changes_weights", "check_changes_weights", "edit_weights"]


def changes_weights(method: Method) -> bool:
    """Whether what a method makes is a model with other weights, and nothing beside it.

    Example:
        >>> changes_weights(find_method("rome")), changes_weights(find_method("grace"))
        (True, False)
    """
    # Methods whose edits are neurons say which.
    beside = method.routing or method.adapters or method.patches is not Method.patches
    return bool(method.stock_checkpoint and method.model and not beside)


def check_changes_weights(name: str) -> Method:
    """A method whose edits can be saved as a model.

    Args:
        name: of the method.

    Raises:
        TPatchError: there is none of that name, or its edits are no weights; the message names what keeps or measures
            them.

    Example:
        >>> check_changes_weights("rome").name
        'rome'
    """
    method = find_method(name)
    if changes_weights(method):
        return method
    others = ", ".join(other for other in METHODS if changes_weights(METHODS[other]))
    kept = f"`tpatch bank init BANK --model MODEL --method {name}` keeps them, " if method.with_rows else ""
    raise TPatchError(
        f"edits of {name!r} stand beside the model and are no weights that a folder could hold; {kept}`tpatch eval "
        f"--method {name}` measures them, and what changes weights is {others}"
    )


def edit_weights(
    model: Model,
    requests: Sequence[EditRequest],
    method: str,
    *,
    settings: Any = None,
    memory: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Model, EditInfo]:
    """The model that a method makes of another one in one step.

    Args:
        model: the model; not changed.
        requests: what to correct.
        method: its name.
        settings: its options; by default its preset ``default``.
        memory: a text file, for methods that need unrelated text.
        seed: the same one gives the same weights.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        The edited model, and what became of each request. Of one that does not hold something may stay in the weights.

    Raises:
        TPatchError: the method makes no model, or cannot work on this one.

    Example:
        >>> edited, info = edit_weights(model, requests, "rome")  # doctest: +SKIP
    """
    chosen = check_changes_weights(method)
    settings = chosen.presets["default"] if settings is None else settings
    check_float(model, f"the method {method!r}")
    chosen.check(model, settings)
    editor = chosen.build(settings, memory, cache_folder(), progress)
    rng = jax.random.key(seed)
    # As in an evaluation, so that both make the same edits.
    with jax.default_matmul_precision("highest"):
        state, info = editor.step(editor.init(model, rng), requests, rng)
    assert chosen.model is not None
    return chosen.model(state), info
