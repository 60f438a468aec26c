"""An office holder who changes every month: each answer supersedes the last, and undo goes back.

python tests/scenarios/office_holder.py BANK
"""

import sys
from pathlib import Path
from typing import Any

import tpatch_jax as tp
from tpatch_jax.bank.state import states

PROMPT, SUBJECT = "The mayor of Springfield is", "Springfield"
HOLDERS = (
    "Ada Byrne", "Ben Castillo", "Clara Dunn", "David Ekström", "Eva Fischer", "Frank Gallo",
    "Grace Hart", "Henry Ito", "Irene Jansen", "Jack Keller", "Karen Lund", "Louis Moreau",
)  # fmt: skip
AROUND = ("The mayor of Chicago is", "The capital of France is", "Springfield is a city in the state of")


def run(model: tp.Model, folder: Path, months: int = 12, memory: Path | None = None) -> list[dict[str, Any]]:
    """Add one holder a month; what the model says after each, and after the last is taken back."""
    tp.create_bank(folder, model, settings={"site": "last"}, memory=memory)
    tp.guard_bank(folder, model, AROUND, tokens=2)
    told = []
    for month, name in enumerate(HOLDERS[:months], 1):
        info = tp.add_edits(folder, model, [tp.EditRequest(PROMPT, name, SUBJECT, id=f"month-{month}")])
        said = tp.merge(model, tp.bank_patch(folder, model)).generate(PROMPT, len(model.encode(f" {name}")))
        verified = tp.verify_bank(folder, model)
        told.append(
            {
                "month": month,
                "holder": name,
                "said": said.strip(),
                "superseded": [old for old, _ in info.superseded],
                "active": verified.checked,
                "broken": list(verified.broken),
                "guards_broken": list(verified.guards_broken),
            }
        )
    # the last appointment was a mistake: the one before is back, and nothing else changed
    before = tp.remove_edits(folder, [f"month-{months}"])
    name = HOLDERS[months - 2]
    said = tp.merge(model, tp.bank_patch(folder, model)).generate(PROMPT, len(model.encode(f" {name}")))
    told.append({"month": "undone", "holder": name, "said": said.strip(), "changed": before.states})
    told[-1]["states"] = states(tp.open_bank(folder))
    return told


if __name__ == "__main__":
    for line in run(tp.load_model("smollm2-135m"), Path(sys.argv[1])):
        print(line)
