"""Greedy decoding and sampling with a key-value cache."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tpatch_jax.core.sizes import in_halves, power_of_two
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import networks
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.embedded import table_of
from tpatch_jax.models.rows import ASK, split_row
from tpatch_jax.typing import Params, RngKey, TokenIds

__all__ = ["Stops", "choose_tokens", "greedy", "pick_places", "sample", "stops_of_each", "take_lanes"]

Stops = TokenIds | Sequence[TokenIds]
"""Tokens that end what is written: the same for all prompts, or those of each prompt."""

LEAST = 8
"""Prompts and caches have as many tokens as a power of two, at least so many."""

SHARED, SAVED = 16, 128
"""Prompts that begin alike have their beginning read once, if it is so long and so many tokens need not be read."""

FEW_LANES, FEW_STEPS = 8, 4
"""Lanes that have ended are dropped where so many stay at least, and so many steps may still come."""


@partial(jax.jit, static_argnames=("config", "top_k"))
def choose_tokens(
    config: NetworkConfig,
    params: Params,
    hidden: Float[Array, "lanes hidden"],
    rng: RngKey,
    temperature: Float[Array, ""],
    top_k: int,
    never: Bool[Array, "vocabulary"] | None = None,
) -> Int[Array, "lanes"]:
    """The next token of each lane: the most probable one, or one that is drawn."""
    scores = networks.logits(config, params, hidden)
    scores = scores if never is None else jnp.where(never, -jnp.inf, scores)
    if not top_k:
        return jnp.argmax(scores, -1)
    scores, ids = jax.lax.top_k(scores, min(top_k, scores.shape[-1]))
    return jnp.take_along_axis(ids, jax.random.categorical(rng, scores / temperature)[..., None], -1)[..., 0]


@jax.jit
def pick_places(
    hidden: Float[Array, "lanes tokens hidden"], place: Int[Array, "lanes"]
) -> Float[Array, "lanes hidden"]:
    """The hidden state of each lane at one place."""
    return hidden[jnp.arange(hidden.shape[0]), place]


def _run(
    config: NetworkConfig,
    params: Params,
    prompts: Sequence[TokenIds],
    count: int,
    stops: Stops,
    rng: RngKey,
    temperature: float,
    top_k: int,
    ended: Callable[[int, list[int]], bool] | None = None,
    never: tuple[TokenIds, TokenIds] = ((), ()),
) -> list[list[int]]:
    # What is drawn depends on how many draw together, so only greedy lanes are as many as are needed.
    lanes, source = power_of_two(len(prompts)) if top_k else _lanes_for(len(prompts)), None
    if config.encoder and prompts:
        halves = [split_row(config, prompt) for prompt in prompts]
        prompts = [written for _, written in halves]
        read = [list(row) for row, _ in halves]
        audio, longest = config.encoder.audio, max(map(len, read))
        if longest > config.encoder.context:
            raise TPatchError(f"a prompt has {longest} tokens, the encoder reads {config.encoder.context}; shorten it")
        filling = [[0]] * (lanes - len(read))
        # What is read of sound has one length, whatever of it is silence.
        length = audio.numbers if audio else power_of_two(longest, LEAST)
        source = table_of([*read, *filling], length, ASK)
    lengths = [len(prompt) for prompt in prompts]
    if not lengths:
        return []
    if min(lengths) == 0:
        raise TPatchError(f"prompt {lengths.index(0)} is empty; give at least one token to continue")
    if max(lengths) >= config.context:
        raise TPatchError(
            f"prompt {lengths.index(max(lengths))} has {max(lengths)} tokens, the model reads {config.context}; "
            "shorten it"
        )
    # Each prompt is continued up to the end of the context, however long the others are.
    rooms = [config.context - length for length in lengths]
    count = min(count, max(rooms))
    if count < 1:
        return [[] for _ in prompts]
    last = np.zeros(lanes, np.int32)
    last[: len(prompts)] = np.asarray(lengths) - 1
    temperature_array = jnp.asarray(temperature, jnp.float32)
    hidden, cache = _read(config, params, prompts, lanes, count, source, power_of_two if top_k else in_halves)
    tail = networks.final_weights(config, params)
    results: list[list[int]] = [[] for _ in prompts]
    ends = stops_of_each(stops, len(prompts))
    always, first = (_mask(config, tokens) for tokens in (never[0], [*never[0], *never[1]]))
    going, held = set(range(len(prompts))), list(range(len(prompts)))
    for step in range(count):
        # Without a draw the key is not looked at.
        drawn = jax.random.fold_in(rng, step) if top_k else rng
        ids = np.asarray(
            choose_tokens(config, tail, hidden, drawn, temperature_array, top_k, always if step else first), np.int32
        )
        for lane, number in enumerate(held):
            if number not in going:
                continue
            said = results[number]
            if int(ids[lane]) in ends[number]:
                going.discard(number)
                continue
            said.append(int(ids[lane]))
            if len(said) == rooms[number] or (ended is not None and ended(number, said)):
                going.discard(number)
        if not going or step + 1 == count:
            break
        fewer = lanes if top_k or count - step <= FEW_STEPS else max(FEW_LANES, power_of_two(len(going)))
        if fewer < lanes:
            kept = [lane for lane, number in enumerate(held) if number in going]
            held, lanes = [held[lane] for lane in kept], fewer
            places = np.asarray([*kept, *[kept[0]] * (lanes - len(kept))])
            cache, last, ids = take_lanes(cache, places), last[places], ids[places]
        tokens, places = jax.device_put((ids[:, None], (last + 1 + step)[:, None]))
        hidden, cache = networks.decode(config, params, tokens, places, cache, in_place=True)
        hidden = pick_places(hidden, np.zeros_like(last))
    return results


def _read(
    config: NetworkConfig,
    params: Params,
    prompts: Sequence[TokenIds],
    lanes: int,
    count: int,
    source: Any,
    size: Callable[[int, int], int],
) -> tuple[Float[Array, "lanes hidden"], list[networks.Cache]]:
    """The hidden state at the last token of each prompt, and a cache with room for so many tokens more."""
    longest = max(map(len, prompts))
    total = min(size(longest + count, LEAST), max(config.context, size(longest, LEAST)))
    shared = _shared_tokens(prompts) if source is None else 0
    if shared:
        table, positions = _table([prompts[0][:shared]], 1, 0, total, size)
        _, cache = networks.decode(config, params, table, positions, networks.empty_cache(config, params, 1, total))
        cache = take_lanes(cache, np.zeros(lanes, int))
    else:
        cache = networks.empty_cache(config, params, lanes, total, source)
    rests = [prompt[shared:] for prompt in prompts]
    table, positions = _table(rests, lanes, shared, total, size)
    hidden, cache = networks.decode(config, params, table, positions, cache)
    last = np.zeros(lanes, np.int32)
    last[: len(rests)] = [len(rest) - 1 for rest in rests]
    # Picked in one program: the first answer of a process waits for each that is compiled or read.
    return pick_places(hidden, last), cache


def _table(
    rows: Sequence[TokenIds], lanes: int, first: int, total: int, size: Callable[[int, int], int]
) -> tuple[Any, Int[Array, "lanes width"]]:
    """Rows that begin at a position, as a network reads them, and the position of each token."""
    width = size(max(map(len, rows)), LEAST)
    # Padding is written past the cache's end, where it is dropped.
    positions = np.full((lanes, width), total, np.int32)
    for lane, row in enumerate(rows):
        positions[lane, : len(row)] = first + np.arange(len(row))
    return table_of([*rows, *[[]] * (lanes - len(rows))], width), jax.device_put(positions)


def _shared_tokens(prompts: Sequence[TokenIds]) -> int:
    """With how many tokens all prompts begin alike, if reading them once pays; each keeps a token behind them."""
    least, most = min(map(list, prompts)), max(map(list, prompts))
    alike = next((at for at, pair in enumerate(zip(least, most, strict=False)) if pair[0] != pair[1]), len(least))
    alike = min(alike, *(len(prompt) - 1 for prompt in prompts))
    return alike if alike >= SHARED and alike * (len(prompts) - 1) >= SAVED else 0


def _lanes_for(count: int) -> int:
    """How many lanes hold so many prompts: a power of two, or three quarters of a larger one."""
    return in_halves(count, FEW_LANES) if count > FEW_LANES else power_of_two(count)


@jax.jit
def take_lanes(cache: list[networks.Cache], lanes: Int[Array, "kept"]) -> list[networks.Cache]:
    """Some lanes of a key-value cache."""
    return jax.tree.map(lambda leaf: leaf[lanes], cache)


def stops_of_each(stops: Stops, count: int) -> list[TokenIds]:
    """For each of some prompts the tokens that end what is written after it.

    Args:
        stops: of all prompts, or already for each of them.
        count: so many prompts.

    Raises:
        TPatchError: there are stops for another number of prompts.

    Example:
        >>> stops_of_each((2, 5), 3), stops_of_each([(2,), (2, 5)], 2)
        ([(2, 5), (2, 5), (2, 5)], [(2,), (2, 5)])
    """
    each = [one for one in stops if not isinstance(one, (int, np.integer))]
    if not each:
        return [tuple(int(one) for one in stops if isinstance(one, (int, np.integer)))] * count
    if len(each) != len(stops) or len(each) != count:
        raise TPatchError(f"there are stops for {len(each)} of {count} prompts; give those of each, or one set for all")
    return [tuple(one) for one in each]


def _mask(config: NetworkConfig, tokens: TokenIds) -> Bool[Array, "vocabulary"] | None:
    """True at some tokens; nothing where there are none."""
    if not len(tokens):
        return None
    mask = np.zeros(config.vocabulary, bool)
    mask[list(tokens)] = True
    return jax.device_put(mask)


def greedy(
    config: NetworkConfig,
    params: Params,
    prompts: Sequence[TokenIds],
    count: int,
    stops: Stops = (),
    ended: Callable[[int, list[int]], bool] | None = None,
    never: tuple[TokenIds, TokenIds] = ((), ()),
) -> list[list[int]]:
    """The most probable next token, again and again, for several prompts at once.

    Args:
        config: the network's description.
        params: its parameters.
        prompts: token ids of each prompt, as `Model.encode_prompt` gives them.
        count: at most so many new tokens, and no more than the context has room for.
        stops: tokens that end a lane, of all prompts or for each of them; they are not returned.
        ended: from a prompt's number and its new tokens so far to whether these are enough.
        never: tokens that are never chosen, and those that are not chosen first.

    Returns:
        The new token ids of each prompt.

    Raises:
        TPatchError: a prompt is empty or longer than the context.
    """
    return _run(config, params, prompts, count, stops, jax.random.key(0), 1.0, 0, ended, never)


def sample(
    config: NetworkConfig,
    params: Params,
    prompts: Sequence[TokenIds],
    count: int,
    key: Array,
    *,
    temperature: float = 1.0,
    top_k: int = 50,
    stops: Stops = (),
    ended: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """Sampled continuations of several prompts at once; arguments as `greedy`, and a typed random key.

    Args:
        config: the network's description.
        params: its parameters.
        prompts: token ids of each prompt.
        count: at most so many new tokens.
        key: a typed random key.
        temperature: divides the logits.
        top_k: only so many tokens are ever drawn.
        stops: tokens that end a lane, of all prompts or for each of them; they are not returned.
        ended: from a prompt's number and its new tokens so far to whether these are enough.
    """
    return _run(config, params, prompts, count, stops, key, temperature, top_k, ended)
