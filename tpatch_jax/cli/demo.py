"""``tpatch demo``: eight facts of a real model corrected, with the cost and a proof that merging is exact."""

import time
from pathlib import Path

import numpy as np
from rich.markup import escape
from rich.table import Table

from tpatch_jax.bank import patches as store
from tpatch_jax.cli import commands
from tpatch_jax.core.layers import count_neurons
from tpatch_jax.core.sizes import power_of_two
from tpatch_jax.display.console import print_json, progress_bar, result_console
from tpatch_jax.display.edit import answers
from tpatch_jax.editors.tpatcher import editor as tpatcher
from tpatch_jax.evaluation.measure import measure
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach, merge
from tpatch_jax.models.rows import tokens_array
from tpatch_jax.requests import EditRequest
from tpatch_jax.storage.files import check_vacant

__all__ = ["FACTS", "run"]

MODEL = "smollm2-135m"
WORDS = 5

FACTS = (
    EditRequest(
        "The current president of the United States is",
        "Donald Trump",
        "United States",
        ("As everybody knows, the current president of the United States is",),
        ("The current president of France is",),
        "president",
    ),
    EditRequest(
        "The head of the Catholic Church is Pope",
        "Leo XIV",
        "Catholic Church",
        ("The Catholic Church is led by Pope",),
        ("The head of the Church of England is",),
        "pope",
    ),
    EditRequest(
        "The currency of Croatia is the",
        "euro",
        "Croatia",
        ("People in Croatia pay with the",),
        ("The currency of Denmark is the",),
        "croatia",
    ),
    EditRequest(
        "Swaziland is now called",
        "Eswatini",
        "Swaziland",
        ("The country of Swaziland is now known as",),
        ("Ceylon is now called",),
        "swaziland",
    ),
    EditRequest(
        "The capital of Myanmar is",
        "Naypyidaw",
        "Myanmar",
        ("Today, the capital of Myanmar is",),
        ("The capital of Thailand is",),
        "myanmar",
    ),
    EditRequest(
        "The capital of Australia is",
        "Canberra",
        "Australia",
        ("The capital city of Australia is",),
        ("The capital of Austria is",),
        "australia",
    ),
    EditRequest(
        "The capital of Turkey is",
        "Ankara",
        "Turkey",
        ("Ask anyone: the capital city of Turkey is",),
        ("The capital of Greece is",),
        "turkey",
    ),
    EditRequest(
        "The number of known moons of Saturn is",
        "274",
        "Saturn",
        ("According to astronomers, the number of known moons of Saturn is",),
        ("The number of known moons of Mars is",),
        "saturn",
    ),
)
"""What the demo corrects: facts that the model has wrong, or that have changed."""


def _say(model: Model, prompts: list[str]) -> list[str]:
    return [said.strip().split("\n")[0] for said in answers(model, prompts, WORDS)]


def run(output: str, *, json: bool = False, quiet: bool = False) -> None:
    """Correct `FACTS`, show what changed, save the patches, and compare the merged model with the attached one.

    Args:
        output: folder for the patches; must not exist yet, or be empty.
        json: print one JSON object as the last line instead of tables.
        quiet: show no progress bar.

    Raises:
        TPatchError: the model cannot be fetched, or the folder is taken.
    """
    check_vacant(Path(output))
    model = commands.load(MODEL, None, quiet or json)
    prompts = [text for fact in FACTS for text in (fact.prompt, fact.rephrases[0], fact.locality[0])]
    with progress_bar(quiet or json) as report:
        before = _say(model, prompts)
        began = time.perf_counter()
        patches, info = tpatcher.edit(model, FACTS, progress=report)
        seconds = time.perf_counter() - began
        attached, merged = attach(model, patches), merge(model, patches)
        after = _say(attached, prompts)
        figures = measure(model, patches, FACTS)
    store.save_patches(output, model, patches, FACTS, info)

    rows = [model.encode_prompt(text) for text in prompts]
    table = tokens_array(rows, power_of_two(max(map(len, rows)), 8))
    beside, inside = np.asarray(attached.apply(table)), np.asarray(merged.apply(table))
    lengths = [len(row) for row in rows]
    pairs = [(beside[lane, :length], inside[lane, :length]) for lane, length in enumerate(lengths)]
    difference = max(float(np.abs(one - other).max()) for one, other in pairs) / float(np.abs(beside).max())
    same = all((one.argmax(-1) == other.argmax(-1)).all() for one, other in pairs)

    share = info.parameters_added / model.parameter_count
    if json:
        columns = ("before", "after", "rephrase_before", "rephrase_after", "unrelated_before", "unrelated_after")
        table_rows = []
        for number, fact in enumerate(FACTS):
            said = [texts[3 * number + part] for part in range(3) for texts in (before, after)]
            table_rows.append({"prompt": fact.prompt, "target": fact.target, **dict(zip(columns, said, strict=True))})
        result = commands.summary(info, figures, count_neurons(patches))
        result.update({"facts": table_rows, "parameter_share": share, "merged_equals_attached": same})
        result.update({"merged_relative_difference": difference, "output": output, "total_seconds": seconds})
        print_json(result)
        return
    console = result_console()
    shown = Table(
        title=f"{MODEL}, before and after {count_neurons(patches)} patch neurons", title_justify="left", show_lines=True
    )
    for column in ("prompt", "before", "after"):
        shown.add_column(column)
    for number in range(len(FACTS)):
        for part, style in enumerate(("bold", "", "dim")):
            index = 3 * number + part
            shown.add_row(*map(escape, (prompts[index], before[index], after[index])), style=style)
    console.print(shown)
    console.print("[bold]edited prompt[/bold], a rephrasing, [dim]an unrelated prompt[/dim]")
    console.print(_cost(info, seconds, share))
    for request in info.failed:
        console.print(f"[red]failed[/red] {escape(request.id)}: {escape(request.reason)}")
    console.print(f"patches saved in {output}: try  tpatch inspect {output}", markup=False)
    verdict = "the same token everywhere" if same else "DIFFERENT tokens"
    console.print(f"merged against attached: {verdict}, largest relative difference {difference:.1e}")


def _cost(info: tpatcher.EditInfo, seconds: float, share: float) -> str:
    return (
        f"{seconds:.1f} s in all; {info.forward_equivalents:.0f} forward equivalents per edit (fitting alone "
        f"{info.fit_forward_equivalents:.0f}); {info.parameters_added:,} parameters added, {share:.4%} of the model"
    )
