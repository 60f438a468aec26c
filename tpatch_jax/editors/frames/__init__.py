"""A library of frames: what can be said and asked of people, places, organisations, works and other things."""

from tpatch_jax.editors.frames.choosing import other_frames, same_frames
from tpatch_jax.editors.frames.library import KINDS, Form, Relation, frames_of_kind, relations
from tpatch_jax.editors.frames.matching import Match, guess_kind, match_relation

__all__ = [
    "KINDS",
    "Form",
    "Match",
    "Relation",
    "frames_of_kind",
    "guess_kind",
    "match_relation",
    "other_frames",
    "relations",
    "same_frames",
]
