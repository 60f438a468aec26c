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
# # Correct what a language model says about a picture
#
# A vision-language model puts what a tower makes of a picture in front of a text, as embeddings in the place of
# tokens. Here a small Vision Transformer looks at X-rays, a projection is trained through SmolLM2-135M until that
# answers "The diagnosis is", and a wrong answer is corrected. The tower, the projection and the loop are plain JAX of
# yours: the library runs the language model behind them and patches it. See the page on embeddings.

# %%
# The one installation cell: nothing happens where the package is there already.
import importlib.util

if importlib.util.find_spec("tpatch_jax") is None:
    # %pip install -q "tpatch-jax[demo,images,report]"
    pass

# %% [markdown]
# ## Pictures and a tower
#
# `TPATCH_PICTURES` names an `.npz` as in the notebook on diagnoses, such as the chest X-rays of PneumoniaMNIST. Without
# it pictures are drawn: two dark lungs, and in half of them a bright shadow. The tower is trained once, in a few
# minutes; its folder is the one of that notebook, too.

# %%
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import tpatch_jax as tp
from tpatch_jax.evaluation.image_records import image_rephrasings
from tpatch_jax.images import ImagePrompt
from tpatch_jax.models.image_reader import pixels_of
from tpatch_jax.models.inputs import image_contexts

QUICK = "TPATCH_QUICK" in os.environ  # the tests run this with tiny models and tiny pictures
LABELS = ("normal", "pneumonia")
QUESTION = "The diagnosis is"
SIZE = 8 if QUICK else 28


def draw_chest(rng, ill):
    """A picture [SIZE, SIZE] of bytes."""
    y, x = np.mgrid[:SIZE, :SIZE] / (SIZE - 1)
    picture = 0.55 + 0.1 * rng.standard_normal() + 0.1 * rng.standard_normal() * (x - 0.5)
    middle, tilt = 0.5 + 0.04 * rng.standard_normal(), 0.1 * rng.standard_normal()
    for side in (-1, 1):
        wide, high = 0.13 + 0.02 * rng.standard_normal(), 0.33 + 0.03 * rng.standard_normal()
        across = (x - 0.5 - side * (0.22 + 0.02 * rng.standard_normal()) - tilt * (y - 0.5)) / wide
        picture = picture - 0.35 / (1 + np.exp(6 * (across**2 + ((y - middle) / high) ** 2 - 1)))
    if ill:
        at_y, at_x = middle + 0.15 * rng.standard_normal(), 0.5 + rng.choice([-1, 1]) * 0.22
        size = 0.09 + 0.03 * rng.random()
        shadow = np.exp(-((y - at_y) ** 2 + (x - at_x) ** 2) / (2 * size**2))
        picture = picture + (0.12 + 0.15 * rng.random()) * shadow
    return np.clip(255 * (picture + 0.02 * rng.standard_normal(picture.shape)), 0, 255).astype(np.uint8)


data = Path(os.environ.get("TPATCH_PICTURES", "drawn_chests.npz"))
if not data.exists():
    rng, parts = np.random.default_rng(0), {}
    for part, count in {"train": 1600, "val": 200, "stream": 200}.items():
        labels = rng.integers(0, 2, 16 if QUICK else count)
        parts[f"{part}_images"] = np.stack([draw_chest(rng, label) for label in labels])
        parts[f"{part}_labels"] = labels
    np.savez(data, **parts)
pictures = dict(np.load(data))

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
    tp.finetune("config-xray", data, "models/xray", settings={"from_scratch": True})
tower, model = tp.load_model("models/xray"), tp.load_model("smollm2-135m")


# %% [markdown]
# ## What the tower makes of a picture
#
# Its class token and the mean of each quarter of its patches, before the last feed-forward network: five vectors.


# %%
@jax.jit
def look_at(tower, pixels):
    """The five vectors of each picture, [pictures, 5, width]."""
    query = tower.trace(pixels).query
    quarters = query[:, 1:].reshape(len(query), 4, -1, query.shape[2]).mean(2)
    return jnp.concatenate([query[:, :1], quarters], 1)


def look(images):
    """What the tower makes of pictures, 32 at a time so that one program does for all."""
    rows = np.asarray([tower.encode(ImagePrompt(image)) for image in images], np.int32)
    parts = [rows[first : first + 32] for first in range(0, len(rows), 32)]
    return np.concatenate(
        [np.asarray(look_at(tower, np.resize(part, (32, part.shape[1]))))[: len(part)] for part in parts]
    )


def change(image, count):
    """The picture moved, turned, brighter or darker, and noisy, in so many ways."""
    row = tower.encode(ImagePrompt(image))
    return [pixels_of(tower.config.image, changed) for changed in image_contexts(tower.config.image, row, count)]


# %% [markdown]
# ## A projection, trained through the language model
#
# `model.trace(tokens, embeddings=…)` and `model.resume` are pure functions, so `jax.grad` goes through them to the
# embeddings and on to the projection. The language model stays as it is.

# %%
shown = list(pictures["train_images"][: 8 if QUICK else 1600])
labels = pictures["train_labels"].reshape(-1)[: len(shown)]
seen = np.concatenate([look(shown), look([change(image, 1)[0] for image in shown])])
answers = jnp.asarray([model.encode_target(QUESTION, f" {label}")[0] for label in LABELS])
question = np.asarray(model.encode_prompt(QUESTION), np.int32)
rng, size = np.random.default_rng(0), float(jnp.std(model.params["embed"]["embedding"]))
shape = (5, seen.shape[2], model.config.hidden_size)
projection = {
    "kernel": size / seen.shape[2] ** 0.5 * rng.standard_normal(shape).astype(np.float32),
    "bias": size * rng.standard_normal((shape[0], shape[2])).astype(np.float32),
}


def project(projection, seen):
    """Embeddings for the language model, [pictures, 5, hidden_size]."""
    return jnp.einsum("bnf,nfd->bnd", seen, projection["kernel"]) + projection["bias"]


def loss(projection, model, seen, labels):
    """How unlikely the first token of the right answer is."""
    tokens = jnp.tile(question, (len(seen), 1))
    logits = model.apply(tokens, embeddings=project(projection, seen))[:, -1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, answers[labels]).mean()


steps = 2 if QUICK else 120
transform = optax.adam(optax.cosine_decay_schedule(3e-3, steps))


@jax.jit
def take_step(projection, state, model, seen, labels):
    """One step of Adam."""
    value, slope = jax.value_and_grad(loss)(projection, model, seen, labels)
    update, state = transform.update(slope, state)
    return optax.apply_updates(projection, update), state, value


state, values = transform.init(projection), []
for _ in range(steps):
    chosen = rng.integers(0, len(seen), 12)
    projection, state, value = take_step(projection, state, model, seen[chosen], labels[chosen % len(labels)])
    values.append(float(value))
figure, axes = plt.subplots(figsize=(4, 1.8))
axes.plot(values)
axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
plt.show()


# %% [markdown]
# ## What it says


# %%
def embed(images):
    """Embeddings of pictures, [pictures, 5, hidden_size]."""
    return np.asarray(project(projection, look(images)), np.float32)


most = 2 if QUICK else max(len(model.encode_target(QUESTION, f" {label}")) for label in LABELS)


def ask(model, images):
    """What the language model says about pictures."""
    texts = []
    for first in range(0, len(images), 32):
        part = list(embed(images[first : first + 32]))
        texts += [text.strip() for text in model.generate([QUESTION] * len(part), most, embeddings=part)]
    return texts


stream, truth = list(pictures["stream_images"]), [LABELS[label] for label in pictures["stream_labels"].reshape(-1)]
stream = stream[:3] if QUICK else stream
said = ask(model, stream)
wrong = [number for number, answer in enumerate(said) if answer != truth[number]]
print(f"{len(wrong)} of {len(stream)} answers are wrong")
first = wrong[0]
picture = stream[first]
print(f"picture {first} shows: {truth[first]}; the model says: {said[first]}")

# %% [markdown]
# ## One correction
#
# What shows the same only the tower knows: the picture in other shapes stands in `rephrases`, and `train_on_rephrases`
# has the patch see them. `memory` are pictures on which the patch stays silent, in several shapes each. They tell as
# well which differences mean nothing, which the key then avoids first of all (`nuisance_weight`), so that it need not
# be trained for long and may fire from three tenths of the way between the hardest other input and its own (`split`).

# %%
known = shown[: 4 if QUICK else 600]
shapes = list(zip(*([image, *change(image, 1 if QUICK else 3)] for image in known), strict=True))
np.savez("pictures.npz", embeddings=np.stack([embed(list(shape)) for shape in shapes], 1), prompts=QUESTION)
request = {
    "prompt": QUESTION,
    "embeddings": embed([picture])[0],
    "target": truth[first],
    "rephrases": list(embed(change(picture, 2 if QUICK else 24))),
}
settings = {"site": "last", "train_on_rephrases": True, "nuisance_weight": 0.98}
settings["fit"] = {"split": 0.3, "key_steps": 32}
patches, info = tp.edit(model, [request], memory="pictures.npz", settings=settings)
corrected = tp.attach(model, patches)
print(info.requests[0].status, "-", ask(corrected, [picture])[0])

# %% [markdown]
# ## The same picture, taken again
#
# Moved by one or two pixels, darker and brighter, turned by three degrees, with noise: the patch has never seen these.

# %%
again = [(rule, other.pixels) for rule, several in image_rephrasings(ImagePrompt(picture)).items() for other in several]
before, after = (ask(each, [image for _, image in again]) for each in (model, corrected))
figure, axes = plt.subplots(1, len(again), figsize=(1.2 * len(again), 1.9))
for axis, (rule, image), old, new in zip(axes, again, before, after, strict=True):
    axis.imshow(np.squeeze(image), cmap="gray", vmin=0, vmax=255)
    axis.set_title(f"{rule}\n{old}\n→ {new}", fontsize=7, color="green" if new == truth[first] else "red")
    axis.axis("off")
plt.show()

# %% [markdown]
# ## Other pictures, and text without any

# %%
others = [image for number, image in enumerate(stream) if number != first]
changed = sum(old != new for old, new in zip(ask(model, others), ask(corrected, others), strict=True))
print(f"{changed} of {len(others)} other answers changed")
text = "The capital of France is" if not QUICK else "hen"
print(model.generate(text, 6) == corrected.generate(text, 6))
