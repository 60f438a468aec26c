"""``tpatch bank …``: parses what the command line says, calls the library, shows the result."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.text import Text

from tpatch_jax.bank import creating, editing, sharing
from tpatch_jax.bank import repair as repairing
from tpatch_jax.bank.adding import AddInfo
from tpatch_jax.bank.changing import ChangeInfo, check_named, undoes_last
from tpatch_jax.bank.inspection import open_bank
from tpatch_jax.bank.state import Bank, BankEdit, find, states
from tpatch_jax.cli.commands import load, preset_of, requests_of
from tpatch_jax.core.layers import count_neurons
from tpatch_jax.display.console import format_count, print_json, progress_bar, result_console, result_table
from tpatch_jax.editors.tpatcher.settings import PRESETS
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.model import Model, save_model
from tpatch_jax.models.patching import merge as merge_patch
from tpatch_jax.storage.files import check_vacant
from tpatch_jax.storage.process import prepare_process
from tpatch_jax.storage.request_file import read_requests
from tpatch_jax.storage.settings import change, split_changes

__all__ = [
    "add",
    "change_edits",
    "diff",
    "guard",
    "init",
    "list_edits",
    "log",
    "merge",
    "pull",
    "push",
    "repair",
    "show",
    "verify",
]

SHOWN = 20
"""So many ids of new edits are printed at most."""


def _show(lines: Sequence[str]) -> None:
    console = result_console()
    for line in lines:
        console.print(line, soft_wrap=True)


def _load(bank: Bank, model: str | None, quiet: bool) -> Model:
    prepare_process()
    return creating.load_banked_model(bank, model, quiet=quiet)


def init(
    folder: str, model: str, *, preset: str | None, config: str | None, changes: Sequence[str], memory: str | None,
    dtype: str | None, json: bool, quiet: bool,
) -> None:  # fmt: skip
    """``tpatch bank init``."""
    check_vacant(Path(folder))
    name, values = preset_of(preset, config)
    values |= split_changes(changes)
    change(PRESETS[name], values)
    bank = creating.create_bank(folder, load(model, dtype, quiet or json), preset=name, settings=values, memory=memory)
    if json:
        print_json({"bank": folder, "model": bank.manifest["model"]})
    else:
        _show([f"{escape(folder)}: an empty bank for {escape(bank.manifest['model']['name'])}"])


def add(
    folder: str, requests: str | None, *, single: tuple[str | None, str | None, str | None], batch: int, resume: bool,
    force: bool, model: str | None, seed: int, json: bool, quiet: bool,
) -> None:  # fmt: skip
    """``tpatch bank add``."""
    wanted = requests_of(requests, single, "add")
    loaded = _load(open_bank(folder), model, quiet or json)
    with progress_bar(quiet or json) as report:
        info = editing.add_edits(
            folder, loaded, wanted, batch=batch, resume=resume, force=force, seed=seed, progress=report
        )
    if json:
        print_json(added_json(info))
    else:
        _show_added(folder, info)
    if info.failed and not (info.added or info.already or info.skipped):
        raise TPatchError(f"nothing is added to {folder}: every request failed, for the reasons given")


def _show_added(folder: str, info: AddInfo) -> None:
    place, more = escape(folder), len(info.added) - SHOWN
    _show(
        [
            f"added to {place}: {len(info.added)} (batches: {len(info.batches)}, {info.seconds:.1f} s)",
            *(escape(name) for name in info.added[:SHOWN]),
            *([f"and {more} more; see `tpatch bank list {place}`"] * (more > 0)),
            *([f"{info.skipped} were there already"] if info.skipped else []),
            *(f"{escape(new)} supersedes {escape(old)}" for old, new in info.superseded),
            *([f"fitted again: {escape(', '.join(info.refitted))}"] if info.refitted else []),
            *(f"[red]failed[/red] {escape(name)}: {escape(reason)}" for name, _, _, reason in info.failed),
            *(f"[red]broken[/red] {escape(name)}" for name in info.broken),
            *(f"[red]changed[/red] the guarded answer after {escape(prompt)!r}" for prompt in info.guards_broken),
        ]
    )


def added_json(info: AddInfo) -> dict[str, Any]:
    """The object that ``tpatch bank add --json`` ends with."""
    return {
        "added": list(info.added),
        "already": list(info.already),
        "superseded": [{"id": old, "by": new} for old, new in info.superseded],
        "refitted": list(info.refitted),
        "gave_way": list(info.gave_way),
        "failed": [dict(zip(("id", "prompt", "target", "reason"), entry, strict=True)) for entry in info.failed],
        "skipped": info.skipped,
        "broken": list(info.broken),
        "guards_broken": list(info.guards_broken),
        "batches": [
            {"added": added, "active": active, "seconds": round(seconds, 3)} for added, active, seconds in info.batches
        ],
        "seconds": round(info.seconds, 3),
    }


def change_edits(kind: str, folder: str, ids: Sequence[str], *, model: str | None, json: bool, quiet: bool) -> None:
    """``tpatch bank disable``, ``enable`` and ``remove``."""
    check_named(folder, kind, ids)
    bank = open_bank(folder)
    edits = find(bank, ids)
    # What only undoes the last additions needs no model.
    exact = kind == "remove" and not any(edit.removed for edit in edits) and undoes_last(bank, ids)
    loaded = None if exact else _load(bank, model, quiet or json)
    run = {"disable": editing.disable_edits, "enable": editing.enable_edits, "remove": editing.remove_edits}[kind]
    with progress_bar(quiet or json) as report:
        info = run(folder, ids, loaded, progress=report)
    if json:
        print_json(_changed_json(info))
        return
    _show(
        [
            *(f"{escape(name)} is {state}" for name, state in info.states.items()),
            *([] if info.states else ["nothing to change"]),
            *([f"fitted again: {escape(', '.join(info.refitted))}"] if info.refitted else []),
            *(f"[red]broken[/red] {escape(name)}" for name in info.broken or ()),
            *(f"[red]changed[/red] the guarded answer after {escape(prompt)!r}" for prompt in info.guards_broken or ()),
        ]
    )


def _changed_json(info: ChangeInfo) -> dict[str, Any]:
    broken, changed = (None if names is None else list(names) for names in (info.broken, info.guards_broken))
    found = {"ids": list(info.ids), "states": info.states, "refitted": list(info.refitted)}
    return {**found, "broken": broken, "guards_broken": changed}


def _entry(edit: BankEdit, state: str) -> dict[str, Any]:
    request = edit.request
    entry: dict[str, Any] = {"id": edit.id, "prompt": request.prompt, "target": request.target, "state": state}
    if request.subject is not None:
        entry["subject"] = request.subject
    neurons = len(edit.fits[-1][1]) if edit.fits else 0
    return {**entry, "neurons": neurons, "fits": len(edit.fits), "added": edit.added, **edit.evidence}


def list_edits(folder: str, *, json: bool) -> None:
    """``tpatch bank list``."""
    bank = open_bank(folder)
    found = states(bank)
    entries = [_entry(edit, found[edit.id]) for edit in bank.edits]
    if json:
        guards = [guard._asdict() for guard in bank.guards]
        print_json({"model": dict(bank.manifest["model"]), "edits": entries, "guards": guards})
        return
    name = bank.manifest["model"]["name"]
    columns = ("id", "prompt", "target", "state", "neurons")
    table = result_table(f"{folder}: {format_count(len(entries), 'edit')} of {name}", columns)
    for entry in entries:
        table.add_row(*(Text(str(entry[name])) for name in columns))
    result_console().print(table)


def show(folder: str, name: str, *, json: bool) -> None:
    """``tpatch bank show``."""
    bank = open_bank(folder)
    (edit,) = find(bank, [name])
    lines = [
        record
        for record in bank.records
        if name in record.get("ids", ())
        or any(name == entry["id"] for key in ("edits", "refitted") for entry in record.get(key, ()))
        or any(name in (entry["id"], entry["by"]) for entry in record.get("superseded", ()))
        or name in record.get("gave_way", ())
    ]
    entry = _entry(edit, states(bank)[name])
    history = [{"n": line["n"], "op": line["op"], "time": line["time"], "who": line["who"]} for line in lines]
    if json:
        print_json({**entry, "history": history})
        return
    _show([f"[bold]{key}[/bold] {escape(str(value))}" for key, value in entry.items()])
    _show([f"line {line['n']}: {line['op']} {line['time']} by {escape(line['who'])}" for line in history])


def log(folder: str, *, json: bool) -> None:
    """``tpatch bank log``."""
    bank = open_bank(folder)
    if json:
        print_json({"records": [dict(record) for record in bank.records]})
        return
    for record in bank.records:
        what = ", ".join(entry["id"] for entry in record.get("edits", ())) or ", ".join(record.get("ids", ()))
        what = what or ", ".join(entry["prompt"] for entry in record.get("guards", ()))
        more = [f"{len(record[key])} {key}" for key in ("superseded", "refitted", "failed") if record.get(key)]
        _show([f"{record['n']:>5} {record['time']} {escape(record['who'])} {record['op']:8} {escape(what)} "
               f"{'; '.join(more)}".rstrip()])  # fmt: skip


def verify(folder: str, *, model: str | None, json: bool, quiet: bool) -> None:
    """``tpatch bank verify``."""
    loaded = _load(open_bank(folder), model, quiet or json)
    with progress_bar(quiet or json) as report:
        info = editing.verify_bank(folder, loaded, progress=report)
    if json:
        print_json({name: list(v) if isinstance(v, tuple) else v for name, v in info._asdict().items()})
        return
    _show(
        [
            f"{info.checked - len(info.broken)} of {info.checked} edits come out",
            *(
                [f"{info.guards - len(info.guards_broken)} of {info.guards} guarded answers are kept"]
                * bool(info.guards)
            ),
            *(f"[red]broken[/red] {escape(name)}" for name in info.broken),
            *(f"[red]changed[/red] the guarded answer after {escape(prompt)!r}" for prompt in info.guards_broken),
        ]
    )


def guard(
    folder: str, *, prompts: Sequence[str], answer: str | None, file: str | None, tokens: int, lift: Sequence[str],
    model: str | None, json: bool, quiet: bool,
) -> None:  # fmt: skip
    """``tpatch bank guard``."""
    if answer is not None and len(prompts) != 1:
        raise TPatchError("--answer belongs to exactly one --prompt; put several into a --file of prompts and targets")
    wanted: list[str | tuple[str, str]] = [*prompts] if answer is None else [(prompts[0], answer)]
    if file is not None:
        wanted += [(request.prompt, request.target) for request in read_requests(file)]
    loaded = _load(open_bank(folder), model, quiet or json) if wanted else None
    guards = editing.guard_bank(folder, loaded, wanted, tokens=tokens, lift=lift)
    if json:
        print_json({"guards": [guard._asdict() for guard in guards]})
    else:
        _show([f"{escape(guard.prompt)} [bold]{escape(guard.answer.strip())}[/bold]" for guard in guards] or ["none"])


def merge(folder: str, output: str, *, model: str | None, json: bool, quiet: bool) -> None:
    """``tpatch bank merge``."""
    check_vacant(Path(output))
    loaded = _load(open_bank(folder), model, quiet or json)
    patches = editing.bank_patch(folder, loaded)
    merged, neurons = merge_patch(loaded, patches), count_neurons(patches)
    save_model(merged, output)
    added = merged.parameter_count - loaded.parameter_count
    if json:
        print_json({"output": output, "neurons": neurons, "parameters_added": added})
    else:
        _show([f"{format_count(neurons, 'neuron')} merged ({added:,} parameters) into {escape(output)}"])


def diff(left: str, right: str, *, json: bool) -> None:
    """``tpatch bank diff``."""
    found = sharing.diff_banks(left, right)
    if json:
        print_json(found._asdict())
        return
    _show(
        [
            *([] if found.same_model else ["[red]they are for different models[/red]"]),
            f"{found.common} lines of their journals are the same",
            *(f"- {escape(prompt)} [bold]{escape(target)}[/bold]" for prompt, target in found.only_left),
            *(f"+ {escape(prompt)} [bold]{escape(target)}[/bold]" for prompt, target in found.only_right),
            *(f"! {escape(prompt)} {escape(one)} | {escape(other)}" for prompt, one, other in found.targets),
            *(f"~ {escape(p)} {escape(t)}: {one} | {other}" for p, t, one, other in found.states),
        ]
    )


def pull(folder: str, source: str, *, json: bool) -> None:
    """``tpatch bank pull``."""
    _moved(folder, source, sharing.pull_bank(folder, source), json)


def push(folder: str, target: str, *, json: bool) -> None:
    """``tpatch bank push``."""
    _moved(target, folder, sharing.push_bank(folder, target), json)


def _moved(target: str, source: str, lines: int, json: bool) -> None:
    if json:
        print_json({"lines": lines})
    else:
        _show([escape(f"{target} grew by {lines} lines from {source}")])


def repair(folder: str, *, json: bool) -> None:
    """``tpatch bank repair``."""
    info = repairing.repair_bank(folder)
    if json:
        print_json(info._asdict())
        return
    again = f"tpatch bank add {folder} {info.lost_requests}"
    _show(
        [
            *(f"mended {escape(path)}" for path in info.mended),
            *([] if info.mended or info.lost_edits or info.lost_lines else ["nothing was damaged"]),
            *([f"[red]{info.lost_lines} lines of the journal are lost[/red]"] if info.lost_lines else []),
            *(f"[red]lost[/red] {escape(name)}" for name in info.lost_edits),
            *([f"add what was active again: {escape(again)}"] * bool(info.lost_requests)),
        ]
    )
