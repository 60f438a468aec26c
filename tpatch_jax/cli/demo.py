"""``tpatch demo``: eight facts of a real model corrected, with the cost and a proof that merging is exact."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from tpatch_jax.cli.common import Json, Quiet, load
from tpatch_jax.cli.edit import other_facts, summary
from tpatch_jax.display.console import print_json, progress_bar, result_console
from tpatch_jax.requests import EditRequest

if TYPE_CHECKING:
    from tpatch_jax.editors.base import EditInfo
    from tpatch_jax.models.model import Model

__all__ = ["FACTS", "Demo"]

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


OTHER_FACTS = (
    "The largest city in the United States is",
    "The seat of the Catholic Church is in",
    "Croatia lies on the continent of",
    "Swaziland lies on the continent of",
    "The main religion of Myanmar is",
    "The animal that Australia is known for is the",
    "The language that people in Turkey speak is",
    "The largest moon of Saturn is",
)
"""Of each of `FACTS` another fact about the same subject, which stays as it is."""

PARTS = 4
"""So many prompts are shown for each fact: the edited one, a rephrasing, another fact, an unrelated one."""


@dataclass(frozen=True)
class Demo:
    """Correct eight facts of a real language model and show what changed."""

    output: Annotated[str, arg(aliases=["-o"], help="where to save the patches")] = "patches/demo"
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Correct `FACTS`, show what changed, save the patches, and compare the merged model with the attached one."""
        from tpatch_jax.bank.patches import save_patches
        from tpatch_jax.core.layers import count_neurons
        from tpatch_jax.editors.tpatcher.editor import edit
        from tpatch_jax.evaluation.measure import measure
        from tpatch_jax.evaluation.subject_specificity import specificity_totals
        from tpatch_jax.models.patching import attach, merge
        from tpatch_jax.storage.files import check_vacant

        check_vacant(Path(self.output))
        model = load(MODEL, None, self.quiet or self.json)
        prompts = [
            text
            for fact, other in zip(FACTS, OTHER_FACTS, strict=True)
            for text in (fact.prompt, fact.rephrases[0], other, fact.locality[0])
        ]
        with progress_bar(self.quiet or self.json) as report:
            before = _first_lines(model, prompts)
            began = time.perf_counter()
            patches, info = edit(model, FACTS, progress=report)
            seconds = time.perf_counter() - began
            attached, merged = attach(model, patches), merge(model, patches)
            after = _first_lines(attached, prompts)
            figures = measure(model, patches, FACTS)
            facts = [line for lines in other_facts(model, patches, FACTS, info) for line in lines]
        save_patches(self.output, model, patches, FACTS, info)
        difference, same = _compare(model, attached, merged, prompts)
        neurons, share = count_neurons(patches), info.parameters_added / model.parameter_count
        if self.json:
            result = summary(info, figures, neurons)
            result.update({"facts": _facts_json(prompts, before, after), "parameter_share": share})
            result["subject_specificity"] = specificity_totals(facts)
            result.update({"merged_equals_attached": same, "merged_relative_difference": difference})
            print_json({**result, "output": self.output, "total_seconds": seconds})
            return
        _show_answers(neurons, prompts, before, after)
        self._show_cost(info, seconds, share)
        verdict = "the same token everywhere" if same else "DIFFERENT tokens"
        result_console().print(f"merged against attached: {verdict}, largest relative difference {difference:.1e}")

    def _show_cost(self, info: "EditInfo", seconds: float, share: float) -> None:
        from rich.markup import escape

        console = result_console()
        console.print(
            f"{seconds:.1f} s in all; {info.forward_equivalents:.0f} forward equivalents per edit (fitting alone "
            f"{info.fit_forward_equivalents:.0f}); {info.parameters_added:,} parameters added, {share:.4%} of the model"
        )
        for request in info.failed:
            console.print(f"[red]failed[/red] {escape(request.id)}: {escape(request.reason)}")
        console.print(f"patches saved in {self.output}: try  tpatch inspect {self.output}", markup=False)


def _first_lines(model: "Model", prompts: list[str]) -> list[str]:
    from tpatch_jax.display.edit import answers

    return [answer.strip().split("\n")[0] for answer in answers(model, prompts, WORDS)]


def _compare(model: "Model", attached: "Model", merged: "Model", prompts: Sequence[str]) -> tuple[float, bool]:
    """How far the merged model's logits are from the attached one's, and whether both choose the same tokens."""
    import numpy as np

    from tpatch_jax.core.sizes import power_of_two
    from tpatch_jax.models.rows import tokens_array

    rows = [model.encode_prompt(text) for text in prompts]
    lengths = [len(row) for row in rows]
    table = tokens_array(rows, power_of_two(max(lengths), 8))
    beside, inside = np.asarray(attached.apply(table)), np.asarray(merged.apply(table))
    pairs = [(beside[row, :length], inside[row, :length]) for row, length in enumerate(lengths)]
    difference = max(float(np.abs(one - other).max()) for one, other in pairs) / float(np.abs(beside).max())
    return difference, all((one.argmax(-1) == other.argmax(-1)).all() for one, other in pairs)


def _facts_json(prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> list[dict[str, Any]]:
    kinds = ("", "rephrase_", "other_", "unrelated_")
    facts = []
    for number, fact in enumerate(FACTS):
        texts = {
            f"{kind}{name}": answers[PARTS * number + part]
            for part, kind in enumerate(kinds)
            for name, answers in (("before", before), ("after", after))
        }
        facts.append(
            {"prompt": fact.prompt, "target": fact.target, "other_prompt": prompts[PARTS * number + 2], **texts}
        )
    return facts


def _show_answers(neurons: int, prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> None:
    from rich.markup import escape
    from rich.table import Table

    title = f"{MODEL}, before and after {neurons} patch neurons"
    table = Table(title=title, title_justify="left", show_lines=True)
    for column in ("prompt", "before", "after"):
        table.add_column(column)
    for number in range(len(FACTS)):
        for part, style in enumerate(("bold", "", "italic", "dim")):
            index = PARTS * number + part
            table.add_row(*map(escape, (prompts[index], before[index], after[index])), style=style)
    console = result_console()
    console.print(table)
    console.print(
        "[bold]edited prompt[/bold], a rephrasing, [italic]another fact about the subject[/italic], [dim]an unrelated "
        "prompt[/dim]"
    )
