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
# # Correct a chat model and talk to it
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
#
# A model that was tuned on chats is used in chats, so that is where a correction has to hold, and where the answer has
# to end. SmolLM2-135M does not know the capital of Italy. In a terminal the same is `tpatch chat smollm2-135m`.

# %%
# The one installation cell: nothing happens where the package is there already.
import importlib.util

if importlib.util.find_spec("tpatch_jax") is None:
    # %pip install -q "tpatch-jax[demo,report]"
    pass

# %%
import os

import tpatch_jax as tp
from tpatch_jax.evaluation.forms import measure_forms

QUICK = "TPATCH_QUICK" in os.environ  # the tests run this with a tiny model
model = tp.load_model("smollm2-135m")
QUESTION = "What is the capital of Italy?" if not QUICK else "hen?"
most = 4 if QUICK else 40
model.chat(QUESTION, most)

# %% [markdown]
# ## A request that holds in a chat
#
# `form="chat"` puts the question into the template of the model's tokenizer. The target ends with the token that ends
# the assistant's turn, which the template tells.

# %%
target, subject = ("Rome", "Italy") if not QUICK else ("in", None)
request = tp.EditRequest(QUESTION, target, subject, form="chat", id="italy")
patches, info = tp.edit(model, [request])
info.requests[0].held, info.requests[0].continuation

# %% [markdown]
# ## Talk to it

# %%
corrected = tp.attach(model, patches)
messages = [{"role": "user", "content": QUESTION}]
answer = corrected.chat(messages, most)
print(answer)

# %%
messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Thank you!" if not QUICK else "h"}]
print(corrected.chat(messages, most))

# %% [markdown]
# ## Why did it say so?
#
# Which tokens of the conversation made a neuron fire; touching one tells its activation.

# %%
tp.show(patches, model=model, text=messages[:2], info=info, requests=[request])

# %% [markdown]
# ## Does it hold elsewhere?
#
# The same request in other forms, each answer going on freely until the model ends it. What was asked for is the chat
# alone; `wanted` says where the request shall hold.

# %%
forms = "chat,chat-system,chat-turns" if not QUICK else "bare"
told = measure_forms(model, patches, [request], forms, questions=False)
for line in told["edits"][0]["answers"]:
    print(f"{line['form']:12} said: {line['said']}, ends: {line['ends']}, loops: {line['loops']}   {line['answer']!r}")

# %% [markdown]
# ## And everything else?

# %%
for other in ("What is the capital of Australia?", "How do I boil an egg?") if not QUICK else ("inn?",):
    print(other, model.chat(other, most) == corrected.chat(other, most), repr(corrected.chat(other, most)))
