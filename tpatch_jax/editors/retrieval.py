"""Retrieval: edits are put into the prompt where a retriever finds them; no parameter changes.

The rival that a practitioner picks first, as RAG and IKE have it: an index of edits, one embedding each; a prompt whose
embedding is near enough to one is read behind that edit, ``New Fact: <prompt> <target>``, and the model answers from
its context. Any other prompt is read as it is, bit for bit, and an empty index is the unedited model.

- **The retriever** is an encoder, such as a MiniLM (``encoder=FOLDER``), or where none is given the edited model: the
  mean of its hidden states over the tokens of a text, each weighted by ``a/(a + p(token))``, so that common words count
  little, without their common direction (Arora et al. 2017). They are taken behind the first layer, which did better
  on SmolLM2-135M than later ones, and costs next to nothing.
- **Near enough** is more similar than any held text: pieces of running text, and the edit's prompt about other
  subjects, which is what a retriever mistakes for it. So thresholds differ from edit to edit; ``similarity``
  is one for all.
- IKE puts up to 32 demonstrations before the fact, drawn from a training set of edits. There is none here: the user has
  the edits alone.

A chat is looked up by what its user says last, and the edit stands there, before it. Prompts decide, not what follows
them, so an answer is written behind one context.

Source: Zheng et al., "Can We Edit Factual Knowledge by In-Context Learning?", EMNLP 2023, for the prompt; Arora et al.,
"A Simple but Tough-to-Beat Baseline for Sentence Embeddings", ICLR 2017, for the default embedding.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tpatch_jax.core.checks import check_range
from tpatch_jax.core.flops import count_flops
from tpatch_jax.editors.base import EditInfo, Editor, EditorFunctions, RequestInfo, Routing
from tpatch_jax.editors.model_memory import find_names
from tpatch_jax.editors.reading import check_requests, read_item, swapped_prompts
from tpatch_jax.editors.registry import Method, register_editor
from tpatch_jax.editors.repeats import step_once
from tpatch_jax.editors.routed import apply_routed, routed_answers
from tpatch_jax.editors.serac.networks import embedding_flops, embeddings, read_encoder
from tpatch_jax.editors.stored import find_kept, name_request, restore_stored, save_stored
from tpatch_jax.editors.tpatcher.last_site import forward_seconds
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import networks
from tpatch_jax.models.chat import COMPLETE, as_turn, end_of_turn, last_turn
from tpatch_jax.models.collection import batches
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.fingerprint import fingerprint
from tpatch_jax.models.memory_text import memory_rows
from tpatch_jax.models.model import Model
from tpatch_jax.models.networks import Batch
from tpatch_jax.requests import EditRequest, join_target
from tpatch_jax.typing import Arrays, Params, PathLike, Progress

__all__ = [
    "RETRIEVAL_PRESETS",
    "RetrievalSettings",
    "RetrievalState",
    "Retriever",
    "check_retrieval",
    "embed_texts",
    "forget",
    "read_retriever",
    "restore_index",
    "retrieval",
    "retrieve",
    "routing",
    "save_index",
]

COMMON = 1e-4
"""``a``: tokens more frequent than this count less."""

HELD, HELD_TOKENS = 64, 24
"""So many pieces of running text are held, of so many tokens each: about as long as a prompt."""

OTHERS = 12
"""So many other subjects stand in an edit's prompt among its held texts."""

HAIR = 1e-4
"""Similarities that differ by less are the same."""

NEARLY_ONE = 0.999
"""A prompt as similar as this is the edit's."""


@dataclass(frozen=True)
class RetrievalSettings:
    """Options of retrieval.

    Attributes:
        encoder: a folder or hub id of a BERT, RoBERTa or DistilBERT that embeds texts; by default the model does.
        layer: without an encoder: hidden states behind this layer are taken; ``"auto"`` is 0, the first.
        similarity: the least cosine at which an edit is retrieved, -1 to 1; 0 takes it from held texts, for each edit.
        margin: with ``similarity=0``: so much more similar than any held text a prompt has to be.
        nearest: at most so many edits are put into a prompt.
        fact: how an edit stands in a prompt, with ``{}`` for its prompt and target.
        question: what stands between the edits and the prompt.

    Raises:
        TPatchError: a value makes no sense.
    """

    encoder: str = ""
    layer: str = "auto"
    similarity: float = 0.0
    margin: float = 0.0
    nearest: int = 1
    fact: str = "New Fact: {}\n"
    question: str = "Prompt: "

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.layer != "auto" and not self.layer.isdigit():
            raise TPatchError(f"layer {self.layer!r} is not a layer; use layer=auto or a number")
        check_range(self, ("similarity",), -1, 1)
        check_range(self, ("margin",), 0, 1)
        check_range(self, ("nearest",), 1)
        if self.fact.count("{}") != 1:
            raise TPatchError(f"fact {self.fact!r} holds {{}} {self.fact.count('{}')} times; put it once, for the edit")


RETRIEVAL_PRESETS: Mapping[str, RetrievalSettings] = {"default": RetrievalSettings()}
"""Named settings of retrieval: ``default``, the edited model's embeddings and IKE's words."""


# --- the retriever ---


class Retriever(NamedTuple):
    """What embeds texts, and what it knows of running text.

    Attributes:
        model: the edited model.
        encoder: another network that embeds; ``None`` where the edited model does.
        layer: behind which layer its hidden states are taken.
        weight: of each token of the edited model, ``[vocabulary]``; empty with an encoder.
        mean: of the held texts' embeddings, ``[d]``.
        direction: the direction in which they differ most, ``[d]``; zeros with an encoder.
        held: the held texts' embeddings, ``[texts, d]``.
        names: other subjects, from the same texts.
    """

    model: Model
    encoder: Model | None
    layer: int
    weight: np.ndarray
    mean: np.ndarray
    direction: np.ndarray
    held: np.ndarray
    names: tuple[str, ...]


@partial(jax.jit, static_argnames=("config", "layer"))
def _hidden(config: NetworkConfig, layer: int, params: Params, tokens: Array) -> Array:
    """Hidden states behind a layer, each of length one: ``[texts, tokens, d]``."""
    states = networks.residuals(config, params, tokens)[layer].astype(jnp.float32)
    return states / jnp.linalg.norm(states, axis=-1, keepdims=True)


def _means(model: Model, layer: int, weight: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """``Σ w·h / Σ w`` over the tokens of each text, without those that begin any text: ``[texts, d]``."""
    result = np.zeros((len(texts), model.config.hidden_size), np.float32)
    # In later layers a first token looks like no other, and the same whatever it is.
    left_out = max(len(model.start), int(layer > 0))
    rows = [_cut(model, model.encode_prompt(text)) for text in texts]
    for numbers, batch in batches(model.config, rows):
        states = np.asarray(_hidden(model.config, layer, model.params, batch))
        for lane, number in enumerate(numbers):
            row = rows[number]
            first = left_out if len(row) > left_out else 0
            weights = weight[np.asarray(row[first:], int)]
            result[number] = weights @ states[lane, first : len(row)] / max(float(weights.sum()), 1e-12)
    return result


def _cut(model: Model, row: list[int]) -> list[int]:
    """Of a text that is too long the end, which a question asks with."""
    return row if len(row) <= model.config.context else row[-model.config.context :]


def embed_texts(retriever: Retriever, texts: Sequence[str]) -> np.ndarray:
    """Embeddings of length one, so that a product of two is their cosine.

    Args:
        retriever: from `read_retriever`.
        texts: any number of them; one that is empty gets zeros, which is near to nothing.

    Returns:
        ``[texts, d]`` float32.
    """
    result = np.zeros((len(texts), len(retriever.mean)), np.float32)
    chosen = [number for number, text in enumerate(texts) if text.strip()]
    written = [texts[number] for number in chosen]
    if not written:
        return result
    if retriever.encoder is not None:
        embedded = embeddings(retriever.encoder, written)
    else:
        embedded = _means(retriever.model, retriever.layer, retriever.weight, written)
    embedded = embedded - retriever.mean
    embedded -= np.outer(embedded @ retriever.direction, retriever.direction)
    result[chosen] = embedded / np.maximum(np.linalg.norm(embedded, axis=-1, keepdims=True), 1e-12)
    return result


def _embedding_flops(retriever: Retriever, text: str) -> float:
    """FLOPs of the embedding of one text; one that is empty takes none."""
    model = retriever.model
    if not text.strip():
        return 0.0
    if retriever.encoder is not None:
        return embedding_flops(retriever.encoder, text)
    row = jax.ShapeDtypeStruct((1, len(_cut(model, model.encode_prompt(text)))), jnp.int32)
    states = count_flops(
        lambda params, tokens: _hidden(model.config, retriever.layer, params, tokens), model.params, row
    )
    # The weighted mean, and the common direction that is taken out.
    return states + 2.0 * row.shape[1] * model.config.hidden_size + 4.0 * model.config.hidden_size


def check_retrieval(model: Model, settings: RetrievalSettings) -> int:
    """Make sure that a model can read edits in its prompt.

    Returns:
        Behind which layer hidden states are taken.

    Raises:
        TPatchError: it is no decoder, or has no such layer.
    """
    if model.config.architecture != "decoder":
        raise TPatchError(
            f"retrieval needs a decoder, and {model.name!r} is an {model.config.architecture}; use method tpatcher"
        )
    layer = 0 if settings.layer == "auto" else int(settings.layer)
    if layer >= model.config.layers:
        raise TPatchError(f"layer {settings.layer!r} does not exist; use layer=auto or 0 to {model.config.layers - 1}")
    return layer


def read_retriever(
    model: Model,
    settings: RetrievalSettings,
    *,
    memory: PathLike | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Retriever:
    """The retriever of a model: reads the encoder, if there is one, and embeds the held texts.

    Args:
        model: the model to edit, a decoder.
        settings: which encoder, or which hidden states.
        memory: a text file of which pieces are held; by default text is sampled from the model.
        cache: folder where sampled texts are kept.
        progress: called with what is being done, how much is done, and how much there is.

    Raises:
        TPatchError: the encoder or the text cannot be read.
    """
    layer = check_retrieval(model, settings)
    encoder = read_encoder(settings.encoder) if settings.encoder else None
    rows = memory_rows(model, memory, cache=cache, progress=progress)
    texts = [text for row in rows[:HELD] if (text := model.decode(row[:HELD_TOKENS])).strip()]
    width = (model if encoder is None else encoder).config.hidden_size
    weight = np.zeros(0, np.float32)
    if encoder is None:
        counts = Counter(token for row in rows for token in row)
        share = np.full(model.config.vocabulary, 0.5)
        share[list(counts)] += list(counts.values())
        weight = (COMMON / (COMMON + share / sum(counts.values()))).astype(np.float32)
    zeros = np.zeros(width, np.float32)
    names = find_names([model.decode(row[1:]) for row in rows])
    retriever = Retriever(model, encoder, layer, weight, zeros, zeros, np.zeros((0, width), np.float32), names)
    if encoder is None:
        held = _means(model, layer, weight, texts)
        mean = held.mean(0)
        # The first right singular vector of what is left, as in Arora et al.
        direction = np.linalg.svd(held - mean, full_matrices=False)[2][0]
        retriever = retriever._replace(mean=mean, direction=direction)
    return retriever._replace(held=embed_texts(retriever, texts))


# --- the index ---


class RetrievalState(NamedTuple):
    """What an edited model is made of.

    Attributes:
        model: the model, which never changes.
        retriever: what embeds prompts.
        requests: the index, in the order of the edits.
        keys: embeddings of their prompts, ``[edits, d]``.
        thresholds: the similarity above which each is retrieved, ``[edits]``.
        settings: the editor's options.
        seen: embeddings of test inputs by their text, kept so that none is computed twice.
    """

    model: Model
    retriever: Retriever
    requests: tuple[EditRequest, ...]
    keys: np.ndarray
    thresholds: np.ndarray
    settings: RetrievalSettings
    seen: dict[str, np.ndarray]


def retrieval(
    settings: RetrievalSettings = RETRIEVAL_PRESETS["default"],
    *,
    memory: str | Path | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Editor:
    """The retrieval editor: no parameter changes, edits are put into the prompts that they are about.

    Where ``cos(e_prompt, e_edit)`` is above the edit's threshold, the most similar of the ``nearest`` edits nearest to
    the prompt; the model reads ``New Fact: <edit>``, then ``Prompt: `` and the prompt. Everywhere else it is the
    unedited one, bit for bit. A later edit of the same prompt goes before an earlier one. `forget` takes edits out
    again, exactly.

    ``apply`` knows no prompts, so a row is decided on as a whole, padding (zeros at the end) left out; an evaluation
    and generation decide on the prompt.

    Args:
        settings: its options.
        memory: a text file of which pieces are held; by default text is sampled from the model.
        cache: folder where sampled texts are kept between runs.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        The `Editor`; its state is a `RetrievalState`.

    Raises:
        TPatchError: on ``init``, where the model is no decoder, or the encoder cannot be read.

    Source: Zheng et al. 2023; `tpatch_jax.editors.retrieval` says where it differs.

    Example:
        >>> editor = retrieval(RetrievalSettings(encoder="minilm"))
        >>> state = editor.init(model, jax.random.key(0))  # doctest: +SKIP
        >>> state, info = editor.step(state, requests, jax.random.key(0))  # doctest: +SKIP
    """

    def init(model: Model, rng: Array) -> RetrievalState:
        retriever = read_retriever(model, settings, memory=memory, cache=cache, progress=progress)
        none = np.zeros((0, len(retriever.mean)), np.float32)
        return RetrievalState(model, retriever, (), none, np.zeros(0, np.float32), settings, {})

    def step(state: RetrievalState, requests: Sequence[EditRequest], rng: Array) -> tuple[RetrievalState, EditInfo]:
        return step_once(state.model, requests, lambda given: _step(state, given, progress))

    def apply(state: RetrievalState, batch: Batch) -> Array:
        return apply_routed(state.model, routing(state), batch)

    return EditorFunctions(init, step, apply)


def retrieve(state: RetrievalState, inputs: Sequence[str]) -> list[list[int]]:
    """The edits that are put before each test input, the most similar one last, where it is read best.

    Args:
        state: the index.
        inputs: what is asked, as texts.

    Returns:
        For each the positions of edits in the index, ``nearest`` of them at most.
    """
    if not state.requests:
        return [[] for _ in inputs]
    new = [text for text in dict.fromkeys(inputs) if text not in state.seen]
    state.seen.update(zip(new, embed_texts(state.retriever, new), strict=True))
    # The last edit of each prompt answers for all of them.
    latest = {request.prompt: position for position, request in enumerate(state.requests)}
    result = []
    for text in inputs:
        similar = state.keys @ state.seen[text]
        near = [at for at in np.argsort(-similar, kind="stable").tolist() if similar[at] > state.thresholds[at]]
        chosen = list(dict.fromkeys(latest[state.requests[at].prompt] for at in near))[: state.settings.nearest]
        result.append(chosen[::-1])
    return result


def routing(state: RetrievalState) -> Routing:
    """How prompts in tokens get edits before them; the model that answers is the unedited one.

    Args:
        state: the index.
    """
    model, settings = state.model, state.settings

    def contexts(prompts: Sequence[Sequence[int]]) -> list[list[int] | None]:
        chosen = retrieve(state, [_asked(model, model.decode_all(prompt)) for prompt in prompts])
        read: list[list[int] | None] = []
        for prompt, picks in zip(prompts, chosen, strict=True):
            facts = "".join(settings.fact.replace("{}", _statement(model, state.requests[pick])) for pick in picks)
            context = model.encode(facts + settings.question) if picks else None
            # What leaves no room for the prompt is left out.
            read.append(None if context is None or model.excess([*prompt, *context], [0]) else context)
        return read

    def decision_flops(prompt: Sequence[int]) -> float:
        if not state.requests:
            return 0.0
        asked = _asked(model, model.decode_all(prompt))
        return _embedding_flops(state.retriever, asked) + 2.0 * state.keys.size

    return Routing(model, contexts, partial(_place, model), decision_flops)


def _place(model: Model, prompt: Sequence[int]) -> int:
    """Where edits stand in a prompt: before what the user says last, or behind what begins any text."""
    text = model.decode_all(prompt)
    turn = last_turn(model, text)
    before = [] if turn is None else model.encode_prompt(text[: turn[0]])
    if before and list(prompt[: len(before)]) == before:
        return len(before)
    return len(model.start) if model.start and tuple(prompt[: len(model.start)]) == model.start else 0


def _asked(model: Model, text: str) -> str:
    """What a prompt asks, by which it is looked up: without a template's or a frame's words."""
    turn = last_turn(model, text)
    inside = model.decode(model.encode(text)) if turn is None else text[slice(*turn)]
    return as_turn(inside).removeprefix(COMPLETE).strip()


def _statement(model: Model, request: EditRequest) -> str:
    """An edit as it stands in a prompt; of one that was made for a chat what is asked and answered there."""
    turn = last_turn(model, request.prompt)
    if turn is None:
        return request.prompt.strip() + join_target(request.prompt.strip(), request.target.strip(), request.join)
    return f"{_asked(model, request.prompt)} {request.target.strip().removesuffix(end_of_turn(model).strip()).strip()}"


def forget(state: RetrievalState, names: Sequence[str]) -> RetrievalState:
    """The index without some edits, as if they had never been made.

    Args:
        state: the index.
        names: ids of requests.

    Raises:
        TPatchError: there is no edit of that name.

    Example:
        >>> forget(state, ["edit-3"])  # doctest: +SKIP
    """
    kept = find_kept(state.requests, names, "index")
    requests = tuple(state.requests[position] for position in kept)
    return state._replace(requests=requests, keys=state.keys[kept], thresholds=state.thresholds[kept])


# --- one step ---


def _thresholds(state: RetrievalState, requests: Sequence[EditRequest], keys: np.ndarray) -> np.ndarray:
    """The similarity above which each edit is retrieved: more than that of any held text, ``[edits]``.

    An edit's depends on nothing but itself, so that it is the same whatever is edited beside it.
    """
    settings, retriever = state.settings, state.retriever
    if settings.similarity:
        return np.full(len(requests), settings.similarity, np.float32)
    result = np.max(keys @ retriever.held.T, -1, initial=-1.0)
    bare = [EditRequest(_asked(state.model, one.prompt), one.target, _inside(state.model, one)) for one in requests]
    swapped = [
        swapped_prompts(state.model, {0: one}, retriever.names, OTHERS).get(0, []) if one.prompt else [] for one in bare
    ]
    others = embed_texts(retriever, [text for texts in swapped for text in texts])
    ends = np.cumsum([len(texts) for texts in swapped])[:-1]
    for number, part in enumerate(np.split(others, ends)):
        result[number] = np.max(part @ keys[number], initial=result[number])
    # A hair more, by which rounding may differ. An edit's prompt itself is near enough whatever is held.
    return np.minimum(result + settings.margin + HAIR, NEARLY_ONE).astype(np.float32)


def _inside(model: Model, request: EditRequest) -> str | None:
    """A request's subject, if it stands in what the request asks."""
    return request.subject if request.subject and request.subject in _asked(model, request.prompt) else None


def _step(
    state: RetrievalState, requests: list[EditRequest], progress: Progress | None
) -> tuple[RetrievalState, EditInfo]:
    began, model = time.perf_counter(), state.model
    taken = {request.id for request in state.requests}
    names = [request.name(number) for number, request in enumerate(requests)]
    problems = check_requests(model, requests, False)
    good = [number for number in range(len(requests)) if number not in problems]
    if progress:
        progress("storing edits", 0, len(good))
    named = [name_request(requests[number], names[number], taken) for number in good]
    fitting = time.perf_counter()
    keys = embed_texts(state.retriever, [_asked(model, request.prompt) for request in named])
    thresholds = _thresholds(state, named, keys) if named else state.thresholds[:0]
    fit_seconds = time.perf_counter() - fitting
    first, encoder = len(state.requests), state.retriever.encoder
    # An encoder comes in with the first edit that is stored.
    extra = encoder.parameter_count if encoder is not None and not first and good else 0
    state = state._replace(
        requests=(*state.requests, *named),
        keys=np.concatenate([state.keys, keys]),
        thresholds=np.concatenate([state.thresholds, thresholds]),
    )
    routes = routing(state)
    contexts = routes.contexts([model.encode_prompt(request.prompt) for request in named])
    held = routed_answers(model, routes, named, contexts)
    picks = retrieve(state, [_asked(model, request.prompt) for request in named])
    if progress:
        progress("storing edits", len(good), len(good))
    results = {number: RequestInfo(names[number], False, "failed", why) for number, why in problems.items()}
    for slot, (number, right, context, picked) in enumerate(zip(good, held, contexts, picks, strict=True)):
        reason = "" if right else _reason(state, first + slot, context, picked)
        status = "failed" if reason else "edited"
        results[number] = RequestInfo(names[number], right, status, reason and f"{reason} (the edit stays stored)")
    seconds = time.perf_counter() - began
    items = [read_item(model, number, requests[number], (), False) for number in good]
    unit = forward_seconds(model, items)
    scale = 1 / (len(requests) * unit) if unit else 0.0
    ordered = tuple(results[number] for number in range(len(requests)))
    added = keys.size + len(thresholds) + extra
    return state, EditInfo(ordered, seconds, fit_seconds, seconds * scale, fit_seconds * scale, added)


def _reason(state: RetrievalState, position: int, context: list[int] | None, picked: Sequence[int]) -> str:
    """Why an edit does not come out, and how to mend it."""
    if not picked:
        return "its prompt is no nearer to it than held texts are; lower margin, or give similarity"
    if context is None:
        return "prompt and edit are longer than the model reads; shorten the prompt"
    if position not in picked:
        return f"the edit {state.requests[picked[-1]].id!r} is nearer to the prompt; take it out, or raise nearest"
    return "the model does not say the target though it reads the edit; try another fact= or question="


# --- resuming ---


def save_index(state: RetrievalState) -> Arrays:
    """The index as arrays: keys, thresholds, and the requests as JSON in UTF-8.

    Args:
        state: after some steps.
    """
    return save_stored(state, "keys", "thresholds")


def restore_index(state: RetrievalState, arrays: Arrays) -> RetrievalState:
    """The inverse of `save_index`.

    Args:
        state: fresh, from ``init`` with the same settings and model.
        arrays: what was saved.
    """
    return restore_stored(state, arrays, "keys", "thresholds")


# --- among the methods ---


def _learnt(model: Model, settings: RetrievalSettings) -> str:
    return fingerprint(read_encoder(settings.encoder)) if settings.encoder else ""


register_editor(
    Method(
        name="retrieval",
        presets=RETRIEVAL_PRESETS,
        build=lambda settings, memory, cache, progress: retrieval(
            settings, memory=memory, cache=cache, progress=progress
        ),
        model=lambda state: state.model,
        save=save_index,
        restore=restore_index,
        routing=routing,
        check=check_retrieval,
        learnt=_learnt,
        undo="exact",
        stock_checkpoint=False,
    )
)
