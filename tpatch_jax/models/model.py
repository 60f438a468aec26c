"""A loaded model: description, parameters and tokenizer, with pure functions to run it."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tpatch_jax.audio import AudioPrompt, as_audio
from tpatch_jax.core import ffn
from tpatch_jax.core.arguments import as_count, as_path, check_call, check_kind, describe
from tpatch_jax.core.devices import automatically
from tpatch_jax.core.int8 import float_type, is_int8
from tpatch_jax.embeddings import EMBEDDINGS, EmbeddingPrompt, plain_text
from tpatch_jax.errors import TPatchError
from tpatch_jax.images import ImagePrompt, as_image
from tpatch_jax.models import generation, networks
from tpatch_jax.models.audio_reader import audio_tokens
from tpatch_jax.models.chat import answer_chat, as_messages, is_rendered, stops_after
from tpatch_jax.models.checkpoints import folder as checkpoint
from tpatch_jax.models.config import AudioInput, NetworkConfig
from tpatch_jax.models.embedded import embedded_row, put_embeddings, written_tokens
from tpatch_jax.models.families.registry import configure
from tpatch_jax.models.families.whisper import GENERATION
from tpatch_jax.models.networks import Batch, Embedded, Pair, Trace
from tpatch_jax.models.pytrees import same_arrays
from tpatch_jax.models.rows import ASK
from tpatch_jax.models.tokenizer import Tokenizer, lost_characters, read_tokenizer, same_tokenizer, tokens_behind
from tpatch_jax.typing import Params, PathLike, TokenIds

__all__ = ["DTYPES", "Model", "check_loaded", "load_model", "read_tokenizer", "save_model"]

_log = logging.getLogger(__name__)

ENGLISH = 51_864
"""Tokens of a Whisper that knows English alone; one for many languages has more."""

DTYPES = ("float32", "bfloat16", "int8")
"""The precisions in which a model is loaded on demand; `tpatch_jax.quantize_base` says what INT8 is."""


@dataclass(frozen=True, eq=False)
class _Facts:
    """What of a model is no array, as one value that compares and hashes, as what is static in a pytree must."""

    config: NetworkConfig
    tokenizer: Tokenizer
    name: str
    folder: Path | None
    settings: Mapping[str, Any]

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, _Facts):
            return NotImplemented
        plain = (self.name, self.folder, self.config, self.settings)
        same = plain == (other.name, other.folder, other.config, other.settings)
        return same and same_tokenizer(self.tokenizer, other.tokenizer)

    def __hash__(self) -> int:
        return hash((self.name, self.config))


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, eq=False)
class Model:
    """A model that can be edited. Immutable: `attach` and `merge` return another one that shares its arrays.

    A pytree: its parameters are the leaves and all else is static, so that a model goes through ``jit``, ``vmap`` and
    ``grad`` as an argument as well. Two models are equal if they say the same of themselves and their parameters are
    the same, bit for bit.

    Texts become rows of token ids, each a prompt and its answer, of which a position says the next token. A decoder
    reads both, one after the other. An encoder-decoder's encoder reads the prompt up to `ASK`, its decoder what
    follows. A classifier reads the prompt; the one token after `ASK` is its answer, the number of a label.
    Of a model that reads images a prompt is an `tpatch_jax.images.ImagePrompt`, whose tokens are its pixels' bytes; of
    one that reads sound it is an `tpatch_jax.audio.AudioPrompt`, whose tokens are its log-mel frames.

    Attributes:
        config: the network's description.
        params: a nested dict of arrays; see `tpatch_jax.models.networks`.
        tokenizer: the model's own, as transformers loads it.
        name: what the user called it.
        folder: where it was read from, if anywhere.
        settings: what its ``config.json`` says.
    """

    config: NetworkConfig
    params: Params = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    name: str = "model"
    folder: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Params]], _Facts]:
        """The parameters, and what is static; for `jax.tree`."""
        facts = _Facts(self.config, self.tokenizer, self.name, self.folder, self.settings)
        return ((jax.tree_util.GetAttrKey("params"), self.params),), facts

    @classmethod
    def tree_unflatten(cls, facts: _Facts, children: tuple[Params]) -> "Model":
        """The inverse of `tree_flatten_with_keys`."""
        return cls(facts.config, children[0], facts.tokenizer, facts.name, facts.folder, facts.settings)

    def __eq__(self, other: object) -> bool:
        """Whether both say the same of themselves and have the same parameters, bit for bit."""
        if self is other:
            return True
        return same_arrays(self, other) if isinstance(other, Model) else NotImplemented

    def __hash__(self) -> int:
        """Of the name and the description alone, so that no parameter is read."""
        return hash((self.name, self.config))

    def with_params(self, params: Params) -> "Model":
        """The same model with other parameters."""
        return dataclasses.replace(self, params=params)

    @automatically
    def trace(
        self,
        batch: Batch,
        layer: int | None = None,
        *,
        embeddings: Float[Array, "batch n hidden"] | None = None,
        positions: Int[Array, "batch n"] | None = None,
    ) -> Trace:
        """Run up to and through the FFN of one layer (the last by default); see `tpatch_jax.models.networks.trace`.

        Args:
            batch: what to run it on.
            layer: where to cut.
            embeddings: as of `apply`.
            positions: as of `apply`.
        """
        batch = self._embedded(_checked(batch), embeddings, positions)
        return networks.trace(self.config, self.params, batch, self.layer(layer))

    @automatically
    def resume(
        self, traced: Trace, output: Float[Array, "batch tokens hidden"]
    ) -> Float[Array, "batch *tokens vocabulary"]:
        """Run the rest from a given FFN output: logits; see `tpatch_jax.models.networks.resume`."""
        check_kind(traced, Trace, "model.resume(traced, output)", "a Trace; give what `trace` returned")
        if getattr(output, "shape", None) != traced.output.shape:
            has = list(output.shape) if hasattr(output, "shape") else describe(output)
            raise TPatchError(f"the output is {has}; the trace holds an array {list(traced.output.shape)}")
        return networks.resume(self.config, self.params, traced, output)

    @automatically
    def apply(
        self,
        batch: Batch,
        *,
        embeddings: Float[Array, "batch n hidden"] | None = None,
        positions: Int[Array, "batch n"] | None = None,
    ) -> Float[Array, "batch *tokens vocabulary"]:
        """The whole network: a batch to logits, float32; see `tpatch_jax.models.networks.apply`.

        Args:
            batch: what to run it on.
            embeddings: what stands in front of the tokens, ``[batch, n, hidden_size]``, such as what a vision tower
                makes of a picture: what the network's own table would give for ``n`` tokens, where that scales its rows
                the scaled ones. The logits are then those of ``n`` places more. Of an encoder-decoder its encoder
                reads them.
            positions: which of the tokens the embeddings replace instead, ``[batch, n]`` or ``[n]`` int. Where a text
                begins with a special token, that usually comes before what is seen, so leave room behind it.

        Raises:
            TPatchError: the embeddings are of another shape, or a position that is known is none of a token.

        Example:
            >>> loss = lambda model, batch: -jax.nn.log_softmax(model.apply(batch))[0, -1, 7]
            >>> gradient = jax.jit(jax.grad(loss))(model, batch)  # doctest: +SKIP
        """
        return networks.apply(self.config, self.params, self._embedded(_checked(batch), embeddings, positions))

    def _embedded(self, batch: Batch, embeddings: Any, positions: Any) -> Batch:
        """A batch with embeddings in it, if there are any."""
        if embeddings is None:
            if positions is not None:
                raise TPatchError("there are positions and no embeddings to put there; give embeddings=")
            return batch
        if self.config.image is not None:
            raise TPatchError(f"{self.name!r} reads images and no tokens; embeddings stand beside tokens")
        width = self.config.embed_width or self.config.hidden_size
        if isinstance(batch, Pair):
            inner = self.config.encoder or self.config
            width = inner.embed_width or inner.hidden_size
            return Pair(put_embeddings(_of_tokens(batch.source), embeddings, positions, width), batch.target)
        return put_embeddings(_of_tokens(batch), embeddings, positions, width)

    def layer(self, layer: int | None) -> int:
        """A layer's index, checked; ``None`` is the last and negative ones count from the end."""
        if layer is not None and (not isinstance(layer, Integral) or isinstance(layer, bool)):
            raise TPatchError(f"layer {layer!r} is no number of a layer; this model has 0 to {self.config.layers - 1}")
        index = self.config.layers - 1 if layer is None else layer + self.config.layers * (layer < 0)
        if not 0 <= index < self.config.layers:
            raise TPatchError(f"layer {layer} is not in this model; it has layers 0 to {self.config.layers - 1}")
        return index

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without special tokens.

        Raises:
            TPatchError: the text holds a token that the tokenizer has and the model has not.
        """
        _texts(text, several=False)
        if isinstance(text, ImagePrompt) and self.config.image is None:
            raise TPatchError(
                f"{text!r} is an image, and {self.name!r} reads texts; give a text, or an image classifier"
            )
        if isinstance(text, AudioPrompt):
            raise TPatchError(f"{text!r} is a recording, and {self.name!r} reads texts; give a text, or a Whisper")
        if EMBEDDINGS in text:
            # Of a prompt with embeddings `encode_prompt` makes tokens. Anything else would leave them out.
            raise TPatchError(
                f"{text[:60]!r}: only the name of those embeddings is at hand here; give them: "
                "tp.EmbeddingPrompt(TEXT, EMBEDDINGS)"
            )
        return self.known(text, self.tokenizer.encode(text, add_special_tokens=False))

    @property
    def audio(self) -> AudioInput | None:
        """How its encoder reads sound, if it does."""
        return self.config.encoder.audio if self.config.encoder else None

    def known(self, text: str, tokens: list[int]) -> list[int]:
        """The token ids of a text, if the model knows them all.

        Raises:
            TPatchError: one is beyond the model's.
        """
        # Tokenizers may have tokens for images and the like, of which a model of text has no embedding.
        if max(tokens, default=0) >= self.config.vocabulary:
            name = self.tokenizer.convert_ids_to_tokens(max(tokens))
            raise TPatchError(f"the token {name!r} in {text[:40]!r} is none of {self.name!r}; leave it out")
        return tokens

    def encode_prompt(self, text: str) -> list[int]:
        """The token ids of a text that the model reads from its start, up to where it answers; see above.

        The special tokens with which a text begins stand there once, also where the text spells them out. What the
        model's chat template has written is read as it is.
        """
        _texts(text, several=False)
        if self.audio is not None:
            return [*audio_tokens(self.audio, self.settings, text), ASK, *self.begin]
        if isinstance(text, EmbeddingPrompt):
            return self._encode_embedded(text)
        plain = self.encode(text)
        if self.config.image is not None:
            return [*plain, ASK]
        rendered = bool(self.start) and self.config.architecture == "decoder" and is_rendered(self.tokenizer, text)
        begun = rendered or self._begins(plain)
        if begun and not rendered and "begun" not in self._said:
            self._said.add("begun")
            name = self.decode_all(self.start)
            _log.warning("%r begins with %r, which %r puts before a text; it is there once", text[:40], name, self.name)
        if self.config.architecture == "decoder":
            return plain if begun else [*self.start, *plain]
        read = self.known(text, self.tokenizer.encode(text, add_special_tokens=True))
        read = read[len(self.start) :] if begun else read
        return [*read, ASK, *(self.begin if self.config.encoder else ())]

    def _encode_embedded(self, prompt: EmbeddingPrompt) -> list[int]:
        """A text in tokens, with embeddings in front of it or in the place of some of them."""
        if self.config.image is not None:
            raise TPatchError(f"{prompt!r} is a text with embeddings, and {self.name!r} reads images; give a picture")
        reader = self.config.encoder or self.config
        width = reader.embed_width or reader.hidden_size
        if prompt.embeddings.shape[1] != width:
            raise TPatchError(
                f"{prompt!r}: the embeddings are {prompt.embeddings.shape[1]} wide, those of {self.name!r} are "
                f"{width}; project them to that"
            )
        row = self.encode_prompt(prompt.text)
        start = len(self.start) if self._begins(row) else 0
        read = row.index(ASK) if ASK in row else len(row)
        return embedded_row(row, prompt.embeddings, prompt.positions, start, read)

    def _begins(self, tokens: TokenIds) -> bool:
        """Whether a text's tokens begin with those that the tokenizer puts before a text."""
        return bool(self.start) and tuple(tokens[: len(self.start)]) == self.start

    @cached_property
    def _said(self) -> set[str]:
        """What was said about this model already."""
        return set()

    def begun(self, text: str) -> str:
        """The special tokens at the start of a text that the tokenizer would put there, as they are spelt; or nothing.

        Args:
            text: a prompt; one that a chat template has written may begin so.
        """
        spelt, text = self.decode_all(self.start), plain_text(text)
        return spelt if spelt and text.startswith(spelt) and self._begins(self.encode(text)) else ""

    def decode_all(self, tokens: TokenIds) -> str:
        """The text of token ids, special tokens spelt out."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False)

    def lost(self, text: str) -> list[str]:
        """The characters of a text that its tokens do not hold, each once: the tokenizer does not know them."""
        if self.config.image is not None or isinstance(text, AudioPrompt):
            return []
        return lost_characters(self.tokenizer, plain_text(text))

    def encode_target(self, prompt: str, target: str) -> list[int]:
        """The token ids of what follows a prompt; ``target`` begins with the space between them, if there is one.

        Of a decoder they are read off the whole text where the prompt's tokens stay the same in it: tokenizers of
        SentencePiece's kind put a space of their own before a text that stands alone. An encoder-decoder's answer
        ends with the token that ends a text; a classifier's is the number of a label.

        Raises:
            TPatchError: the classifier has no such label, or the tokenizer no token that ends a text.
        """
        for text in (prompt, target):
            _texts(text, several=False)
        if self.config.architecture == "encoder":
            return [self.label(target)]
        if self.config.architecture == "encoder-decoder":
            # Transcripts begin with a space.
            return [*self.encode(" " * (self.audio is not None) + target.strip()), self.end]
        return tokens_behind(plain_text(prompt), target, self.encode, self.decode)

    def label(self, name: str) -> int:
        """The number of a classifier's label."""
        if name.strip() not in self.config.labels:
            raise TPatchError(f"the classifier has no label {name.strip()!r}; it has {', '.join(self.config.labels)}")
        return self.config.labels.index(name.strip())

    def excess(self, prompt: TokenIds, answer: TokenIds) -> str:
        """What is too long for the model, and how to mend it; empty if prompt and answer fit."""
        context, inner = self.config.context, self.config.encoder
        if self.config.architecture == "decoder":
            total = len(prompt) + len(answer)
            return f"prompt and target have {total} tokens, the model reads {context}; shorten the prompt" * (
                total > context
            )
        read = prompt.index(ASK)
        limit = inner.context if inner else context
        if read > limit:
            return f"the prompt has {read} tokens, the encoder reads {limit}; shorten it"
        written = len(prompt) - read - 1 + len(answer)
        if inner and written > context:
            return f"the target has {written} tokens, the decoder writes {context}; shorten it"
        return ""

    @cached_property
    def begin(self) -> tuple[int, ...]:
        """The tokens with which an encoder-decoder's answers begin: the one that its decoder starts with, and what the
        tokenizer puts before a text.
        """
        first = self.settings.get("decoder_start_token_id")
        if first is None:
            raise TPatchError(
                f"config.json of {self.name!r} has no 'decoder_start_token_id', with which its decoder begins; add it "
                "(T5 begins with its padding token, BART with the one that ends a text)"
            )
        return (int(first), *(self.start if self.audio is None else self._tasks()))

    def _tasks(self) -> list[int]:
        """The tokens that tell a Whisper what to write: of one for many languages the language, and to transcribe; and
        that no times are wanted.
        """
        told, vocabulary = self.settings.get(GENERATION) or {}, self.tokenizer.get_vocab()
        names = ["<|notimestamps|>"]
        if told.get("is_multilingual", "<|transcribe|>" in vocabulary and self.config.vocabulary > ENGLISH):
            language = str(told.get("language") or "en").strip("<|>")
            if f"<|{language}|>" not in vocabulary:
                raise TPatchError(
                    f"generation_config.json of {self.name!r} has the 'language' {language!r}, for which the tokenizer "
                    'has no token; write its code, such as "en"'
                )
            names = [f"<|{language}|>", "<|transcribe|>", *names]
        return [vocabulary[name] for name in names if name in vocabulary]

    @cached_property
    def never(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens that a Whisper never writes, and those that it never begins with: ``generation_config.json``."""
        told = (self.settings.get(GENERATION) or {}) if self.audio else {}
        always, first = (told.get(name) or () for name in ("suppress_tokens", "begin_suppress_tokens"))
        return tuple(token for token in always if token >= 0), tuple(first)

    @cached_property
    def start(self) -> tuple[int, ...]:
        """The special tokens that the tokenizer puts before a text; Llama and BERT have one, SmolLM2 has none."""
        if self.config.image is not None or self.audio is not None:
            return ()
        plain, whole = self.encode("a"), self.tokenizer.encode("a", add_special_tokens=True)
        for first in range(len(whole) - len(plain) + 1):
            if whole[first : first + len(plain)] == plain:
                return tuple(whole[:first])
        return ()

    def decode(self, tokens: TokenIds | Array | np.ndarray) -> str:
        """The text of token ids.

        Raises:
            TPatchError: they are no token ids.
        """
        ids = np.asarray(tokens)
        if ids.ndim != 1 or (ids.size and (not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0)):
            raise TPatchError(f"{describe(tokens)} is no list of token ids; give whole numbers, as `encode` returns")
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    def continuation(self, prompt: TokenIds, tokens: TokenIds) -> str:
        """The text that new tokens add behind a prompt's; the space between them is in it, if there is one.

        Alone, tokens of SentencePiece's kind lose the space before their first word.

        Args:
            prompt: token ids, as `encode_prompt` gives them.
            tokens: those that follow.
        """
        if self.config.architecture == "decoder":
            read = written_tokens(prompt)
            before, whole = self.decode(read), self.decode([*read, *tokens])
            if whole.startswith(before):
                return whole[len(before) :]
        return self.decode(tokens)

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: str, max_new_tokens: int = 16, *, embeddings: Any = None, positions: Any = None
    ) -> str: ...

    @overload
    def generate(
        self, prompt: Sequence[str], max_new_tokens: int = 16, *, embeddings: Any = None, positions: Any = None
    ) -> list[str]: ...

    @automatically
    def generate(
        self, prompt: str | Sequence[str], max_new_tokens: int = 16, *, embeddings: Any = None, positions: Any = None
    ) -> str | list[str]:
        """Greedy continuation of a prompt, or of several at once, up to the end-of-text token.

        Args:
            prompt: the text to continue, as it is: no chat template is applied (`chat` does that). A list of texts is
                run as one batch, in which each gets what it gets alone.
            max_new_tokens: at most so many tokens are added to each.
            embeddings: what stands in front of the text, ``[n, hidden_size]``, behind what begins every text; of
                several texts an array for each. The prompt may be an `tpatch_jax.EmbeddingPrompt` instead.
            positions: which tokens of the text they replace instead, ``[n]`` int, counted as `encode_prompt` gives
                them; of several texts some for each.

        Returns:
            What the model adds, without the prompt: a text for a text, a list for a list.

        Raises:
            TPatchError: a prompt is no text, empty, or longer than the context, or the model is a classifier.
        """
        if self.config.labels:
            raise TPatchError(f"{self.name!r} is a classifier, which writes no text; ask it with `classify`")
        texts = _with_embeddings(_texts(prompt), embeddings, positions, isinstance(prompt, str))
        as_count(max_new_tokens, "max_new_tokens")
        rows = [self.encode_prompt(text) for text in texts]
        stops = stops_after(self, [*map(plain_text, texts)])
        said = generation.greedy(self.config, self.params, rows, max_new_tokens, stops, never=self.never)
        answers = [self.continuation(row, tokens) for row, tokens in zip(rows, said, strict=True)]
        return answers[0] if isinstance(prompt, str) else answers

    @automatically
    def chat(
        self,
        messages: str | Sequence[Mapping[str, str]],
        max_new_tokens: int = 256,
        *,
        system: str | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        stream: Callable[[str], None] | None = None,
    ) -> str:
        """The assistant's answer in a chat, in the template of the model's tokenizer.

        Args:
            messages: what the user says, or the conversation so far, messages ``{"role", "content"}`` with the user's
                last.
            max_new_tokens: at most so many tokens are said; the answer ends before where the model ends its turn.
            system: the system's message; without it the template's own, if it has one.
            temperature: divides the logits before a token is drawn from the 50 most probable; 0 is greedy.
            seed: the same seed draws the same answer.
            stream: called with each new piece of the text as soon as it is said.

        Returns:
            What the assistant says, without the white space around it.

        Raises:
            TPatchError: the model has no chat template, or that refuses the conversation; the conversation is none, or
                longer than the context.

        Example:
            >>> model.chat("What is the capital of France?")  # doctest: +SKIP
            'The capital of France is Paris.'
        """
        as_count(max_new_tokens, "max_new_tokens")
        check_kind(system, str | None, "model.chat(messages, system=…)", "a text")
        check_call(stream=stream)
        conversation = as_messages(messages, system, "model.chat(messages)")
        row, said = answer_chat(self, conversation, max_new_tokens, temperature=temperature, seed=seed, stream=stream)
        return self.continuation(row, said).strip()

    @automatically
    def classify(self, texts: Sequence[Any]) -> list[str]:
        """The most probable label of each text, or image.

        Args:
            texts: what to classify. Of a model that reads images: paths of pictures, arrays, or what
                `tpatch_jax.read_image` returns.

        Returns:
            A label for each.

        Raises:
            TPatchError: the model is no classifier, a text is longer than the context, or an image cannot be read.
        """
        from tpatch_jax.models.collection import collect, predicted

        if not self.config.labels:
            raise TPatchError(f"{self.name!r} is no classifier; ask it with `generate`")
        if isinstance(texts, str):
            raise TPatchError("one text is no list of texts; put it into a list")
        if self.config.image is not None:
            texts = [as_image(image, f"image {number}") for number, image in enumerate(texts)]
        texts = _texts(texts)
        rows = [self.encode_prompt(text) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if reason := self.excess(row, ()):
                raise TPatchError(f"{text[:40]!r}: {reason}")
        sites = collect(self, rows, [range(len(row) - 1, len(row)) for row in rows], self.layer(None))
        return [self.config.labels[number] for number in predicted(self, sites)]

    @overload
    def transcribe(self, audio: PathLike | AudioPrompt | np.ndarray) -> str: ...

    @overload
    def transcribe(self, audio: list[Any] | tuple[Any, ...]) -> list[str]: ...

    @automatically
    def transcribe(self, audio: Any) -> str | list[str]:
        """What is said in a recording, or in each of several, greedily, without times.

        Args:
            audio: the path of a WAV or FLAC file, an array of samples, or what `tpatch_jax.read_audio` returns; or a
                list of these. Each is at most as long as the model reads at once, 30 s.

        Returns:
            The transcript, or a list of them.

        Raises:
            TPatchError: the model reads no sound; or a recording cannot be read, is silent or too long.

        Example:
            >>> load_model("whisper-tiny-en").transcribe("call.wav")  # doctest: +SKIP
            'Author of the danger trail, Philip Steels, et cetera.'
        """
        if self.audio is None:
            raise TPatchError(f"{self.name!r} reads no sound; give a Whisper, such as whisper-tiny-en")
        several = isinstance(audio, list | tuple)
        given = [as_audio(one, f"recording {n}") for n, one in enumerate(audio)] if several else [as_audio(audio)]
        rows, texts, most = [self.encode_prompt(prompt) for prompt in given], [], self.config.context
        # As precisely as it is edited, and one by one: an encoder's states of a single recording are large already.
        with jax.default_matmul_precision("highest"):
            for row in rows:
                said = generation.greedy(self.config, self.params, [row], most, self.stops, never=self.never)
                texts.append(self.decode(said[0]).strip())
        return texts if several else texts[0]

    @property
    def end(self) -> int:
        """The token that ends an answer.

        Raises:
            TPatchError: neither the tokenizer nor the model's settings name one.
        """
        token = self.tokenizer.eos_token_id
        if token is None:
            token = next(iter(self.stops), None)
        if token is None:
            raise TPatchError(
                f"{self.name!r} names no token that ends a text; give its tokenizer_config.json an eos_token"
            )
        return token

    @property
    def stops(self) -> tuple[int, ...]:
        """The tokens at which generation ends."""
        ids = {self.tokenizer.eos_token_id}
        named = self.settings.get("eos_token_id")
        ids.update(named if isinstance(named, list) else [named])
        return tuple(sorted(token for token in ids if token is not None))

    @property
    def dtype(self) -> str:
        """The precision of the parameters; ``"int8"`` of a model whose matrices are in INT8."""
        embedding = self.params.get("embed", {}).get("embedding")
        return "int8" if is_int8(embedding) else str(float_type(self.params))

    @property
    def parameter_count(self) -> int:
        """How many numbers the model has."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def _texts(prompt: str | Sequence[str], *, several: bool = True) -> list[str]:
    """A prompt or several as a list, checked."""
    if isinstance(prompt, str):
        return [prompt]
    if not several or not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        mend = "give a text" + ", or a list of texts" * several
        mend = "decode it first: prompt.decode()" if isinstance(prompt, bytes) else mend
        raise TPatchError(f"{describe(prompt)} is no prompt; {mend}")
    for number, text in enumerate(prompt):
        if isinstance(text, Mapping):
            raise TPatchError(
                f"prompt {number} is {describe(text)}; a conversation is answered by model.chat(messages), which uses "
                "the tokenizer's apply_chat_template and needs jinja2 (pip install jinja2)"
            )
        if not isinstance(text, str):
            raise TPatchError(f"prompt {number} is {describe(text)}; give a list of texts")
    return list(prompt)


def _with_embeddings(texts: list[str], embeddings: Any, positions: Any, single: bool) -> list[str]:
    """Texts as prompts with embeddings, if there are any."""
    if embeddings is None:
        if positions is not None:
            raise TPatchError("there are positions and no embeddings to put there; give embeddings=")
        return texts
    parts = (
        [[embeddings], [positions]] if single else [embeddings, [None] * len(texts) if positions is None else positions]
    )
    for name, part in zip(("embeddings", "positions"), parts, strict=True):
        if not hasattr(part, "__len__") or len(part) != len(texts):
            raise TPatchError(f"the {name} are {describe(part)}; give some for each of the {len(texts)} prompts")
    return [EmbeddingPrompt(*each) for each in zip(texts, *parts, strict=True)]


def _of_tokens(batch: Any) -> Any:
    """The tokens beside which embeddings are given."""
    if isinstance(batch, Embedded):
        raise TPatchError("the batch holds embeddings already; give them once")
    return batch


def _checked(batch: Batch) -> Batch:
    """What a network is run on, if it holds whole numbers; its shape is checked where it is read."""
    for part in batch if isinstance(batch, networks.Pair) else (batch,):
        tokens = part.tokens if isinstance(part, Embedded) else part
        dtype = getattr(tokens, "dtype", None)
        if dtype is not None and tokens.ndim not in (3, 4) and not jnp.issubdtype(dtype, jnp.integer):
            raise TPatchError(f"the tokens are {dtype}; give an array of token ids, whole numbers")
    return batch


def check_loaded(model: Any, call: str) -> None:
    """Make sure that an argument is a loaded model.

    Args:
        model: the argument.
        call: how the function is called, for the message.

    Raises:
        TPatchError: it is something else.
    """
    if isinstance(model, Model):
        return
    if isinstance(model, str | Path):
        raise TPatchError(f"{call}: {str(model)!r} is the name of a model; load it first, with load_model")
    if type(model).__name__ == "Network":
        raise TPatchError(
            f"{call}: a Network is no model of this library; edit it with tp.edit_tokens, and use its own methods: "
            "attach, detach, merge, unmerge"
        )
    raise TPatchError(f"{call}: {describe(model)} is no model; give what load_model returned")


def load_model(
    model: PathLike, *, dtype: str | None = None, mesh: jax.sharding.Mesh | None = None, quiet: bool = True
) -> Model:
    """Load a model to edit.

    Args:
        model: a registered name such as ``"smollm2-135m"`` (fetched once, then cached), a folder with ``config.json``
            and safetensors, or a hub id ``owner/name``.
        dtype: ``"float32"``, ``"bfloat16"``, or ``"int8"`` for matrices in INT8 (`quantize_base`); ``None`` keeps the
            checkpoint's.
        mesh: devices to which the parameters go directly, split over its axis ``"model"`` if it has one.
        quiet: show no progress bar while fetching.

    Returns:
        The `Model`.

    Raises:
        TPatchError: the name is unknown, or the folder does not hold a supported model.

    Example:
        >>> model = load_model("smollm2-135m")  # doctest: +SKIP
        >>> model.generate("The capital of France is", 1)  # doctest: +SKIP
        ' Paris'
    """
    from tpatch_jax.models.checkpoints.sources import resolve_model
    from tpatch_jax.models.fingerprint import remember_files

    if isinstance(model, Model):
        raise TPatchError(f"{model.name!r} is loaded already; use it as it is")
    as_path(model, "load_model(model)", "the name of a model; give one, a folder, or a hub id")
    check_kind(mesh, jax.sharding.Mesh | None, "load_model(model, mesh=…)", "a mesh; give what jax.make_mesh returned")
    if dtype not in (None, *DTYPES):
        raise TPatchError(
            f"dtype {dtype!r} is not supported; use 'float32' or 'bfloat16', or 'int8' for weights in INT8"
        )
    folder = resolve_model(str(model), quiet=quiet)
    # Before the weights, which take longer.
    settings = checkpoint.read_settings(folder)
    tokenizer = read_tokenizer(folder, configure(settings), settings)
    files = checkpoint.mark_files(folder)
    read = "float32" if dtype == "int8" else dtype
    config, params, settings = checkpoint.read_folder(folder, read, mesh, settings=settings)
    loaded = Model(config, params, tokenizer, str(model), folder, settings)
    if dtype == "int8":
        from tpatch_jax.models.quantising import quantize_base

        loaded = quantize_base(loaded)
    remember_files(loaded, f"{dtype} {files}")
    return loaded


@automatically
def save_model(model: Model, folder: PathLike) -> None:
    """Write a model, merged patches included, as a folder that `load_model` reads, whole or not at all.

    With merged patches one layer is wider than the others, which stock transformers refuses; `tpatch_jax.export_model`
    writes a folder for it.

    Args:
        model: any model without attached patches (merge them first).
        folder: must not exist yet, or be empty.

    Raises:
        TPatchError: patches are attached, the folder is taken, or the disk is full.
    """
    check_loaded(model, "save_model(model, folder)")
    from tpatch_jax.models.quantising import check_float

    folder = as_path(folder, "save_model(model, folder)", "a folder; give its path")
    check_float(model, "save_model")
    for index, layer in model.params["layers"].items():
        if ffn.attached(layer["ffn"]):
            raise TPatchError(f"a patch is attached to layer {index}; merge it before saving the model")
    checkpoint.write_folder(folder, model.config, model.params, model.settings, model.folder)
