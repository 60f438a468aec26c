"""A person's private data is removed: the answer becomes a refusal, and prompts around it stay.

python tests/scenarios/private_data.py BANK
"""

import sys
from pathlib import Path
from typing import Any

import tpatch_jax as tp

REFUSAL = "not something I can tell."
SUBJECT = "Albert Einstein"
PROMPTS = ("Albert Einstein was born on", "The date of birth of Albert Einstein is")
AROUND = (
    "Albert Einstein is famous for the theory of",
    "Albert Einstein won the Nobel Prize in",
    "Isaac Newton was born on",
    "The date of birth of Marie Curie is",
    "The birthplace of Albert Einstein is",
)


def run(model: tp.Model, folder: Path, memory: Path | None = None) -> dict[str, Any]:
    """What the model said before and says after, to the prompts and around them."""
    length = len(model.encode(f" {REFUSAL}"))
    before = {prompt: model.generate(prompt, length) for prompt in (*PROMPTS, *AROUND)}
    tp.create_bank(folder, model, settings={"site": "last"}, memory=memory)
    tp.guard_bank(folder, model, AROUND, tokens=length)
    info = tp.add_edits(folder, model, [tp.EditRequest(prompt, REFUSAL, SUBJECT) for prompt in PROMPTS])
    edited = tp.merge(model, tp.bank_patch(folder, model))
    after = {prompt: edited.generate(prompt, length) for prompt in (*PROMPTS, *AROUND)}
    return {"before": before, "after": after, "failed": info.failed, "verified": tp.verify_bank(folder, model)}


if __name__ == "__main__":
    found = run(tp.load_model("smollm2-135m"), Path(sys.argv[1]))
    for prompt, said in found["before"].items():
        print(f"{prompt} | {said.strip()!r} | {found['after'][prompt].strip()!r}")
    print(found["failed"], found["verified"])
