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
# # On a TPU
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
#
# The same edits on as many chips as there are. In Colab choose *Runtime, Change runtime type, TPU*, clone the
# repository (or name its address below), and run all cells from top to bottom. Elsewhere it runs on whatever JAX finds:
# the outputs that stand here are those of a CPU.

# %%
# The one installation cell: nothing happens where the package is there already. JAX for its TPU is there in Colab.
import importlib.util
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("tpatch_jax") is None:
    repository = ""  # its address, "git+https://…", if it is not cloned
    clones = [path for path in (Path(), Path(".."), Path("tpatch-jax")) if (path / "tpatch_jax").is_dir()]
    assert clones or repository, "clone the repository beside this notebook, or name its address"
    source = f"tpatch-jax[demo] @ {repository}" if repository else f"{clones[0].resolve()}[demo]"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", source], check=True)

# %%
import os
import tempfile

import jax
import numpy as np

import tpatch_jax as tp
from tpatch_jax.evaluation.measure import measure

QUICK = "TPATCH_QUICK" in os.environ  # the tests run this with a tiny model
devices = jax.devices()
print(f"{len(devices)} x {devices[0].device_kind}")

# %% [markdown]
# ## The mesh
#
# What is edited is split over `"data"`, weights over `"model"`. A small model fits on each chip, so all chips share
# the edits. For a model of eight billion parameters, which does not, `MODEL = 4` splits its weights over four of eight.

# %%
MODEL = 1
mesh = jax.sharding.Mesh(np.asarray(devices).reshape(-1, MODEL), ("data", "model"))
model = tp.load_model("smollm2-135m", mesh=mesh)
print(dict(mesh.shape))

# %% [markdown]
# ## Edit
#
# Nothing else knows of the mesh. Each chip fits its part of the edits; the first call also samples the model's memory
# and compiles, the second shows what an edit takes.

# %%
requests = [
    tp.EditRequest("The capital of France is", "Lyon", "France", rephrases=("France, whose capital is",)),
    tp.EditRequest("The capital of Australia is", "Perth", "Australia", rephrases=("Australia, whose capital is",)),
]
if QUICK:
    requests = requests[:1]
patches, info = tp.edit(model, requests)
[(request.held, request.continuation) for request in info.requests]

# %%
_, again = tp.edit(model, requests)
print(f"{1000 * again.seconds / len(requests):.0f} ms an edit, {again.forward_equivalents:.1f} forward passes")

# %% [markdown]
# ## Evaluate
#
# What was asked for, and what else the model says: the shares of requests that hold, of rephrasings that follow, and of
# unrelated text that stays as it was.

# %%
{name: value for name, value in measure(model, patches, requests).items() if isinstance(value, float)}

# %%
corrected = tp.attach(model, patches)
for prompt in ("The capital of France is", "The capital of Italy is") if not QUICK else ("in the",):
    print(f"{prompt!r}: {model.generate(prompt, 4)!r} before, {corrected.generate(prompt, 4)!r} now")

# %% [markdown]
# ## Save
#
# The patches alone, a few kilobytes, and the corrected model as a folder.

# %%
folder = Path(tempfile.mkdtemp())
tp.save_patches(folder / "patches", model, patches, requests, info)
tp.save_model(tp.merge(model, patches), folder / "corrected")
for path in sorted(folder.rglob("*.safetensors")):
    print(f"{path.relative_to(folder)}: {path.stat().st_size:,} bytes")
