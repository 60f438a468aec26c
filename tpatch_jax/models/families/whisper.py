"""Whisper: an encoder that reads sound, and a decoder that writes what is said."""

from typing import Any

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import AudioInput, NetworkConfig
from tpatch_jax.models.families.bart import stack_names
from tpatch_jax.models.families.family import Family, Settings, activation, configure_plain, setting

__all__ = ["GENERATION", "WHISPER", "extraction"]

GENERATION = "generation_config"
"""Under this name the settings hold what ``generation_config.json`` says."""


def extraction(settings: Settings) -> dict[str, Any]:
    """How log-mel frames are made of sound, with what ``preprocessor_config.json`` leaves open.

    Args:
        settings: of ``config.json``, with those of ``preprocessor_config.json`` under ``"preprocessor_config"``.
    """
    told = settings.get("preprocessor_config") or {}
    rate, hop = told.get("sampling_rate") or 16_000, told.get("hop_length") or 160
    seconds = 2 * setting(settings, "max_source_positions") * hop / rate
    defaults = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": setting(settings, "num_mel_bins"),
        "sampling_rate": rate,
        "hop_length": hop,
        "chunk_length": int(seconds) if seconds.is_integer() else seconds,
        "n_fft": 400,
        "padding_value": 0.0,
    }
    # Larger files hold the filters as well, which are computed.
    left_out = ("mel_filters", "processor_class", "return_attention_mask")
    return {**defaults, **{name: entry for name, entry in told.items() if entry is not None and name not in left_out}}


def _configure(settings: Settings) -> NetworkConfig:
    hidden_size, act = setting(settings, "d_model"), activation(setting(settings, "activation_function"))
    if act != "gelu":
        raise TPatchError(f"config.json has 'activation_function' {act!r}, and the convolutions of a Whisper use gelu")
    told, frames = extraction(settings), 2 * setting(settings, "max_source_positions")
    audio = AudioInput(setting(settings, "num_mel_bins"), frames)
    made = round(told["chunk_length"] * told["sampling_rate"] / told["hop_length"])
    if settings.get("preprocessor_config") and (told["feature_size"], made) != tuple(audio):
        raise TPatchError(
            f"preprocessor_config.json makes {made} frames of {told['feature_size']} numbers and config.json has "
            f"{frames} of {audio.mels} ('max_source_positions' twice, 'num_mel_bins'); copy the original "
            "files there"
        )

    def stack(side: str, **fields: object) -> NetworkConfig:
        heads = setting(settings, f"{side}_attention_heads")
        if hidden_size % heads:
            raise TPatchError(
                f"config.json has {heads} {side} heads for a 'd_model' of {hidden_size}; mend one of them"
            )
        shared = {
            "layers": setting(settings, f"{side}_layers"),
            "ffn_width": setting(settings, f"{side}_ffn_dim"),
            "activation": act,
            "query_bias": True,
            "key_bias": False,
            "output_bias": True,
        }
        return configure_plain("whisper", settings, hidden_size=hidden_size, heads=heads, **shared, **fields)

    context = setting(settings, "max_target_positions")
    encoder = stack("encoder", context=audio.numbers, positions=audio.positions, causal=False, audio=audio)
    scale = hidden_size**0.5 if settings.get("scale_embedding") else 1.0
    # The unembedding is always the embedding, whatever the settings say.
    return stack("decoder", context=context, positions=context, encoder=encoder, embed_scale=scale, tied=True)


def _views(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    audio, width = config.encoder.audio if config.encoder else None, config.hidden_size
    assert audio is not None
    return {"encoder.audio.first.kernel": (width, audio.mels, 3), "encoder.audio.second.kernel": (width, width, 3)}


WHISPER = Family(
    "whisper",
    ("whisper",),
    _configure,
    "model.",
    {
        "embed.embedding": "model.decoder.embed_tokens.weight",
        "encoder.audio.first": "model.encoder.conv1",
        "encoder.audio.second": "model.encoder.conv2",
        **stack_names("encoder.", "model.encoder"),
        **stack_names("", "model.decoder"),
        "head": "proj_out",
    },
    ffn_width="decoder_ffn_dim",
    views=_views,
)
