"""The edits of earlier steps: what later ones stay silent on and must not break."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from tpatch_jax.core.patch import Patch, preactivations, sized
from tpatch_jax.core.sizes import power_of_two
from tpatch_jax.editors.reading import Item
from tpatch_jax.models.collection import Sites, collect, joined, wrong_rows
from tpatch_jax.models.model import Model

__all__ = [
    "NO_SUBJECT",
    "PreviousEdits",
    "broken",
    "fires",
    "load_earlier",
    "nothing",
    "raise_thresholds",
    "refreshed",
    "remember",
    "save_earlier",
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
        heard: queries of the subject site at every token, ``[all tokens, d]``; ``[0, d]`` where it is not used.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    subjects: np.ndarray
    groups: np.ndarray
    wanted: np.ndarray
    sites: Sites
    heard: np.ndarray

    @property
    def rows(self) -> list[list[int]]:
        """Prompt and target of each edit."""
        return (
            [part.tolist() for part in np.split(self.tokens, np.cumsum(self.lengths)[:-1])] if len(self.tokens) else []
        )


def nothing(hidden_size: int, dtype: np.dtype) -> PreviousEdits:
    """No edit at all.

    Args:
        hidden_size: ``d``.
        dtype: of the network's arrays.
    """
    empty, none = np.zeros((0, hidden_size), dtype), np.zeros(0, np.int32)
    return PreviousEdits(none, none, none, none, none, none, Sites(empty, empty, empty), empty)


def remember(
    earlier: PreviousEdits,
    items: Sequence[Item],
    subjects: Sequence[tuple[int, int]],
    sites: Sites,
    heard: np.ndarray | None,
) -> PreviousEdits:
    """The edits so far and some more.

    Args:
        earlier: the edits so far.
        items: the new ones.
        subjects: of each the token at which its subject ends and its group, or -1 twice.
        sites: what the cut gives at their target tokens.
        heard: queries of the subject site at each of their tokens, if that is used.
    """
    token, group = np.asarray(subjects, np.int32).reshape(-1, 2).T
    new = PreviousEdits(
        np.asarray([one for item in items for one in item.rows[0]], np.int32),
        np.asarray([len(item.rows[0]) for item in items], np.int32),
        np.asarray([item.starts[0] for item in items], np.int32),
        token,
        group,
        np.asarray([one for item in items for one in item.target], np.int32),
        sites,
        earlier.heard[:0] if heard is None else heard,
    )
    flat = {
        name: np.concatenate([old, more])
        for name, old, more in zip(PreviousEdits._fields, earlier, new, strict=True)
        if name != "sites"
    }
    return PreviousEdits(**flat, sites=joined(earlier.sites, new.sites))


def broken(model: Model, earlier: PreviousEdits, patch: Patch) -> np.ndarray:
    """The rows of ``earlier.sites`` whose wanted token does not come out with a patch in the last layer."""
    return wrong_rows(model, earlier.sites, earlier.wanted, patch)


def fires(earlier: PreviousEdits, deep: Patch) -> np.ndarray:
    """On which edits each neuron of a patch at the subject site fires, ``[edits, n]`` bool."""
    z = _responses(deep, earlier.heard)
    owner = np.repeat(np.arange(len(earlier.lengths)), earlier.lengths)
    result = np.zeros((len(earlier.lengths), deep.key.shape[0]), bool)
    np.logical_or.at(result, owner, z > 0)
    return result


def refreshed(model: Model, earlier: PreviousEdits, touched: np.ndarray) -> PreviousEdits:
    """What the last layer sees of edits that any neuron touches, ``touched [edits, n]`` bool, from a changed model."""
    touched = np.asarray(touched.any(1))
    if not touched.any():
        return earlier
    rows, counts = earlier.rows, earlier.lengths - earlier.starts
    chosen = np.flatnonzero(touched)
    places = [range(earlier.starts[n] - 1, earlier.lengths[n] - 1) for n in chosen]
    found = collect(model, [rows[n] for n in chosen], places, model.layer(None))
    here = np.repeat(touched, counts)
    sites = Sites(*(np.array(old) for old in earlier.sites))
    for old, new in zip(sites, found, strict=True):
        old[here] = new
    return earlier._replace(sites=sites)


@jax.jit
def _preactivations(patch: Patch, query: Array) -> Array:
    return preactivations(patch, query)


def _responses(patch: Patch, query: np.ndarray) -> np.ndarray:
    """``q·k + b``, ``[rows, n]``, padded to few sizes."""
    count, neurons = query.shape[0], patch.key.shape[0]
    padded = np.pad(query, ((0, power_of_two(count, 64) - count), (0, 0)))
    return np.asarray(_preactivations(sized(patch._replace(layer=None), 64), padded), np.float32)[:count, :neurons]


def raise_thresholds(model: Model, earlier: PreviousEdits, patch: Patch, query: np.ndarray) -> Patch:
    """Earlier neurons with their thresholds raised above queries on which they fire though something else is wanted.

    ``k' = k·u/(u-t), b' = (b-t)·u/(u-t)``, where ``u`` is the neuron's strongest response to the edits it serves, which
    stays what it is, and ``t`` lies a little above its response to ``query``. A neuron that responds to both nearly
    alike, or without which an earlier edit would be lost, stays as it is.

    Args:
        model: the model.
        earlier: the edits that the neurons serve.
        patch: the neurons of earlier steps in the last layer, ``[n, d]``, on the host.
        query: where something else is wanted, ``[rows, d]``.
    """
    if not len(earlier.wanted) or not len(query) or not patch.key.shape[0]:
        return patch
    if query.ndim == 3:
        # Whole texts: some of their tokens may well sound alike.
        return patch
    own, strayed = _responses(patch, earlier.sites.query).max(0), _responses(patch, query).max(0)
    threshold = strayed + 0.1 * (own - strayed)
    raised = (strayed > 0) & (threshold < 0.9 * own)
    if not raised.any():
        return patch

    def higher(which: np.ndarray) -> Patch:
        by = np.where(which, own / np.where(which, own - threshold, 1.0), 1.0).astype(patch.key.dtype)
        bias = (patch.bias - np.where(which, threshold, 0.0).astype(patch.bias.dtype)) * by
        return patch._replace(key=patch.key * by[:, None], bias=bias)

    lost = np.setdiff1d(broken(model, earlier, higher(raised)), broken(model, earlier, patch))
    if len(lost):
        raised &= ~(_responses(patch, earlier.sites.query[lost]) > 0).any(0)
    return higher(raised)


def save_earlier(earlier: PreviousEdits) -> dict[str, np.ndarray]:
    """As named arrays."""
    flat = {name: value for name, value in earlier._asdict().items() if name != "sites"}
    return {f"earlier_{name}": np.asarray(value) for name, value in {**flat, **earlier.sites._asdict()}.items()}


def load_earlier(arrays: dict[str, np.ndarray]) -> PreviousEdits:
    """The inverse of `save_earlier`."""
    flat = {name: arrays[f"earlier_{name}"] for name in PreviousEdits._fields if name != "sites"}
    return PreviousEdits(**flat, sites=Sites(*(arrays[f"earlier_{name}"] for name in Sites._fields)))
