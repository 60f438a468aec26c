"""BERT, RoBERTa, DistilBERT and ELECTRA with a classification head: encoders whose norms follow the parts."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.family import Family, Settings, activation, configure_plain, setting

__all__ = ["BERT", "DISTILBERT", "ELECTRA", "ROBERTA", "configure_encoder"]

POOLING = "classifier_pooling"
"""In ``config.json``: ``"mean"`` for a head that reads the mean of all tokens; by default it reads the first."""


def labels(settings: Settings) -> tuple[str, ...]:
    """What a classifier tells apart, in the order of its logits."""
    names = settings.get("id2label") or {}
    labels = {int(number): str(name) for number, name in names.items()}
    if sorted(labels) != list(range(len(labels))) or len(labels) < 2:
        raise TPatchError(f"config.json numbers its labels {sorted(labels)}; 'id2label' must count from 0, two or more")
    count = Counter(labels.values())
    if len(count) < 2:
        raise TPatchError(f"config.json calls all its labels {labels[0]!r} in 'id2label'; give each its own name")
    # Released checkpoints give several classes one name, as those of ImageNet call a bird and a machine "crane".
    return tuple(name if count[name] == 1 else f"{name} ({number})" for number, name in sorted(labels.items()))


def configure_encoder(family: str, settings: Settings, **fields: Any) -> NetworkConfig:
    """What the encoders with a classification head share; ``fields`` are those in which one differs."""
    problem, pooling = settings.get("problem_type"), settings.get(POOLING) or "first"
    if problem not in (None, "single_label_classification"):
        raise TPatchError(
            f"config.json asks for {problem!r}; only classifiers with one label for each input are edited"
        )
    if settings.get("is_decoder") or settings.get("add_cross_attention"):
        raise TPatchError("config.json makes a decoder of an encoder's architecture; not supported")
    kind = settings.get("position_embedding_type") or "absolute"
    if kind != "absolute":
        raise TPatchError(f"config.json asks for positions of type {kind!r}; only 'absolute' ones are supported")
    pooling = {"cls": "first"}.get(pooling, pooling)
    if pooling not in ("first", "mean"):
        raise TPatchError(f"config.json asks for {POOLING} {pooling!r}; known are 'cls' and 'mean'")
    shared = {
        "causal": False,
        "post_norm": True,
        "embed_norm": True,
        "query_bias": True,
        "output_bias": True,
        "labels": labels(settings),
        "pooling": pooling,
    }
    return configure_plain(family, settings, **{**shared, **fields})


def _like_bert(family: str, settings: Settings, offset: int) -> NetworkConfig:
    rows = setting(settings, "max_position_embeddings")
    return configure_encoder(
        family,
        settings,
        hidden_size=setting(settings, "hidden_size"),
        heads=setting(settings, "num_attention_heads"),
        layers=setting(settings, "num_hidden_layers"),
        ffn_width=setting(settings, "intermediate_size"),
        context=rows - offset,
        activation=activation(setting(settings, "hidden_act")),
        norm_epsilon=setting(settings, "layer_norm_eps"),
        positions=rows,
        position_offset=offset,
        token_types=setting(settings, "type_vocab_size"),
    )


def _electra(settings: Settings) -> NetworkConfig:
    width = setting(settings, "embedding_size")
    return dataclasses.replace(
        _like_bert("electra", settings, 0),
        embed_width=0 if width == setting(settings, "hidden_size") else width,
        head_activation="gelu",
    )


def _roberta(settings: Settings) -> NetworkConfig:
    # The first rows belong to padding and to nothing.
    return _like_bert("roberta", settings, setting(settings, "pad_token_id") + 1)


def _distilbert(settings: Settings) -> NetworkConfig:
    rows = setting(settings, "max_position_embeddings")
    return configure_encoder(
        "distilbert",
        settings,
        hidden_size=setting(settings, "dim"),
        heads=setting(settings, "n_heads"),
        layers=setting(settings, "n_layers"),
        ffn_width=setting(settings, "hidden_dim"),
        context=rows,
        activation=activation(setting(settings, "activation")),
        norm_epsilon=1e-12,
        positions=rows,
        head_activation="relu",
    )


def _names(prefix: str, parts: Mapping[str, str], head: tuple[str, str]) -> dict[str, str]:
    return {
        "embed.embedding": f"{prefix}.embeddings.word_embeddings.weight",
        "positions.embedding": f"{prefix}.embeddings.position_embeddings.weight",
        "norm_embed": f"{prefix}.embeddings.LayerNorm",
        **{f"layers.{{}}.{ours}": f"{prefix}.{theirs}" for ours, theirs in parts.items()},
        "classifier.dense": head[0],
        "classifier.output": head[1],
    }


_BERT_PARTS = {
    "attention.query": "encoder.layer.{}.attention.self.query",
    "attention.key": "encoder.layer.{}.attention.self.key",
    "attention.value": "encoder.layer.{}.attention.self.value",
    "attention.output": "encoder.layer.{}.attention.output.dense",
    "norm_1": "encoder.layer.{}.attention.output.LayerNorm",
    "ffn.up": "encoder.layer.{}.intermediate.dense",
    "ffn.down": "encoder.layer.{}.output.dense",
    "norm_2": "encoder.layer.{}.output.LayerNorm",
}
_DISTILBERT_PARTS = {
    "attention.query": "transformer.layer.{}.attention.q_lin",
    "attention.key": "transformer.layer.{}.attention.k_lin",
    "attention.value": "transformer.layer.{}.attention.v_lin",
    "attention.output": "transformer.layer.{}.attention.out_lin",
    "norm_1": "transformer.layer.{}.sa_layer_norm",
    "ffn.up": "transformer.layer.{}.ffn.lin1",
    "ffn.down": "transformer.layer.{}.ffn.lin2",
    "norm_2": "transformer.layer.{}.output_layer_norm",
}
_TYPES = "embeddings.token_type_embeddings.weight"
_IDS = ("embeddings.position_ids", "embeddings.token_type_ids")
_PRETRAINING = ("cls.", "lm_head.", "vocab_")
"""Heads of pretraining, which checkpoints without a classifier hold."""

BERT = Family(
    "bert",
    ("bert",),
    lambda settings: _like_bert("bert", settings, 0),
    "bert.",
    {**_names("bert", _BERT_PARTS, ("bert.pooler.dense", "classifier")), "token_types.embedding": f"bert.{_TYPES}"},
    constants=_IDS,
    other_heads=_PRETRAINING,
)
ELECTRA = Family(
    "electra",
    ("electra",),
    _electra,
    "electra.",
    {
        **_names("electra", _BERT_PARTS, ("classifier.dense", "classifier.out_proj")),
        "token_types.embedding": f"electra.{_TYPES}",
        "embed_project": "electra.embeddings_project",
    },
    constants=_IDS,
    other_heads=(*_PRETRAINING, "discriminator_predictions.", "generator_predictions.", "generator_lm_head."),
)
ROBERTA = Family(
    "roberta",
    ("roberta", "xlm-roberta", "camembert"),
    _roberta,
    "roberta.",
    {
        **_names("roberta", _BERT_PARTS, ("classifier.dense", "classifier.out_proj")),
        "token_types.embedding": f"roberta.{_TYPES}",
    },
    # Its classifier does not read the pooler of pretraining, which many a checkpoint still holds.
    constants=(*_IDS, "pooler.dense.weight", "pooler.dense.bias"),
    other_heads=_PRETRAINING,
)
DISTILBERT = Family(
    "distilbert",
    ("distilbert",),
    _distilbert,
    "distilbert.",
    _names("distilbert", _DISTILBERT_PARTS, ("pre_classifier", "classifier")),
    constants=_IDS,
    ffn_width="hidden_dim",
    other_heads=_PRETRAINING,
)
