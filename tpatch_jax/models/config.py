"""The frozen description of a decoder: everything the network code needs to know that is not a weight."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["LayerKind", "NetworkConfig"]


class LayerKind(NamedTuple):
    """What distinguishes one layer of a decoder from another; layers of one kind share their compiled code.

    Attributes:
        window: how many tokens back attention sees, the token itself included; 0 is everything.
        rope_frequencies: inverse frequencies of the rotary embedding, one per rotated pair; empty is none.
    """

    window: int
    rope_frequencies: tuple[float, ...]


@dataclass(frozen=True)
class NetworkConfig:
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
        block: what the FFN reads: ``"serial"``, the stream after attention; ``"parallel"``, the stream before it,
            through a norm of its own; ``"shared"``, what attention reads.
        sandwich: whether the outputs of attention and FFN are normalised before they join the stream.
        norm: ``"rms"`` or ``"layer"``.
        norm_epsilon: added to the variance.
        norm_shift: added to the norms' scale; 1 where checkpoints store the scale minus one.
        query_bias: whether the query, key and value projections have biases.
        output_bias: whether the attention's output projection has a bias.
        query_norm: whether each head's query and key are normalised (root mean square).
        attention_scale: factor on query times key; by default ``head_width ** -0.5``.
        attention_cap: attention scores are bounded by ``cap · tanh(score / cap)``; 0 is no bound.
        logit_cap: the same for logits.
        windows: for each layer, how many tokens back attention sees; 0 is everything, and empty is 0 for all.
        rope_frequencies: inverse frequencies of the rotary embedding, one per rotated pair, scaling applied.
        local_rope_frequencies: the same for layers with a window, where those differ.
        rope_scale: factor on the cosines and sines (1 but for some long-context rules).
        rope_adjacent: whether a rotated pair is two neighbours, or one from each half.
        positions: rows of the table of learned positions; 0 is no such table.
        position_offset: the row of the first token.
        embed_scale: factor on the embeddings.
        tied: whether the unembedding is the embedding.
        head_bias: whether the unembedding has a bias.
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
    block: Literal["serial", "parallel", "shared"] = "serial"
    sandwich: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = 1e-5
    norm_shift: float = 0.0
    query_bias: bool = False
    output_bias: bool = False
    query_norm: bool = False
    attention_scale: float | None = None
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    windows: tuple[int, ...] = ()
    rope_frequencies: tuple[float, ...] = ()
    local_rope_frequencies: tuple[float, ...] = ()
    rope_scale: float = 1.0
    rope_adjacent: bool = False
    positions: int = 0
    position_offset: int = 0
    embed_scale: float = 1.0
    tied: bool = False
    head_bias: bool = False

    def kind(self, layer: int) -> LayerKind:
        """What distinguishes one layer from the others."""
        window = self.windows[layer] if self.windows else 0
        local = bool(window and self.local_rope_frequencies)
        return LayerKind(window, self.local_rope_frequencies if local else self.rope_frequencies)

    def to_json(self) -> dict[str, object]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)
