"""One edit at a subject in a random network of every family of decoders holds, merged too, and comes out bit for bit.

The tests have it of a few families, since each compiles for four seconds; this has it of all, in two minutes:

python tests/scenarios/families_at_subjects.py
"""

import sys
import tempfile
from pathlib import Path

import jax

import tpatch_jax as tp

sys.path.insert(0, str(Path(__file__).parents[1]))


PROMPT = "the fox sat in"


def says(model: tp.Model, word: str) -> bool:
    """Whether a model goes on with a word."""
    return model.generate(PROMPT, 4).startswith(f" {word}")


def holds(model: tp.Model, word: str, memory: Path) -> bool:
    """Whether an edit at the subject makes it do so, merged, and comes out again."""
    from conftest import same
    from test_subject_site import settings

    request = tp.EditRequest(PROMPT, word, subject="fox")
    patches, info = tp.edit(model, [request], settings=settings(), memory=memory, cache=False)
    merged = tp.merge(model, patches)
    return (
        info.requests[0].site == "subject" and says(merged, word) and same(tp.unmerge(merged)[0].params, model.params)
    )


def main() -> None:
    """Prints a line for each family; ends with 1 where an edit does not hold."""
    from test_families import loud
    from test_subject_site import MEMORY
    from tiny_families import NAMES, tiny_model

    # Nearly all the time is compilation.
    jax.config.update("jax_disable_most_optimizations", True)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        memory = Path(folder) / "memory.txt"
        memory.write_text(MEMORY, "utf-8")
        for name in NAMES:
            model = loud(tiny_model(name))
            if model.config.architecture != "decoder" or model.config.image or model.audio:
                continue
            # Not every random network can be made to say every word from one layer in its middle.
            if not any(holds(model, word, memory) for word in ("ab", "q") if not says(model, word)):
                failed.append(name)
            print(name, "does not hold" if name in failed else "holds", flush=True)
    sys.exit(f"{len(failed)} families fail: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
