"""``tpatch eval``: settles the options, reads the records, evaluates, shows the report."""

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_args, get_type_hints

from tyro.conf import arg

from tpatch_jax.cli.common import Dtype, Json, MemoryText, ModelName, Preset, Quiet, Set, load, show_rows
from tpatch_jax.display.console import print_json, progress_bar, result_console
from tpatch_jax.errors import TPatchError
from tpatch_jax.requests import protect
from tpatch_jax.storage.reading import read_bytes

if TYPE_CHECKING:
    from tpatch_jax.evaluation.records import DataNotes, Record
    from tpatch_jax.models.model import Model

__all__ = ["Eval"]

TEXT, IMAGES = "text", "images"

DEFAULTS: Mapping[str, Any] = {
    "method": "tpatcher",
    "protocol": "batch",
    "seed": 0,
    "preset": "default",
    "reading": "easyedit",
    "text_tokens": 16384,
    "edits_data": "counterfact",
    "every": 50,
    "other_facts": 3,
    "samples": 0,
}
"""What holds where neither the command line nor a YAML file says anything."""

ONLY_HERE = ("model", "output", "config", "changes", "memory", "dtype", "json", "quiet")
"""What a YAML file cannot give; all others it may, by their names. ``memory`` is a setting there."""


@dataclass(frozen=True)
class Eval:
    """Measure what editing does, by a named protocol, and write a report."""

    model: ModelName
    _: KW_ONLY
    output: Annotated[
        str, arg(aliases=["-o"], metavar="REPORT", help="folder for the report; an interrupted run resumes")
    ]
    data: Annotated[
        str | None, arg(help="counterfact, zsre, knowedit, requests, mquake, fever, images, text or choices")
    ] = None
    file: Annotated[str | None, arg(metavar="FILE", help="the data set's file")] = None
    method: Annotated[str | None, arg(metavar="NAME[,…]", help="by default tpatcher")] = None
    protocol: Annotated[str | None, arg(help="single, batch (the default) or sequential")] = None
    n: Annotated[int | None, arg(aliases=["-n"], metavar="N", help="so many records from the start")] = None
    config: Annotated[
        str | None, arg(metavar="FILE", help="a YAML file of options and settings, such as those in configs/")
    ] = None
    preset: Preset = None
    changes: Set = ()
    seed: Annotated[int | None, arg(help="the same seed gives the same figures")] = None
    one_per_subject: Annotated[bool, arg(help="keep each subject's first record")] = False
    reading: Annotated[str | None, arg(help="of zsRE: easyedit (the default) or rome")] = None
    template: Annotated[str | None, arg(help="where questions go, with {} for the question")] = None
    text: Annotated[str | None, arg(metavar="FILE", help="a text file: adds perplexity and the certificate")] = None
    text_tokens: Annotated[int | None, arg(help="at most so many tokens of the text; 16384 by default")] = None
    edits: Annotated[str | None, arg(metavar="FILE", help="with --data text: what is edited; else nothing is")] = None
    edits_data: Annotated[str | None, arg(help="the data set of --edits; counterfact by default")] = None
    patches: Annotated[
        str | None,
        arg(metavar="PATCHES", help="with --data text or choices: what saved patches, or a bank's, do to it"),
    ] = None
    strict: Annotated[bool, arg(help="a record that cannot be read is an error; else it is passed over")] = False
    protect: Annotated[bool, arg(help="train on the locality prompts of requests too (tpatcher)")] = False
    generate: Annotated[bool, arg(help="also sample continuations for GE (slow)")] = False
    other_facts: Annotated[
        int | None, arg(metavar="N", help="so many other facts of each edited subject; 3 by default, 0 for none")
    ] = None
    forms: Annotated[
        str | None, arg(metavar="FORM[,…]", help="ask freely: bare, chat, long, chat-long, lower, chat-lower, …")
    ] = None
    samples: Annotated[int | None, arg(metavar="N", help="with --forms: so many drawn answers each, too")] = None
    every: Annotated[int | None, arg(help="sequential: ask all edits again every so many; 50 by default")] = None
    train_set: Annotated[
        str | None, arg(metavar="FILE", help="sequential: only asked, for TrainR; of an .npz its val part is for TestR")
    ] = None
    test_set: Annotated[str | None, arg(metavar="FILE", help="sequential: only asked, for TestR")] = None
    memory: MemoryText = None
    dtype: Dtype = None
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Evaluate the methods, write the report, and show it."""
        from tpatch_jax.evaluation.report import data_remarks, table

        options, _ = self.settle()
        if options["patches"] is not None:
            self._measure_patches(options)
            return
        result = self.evaluate()
        if self.json:
            print_json(result)
            return
        first = result["results"][0]
        title = f"{self.model}, protocol {first['protocol']}: {first['moment']}"
        show_rows(title, table([(of_method["method"], of_method) for of_method in result["results"]]))
        for remark in data_remarks(result):
            result_console().print(remark, markup=False)
        result_console().print(f"report in {self.output}", markup=False)

    def evaluate(self, model: "Model | None" = None) -> dict[str, Any]:
        """Evaluate the methods and write the report, which is returned.

        Args:
            model: the model, if it is loaded already.

        Raises:
            TPatchError: the options make no sense, or the evaluation fails.
        """
        from tpatch_jax.editors.registry import find_method, method_settings
        from tpatch_jax.evaluation.protocols import PROTOCOLS
        from tpatch_jax.evaluation.runner import evaluate

        options, changes = self.settle()
        if options["protocol"] not in PROTOCOLS:
            raise TPatchError(f"there is no protocol {options['protocol']!r}; choose from {', '.join(PROTOCOLS)}")
        methods = [name.strip() for name in options["method"].split(",") if name.strip()]
        edited = [find_method(name).name for name in methods if name != "unedited"]
        settings = method_settings(edited, options["preset"], changes)
        if options["data"] == IMAGES:
            # Files of pictures number the labels, which only the model can name.
            model = load(self.model, self.dtype, self.quiet or self.json) if model is None else model
            chosen = _choose_images(options, model.config.labels)
        else:
            chosen = _choose_records(options)
        if options["protect"]:
            chosen = _protected(chosen)
        about = chosen.about if self.dtype is None else {**chosen.about, "dtype": self.dtype}
        model = load(self.model, self.dtype, self.quiet or self.json) if model is None else model
        if model.audio is not None:
            raise TPatchError(
                f"{self.model!r} reads sound, which no protocol measures; `tpatch edit` says what became of it"
            )
        with progress_bar(self.quiet or self.json) as report:
            return evaluate(
                model,
                chosen.records,
                methods,
                options["protocol"],
                output=self.output,
                settings=settings,
                train=chosen.train,
                held_out=chosen.held_out,
                text=options["file"] if options["data"] == TEXT else options["text"],
                text_tokens=options["text_tokens"],
                memory=self.memory,
                generate=options["generate"],
                other_facts=options["other_facts"],
                forms=options["forms"] or (),
                samples=options["samples"],
                every=options["every"],
                seed=options["seed"],
                about=about,
                notes=chosen.notes,
                progress=report,
            )

    def _measure_patches(self, options: Mapping[str, Any]) -> None:
        """What patches that were saved do to running text, or to general ability."""
        from tpatch_jax.bank.editing import bank_patch
        from tpatch_jax.bank.inspection import open_bank
        from tpatch_jax.bank.layout import is_bank
        from tpatch_jax.bank.patches import load_patches, read_patches, saved_requests
        from tpatch_jax.bank.state import active
        from tpatch_jax.evaluation.choices import CHOICES, read_choices
        from tpatch_jax.evaluation.report import table
        from tpatch_jax.evaluation.saved_patches import evaluate_choices, evaluate_patches

        data, file = options["data"], options["file"]
        if data not in (TEXT, CHOICES) or file is None:
            raise TPatchError(
                "--patches are measured on running text or by multiple choice; give --data text or --data choices, and "
                "its --file"
            )
        if options["edits"] is not None:
            raise TPatchError("--patches are edits already; leave --edits out")
        path, quiet = Path(options["patches"]), self.quiet or self.json
        model = load(self.model, self.dtype, quiet)
        if is_bank(path):
            patches, edited = bank_patch(path, model), [edit.request for edit in active(open_bank(path))]
        else:
            patches, edited = load_patches(path, model), saved_requests(read_patches(path))
        subjects = [request.subject for request in edited if request.subject]
        questions = read_choices(file, options["n"], subjects=subjects) if data == CHOICES else ()
        about = {"data": data} | ({} if self.dtype is None else {"dtype": self.dtype})
        with progress_bar(quiet) as report:
            given: dict[str, Any] = {"output": self.output, "about": about, "progress": report}
            if data == CHOICES:
                result = evaluate_choices(model, patches, questions, **given)
            else:
                result = evaluate_patches(model, patches, file, text_tokens=options["text_tokens"], **given)
        figures = result["results"][1]["metrics"]
        if self.json:
            counts = {"n": len(questions)} if data == CHOICES else {}
            print_json({**counts, **figures, "neurons": result["results"][1]["neurons"], "report": self.output})
            return
        rows = [(of_method["method"], of_method) for of_method in result["results"]]
        show_rows(f"{self.model} on {file}", table(rows))
        if data == CHOICES:
            said = f"of {len(questions)} questions {figures['choices_points']:+.1f} in a hundred more are right"
        else:
            said = f"perplexity is {figures['perplexity_ratio']:.4f} times what it was"
        result_console().print(f"{said}; report in {self.output}", markup=False)

    def settle(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Options from the defaults, the YAML file and the command line, in this order, and changes of settings.

        Returns:
            The options by name (all fields but those that only the command line has), and changes for
            `tpatch_jax.editors.registry.method_settings`.

        Raises:
            TPatchError: a name in the file is neither an option nor a setting (the nearest is suggested), or a value
                has a wrong type.
        """
        from tpatch_jax.evaluation.records import QUESTION
        from tpatch_jax.storage.settings import combine, read_config, split_changes

        unset = {field.name: field.default for field in fields(self) if field.name not in ONLY_HERE}
        given = {name: getattr(self, name) for name in unset if getattr(self, name) != unset[name]}
        from_file: dict[str, Any] = {}
        changes: dict[str, Any] = {}
        for name, value in (read_config(self.config) if self.config else {}).items():
            if name in unset:
                kind = _kind(name)
                if type(value) is not kind:
                    raise TPatchError(f"{self.config}: {name} is {value!r}; give a value of type {kind.__name__}")
                from_file[name] = value
            else:
                # Options and settings are both known here, so the nearest name is sought among both.
                _check_name(str(name), list(unset), self.config)
                changes[name] = value
        options = {**unset, **DEFAULTS, "template": QUESTION, **from_file, **given}
        return options, combine(changes, split_changes(self.changes))


def _kind(name: str) -> type:
    """The type of an option that is given."""
    hint = get_type_hints(Eval)[name]
    return next((kind for kind in get_args(hint) if kind is not type(None)), hint)


def _check_name(name: str, options: Sequence[str], config: str | None) -> None:
    from tpatch_jax.editors.registry import METHODS
    from tpatch_jax.storage.settings import has_setting, known_names

    settings = {method: METHODS[method].presets["default"] for method in METHODS}
    method, _, rest = name.partition(".")
    if method in settings and rest:
        if has_setting(settings[method], rest):
            return
    elif any(has_setting(of_method, name) for of_method in settings.values()):
        return
    last = {dotted.rpartition(".")[2] for of_method in settings.values() for dotted in known_names(of_method)}
    known = sorted({*options, *last})
    near = difflib.get_close_matches(name.rpartition(".")[2], known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    raise TPatchError(f"{config}: there is no option or setting {name!r}; {hint}")


class _Chosen(NamedTuple):
    """Records that are edited, that are only asked for TrainR and TestR, and what the report says of them."""

    records: "list[Record]"
    train: "list[Record]"
    held_out: "list[Record]"
    about: dict[str, Any]
    notes: "DataNotes"


def _protected(chosen: _Chosen) -> _Chosen:
    """The same records, whose requests keep their locality prompts."""
    kept = iter(protect([request for record in chosen.records for request in record.requests]))
    records = [replace(record, requests=tuple(next(kept) for _ in record.requests)) for record in chosen.records]
    return chosen._replace(records=records, about={**chosen.about, "protect": True})


def _choose_records(options: Mapping[str, Any]) -> _Chosen:
    from tpatch_jax.evaluation.choices import CHOICES
    from tpatch_jax.evaluation.record import asked_only
    from tpatch_jax.evaluation.records import DATA, TEMPLATED, DataNotes, read_records

    data, file = options["data"], options["file"]
    if data is None:
        raise TPatchError(f"--data is missing; choose one of {', '.join((*DATA, IMAGES, TEXT, CHOICES))}")
    if data == CHOICES:
        raise TPatchError("--data choices measures what saved patches do; give --patches, a folder of them or a bank")
    if file is None:
        raise TPatchError(f"--file is missing; give the file of {data}")
    notes, strict = DataNotes(options["strict"]), options["strict"]
    about: dict[str, Any] = {"data": data, "data_sha256": _sha256(file)}
    if data != TEXT and options["edits"] is not None:
        raise TPatchError(f"--edits belongs to --data text; the edits of {data} are in --file")
    if data == TEXT:
        if options["text"] is not None:
            raise TPatchError("with --data text the text is --file; leave --text out")
        if options["edits"] is None:
            return _Chosen([], [], [], about, notes)
        data, file = options["edits_data"], options["edits"]
        about |= {"edits_data": data, "edits_sha256": _sha256(file)}
    n, subject, reading, template = (options[name] for name in ("n", "one_per_subject", "reading", "template"))
    about["one_per_subject"] = subject
    if data in TEMPLATED:
        about["template"] = template
    if data == "zsre":
        about["reading"] = reading
    chosen = read_records(data, file, n, subject, reading, template, notes=notes)
    notes.tell(file)
    held_out: list[Record] = []
    if options["protocol"] == "sequential" and n is not None:
        # Read once more, and said once.
        held_out = read_records(data, file, None, subject, reading, template, notes=DataNotes(strict))[n : 2 * n]
        # Claims come with their true labels, so those that are not edited are a test set.
        held_out = asked_only(held_out) if data == "fever" else held_out
    sets: list[list[Record]] = []
    for name in ("train_set", "test_set"):
        path = options[name]
        if path is not None and options["protocol"] != "sequential":
            raise TPatchError(
                f"--{name.replace('_', '-')} makes TrainR or TestR of a stream; use --protocol sequential"
            )
        others = read_records(data, path, None, False, reading, template, strict=strict) if path is not None else []
        sets.append(asked_only(others))
        about |= {f"{name}_sha256": _sha256(path)} if path is not None else {}
    return _Chosen(chosen, sets[0], sets[1] or held_out, about, notes)


def _choose_images(options: Mapping[str, Any], labels: Sequence[str]) -> _Chosen:
    """Pictures of an ``.npz``: those that are edited, and those of the training set, whose held part is for TestR."""
    from tpatch_jax.evaluation.image_records import read_image_records
    from tpatch_jax.evaluation.record import asked_only
    from tpatch_jax.evaluation.records import DataNotes
    from tpatch_jax.storage.image_file import read_image_file

    file, n = options["file"], options["n"]
    if file is None:
        raise TPatchError("--file is missing; give an .npz with stream_images and stream_labels")
    if not labels:
        raise TPatchError("pictures are the data of a classifier; give one that reads images")
    about: dict[str, Any] = {"data": IMAGES, "data_sha256": _sha256(file)}
    records = read_image_records(file, labels)
    if n is not None and not 1 <= n <= len(records):
        raise TPatchError(f"{file} holds {len(records)} pictures, but {n} were asked for; ask for 1 to {len(records)}")
    train, held_out = options["train_set"], options["test_set"]
    for name, path in (("train-set", train), ("test-set", held_out)):
        if path is not None and options["protocol"] != "sequential":
            raise TPatchError(f"--{name} makes TrainR or TestR of a stream; use --protocol sequential")
        about |= {f"{name.replace('-', '_')}_sha256": _sha256(path)} if path is not None else {}
    asked: list[list[Record]] = [[], []]
    if train is not None:
        asked[0] = asked_only(read_image_records(train, labels, ("train", "val", "stream"), rules=False))
        if held_out is None and "val" in read_image_file(train) and asked[0][0].id.startswith("train"):
            asked[1] = asked_only(read_image_records(train, labels, ("val",), rules=False))
    if held_out is not None:
        asked[1] = asked_only(read_image_records(held_out, labels, ("val", "stream", "train"), rules=False))
    return _Chosen(records[:n], asked[0], asked[1], about, DataNotes(options["strict"], len(records)))


def _sha256(file: str) -> str | None:
    try:
        return hashlib.sha256(read_bytes(file)).hexdigest()
    except OSError:
        return None  # The reader says what is wrong with it.
