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
# # A table against rivals
#
# T-Patcher, ROME, SERAC and fine-tuning on the same few requests, by the protocol `batch`: all edits are made, then
# everything is asked. Eight facts, those of `tpatch demo`, show how the evaluation works and not which method is best;
# `docs/rivals.md` has larger runs. Seconds include compilation and what a method must know of a model beforehand, here
# on two busy CPU cores.
#
# SERAC needs two networks of its own, trained once per model by `tpatch serac-train` (`docs/rivals.md` says on what).
# Where `TPATCH_SERAC` names their folder, SERAC is in the table.

# %%
import json
import os
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt

import tpatch_jax as tp
from tpatch_jax.cli.demo import FACTS
from tpatch_jax.editors.serac.editor import SeracSettings
from tpatch_jax.evaluation.records import read_records
from tpatch_jax.evaluation.runner import evaluate

QUICK = "TPATCH_QUICK" in os.environ  # one method, one record
model = tp.load_model("smollm2-135m")
lines = [json.dumps({name: value for name, value in asdict(fact).items() if value}) for fact in FACTS]
Path("facts.jsonl").write_text("\n".join(lines[-1:] if QUICK else lines))
records = read_records("requests", "facts.jsonl")
methods, settings = ["tpatcher"] if QUICK else ["tpatcher", "rome", "ft"], {}
if "TPATCH_SERAC" in os.environ and not QUICK:
    methods.append("serac")
    settings["serac"] = SeracSettings(os.environ["TPATCH_SERAC"])

# %%
report = evaluate(model, records, methods, "batch", output="reports/rivals", settings=settings)
FIGURES = ("exact", "reliability", "generalization", "locality")
print(f"{'':12}" + "".join(f"{name:>16}" for name in FIGURES) + f"{'seconds':>10}")
for result in report["results"]:
    figures = [result["metrics"].get(name) for name in FIGURES]
    cells = "".join(f"{'' if figure is None else format(figure, '.3f'):>16}" for figure in figures)
    print(f"{result['method']:12}{cells}{result['cost']['total_seconds']:10.1f}")

# %%
figure, axes = plt.subplots(figsize=(6, 3))
for number, result in enumerate(report["results"]):
    heights = [result["metrics"].get(name) or 0 for name in FIGURES]
    axes.bar([place + number * 0.16 for place in range(len(FIGURES))], heights, 0.15, label=result["method"])
axes.set(xticks=[place + 0.3 for place in range(len(FIGURES))], ylim=(0, 1.05), title="batch, all edits active")
axes.set_xticklabels(FIGURES)
axes.legend(ncols=5, fontsize=8, loc="lower center")
plt.show()

# %% [markdown]
# The folder holds the whole report: what was asked, every answer, pictures. A second run with the same options reads
# it instead of editing again.

# %%
sorted(path.name for path in Path("reports/rivals").iterdir())
