"""What a bank's model was after each part of its journal: which edits hold, and what it does to running text.

python -m tpatch_jax.evaluation.bank_history BANK --text FILE -o history.json
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tpatch_jax.bank.assembly import Store, assemble
from tpatch_jax.bank.creating import load_banked_model
from tpatch_jax.bank.engine import TPATCHER, create_engine, method_of
from tpatch_jax.bank.inspection import inspect_bank, open_bank
from tpatch_jax.bank.state import active, replay
from tpatch_jax.bank.tpatcher_engine import patches_of
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.running_text import read_windows, text_figures
from tpatch_jax.evaluation.scoring import base_scores, patched_scores
from tpatch_jax.models.model import Model
from tpatch_jax.storage.cache import cache_folder
from tpatch_jax.storage.files import write_text

__all__ = ["bank_history"]


def bank_history(
    folder: str | Path, model: Model, text: str | Path, *, every: int = 5, tokens: int = 16384
) -> dict[str, Any]:
    """Look at a bank as it was after every so many lines of its journal, and now.

    Args:
        folder: the bank.
        model: the model that it is for.
        text: a UTF-8 text file.
        every: so many lines apart.
        tokens: at most so many tokens of the text.

    Returns:
        ``unedited``: figures on the text; ``points``: of each line looked at ``line, active, er`` (the share of active
        edits that come out), and the figures on the text; ``batches``: of each addition how many edits were active
        after it and its seconds; ``slope``: seconds that a batch takes longer for each edit that is there already, by
        least squares over all batches but the first, which compiles, with the ``intercept``.

    Raises:
        TPatchError: the bank is damaged, or the text cannot be read.
    """
    bank, lines = open_bank(folder), inspect_bank(Path(folder)).lines
    if method_of(bank.manifest) != TPATCHER:
        raise TPatchError(f"{folder} holds edits of {method_of(bank.manifest)!r}; a history needs those of tpatcher")
    store, engine = Store.new(), create_engine(model, bank.manifest, cache=cache_folder())
    base = base_scores(model, read_windows(model, text, tokens), cache=cache_folder())
    points, batches, count = [], [], len(lines)
    for number in range(1, count + 1):
        then = replay(bank.folder, bank.manifest, [(line.record, line.check) for line in lines[:number]])
        edits, record = active(then), lines[number - 1].record
        if record["op"] == "add":
            added = len(record["edits"])
            batches.append({"added": added, "active": len(edits), "seconds": record["seconds"]})
        if number % every and number != count:
            continue
        held = assemble(then, edits, store)
        figures = text_figures(base, patched_scores(model, base, patches_of(held.neurons, model.layer(None))))
        er = 1 - len(engine.verify(held)) / len(edits) if edits else None
        points.append({"line": number, "active": len(edits), "er": er, **figures})
        sys.stderr.write(f"{json.dumps(points[-1])}\n")
    result: dict[str, Any] = {"unedited": text_figures(base, base.outcome, False), "points": points, "batches": batches}
    if len(batches) > 3:
        there = [batch["active"] - batch["added"] for batch in batches[1:]]
        slope, intercept = np.polyfit(there, [batch["seconds"] for batch in batches[1:]], 1)
        result |= {"slope": float(slope), "intercept": float(intercept)}
    return result


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="What a bank's model was after each part of its journal.")
    parser.add_argument("bank", help="the bank's folder")
    parser.add_argument("--text", required=True, help="a UTF-8 text file")
    parser.add_argument("--text-tokens", type=int, default=16384)
    parser.add_argument("--every", type=int, default=5, help="look after so many lines of the journal")
    parser.add_argument("-o", "--output", required=True, help="a JSON file")
    options = parser.parse_args()
    try:
        if options.every < 1:
            raise TPatchError(f"--every {options.every} is impossible; give 1 or more")
        if not Path(options.output).absolute().parent.is_dir():
            raise TPatchError(f"the folder of {options.output} does not exist; make it first")
        model = load_banked_model(open_bank(options.bank))
        history = bank_history(options.bank, model, options.text, every=options.every, tokens=options.text_tokens)
    except TPatchError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    write_text(Path(options.output), json.dumps(history, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
