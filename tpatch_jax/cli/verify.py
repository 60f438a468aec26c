"""``tpatch verify``: which edits of a folder of patches hold, form by form."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from tpatch_jax.cli.common import Dtype, Json, Quiet, load, show_rows
from tpatch_jax.display.console import print_json, result_console
from tpatch_jax.errors import TPatchError

if TYPE_CHECKING:
    from tpatch_jax.models.model import Model
    from tpatch_jax.requests import EditRequest

__all__ = [
    "Forms",
    "LongText",
    "Samples",
    "VerifyPatches",
    "check_measured",
    "forms_json",
    "measure_banked",
    "show_forms",
]

Forms = Annotated[
    str | None, arg(metavar="FORM[,…]", help="bare, long, lower, upper, alias, chat, chat-long, chat-lower, …")
]
LongText = Annotated[str | None, arg(metavar="FILE", help="text for the long forms; by default the model samples it")]
Samples = Annotated[int, arg(metavar="N", help="so many drawn answers each, too, at temperature 0.7")]


Base = Annotated[
    str | None,
    arg(metavar="MODEL", help="the model that the edits were made for, to compare with what was made of it"),
]


@dataclass(frozen=True)
class VerifyPatches:
    """Ask a corrected model, or whatever was made of it, everything that was edited, and see which edits hold."""

    model: Annotated[
        Positional[str],
        arg(metavar="MODEL", help="the model, or any folder or GGUF file made of it: merged, exported, quantised"),
    ]
    patches: Annotated[Positional[str], arg(metavar="PATCHES", help="a folder that `tpatch edit` wrote, or a bank")]
    _: KW_ONLY
    base: Base = None
    forms: Forms = None
    text: LongText = None
    samples: Samples = 0
    dtype: Dtype = None
    seed: Annotated[int, arg(help="the first seed of drawn answers")] = 0
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Measure, and show the figures and what does not hold."""
        from tpatch_jax.editors.holding import requests_held
        from tpatch_jax.evaluation.forms import measure_forms
        from tpatch_jax.evaluation.verifying import place_edits, read_edits

        check_measured(self.forms, self.samples)
        edits, quiet = read_edits(self.patches), self.quiet or self.json
        model = load(self.model, self.dtype, quiet)
        base = None if self.base is None else load(self.base, edits.model.get("dtype"), quiet)
        asked, requests = place_edits(edits, model, base), edits.requests
        held = requests_held(asked.model, requests)
        names = [request.name(number) for number, request in enumerate(requests)]
        state = {
            "state": asked.state,
            "held": [name for name, holds in zip(names, held, strict=True) if holds],
            "lost": [name for name, holds in zip(names, held, strict=True) if not holds],
        }
        if asked.model.config.architecture != "decoder":
            # What an encoder says is one answer: there is nothing that it says by itself.
            if self.forms is not None or self.samples:
                raise TPatchError(
                    f"{self.model!r} is no decoder, which alone has forms; leave --forms and --samples out"
                )
            told = {"checked": len(requests), "broken": state["lost"], **state}
            if self.json:
                print_json(told)
            else:
                show_state(self.model, edits.folder, state, len(requests))
            return
        known, other = (asked.unedited, asked.model) if asked.unedited else (asked.model, None)
        result = measure_forms(
            known, other, requests, self.forms, long=self.text, samples=self.samples, seed=self.seed,
            questions=other is not None,
        )  # fmt: skip
        before: dict[str, Any] = {"forms": {}}
        if asked.unedited:
            before = measure_forms(known, None, requests, self.forms, long=self.text, questions=False)
        if self.json:
            print_json({**forms_json(result, before), **state})
        else:
            show_forms(f"{self.patches}: free answers of {self.model}", result, before)
            show_state(self.model, edits.folder, state, len(requests))


def show_state(model: str, folder: Any, state: Mapping[str, Any], count: int) -> None:
    """Print how a model stands to the edits, and which of them it does not hold.

    Args:
        model: what the user calls it.
        folder: of the edits.
        state: ``state``, ``held`` and ``lost``.
        count: how many edits there are.
    """
    from rich.markup import escape

    console = result_console()
    told = {
        "attached": f"the edits of {folder} were put beside {model}, for which they were made",
        "merged": f"the edits of {folder} are among the weights of {model}",
        "as it is": f"{model} has other weights than the edits of {folder} were made for, so that it was asked as it "
        "is; if it is the uncorrected model in another precision, give --dtype",
    }[state["state"]]
    console.print(told, markup=False)
    console.print(f"{len(state['held'])} of {count} edits hold, token for token behind their prompts", markup=False)
    for name in state["lost"]:
        console.print(f"[red]lost[/red] {escape(name)}")


def check_measured(forms: str | None, samples: int) -> None:
    """Make sure, before a model is loaded, that there are such forms, and so many samples.

    Raises:
        TPatchError: there are not.
    """
    from tpatch_jax.evaluation.forms import as_forms

    if forms is not None:
        as_forms(forms)
    if samples < 0:
        raise TPatchError(f"--samples {samples} draws nothing; give 0 or more")


def forms_json(result: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What ``--json`` has of free answers: ``checked, broken, unasked, forms, unedited, chat_questions?, edits``."""
    edits = result["edits"]
    broken, unasked = ([edit["id"] for edit in edits if edit["held"] is held] for held in (False, None))
    told = {"checked": len(edits) - len(unasked), "broken": broken, "unasked": unasked}
    return {**told, **result, "unedited": before["forms"]}


def show_forms(title: str, result: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Print a table of figures by form, beside the unedited model's, and each edit that does not hold."""
    from rich.markup import escape

    from tpatch_jax.evaluation.forms import FORM_FIGURES

    rows = [["form", "n", *(name.replace("_", " ") for name in FORM_FIGURES)]]
    for form, figures in result["forms"].items():
        parts = [(form, figures), (f"{form}, drawn", figures.get("sampled"))]
        parts.append((f"{form}, unedited", before["forms"].get(form)))
        for name, part in parts:
            if part:
                shown = [f"{part[figure]:.3g}" if figure in part else "" for figure in FORM_FIGURES]
                rows.append([name, str(part["n"]), *shown])
    show_rows(title, rows)
    console = result_console()
    edits = result["edits"]
    good, unasked = (sum(edit["held"] is held for edit in edits) for held in (True, None))
    asked = len(edits) - unasked
    console.print(f"{good} of {asked} edits are said in every form where they shall hold", markup=False)
    if unasked:
        why = "it shall hold in none of the forms, has no subject to spell otherwise, or leaves no room for an answer"
        console.print(f"{unasked} of {len(edits)} edits were not asked: {why}", markup=False)
    if questions := result.get("chat_questions"):
        same = round(questions["unchanged"] * questions["n"])
        console.print(f"{same} of {questions['n']} unrelated questions in a chat are answered as before", markup=False)
    for edit in edits:
        for answer in edit["answers"]:
            if answer["wanted"] and not answer["said"]:
                said = answer["answer"].strip().replace("\n", "⏎")
                console.print(
                    f"[red]not said[/red] {escape(edit['id'])}, {answer['form']}: {escape(said)}", soft_wrap=True
                )


def measure_banked(
    folder: str, model: "Model", edited: "Model", requests: "list[EditRequest]", forms: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Free answers to a bank's edits, of the corrected model and of the unedited one."""
    from tpatch_jax.evaluation.forms import measure_forms

    if not requests:
        raise TPatchError(f"{folder} has no active edit, so there is nothing to ask")
    return (
        measure_forms(model, edited, requests, forms),
        measure_forms(model, None, requests, forms, questions=False),
    )
