"""ViT and DeiT with a classification head: encoders that read images."""

from typing import Any

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import ImageInput, NetworkConfig
from tpatch_jax.models.families.bert import POOLING, labels
from tpatch_jax.models.families.family import Family, Settings, activation, setting

__all__ = ["DEIT", "PREPROCESSOR", "VIT", "preprocessing"]

PREPROCESSOR = "preprocessor_config"
"""Under this name the settings hold what ``preprocessor_config.json`` says."""


def _pair(entry: Any, name: str) -> tuple[int, int]:
    """Height and width, of one number, of two, or of an object with these keys."""
    if isinstance(entry, dict) and {"height", "width"} <= entry.keys():
        entry = [entry["height"], entry["width"]]
    sizes = [entry, entry] if isinstance(entry, int) else entry
    if not isinstance(sizes, list | tuple) or len(sizes) != 2 or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise TPatchError(f"config.json has {name!r} {entry!r}; write one positive number, or height and width")
    return sizes[0], sizes[1]


def _channels(entry: Any, channels: int, name: str) -> tuple[float, ...]:
    values = [entry] * channels if isinstance(entry, int | float) else list(entry)
    if len(values) == 1:
        values *= channels
    if len(values) != channels:
        raise TPatchError(
            f"preprocessor_config.json has {name!r} for {len(values)} channels and config.json 'num_channels' "
            f"{channels}; mend one of them"
        )
    return tuple(float(value) for value in values)


def preprocessing(settings: Settings) -> dict[str, Any]:
    """What becomes of a picture before the network reads it, with what ``preprocessor_config.json`` leaves open.

    Without that file a picture must have the network's size, and its pixels become ``(pixel / 255 - 0.5) / 0.5``.

    Args:
        settings: of ``config.json``, with those of ``preprocessor_config.json`` under `PREPROCESSOR`.
    """
    told = settings.get(PREPROCESSOR) or {}
    size = setting(settings, "image_size")
    kind = str(told.get("image_processor_type") or told.get("feature_extractor_type") or "ViTImageProcessor")
    defaults = {
        "do_resize": bool(told),
        "size": size,
        "resample": 3 if kind.startswith("DeiT") else 2,
        "do_center_crop": kind.startswith("DeiT"),
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * setting(settings, "num_channels"),
        "image_std": [0.5] * setting(settings, "num_channels"),
        "image_processor_type": kind,
    }
    return {**defaults, **{name: entry for name, entry in told.items() if entry is not None}}


def _image(settings: Settings, distilled: bool) -> ImageInput:
    size, patch = (
        _pair(setting(settings, "image_size"), "image_size"),
        _pair(setting(settings, "patch_size"), "patch_size"),
    )
    channels, told = setting(settings, "num_channels"), preprocessing(settings)
    if channels not in (1, 3):
        raise TPatchError(f"config.json has 'num_channels' {channels}; supported are 1 (grey) and 3 (colours)")
    if patch[0] > size[0] or patch[1] > size[1]:
        raise TPatchError(f"config.json has patches of {patch} pixels in pictures of {size}; mend one of them")
    plain = (0.0,) * channels, (1.0,) * channels
    mean, std = plain
    if told["do_normalize"]:
        mean = _channels(told["image_mean"], channels, "image_mean")
        std = _channels(told["image_std"], channels, "image_std")
        if not all(std):
            raise TPatchError("preprocessor_config.json divides by an 'image_std' of 0; mend it")
    scale = float(told["rescale_factor"]) if told["do_rescale"] else 1.0
    return ImageInput(size, patch, channels, scale, mean, std, distilled)


def _configure(family: str, settings: Settings) -> NetworkConfig:
    problem, pooling = settings.get("problem_type"), settings.get(POOLING) or "first"
    if problem not in (None, "single_label_classification"):
        raise TPatchError(
            f"config.json asks for {problem!r}; only classifiers with one label for each image are edited"
        )
    pooling = {"cls": "first"}.get(pooling, pooling)
    if pooling not in ("first", "mean"):
        raise TPatchError(f"config.json asks for {POOLING} {pooling!r}; known are 'cls' and 'mean'")
    image = _image(settings, family == "deit")
    hidden_size, heads = setting(settings, "hidden_size"), setting(settings, "num_attention_heads")
    if hidden_size % heads:
        raise TPatchError(f"config.json has {heads} heads for a 'hidden_size' of {hidden_size}; it must be a multiple")
    return NetworkConfig(
        family=family,
        vocabulary=256,
        hidden_size=hidden_size,
        layers=setting(settings, "num_hidden_layers"),
        heads=heads,
        key_value_heads=heads,
        head_width=hidden_size // heads,
        ffn_width=setting(settings, "intermediate_size"),
        context=image.pixels,
        activation=activation(setting(settings, "hidden_act")),
        gated=False,
        ffn_bias=True,
        norm="layer",
        norm_epsilon=setting(settings, "layer_norm_eps"),
        query_bias=bool(settings.get("qkv_bias", True)),
        output_bias=True,
        positions=image.positions,
        causal=False,
        labels=labels(settings),
        pooling=pooling,
        head_activation="",
        image=image,
    )


def _family(name: str) -> Family:
    layer = f"{name}.encoder.layer.{{}}"
    names = {
        "image.class_token": f"{name}.embeddings.cls_token",
        "image.distillation_token": f"{name}.embeddings.distillation_token",
        "image.patches": f"{name}.embeddings.patch_embeddings.projection",
        "positions.embedding": f"{name}.embeddings.position_embeddings",
        "layers.{}.norm_1": f"{layer}.layernorm_before",
        "layers.{}.attention.query": f"{layer}.attention.attention.query",
        "layers.{}.attention.key": f"{layer}.attention.attention.key",
        "layers.{}.attention.value": f"{layer}.attention.attention.value",
        "layers.{}.attention.output": f"{layer}.attention.output.dense",
        "layers.{}.norm_2": f"{layer}.layernorm_after",
        "layers.{}.ffn.up": f"{layer}.intermediate.dense",
        "layers.{}.ffn.down": f"{layer}.output.dense",
        "norm": f"{name}.layernorm",
        "classifier.output": "classifier",
    }

    def views(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
        image, width = config.image, config.hidden_size
        assert image is not None
        return {
            "image.class_token": (1, 1, width),
            "image.distillation_token": (1, 1, width),
            "image.patches.kernel": (width, image.channels, *image.patch),
            "positions.embedding": (1, image.positions, width),
        }

    return Family(
        name,
        (name,),
        lambda settings: _configure(name, settings),
        f"{name}.",
        names,
        # Parts of pretraining, which the classifier does not read.
        constants=("pooler.dense.weight", "pooler.dense.bias", "embeddings.mask_token"),
        other_heads=("decoder.", "cls_classifier.", "distillation_classifier."),
        views=views,
    )


VIT = _family("vit")
DEIT = _family("deit")
