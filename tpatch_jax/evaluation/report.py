"""The report of an evaluation: one JSON object, a page to read, pictures; and several reports side by side."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.forms import FORM_FIGURES, FORM_NAMES
from tpatch_jax.evaluation.pictures import draw_report
from tpatch_jax.evaluation.subject_specificity import FIGURES as OF_FACTS
from tpatch_jax.evaluation.subject_specificity import FORMS
from tpatch_jax.storage.files import write_text
from tpatch_jax.storage.folders import REPORT, describe_folder

__all__ = [
    "BEFORE_AFTER",
    "CLEAN",
    "FIGURES",
    "SCHEMA",
    "as_wanted",
    "comparison",
    "data_remarks",
    "differences",
    "markdown",
    "read_report",
    "shown",
    "table",
    "worst_first",
    "write_report",
]

SCHEMA = 1
"""The number of the report's form; another number means that older readers would misread it."""
FIGURES = (
    "Figures are means within a record, then over records, teacher-forced: of single tokens, except where a target "
    "counts only whole, as greedy decoding gives it: `exact` and the other `_exact` figures, `rewrite_acc`, "
    "`paraphrase_acc`, `neighborhood_acc`, SR, GR, ER, and `generalization_` of each kind of rephrasing. `mquake` and "
    "GE are of texts written freely. Figures that begin with a form (`bare_`, `chat_`, `chat_long_` …) are of answers "
    "that go on freely for at most 60 tokens: `free_running` (up to the natural stop, which comes, the target is said "
    "and nothing loops), `said` (the target is in the first 24 tokens), `said_first` (the answer begins with it), "
    "`ends` (the model ends by itself), `loops` (four tokens in a row come three times), `contradicts` (the old answer "
    "is said as well), `fluency` (GE's entropy of question and answer); `sampled_` ones are of tokens drawn at "
    "temperature 0.7. `chat_questions_unchanged` is the share of unrelated questions in a chat whose first 24 tokens "
    "are as before. `subject_specificity` is the share of other facts about the edited subjects whose "
    "first token is as before, said, asked and asked in chat; `specificity_` figures are those of each form: first "
    "token and first five tokens as before, and how often the new target is said within twelve tokens where it was not "
    "(the less the better). `seconds` and forward equivalents are those of editing (per request: seconds ÷ "
    "those of one forward pass over prompt and target); `token_forward_equivalents` is what a generated token costs "
    "afterwards: FLOPs of a prompt of median length and 16 tokens behind it, with whatever decides which edit answers, "
    "over those of the unedited model, after edited prompts and `_elsewhere`; `token_flops` is their number after "
    "edited prompts, divided by 16; `total_seconds` has the measuring too, and is of the last run "
    "if one was interrupted. `peak_memory_mib` is the most that the process held until then, for the methods before as "
    "well: evaluate a method alone to see its own. `_clean` beside a figure is the same without contaminated probes: "
    "prompts about something else that are edited themselves, and questions about what follows that name a new object. "
    "`undo` is whether one edit can be taken out again while others stay; `stock_checkpoint`, whether an edited model "
    "can be a checkpoint that needs nothing of this library. "
    "`other_images_changed` is the share of pictures that nobody edited whose label is another than before the stream."
)
"""What the figures of every report mean."""

BEFORE_AFTER = (
    "Before and after are what the model says of its own accord, up to the end of the sentence and in at most 16 "
    "tokens, of the first 300 records of the data."
)
"""What the texts of records mean."""
MOST_RECORDS = 20
"""So many records of a method stand in ``report.md``; all are in the files of records."""
LONGEST_TEXT = 80

FIRST = (
    *(f"{form.replace('-', '_')}_{figure}" for figure in FORM_FIGURES for form in FORM_NAMES),
    "chat_questions_unchanged",
    *("exact", "reliability", "generalization", "generalization_exact", "locality", "keep", "portability"),
    *("subject_specificity", *(f"specificity_{form}_{figure}" for form in FORMS for figure in OF_FACTS)),
    *("ES", "PS", "NS", "S", "EM", "PM", "NM", "rewrite_acc", "paraphrase_acc", "neighborhood_acc", "GE"),
    *("SR", "GR", "ER", "TrainR", "TestR", "mquake", "relation_specificity", "relation_specificity_acc"),
    *("perplexity", "next_token_agreement", "certificate_tokens", "certificate_prompts", "silent_tokens"),
)
COSTS = (
    *("seconds", "forward_equivalents", "fit_forward_equivalents", "token_forward_equivalents"),
    *("token_forward_equivalents_elsewhere", "token_flops", "held_at_start", "parameters_added"),
    *("total_seconds", "peak_memory_mib"),
)

CLEAN = "_clean"
"""How the name of a figure ends that leaves contaminated probes out."""

Rows = list[list[str]]


def write_report(folder: Path, report: dict[str, Any], lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write ``report.md``, pictures, and last ``report.json``, whose presence says that the folder is whole.

    Args:
        folder: the report folder, with ``records-METHOD.jsonl`` in it already.
        report: what `tpatch_jax.evaluation.runner.evaluate` returns.
        lines: the records of each method.

    Raises:
        TPatchError: the disk is full.
    """
    pictures = draw_report(folder, report, lines)
    try:
        write_text(folder / "report.md", markdown(report, pictures, lines))
        write_text(folder / REPORT, json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        raise TPatchError(f"cannot write {folder}: {error.strerror}; free some room and run again") from None


def read_report(folder: str | Path) -> dict[str, Any]:
    """The ``report.json`` of a folder.

    Raises:
        TPatchError: there is none, or it is damaged or of a newer schema.
    """
    path = Path(folder) / REPORT
    try:
        report = json.loads(path.read_text("utf-8"))
        schema, _ = report["schema"], [result["metrics"] for result in report["results"]]
    except FileNotFoundError:
        raise TPatchError(
            f"{folder} holds no {REPORT}; give a folder that `tpatch eval … -o REPORT` finished"
            f"{describe_folder(folder)}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TPatchError(f"{path} is damaged ({error!r}); evaluate again") from None
    if schema != SCHEMA:
        raise TPatchError(f"{path} was written by another version (schema {schema}); upgrade tpatch-jax")
    return report


def _ordered(names: Sequence[str], first: Sequence[str]) -> list[str]:
    ordered = [name for name in first if name in names] + [name for name in names if name not in first]
    clean = [name for name in ordered if name.endswith(CLEAN)]
    return [
        beside
        for name in ordered
        if name not in clean or name.removesuffix(CLEAN) not in names
        for beside in (name, *(of for of in clean if of == f"{name}{CLEAN}"))
    ]


def shown(value: Any) -> str:
    """A figure or a property as tables show it.

    Args:
        value: a number, whether something holds, a text, or ``None`` where there is nothing.

    Example:
        >>> shown(0.25), shown(12345.6), shown(True), shown(None)
        ('0.25', '12,346', 'yes', '')
    """
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(columns: Sequence[tuple[str, Mapping[str, Any]]]) -> Rows:
    """Results as columns, figures and costs as rows.

    Args:
        columns: heading and result of each.

    Returns:
        Rows of texts, the heading first.
    """
    rows = [["", *(name for name, _ in columns)], ["n", *(str(result["n"]) for _, result in columns)]]
    for part, first in (("metrics", FIRST), ("cost", COSTS)):
        names = list(dict.fromkeys(name for _, result in columns for name in result[part]))
        for name in _ordered(names, first):
            rows.append([name, *(shown(result[part].get(name)) for _, result in columns)])
    said = [result.get("properties") or {} for _, result in columns]
    for name in dict.fromkeys(name for properties in said for name in properties):
        rows.append([name, *(shown(properties.get(name)) for properties in said)])
    return rows


def _markdown_table(rows: Rows) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]])


def _one_line(value: Any) -> str:
    return str(value).replace("\n", "⏎")


def _about(config: Mapping[str, Any], protocol: str, moment: str) -> str:
    parts = [f"protocol **{protocol}** ({moment})"]
    parts += [
        f"{name} `{_one_line(config[name])}`"
        for name in ("data", "reading", "template", "one_per_subject")
        if name in config
    ]
    parts += [f"n = {config['n']}", f"seed {config['seed']}"]
    if config["activation"]:
        parts.append(f"patches attached with {config['activation']}")
    if config["text"]:
        text = config["text"]
        parts.append(f"perplexity over at most {text['tokens']} tokens in windows of {text['window']}")
    return ", ".join(parts)


def data_remarks(report: Mapping[str, Any]) -> list[str]:
    """What the data set's reader passed over and left out, and how many probes are contaminated, as sentences.

    Args:
        report: the report; one of an earlier version has nothing to say.
    """
    data, probes = report.get("data") or {}, report.get("probes") or {}
    said = []
    if data.get("passed_over"):
        first = next(iter(data["reasons"]), "")
        said.append(f"{data['passed_over']:,} of {data['records']:,} records passed over; the first: {first}")
    said += [f"{number:,} {what}" for what, number in data.get("counts", {}).items()]
    said += [
        f"{count['contaminated']:,} of {count['all']:,} {kind} probes are contaminated"
        for kind, count in probes.items()
        # The same prompts as those with the true target.
        if count["contaminated"] and kind != "neighborhood_new"
    ]
    return said


_UNWANTED = ("rewrite_true", "paraphrase_true", "neighborhood_new")
_KEPT = ("neighborhood_true", "locality_answer", "relation_specificity")


def as_wanted(probe: Mapping[str, Any]) -> bool:
    """Whether a prompt that a record asks is answered as it should be.

    What is asked of an edit says its target, and no longer the old one; elsewhere no answer changes, or none that was
    right is lost.

    Args:
        probe: as a record's ``probes`` hold it.
    """
    if probe["kind"] in _UNWANTED:
        return not probe["after"]
    if "target" not in probe or probe["kind"] == "locality":
        return not probe["changed"]
    return probe["after"] or (probe["kind"] in _KEPT and not probe["before"])


def worst_first(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Records as one looks for them: those that failed first, else in their order."""
    return sorted(lines, key=lambda line: line.get("figures", {}).get("exact", 1))


def _cell(text: Any) -> str:
    """A text as a cell of a Markdown table."""
    whole = "" if text is None else _one_line(str(text).strip())
    short = whole if len(whole) <= LONGEST_TEXT else whole[: LONGEST_TEXT - 1] + "…"
    return short.replace("\\", "\\\\").replace("|", "\\|")


def _record_rows(lines: Sequence[Mapping[str, Any]]) -> Rows:
    """The first records of a method: what was asked, what was said before and after, and how many prompts are amiss."""
    rows = [["id", "prompt", "target", "before", "after", "as wanted"]]
    for line in worst_first(lines)[:MOST_RECORDS]:
        probes = line.get("probes") or ()
        good = sum(map(as_wanted, probes))
        for number, request in enumerate(line.get("asked") or ()):
            cells = (_cell(request.get(name)) for name in ("prompt", "target", "before", "after"))
            rows.append([_cell(line["id"]), *cells, f"{good} of {len(probes)} prompts" if not number else ""])
    return rows


def markdown(
    report: Mapping[str, Any],
    pictures: Sequence[str] = (),
    lines: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> str:
    """The page to read.

    Args:
        report: the report.
        pictures: file names beside it.
        lines: the records of each method.
    """
    config, results = report["config"], report["results"]
    parts = [
        f"# {', '.join(config['methods']) or 'unedited'} on {config['model']}",
        _about(config, results[0]["protocol"], results[0]["moment"]) + ".",
        _markdown_table(table([(result["method"], result) for result in results])),
        FIGURES,
    ]
    if remarks := data_remarks(report):
        parts.append("\n".join(["The data:", "", *(f"- {_one_line(remark)}." for remark in remarks)]))
    if report.get("probes"):
        rows = [
            [kind, *(f"{count[name]:,}" for name in ("all", "contaminated"))]
            for kind, count in report["probes"].items()
        ]
        parts.append(_markdown_table([["probes", "all", "contaminated"], *rows]))
    for result in (result for result in results[1:] if result["requests"]):
        status = ", ".join(f"{count} {name}" for name, count in result["requests"].items())
        parts.append(f"{result['method']}: of the requests, {status}; records in `records-{result['method']}.jsonl`.")
    for result in results[1:]:
        rows = _record_rows((lines or {}).get(result["method"], ()))
        if len(rows) > 1:
            parts += [f"## Records: {result['method']}", f"What failed first. {BEFORE_AFTER}", _markdown_table(rows)]
    parts += [f"![{name}]({name})" for name in pictures]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    parts.append(f"Data sha256 `{report['data_sha256']}`. {versions}.")
    return "\n\n".join(parts) + "\n"


def comparison(reports: Mapping[str, Mapping[str, Any]]) -> tuple[Rows, list[tuple[str, Mapping[str, Any]]]]:
    """Several reports side by side; the unedited model once where reports agree on it.

    Args:
        reports: by the name of the folder.

    Returns:
        The table's rows, and its columns: heading and result.
    """
    columns: list[tuple[str, Mapping[str, Any]]] = []
    seen: list[tuple[Any, ...]] = []
    for name, report in reports.items():
        for result in report["results"]:
            if result["method"] == "unedited":
                same = (report["config"]["fingerprint"], report["data_sha256"], result["n"], result["metrics"])
                if same in seen:
                    continue
                seen.append(same)
                columns.append((f"{name}: unedited", result))
            else:
                columns.append((f"{name}: {result['method']}, {result['protocol']}", result))
    return table(columns), columns


def differences(
    reports: Mapping[str, Mapping[str, Any]], columns: Sequence[tuple[str, Mapping[str, Any]]]
) -> list[str]:
    """What a reader has to know who compares figures of several reports: where they are not of the same records.

    Args:
        reports: by the name of the folder.
        columns: what `comparison` makes of them.

    Returns:
        A sentence for each; none where they can be compared as they are.
    """
    remarks = []
    sizes: dict[int, list[str]] = {}
    for name, result in columns:
        sizes.setdefault(result["n"], []).append(name)
    if len(sizes) > 1:
        told = ". ".join(f"n = {size}: {'; '.join(names)}" for size, names in sorted(sizes.items()))
        remarks.append(f"Figures over different numbers of records cannot be compared as they are. {told}.")
    for key, marks in (
        ("data", {report.get("data_sha256") for report in reports.values()}),
        ("model", {report["config"].get("fingerprint") for report in reports.values()}),
    ):
        if len(marks) > 1:
            told = "; ".join(f"{name}: {report['config'].get(key)}" for name, report in reports.items())
            remarks.append(f"The {key} differs from report to report. {told}.")
    return remarks
