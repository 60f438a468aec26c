"""``tpatch edit``: fits patches for requests, and saves those that hold."""

import shlex
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from tpatch_jax.cli.common import (
    Config,
    Dtype,
    Join,
    Json,
    MemoryText,
    ModelName,
    Preset,
    Prompt,
    Quiet,
    RequestsFile,
    Set,
    Subject,
    Target,
    load,
    requests_of,
    settings_of,
)
from tpatch_jax.display.console import format_count, print_json, progress_bar, result_console, result_table
from tpatch_jax.errors import TPatchError
from tpatch_jax.requests import EditRequest

if TYPE_CHECKING:
    from tpatch_jax.editors.base import EditInfo

__all__ = ["Edit", "summary"]


@dataclass(frozen=True)
class Edit:
    """Correct a model: fit neurons that make it say each target after its prompt."""

    model: ModelName
    requests: RequestsFile = None
    _: KW_ONLY
    output: Annotated[str, arg(aliases=["-o"], metavar="PATCHES", help="folder for the patches")]
    prompt: Prompt = None
    target: Target = None
    subject: Subject = None
    join: Join = None
    config: Config = None
    preset: Preset = None
    changes: Set = ()
    memory: MemoryText = None
    train_on_rephrases: Annotated[bool, arg(help="fit on the rephrases too, which otherwise only measure")] = False
    dtype: Dtype = None
    seed: Annotated[int, arg(help="the same seed gives the same patches")] = 0
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Edit, save, measure, and show the figures."""
        from tpatch_jax.bank.patches import save_patches
        from tpatch_jax.core.layers import count_neurons
        from tpatch_jax.editors.tpatcher.editor import edit
        from tpatch_jax.evaluation.measure import measure
        from tpatch_jax.storage.files import check_vacant

        requests = requests_of(self.requests, (self.prompt, self.target, self.subject), join=self.join)
        rephrases = ["train_on_rephrases=true"] if self.train_on_rephrases else []
        settings = settings_of(self.preset, self.config, [*self.changes, *rephrases])
        check_vacant(Path(self.output))
        model = load(self.model, self.dtype, self.quiet or self.json)
        with progress_bar(self.quiet or self.json) as report:
            patches, info = edit(
                model, requests, settings=settings, memory=self.memory, seed=self.seed, progress=report
            )
            held = any(request.held for request in info.requests)
            if held:  # else the folder would only be in the way of the next attempt
                save_patches(self.output, model, patches, requests, info)
            total = sum(1 + len(request.rephrases) + len(request.locality) for request in requests)
            figures = measure(model, patches, requests, lambda done: report("measuring", done, total))
        result = summary(info, figures, count_neurons(patches))
        if self.json:
            print_json(result)
        else:
            self._show(requests, info, result, saved=held)
        if not held:
            raise TPatchError(f"nothing is saved in {self.output}: no request holds; mend them as the reasons say")

    def _show(self, requests: Sequence[EditRequest], info: "EditInfo", result: dict[str, Any], *, saved: bool) -> None:
        from rich.markup import escape
        from rich.text import Text

        console = result_console()
        counts = f"{format_count(len(requests), 'request')}, {format_count(result['patches'], 'neuron')}"
        table = result_table(f"{counts}, {info.seconds:.1f} s", ("figure", "value"), ("value",))
        for name, value in result.items():
            if value is not None and not isinstance(value, list):
                table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
        console.print(table)
        for request in info.requests:
            if request.held and request.reason:
                console.print(f"{request.id}: {request.reason}", markup=False)
        for request in info.failed:
            console.print(f"[red]failed[/red] {escape(request.id)}: {escape(request.reason)}")
        if not saved:
            return
        console.print(f"patches saved in {self.output}; try them:", markup=False)
        words = ["tpatch", "generate", self.model, "--patches", self.output, "--prompt", requests[0].prompt]
        words += ["--dtype", self.dtype] if self.dtype else []
        console.print(Text(shlex.join(words)), soft_wrap=True)


def summary(info: "EditInfo", figures: dict[str, float | None], neurons: int) -> dict[str, Any]:
    """The object that ``tpatch edit --json`` ends with."""
    return {
        "n": len(info.requests),
        "patches": neurons,
        **figures,
        "seconds": round(info.seconds, 3),
        "forward_equivalents": round(info.forward_equivalents, 3),
        "fit_forward_equivalents": round(info.fit_forward_equivalents, 3),
        "parameters_added": info.parameters_added,
        "already": [request.id for request in info.requests if request.status == "already"],
        "failed": [{"id": request.id, "reason": request.reason} for request in info.failed],
    }
