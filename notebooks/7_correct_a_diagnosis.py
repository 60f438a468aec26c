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
# # Correct a diagnosis
#
# A classifier of X-rays is wrong about a picture. The patch corrects that picture, also when it is taken again a little
# to the side or a little brighter, and leaves all others as they are. In a terminal the same is `tpatch finetune`,
# `tpatch edit` and `tpatch classify`; see the page on images.

# %%
# The one installation cell: nothing happens where the package is there already.
import importlib.util

if importlib.util.find_spec("tpatch_jax") is None:
    # %pip install -q "tpatch-jax[images,report]"
    pass

# %% [markdown]
# ## Pictures
#
# `TPATCH_PICTURES` names an `.npz` with `train_images`, `train_labels`, `val_…` and `stream_…`, such as the chest
# X-rays of PneumoniaMNIST, 28 by 28 pixels. Without it pictures are drawn that look a little like them: two dark lungs,
# and in half of them a bright shadow.

# %%
import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import tpatch_jax as tp
from tpatch_jax.evaluation.image_records import image_rephrasings
from tpatch_jax.images import ImagePrompt

QUICK = "TPATCH_QUICK" in os.environ  # the tests run this with a tiny model and tiny pictures
LABELS = ("normal", "pneumonia")
SIZE = 8 if QUICK else 28


def draw_chest(rng, ill):
    """A picture [SIZE, SIZE] of bytes."""
    y, x = np.mgrid[:SIZE, :SIZE] / (SIZE - 1)
    shade = 0.55 + 0.1 * rng.standard_normal() + 0.1 * rng.standard_normal() * (x - 0.5)
    picture = np.full((SIZE, SIZE), shade)
    middle_y, tilt = 0.5 + 0.04 * rng.standard_normal(), 0.1 * rng.standard_normal()
    for side in (-1, 1):
        middle_x = 0.5 + side * (0.22 + 0.02 * rng.standard_normal()) + tilt * (y - 0.5)
        wide, high = 0.13 + 0.02 * rng.standard_normal(), 0.33 + 0.03 * rng.standard_normal()
        inside = ((x - middle_x) / wide) ** 2 + ((y - middle_y) / high) ** 2
        picture -= 0.35 / (1 + np.exp(6 * (inside - 1)))
    if ill:
        side = rng.choice([-1, 1])
        at_y, at_x = middle_y + 0.15 * rng.standard_normal(), 0.5 + side * (0.22 + 0.03 * rng.standard_normal())
        size = 0.09 + 0.03 * rng.random()
        picture += (0.12 + 0.15 * rng.random()) * np.exp(-((y - at_y) ** 2 + (x - at_x) ** 2) / (2 * size**2))
    picture += 0.02 * rng.standard_normal(picture.shape)
    return np.clip(255 * picture, 0, 255).astype(np.uint8)


data = Path(os.environ.get("TPATCH_PICTURES", "drawn_chests.npz"))
if not data.exists():
    rng, parts = np.random.default_rng(0), {}
    for part, count in {"train": 1600, "val": 200, "stream": 200}.items():
        labels = rng.integers(0, 2, 16 if QUICK else count)
        parts[f"{part}_images"] = np.stack([draw_chest(rng, label) for label in labels])
        parts[f"{part}_labels"] = labels
    np.savez(data, **parts)
pictures = dict(np.load(data))
figure, axes = plt.subplots(1, 8, figsize=(9, 1.6))
for axis, picture, label in zip(axes, pictures["train_images"], pictures["train_labels"].reshape(-1), strict=False):
    axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
    axis.set_title(LABELS[label], fontsize=8)
    axis.axis("off")
plt.show()

# %% [markdown]
# ## A small Vision Transformer
#
# Trained once, in a few minutes; its folder is read the next time.

# %%
CONFIG = {
    "architectures": ["ViTForImageClassification"],
    "model_type": "vit",
    "image_size": 28,
    "patch_size": 7,
    "num_channels": 1,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "initializer_range": 0.05,
    "id2label": dict(enumerate(LABELS)),
}
if not QUICK and not Path("models/xray").exists():
    Path("config-xray").mkdir(exist_ok=True)
    Path("config-xray/config.json").write_text(json.dumps(CONFIG))
    told = tp.finetune("config-xray", data, "models/xray", settings={"from_scratch": True})
    print(f"right on {told.validation_accuracy:.3f} of the pictures that were held back")
model = tp.load_model("models/xray")

# %% [markdown]
# ## What it gets wrong

# %%
stream, truth = pictures["stream_images"], [LABELS[label] for label in pictures["stream_labels"].reshape(-1)]
said = model.classify(list(stream))
wrong = [number for number, (label, true) in enumerate(zip(said, truth, strict=True)) if label != true]
if QUICK:
    truth[0], wrong = next(label for label in LABELS if label != said[0]), [0]
print(f"{len(wrong)} of {len(stream)} diagnoses are wrong")
first = wrong[0]
picture = stream[first]
print(f"picture {first} shows: {truth[first]}; the model says: {said[first]}")

# %% [markdown]
# ## One correction
#
# The request is the picture and its true label. `memory` are the pictures on which the patch stays silent.

# %%
settings = {"input_contexts": 2, "input_key_steps": 4} if QUICK else {}
request = {"image": picture, "target": truth[first], "id": "first"}
patches, info = tp.edit(model, [request], memory=data, settings=settings)
corrected = tp.attach(model, patches)
info.requests[0].status, corrected.classify([picture])

# %% [markdown]
# ## Which part of the picture makes the neuron fire
#
# Each patch of the picture is covered in turn; where that lets the neuron's activation fall, the picture is coloured.

# %%
tp.show(patches, model=model, image=picture)

# %% [markdown]
# ## The same picture, taken again
#
# Moved by one or two pixels, darker and brighter, turned by three degrees, with noise. The patch has seen other changes
# of the same kinds, never these.

# %%
again = image_rephrasings(ImagePrompt(picture))
shown = [(rule, changed) for rule, several in again.items() for changed in several]
before, after = (each.classify([changed for _, changed in shown]) for each in (model, corrected))
figure, axes = plt.subplots(1, len(shown), figsize=(1.2 * len(shown), 1.9))
for axis, (rule, changed), old, new in zip(axes, shown, before, after, strict=True):
    axis.imshow(changed.pixels, cmap="gray", vmin=0, vmax=255)
    axis.set_title(f"{rule}\n{old}\n→ {new}", fontsize=7, color="green" if new == truth[first] else "red")
    axis.axis("off")
plt.show()

# %% [markdown]
# ## All other pictures

# %%
others = [*pictures["val_images"], *(stream[number] for number in range(len(stream)) if number not in wrong)]
now = corrected.classify(others)
changed = sum(old != new for old, new in zip(model.classify(others), now, strict=True))
print(f"{changed} of {len(others)} other diagnoses changed")

# %% [markdown]
# ## All wrong diagnoses
#
# Each gets a neuron, fitted together. How many are right then, as they are and changed in each of the ways?

# %%
requests = [{"image": stream[number], "target": truth[number], "id": f"picture {number}"} for number in wrong]
patches, info = tp.edit(model, requests, memory=data, settings=settings)
corrected = tp.attach(model, patches)
print(f"{sum(result.held for result in info.requests)} of {len(requests)} hold")
forms = {"as it is": [(stream[number], truth[number]) for number in wrong]}
for number in wrong:
    for rule, several in image_rephrasings(ImagePrompt(stream[number])).items():
        forms.setdefault(rule, []).extend((changed, truth[number]) for changed in several)


def share_right(model, shown):
    """How many of these pictures get their label."""
    said = model.classify([picture for picture, _ in shown])
    return np.mean([label == true for label, (_, true) in zip(said, shown, strict=True)])


figure, axes = plt.subplots(figsize=(5, 2.4))
for offset, (name, each) in zip((-0.2, 0.2), {"before": model, "after": corrected}.items(), strict=True):
    axes.bar(np.arange(len(forms)) + offset, [share_right(each, shown) for shown in forms.values()], 0.4, label=name)
axes.set(title="wrong diagnoses that are right", xticks=range(len(forms)), xticklabels=list(forms), ylim=(0, 1.05))
axes.legend()
plt.show()
changed = sum(old != new for old, new in zip(model.classify(others), corrected.classify(others), strict=True))
print(f"{changed} of {len(others)} other diagnoses changed")
