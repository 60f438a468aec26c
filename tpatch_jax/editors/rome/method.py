"""ROME, R-ROME and MEMIT among the editing methods: how an evaluation sees and keeps their edits."""

from collections.abc import Callable, Mapping
from typing import Any

from tpatch_jax.editors.base import Editor
from tpatch_jax.editors.registry import Method, register_editor
from tpatch_jax.editors.rome.memit import MEMIT_PRESETS, check_memit, memit
from tpatch_jax.editors.rome.rome import R_ROME_PRESETS, ROME_PRESETS, check_rome, rome
from tpatch_jax.editors.rome.state import edited, restore, save
from tpatch_jax.models.model import Model

__all__: list[str] = []


def _register(
    name: str, presets: Mapping[str, Any], editor: Callable[..., Editor], check: Callable[[Model, Any], object]
) -> None:
    register_editor(
        Method(
            name=name,
            presets=presets,
            build=lambda settings, memory, cache, progress: editor(
                settings, memory=memory, cache=cache, progress=progress
            ),
            model=edited,
            save=save,
            restore=restore,
            check=check,
            undo="none",
            stock_checkpoint=True,
        )
    )


_register("rome", ROME_PRESETS, rome, check_rome)
_register("r-rome", R_ROME_PRESETS, rome, check_rome)
_register("memit", MEMIT_PRESETS, memit, check_memit)
