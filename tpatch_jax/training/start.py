"""Where finetuning starts: a checkpoint, with a new head if need be, or random weights and a new tokenizer."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.checkpoints.folder import read_folder
from tpatch_jax.models.checkpoints.layout import flatten, insert
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.registry import configure, family_of
from tpatch_jax.models.image_reader import image_reader
from tpatch_jax.models.model import Model, read_tokenizer
from tpatch_jax.models.shapes import merged_neurons, parameter_shapes
from tpatch_jax.typing import Params

__all__ = ["complete", "named_labels", "read_start", "train_tokenizer"]


_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
"""A folder with one of these files has a tokenizer."""

_BYTES = 256
SPREAD = 0.02
"""The standard deviation of new weights where ``config.json`` names none."""


def named_labels(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels that a ``config.json`` names, in the order of their numbers."""
    names = {int(number): str(name) for number, name in (settings.get("id2label") or {}).items()}
    return tuple(names[number] for number in sorted(names))


def read_start(
    folder: Path,
    settings: Mapping[str, Any],
    labels: Sequence[str] | None,
    from_scratch: bool,
    texts: Iterable[str],
    seed: int,
) -> Model:
    """The model to train: float32, complete, and with a tokenizer.

    Args:
        folder: with ``config.json`` and, unless from scratch, weights and a tokenizer.
        settings: what its ``config.json`` says.
        labels: what a classifier shall tell apart; ``None`` for an encoder-decoder.
        from_scratch: draw all weights.
        texts: what a tokenizer is trained on where the folder has none and all starts from scratch.
        seed: of what is drawn.

    Returns:
        The model.

    Raises:
        TPatchError: weights or the tokenizer are missing or damaged.
    """
    if from_scratch:
        params: Params = {}
        known = dict(settings)
        if labels is not None:
            known["id2label"] = {str(number): label for number, label in enumerate(labels)}
            known["label2id"] = {label: number for number, label in enumerate(labels)}
        config = configure(known)
        if family_of(known).own_head:
            config = dataclasses.replace(config, tied=_tied(known))
    else:
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            raise TPatchError(
                f"{folder} holds no weights; put model.safetensors there, or start from random ones with --from-scratch"
            )
        config, params, known = read_folder(folder, "float32", labels=labels)
        if labels is not None and tuple(labels) != named_labels(settings):
            # Its rows stand for other labels, even where there are as many.
            params = {**params, "classifier": _without_output(params.get("classifier", {}))}
    if config.image is not None:
        tokenizer, source = image_reader(config, known), None
    elif from_scratch and not any((folder / name).exists() for name in _TOKENIZERS):
        tokenizer, source = train_tokenizer(config, known, texts), None
    else:
        tokenizer, source = read_tokenizer(folder, config), folder
    spread = known.get("init_std") or known.get("initializer_range") or SPREAD
    return Model(config, complete(config, params, seed, spread), tokenizer, folder.name, source, known)


def _without_output(head: Params) -> Params:
    return {name: entry for name, entry in head.items() if name != "output"}


def _tied(settings: Mapping[str, Any]) -> bool:
    """Whether the unembedding is the embedding; newer settings of T5 say so by its scale."""
    return bool(settings.get("tie_word_embeddings", True)) and settings.get("scale_decoder_outputs") is not False


def complete(config: NetworkConfig, params: Params, seed: int, spread: float = SPREAD) -> Params:
    """Parameters with those that are missing drawn: norms 1, biases 0, matrices from a truncated normal.

    Its standard deviation is ``spread``. In T5, whose attention is not scaled, it is ``inputs ** -0.5``, and for
    queries ``(width · head_width) ** -0.5``; its embedding has 1 where the unembedding is scaled or another.

    Args:
        config: the network's description.
        params: what there is, possibly nothing; not changed.
        seed: the same seed draws the same.
        spread: what ``config.json`` calls ``"init_std"`` or ``"initializer_range"``; narrow networks need more.

    Returns:
        All parameters, in order.

    Source: Devlin et al. 2019, appendix A.2; Raffel et al. 2020, as in the initialisation of its code.
    """
    have = dict(flatten(params))
    shapes = parameter_shapes(config, merged_neurons(config, params) if params else None)
    result: Params = {}
    for number, (path, leaf) in enumerate(flatten(shapes)):
        known = have.get(path)
        drawn = known if known is not None else _draw(config, path, leaf.shape, spread, [seed, number])
        insert(result, path, jax.device_put(drawn))
    return result


def _draw(config: NetworkConfig, path: str, shape: tuple[int, ...], spread: float, seed: list[int]) -> np.ndarray:
    *_, owner, leaf = path.split(".")
    if leaf == "scale":
        return np.full(shape, 1 - config.norm_shift, np.float32)
    if leaf == "bias":
        return np.zeros(shape, np.float32)
    if config.family.startswith("t5"):
        if path == "embed.embedding":
            spread = 1.0 if config.head_scale != 1 or not config.tied else config.hidden_size**-0.5
        elif owner == "query":
            spread = (config.hidden_size * config.head_width) ** -0.5
        else:
            spread = (shape[0] if leaf == "kernel" else config.hidden_size) ** -0.5
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal(shape, np.float32)
    while (far := np.abs(drawn) > 2).any():
        drawn[far] = rng.standard_normal(int(far.sum()), np.float32)
    return drawn * np.float32(spread)


def train_tokenizer(config: NetworkConfig, settings: Mapping[str, Any], texts: Iterable[str]) -> Any:
    """A byte-level BPE tokenizer, whose special tokens have the numbers that ``config.json`` gives them.

    T5's puts the end token behind a text; the others put one before it, too. Numbers that ``config.json`` leaves open
    are the lowest that are free.

    Args:
        config: the network's description; at most ``config.vocabulary`` tokens are made.
        settings: what ``config.json`` says.
        texts: what it is trained on.

    Returns:
        The tokenizer, as transformers would load it.

    Raises:
        TPatchError: two special tokens have the same number, or bytes and special tokens exceed the vocabulary.

    Source: Sennrich et al. 2016, on bytes as in Radford et al. 2019.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    names = {"pad": "<pad>", "eos": "</s>"} | ({} if config.family.startswith("t5") else {"bos": "<s>"})
    given = {kind: settings.get(f"{kind}_token_id") for kind in names}
    # Of several tokens that end a text the first is config.json's own.
    given = {kind: number[0] if isinstance(number, list) and number else number for kind, number in given.items()}
    numbers = {kind: number for kind, number in given.items() if isinstance(number, int)}
    if len(set(numbers.values())) < len(numbers):
        raise TPatchError(f"config.json gives special tokens the same number ({numbers}); give each its own")
    free = (number for number in range(len(names)) if number not in numbers.values())
    for kind in sorted(names, key=lambda kind: ["pad", "bos", "eos"].index(kind)):
        if kind not in numbers:
            numbers[kind] = next(free)
    at = {number: names[kind] for kind, number in numbers.items()}
    special = [at.get(number, f"<unused{number}>") for number in range(max(at) + 1)]
    if min(at) < 0 or len(special) + _BYTES > config.vocabulary:
        raise TPatchError(
            f"config.json allows {config.vocabulary} tokens; a new tokenizer needs {_BYTES} for bytes and "
            f"{len(special)} up to the last special one: raise 'vocab_size', or give special tokens lower numbers"
        )
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    around = [(names[kind], number) for kind, number in numbers.items()]
    first = f"{names['bos']} " if "bos" in names else ""
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single=f"{first}$A {names['eos']}", special_tokens=[pair for pair in around if pair[0] != names["pad"]]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{kind}_token": name for kind, name in names.items()}
    )
