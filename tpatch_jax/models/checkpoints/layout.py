"""Which checkpoint tensor holds which of our parameters, and how to get from one to the other."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.family import Family
from tpatch_jax.models.shapes import parameter_shapes
from tpatch_jax.typing import Params

__all__ = ["Stored", "flatten", "insert", "join", "layout", "split"]

Shape = tuple[int, ...]


class Stored(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
        paths: which of our parameters it holds, one after the other.
        shapes: their shapes.
        transposed: whether kernels lie in it as ``[out, in]``.
        heads: so many times the parts alternate; 1 is no alternation.
        row: whether it has an axis of one before ours.
        view: its shape, where it holds the same numbers in other axes; see `Family.views`.
        expert: which entry of our parameter it holds, of a tensor for one of many experts.
    """

    paths: tuple[str, ...]
    shapes: tuple[Shape, ...]
    transposed: bool
    heads: int
    row: bool = False
    view: Shape = ()
    expert: int | None = None

    @property
    def shape(self) -> Shape:
        """The shape of the tensor in the checkpoint."""
        if self.view:
            return self.view
        *rows, _ = self.shapes[0]
        ours = (*rows, sum(shape[-1] for shape in self.shapes))
        if self.row:
            return (1, *ours)
        return (*ours[:-2], ours[-1], ours[-2]) if self.transposed else ours


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested dicts with its dotted path."""
    for name, entry in tree.items():
        path = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(entry, Mapping):
            yield from flatten(entry, path)
        else:
            yield path, entry


def insert(tree: Params, path: str, leaf: Any) -> None:
    """Put a leaf under its dotted path into nested dicts; numbers in the path are layers."""
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = leaf


def layout(
    family: Family, config: NetworkConfig, merged: Mapping[int, int] | None = None, fused: bool = False
) -> dict[str, Stored]:
    """Every tensor of a checkpoint by its name.

    Args:
        family: the model's family.
        config: the network's description.
        merged: how many patch neurons are merged into which layers.
        fused: whether one tensor holds all experts of a layer, as transformers has them in memory.
    """
    shapes = {path: leaf.shape for path, leaf in flatten(parameter_shapes(config, merged)) if leaf.size}
    experts = family.experts
    renamed = experts.renamed if experts and fused else ()
    together = {part: entry for entry in experts.fused for part in entry.parts} if experts else {}
    result: dict[str, Stored] = {}
    views = family.views(config)
    for path, shape in shapes.items():
        parts = path.split(".")
        layer = next((part for part in parts if part.isdigit()), "")
        general = ".".join("{}" if part == layer else part for part in parts) if layer else path
        parent, _, leaf = general.rpartition(".")
        stored_leaf = leaf if leaf == "bias" else "weight"
        names = {**family.names, **experts.joined} if experts and layer and config.mixed(int(layer)) else family.names
        # An unembedding is a linear layer like any other, even where the blocks store theirs the other way round.
        transposed = leaf == "kernel" and (family.transposed or parts[0] == "head")
        if experts and parent in experts.each and not fused:
            for number in range(shape[0]):
                name = f"{experts.each[parent].format(layer, number)}.{stored_leaf}"
                result[name] = Stored((path,), (shape[1:],), transposed, 1, expert=number)
        elif experts and (entry := together.get(parent)):
            paths = tuple(f"{part.format(layer)}.{leaf}" for part in entry.parts)
            held = tuple(shapes[part] for part in paths)
            name = entry.name.format(layer) + ("_bias" if leaf == "bias" else "")
            turned, heads = transposed and experts.transposed, held[0][-1] if entry.by_neuron else 1
            result[name] = Stored(paths, held, turned, heads)
        elif general in names:
            name = names[general].format(layer)
            result[name] = Stored((path,), (shape,), transposed, 1, name == family.optional_row, views.get(path, ()))
        elif parent in names:
            name = f"{names[parent].format(layer)}.{stored_leaf}"
            result[name] = Stored((path,), (shape,), transposed, 1, view=views.get(path, ()))
        else:
            entry = next(entry for entry in family.fused if parent in entry.parts)
            paths = tuple(f"{part.format(layer)}.{leaf}" for part in entry.parts)
            heads = config.heads if entry.by_head else 1
            stored = Stored(paths, tuple(shapes[part] for part in paths), transposed, heads)
            result[f"{entry.name.format(layer)}.{stored_leaf}"] = stored
    for name in list(result) if renamed else ():
        other = name
        for ours, theirs in renamed:
            other = other.replace(ours, theirs)
        result[other] = result.pop(name)
    return result


def split(stored: Stored, tensor: np.ndarray) -> dict[str, np.ndarray]:
    """Our parameters from a checkpoint's tensor; views where that is possible."""
    if stored.view:
        tensor = tensor.reshape(stored.shapes[0][::-1] if stored.transposed else stored.shapes[0])
    ours = tensor[0] if stored.row else np.swapaxes(tensor, -1, -2) if stored.transposed else tensor
    if len(stored.paths) == 1:
        return {stored.paths[0]: ours}
    by_head = ours.reshape(*ours.shape[:-1], stored.heads, -1)
    edges = np.cumsum([shape[-1] // stored.heads for shape in stored.shapes])[:-1]
    parts = np.split(by_head, edges, axis=-1)
    return {path: part.reshape(shape) for path, shape, part in zip(stored.paths, stored.shapes, parts, strict=True)}


def join(stored: Stored, parts: Sequence[np.ndarray]) -> np.ndarray:
    """The inverse of `split`: a checkpoint's tensor, contiguous, from our parameters in the order of ``paths``."""
    if stored.expert is not None:
        parts = [part[stored.expert] for part in parts]
    by_head = [np.asarray(part).reshape(*part.shape[:-1], stored.heads, -1) for part in parts]
    ours = np.concatenate(by_head, -1) if len(by_head) > 1 else by_head[0]
    ours = ours.reshape(*ours.shape[:-2], -1)
    turned = np.swapaxes(ours, -1, -2) if stored.transposed else ours
    tensor = np.ascontiguousarray(ours[None] if stored.row else turned)
    return tensor.reshape(stored.view) if stored.view else tensor
