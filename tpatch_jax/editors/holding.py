"""Whether a model says what it was corrected to say, token for token, and how surely."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tpatch_jax.core.devices import automatically, host, mesh_of, shard_rows
from tpatch_jax.core.sizes import few_or_most
from tpatch_jax.editors.speech import spoken_requests
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import networks
from tpatch_jax.models.chat import render_request
from tpatch_jax.models.collection import Sites, collect, pad_rows
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.model import Model, check_loaded
from tpatch_jax.models.rows import ASK
from tpatch_jax.requests import EditRequest

__all__ = ["AskedRow", "asked_row", "margins_of_sites", "read_margins", "requests_held"]

ROWS = 64


class AskedRow(NamedTuple):
    """A prompt with what should be said behind it, in tokens.

    Attributes:
        tokens: both, one after the other.
        places: the positions whose next tokens are the target's.
        wanted: those tokens.
    """

    tokens: list[int]
    places: range
    wanted: list[int]

    @classmethod
    def of(cls, model: Model, prompt: str, continuation: str) -> "AskedRow":
        """A prompt as a model reads it, with what follows, cut where the model's context ends."""
        read, target = model.encode_prompt(prompt), model.encode_target(prompt, continuation)
        # What an encoder reads takes no room from what the decoder writes.
        beside = read.index(ASK) + 1 if model.config.encoder else 0
        tokens = [*read, *target][: beside + model.config.context]
        places = range(len(read) - 1, len(tokens) - 1)
        return cls(tokens, places, tokens[len(tokens) - len(places) :] if len(places) else [])


def asked_row(model: Model, request: EditRequest) -> AskedRow:
    """A request as it is put to a model: in its chat if it shall hold there alone, else in bare text.

    Args:
        model: whose tokenizer and template count.
        request: prompt and target.
    """
    (request,) = spoken_requests(model, [request])
    if problem := getattr(request.prompt, "problem", ""):
        raise TPatchError(f"{request.prompt!r}: {problem}")
    request = render_request(model, request)
    return AskedRow.of(model, request.prompt, request.continuation)


@partial(jax.jit, static_argnames="config")
def margins_of_sites(
    config: NetworkConfig, weights: Any, sites: Sites, wanted: Int[Array, " rows"]
) -> Float[Array, " rows"]:
    """By how much the wanted token leads all others, or trails them, at each site."""
    logits = networks.finish(config, weights, {"residual": sites.residual}, sites.output).astype(jnp.float32)
    target = jnp.take_along_axis(logits, wanted[:, None], 1)[:, 0]
    others = jnp.where(jax.nn.one_hot(wanted, logits.shape[1], dtype=jnp.bool_), -jnp.inf, logits)
    return target - jnp.max(others, 1)


def read_margins(model: Model, rows: Sequence[AskedRow]) -> Float[np.ndarray, " rows"]:
    """By how much the logit of each target exceeds all others at its least sure token; above 0 it is said.

    ``min_t (logit[target_t] − max_other logit)``.

    Args:
        model: edited or not.
        rows: what is asked; one without a target has infinity.
    """
    if not rows:
        return np.zeros(0)
    sites = collect(model, [row.tokens for row in rows], [row.places for row in rows], model.layer(None))
    wanted = np.asarray([token for row in rows for token in row.wanted], np.int32)
    weights, mesh = networks.final_weights(model.config, model.params), mesh_of(model.params)
    parts = []
    for first in range(0, len(wanted), ROWS):
        count = min(ROWS, len(wanted) - first)
        missing = few_or_most(count, ROWS) - count
        part = Sites(*(pad_rows(array[first : first + count], missing) for array in sites))
        tokens = np.pad(wanted[first : first + count], (0, missing))
        parts.append(host(margins_of_sites(model.config, weights, *shard_rows((part, tokens), mesh)))[:count])
    margins, end, least = np.concatenate([np.zeros(0), *parts]), 0, []
    for row in rows:
        least.append(min(margins[end : end + len(row.wanted)], default=np.inf))
        end += len(row.wanted)
    return np.asarray(least)


@automatically
def requests_held(model: Model, requests: Sequence[EditRequest]) -> list[bool]:
    """Whether each token of a request's target is the most probable one behind the prompt and those before it.

    Args:
        model: edited or not, of any architecture.
        requests: what should hold.

    Example:
        >>> requests_held(model, [EditRequest("The capital of France is", "Paris")])  # doctest: +SKIP
        [True]
    """
    check_loaded(model, "requests_held(model, requests)")
    return (read_margins(model, [asked_row(model, request) for request in requests]) > 0).tolist()
