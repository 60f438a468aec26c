"""Patches on disk: one folder with the neurons (safetensors) and what is known about each edit (JSON)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tpatch_jax.core.arguments import as_path, check_kind
from tpatch_jax.core.devices import automatically
from tpatch_jax.core.layers import LayerPatches, flat_positions, flatten_layers, split_layers
from tpatch_jax.core.patch import Patch, create
from tpatch_jax.editors.base import EditInfo, RequestInfo
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.fingerprint import fingerprint
from tpatch_jax.models.model import Model, check_loaded
from tpatch_jax.models.patching import check_patches
from tpatch_jax.requests import EditRequest, as_requests, parse_request, place_fields
from tpatch_jax.storage.files import replace_folder
from tpatch_jax.storage.folders import PATCHES, describe_folder
from tpatch_jax.storage.processes import one_process_writes

__all__ = [
    "SavedPatches",
    "check_model",
    "load_patches",
    "read_patches",
    "save_patches",
    "saved_info",
    "saved_requests",
]

SCHEMA = 1
ARRAYS, EDITS = "patches.safetensors", PATCHES


class SavedPatches(NamedTuple):
    """A folder of patches.

    Attributes:
        patches: all neurons, ``{layer: [n, d]}``.
        model: the name, fingerprint and dtype of the model that they were made for.
        edits: for each request its id, prompt, target, status, neurons, losses and more; neurons by their numbers
            among those of all layers, lower layers first.
    """

    patches: dict[int, Patch]
    model: dict[str, Any]
    edits: list[dict[str, Any]]


@automatically
def save_patches(
    folder: str | Path,
    model: Model,
    patches: LayerPatches | Patch,
    requests: Sequence[EditRequest | Mapping[str, Any]],
    info: EditInfo,
) -> None:
    """Write patches, whole or not at all; of several processes, which all call this, the first one writes.

    Args:
        folder: must not exist yet, or be empty.
        model: the model that they were made for.
        patches: the neurons, ``{layer: [n, d]}``, or one patch for the last layer.
        requests: what was asked for.
        info: what became of it.

    Raises:
        TPatchError: requests, info and neurons do not belong together, the folder holds something already, or the
            disk is full.
    """
    call = "save_patches(folder, model, patches, requests, info)"
    folder = as_path(folder, call, "a folder; give its path")
    check_loaded(model, call)
    requests = as_requests(requests)
    check_kind(info, EditInfo, call, "an EditInfo; give the second of what `edit` returned")
    if len(requests) != len(info.requests):
        raise TPatchError(
            f"info is of {len(info.requests)} requests, and {len(requests)} are given; give those that the patch is for"
        )
    given = {-1: patches} if isinstance(patches, Patch) else patches
    check_patches(given, alike=False)
    layers = {model.layer(layer): patch for layer, patch in given.items()}
    for number in {*layers, *(number for result in info.requests for number in result.neurons)}:
        patch = layers.get(number, create(model.config.hidden_size))
        if not _belong_together(patch, [result.neurons.get(number, ()) for result in info.requests]):
            raise TPatchError(
                f"in layer {number} key, bias and value are {', '.join(str(list(leaf.shape)) for leaf in patch)}, and "
                "info names other neurons than those of each layer, each once; make a batch of patches one with "
                "patch.join, and where patches were joined or taken apart, give each request's neurons their new "
                "numbers"
            )
    named = [flat_positions(layers, result.neurons) for result in info.requests]
    patch, layer = flatten_layers(layers) if layers else (create(model.config.hidden_size), np.zeros(0, np.int32))
    edits = []
    for request, result, neurons in zip(requests, info.requests, named, strict=True):
        edit: dict[str, Any] = {"id": result.id, "prompt": request.prompt, "target": request.target}
        if request.subject is not None:
            edit["subject"] = request.subject
        if request.keep:
            edit["keep"] = list(request.keep)
        edit.update(place_fields(request))
        edit.update({"status": result.status, "held": result.held, "site": result.site})
        if result.continuation:
            edit["continuation"] = result.continuation
        if result.reason:
            edit["reason"] = result.reason
        edit.update({"neurons": neurons, "steps": result.steps, "losses": dict(result.losses)})
        edit["margin"] = result.margin
        edits.append(edit)
    about: dict[str, Any] = {"name": model.name, "fingerprint": fingerprint(model), "family": model.config.family}
    about.update({"width": model.config.hidden_size, "layers": model.config.layers, "dtype": model.dtype})
    # Safetensors writes what lies in memory, whatever the strides.
    arrays = {name: np.ascontiguousarray(array) for name, array in {**patch._asdict(), "layer": layer}.items()}
    text = json.dumps({"schema": SCHEMA, "model": about, "edits": edits}, ensure_ascii=False, indent=1)
    with one_process_writes(folder) as writes:
        if writes:
            with replace_folder(folder) as temporary:
                save_file(arrays, temporary / ARRAYS, metadata={"format": "tpatch", "schema": str(SCHEMA)})
                (temporary / EDITS).write_text(text + "\n", "utf-8")


def read_patches(folder: str | Path) -> SavedPatches:
    """Read a folder of patches.

    Args:
        folder: what `save_patches` wrote.

    Raises:
        TPatchError: the folder is missing, damaged, or of a newer schema.
    """
    folder = Path(folder)
    for name in (EDITS, ARRAYS):
        if not (folder / name).is_file():
            mend = f"give a folder that `tpatch edit … -o FOLDER` wrote{describe_folder(folder)}"
            raise TPatchError(f"{folder} has no {name}; {mend}")
    try:
        about = json.loads((folder / EDITS).read_text("utf-8"))
        schema, model, edits = about["schema"], about["model"], about["edits"]
        neurons = [[int(number) for number in edit["neurons"]] for edit in edits]
        model.get("fingerprint")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TPatchError(f"{folder / EDITS} is damaged ({error!r}); make the patches again") from None
    if schema != SCHEMA:
        raise TPatchError(f"{folder} was written by a newer version (schema {schema}); upgrade tpatch-jax")
    try:
        arrays = load_file(folder / ARRAYS)
        patch = Patch(*(jax.device_put(arrays[name]) for name in Patch._fields))
        # Of neurons in the last layer alone the layer was not always told.
        layer = arrays.get("layer", np.full(patch.bias.shape, int(model.get("layers", 0)) - 1))
    except (SafetensorError, KeyError) as error:
        raise TPatchError(f"{folder / ARRAYS} is damaged ({error}); make the patches again") from None
    if layer.shape != patch.bias.shape or not _belong_together(patch, neurons):
        raise TPatchError(f"{folder}: {EDITS} and {ARRAYS} do not belong together; make the patches again")
    # Older folders hold the neurons edit after edit, whatever their layers.
    order = np.argsort(layer, kind="stable")
    place = np.argsort(order)
    numbered = [{**edit, "neurons": place[numbers].tolist()} if numbers else edit
                for edit, numbers in zip(edits, neurons, strict=True)]  # fmt: skip
    return SavedPatches(split_layers(patch, layer), model, numbered)


def saved_requests(saved: SavedPatches) -> list[EditRequest]:
    """The requests that a folder of patches is for, as far as it keeps them: without rephrases and locality prompts.

    Args:
        saved: the folder, as `read_patches` returns it.

    Raises:
        TPatchError: what the folder says of one is no request.
    """
    requests = []
    for edit in saved.edits:
        names = ("id", "prompt", "target", "subject", "keep", "form", "system", "turns", "aliases")
        fields = {name: edit[name] for name in names if name in edit}
        continuation, target = str(edit.get("continuation", "")), str(edit.get("target", ""))
        # In a chat it is the template that joins them.
        if edit.get("form") != "chat" and target and continuation.startswith((target, f" {target}")):
            fields["join"] = "none" if continuation.startswith(target) else "space"
        requests.append(parse_request(fields, f"edit {edit.get('id')!r}"))
    return requests


def saved_info(saved: SavedPatches) -> EditInfo:
    """What became of the requests of a folder of patches, as far as it keeps that: without what it cost.

    Args:
        saved: the folder, as `read_patches` returns it.
    """
    # Neurons are numbered through all layers, lower ones first.
    places = [(layer, n) for layer in sorted(saved.patches) for n in range(saved.patches[layer].key.shape[0])]
    results = []
    for edit in saved.edits:
        neurons: dict[int, list[int]] = {}
        for number in edit["neurons"]:
            layer, place = places[number]
            neurons.setdefault(layer, []).append(place)
        results.append(
            RequestInfo(
                str(edit["id"]),
                held=bool(edit["held"]),
                status=str(edit.get("status", "edited" if edit["held"] else "failed")),
                reason=str(edit.get("reason", "")),
                neurons={layer: tuple(some) for layer, some in neurons.items()},
                steps=int(edit.get("steps", 0)),
                losses=dict(edit.get("losses", {})),
                margin=edit.get("margin"),
                site=str(edit.get("site", "last")),
                continuation=str(edit.get("continuation", "")),
            )
        )
    size = sum(leaf.size for patch in saved.patches.values() for leaf in patch)
    return EditInfo(tuple(results), 0.0, 0.0, 0.0, 0.0, size)


def _belong_together(patch: Patch, neurons: Sequence[Sequence[int]]) -> bool:
    """Whether it is one patch, and each of its neurons belongs to one edit, or to all requests that one edit serves."""
    alike = patch.value.shape == patch.key.shape and patch.bias.shape == patch.key.shape[:1]
    numbers = sorted(number for edit in set(map(tuple, neurons)) for number in edit)
    return patch.key.ndim == 2 and alike and numbers == list(range(patch.key.shape[0]))


def check_model(saved: SavedPatches, model: Model) -> None:
    """Make sure that patches are for this very model.

    Raises:
        TPatchError: they were made for another configuration or other weights.
    """
    wanted, actual = saved.model.get("fingerprint"), fingerprint(model)
    if wanted != actual:
        precision = saved.model.get("dtype")
        raise TPatchError(
            f"the patches were made for {saved.model.get('name')!r}{f' in {precision}' if precision else ''} "
            f"(fingerprint {wanted}), and {model.name!r} in {model.dtype} has fingerprint "
            f"{actual}: other weights or another precision; use the model and the dtype that they were made for"
        )


@automatically
def load_patches(folder: str | Path, model: Model) -> dict[int, Patch]:
    """The neurons of a folder of patches, ``{layer: [n, d]}``, checked against the model.

    Args:
        folder: what `save_patches` wrote.
        model: the model that they shall correct.

    Raises:
        TPatchError: the folder cannot be read, or the patches were made for another model.
    """
    call = "load_patches(folder, model)"
    folder = as_path(folder, call, "a folder; give its path")
    check_loaded(model, call)
    saved = read_patches(folder)
    check_model(saved, model)
    return saved.patches
