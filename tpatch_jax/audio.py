"""Recordings as prompts: what a request to a model of speech holds where another holds a text."""

import hashlib
import logging
import math
import wave
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from tpatch_jax.errors import TPatchError
from tpatch_jax.images import find_file

__all__ = ["AUDIO", "RATE", "AudioPrompt", "as_audio", "change_audio", "read_audio", "resample"]

_log = logging.getLogger(__name__)

AUDIO = "audio sha256 "
"""With this the names of recordings begin, which stand for them in files and reports."""

RATE = 16_000
"""Samples a second, to which every recording is brought."""

SILENT = 1e-4
"""A recording of which no sample is louder, of 1, is silent."""

SHORTEST = 0.1
"""Of seconds."""

_MEND = "give the path of a WAV or FLAC file, or an array [samples] of floats from -1 to 1 at 16,000 samples a second"


class AudioPrompt(str):
    """A recording where a prompt stands. As a text it is its name, made of the digest of its samples.

    So a recording is told from others, kept in files and shown like any prompt, and only what reads prompts asks for
    its samples. Files keep the name alone, never the sound.

    Attributes:
        samples: ``[samples]`` float32 from -1 to 1, `RATE` of them a second.
        source: the file that it was read from, if any.
        note: what was done to it on reading: brought to another rate, channels mixed; empty for nothing.
        place: of a request that was read by a model, where in the corrected transcript the target stands, as from and
            to; see `tpatch_jax.editors.speech`.
        problem: why a model cannot read such a request; empty where it can.

    Example:
        >>> one, same = (AudioPrompt(0.5 * np.ones(4000, np.float32)) for _ in range(2))
        >>> one == same, one.seconds, str(one)[:13]
        (True, 0.25, 'audio sha256 ')
    """

    samples: Float[np.ndarray, " samples"]
    source: str
    note: str
    place: tuple[int, int] | None
    problem: str

    def __new__(
        cls,
        samples: Float[np.ndarray, " samples"],
        source: str = "",
        note: str = "",
        place: tuple[int, int] | None = None,
        problem: str = "",
    ) -> "AudioPrompt":
        """Name a recording; its samples are copied."""
        samples = np.array(samples, np.float32, order="C")
        made = super().__new__(cls, f"{AUDIO}{hashlib.sha256(samples.tobytes()).hexdigest()[:16]}")
        samples.setflags(write=False)
        made.samples, made.source, made.note, made.place, made.problem = samples, source, note, place, problem
        return made

    def placed(self, place: tuple[int, int] | None, problem: str = "") -> "AudioPrompt":
        """The same recording with a place, or with the reason why there is none."""
        return AudioPrompt(self.samples, self.source, self.note, place, problem)

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.samples) / RATE

    def strip(self, chars: str | None = None, /) -> "AudioPrompt":
        """The recording itself: there is no white space around it."""
        return self

    def __deepcopy__(self, memo: Any) -> "AudioPrompt":
        """The recording itself, which never changes."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """How it is copied and sent to other processes."""
        return AudioPrompt, (np.asarray(self.samples), self.source, self.note, self.place, self.problem)


def as_audio(audio: Any, where: str = "the recording", folder: Path | None = None) -> AudioPrompt:
    """A recording as a prompt.

    Args:
        audio: the path of a WAV or FLAC file; an array ``[samples]`` or ``[samples, channels]`` of floats from -1 to 1
            or of 16-bit integers, at `RATE` samples a second; or an audio prompt, which stays as it is.
        where: what is read, as a message begins.
        folder: where relative paths begin; without it, or where there is no such file, in the working directory.

    Raises:
        TPatchError: it is none of these, the file is missing or holds no sound, or it is silent or too short.

    Example:
        >>> as_audio(np.sin(np.arange(8000) / 5)).seconds
        0.5
    """
    if isinstance(audio, AudioPrompt):
        return audio
    if isinstance(audio, str | PathLike):
        return read_audio(find_file(audio, folder), where)
    array = np.asarray(audio) if hasattr(audio, "shape") else np.zeros(0, object)
    if array.dtype == object:
        kind = "nothing" if audio is None else f"a {type(audio).__name__}"
        raise TPatchError(f"{where} is {kind}, which is no recording; {_MEND}")
    if array.dtype == np.int16:
        array = array.astype(np.float32) / 2**15
    if not np.issubdtype(array.dtype, np.floating):
        raise TPatchError(f"{where} is an array of {array.dtype}; {_MEND}, or 16-bit integers")
    return _prompt(array, RATE, "", where)


def read_audio(path: str | PathLike[str], where: str = "the recording") -> AudioPrompt:
    """Read a recording: WAV of 8 to 32 bits by itself; with soundfile installed, FLAC and whatever else that reads.

    Several channels are mixed into one, and another rate is brought to `RATE`; ``note`` says so, and the log.

    Args:
        path: the file.
        where: what is read, as a message begins.

    Raises:
        TPatchError: there is no such file, it holds no sound, it is silent or too short, or soundfile is missing.

    Example:
        >>> read_audio("call.wav").seconds  # doctest: +SKIP
        3.5
    """
    path = Path(path)
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise TPatchError(f"{where}: {path} {what}; give the path of a WAV or FLAC file")
    where = f"{where}: {path}"
    try:
        import soundfile  # type: ignore[import-not-found]
    except ImportError:
        samples, rate = _read_wave(path, where)
    else:
        try:
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        # libsndfile's errors are of many kinds; those of files have one class, others come from NumPy.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TPatchError(f"{where} is no recording that can be read ({reason}); get it again") from None
    return _prompt(samples, rate, str(path), where)


def _read_wave(path: Path, where: str) -> tuple[Float[np.ndarray, "samples channels"], int]:
    """Samples from -1 to 1 of a WAV file of whole numbers, and how many there are a second."""
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate, told = (
                file.getsampwidth(),
                file.getnchannels(),
                file.getframerate(),
                file.getnframes(),
            )
            raw = np.frombuffer(file.readframes(told), np.uint8)
    except (wave.Error, EOFError) as error:
        with path.open("rb") as file:
            begin = file.read(4)
        if begin in (b"fLaC", b"OggS", b"ID3\x03", b"ID3\x04", b"FORM") or "unknown format" in str(error):
            raise TPatchError(
                f"{where} is no WAV file of whole numbers, and others are read by soundfile; install it: pip install "
                "'tpatch-jax[audio]', or convert the file"
            ) from None
        raise TPatchError(f"{where} is no recording that can be read ({error}); get it again") from None
    whole = raw[: len(raw) // (width * channels) * width * channels].reshape(-1, channels, width)
    if not len(whole) or len(whole) < told:
        raise TPatchError(f"{where} is cut short: {len(whole):,} of {told:,} samples are there; get it again")
    if width == 1:
        return (whole[..., 0].astype(np.float32) - 128) / 128, rate
    # The bytes of each number, lowest first, as the upper ones of 32 bits.
    padded = np.concatenate([np.zeros((*whole.shape[:2], 4 - width), np.uint8), whole], -1)
    return np.ascontiguousarray(padded).view("<i4")[..., 0].astype(np.float32) / 2**31, rate


def _prompt(samples: np.ndarray, rate: int, source: str, where: str) -> AudioPrompt:
    """A recording of one channel at `RATE`, checked."""
    notes = []
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and samples.shape[1] > 32):
        raise TPatchError(f"{where} is an array {list(samples.shape)}: sound has samples, and channels; {_MEND}")
    if rate < 1000:
        raise TPatchError(f"{where} has {rate} samples a second, which is no speech; get it again")
    if not np.isfinite(samples).all():
        raise TPatchError(f"{where} holds numbers that are not finite; {_MEND}")
    if samples.ndim == 2:
        if samples.shape[1] > 1:
            notes.append(f"{samples.shape[1]} channels were mixed into one")
        samples = samples.mean(1)
    if len(samples) and np.abs(samples).max() > 8:
        raise TPatchError(f"{where} has samples up to {np.abs(samples).max():g}; scale them to -1 to 1")
    if len(samples) < SHORTEST * rate:
        raise TPatchError(f"{where} holds {len(samples) / rate:.3f} s of sound; at least {SHORTEST} s are needed")
    if np.abs(samples - samples.mean()).max() < SILENT:
        raise TPatchError(f"{where} is silent; give a recording in which something is said")
    if rate != RATE:
        notes.append(f"resampled from {rate:,} to {RATE:,} samples a second")
        samples = resample(samples, rate, RATE)
    if notes:
        _log.info("%s: %s", where, "; ".join(notes))
    return AudioPrompt(samples.astype(np.float32), source, "; ".join(notes))


def resample(samples: Float[np.ndarray, " samples"], rate: int, wanted: int) -> Float[np.ndarray, " samples"]:
    """Sound at another rate, without what the lower one cannot hold; by SciPy's polyphase filter.

    Args:
        samples: the sound.
        rate: samples a second.
        wanted: the same of the result.

    Example:
        >>> resample(np.ones(441), 44_100, 16_000).shape
        (160,)
    """
    # Only where it is needed: SciPy's signal processing takes a while to import.
    from scipy.signal import resample_poly

    common = math.gcd(rate, wanted)
    return resample_poly(samples, wanted // common, rate // common).astype(np.float32)


def change_audio(
    samples: Float[np.ndarray, " samples"],
    *,
    speed: float = 1.0,
    gain: float = 1.0,
    noise: float = 0.0,
    rng: np.random.Generator | None = None,
) -> Float[np.ndarray, " samples"]:
    """Sound played faster or slower (and so higher or lower), louder or fainter, with noise.

    Args:
        samples: the sound.
        speed: how many times as fast; the pitch goes with it.
        gain: factor on all samples; what exceeds 1 is cut off.
        noise: deviation of white noise as a share of that of the sound.
        rng: for the noise.

    Example:
        >>> change_audio(np.ones(8000, np.float32), speed=1.25, gain=0.5).shape
        (6400,)
    """
    changed = samples if speed == 1 else resample(samples, round(1000 * speed), 1000)
    if noise:
        rng = rng or np.random.default_rng(0)
        changed = changed + noise * float(np.std(samples)) * rng.standard_normal(len(changed))
    return np.clip(gain * changed, -1, 1).astype(np.float32)
