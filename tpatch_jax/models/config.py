"""The frozen description of a decoder: everything the network code needs to know that is not a weight."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

__all__ = ["DecoderConfig"]


@dataclass(frozen=True)
class DecoderConfig:
    """What distinguishes one decoder from another, hashable so that it can be static under ``jax.jit``.

    Attributes:
        family: name in the table of families, such as ``"llama"``.
        vocabulary: rows of the embedding.
        width: ``d``, the width of the residual stream.
        layers: number of blocks.
        heads: query heads.
        key_value_heads: key and value heads; fewer than ``heads`` means grouped-query attention.
        head_width: width of one head.
        ffn_width: hidden neurons of each feed-forward network, before any patch.
        context: the longest input, in tokens.
        activation: name in `tpatch_jax.ffn.ACTIVATIONS`.
        gated: whether the FFN is gated (gate, up, down) or has two matrices (up, down).
        ffn_bias: whether the FFN has bias vectors.
        norm: ``"rms"`` or ``"layer"``.
        norm_epsilon: added to the variance.
        query_bias: whether the query, key and value projections have biases.
        output_bias: whether the attention's output projection has a bias.
        rope_frequencies: inverse frequencies of the rotary embedding, one per rotated pair, scaling applied.
        rope_scale: factor on the cosines and sines (1 but for some long-context rules).
        tied: whether the unembedding is the embedding.
    """

    family: str
    vocabulary: int
    width: int
    layers: int
    heads: int
    key_value_heads: int
    head_width: int
    ffn_width: int
    context: int
    activation: str
    gated: bool = True
    ffn_bias: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = 1e-5
    query_bias: bool = False
    output_bias: bool = False
    rope_frequencies: tuple[float, ...] = ()
    rope_scale: float = 1.0
    tied: bool = False

    def to_json(self) -> dict[str, object]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)
