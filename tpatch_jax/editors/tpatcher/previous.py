"""The edits of earlier steps: what later ones stay silent on and must not break."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from tpatch_jax.core.patch import Patch, preactivations, sized
from tpatch_jax.core.sizes import power_of_two
from tpatch_jax.editors.reading import Item
from tpatch_jax.images import ImagePrompt
from tpatch_jax.models.collection import Sites, collect, joined, wrong_rows
from tpatch_jax.models.embedded import plain_row
from tpatch_jax.models.model import Model
from tpatch_jax.models.rows import ASK

__all__ = [
    "NO_SUBJECT",
    "PreviousEdits",
    "create_empty",
    "find_broken",
    "find_firing",
    "load_previous",
    "raise_thresholds",
    "refresh_sites",
    "remember",
    "save_previous",
]

NO_SUBJECT = -1


class PreviousEdits(NamedTuple):
    """Edits that hold, with what the network leaves at their target tokens.

    Attributes:
        tokens: prompts with their targets, one after the other, ``[all tokens]``.
        lengths: of each, ``[edits]``.
        starts: where in each the target begins, ``[edits]``.
        subjects: at which token each one's subject ends, -1 without one, ``[edits]``.
        groups: a number for each subject, -1 without one, ``[edits]``.
        wanted: the target tokens, ``[target tokens]``.
        sites: what the cut in the last layer gives at them, ``[target tokens, d]``.
        subject_query: queries of the subject site at every token, ``[all tokens, d]``; ``[0, d]`` where it is not used.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    subjects: np.ndarray
    groups: np.ndarray
    wanted: np.ndarray
    sites: Sites
    subject_query: np.ndarray

    @property
    def rows(self) -> list[list[int]]:
        """Prompt and target of each edit."""
        return (
            [part.tolist() for part in np.split(self.tokens, np.cumsum(self.lengths)[:-1])] if len(self.tokens) else []
        )


def create_empty(hidden_size: int, dtype: np.dtype) -> PreviousEdits:
    """No edit at all.

    Args:
        hidden_size: ``d``.
        dtype: of the network's arrays.
    """
    empty, none = np.zeros((0, hidden_size), dtype), np.zeros(0, np.int32)
    return PreviousEdits(none, none, none, none, none, none, Sites(empty, empty, empty), empty)


def remember(
    previous: PreviousEdits,
    items: Sequence[Item],
    subjects: Sequence[tuple[int, int]],
    sites: Sites,
    subject_query: np.ndarray | None,
) -> PreviousEdits:
    """The edits so far and some more.

    Args:
        previous: the edits so far.
        items: the new ones. Of pictures and embeddings their tokens are not kept.
        subjects: of each the token at which its subject ends and its group, or -1 twice.
        sites: what the cut gives at their target tokens.
        subject_query: queries of the subject site at each of their tokens, if that is used.
    """
    items = [_without_picture(item) for item in items]
    token, group = np.asarray(subjects, np.int32).reshape(-1, 2).T
    new = PreviousEdits(
        np.asarray([one for item in items for one in plain_row(item.rows[0])], np.int32),
        np.asarray([len(item.rows[0]) for item in items], np.int32),
        np.asarray([item.starts[0] for item in items], np.int32),
        token,
        group,
        np.asarray([one for item in items for one in item.target], np.int32),
        sites,
        previous.subject_query[:0] if subject_query is None else subject_query,
    )
    flat = {
        name: np.concatenate([old, more])
        for name, old, more in zip(PreviousEdits._fields, previous, new, strict=True)
        if name != "sites"
    }
    return PreviousEdits(**flat, sites=joined(previous.sites, new.sites))


def _without_picture(item: Item) -> Item:
    """An edit without the bytes of its picture: they are read in the last layer alone, where nothing is read again."""
    if not isinstance(item.texts[0], ImagePrompt):
        return item
    return item._replace(rows=[[ASK, *item.target]], starts=[1])


def find_broken(model: Model, previous: PreviousEdits, patch: Patch) -> np.ndarray:
    """The rows of ``previous.sites`` whose wanted token does not come out with a patch in the last layer."""
    return wrong_rows(model, previous.sites, previous.wanted, patch)


def find_firing(previous: PreviousEdits, patch: Patch) -> np.ndarray:
    """On which edits each neuron of a patch at the subject site fires, ``[edits, n]`` bool."""
    z = _responses(patch, previous.subject_query)
    owner = np.repeat(np.arange(len(previous.lengths)), previous.lengths)
    result = np.zeros((len(previous.lengths), patch.key.shape[0]), bool)
    np.logical_or.at(result, owner, z > 0)
    return result


def refresh_sites(model: Model, previous: PreviousEdits, touched: np.ndarray) -> PreviousEdits:
    """What the last layer sees of edits that any neuron touches, ``touched [edits, n]`` bool, from a changed model."""
    touched = np.asarray(touched.any(1))
    if not touched.any():
        return previous
    rows, counts = previous.rows, previous.lengths - previous.starts
    chosen = np.flatnonzero(touched)
    places = [range(previous.starts[n] - 1, previous.lengths[n] - 1) for n in chosen]
    seen = collect(model, [rows[n] for n in chosen], places, model.layer(None))
    here = np.repeat(touched, counts)
    sites = Sites(*(np.array(old) for old in previous.sites))
    for old, new in zip(sites, seen, strict=True):
        old[here] = new
    return previous._replace(sites=sites)


@jax.jit
def _preactivations(patch: Patch, query: Array) -> Array:
    return preactivations(patch, query)


def _responses(patch: Patch, query: np.ndarray) -> np.ndarray:
    """``q·k + b``, ``[rows, n]``, padded to few sizes."""
    count, neurons = query.shape[0], patch.key.shape[0]
    padded = np.pad(query, ((0, power_of_two(count, 64) - count), (0, 0)))
    return np.asarray(_preactivations(sized(patch, 64), padded), np.float32)[:count, :neurons]


def raise_thresholds(model: Model, previous: PreviousEdits, patch: Patch, query: np.ndarray) -> Patch:
    """Earlier neurons with their thresholds raised above queries on which they fire though something else is wanted.

    ``k' = k·u/(u-t), b' = (b-t)·u/(u-t)``, where ``u`` is the neuron's strongest response to the edits it serves, which
    stays what it is, and ``t`` lies a little above its response to ``query``. A neuron that responds to both nearly
    alike, or without which an earlier edit would be lost, stays as it is.

    Args:
        model: the model.
        previous: the edits that the neurons serve.
        patch: the neurons of earlier steps in the last layer, ``[n, d]``, on the host.
        query: where something else is wanted, ``[rows, d]``.
    """
    if not len(previous.wanted) or not len(query) or not patch.key.shape[0]:
        return patch
    if query.ndim == 3:
        # Whole texts: some of their tokens may well be alike.
        return patch
    strongest, strayed = _responses(patch, previous.sites.query).max(0), _responses(patch, query).max(0)
    threshold = strayed + 0.1 * (strongest - strayed)
    raised = (strayed > 0) & (threshold < 0.9 * strongest)
    if not raised.any():
        return patch

    def higher(which: np.ndarray) -> Patch:
        by = np.where(which, strongest / np.where(which, strongest - threshold, 1.0), 1.0).astype(patch.key.dtype)
        bias = (patch.bias - np.where(which, threshold, 0.0).astype(patch.bias.dtype)) * by
        return patch._replace(key=patch.key * by[:, None], bias=bias)

    lost = np.setdiff1d(find_broken(model, previous, higher(raised)), find_broken(model, previous, patch))
    if len(lost):
        raised &= ~(_responses(patch, previous.sites.query[lost]) > 0).any(0)
    return higher(raised)


_FILE_NAMES = {"subject_query": "heard"}
"""What fields are called in banks and journals, where their name differs."""


def _file_name(field: str) -> str:
    return f"earlier_{_FILE_NAMES.get(field, field)}"


def save_previous(previous: PreviousEdits) -> dict[str, np.ndarray]:
    """As named arrays, for files."""
    fields = {name: value for name, value in previous._asdict().items() if name != "sites"}
    return {_file_name(name): np.asarray(value) for name, value in {**fields, **previous.sites._asdict()}.items()}


def load_previous(arrays: Mapping[str, np.ndarray]) -> PreviousEdits:
    """The inverse of `save_previous`."""
    fields = {name: arrays[_file_name(name)] for name in PreviousEdits._fields if name != "sites"}
    return PreviousEdits(**fields, sites=Sites(*(arrays[_file_name(name)] for name in Sites._fields)))
