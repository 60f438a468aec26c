"""What ``tpatch eval``, ``tpatch compare`` and ``tpatch sweep`` do: settle the options, load, evaluate, show."""

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from rich.text import Text

from tpatch_jax.cli import commands
from tpatch_jax.display.console import format_count, print_json, progress_bar, result_console, result_table
from tpatch_jax.editors.registry import METHODS, find_method, method_settings
from tpatch_jax.editors.tpatcher.subject_site import POSITIONS
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.pictures import draw_comparison
from tpatch_jax.evaluation.protocols import PROTOCOLS
from tpatch_jax.evaluation.record import asked_only
from tpatch_jax.evaluation.records import DATA, QUESTION, TEMPLATED, Record, read_records
from tpatch_jax.evaluation.report import comparison, read_report, table
from tpatch_jax.evaluation.runner import evaluate
from tpatch_jax.evaluation.sweep import best, sweep, write_sweep
from tpatch_jax.storage.files import check_vacant, replace_folder
from tpatch_jax.storage.request_file import read_requests
from tpatch_jax.storage.settings import known_names, read_config, split_changes

__all__ = ["Options", "compare", "evaluate_command", "settle", "sweep_command"]

TEXT = "text"


@dataclass(frozen=True)
class Options:
    """What an evaluation is made of; a YAML file may hold each by its name, beside settings of the methods.

    Attributes:
        data: the data set, one of `tpatch_jax.evaluation.records.DATA` or ``text``.
        file: its file.
        method: names with commas between them.
        protocol: ``single``, ``batch`` or ``sequential``.
        n: how many records; all if ``None``.
        seed: for everything random.
        preset: of the methods' settings.
        one_per_subject: keep each subject's first record.
        reading: of zsRE.
        template: where questions go.
        text: a text file for perplexity and the certificate.
        text_tokens: how much of it.
        edits: with ``data: text``, the file of the edits.
        edits_data: its data set.
        generate: measure GE.
        every: after so many edits of a stream all edits so far are asked again.
        train_set: a file of the same data set whose records are only asked, for TrainR.
        test_set: the same for TestR; by default the records after those that are edited.
    """

    data: str | None = None
    file: str | None = None
    method: str = "tpatcher"
    protocol: str = "batch"
    n: int | None = None
    seed: int = 0
    preset: str = "default"
    one_per_subject: bool = False
    reading: str = "easyedit"
    template: str = QUESTION
    text: str | None = None
    text_tokens: int = 16384
    edits: str | None = None
    edits_data: str = "counterfact"
    generate: bool = False
    every: int = 50
    train_set: str | None = None
    test_set: str | None = None


_KINDS = {"n": int, "seed": int, "text_tokens": int, "every": int, "one_per_subject": bool, "generate": bool}


def settle(
    given: Mapping[str, Any], config: str | None = None, changes: Sequence[str] = ()
) -> tuple[Options, dict[str, Any]]:
    """Options from the defaults, a YAML file and the command line, in this order; what is left are settings.

    Args:
        given: from the command line, by name; ``None`` where it says nothing.
        config: the YAML file, with options and settings by name.
        changes: ``name=value`` changes of settings.

    Returns:
        The options, and the methods' settings by name.

    Raises:
        TPatchError: a name is neither an option nor a setting (the nearest is suggested), or a value has a wrong
            type.
    """
    values = read_config(config) if config else {}
    names = [field.name for field in fields(Options)]
    found, settings = {}, {}
    for name, value in values.items():
        if name in names:
            kind = _KINDS.get(name, str)
            if type(value) is not kind:
                raise TPatchError(f"{config}: {name} is {value!r}; give a value of type {kind.__name__}")
            found[name] = value
        else:
            # Options and settings are both known here, so the nearest name is sought among both.
            _check_name(str(name), names, config)
            settings[name] = value
    found |= {name: value for name, value in given.items() if value is not None}
    return Options(**found), {**settings, **split_changes(changes)}


def _check_name(name: str, options: Sequence[str], config: str | None) -> None:
    settings = {known for method in METHODS.values() for known in known_names(method.presets["default"])}
    known = sorted({*options, *settings})
    if name.rpartition(".")[2] not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        raise TPatchError(f"{config}: there is no option or setting {name!r}; {hint}")


class _Chosen(NamedTuple):
    """Records that are edited, that are only asked for TrainR and TestR, and what the report says of them."""

    records: list[Record]
    train: list[Record]
    held_out: list[Record]
    about: dict[str, Any]


def _records(options: Options) -> _Chosen:
    data, file = options.data, options.file
    if data is None:
        raise TPatchError(f"--data is missing; choose one of {', '.join((*DATA, TEXT))}")
    if file is None:
        raise TPatchError(f"--file is missing; give the file of {data}")
    about: dict[str, Any] = {"data": data, "data_sha256": _sha256(file)}
    if data != TEXT and options.edits is not None:
        raise TPatchError(f"--edits belongs to --data text; the edits of {data} are in --file")
    if data == TEXT:
        if options.text is not None:
            raise TPatchError("with --data text the text is --file; leave --text out")
        if options.edits is None:
            return _Chosen([], [], [], about)
        data, file = options.edits_data, options.edits
        about |= {"edits_data": data, "edits_sha256": _sha256(file)}
    subject = options.one_per_subject
    about["one_per_subject"] = subject
    if data in TEMPLATED:
        about["template"] = options.template
    if data == "zsre":
        about["reading"] = options.reading
    chosen = read_records(data, file, options.n, subject, options.reading, options.template)
    held_out: list[Record] = []
    if options.protocol == "sequential" and options.n is not None:
        every = read_records(data, file, None, subject, options.reading, options.template)
        held_out = every[options.n : 2 * options.n]
        # Claims come with their true labels, so those that are not edited are a test set.
        held_out = asked_only(held_out) if data == "fever" else held_out
    sets: list[list[Record]] = []
    for name in ("train_set", "test_set"):
        path = getattr(options, name)
        if path is not None and options.protocol != "sequential":
            raise TPatchError(
                f"--{name.replace('_', '-')} makes TrainR or TestR of a stream; use --protocol sequential"
            )
        found = read_records(data, path, None, False, options.reading, options.template) if path is not None else []
        sets.append(asked_only(found))
        about |= {f"{name}_sha256": _sha256(path)} if path is not None else {}
    return _Chosen(chosen, sets[0], sets[1] or held_out, about)


def _sha256(file: str) -> str | None:
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError:
        return None  # The reader says what is wrong with it.


def evaluate_command(
    model: str,
    given: Mapping[str, Any],
    output: str,
    *,
    config: str | None,
    changes: Sequence[str],
    memory: str | None,
    dtype: str | None,
    json: bool,
    quiet: bool,
) -> None:
    """``tpatch eval``."""
    options, settings = settle(given, config, changes)
    if options.protocol not in PROTOCOLS:
        raise TPatchError(f"there is no protocol {options.protocol!r}; choose from {', '.join(PROTOCOLS)}")
    methods = [name.strip() for name in options.method.split(",") if name.strip()]
    used = method_settings([find_method(n).name for n in methods if n != "unedited"], options.preset, settings)
    chosen = _records(options)
    records, about = chosen.records, chosen.about
    if dtype is not None:
        about["dtype"] = dtype
    loaded = commands.load(model, dtype, quiet or json)
    with progress_bar(quiet or json) as report:
        found = evaluate(
            loaded,
            records,
            methods,
            options.protocol,
            output=output,
            settings=used,
            train=chosen.train,
            held_out=chosen.held_out,
            text=options.file if options.data == TEXT else options.text,
            text_tokens=options.text_tokens,
            memory=memory,
            generate=options.generate,
            every=options.every,
            seed=options.seed,
            about=about,
            progress=report,
        )
    if json:
        print_json(found)
        return
    columns = [(result["method"], result) for result in found["results"]]
    title = f"{model}, protocol {options.protocol}: {found['results'][0]['moment']}"
    _show(title, table(columns))
    result_console().print(f"report in {output}", markup=False)


def _show(title: str, rows: Sequence[Sequence[str]]) -> None:
    shown = result_table(title, rows[0], rows[0][1:])
    for row in rows[1:]:
        shown.add_row(*map(Text, row))
    result_console().print(shown)


def compare(reports: Sequence[str], output: str | None, *, json: bool) -> None:
    """``tpatch compare``."""
    if not reports:
        raise TPatchError("nothing to compare; give one report folder or more")
    reports = list(dict.fromkeys(reports))
    names = _names(reports)
    found: Mapping[str, Any] = {name: read_report(folder) for name, folder in zip(names, reports, strict=True)}
    rows, columns = comparison(found)
    if output is not None:
        draw_comparison(Path(output), columns)
    if json:
        print_json({"columns": [{"name": name, **result} for name, result in columns]})
        return
    _show("reports side by side", rows)
    if output is not None:
        result_console().print(f"picture in {output}", markup=False)


def _names(folders: Sequence[str]) -> list[str]:
    short = [Path(folder).resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else list(folders)


def sweep_command(
    model: str,
    requests: str,
    output: str,
    *,
    layers: str | None,
    positions: str,
    n: int | None,
    config: str | None,
    changes: Sequence[str],
    memory: str | None,
    dtype: str | None,
    seed: int,
    json: bool,
    quiet: bool,
) -> None:
    """``tpatch sweep``."""
    wanted = read_requests(requests)
    if n is not None and not 0 < n <= len(wanted):
        raise TPatchError(f"-n {n}: {requests} has {len(wanted)} requests")
    wanted = wanted[:n]
    places = [position.strip() for position in positions.split(",")]
    for position in places:
        if position not in POSITIONS:
            raise TPatchError(f"position {position!r} does not exist; choose from {', '.join(POSITIONS)}")
    settings = commands.settings_of(None, config, changes)
    check_vacant(Path(output))
    loaded = commands.load(model, dtype, quiet or json)
    last = loaded.config.layers - 1
    try:
        heights = [int(layer) for layer in layers.split(",")] if layers else sorted({last * k // 8 for k in range(8)})
    except ValueError:
        raise TPatchError(f"--layers {layers!r} is no list of layers; write for instance 2,6,10") from None
    with progress_bar(quiet or json) as report:
        rows = sweep(loaded, wanted, settings, heights, places, memory=memory, seed=seed, progress=report)
    about = {"requests": Path(requests).name, "n": len(wanted), "seed": seed}
    with replace_folder(Path(output)) as folder:
        names = write_sweep(folder, loaded, rows, about)
    chosen = best(rows)
    if json:
        print_json({"rows": rows, "best": chosen, "files": [str(Path(output) / name) for name in names]})
        return
    heading = list(rows[0])
    texts = [
        [f"{v:.4g}" if isinstance(v, float) else "" if v is None else str(v) for v in row.values()] for row in rows
    ]
    _show(f"{model}: {format_count(len(wanted), 'request')} edited together at each site", [heading, *texts])
    said = f"best: layer {chosen['layer']}, at the {chosen['position']}'s last token; written to {output}"
    result_console().print(said, markup=False)
