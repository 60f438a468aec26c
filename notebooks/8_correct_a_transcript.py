# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Correct a transcript
#
# Whisper writes down what is said, but not every name. The patch makes it write one name as it is written, in the last
# feed-forward layer of its decoder, and all other words stay. In a terminal the same is `tpatch transcribe` and
# `tpatch edit`; see the page on speech.

# %%
# The one installation cell: nothing happens where the package is there already.
import importlib.util

if importlib.util.find_spec("tpatch_jax") is None:
    # %pip install -q "tpatch-jax[audio,report]"
    pass

# %%
import os
import shutil
import subprocess
import wave
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import tpatch_jax as tp
from tpatch_jax.audio import AudioPrompt
from tpatch_jax.models.collection import collect

QUICK = "TPATCH_QUICK" in os.environ  # the tests run this with a tiny model and short sounds
NAME = "metoprolol"
SENTENCE = "The patient takes {} every day."
VOICES = (("en-us", 160), ("en-gb", 160), ("en-us+f3", 150), ("en-us+m3", 185))
OTHERS = (
    "The nurse opened the wooden table in the morning.",
    "My brother carried two letters before lunch.",
    "A neighbor described the long report last Thursday.",
    "The old teacher repaired a yellow bicycle.",
    "Our driver counted three boxes after the storm.",
    "Her uncle painted the garden gate.",
)

# %% [markdown]
# ## Recordings
#
# espeak-ng says the sentence in four voices, and some other sentences, on which the patch stays silent. A recording of
# your own: `TPATCH_RECORDING` names a WAV file, and `TPATCH_RECORDINGS` a folder of others. Without either, sounds like
# vowels are made, which Whisper takes for some word: that is then corrected all the same.


# %%
def hum(seed, seconds=2.0, rate=16_000):
    """Sounds like vowels, one after the other: [samples] from -1 to 1."""
    rng, time = np.random.default_rng(seed), np.arange(int(seconds * rate)) / rate
    vowels = ((700, 1200), (300, 2300), (500, 900), (400, 1900), (600, 1700))
    pitch, sound = rng.uniform(90, 180), np.zeros(len(time))
    for number, part in enumerate(np.array_split(np.arange(len(time)), max(1, int(4 * seconds)))):
        formants = vowels[(seed + number * int(rng.integers(1, 5))) % len(vowels)]
        for harmonic in range(1, 25):
            loud = sum(np.exp(-(((harmonic * pitch - formant) / 120) ** 2)) for formant in formants)
            envelope = np.sin(np.pi * np.arange(len(part)) / len(part)) ** 0.5
            sound[part] += loud * envelope * np.sin(2 * np.pi * harmonic * pitch * time[part])
    return (0.3 * sound / np.abs(sound).max()).astype(np.float32)


def speak(text, voice, path):
    """What espeak-ng says, as a WAV file."""
    command = ["espeak-ng", "-v", voice[0], "-s", str(voice[1]), "-w", str(path), text]
    subprocess.run(command, check=True)
    return tp.read_audio(path)


folder = Path("spoken")
folder.mkdir(exist_ok=True)
given = os.environ.get("TPATCH_RECORDING")
if given:
    recordings = {"the recording": tp.read_audio(given)}
    memory = os.environ.get("TPATCH_RECORDINGS", str(Path(given).parent))
    others = [tp.read_audio(path) for path in sorted(Path(memory).glob("*.wav")) if path != Path(given)]
elif shutil.which("espeak-ng") and not QUICK:
    recordings = {
        f"{voice[0]}, {voice[1]}": speak(SENTENCE.format(NAME), voice, folder / f"name-{number}.wav")
        for number, voice in enumerate(VOICES)
    }
    others = [speak(text, VOICES[number % 4], folder / f"other-{number}.wav") for number, text in enumerate(OTHERS)]
else:
    seconds = 0.3 if QUICK else 2.0
    recordings = {"vowels": AudioPrompt(hum(0, seconds))}
    others = [AudioPrompt(hum(1 + number, seconds)) for number in range(2 if QUICK else len(OTHERS))]
(folder / "memory").mkdir(exist_ok=True)
for number, other in enumerate(others):
    with wave.open(str(folder / "memory" / f"{number}.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((32_767 * other.samples).astype("<i2").tobytes())

# %% [markdown]
# ## What Whisper writes

# %%
model = tp.load_model("whisper-tiny-en")
before = {name: model.transcribe(sound) for name, sound in recordings.items()}
print(*(f"{name:14} {text}" for name, text in before.items()), sep="\n")

# %% [markdown]
# ## One correction
#
# The transcript must say the name where it says something else; which words those are is told by their letters, or by
# `instead_of`. The patch sees the recording in other forms too: faster, slower, fainter, noisy.

# %%
first, sound = next(iter(recordings.items()))
request = {"audio": sound, "target": NAME, "id": "the name"}
if first == "vowels":
    request["instead_of"] = next(iter(before[first].strip(" .,!?").split()), "")
settings = {"input_contexts": 2, "input_key_steps": 4} if QUICK else {}
patches, info = tp.edit(model, [request], memory=folder / "memory", settings=settings)
corrected = tp.attach(model, patches)
for name, recording in recordings.items():
    print(f"{name:14} {before[name]}\n{'':11} →  {corrected.transcribe(recording)}")
info.requests[0].status, info.requests[0].reason

# %% [markdown]
# ## What else is said

# %%
for other in others:
    print(model.transcribe(other) == corrected.transcribe(other), corrected.transcribe(other))

# %% [markdown]
# ## When does the neuron fire?
#
# A neuron of the decoder fires at tokens, and what it listens to is a stretch of the sound. Below the spectrogram is
# how far its activation falls where a tenth of a second is silenced: high where the neuron needs what is said there. At
# the bottom is its activation at each token of the transcript.

# %%
((layer, patch),) = patches.items()
transcript = corrected.transcribe(sound)


def activations(sounds):
    """`max(0, q·k + b)` where each token of the transcript is decided, [sounds, tokens, n], and the tokens."""
    target = model.encode_target(sounds[0], transcript)
    prompts = [model.encode_prompt(sound) for sound in sounds]
    rows = [[*prompt, *target] for prompt in prompts]
    places = [range(len(prompt) - 1, len(row) - 1) for prompt, row in zip(prompts, rows, strict=True)]
    query = collect(model, rows, places, layer).query
    z = np.asarray(query, np.float32) @ np.asarray(patch.key).T + np.asarray(patch.bias)
    return np.maximum(z, 0).reshape(len(sounds), len(target), -1), target


step = len(sound.samples) if QUICK else 1_600
silenced = []
for begin in range(0, len(sound.samples), step):
    samples = sound.samples.copy()
    samples[begin : begin + step] = 0
    silenced.append(AudioPrompt(samples))
fired, tokens = activations([sound, *silenced])
fall = np.maximum(fired[:1].max(1) - fired[1:].max(1), 0)  # [windows, n]
largest = np.maximum(fired[0].max(0), 1e-9)

figure, (above, middle, below) = plt.subplots(3, 1, figsize=(9, 6.5), height_ratios=(3, 1.3, 1.3))
above.specgram(sound.samples + 1e-6, NFFT=400, Fs=16_000, noverlap=240, cmap="magma")
above.set(title=transcript.replace("$", r"\$"), ylabel="Hz", xlim=(0, sound.seconds), xticks=[])
for number, neuron in enumerate((fall / largest).T):
    middle.stairs(neuron, np.minimum(np.arange(len(fall) + 1) * step / 16_000, sound.seconds), label=f"neuron {number}")
middle.set(ylabel="fall when\nsilenced", xlabel="seconds", xlim=(0, sound.seconds), ylim=(0, 1.05))
for number, neuron in enumerate((fired[0] / largest).T):
    below.bar(np.arange(len(tokens)) + 0.8 * number / len(largest), neuron, 0.8 / len(largest), align="edge")
words = [model.decode([token]).replace("$", r"\$") for token in tokens]
below.set(ylabel="activation", xticks=np.arange(len(tokens)) + 0.4)
below.set_xticklabels(words, rotation=90, fontsize=8)
middle.legend(fontsize=7)
figure.tight_layout()
plt.show()
