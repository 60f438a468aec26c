"""What ``config.json`` says together with the defaults of its architecture, which transformers knows."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tpatch_jax.storage.kept_text import keep_text

__all__ = ["complete_settings"]

VERSION = 1

_BEYOND = ("auto_map", "configuration_files")
"""Settings that send transformers to other files than ``config.json``."""


def complete_settings(folder: Path, text: str) -> dict[str, Any]:
    """The settings of a model's folder as `transformers.AutoConfig` completes them, as plain JSON values.

    Where torch is installed, transformers imports it for this, which takes longer than reading a small model. What it
    says is therefore kept in the cache, under the text and the version of transformers, on which alone it depends.

    Args:
        folder: the model's.
        text: what its ``config.json`` holds.

    Raises:
        Exception: of any kind; transformers checks settings with errors of its own.

    Example:
        >>> complete_settings(folder, (folder / "config.json").read_text())["rope_parameters"]  # doctest: +SKIP
        {'rope_theta': 100000, 'rope_type': 'default'}
    """

    def ask() -> str:
        from transformers import AutoConfig

        return json.dumps(AutoConfig.from_pretrained(folder, local_files_only=True).to_dict())

    if any(f'"{name}"' in text for name in _BEYOND):
        return json.loads(ask())
    return json.loads(keep_text("settings", f"{VERSION} {version('transformers')} {text}", ask, _is_object))


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
