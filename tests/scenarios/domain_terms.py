"""Fifty terms of a trade are taught, and one is withdrawn.

python tests/scenarios/domain_terms.py BANK
"""

import sys
from pathlib import Path
from typing import Any

import tpatch_jax as tp

_TERMS = (
    "arbex brindel corvat dapplin eskarn fernoll gritch hollux intrel jarvick kestow lombar mintral norvex oskend "
    "pellard quorrin restick solvane tarmick umbrel vortin wexler xandric yarrol zelpin albrek bostern cravid dunnal "
    "elverin fostrik gamlin harnox ilvert joskin krendal lurvic morbrel nestrin ogvar prandel quistal rombeck "
    "strindel tulvane ursken vandril whistrel yolmar"
)
_MEANINGS = (
    "valve hinge bolt spring lever pump gear wheel chain screw nail hammer saw drill file clamp rope cable pipe tank "
    "filter fan motor switch fuse lamp lens mirror prism crystal magnet battery coil wire plug socket knob dial gauge "
    "meter scale balance weight anchor hook ladder shelf drawer lock key"
)
TERMS, MEANINGS = _TERMS.split(), _MEANINGS.split()


def run(model: tp.Model, folder: Path, terms: int = 50, memory: Path | None = None) -> dict[str, Any]:
    """How many terms are said, before a term is withdrawn and after."""
    requests = [
        tp.EditRequest(f"In our workshop, {term} is another word for a", meaning, term, id=term)
        for term, meaning in zip(TERMS[:terms], MEANINGS, strict=False)
    ]
    gone = requests[terms // 2]
    tp.create_bank(folder, model, settings={"site": "last"}, memory=memory)
    info = tp.add_edits(folder, model, requests)
    taught = tp.verify_bank(folder, model)
    removed = tp.remove_edits(folder, [str(gone.id)], model)
    left = tp.verify_bank(folder, model)
    edited = tp.merge(model, tp.bank_patch(folder, model))
    return {
        "added": len(info.added),
        "failed": info.failed,
        "taught": taught,
        "withdrawn": {
            "prompt": gone.prompt,
            "meaning": gone.target,
            "before": model.generate(gone.prompt, 3),
            "after": edited.generate(gone.prompt, 3),
            "refitted": removed.refitted,
        },
        "left": left,
    }


if __name__ == "__main__":
    for name, value in run(tp.load_model("smollm2-135m"), Path(sys.argv[1])).items():
        print(name, value)
