"""What later fits need to know about one edit: its tokens and what the network leaves at them.

A piece is `tpatch_jax.editors.tpatcher.previous.PreviousEdits` of a single edit, as named arrays without JAX.
"""

from collections.abc import Sequence

import numpy as np

from tpatch_jax.bank.segments import Arrays

__all__ = ["join_pieces", "split_pieces"]

EDIT = ("lengths", "starts", "subjects", "groups")
TOKEN = ("tokens", "heard")
TARGET = ("wanted", "query", "output", "residual")
PREFIX = "earlier_"


def split_pieces(arrays: Arrays) -> list[Arrays]:
    """The pieces in the arrays of several edits, as `tpatch_jax.editors.tpatcher.previous.save_earlier` names them.

    Args:
        arrays: ``earlier_tokens``, ``earlier_lengths`` and so on; others are passed over.
    """
    lengths = arrays[f"{PREFIX}lengths"]
    targets = lengths - arrays[f"{PREFIX}starts"]
    ends = {EDIT: np.arange(len(lengths) + 1)}
    ends |= {TOKEN: np.cumsum([0, *lengths]), TARGET: np.cumsum([0, *targets])}
    pieces: list[Arrays] = [{} for _ in lengths]
    for names, bounds in ends.items():
        for name in names:
            array = arrays[PREFIX + name]
            for number, piece in enumerate(pieces):
                # queries of the subject site are there only if it is used
                piece[PREFIX + name] = array[bounds[number] : bounds[number + 1]] if len(array) else array
    return pieces


def join_pieces(pieces: Sequence[Arrays]) -> Arrays:
    """The inverse of `split_pieces`, of at least one piece; whole texts are padded to the longest."""
    joined = {}
    for name in pieces[0]:
        arrays = [piece[name] for piece in pieces]
        if arrays[0].ndim == 3:
            longest = max(array.shape[1] for array in arrays)
            arrays = [np.pad(array, ((0, 0), (0, longest - array.shape[1]), (0, 0))) for array in arrays]
        joined[name] = np.concatenate(arrays)
    return joined
