"""Reading and writing Hugging Face style folders: ``config.json`` and safetensors, one file or shards."""

import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tpatch_jax.core.devices import host
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.checkpoints.completed_settings import complete_settings
from tpatch_jax.models.checkpoints.layout import Stored, flatten, insert, join, layout, split
from tpatch_jax.models.checkpoints.mxfp4 import BLOCKS, METHOD, SCALES, unpack_mxfp4
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.family import Family
from tpatch_jax.models.families.registry import configure, family_of
from tpatch_jax.models.families.text_parts import TEXT_OF, has_text_part, text_names, text_settings
from tpatch_jax.models.families.vit import PREPROCESSOR, preprocessing
from tpatch_jax.models.families.whisper import GENERATION, extraction
from tpatch_jax.models.shapes import merged_neurons, parameter_shapes
from tpatch_jax.models.sharding import place
from tpatch_jax.storage.files import replace_folder
from tpatch_jax.storage.processes import one_process_writes
from tpatch_jax.typing import Params

__all__ = [
    "Plan",
    "check_no_adapter",
    "is_packed",
    "mark_files",
    "plan_folder",
    "quantisation",
    "read_folder",
    "read_settings",
    "write_folder",
]


NEURONS_KEY = "tpatch_neurons"
"""In ``config.json``: how many neurons were merged into which layers, ``{"29": 12}``."""

TEMPLATES = "additional_chat_templates"
"""Where transformers keeps the chat templates of a model that has several."""

ADAPTER = "adapter_config.json"

_OURS = ("config.json", "tpatch_source.json", "tpatch_export.json")
"""What a folder says about itself, which would be wrong about another."""

_READ_IMAGES = {"vit": "ViT", "deit": "DeiT"}
_STARTS_WITH, _ENDS_WITH = "decoder_start_token_id", "eos_token_id"
_FLOATS = ("F32", "F16", "BF16", "F64")
_PACKED = "MXFP4"


def read_settings(folder: Path) -> dict[str, Any]:
    """What ``config.json`` says, completed with the architecture's defaults.

    Of a network that reads images as well it is what describes its text part, if that is read.

    Raises:
        TPatchError: no such file, not JSON, or an architecture that is unknown here.
    """
    path = folder / "config.json"
    check_no_adapter(folder)
    try:
        text = path.read_text("utf-8")
        raw = json.loads(text)
    except FileNotFoundError:
        raise TPatchError(
            f"{folder} has no config.json; a model is a folder with config.json and safetensors"
        ) from None
    except ValueError as error:
        raise TPatchError(f"{path} is not JSON ({error}); fetch the model again") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise TPatchError(f"{path} names no 'model_type'; copy the model's original config.json beside its weights")
    if not has_text_part(raw):
        family_of(raw)
    try:
        completed = complete_settings(folder, text)
    # transformers checks the kinds of settings with errors of its own
    except Exception as error:
        reason = " ".join(str(error).split())
        raise TPatchError(f"{path} cannot be used ({reason}); copy the model's original config.json there") from error
    if has_text_part(raw):
        return _text_part(folder, raw, completed)
    _check_rotation(path, raw, completed)
    # Where a configuration was read from is no part of the model.
    completed.pop("_name_or_path", None)
    # What the file leaves open with a null, transformers has filled in.
    settings = completed | {name: entry for name, entry in raw.items() if entry is not None}
    if settings["model_type"] in (*_READ_IMAGES, "whisper"):
        settings[PREPROCESSOR] = _beside(folder, PREPROCESSOR)
    if settings["model_type"] == "whisper":
        settings[GENERATION] = _beside(folder, GENERATION)
    return settings | _generation(folder, settings)


def _text_part(folder: Path, raw: Mapping[str, Any], completed: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the text part of a network that reads images as well, if that part is read."""
    settings = text_settings(raw, completed)
    quantised = raw.get("quantization_config")
    settings |= {"quantization_config": quantised} if quantised else {}
    settings.pop("_name_or_path", None)
    try:
        family_of(settings)
    except TPatchError as error:
        raise TPatchError(f"the text part of this {raw['model_type']} is not read: {error}") from None
    return settings | _generation(folder, settings)


def _beside(folder: Path, name: str) -> dict[str, Any]:
    """What another file of settings says, such as ``preprocessor_config.json``; nothing without that file."""
    path = folder / f"{name}.json"
    try:
        told = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TPatchError(f"{path} cannot be read ({error}); copy the model's original file there") from None
    if not isinstance(told, dict):
        raise TPatchError(f"{path} holds no JSON object; copy the model's original file there")
    return told


def check_no_adapter(folder: Path) -> None:
    """Make sure that no adapter of PEFT's lies there, alone or beside a model of which it would be a part.

    Raises:
        TPatchError: one does.
    """
    path = next((folder / name for name in (ADAPTER, "adapter_model.safetensors") if (folder / name).exists()), None)
    if path is not None:
        beside = " beside a model, which would be read without it" if (folder / "config.json").exists() else ""
        raise TPatchError(
            f"{path} belongs to an adapter{beside}; merge it first (merge_and_unload of the peft package, then "
            "save_pretrained) and load that folder, or move the adapter's files away"
        )


def _check_rotation(path: Path, raw: Mapping[str, Any], completed: Mapping[str, Any]) -> None:
    """Make sure that the older and the newer entry on rotary embeddings say one thing, for transformers reads one.

    Raises:
        TPatchError: ``rope_scaling`` stands beside ``rope_parameters`` and transformers makes something else of them.
    """
    ours, older = raw.get("rope_parameters"), raw.get("rope_scaling")
    if not isinstance(ours, Mapping) or not isinstance(older, Mapping):
        return
    stock = completed.get("rope_parameters")

    def rules(entry: Any) -> dict[str, Any]:
        entry = dict(entry) if isinstance(entry, Mapping) else {}
        kind = entry.pop("type", None)
        entry.setdefault("rope_type", kind or "default")
        entry.setdefault("rope_theta", raw.get("rope_theta") or 10_000.0)
        return {name: value for name, value in entry.items() if value is not None}

    read, there = rules(stock), rules(ours)
    for name in sorted(read.keys() | there.keys()):
        if read.get(name) != there.get(name):
            raise TPatchError(
                f"{path} has 'rope_scaling' beside 'rope_parameters', and transformers follows the older one: {name} "
                f"is {read.get(name)!r} there and {there.get(name)!r} in 'rope_parameters'; remove 'rope_scaling', or "
                "'rope_parameters'"
            )


def _generation(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """With which token a decoder starts and with which it ends, where ``generation_config.json`` says so.

    It counts more in transformers. Tokens that end a text there do so besides those that ``config.json`` names.
    """
    try:
        generation = json.loads((folder / "generation_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(generation, dict):
        return {}
    start, changes = generation.get(_STARTS_WITH), {}
    if isinstance(start, int):
        changes[_STARTS_WITH] = start
    there, more = _numbers(settings.get(_ENDS_WITH)), _numbers(generation.get(_ENDS_WITH))
    if not set(more) <= set(there):
        changes[_ENDS_WITH] = list(dict.fromkeys([*there, *more]))
    return changes


def _numbers(entry: Any) -> list[int]:
    return [number for number in (entry if isinstance(entry, list) else [entry]) if isinstance(number, int)]


def quantisation(folder: Path, settings: Mapping[str, Any]) -> str:
    """How the weights of a folder are quantised, by what its files say; empty where none says so.

    Args:
        folder: the model's.
        settings: of its ``config.json``.
    """
    said = settings.get("quantization_config")
    if not said:
        # Where NVIDIA's tools say it.
        try:
            said = json.loads((folder / "hf_quant_config.json").read_text("utf-8")).get("quantization")
        except (OSError, ValueError, AttributeError):
            return ""
    if not isinstance(said, Mapping):
        return "unknown" if said else ""
    named = [said.get(name) for name in ("quant_method", "quant_algo")]
    return " ".join(str(name) for name in named if name) or "unknown"


def _shards(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor: ``model.safetensors``, else what the index lists, else every file there is."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return dict.fromkeys(_names(single), single)
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
        raise TPatchError(
            f"{folder} holds no safetensors weights{hint}; put model.safetensors beside config.json, or take a model "
            "of the hub that has them, for pickles are never fetched"
        )
    file_of: dict[str, Path] = {}
    for path in files:
        for name in _names(path):
            if name in file_of:
                raise TPatchError(
                    f"{folder} holds {name} twice, in {file_of[name].name} and in {path.name}; leave the model's own "
                    "files there, or name the one that counts model.safetensors"
                )
            file_of[name] = path
    return file_of


def mark_files(folder: Path) -> str:
    """What changes when a model's settings or weights on disk change: name, place, size and times of each file.

    Args:
        folder: the model's.
    """
    marks = []
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        state = path.stat()
        marks.append((str(path.resolve()), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns))
    return json.dumps(marks)


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, "np") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise TPatchError(f"{path} is damaged ({error}); fetch it again") from None


def _common_prefix(there: Mapping[str, Path], wanted: Sequence[str]) -> str:
    """What stands before most of the wanted names in a checkpoint that has none of them under its own name."""
    count: Counter[str] = Counter()
    # A name that others end with, such as "weight", would tell nothing.
    known = {name for name in wanted if name.count(".") > 1} - there.keys()
    for name in there:
        parts = name.split(".")
        for first in range(1, len(parts)):
            # An adapter calls the layer that it wraps its base layer.
            if ".".join(parts[first:]).replace(".base_layer.", ".") in known:
                count[".".join(parts[:first]) + "."] += 1
                break
    prefix, number = count.most_common(1)[0] if count else ("", 0)
    return prefix if 2 * number > len(known) else ""


def _available(shards: Mapping[str, Path], wanted: Sequence[str]) -> dict[str, str]:
    """The names under which a checkpoint holds what is wanted; the first BERTs call a norm's parts gamma and beta."""
    names = {}
    for name in wanted:
        older = name.removesuffix("weight") + "gamma" if name.endswith("weight") else name.removesuffix("bias") + "beta"
        if name in shards or older in shards:
            names[name] = name if name in shards else older
    return names


def _alike(shards: Mapping[str, Path], one: str, other: str) -> bool:
    """Whether two tensors are the same, bit for bit."""
    tensors = []
    for name in (one, other):
        with safe_open(shards[name], "np") as file:
            tensors.append(file.get_tensor(name))
    return np.array_equal(*tensors)


def _merged(settings: Mapping[str, Any]) -> dict[int, int]:
    """How many neurons are merged into which layers, as ``config.json`` says."""
    return {int(layer): int(count) for layer, count in settings.get(NEURONS_KEY, {}).items()}


def _with_labels(settings: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    numbered = {str(number): label for number, label in enumerate(labels)}
    return {**settings, "id2label": numbered, "label2id": {label: number for number, label in enumerate(labels)}}


def _expected(
    family: Family, config: NetworkConfig, merged: Mapping[int, int], shards: Mapping[str, Path], left_out: str
) -> dict[str, Stored]:
    """The tensors of a folder; those of experts in one if it holds any such, else in one for each expert."""
    if config.mixture:
        fused = layout(family, config, merged, fused=True)
        whole = [name for name, stored in fused.items() if len(stored.shape) == 3]
        if any(name.removeprefix(left_out) in shards for name in whole):
            return fused
    return layout(family, config, merged)


def is_packed(settings: Mapping[str, Any]) -> bool:
    """Whether experts are in MXFP4, which is read."""
    quantised = settings.get("quantization_config")
    return isinstance(quantised, Mapping) and quantised.get("quant_method") == METHOD and _keeps_packed(settings)


def _keeps_packed(settings: Mapping[str, Any]) -> bool:
    experts = family_of(settings).experts
    return experts is not None and not experts.transposed


def _packed_shape(blocks: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what numbers in MXFP4 stand for; theirs, where the exponents are not theirs."""
    if len(blocks) != 4 or blocks[:-1] != scales or blocks[-1] != 16:
        return blocks
    return (blocks[0], 32 * blocks[2], blocks[1])


def _in_head(name: str) -> bool:
    """Whether one of our parameters belongs to a classification head."""
    return name.startswith("classifier.")


class Plan(NamedTuple):
    """What reading a folder comes to, from its settings and the headers of its files.

    Attributes:
        config: the network's description.
        settings: of ``config.json``.
        shards: which file holds which tensor.
        wanted: the tensors that are read, by the names that the family gives them, and what becomes of each.
        names: under which name the folder holds each of them.
        sizes: how many numbers each has.
        kinds: the type of each, as safetensors names it.
        left_out: tensors that the folder holds and that are not read.
        problems: why the folder cannot be read; empty where it can.
    """

    config: NetworkConfig
    settings: dict[str, Any]
    shards: dict[str, Path]
    wanted: dict[str, Stored]
    names: dict[str, str]
    sizes: dict[str, int]
    kinds: dict[str, str]
    left_out: tuple[str, ...]
    problems: tuple[str, ...]


def plan_folder(
    folder: Path,
    labels: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    compare: bool = True,
) -> Plan:
    """Find out what is read of a folder, and what stands against it.

    Args:
        folder: with ``config.json`` and safetensors.
        labels: as in `read_folder`.
        settings: as in `read_folder`.
        compare: look into tensors that may be two copies of one; without it they are taken for copies.

    Raises:
        TPatchError: something stands against it that says more than a list of tensors would.
    """
    settings = dict(read_settings(folder) if settings is None else settings)
    packed = is_packed(settings)
    if packed:
        # What is read is plain numbers, and so is what will be written of it.
        settings.pop("quantization_config")
    if kind := quantisation(folder, settings):
        raise TPatchError(
            f"{folder} is quantised ({kind}), and patches need weights as plain numbers; fetch the unquantised model, "
            "or a GGUF file, which is converted"
        )
    if labels is not None:
        settings = _with_labels(settings, labels)
    config, family = configure(settings), family_of(settings)
    if labels is not None and not config.labels:
        raise TPatchError(
            f"{folder} is a {config.family}, which has no classification head; give labels to an encoder, such as a "
            "BERT"
        )
    merged = _merged(settings)
    held = _shards(folder)
    # Of a network that reads images as well only the text part counts, under the names that it would have alone.
    there = text_names(held) if TEXT_OF in settings else dict(zip(held, held, strict=True))
    shards = {name: held[stored] for name, stored in there.items()}

    def alike(one: str, other: str) -> bool:
        return not compare or _alike(held, there[one], there[other])

    if family.own_head:
        config = dataclasses.replace(config, tied=f"{family.names['head']}.weight" not in shards)
    # Checkpoints of the network without its head leave out the first part of every name.
    bare = not any(name.startswith(family.prefix) for name in shards)
    embedding, head = family.names.get("embed.embedding", ""), f"{family.names.get('head', '')}.weight"
    embedding = embedding.removeprefix(family.prefix) if bare else embedding
    if config.tied and head in shards and embedding in shards and not alike(head, embedding):
        # As transformers has it: what differs is not tied, whatever the settings say. Those of an encoder-decoder stay,
        # for they tie the embeddings of its two stacks as well.
        config = dataclasses.replace(config, tied=False)
        settings = settings if config.encoder else {**settings, "tie_word_embeddings": False}
    kept = family.prefix if bare else ""
    wanted = {
        name.removeprefix(kept): stored for name, stored in _expected(family, config, merged, shards, kept).items()
    }
    names = _available(shards, list(wanted))
    if packed:
        names |= {name: name + BLOCKS for name in wanted if name + BLOCKS in shards and name + SCALES in shards}
    if config.tied and head in shards:
        # Of what is the same some savers keep one name only, and not always the embedding's.
        names.setdefault(embedding, head)
    missing = [name for name in wanted if name not in names and name != family.optional_row]
    headless = [name for name in missing if _in_head(wanted[name].paths[0])]
    if labels is not None:
        missing = [name for name in missing if name not in headless]
    elif headless and headless == missing:
        raise TPatchError(
            f"{folder} holds an encoder without a classification head ({missing[0]} is missing); train one with "
            "`tpatch finetune`, or take a checkpoint that was made for sequence classification"
        )
    if missing and (prefix := _common_prefix(shards, list(wanted))):
        wrapped = next(name for name in sorted(shards) if name.startswith(prefix))
        prefix = prefix.removesuffix(family.prefix) if bare else prefix
        raise TPatchError(
            f"{folder}: the names of its tensors begin with {prefix!r}, such as {wrapped!r}: they were saved from a "
            "wrapped model; save the model inside it instead (of torch.compile `_orig_mod`, of peft what "
            "merge_and_unload returns, of DataParallel `module`), or rename the tensors"
        )
    problems = [f"{name} is missing" for name in missing]
    passed_over = (*(family.other_heads if labels is not None else ()), *family.passes_over(settings))
    known, left_out = set(names.values()), []
    known |= {name + SCALES for name, stored in names.items() if stored == name + BLOCKS}
    for name in shards:
        if name in known:
            continue
        if name.endswith(family.constants) or name.startswith(passed_over):
            left_out.append(name)
            continue
        if name.endswith(family.copies):
            if embedding in names and not alike(name, names[embedding]):
                problems.append(f"{name} differs from {embedding}, and one embedding for both stacks is supported")
            left_out.append(name)
        elif config.tied and name == head:
            left_out.append(name)
        else:
            problems.append(f"{name} is not part of a {config.family} model")
    names = {name: there[ours] for name, ours in names.items()}
    left_out = [there[name] for name in left_out] + sorted(held.keys() - set(there.values()))
    sizes, kinds = {}, {}
    with ExitStack() as stack:
        files = {path: stack.enter_context(safe_open(path, "np")) for path in sorted(set(held.values()))}
        for name, stored in sorted(names.items()):
            part, expected = files[held[stored]].get_slice(stored), wanted[name].shape
            shape, kind = tuple(part.get_shape()), part.get_dtype()
            if stored == name + BLOCKS:
                scales = files[held[name + SCALES]].get_slice(name + SCALES)
                shape, kind = _packed_shape(shape, tuple(scales.get_shape())), _PACKED
            if shape != expected:
                if labels is not None and _in_head(wanted[name].paths[0]):
                    continue
                problems.append(f"{name} has shape {shape}, config.json implies {expected}")
            elif kind not in (*_FLOATS, _PACKED):
                problems.append(f"{name} is {kind}: a quantised checkpoint; fetch the unquantised model")
            sizes[name], kinds[name] = math.prod(shape), kind
    return Plan(config, settings, held, wanted, names, sizes, kinds, tuple(left_out), tuple(problems))


def read_folder(
    folder: Path,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    labels: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> tuple[NetworkConfig, Params, dict[str, Any]]:
    """Read a model, tensor by tensor, so that memory never holds it twice.

    Args:
        folder: with ``config.json`` and safetensors.
        dtype: ``"float32"`` or ``"bfloat16"`` for the parameters; ``None`` keeps what the file has.
        mesh: devices to which the parameters go directly; see `tpatch_jax.models.sharding`.
        labels: make a classifier with these labels of an encoder: what its head has of that is read, the rest is left
            out, and other heads are passed over.
        settings: what `read_settings` gave, if it was asked before; ``config.json`` is then not read again.

    Returns:
        The decoder's description, its parameters, and the settings of ``config.json``.

    Raises:
        TPatchError: weights are missing, damaged, of a wrong shape, or left over; all such tensors are named together.
    """
    plan = plan_folder(folder, labels, settings)
    config, settings, shards, wanted, names, sizes = plan[:6]
    problems, family = plan.problems, family_of(settings)
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise TPatchError(f"{folder} does not hold the model that its config.json describes: {shown}")
    params: Params = {}
    stacks = _Stacks(wanted[name] for name in sizes)
    # The largest first and each through a handle of its own: what is held twice for a moment, the tensor at hand and
    # the mapped file behind it, is then never much of the whole.
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        with safe_open(shards[names[name]], "np") as file:
            tensor = file.get_tensor(names[name])
        if names[name] == name + BLOCKS:
            with safe_open(shards[name + SCALES], "np") as file:
                # The numbers that share an exponent stand along what is summed over.
                tensor = np.swapaxes(unpack_mxfp4(tensor, file.get_tensor(name + SCALES)), -1, -2)
        parts = split(wanted[name], tensor)
        if (expert := wanted[name].expert) is not None:
            parts = stacks.add(parts, expert)
        for path, part in parts.items():
            # Placing is asynchronous; without waiting, what is still to be copied would pile up on a busy machine.
            kind = "float32" if path.endswith(family.precise) else dtype
            insert(params, path, jax.block_until_ready(place(path, part, kind, mesh)))
    if family.optional_row in wanted and family.optional_row not in names:
        stored = wanted[family.optional_row]
        kind = dtype or jax.tree.leaves(params)[0].dtype.name
        insert(params, stored.paths[0], place(stored.paths[0], np.zeros(stored.shapes[0], np.float32), kind, mesh))
    for path, leaf in flatten(parameter_shapes(config, _merged(settings))):
        if not leaf.size:
            # Beside experts stand no neurons before there are patches.
            kind = dtype or jax.tree.leaves(params)[0].dtype.name
            insert(params, path, place(path, np.zeros(leaf.shape, np.float32), kind, mesh))
    return config, _ordered(params), settings


class _Stacks:
    """Parameters of all experts, of which a checkpoint has a tensor for each: brought together as they come."""

    def __init__(self, wanted: Iterable[Stored]) -> None:
        self.missing = Counter(path for stored in wanted if stored.expert is not None for path in stored.paths)
        self.size = dict(self.missing)
        self.arrays: dict[str, np.ndarray] = {}

    def add(self, parts: Mapping[str, np.ndarray], expert: int) -> dict[str, np.ndarray]:
        """Take what one expert has of some parameters; those that are whole now are given back."""
        whole = {}
        for path, part in parts.items():
            array = self.arrays.get(path)
            if array is None:
                array = np.empty((self.size[path], *part.shape), part.dtype)
            elif array.dtype != part.dtype:
                # Experts of several types are read without a loss.
                array = array.astype(np.float32)
            array[expert] = part
            self.arrays[path] = array
            self.missing[path] -= 1
            if not self.missing[path]:
                whole[path] = self.arrays.pop(path)
        return whole


def _ordered(params: Params) -> Params:
    """The same tree with its layers in order, those of an encoder too."""
    layers = {index: params["layers"][index] for index in sorted(params["layers"])}
    ordered = {**params, "layers": layers}
    return {**ordered, "encoder": _ordered(params["encoder"])} if "encoder" in params else ordered


def _position_table(config: NetworkConfig, dtype: str) -> np.ndarray:
    """Sines and cosines of all positions, computed as transformers does."""
    width = config.hidden_size
    angles = np.arange(config.context)[:, None] / np.power(10_000, 2 * np.arange(width // 2) / width)
    return np.concatenate([np.sin(angles), np.cos(angles)], -1).astype(np.float32).astype(jax.numpy.dtype(dtype))


def write_folder(
    folder: Path, config: NetworkConfig, params: Params, settings: Mapping[str, Any], source: Path | None = None
) -> None:
    """Write a model as a Hugging Face style folder, whole or not at all; of several processes the first one writes.

    Args:
        folder: must not exist yet, or be empty.
        config: the network's description.
        params: its parameters; merged neurons are recorded in ``config.json``.
        settings: what the new ``config.json`` shall say besides.
        source: a folder whose tokenizer files are copied along.

    Raises:
        TPatchError: the folder holds something already.
    """
    merged, family = merged_neurons(config, params), family_of(settings)
    # Where the model was read from is of this machine; of two entries on rotary embeddings others follow the older one.
    left_out = {
        NEURONS_KEY,
        TEXT_OF,
        "_name_or_path",
        PREPROCESSOR,
        GENERATION,
        # It names Python files that are not written; transformers has the class.
        "auto_map",
        *(["rope_scaling"] if settings.get("rope_parameters") else []),
    }
    new = {name: entry for name, entry in settings.items() if name not in left_out}
    dtype = str(jax.tree.leaves(params)[0].dtype)
    new.update({"dtype": dtype, "torch_dtype": dtype})
    if config.image is not None and not new.get("architectures"):
        # Of the two classes that transformers has for a DeiT it takes the one that is named, and fails without.
        new["architectures"] = [f"{_READ_IMAGES[family.name]}ForImageClassification"]
    if merged:
        new[NEURONS_KEY] = {str(layer): count for layer, count in merged.items()}
    leaves = dict(flatten(params))
    tensors = {
        name: join(stored, [host(leaves[path]) for path in stored.paths])
        for name, stored in layout(family, config, merged).items()
    }
    if settings.get("tie_word_embeddings") is False and not family.own_head and family.copies:
        # Without that tie transformers looks for the embedding of each stack under its own name.
        embedding = tensors[family.names["embed.embedding"]]
        tensors |= {f"{family.prefix}{name}": embedding for name in family.copies}
    tensors |= {name: _position_table(config, dtype) for name in family.position_tables}
    with one_process_writes(folder) as writes:
        if writes:
            with replace_folder(folder) as temporary:
                save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
                (temporary / "config.json").write_text(json.dumps(new, indent=2, sort_keys=True) + "\n", "utf-8")
                for path in sorted(source.iterdir()) if source else ():
                    ours = path.name in _OURS or path.name.endswith(".index.json")
                    if path.is_file() and path.suffix in (".json", ".txt", ".model", ".jinja") and not ours:
                        shutil.copyfile(path, temporary / path.name)
                beside = {PREPROCESSOR: preprocessing(settings)} if config.image is not None else {}
                if config.encoder and config.encoder.audio:
                    beside = {PREPROCESSOR: extraction(settings), GENERATION: dict(settings.get(GENERATION) or {})}
                for name, entries in beside.items():
                    told = json.dumps(entries, indent=2, sort_keys=True) + "\n"
                    (temporary / f"{name}.json").write_text(told, "utf-8")
                templates = source / TEMPLATES if source else None
                if templates and templates.is_dir():
                    (temporary / TEMPLATES).mkdir()
                    for path in sorted(templates.glob("*.jinja")):
                        shutil.copyfile(path, temporary / TEMPLATES / path.name)
