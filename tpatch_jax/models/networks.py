"""All networks: Flax NNX modules inside, pure functions over a nested dict of parameters outside.

A network is run on a batch. That of a decoder is ``[batch, tokens]`` int, padded on the right with anything; that of an
encoder is the same, padded with negative numbers, which no token sees; that of an encoder-decoder is a `Pair` of one
for its encoder and one for its decoder. `Embedded` has embeddings in the place of some tokens.

The parameters are ``{"embed": …, "positions"?: …, "layers": {0: {"norm_1", "attention", "norm_2", "ffn"}, …},
"norm"?: …, "head"?: …}``, with ``"classifier"`` in place of ``"head"`` where labels are told apart, and the encoder of
an encoder-decoder under ``"encoder"``; `tpatch_jax.models.blocks` has the modules.
The feed-forward network of every block is not a module but the plain function `tpatch_jax.core.ffn.apply` over a part
of that dict, because that is the place which patches change. Experts are a module of the block, ``"experts"``, and the
function beside them has no neurons but those of patches.

This module gathers the names: the cut is in `tpatch_jax.models.tracing`, a stack of blocks in
`tpatch_jax.models.stack`, what follows it in `tpatch_jax.models.heads`, decoding in `tpatch_jax.models.caches`, and
rows of which only the end is run again in `tpatch_jax.models.forks`.
"""

from tpatch_jax.models.caches import Cache, begin, decode, empty_cache
from tpatch_jax.models.embedded import Embedded
from tpatch_jax.models.forks import Fork, Pack, after, around, fork, pack_queries, resume_fork, take_tokens
from tpatch_jax.models.heads import (
    argmax,
    final_weights,
    finish,
    finisher,
    leave_last,
    logits,
    pointwise,
    unembedding,
    unembedding_rows,
)
from tpatch_jax.models.stack import Batch, Pair, encode, feed_forward, residuals, routes
from tpatch_jax.models.tracing import Trace, apply, gather, hidden, hidden_after, resume, trace, trace_after

__all__ = [
    "Batch",
    "Cache",
    "Embedded",
    "Fork",
    "Pack",
    "Pair",
    "Trace",
    "after",
    "apply",
    "argmax",
    "around",
    "begin",
    "decode",
    "empty_cache",
    "encode",
    "feed_forward",
    "final_weights",
    "finish",
    "finisher",
    "fork",
    "gather",
    "hidden",
    "hidden_after",
    "leave_last",
    "logits",
    "pack_queries",
    "pointwise",
    "residuals",
    "resume",
    "resume_fork",
    "routes",
    "take_tokens",
    "trace",
    "trace_after",
    "unembedding",
    "unembedding_rows",
]
