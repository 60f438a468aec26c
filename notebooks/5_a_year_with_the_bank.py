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
# # A year with the bank
#
# The mayor of Springfield changes every month. Each answer supersedes the last; three other answers are guarded; the
# last appointment was a mistake and is taken back.

# %%
import os
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt

import tpatch_jax as tp

QUICK = "TPATCH_QUICK" in os.environ  # two months
PROMPT, SUBJECT = "The mayor of Springfield is", "Springfield"
NAMES = "Ada Byrne,Ben Castillo,Clara Dunn,David Ekström,Eva Fischer,Frank Gallo,Grace Hart,Henry Ito,Irene Jansen"
HOLDERS = ["Ada", "Ben"] if QUICK else [*NAMES.split(","), "Jack Keller", "Karen Lund", "Louis Moreau"]
AROUND = ("The mayor of Chicago is", "The capital of France is", "Springfield is a city in the state of")
BANK = "banks/mayors"

model = tp.load_model("smollm2-135m")
tp.create_bank(BANK, model, settings={"site": "last"})
tp.guard_bank(BANK, model, AROUND, tokens=2)


# %%
@dataclass
class Month:
    number: int
    wanted: str
    said: str
    bytes: int


def said(name):
    """What the model says now, as many tokens as the name has."""
    corrected = tp.merge(model, tp.bank_patch(BANK, model))
    return corrected.generate(PROMPT, len(model.encode(f" {name}"))).strip()


months = []
for number, name in enumerate(HOLDERS, 1):
    info = tp.add_edits(BANK, model, [tp.EditRequest(PROMPT, name, SUBJECT, id=f"month-{number}")])
    verified = tp.verify_bank(BANK, model)
    size = sum(path.stat().st_size for path in Path(BANK).rglob("*") if path.is_file())
    months.append(Month(number, name, said(name), size))
    print(f"{number:2} {name:14} says {months[-1].said!r:18} superseded {[old for old, _ in info.superseded]}", end=" ")
    print(f"broken {verified.broken}, guards broken {verified.guards_broken}")

# %% [markdown]
# ## What is in the bank

# %%
for edit in tp.open_bank(BANK).edits:
    print(f"{edit.id:10} {edit.request.target}")

# %%
figure, axes = plt.subplots(figsize=(5, 2.4))
axes.plot([month.number for month in months], [month.bytes / 1e6 for month in months], marker="o")
axes.set(xlabel="month", ylabel="bank on disk, MB", ylim=0)
plt.show()

# %% [markdown]
# ## Undo
#
# The one before is back, bit for bit as it was.

# %%
change = tp.remove_edits(BANK, [f"month-{len(HOLDERS)}"])
print(change.states)
print(PROMPT, said(HOLDERS[-2]))

# %%
for prompt in AROUND:
    corrected = tp.merge(model, tp.bank_patch(BANK, model))
    print(f"{prompt:40} {model.generate(prompt, 2)!r:12} {corrected.generate(prompt, 2)!r}")
