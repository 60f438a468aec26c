"""``tpatch edit``: fits patches for requests, and saves those that hold."""

import hashlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from tpatch_jax.cli.common import (
    Config,
    Dtype,
    Form,
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
    System,
    Target,
    load,
    requests_of,
    settings_of,
    split_base,
)
from tpatch_jax.display.console import format_count, print_json, progress_bar, result_console, result_table
from tpatch_jax.errors import TPatchError
from tpatch_jax.requests import EditRequest, protect, request_fields

if TYPE_CHECKING:
    from tpatch_jax.core.layers import LayerPatches
    from tpatch_jax.editors.base import EditInfo
    from tpatch_jax.editors.tpatcher.settings import TPatcherSettings
    from tpatch_jax.models.model import Model

__all__ = ["Edit", "other_facts", "summary"]

TPATCHER = "tpatcher"
"""The method whose edits are patches."""

SHOWN = 100
"""So many requests at most are shown with what the model says; all are in ``--json``."""


@dataclass(frozen=True)
class Edit:
    """Correct a model: fit neurons that make it say each target after its prompt."""

    model: ModelName
    requests: RequestsFile = None
    _: KW_ONLY
    output: Annotated[
        str, arg(aliases=["-o"], metavar="PATCHES", help="folder for the patches; with --method for the edited model")
    ]
    method: Annotated[
        str, arg(metavar="NAME", help="tpatcher, or one that changes weights: ft, rome, r-rome, memit, alphaedit, …")
    ] = TPATCHER
    prompt: Prompt = None
    target: Target = None
    subject: Subject = None
    join: Join = None
    form: Form = None
    system: System = None
    config: Config = None
    preset: Preset = None
    changes: Set = ()
    memory: MemoryText = None
    train_on_rephrases: Annotated[bool, arg(help="fit on the rephrases too, which otherwise only measure")] = False
    protect: Annotated[bool, arg(help="train on the locality prompts too, which otherwise only measure")] = False
    resume: Annotated[bool, arg(help="go on with an interrupted run of the same requests and options")] = False
    dtype: Dtype = None
    seed: Annotated[int, arg(help="the same seed gives the same patches")] = 0
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Edit, save, measure, and show the figures and what the model says now."""
        if self.method != TPATCHER:
            self._edit_weights()
            return
        from tpatch_jax.bank.patches import save_patches
        from tpatch_jax.core.layers import count_neurons
        from tpatch_jax.display.progress import edit_phases, edit_progress, format_seconds, pass_seconds
        from tpatch_jax.editors.speech import spoken_requests
        from tpatch_jax.editors.tpatcher.editor import edit, site_layer
        from tpatch_jax.evaluation.answers import compare_answers, count_prompts
        from tpatch_jax.evaluation.measure import measure
        from tpatch_jax.evaluation.subject_specificity import specificity_totals
        from tpatch_jax.storage.files import check_vacant
        from tpatch_jax.storage.finished_parts import FinishedParts, unfinished_folder

        requests = requests_of(
            self.requests,
            (self.prompt, self.target, self.subject),
            join=self.join,
            form=self.form,
            system=self.system,
        )
        requests = protect(requests) if self.protect else requests
        rephrases = ["train_on_rephrases=true"] if self.train_on_rephrases else []
        changes, dtype = split_base(self.changes, self.dtype)
        settings = settings_of(self.preset, self.config, [*changes, *rephrases])
        check_vacant(Path(self.output))
        model = load(self.model, dtype, self.quiet or self.json)
        requests = spoken_requests(model, requests)
        folder = unfinished_folder(Path(self.output).absolute())
        finished = FinishedParts(
            folder, _run_config(model, requests, settings, self.memory, self.seed), resume=self.resume
        )
        if self.resume and not self.quiet:
            count = format_count(finished.count, "finished part")
            sys.stderr.write(f"tpatch: going on with {count} of an interrupted run\n")

        def warn(left: float) -> None:
            many = format_count(len(requests), "request")
            sys.stderr.write(
                f"tpatch: about {format_seconds(left)} are left for {many}; what is finished is kept, and after an "
                "interruption the same command with --resume goes on\n"
            )

        prompts = count_prompts(requests)
        subjects = sum(bool(one.subject) for one in requests) if site_layer(model, settings) is not None else 0
        phases = edit_phases(len(requests), subjects, prompts)
        hide = self.quiet or self.json
        first = ("training values", "fitting")
        with edit_progress(
            hide,
            phases,
            pass_seconds(model),
            first,
            lambda left: None if self.quiet else warn(left),
            lambda: finished.taken,
        ) as report:
            finished.begin()
            try:
                patches, info = edit(
                    model,
                    requests,
                    settings=settings,
                    memory=self.memory,
                    seed=self.seed,
                    progress=report,
                    finished=finished,
                )
            except KeyboardInterrupt:
                if finished.kept:
                    sys.stderr.write(
                        f"tpatch: {folder} keeps what is finished; the same command with --resume goes on\n"
                    )
                raise
            except TPatchError:
                if not finished.kept:  # nothing is lost, and the next attempt may be another
                    finished.remove()
                raise
            held = any(request.held for request in info.requests)
            if held:  # else the folder would only be in the way of the next attempt
                save_patches(self.output, model, patches, requests, info)
            finished.remove()
            figures = measure(model, patches, requests, lambda done: report("measuring", done, prompts))
            said = compare_answers(model, patches, requests, lambda done: report("reading answers", done, 2 * prompts))
            facts = other_facts(model, patches, requests, info)
        totals = specificity_totals(line for lines in facts for line in lines)
        result = {**summary(info, figures, count_neurons(patches)), "subject_specificity": totals}
        result["records"] = _records(info, said, facts)
        self._tell(requests, info, result, saved=held)

    def _edit_weights(self) -> None:
        """Edit with a method whose result is a model, and save that."""
        from tpatch_jax.editors.registry import method_settings
        from tpatch_jax.editors.speech import spoken_requests
        from tpatch_jax.editors.weights import check_changes_weights, edit_weights
        from tpatch_jax.evaluation.answers import compare_answers, count_prompts
        from tpatch_jax.evaluation.measure import measure
        from tpatch_jax.models.model import save_model
        from tpatch_jax.storage.files import check_vacant
        from tpatch_jax.storage.settings import combine, read_config, split_changes

        name = check_changes_weights(self.method).name
        for option in ("train_on_rephrases", "protect", "resume"):
            if getattr(self, option):
                raise TPatchError(f"--{option.replace('_', '-')} is for T-Patcher's edits; leave it out, or --method")
        single = (self.prompt, self.target, self.subject)
        requests = requests_of(self.requests, single, join=self.join, form=self.form, system=self.system)
        given, dtype = split_base(self.changes, self.dtype)
        changes = combine(read_config(self.config) if self.config else {}, split_changes(given))
        in_file = changes.pop("preset", "default")
        settings = method_settings([name], self.preset or str(in_file), changes)[name]
        check_vacant(Path(self.output))
        model = load(self.model, dtype, self.quiet or self.json)
        requests, prompts = spoken_requests(model, requests), count_prompts(requests)
        with progress_bar(self.quiet or self.json) as report:
            edited, info = edit_weights(
                model, requests, name, settings=settings, memory=self.memory, seed=self.seed, progress=report
            )
            held = any(request.held for request in info.requests)
            if held:
                save_model(edited, self.output)
            figures = measure(model, edited, requests, lambda done: report("measuring", done, 2 * prompts))
            said = compare_answers(model, edited, requests, lambda done: report("reading answers", done, 2 * prompts))
        result = {**summary(info, figures, 0), "subject_specificity": {}, "method": name}
        result["records"] = _records(info, said, [[] for _ in requests])
        self._tell(requests, info, result, saved=held)

    def _tell(self, requests: Sequence[EditRequest], info: "EditInfo", result: dict[str, Any], *, saved: bool) -> None:
        """What became of the requests, as a line of JSON or a table; an error where nothing is saved."""
        if self.json:
            print_json(result)
        else:
            self._show(requests, info, result, saved=saved)
        if not saved:
            raise TPatchError(f"nothing is saved in {self.output}: no request holds; mend them as the reasons say")

    def _show(self, requests: Sequence[EditRequest], info: "EditInfo", result: dict[str, Any], *, saved: bool) -> None:
        from rich.markup import escape
        from rich.text import Text

        console = result_console()
        method = result.get("method")
        made = f"by {method}" if method else format_count(result["patches"], "neuron")
        counts = f"{format_count(len(requests), 'request')}, {made}"
        table = result_table(f"{counts}, {info.seconds:.1f} s", ("figure", "value"), ("value",))
        shown = {**result, **result["subject_specificity"].get("statements", {}), "prompts": None, "method": None}
        shown |= {"patches": None} if method else {}
        for name, value in shown.items():
            if value is not None and not isinstance(value, list | dict):
                table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
        console.print(table)
        for request in info.requests:
            if request.held and request.reason:
                console.print(f"{request.id}: {request.reason}", markup=False)
        _show_records(result["records"])
        for request in info.failed:
            console.print(f"[red]failed[/red] {escape(request.id)}: {escape(request.reason)}")
        if not saved:
            return
        what = "model saved in {}; try it:" if method else "patches saved in {}; try them:"
        console.print(what.format(self.output), markup=False)
        source = getattr(requests[0].prompt, "source", "")
        if hasattr(requests[0].prompt, "samples"):
            command = ["tpatch", "transcribe", self.output if method else self.model, source or "AUDIO"]
            command += [] if method else ["--patches", self.output]
            console.print(Text(shlex.join(command)), soft_wrap=True)
            return
        words = ["tpatch", "generate", *([self.output] if method else [self.model, "--patches", self.output])]
        words += ["--prompt", requests[0].prompt]
        words += ["--chat"] if requests[0].form == "chat" else []
        words += ["--system", requests[0].system] if requests[0].system is not None else []
        dtype = split_base(self.changes, self.dtype)[1]
        words += ["--dtype", dtype] if dtype and not method else []
        console.print(Text(shlex.join(words)), soft_wrap=True)


def _run_config(
    model: "Model", requests: Sequence[EditRequest], settings: "TPatcherSettings", memory: str | None, seed: int
) -> dict[str, Any]:
    """What determines the patches of a run, by name."""
    from importlib.metadata import version

    import jax

    from tpatch_jax.editors.tpatcher.start_file import AUTO, NONE
    from tpatch_jax.models.fingerprint import fingerprint
    from tpatch_jax.models.memory_text import text_mark
    from tpatch_jax.storage.finished_parts import hash_file

    content = json.dumps([request_fields(request) for request in requests], ensure_ascii=False)
    device = jax.devices()[0]
    config = {
        "model": f"{fingerprint(model)} in {model.dtype}",
        "requests": f"{len(requests)} with SHA-256 {hashlib.sha256(content.encode()).hexdigest()[:16]}",
        "seed": seed,
        "memory": None if memory is None else text_mark(model, memory) if model.audio else hash_file(memory),
        **({} if settings.subject.start in (AUTO, NONE) else {"start": hash_file(settings.subject.start)}),
        **{f"setting {name}": value for name, value in asdict(settings).items()},
        **{name: version(name) for name in ("tpatch-jax", "jax")},
        "device": f"{len(jax.devices())} {device.device_kind}",
    }
    return json.loads(json.dumps(config))


def other_facts(
    model: "Model", patches: "LayerPatches", requests: Sequence[EditRequest], info: "EditInfo"
) -> list[list[dict[str, Any]]]:
    """What became of other statements about the subjects of those requests that were edited; of the others nothing."""
    from tpatch_jax.evaluation.subject_specificity import measure_specificity

    edited = [number for number, result in enumerate(info.requests) if result.status == "edited"]
    measured = measure_specificity(model, patches, [requests[number] for number in edited], together=requests)
    lines: list[list[dict[str, Any]]] = [[] for _ in requests]
    for number, of_one in zip(edited, measured, strict=True):
        lines[number] = of_one
    return lines


def _records(
    info: "EditInfo", said: Sequence[dict[str, Any]], facts: Sequence[list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """What became of each request and of other facts about its subject, and what the model said and says."""
    records = []
    for result, answers, of_subject in zip(info.requests, said, facts, strict=True):
        name, rest = answers["id"], {key: value for key, value in answers.items() if key != "id"}
        reason = {"reason": result.reason} if result.reason else {}
        outcome = {"id": name, "status": result.status, "held": result.held, "form": result.form, **reason, **rest}
        records.append({**outcome, "specificity": of_subject})
    return records


def _show_records(records: Sequence[Mapping[str, Any]]) -> None:
    """Each request before and after, its rephrases, and what changed that should not have."""
    from rich.text import Text

    console = result_console()

    def harmed(record: Mapping[str, Any]) -> bool:
        others = (*record["rephrases"], *record["keep"], *record["locality"])
        said = any(line["target_said"] for line in record["specificity"])
        return said or not (record["held"] and record["as_wanted"] and all(other["as_wanted"] for other in others))

    # Where there are many, what is not as wanted is shown first.
    chosen = records if len(records) <= SHOWN else sorted(records, key=harmed, reverse=True)[:SHOWN]
    table = result_table(
        "what the model says", ("request", "asked", "prompt", "before", "after", "target", "as wanted")
    )
    for record in chosen:
        lines = [("edit", record), *(("rephrase", other) for other in record["rephrases"])]
        # What is kept and measured as well, as with --protect, is shown once.
        changed = [other for other in (*record["keep"], *record["locality"]) if not other["as_wanted"]]
        lines += [("protected", other) for number, other in enumerate(changed) if other not in changed[:number]]
        for kind, line in lines:
            texts = [_one_line(line[name]) for name in ("prompt", "before", "after")]
            target = "" if kind == "protected" else record["target"]
            good = line["as_wanted"] and (kind != "edit" or record["held"])
            mark = Text("yes", style="green") if good else Text("changed" if kind == "protected" else "no", style="red")
            table.add_row(Text(record["id"]), Text(kind), *map(Text, (*texts, _one_line(target))), mark)
        for line in record["specificity"]:
            if line["target_said"]:
                texts = [_one_line(line[name]) for name in ("prompt", "before", "after")]
                mark = Text("says the target", style="red")
                table.add_row(Text(record["id"]), Text("other fact"), *map(Text, texts), Text(""), mark)
    console.print(table)
    if len(chosen) < len(records):
        console.print(f"{len(records) - len(chosen):,} more requests are left out; --json has all")
    facts = [line["first_token_kept"] for record in records for line in record["specificity"]]
    if facts:
        many = format_count(len(facts), "other statement")
        console.print(f"{sum(facts):,} of {many} about the edited subjects begin as before")
    for name, of_them in (("keep", "kept prompt"), ("locality", "protected prompt")):
        kept = [other["as_wanted"] for record in records for other in record[name]]
        if not kept:
            continue
        console.print(f"{sum(kept):,} of {format_count(len(kept), of_them)} say the same as before")


def _one_line(text: str | None) -> str:
    return "(cannot be asked)" if text is None else text.strip().replace("\n", "⏎")


def summary(info: "EditInfo", figures: dict[str, float | None], neurons: int) -> dict[str, Any]:
    """The object that ``tpatch edit --json`` ends with."""
    return {
        "n": len(info.requests),
        "patches": neurons,
        **figures,
        "seconds": round(info.seconds, 3),
        "forward_equivalents": round(info.forward_equivalents, 3),
        "fit_forward_equivalents": round(info.fit_forward_equivalents, 3),
        "held_at_start": info.held_at_start,
        "parameters_added": info.parameters_added,
        "already": [request.id for request in info.requests if request.status == "already"],
        "failed": [{"id": request.id, "reason": request.reason} for request in info.failed],
    }
