"""From a recording to the numbers that a network of speech reads: log-mel frames, as the checkpoint's settings say."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from tpatch_jax.audio import AUDIO, RATE, AudioPrompt, resample
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import AudioInput
from tpatch_jax.models.families.whisper import extraction
from tpatch_jax.models.stack import OFFSET, STEPS

__all__ = ["audio_tokens", "input_features"]


@lru_cache(maxsize=8)
def _extractor(settings: str) -> Any:
    # transformers computes the frames with NumPy where torch is not installed.
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(**json.loads(settings))


def input_features(settings: Mapping[str, Any], prompt: AudioPrompt) -> Float[np.ndarray, "mels frames"]:
    """The log-mel frames of a recording, as the checkpoint's feature extractor makes them.

    Args:
        settings: of ``config.json``, with those of ``preprocessor_config.json``.
        prompt: the recording.

    Raises:
        TPatchError: it is longer than what is read at once.
    """
    told = extraction(settings)
    if prompt.seconds > told["chunk_length"]:
        raise TPatchError(
            f"{prompt.source or str(prompt)} is {prompt.seconds:.1f} s long and the model reads {told['chunk_length']} "
            "s; cut it into parts"
        )
    rate = told["sampling_rate"]
    samples = np.asarray(prompt.samples) if rate == RATE else resample(prompt.samples, RATE, rate)
    extract = _extractor(json.dumps(told, sort_keys=True))
    return np.asarray(extract(samples, sampling_rate=rate, return_tensors="np")["input_features"][0], np.float32)


def audio_tokens(audio: AudioInput, settings: Mapping[str, Any], text: str) -> list[int]:
    """A recording as tokens; see `tpatch_jax.models.config.AudioInput`.

    Args:
        audio: what the network reads.
        settings: of ``config.json``, with those of ``preprocessor_config.json``.
        text: an audio prompt.

    Raises:
        TPatchError: it is a text, the name of a recording that is not at hand, or one that is too long.
    """
    if not isinstance(text, AudioPrompt):
        what = "the model reads sound"
        if text.startswith(AUDIO):
            what = "only the name of that recording is kept, not the sound"
        raise TPatchError(f'{text[:40]!r}: {what}; give the recording: {{"audio": PATH}} or tp.read_audio(PATH)')
    # A recording is hashed by its digest, and read again and again.
    return _tokens(text, json.dumps(extraction(settings), sort_keys=True)).tolist()


@lru_cache(maxsize=64)
def _tokens(prompt: AudioPrompt, told: str) -> Int[np.ndarray, " numbers"]:
    settings = {"num_mel_bins": 0, "max_source_positions": 0, "preprocessor_config": json.loads(told)}
    frames = input_features(settings, prompt).T
    silence = frames.max() - 2
    sounding = np.flatnonzero((frames > silence + 2 / STEPS).any(1))
    last = int(sounding[-1]) + 1 if len(sounding) else 1
    return np.rint((frames[:last] + OFFSET) * STEPS).astype(np.int32).reshape(-1)
