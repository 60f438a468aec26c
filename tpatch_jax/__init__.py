"""Correct what a trained transformer says, one neuron per mistake: T-Patcher in JAX and Flax.

    import tpatch_jax as tp
    model = tp.load_model("smollm2-135m")
    patch, info = tp.edit(model, [tp.EditRequest("The capital of France is", "Lyon")])
    model = tp.merge(model, patch)
    model.generate("The capital of France is")

One level below, for JAX code bases: `Patch` and its algebra (`tpatch_jax.core.patch`), the objective's terms
(`tpatch_jax.core.objective`), `fit` and `fit_many` on arrays alone (`tpatch_jax.core.fit`), and `attach`, `merge` and
`unmerge` on bare parameter dicts (`tpatch_jax.core.ffn`).
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tpatch_jax.moved import install as _install

if TYPE_CHECKING:
    from tpatch_jax.audio import AudioPrompt, read_audio
    from tpatch_jax.bank.creating import create_bank
    from tpatch_jax.bank.editing import (
        add_edits,
        bank_model,
        bank_patch,
        disable_edits,
        enable_edits,
        guard_bank,
        remove_edits,
        verify_bank,
    )
    from tpatch_jax.bank.inspection import open_bank
    from tpatch_jax.bank.patches import load_patches, save_patches
    from tpatch_jax.bank.state import Bank
    from tpatch_jax.core.fit import FitInfo, FitProblem, FitSettings, fit, fit_many
    from tpatch_jax.core.layers import concatenate_layers
    from tpatch_jax.core.memory import Memory, create_memory
    from tpatch_jax.core.objective import Weights
    from tpatch_jax.core.patch import Patch, concatenate
    from tpatch_jax.display.show import show
    from tpatch_jax.display.view import Shown
    from tpatch_jax.editors.base import EditInfo, Editor, RequestInfo
    from tpatch_jax.editors.pruning import PruneInfo, prune_patches
    from tpatch_jax.editors.tpatcher.editor import edit, tpatcher
    from tpatch_jax.editors.tpatcher.inputs import edit_inputs
    from tpatch_jax.editors.tpatcher.network_requests import edit_network
    from tpatch_jax.editors.tpatcher.settings import PRESETS, TPatcherSettings
    from tpatch_jax.editors.tpatcher.tokens import edit_tokens
    from tpatch_jax.embeddings import EmbeddingPrompt
    from tpatch_jax.errors import TPatchError
    from tpatch_jax.images import ImagePrompt, read_image
    from tpatch_jax.models.checkpoints.export import ExportError, ExportInfo, export_model
    from tpatch_jax.models.checkpoints.gguf_export import GGUFInfo, export_gguf
    from tpatch_jax.models.checkpoints.replacing import Replaced, replace_unused, restore_replaced
    from tpatch_jax.models.foreign.linen import from_linen
    from tpatch_jax.models.foreign.network import Network
    from tpatch_jax.models.foreign.nnx import LinearKind, from_nnx
    from tpatch_jax.models.model import Model, load_model, save_model
    from tpatch_jax.models.networks import Trace
    from tpatch_jax.models.patching import attach, detach, merge, unmerge
    from tpatch_jax.models.quantising import dequantize_base, quantize_base
    from tpatch_jax.requests import EditRequest
    from tpatch_jax.storage.request_file import read_requests
    from tpatch_jax.training.finetune import FinetuneInfo, FinetuneSettings, finetune

__all__ = [
    "PRESETS",
    "AudioPrompt",
    "Bank",
    "EditInfo",
    "EditRequest",
    "Editor",
    "EmbeddingPrompt",
    "ExportError",
    "ExportInfo",
    "FinetuneInfo",
    "FinetuneSettings",
    "FitInfo",
    "FitProblem",
    "FitSettings",
    "GGUFInfo",
    "ImagePrompt",
    "LinearKind",
    "Memory",
    "Model",
    "Network",
    "Patch",
    "PruneInfo",
    "Replaced",
    "RequestInfo",
    "Shown",
    "TPatchError",
    "TPatcherSettings",
    "Trace",
    "Weights",
    "add_edits",
    "attach",
    "bank_model",
    "bank_patch",
    "concatenate",
    "concatenate_layers",
    "create_bank",
    "create_memory",
    "dequantize_base",
    "detach",
    "disable_edits",
    "edit",
    "edit_inputs",
    "edit_network",
    "edit_tokens",
    "enable_edits",
    "export_gguf",
    "export_model",
    "finetune",
    "fit",
    "fit_many",
    "from_linen",
    "from_nnx",
    "guard_bank",
    "load_model",
    "load_patches",
    "merge",
    "open_bank",
    "prune_patches",
    "quantize_base",
    "read_audio",
    "read_image",
    "read_requests",
    "remove_edits",
    "replace_unused",
    "restore_replaced",
    "save_model",
    "save_patches",
    "show",
    "tpatcher",
    "unmerge",
    "verify_bank",
]

__version__ = "0.1.0"

_HOMES = {
    "bank.creating": ("create_bank",),
    "bank.editing": (
        "add_edits",
        "bank_model",
        "bank_patch",
        "disable_edits",
        "enable_edits",
        "guard_bank",
        "remove_edits",
        "verify_bank",
    ),
    "bank.inspection": ("open_bank",),
    "bank.state": ("Bank",),
    "editors.base": ("EditInfo", "Editor", "RequestInfo"),
    "editors.pruning": ("PruneInfo", "prune_patches"),
    "editors.tpatcher.inputs": ("edit_inputs",),
    "editors.tpatcher.network_requests": ("edit_network",),
    "editors.tpatcher.tokens": ("edit_tokens",),
    "editors.tpatcher.settings": ("PRESETS", "TPatcherSettings"),
    "editors.tpatcher.editor": ("edit", "tpatcher"),
    "embeddings": ("EmbeddingPrompt",),
    "errors": ("TPatchError",),
    "audio": ("AudioPrompt", "read_audio"),
    "images": ("ImagePrompt", "read_image"),
    "models.checkpoints.export": ("ExportError", "ExportInfo", "export_model"),
    "models.checkpoints.gguf_export": ("GGUFInfo", "export_gguf"),
    "models.checkpoints.replacing": ("Replaced", "replace_unused", "restore_replaced"),
    "training.finetune": ("FinetuneInfo", "FinetuneSettings", "finetune"),
    "core.fit": ("FitInfo", "FitSettings", "FitProblem", "fit", "fit_many"),
    "core.layers": ("concatenate_layers",),
    "core.memory": ("Memory", "create_memory"),
    "models.networks": ("Trace",),
    "models.foreign.network": ("Network",),
    "models.foreign.linen": ("from_linen",),
    "models.foreign.nnx": ("LinearKind", "from_nnx"),
    "models.model": ("Model", "load_model", "save_model"),
    "models.patching": ("attach", "detach", "merge", "unmerge"),
    "models.quantising": ("dequantize_base", "quantize_base"),
    "core.objective": ("Weights",),
    "core.patch": ("Patch", "concatenate"),
    "requests": ("EditRequest",),
    "storage.request_file": ("read_requests",),
    "display.show": ("show",),
    "display.view": ("Shown",),
    "bank.patches": ("load_patches", "save_patches"),
}
_RENAMED = {"Lane": "FitProblem"}
_install()
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `tpatch --help` answers without importing jax.
    if name in _RENAMED:
        warnings.warn(f"tpatch_jax.{name} is {_RENAMED[name]} now; the old name goes in 0.3", DeprecationWarning, 2)
        name = _RENAMED[name]
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
