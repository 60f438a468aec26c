"""What each command does: load, call the library, show the result."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.text import Text

from tpatch_jax.bank import patches as store
from tpatch_jax.core.layers import count_neurons
from tpatch_jax.display.console import format_count, print_json, progress_bar, result_console, result_table
from tpatch_jax.editors.base import EditInfo
from tpatch_jax.editors.tpatcher import editor as tpatcher
from tpatch_jax.editors.tpatcher.settings import PRESETS, TPatcherSettings
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.measure import measure
from tpatch_jax.models import model as models_
from tpatch_jax.models import patching
from tpatch_jax.models.checkpoints.export import export_model
from tpatch_jax.models.checkpoints.sources import NAMED_MODELS
from tpatch_jax.models.families.promises import PROMISES, promised
from tpatch_jax.models.families.registry import FAMILIES
from tpatch_jax.models.model import Model
from tpatch_jax.requests import EditRequest
from tpatch_jax.storage.files import check_vacant
from tpatch_jax.storage.process import prepare_process
from tpatch_jax.storage.request_file import read_requests
from tpatch_jax.storage.settings import change, read_config

__all__ = [
    "edit",
    "export",
    "generate",
    "inspect",
    "load",
    "merge",
    "models",
    "preset_of",
    "requests_of",
    "settings_of",
    "summary",
]


def load(name: str, dtype: str | None, quiet: bool) -> Model:
    """Load the model that a command names."""
    prepare_process()
    return models_.load_model(name, dtype=dtype, quiet=quiet)


def settings_of(preset: str | None, config: str | None, changes: Sequence[str]) -> TPatcherSettings:
    """Settings from a preset, a YAML file and ``name=value`` changes, in this order."""
    name, values = preset_of(preset, config)
    return change(change(PRESETS[name], values), changes)


def preset_of(preset: str | None, config: str | None) -> tuple[str, dict[str, Any]]:
    """The name of a preset, and what else a YAML file sets, which may name one, too."""
    values = read_config(config) if config else {}
    name = preset or values.pop("preset", "default")
    values.pop("preset", None)
    if not isinstance(name, str) or name not in PRESETS:
        raise TPatchError(f"preset {name!r} does not exist; choose from {', '.join(sorted(PRESETS))}")
    return name, values


def requests_of(
    path: str | None, single: tuple[str | None, str | None, str | None], action: str = "edit"
) -> list[EditRequest]:
    """Requests from a file, or the one that ``--prompt``, ``--target`` and ``--subject`` make."""
    prompt, target, subject = single
    if path is not None:
        if any(text is not None for text in single):
            raise TPatchError("give either a file of requests or --prompt and --target, not both")
        return read_requests(path)
    if prompt is None or target is None:
        given = [name for name, text in zip(("prompt", "target", "subject"), single, strict=True) if text is not None]
        lacking = [f"--{name}" for name in ("prompt", "target") if name not in given]
        what = f"--{given[0]} is given without {' and '.join(lacking)}" if given else "no request is given"
        raise TPatchError(f"nothing to {action}: {what}; give a file of requests, or --prompt and --target")
    return [EditRequest(prompt, target, subject)]


def summary(info: EditInfo, figures: dict[str, float | None], neurons: int) -> dict[str, Any]:
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


def edit(
    model: str,
    requests: str | None,
    output: str,
    *,
    single: tuple[str | None, str | None, str | None],
    config: str | None,
    preset: str | None,
    changes: Sequence[str],
    memory: str | None,
    dtype: str | None,
    seed: int,
    json: bool,
    quiet: bool,
) -> None:
    """``tpatch edit``."""
    wanted = requests_of(requests, single)
    settings = settings_of(preset, config, changes)
    check_vacant(Path(output))
    loaded = load(model, dtype, quiet or json)
    with progress_bar(quiet or json) as report:
        patches, info = tpatcher.edit(loaded, wanted, settings=settings, memory=memory, seed=seed, progress=report)
        held = any(request.held for request in info.requests)
        if held:  # else the folder would only be in the way of the next attempt
            store.save_patches(output, loaded, patches, wanted, info)
        total = sum(1 + len(request.rephrases) + len(request.locality) for request in wanted)
        figures = measure(loaded, patches, wanted, lambda done: report("measuring", done, total))
    result = summary(info, figures, count_neurons(patches))
    if json:
        print_json(result)
    else:
        _show_edit(model, output, wanted, info, result, dtype, saved=held)
    if not held:
        raise TPatchError(f"nothing is saved in {output}: no request holds; mend them as the reasons say")


def _show_edit(
    model: str,
    output: str,
    wanted: Sequence[EditRequest],
    info: EditInfo,
    result: dict[str, Any],
    dtype: str | None,
    *,
    saved: bool,
) -> None:
    console = result_console()
    heading = (
        f"{format_count(len(wanted), 'request')}, {format_count(result['patches'], 'neuron')}, {info.seconds:.1f} s"
    )
    table = result_table(heading, ("figure", "value"), ("value",))
    for name, value in result.items():
        if value is not None and not isinstance(value, list):
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)
    for request in info.failed:
        console.print(f"[red]failed[/red] {escape(request.id)}: {escape(request.reason)}")
    if not saved:
        return
    console.print(f"patches saved in {output}; try them:", markup=False)
    words = ["tpatch", "generate", model, "--patches", output, "--prompt", wanted[0].prompt]
    words += ["--dtype", dtype] if dtype else []
    console.print(Text(shlex.join(words)), soft_wrap=True)


def generate(
    model: str, prompt: str, patches: str | None, max_new_tokens: int, *, dtype: str | None, json: bool, quiet: bool
) -> None:
    """``tpatch generate``."""
    if max_new_tokens < 1:
        raise TPatchError(f"--max-new-tokens {max_new_tokens} generates nothing; give 1 or more")
    saved = store.read_patches(patches) if patches else None
    loaded = load(model, dtype, quiet or json)
    if saved:
        store.check_model(saved, loaded)
        loaded = patching.attach(loaded, saved.patches)
    text = loaded.classify([prompt])[0] if loaded.config.labels else loaded.generate(prompt, max_new_tokens)
    if json:
        print_json({"prompt": prompt, "text": text})
    else:
        # A decoder goes on where the prompt ends; the others answer.
        between = "" if loaded.config.architecture == "decoder" else "\n"
        result_console().print(Text.assemble((prompt, "dim"), between, text), soft_wrap=True)


def inspect(patches: str, *, json: bool) -> None:
    """``tpatch inspect``."""
    saved = store.read_patches(patches)
    if json:
        print_json({"model": saved.model, "neurons": count_neurons(saved.patches), "edits": saved.edits})
        return
    title = f"{patches}: {format_count(count_neurons(saved.patches), 'neuron')} for {saved.model['name']}"
    table = result_table(title, ("id", "prompt", "target", "neurons", "held", "losses"))
    for entry in saved.edits:
        losses = "  ".join(f"{name} {value:.3g}" for name, value in entry["losses"].items())
        held = "yes" if entry["held"] else f"no: {entry.get('reason', '')}"
        if entry["status"] == "already":
            held = "yes, before the edit"
        texts = (entry["id"], entry["prompt"], entry["target"], str(len(entry["neurons"])), held, losses)
        table.add_row(*map(Text, texts))
    result_console().print(table)


def merge(model: str, patches: str, output: str, *, dtype: str | None, json: bool, quiet: bool) -> None:
    """``tpatch merge``."""
    check_vacant(Path(output))
    saved = store.read_patches(patches)
    loaded = load(model, dtype, quiet or json)
    store.check_model(saved, loaded)
    merged = patching.merge(loaded, saved.patches)
    models_.save_model(merged, output)
    added = merged.parameter_count - loaded.parameter_count
    if json:
        print_json({"output": output, "neurons": count_neurons(saved.patches), "parameters_added": added})
    else:
        said = f"{format_count(count_neurons(saved.patches), 'neuron')} merged ({added:,} parameters) into {output}"
        result_console().print(said, markup=False)


def export(
    model: str,
    patches: str | None,
    output: str,
    *,
    approximate: bool,
    memory: str | None,
    dtype: str | None,
    json: bool,
    quiet: bool,
) -> None:
    """``tpatch export``."""
    check_vacant(Path(output))
    saved = store.read_patches(patches) if patches else None
    loaded, requests = load(model, dtype, quiet or json), []
    if saved:
        store.check_model(saved, loaded)
        loaded = patching.merge(loaded, saved.patches)
        requests = [EditRequest(edit["prompt"], edit["target"], id=edit["id"]) for edit in saved.edits if edit["held"]]
    with progress_bar(quiet or json) as report:
        info = export_model(loaded, output, approximate=approximate, requests=requests, memory=memory, progress=report)
    if json:
        print_json({"output": output, **info.to_json()})
        return
    console = result_console()
    said = (
        f"{format_count(info.neurons, 'neuron')} in {output}, {info.form}: transformers loads it as a {info.model_type}"
    )
    console.print(said, markup=False)
    console.print(
        f"all layers are {info.ffn_width} wide, by {info.silent_neurons:,} silent neurons; "
        f"{info.parameters_added:,} parameters ({info.share:.3%}) and {info.bytes_added:,} bytes more than uncorrected"
    )
    if error := info.error:
        console.print(
            f"over {error.tokens:,} tokens of text, logits differ by {error.max_logit_difference:.3g} at most and "
            f"{error.mean_logit_difference:.3g} on average; {error.same_argmax:.2%} of the most probable next tokens "
            f"are the same; {len(error.held)} of {len(error.held) + len(error.lost)} requests still hold"
        )
        for name in error.lost:
            console.print(f"[red]lost[/red] {escape(name)}")


def models(*, json: bool) -> None:
    """``tpatch models``."""
    families = [
        {"name": family.name, "model_types": list(family.model_types), **promised(family)} for family in FAMILIES
    ]
    named = [
        {
            "name": entry.name,
            "family": entry.family,
            "parameters": entry.parameters,
            "license": entry.license,
            "description": entry.description,
            "obtained": f"from the wheel {entry.package} {entry.version}, on first use",
        }
        for entry in NAMED_MODELS
    ]
    if json:
        tests = {promise.name: promise.test for promise in PROMISES}
        print_json({"families": families, "models": named, "tests": tests})
        return
    console = result_console()
    table = result_table("models by name", ("name", "family", "parameters", "license", "how it is obtained"))
    for entry in named:
        row = [entry["name"], entry["family"], f"{entry['parameters']:,}", entry["license"], entry["obtained"]]
        table.add_row(*row)
    console.print(table)
    # What is promised of all alike would leave no room for names on a narrow terminal.
    alike = ", ".join(f"{promise.name} {promise.claim}" for promise in PROMISES if promise.claim)
    differing = [promise.name for promise in PROMISES if not promise.claim]
    columns = ("family", "model_type in config.json", *differing)
    table = result_table("families: any folder or hub id with safetensors", columns)
    table.caption, table.caption_justify = (
        f"all of them: {alike}; each is a test, which --json names. Exports of Llamas in all but name need "
        "attention without windows and rotation of whole heads, else they are approximate",
        "left",
    )
    for family in families:
        row = [family["name"], ", ".join(family["model_types"]), *(family[name] for name in differing)]
        table.add_row(*row)
    console.print(table)
