"""Reading and writing Hugging Face style folders: ``config.json`` and safetensors, one file or shards."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from tpatch_jax.errors import TPatchError
from tpatch_jax.files import replace_folder
from tpatch_jax.models import decoder
from tpatch_jax.models.config import DecoderConfig
from tpatch_jax.models.families import configure, family_of

__all__ = ["read_folder", "read_settings", "write_folder"]

Params = dict[Any, Any]

NEURONS_KEY = "tpatch_neurons"
"""In ``config.json``: how many neurons were merged into which layers, ``{"29": 12}``."""

_IGNORED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", "attention.bias", "attention.masked_bias")


def read_settings(folder: Path) -> dict[str, Any]:
    """What ``config.json`` says, completed with the architecture's defaults.

    Raises:
        TPatchError: no such file, not JSON, or an architecture that is unknown here.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise TPatchError(
            f"{folder} has no config.json; a model is a folder with config.json and safetensors"
        ) from None
    except ValueError as error:
        raise TPatchError(f"{path} is not JSON ({error}); fetch the model again") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise TPatchError(f"{path} names no 'model_type'; copy the model's original config.json beside its weights")
    family_of(raw["model_type"])
    from transformers import AutoConfig

    try:
        return {**AutoConfig.from_pretrained(folder, local_files_only=True).to_dict(), **raw}
    # transformers checks the kinds of settings with errors of its own
    except Exception as error:
        reason = " ".join(str(error).split())
        raise TPatchError(f"{path} cannot be used ({reason}); copy the model's original config.json there") from error


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, entry in tree.items():
        path = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(entry, Mapping):
            yield from _flatten(entry, path)
        else:
            yield path, entry


def _insert(tree: Params, path: str, leaf: Any) -> None:
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = leaf


def _checkpoint_name(names: Mapping[str, str], path: str) -> tuple[str, bool]:
    """The checkpoint's name for one of our parameters, and whether it is stored transposed."""
    parts = path.split(".")
    layer = parts[1] if parts[0] == "layers" else ""
    general = ".".join(["layers", "{}", *parts[2:]]) if layer else path
    if general in names:
        return names[general].format(layer), False
    parent, _, leaf = general.rpartition(".")
    if leaf == "kernel":
        return f"{names[parent].format(layer)}.weight", True
    return f"{names[parent].format(layer)}.{leaf}", False


def _shards(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            table = json.loads(index.read_text("utf-8"))["weight_map"]
            listed = {str(name): folder / shard for name, shard in table.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TPatchError(f"{index} is damaged ({error!r}); fetch it again") from None
        missing = sorted({path.name for path in listed.values() if not path.exists()})
        if missing:
            raise TPatchError(f"{folder} lacks the shards {', '.join(missing)} that its index lists; fetch them again")
        held = {path: set(_names(path)) for path in set(listed.values())}
        return {name: path for name, path in listed.items() if name in held[path]}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        other = sorted(path.name for path in folder.glob("*.bin"))
        hint = f" ({other[0]} is a pickle, which is never read: convert it)" if other else ""
        raise TPatchError(f"{folder} holds no safetensors weights{hint}; put model.safetensors beside config.json")
    return {name: path for path in files for name in _names(path)}


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, "flax") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise TPatchError(f"{path} is damaged ({error}); fetch it again") from None


def read_folder(folder: Path, dtype: str | None = None) -> tuple[DecoderConfig, Params, dict[str, Any]]:
    """Read a model.

    Args:
        folder: with ``config.json`` and safetensors.
        dtype: ``"float32"`` or ``"bfloat16"`` for the parameters; ``None`` keeps what the file has.

    Returns:
        The decoder's description, its parameters, and the settings of ``config.json``.

    Raises:
        TPatchError: weights are missing, damaged, of a wrong shape, or left over; all such tensors are named together.
    """
    settings = read_settings(folder)
    config = configure(settings)
    names = family_of(settings["model_type"]).names
    merged = {int(layer): int(count) for layer, count in settings.get(NEURONS_KEY, {}).items()}
    shards = _shards(folder)
    params: Params = {}
    problems: list[str] = []
    wanted = {}
    for path, expected in _flatten(decoder.shapes(config, merged)):
        name, transposed = _checkpoint_name(names, path)
        wanted[name] = (path, expected.shape, transposed)
        if name not in shards:
            problems.append(f"{name} is missing")
    for name in shards:
        if (
            name not in wanted
            and not name.endswith(_IGNORED)
            and not (config.tied and name == names["head"] + ".weight")
        ):
            problems.append(f"{name} is not part of a {config.family} model")
    for shard in sorted(set(shards.values())):
        with safe_open(shard, "flax") as file:
            for name in file.keys():  # noqa: SIM118  (the handle is not a mapping)
                if name not in wanted or shards[name] != shard:
                    continue
                path, shape, transposed = wanted[name]
                tensor = file.get_tensor(name)
                found = tensor.shape[::-1] if transposed else tensor.shape
                if found != shape:
                    problems.append(
                        f"{name} has shape {tensor.shape}, config.json implies {shape[::-1] if transposed else shape}"
                    )
                    continue
                if not jnp.issubdtype(tensor.dtype, jnp.floating):
                    problems.append(f"{name} is {tensor.dtype}: a quantised checkpoint; convert it to float first")
                    continue
                tensor = tensor.T if transposed else tensor
                _insert(params, path, jnp.asarray(tensor, dtype or tensor.dtype))
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise TPatchError(f"{folder} does not hold the model that its config.json describes: {shown}")
    return config, params, settings


def write_folder(
    folder: Path, config: DecoderConfig, params: Params, settings: Mapping[str, Any], source: Path | None = None
) -> None:
    """Write a model as a Hugging Face style folder, whole or not at all.

    Args:
        folder: must not exist yet, or be empty.
        config: the decoder's description.
        params: its parameters; merged neurons are recorded in ``config.json``.
        settings: what the new ``config.json`` shall say besides.
        source: a folder whose tokenizer files are copied along.

    Raises:
        TPatchError: the folder holds something already.
    """
    names = family_of(settings["model_type"]).names
    merged = decoder.merged_neurons(config, params)
    new = {name: entry for name, entry in settings.items() if name != NEURONS_KEY}
    dtype = str(jax.tree.leaves(params)[0].dtype)
    new.update({"dtype": dtype, "torch_dtype": dtype})
    if merged:
        new[NEURONS_KEY] = {str(layer): count for layer, count in merged.items()}
    tensors = {}
    for path, leaf in _flatten(params):
        name, transposed = _checkpoint_name(names, path)
        tensors[name] = jnp.asarray(np.ascontiguousarray(np.asarray(leaf).T)) if transposed else leaf
    with replace_folder(folder) as temporary:
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(new, indent=2, sort_keys=True) + "\n", "utf-8")
        for path in sorted(source.iterdir()) if source else ():
            ours = path.name in ("config.json", "tpatch_source.json") or path.name.endswith(".index.json")
            if path.is_file() and path.suffix in (".json", ".txt", ".model", ".jinja") and not ours:
                shutil.copyfile(path, temporary / path.name)
