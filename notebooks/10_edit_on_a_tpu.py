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
# # Edit on a TPU
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
#
# From an empty runtime to a corrected model on disk: in Colab choose "Upload" and this file, take a TPU runtime
# (Runtime, Change runtime type), say in the next cell where the repository is, and run all cells. One chip, eight, or
# none, which is a CPU or a GPU, make no difference but to the time. The outputs below are those of a CPU with much
# other work, so its seconds are many times what they should be.

# %%
REPOSITORY = ""  # of this library: an address that git can clone, or a folder; nothing where it is installed already
MODEL = "smollm2-135m"  # a name of `tpatch models`, a folder, or a hub id
BILLIONS = 0.135  # its parameters: they decide over how many chips its weights are split
DTYPE = "float32"  # "bfloat16" for models of billions of parameters

# %% [markdown]
# ## Install
#
# Before anything imports JAX, for on a TPU the library needs a recent one, and `libtpu` with it.

# %%
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("tpatch_jax") is None:
    assert REPOSITORY, "write into REPOSITORY, above, where the library's repository is"
    tpu = any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0")))
    extras = "[demo,tpu]" if tpu else "[demo]"
    what = REPOSITORY + extras if os.path.isdir(REPOSITORY) else f"tpatch-jax{extras} @ git+{REPOSITORY}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", what], check=True)

# %% [markdown]
# ## The mesh
#
# Weights that take more than two fifths of a chip's memory are split along `"model"`, over as few chips as it takes;
# what is edited is split over the others, along `"data"`. Eight chips of 16 GiB are 8 x 1 for this model and 2 x 4 for
# one of eight billion parameters in bfloat16.

# %%
import jax

import tpatch_jax as tp

devices = jax.devices()
room = (devices[0].memory_stats() or {}).get("bytes_limit", 16 * 2**30)
weights = BILLIONS * 1e9 * (2 if DTYPE == "bfloat16" else 4)
parts = 1
while weights / parts > 0.4 * room and len(devices) % (2 * parts) == 0:
    parts *= 2
mesh = jax.make_mesh((len(devices) // parts, parts), ("data", "model"))
print(len(devices), devices[0].device_kind, dict(mesh.shape))

# %%
QUICK = "TPATCH_QUICK" in os.environ  # the tests run this with a tiny model
model = tp.load_model(MODEL, mesh=mesh) if DTYPE == "float32" else tp.load_model(MODEL, mesh=mesh, dtype=DTYPE)
print(f"{model.parameter_count:,} parameters")

# %% [markdown]
# ## Edit
#
# A request is a prompt, what shall be said, the subject, rephrasings that shall follow and unrelated prompts that shall
# stay. The first call compiles its programs; later ones with other requests find them compiled.

# %%
requests = [
    tp.EditRequest(
        "The currency of Croatia is the",
        "euro",
        "Croatia",
        rephrases=("People in Croatia pay with the",),
        locality=("The currency of Denmark is the",),
    ),
    tp.EditRequest(
        "The capital of Australia is",
        "Canberra",
        "Australia",
        rephrases=("The capital city of Australia is",),
        locality=("The capital of Austria is",),
    ),
]
if QUICK:
    requests = [tp.EditRequest("the hen", "in", locality=("the inn",))]
patches, info = tp.edit(model, requests)
for request in info.requests:
    print(f"{request.id}: {request.status}, {request.site}, {request.steps} steps")
print(f"{info.seconds:.1f} s, {info.parameters_added:,} numbers added")

# %%
again, warm = tp.edit(model, requests)
print(f"compiled already: {warm.seconds:.1f} s for {len(requests)} edits")

# %% [markdown]
# ## Evaluate
#
# Shares: of requests whose whole target comes out of greedy decoding (`exact`), of rephrasings that follow, and of
# unrelated prompts whose next token stays (`locality`).

# %%
from tpatch_jax.evaluation.measure import measure

for name, figure in measure(model, patches, requests).items():
    if figure is not None:
        print(f"{name:24}{figure:.3f}")

# %%
corrected = tp.attach(model, patches)
most = 2 if QUICK else 8
for request in requests:
    for prompt in (request.prompt, *request.rephrases, *request.locality):
        print(
            f"{prompt}\n    before: {model.generate(prompt, most)!r}\n    now:    {corrected.generate(prompt, most)!r}"
        )

# %% [markdown]
# ## Save
#
# The patches are some ten kilobytes an edit, and belong to this model; the merged model is a folder of its own, which
# `tp.load_model` reads. `tp.export_model` writes one for stock transformers.

# %%
tp.save_patches("patches", model, patches, requests, info)
tp.save_model(tp.merge(model, patches), "corrected")
restored = tp.attach(model, tp.load_patches("patches", model))
prompt = requests[0].prompt
print(restored.generate(prompt, most) == corrected.generate(prompt, most))
for folder in ("patches", "corrected"):
    size = sum(os.path.getsize(os.path.join(folder, file)) for file in os.listdir(folder))
    print(f"{folder:10} {size / 1e6:10.2f} MB")
