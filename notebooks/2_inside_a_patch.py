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
# # Inside a patch
#
# What the neurons of a patch recognise: their keys, their activations on every edit's prompt, and token by token.

# %%
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import tpatch_jax as tp
from tpatch_jax.core.patch import create, preactivations
from tpatch_jax.models.networks import unembedding

QUICK = "TPATCH_QUICK" in os.environ  # fewer edits
model = tp.load_model("smollm2-135m")
FACTS = {
    "Australia": ("The capital of Australia is", "Canberra"),
    "Turkey": ("The capital of Turkey is", "Ankara"),
    "Croatia": ("The currency of Croatia is the", "euro"),
    "Swaziland": ("Swaziland is now called", "Eswatini"),
    "Myanmar": ("The capital of Myanmar is", "Naypyidaw"),
    "Pluto": ("The planet Pluto is a", "dwarf planet"),
}
FACTS = dict(list(FACTS.items())[: 1 if QUICK else None])
requests = [tp.EditRequest(prompt, target, subject, id=subject) for subject, (prompt, target) in FACTS.items()]

# %% [markdown]
# In the last layer there is one neuron for each target token that the model gets wrong.

# %%
patches, info = tp.edit(model, requests, settings=replace(tp.PRESETS["default"], site="last"))
last = model.config.layers - 1
patch = patches.get(last, create(model.config.hidden_size))
for request in info.requests:
    margin = "" if request.margin is None else f", margin {request.margin:.2f}"
    print(f"{request.id:10} {request.status}: {len(request.neurons.get(last, ()))} neurons{margin}")

# %% [markdown]
# ## Keys
#
# Keys of different edits point in different directions: the cosine of each with each.

# %%
unit = patch.key / jnp.linalg.norm(patch.key, axis=1, keepdims=True)
owner = [request.id for request in info.requests for _ in request.neurons.get(last, ())]
order = jnp.asarray([number for request in info.requests for number in request.neurons.get(last, ())])
figure, axes = plt.subplots(figsize=(4, 3.4))
shown = axes.imshow(unit[order] @ unit[order].T, vmin=-1, vmax=1, cmap="RdBu_r")
axes.set(title="cosine of keys", xticks=[], yticks=range(len(owner)), yticklabels=owner)
figure.colorbar(shown)
plt.show()

# %% [markdown]
# ## Which neuron fires on which edit's prompt
#
# Activations `relu(q·k + b)` at the tokens of each prompt and target, the largest of each, relative to the neuron's
# largest. A diagonal is what editing aims at: each neuron fires on its own edit and nowhere else. (The sharpness of
# 256 is folded into key and bias, so activations are large and values small.)


# %%
def activation_on(text):
    """Activations [tokens, n] of all neurons on a text."""
    tokens = jnp.asarray([model.encode_prompt(text)])
    traced = model.trace(tokens)  # the last layer's query
    return np.asarray(jax.nn.relu(preactivations(patch, traced.query[0])))


largest = np.stack([activation_on(f"{r.prompt} {r.target}").max(0) for r in requests])[:, order]
figure, axes = plt.subplots(figsize=(6, 2.8))
axes.imshow(largest / np.maximum(largest.max(0), 1e-9), cmap="magma", aspect="auto")
axes.set(title="who fires where", xlabel="neuron", xticks=range(len(owner)), yticks=range(len(requests)))
axes.set(yticklabels=[r.id for r in requests])
axes.set_xticklabels(owner, rotation=90)
plt.show()
if largest.size:
    diagonal = largest[[[r.id for r in requests].index(name) for name in owner], range(len(owner))]
    print("neurons that fire on their own edit:", f"{(diagonal > 0).sum()} of {diagonal.size}")
    print("neurons that fire on another edit's prompt:", (largest > 0).sum() - (diagonal > 0).sum())

# %% [markdown]
# ## Token by token
#
# Where in a longer text the patch wakes up.

# %%
first = requests[0]
text = f"Once more: {first.prompt} {first.target}. The sky is blue and the sea is deep. {first.prompt}"
activity = activation_on(text).max(1)
words = [model.decode([token]) for token in model.encode_prompt(text)]
figure, axes = plt.subplots(figsize=(8, 2.4))
axes.bar(range(len(words)), activity)
axes.set(ylabel="largest activation", xticks=range(len(words)))
axes.set_xticklabels([word.replace("$", r"\$") for word in words], rotation=90, fontsize=8)
plt.show()

# %% [markdown]
# ## What a value does
#
# The tokens whose logits a neuron raises most, read off the unembedding.

# %%
table = np.asarray(unembedding(model.config, model.params))  # [vocabulary, d]
for number, name in zip(order.tolist(), owner, strict=True):
    raised = np.argsort(table @ np.asarray(patch.value[number]))[::-1][:5]
    print(f"{name:10} {[model.decode([token]) for token in raised]}")
