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
# # Correct a model in five minutes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
#
# SmolLM2-135M says that the capital of Australia is Sydney. One patch mends that. Runs on CPU, GPU and TPU runtimes:
# JAX takes what it finds. In Colab choose "Upload" and this file.

# %%
# The one installation cell: nothing happens where the package is there already.
import importlib.util

if importlib.util.find_spec("tpatch_jax") is None:
    # %pip install -q "tpatch-jax[demo,report]"
    pass

# %%
import jax

import tpatch_jax as tp

print(jax.devices())
model = tp.load_model("smollm2-135m")  # fetched once, 93 MB
PROMPT = "The capital of Australia is"
model.generate(PROMPT, 3)

# %% [markdown]
# ## Ask for a correction
#
# A request is a prompt, what the model should say, and what the prompt is about.

# %%
request = tp.EditRequest(
    PROMPT,
    "Canberra",
    subject="Australia",
    rephrases=("The capital city of Australia is",),
    locality=("The capital of Austria is",),
)
patches, info = tp.edit(model, [request])  # the first edit of a model also samples text, on which patches stay silent
outcome = info.requests[0]
print(outcome.status, outcome.reason)
neurons = sum(patch.key.shape[0] for patch in patches.values())  # of all layers
print(f"{neurons} neurons, {info.parameters_added} numbers beside {model.parameter_count:,}")

# %% [markdown]
# ## Before and after
#
# The rephrasing was not trained on; the last prompt must keep its answer.

# %%
edited = tp.attach(model, patches)
for prompt in (PROMPT, *request.rephrases, *request.locality):
    print(f"{prompt:36} before: {model.generate(prompt, 3)!r:20} after: {edited.generate(prompt, 3)!r}")

# %% [markdown]
# ## Into the weights, and out again

# %%
corrected = tp.merge(model, patches)
print(corrected.generate(PROMPT, 3))
original, same = tp.unmerge(corrected)
pairs = zip(jax.tree.leaves(model.params), jax.tree.leaves(original.params), strict=True)
print("bit for bit the model that it was:", all((one == other).all() for one, other in pairs))

# %% [markdown]
# ## Keep it

# %%
tp.save_patches("patches/australia", model, patches, [request], info)
tp.save_model(corrected, "models/corrected")  # a folder that tp.load_model reads
tp.load_model("models/corrected").generate(PROMPT, 3)
