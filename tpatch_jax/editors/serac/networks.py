"""The two networks of SERAC: the scope classifier, an encoder, and the counterfactual model, a small decoder."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tpatch_jax.core.flops import count_flops
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import networks
from tpatch_jax.models.checkpoints.folder import read_folder
from tpatch_jax.models.checkpoints.sources import resolve_model
from tpatch_jax.models.collection import batches
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.registry import configure
from tpatch_jax.models.model import Model, load_model, read_tokenizer, save_model
from tpatch_jax.requests import join_target
from tpatch_jax.storage.files import replace_folder, write_text
from tpatch_jax.typing import Params

__all__ = [
    "RADIUS",
    "SeracNetworks",
    "context_tokens",
    "edit_text",
    "embed",
    "embedding_flops",
    "embeddings",
    "encoder_row",
    "read_encoder",
    "read_networks",
    "shallow",
    "write_networks",
]


SCHEMA = 1
SETTINGS, SCOPE, COUNTERFACTUAL = "serac.json", "scope", "counterfactual"
RADIUS = 2.0
"""The length of every embedding: ``exp(-‖e₁ - e₂‖²)`` then is 1/2 at a cosine of .91 and never below ``exp(-16)``."""


class SeracNetworks(NamedTuple):
    """What SERAC is made of besides its memory.

    Attributes:
        scope: the scope classifier, an encoder without a head.
        counterfactual: the counterfactual model, a decoder with the base model's tokenizer.
        shared: how many parameters of ``counterfactual`` are arrays of the base model.
    """

    scope: Model
    counterfactual: Model
    shared: int

    @property
    def parameter_count(self) -> int:
        """How many numbers they have that the base model does not."""
        return self.scope.parameter_count + self.counterfactual.parameter_count - self.shared


# --- the scope classifier ---


def read_encoder(model: str | Path) -> Model:
    """An encoder for the scope classifier: float32, whatever head it has left out.

    Args:
        model: a folder of a BERT, RoBERTa or DistilBERT, or a hub id.

    Raises:
        TPatchError: it is no encoder, or cannot be read.

    Example:
        >>> read_encoder("minilm").config.architecture  # doctest: +SKIP
        'encoder'
    """
    folder = resolve_model(str(model))
    config, params, settings = read_folder(folder, "float32", labels=("out of scope", "in scope"))
    # Without labels and with a tied unembedding a network ends in the residual stream.
    config = dataclasses.replace(config, labels=(), tied=True)
    params = {name: entry for name, entry in params.items() if name != "classifier"}
    return Model(config, params, read_tokenizer(folder, config), str(model), folder, settings)


def edit_text(prompt: str, target: str, join: str | None = None) -> str:
    """What the scope classifier reads of a stored edit: its input and label.

    Example:
        >>> edit_text("The capital of France is", "Lyon")
        'The capital of France is Lyon'
    """
    return prompt + join_target(prompt, target, join)


def encoder_row(encoder: Model, text: str) -> list[int]:
    """A text in the encoder's tokens; of one that is too long the end, which a question asks with.

    Args:
        encoder: from `read_encoder`.
        text: any text.
    """
    row = encoder.known(text, encoder.tokenizer.encode(text, add_special_tokens=True))
    return row if len(row) <= encoder.config.context else [*row[:1], *row[1 - encoder.config.context :]]


@partial(jax.jit, static_argnames="config")
def embed(config: NetworkConfig, params: Params, tokens: Array) -> Array:
    """``e = RADIUS · m / ‖m‖``, ``m`` the mean of the encoder's states over the tokens of a text.

    Args:
        config: the encoder's description.
        params: its parameters.
        tokens: ``[texts, tokens]`` int, padded on the right with negative numbers.

    Returns:
        ``[texts, d]``.
    """
    states, valid = networks.residuals(config, params, tokens)[-1], (tokens >= 0)[..., None]
    total = jnp.sum(jnp.where(valid, states, 0), 1)
    return RADIUS * total / jnp.linalg.norm(total, axis=-1, keepdims=True)


def embeddings(encoder: Model, texts: Sequence[str]) -> np.ndarray:
    """`embed` of texts.

    Args:
        encoder: from `read_encoder`.
        texts: any number of them.

    Returns:
        ``[texts, d]`` float32.
    """
    embedded = np.zeros((len(texts), encoder.config.hidden_size), np.float32)
    for numbers, batch in batches(encoder.config, [encoder_row(encoder, text) for text in texts]):
        embedded[numbers] = np.asarray(embed(encoder.config, encoder.params, batch))[: len(numbers)]
    return embedded


def embedding_flops(encoder: Model, text: str) -> float:
    """FLOPs of `embed` for one text.

    Args:
        encoder: from `read_encoder`.
        text: any text.
    """
    tokens = jax.ShapeDtypeStruct((1, len(encoder_row(encoder, text))), jnp.int32)
    return count_flops(lambda params, row: embed(encoder.config, params, row), encoder.params, tokens)


# --- the counterfactual model ---

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")


def shallow(model: Model, layers: int) -> Model:
    """The first layers of a decoder with its final norm and unembedding: where a counterfactual model starts.

    Args:
        model: a decoder; not changed.
        layers: how many.

    Returns:
        A separate model that shares its arrays with the given one.

    Raises:
        TPatchError: the model is no decoder or has fewer layers.
    """
    config = model.config
    if config.architecture != "decoder":
        raise TPatchError(f"SERAC needs a decoder, and {model.name!r} is an {config.architecture}; use method tpatcher")
    if not 0 < layers < config.layers:
        raise TPatchError(
            f"a counterfactual model of {layers} layers is not smaller than {model.name!r}, which has {config.layers}; "
            f"give 1 to {config.layers - 1}"
        )
    if model.tokenizer.eos_token_id is None:
        raise TPatchError(
            f"the tokenizer of {model.name!r} has no token that ends a text, which SERAC puts between parts"
        )
    settings = {
        name: layers if name in _LAYERS else entry[:layers] if _per_layer(entry, config.layers) else entry
        for name, entry in model.settings.items()
    }
    wanted = dataclasses.replace(config, layers=layers, windows=config.windows[:layers])
    if dataclasses.replace(configure(settings), tied=config.tied) != wanted:
        raise TPatchError(
            f"the first {layers} layers of a {config.family} are no {config.family}; use another base model"
        )
    kept = {index: model.params["layers"][index] for index in range(layers)}
    return dataclasses.replace(model, config=wanted, params={**model.params, "layers": kept}, settings=settings)


def _per_layer(entry: Any, layers: int) -> bool:
    return isinstance(entry, list) and len(entry) == layers


def context_tokens(model: Model, prompt: str, target: str, join: str | None = None) -> list[int]:
    """What the counterfactual model reads before a test input: the edit's input and its label, each ended.

    Args:
        model: whose tokenizer counts.
        prompt: the edit's input.
        target: its label, of any number of words.
        join: what stands between them; see `tpatch_jax.requests.EditRequest`.
    """
    end = model.end
    return [*model.encode_prompt(prompt), end, *model.encode_target(prompt, join_target(prompt, target, join)), end]


# --- on disk ---


def _vocabulary(model: Model) -> str:
    """What identifies a tokenizer's tokens and their numbers."""
    return hashlib.sha256(json.dumps(sorted(model.tokenizer.get_vocab().items())).encode()).hexdigest()[:32]


def write_networks(folder: Path, networks: SeracNetworks, record: dict[str, Any]) -> None:
    """Write both networks as Hugging Face style folders, and how they were made, whole or not at all.

    Args:
        folder: must not exist yet, or be empty.
        networks: the networks.
        record: how they were made.

    Raises:
        TPatchError: the folder is taken, or the disk is full.
    """
    about = {"schema": SCHEMA, "vocabulary": _vocabulary(networks.counterfactual), **record}
    with replace_folder(folder) as temporary:
        for model, name in ((networks.scope, SCOPE), (networks.counterfactual, COUNTERFACTUAL)):
            save_model(model, temporary / name)
            if model.folder is None:
                model.tokenizer.save_pretrained(temporary / name)
        write_text(temporary / SETTINGS, json.dumps(about, indent=2) + "\n")


def read_networks(folder: str | Path, base: Model) -> SeracNetworks:
    """Read what `write_networks` wrote; the embedding that the base model has as well is held once.

    Args:
        folder: what ``tpatch serac-train`` wrote.
        base: the model that is edited.

    Raises:
        TPatchError: the folder is missing or damaged, of a newer schema, or made for another tokenizer.
    """
    path = Path(folder)
    make = f"make them with `tpatch serac-train {base.name} KIND:FILE … --encoder ENCODER -o FOLDER`"
    if not str(folder) or not (path / SETTINGS).is_file():
        said = f"{path} has no {SETTINGS}" if str(folder) else "SERAC's two networks are missing"
        raise TPatchError(f"{said}; {make} and give the folder with --set serac=FOLDER")
    try:
        about = json.loads((path / SETTINGS).read_text("utf-8"))
        schema, vocabulary = about["schema"], about["vocabulary"]
    except (ValueError, KeyError, TypeError) as error:
        raise TPatchError(f"{path / SETTINGS} is damaged ({error!r}); {make}") from None
    if schema != SCHEMA:
        raise TPatchError(f"{path} was written by a newer version (schema {schema}); upgrade tpatch-jax")
    if vocabulary != _vocabulary(base):
        raise TPatchError(f"{path} was made for a model with another tokenizer than that of {base.name!r}; {make}")
    scope, small = read_encoder(path / SCOPE), load_model(path / COUNTERFACTUAL)
    params, shared = dict(small.params), 0
    for name in ("embed", "head"):
        ours, theirs = small.params.get(name), base.params.get(name)
        if ours is not None and theirs is not None and _alike(ours, theirs):
            params[name], shared = theirs, shared + sum(leaf.size for leaf in jax.tree.leaves(theirs))
    return SeracNetworks(scope, small.with_params(params), shared)


@partial(jax.jit)
def _same(one: Array, other: Array) -> Array:
    return jnp.array_equal(one, other)


def _alike(one: Params, other: Params) -> bool:
    """Whether two parts of a network are the same bit for bit."""
    kinds = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), part) for part in (one, other)]
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return kinds[0] == kinds[1] and all(bool(_same(left, right)) for left, right in pairs)
