"""The frozen description of a network: everything the network code needs to know that is not a weight."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["AudioInput", "ImageInput", "Latent", "LayerKind", "Mixture", "NetworkConfig"]


class LayerKind(NamedTuple):
    """What distinguishes one layer of a network from another; layers of one kind share their compiled code.

    Attributes:
        window: how many tokens back attention sees, the token itself included; 0 is everything.
        rope_frequencies: inverse frequencies of the rotary embedding, one per rotated pair; empty is none.
        rope_scale: factor on the cosines and sines.
        normed: whether attention reads the stream through a norm, where blocks have one before it.
        mixed: whether the feed-forward network is a mixture of experts.
    """

    window: int
    rope_frequencies: tuple[float, ...]
    rope_scale: float = 1.0
    normed: bool = True
    mixed: bool = False


class Mixture(NamedTuple):
    """Experts of which a router chooses a few for each token, ``Σ wᵢ·expertᵢ(q)``.

    Attributes:
        experts: how many there are.
        active: how many are chosen for a token.
        width: hidden neurons of each.
        normalised: whether the chosen experts' weights are divided by their sum.
        shared_width: hidden neurons of an expert that every token passes through, times ``sigmoid(q·g)``; 0 is none.
        biased: whether router and experts have biases.
        limit: of experts whose hidden neurons are ``(up + 1)·gate·sigmoid(slope·gate)``: how large ``gate`` may be, and
            ``±up``; 0 is for those that are gated by the network's activation.
        slope: in that.
        joined_width: hidden neurons of a network that every token passes through beside the experts, as it is; patches
            join it. 0 is none, and then they stand alone there.
        logistic: whether an expert's weight is a logistic function of its score, and not the softmax of all.
        corrected: whether the router has a bias that counts in the choice and not in the weights.
        groups: the experts stand in so many groups, of which the best are taken first, by the largest score in each, or
            by the two largest where ``corrected``; 0 is no such step.
        active_groups: so many groups.
        scale: factor on the weights.
    """

    experts: int
    active: int
    width: int
    normalised: bool
    shared_width: int = 0
    biased: bool = False
    limit: float = 0.0
    slope: float = 1.0
    joined_width: int = 0
    logistic: bool = False
    corrected: bool = False
    groups: int = 0
    active_groups: int = 0
    scale: float = 1.0


class Latent(NamedTuple):
    """Attention whose heads all read one narrow vector of each token, of which keys and values are linear functions.

    Beside it stands a key that all heads share, and that alone turns with the position, as a part of each query does.

    Attributes:
        width: numbers in that vector.
        turning: numbers in that key.
        value_width: of one head's value.
        query_width: of the narrow vector of which queries are made in the same way; 0 is no such.
        epsilon: of the norms of these vectors.
    """

    width: int
    turning: int
    value_width: int
    query_width: int = 0
    epsilon: float = 1e-6


class ImageInput(NamedTuple):
    """What a network that reads images makes of their pixels, before the first block.

    ``(pixel · scale - mean) / std``, cut into patches, each of which a linear layer makes one position of; before them
    stand the class token and, of a DeiT, the distillation token.

    Attributes:
        size: height and width, in pixels.
        patch: the same of a patch.
        channels: 1 of grey pictures, 3 of coloured ones.
        scale: factor on bytes.
        mean: subtracted from each channel.
        std: what each channel is divided by.
        distilled: whether there is a distillation token.
    """

    size: tuple[int, int]
    patch: tuple[int, int]
    channels: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    distilled: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """How many patches there are, one above the other and side by side."""
        return self.size[0] // self.patch[0], self.size[1] // self.patch[1]

    @property
    def first(self) -> int:
        """The position of the first patch."""
        return 2 if self.distilled else 1

    @property
    def pixels(self) -> int:
        """How many numbers an image is."""
        return self.size[0] * self.size[1] * self.channels

    @property
    def positions(self) -> int:
        """How many positions an image becomes."""
        return self.first + self.grid[0] * self.grid[1]


class AudioInput(NamedTuple):
    """What a network that reads sound makes of its log-mel frames, before the first block.

    Two convolutions of three frames each, the second of which goes forward by two, make one position of two frames.
    As tokens a recording is its frames one after the other, ``round((x + OFFSET) · STEPS)`` of each number; what
    follows the last of them is silence.

    Attributes:
        mels: numbers in a frame.
        frames: how many frames are read.
    """

    mels: int
    frames: int

    @property
    def numbers(self) -> int:
        """How many numbers a recording is at most."""
        return self.mels * self.frames

    @property
    def positions(self) -> int:
        """How many positions a recording becomes."""
        return self.frames // 2


@dataclass(frozen=True)
class NetworkConfig:
    """What distinguishes one network from another, hashable so that it can be static under ``jax.jit``.

    A network is a stack of blocks. A decoder is causal and ends in an unembedding; an encoder is not, and ends in a
    classification head if it has ``labels``; an encoder-decoder is a decoder that reads an ``encoder``.

    Attributes:
        family: name in the table of families, such as ``"llama"``.
        vocabulary: rows of the embedding.
        hidden_size: ``d``, the width of the residual stream.
        layers: number of blocks.
        heads: query heads.
        key_value_heads: key and value heads; fewer than ``heads`` means grouped-query attention.
        head_width: width of one head.
        ffn_width: hidden neurons of each feed-forward network, before any patch; in a mixture of experts of the layers
            without experts, 0 where all layers have them.
        context: the longest input, in tokens.
        activation: name in `tpatch_jax.core.ffn.ACTIVATIONS`.
        gated: whether the FFN is gated (gate, up, down) or has two matrices (up, down).
        ffn_bias: whether the FFN has bias vectors.
        block: what the FFN reads: ``"serial"``, the stream after attention; ``"parallel"``, the stream before it,
            through a norm of its own; ``"shared"``, what attention reads.
        sandwich: whether the outputs of attention and FFN are normalised before they join the stream.
        pre_norm: whether attention and FFN read the stream through norms; without them it is a ``sandwich``.
        first_norm: whether the attention of the first block does.
        norm: ``"rms"`` or ``"layer"``.
        norm_epsilon: added to the variance.
        norm_shift: added to the norms' scale; 1 where checkpoints store the scale minus one.
        norm_bias: whether layer norms have biases.
        query_bias: whether the query, key and value projections have biases.
        key_bias: whether the key projection has one where the others have.
        output_bias: whether the attention's output projection has a bias.
        query_norm: whether each head's query and key are normalised (root mean square).
        query_norm_wide: whether these norms are over all heads together.
        attention_clip: no number of queries, keys and values exceeds it before heads turn; 0 is no bound.
        sinks: whether each head has a score for looking at nothing.
        key_scores: whether ``exp(a·softplus(v·D))`` of a token's values ``v`` is added to the scores of its key.
        attention_scale: factor on query times key; by default ``head_width ** -0.5``.
        attention_cap: attention scores are bounded by ``cap · tanh(score / cap)``; 0 is no bound.
        logit_cap: the same for logits.
        windows: for each layer, how many tokens back attention sees; 0 is everything, and empty is 0 for all.
        rope_frequencies: inverse frequencies of the rotary embedding, one per rotated pair, scaling applied.
        local_rope_frequencies: the same for layers with a window, where those differ.
        rope_scale: factor on the cosines and sines (1 but for some long-context rules), but for layers whose
            ``local_rope_frequencies`` differ.
        unrotated: the layers that do without the rotary embedding.
        rope_adjacent: whether a rotated pair is two neighbours, or one from each half.
        positions: rows of the table of learned positions; 0 is no such table.
        position_offset: the row of the first token.
        sinusoids: whether fixed sines and cosines of the positions are added to the embeddings.
        embed_scale: factor on the embeddings.
        embed_width: width of the embeddings where a linear layer brings them to ``hidden_size``; 0 is that width.
        residual_scale: factor on the outputs of attention and FFN before they join the stream.
        residual_gates: whether the stream is multiplied, number by number, before attention or FFN joins it.
        tied: whether the unembedding is the embedding.
        head_bias: whether the unembedding has a bias.
        head_scale: factor on what the unembedding reads.
        causal: whether a token sees only itself and what stands before it.
        post_norm: whether norms follow the parts, ``x = norm(x + part(x))``; then there is no final norm either.
        embed_norm: whether the embeddings are normalised.
        token_types: rows of the table of token types, of which the first is added to every token; 0 is no such table.
        relative_buckets: rows of the table of relative positions, which all blocks share; 0 is no such table.
        relative_distance: from which distance on all relative positions are alike.
        encoder: the stack whose states every block reads through cross-attention, if there is one.
        labels: what a classification head tells apart; empty is no such head.
        pooling: what the head reads: the ``"first"`` token, or the ``"mean"`` of all.
        head_activation: between the two layers of the classification head; empty where it has one.
        head_norm: whether a norm stands before the second of them.
        head_dense_bias: whether the first of them has a bias.
        image: how images become positions, of a network that reads them in place of tokens. Then ``vocabulary`` and
            ``context`` are those of pixels.
        audio: how sound becomes positions, of an encoder that reads it in place of tokens. Then ``context`` is that of
            the numbers in its frames.
        mixture: the experts of each layer but the ``dense_layers``, if there are any. A patch stands beside them.
        dense_layers: the layers whose feed-forward networks are no mixture.
        latent: how attention makes keys and values, where it makes them of a narrow vector that all heads share. Then
            ``head_width`` is that of a query, the part that turns included, and ``key_value_heads`` is 1.
    """

    family: str
    vocabulary: int
    hidden_size: int
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
    pre_norm: bool = True
    first_norm: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = 1e-5
    norm_shift: float = 0.0
    norm_bias: bool = True
    query_bias: bool = False
    key_bias: bool = True
    output_bias: bool = False
    query_norm: bool = False
    query_norm_wide: bool = False
    attention_clip: float = 0.0
    sinks: bool = False
    key_scores: bool = False
    attention_scale: float | None = None
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    windows: tuple[int, ...] = ()
    rope_frequencies: tuple[float, ...] = ()
    local_rope_frequencies: tuple[float, ...] = ()
    rope_scale: float = 1.0
    rope_adjacent: bool = False
    unrotated: tuple[int, ...] = ()
    positions: int = 0
    position_offset: int = 0
    sinusoids: bool = False
    embed_scale: float = 1.0
    embed_width: int = 0
    residual_scale: float = 1.0
    residual_gates: bool = False
    tied: bool = False
    head_bias: bool = False
    head_scale: float = 1.0
    causal: bool = True
    post_norm: bool = False
    embed_norm: bool = False
    token_types: int = 0
    relative_buckets: int = 0
    relative_distance: int = 128
    encoder: "NetworkConfig | None" = None
    labels: tuple[str, ...] = ()
    pooling: Literal["first", "mean"] = "first"
    head_activation: str = "tanh"
    head_norm: bool = False
    head_dense_bias: bool = True
    image: ImageInput | None = None
    audio: AudioInput | None = None
    mixture: Mixture | None = None
    dense_layers: tuple[int, ...] = ()
    latent: Latent | None = None

    def kind(self, layer: int) -> LayerKind:
        """What distinguishes one layer from the others."""
        window = self.windows[layer] if self.windows else 0
        local = bool(window and self.local_rope_frequencies)
        frequencies = self.local_rope_frequencies if local else self.rope_frequencies
        scale = 1.0 if local else self.rope_scale
        normed, rotated = self.first_norm or layer > 0, layer not in self.unrotated
        return LayerKind(window, frequencies if rotated else (), scale, normed, self.mixed(layer))

    def mixed(self, layer: int) -> bool:
        """Whether a layer's feed-forward network is a mixture of experts."""
        return self.mixture is not None and layer not in self.dense_layers

    def width(self, layer: int) -> int:
        """Hidden neurons of what a patch joins in a layer, before any patch: often none beside experts."""
        return self.mixture.joined_width if self.mixture and self.mixed(layer) else self.ffn_width

    @property
    def architecture(self) -> Literal["decoder", "encoder", "encoder-decoder"]:
        """Which of the three kinds of network it is."""
        return "encoder-decoder" if self.encoder else "decoder" if self.causal else "encoder"

    def to_json(self) -> dict[str, object]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)
