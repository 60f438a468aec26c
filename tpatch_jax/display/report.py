"""What an evaluation found, as tables and pictures."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree.ElementTree import Element

from tpatch_jax.display.image import picture
from tpatch_jax.display.markup import Child, bar, code, element, figures, number, shorten, table
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.forms import FORM_FIGURES
from tpatch_jax.evaluation.pictures import SHARES, draw_report
from tpatch_jax.evaluation.report import BEFORE_AFTER, CLEAN, FIGURES, as_wanted, data_remarks, worst_first
from tpatch_jax.evaluation.report import table as figure_rows
from tpatch_jax.evaluation.subject_specificity import FIGURES as OF_FACTS

__all__ = ["read_lines", "report_title", "report_view"]

MOST_RECORDS = 300
FAMILIES = ("GR_", "generalization_", "specificity_")
"""How the names of further shares begin."""
FREE = (*(f"_{figure}" for figure in FORM_FIGURES if figure != "fluency"), "_unchanged")
"""How the names of shares of free answers end."""
PICTURES: Mapping[str, tuple[str, str]] = {
    "curves": ("Over the stream", "lines: shares right after each edit, retained, and unchanged elsewhere, over edits"),
    "before-after": ("Probability per target token", "histograms: the edit, rephrasings and elsewhere, by method"),
    "activations": ("Activations", "heat map: strongest activation of each edit's neurons on each edit prompt"),
    "cost": ("What it cost", "bars: seconds, forward equivalents per request and parameters added, by method"),
}


def report_title(report: Mapping[str, Any]) -> str:
    """What was measured, in one line."""
    config = report["config"]
    return f"Report: {', '.join(config['methods']) or 'unedited'} on {Path(config['model']).name}"


def read_lines(folder: Path, report: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The records of each method, as far as they are there.

    Raises:
        TPatchError: a file of them is damaged.
    """
    lines_of = {}
    for result in report["results"]:
        path = folder / f"records-{Path(result['method']).name}.jsonl"
        try:
            lines = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
            if not all(isinstance(line["id"], str) for line in lines):
                raise ValueError("an id is no text")
        except FileNotFoundError:
            lines = []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TPatchError(f"{path} is damaged ({error!r}); evaluate again") from None
        lines_of[result["method"]] = lines
    return lines_of


def _figures(report: Mapping[str, Any]) -> Element:
    results = report["results"]
    costs = {name for result in results for name in result["cost"]}
    heads = ["", *(result["method"] for result in results)]
    parts: dict[bool, list[list[Child]]] = {False: [], True: []}
    for name, *values in figure_rows([(result["method"], result) for result in results])[1:]:
        row: list[Child] = [element("td", code(name))]
        for value, result in zip(values, results, strict=True):
            is_share = name.removesuffix(CLEAN) in SHARES or name.startswith(FAMILIES) or name.endswith(FREE)
            share = result["metrics"].get(name) if is_share else None
            row.append(element("td", value, class_="number", style=None if share is None else bar(share)))
        parts[name in costs].append(row)
    tables = [table(heads, rows, numbers=heads[1:]) for rows in parts.values()]
    return element("div", *tables, class_="pictures")


def _data(report: Mapping[str, Any]) -> list[Child]:
    """What there is to say of the data, and the probes by kind; nothing in a report of an earlier version."""
    parts: list[Child] = []
    if remarks := data_remarks(report):
        parts += [element("h2", "The data"), element("ul", *(element("li", remark) for remark in remarks))]
    if report.get("probes"):
        counts = ("all", "contaminated")
        rows = [[kind, *(number(count[name]) for name in counts)] for kind, count in report["probes"].items()]
        parts.append(table(["probes", *counts], rows, numbers=counts))
    return parts


def _pictures(folder: Path, report: Mapping[str, Any], lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> Element:
    """The pictures beside the report; drawn anew where there are none, if matplotlib is there."""
    with TemporaryDirectory() as temporary:
        paths = sorted(folder.glob("*.png"))
        if not paths:
            paths = [Path(temporary) / name for name in draw_report(Path(temporary), report, lines)]
        drawn = []
        for kind, (title, described) in PICTURES.items():
            for path in paths:
                if path.stem == kind or path.stem.startswith(f"{kind}-"):
                    method = path.stem[len(kind) + 1 :]
                    content = base64.b64encode(path.read_bytes()).decode()
                    source = f"data:image/png;base64,{content}"
                    image = element("img", src=source, alt=f"{title}{f', {method}' * bool(method)}; {described}")
                    caption = element("h3", title + f": {method}" * bool(method))
                    drawn.append(element("figure", caption, element("div", image, class_="scroll", tabindex="0")))
    return element("div", *drawn)


def _mark(figure: Any) -> Child:
    if figure is None:
        return None
    if figure in (0, 1):
        return element("td", "yes" if figure else "no", class_="good" if figure else "bad")
    return number(figure)


def _request_cells(line: Mapping[str, Any]) -> list[Child]:
    """What was asked of a record, and what the model said before and says after."""
    asked = line.get("asked") or ()
    cells = []
    for name in ("prompt", "target", "before", "after"):
        # Reports of earlier versions do not hold these.
        texts = [str(request[name]).strip() for request in asked if request.get(name) is not None]
        cells.append("\n".join(shorten(text) for text in texts))
    return cells


def _image(line: Mapping[str, Any]) -> Child:
    """The picture of an edited record, and what of it makes its neurons fire; nothing of other records."""
    image = line.get("image") or {}
    return element("td", picture(image.get("picture", ""), image.get("effect"))) if image else None


def _probes(line: Mapping[str, Any]) -> Child:
    """Every prompt that a record asks, folded away; what is not as it should be first."""
    probes = line.get("probes") or ()
    if not probes:
        return None
    rows = []
    for probe in sorted(probes, key=as_wanted):
        marks = [_mark(int(probe[name])) if "target" in probe else "" for name in ("before", "after")]
        rows.append(
            [probe["kind"], probe["prompt"], probe.get("target", ""), *marks, "yes" if probe["changed"] else "no"]
        )
    heading = f"{sum(map(as_wanted, probes))} of {len(probes)} as wanted"
    columns = ["kind", "prompt", "target", "said before", "said after", "changed"]
    return element("td", element("details", element("summary", heading), table(columns, rows)))


def _other_facts(line: Mapping[str, Any]) -> Child:
    """What became of other facts about the subject, folded away; what says the new target first."""
    facts = line.get("other_facts") or ()
    if not facts:
        return None
    rows = []
    for fact in sorted(facts, key=lambda fact: (not fact["target_said"], fact["first_token_kept"])):
        marks = ["yes" if fact[name] else "no" for name in OF_FACTS]
        rows.append([fact["form"], fact["prompt"], fact["before"].strip(), fact["after"].strip(), *marks])
    heading = f"{sum(fact['first_token_kept'] for fact in facts)} of {len(facts)} begin as before"
    columns = ["form", "prompt", "before", "after", *(name.replace("_", " ") for name in OF_FACTS)]
    return element("td", element("details", element("summary", heading), table(columns, rows)))


def _records(report: Mapping[str, Any], lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Child]:
    before = {line["id"]: line.get("figures", {}) for line in lines.get("unedited", ())}
    parts: list[Child] = []
    for result in report["results"]:
        measured = lines[result["method"]] if result["method"] != "unedited" else ()
        ordered = worst_first(measured)[:MOST_RECORDS]
        names = [name for name in ("exact", "generalization", "locality", "ES", "PS", "NS", "subject_specificity")
                 if any(name in line.get("figures", {}) for line in ordered)]  # fmt: skip
        images, rows = any("image" in line for line in ordered), []
        for line in ordered:
            statuses = line.get("requests") or (line.get("cost") or {}).get("requests", ())
            reasons = "; ".join(status.get("reason") or status["status"] for status in statuses)
            if line.get("wrong") is False:
                reasons = "was right, left alone"
            shares = line.get("figures", {})
            was = before.get(line["id"], {}).get("exact")
            marks = [_mark(was), *(_mark(shares.get(name)) for name in names)]
            seen = [_image(line)] if images else []
            rows.append([line["id"], *seen, *_request_cells(line), reasons, *marks, _probes(line), _other_facts(line)])
        if rows:
            left = f"; {len(measured) - len(rows):,} more are in records-{result['method']}.jsonl"
            columns = [
                "id",
                *(["picture, and what makes the neuron fire"] if images else []),
                "prompt",
                "target",
                "before",
                "after",
                "what became of it",
                "exact before",
                *names,
                "all prompts",
                "other facts about the subject",
            ]
            parts += [
                element("h2", f"Records: {result['method']}"),
                element("p", "What failed first" + left * (len(measured) > len(rows)) + ". " + BEFORE_AFTER),
                table(columns, rows, numbers=names),
            ]
    return parts


def report_view(folder: Path, report: Mapping[str, Any]) -> list[Child]:
    """All there is to see of an evaluation.

    Args:
        folder: the report folder, for records and pictures.
        report: as `tpatch_jax.evaluation.report.read_report` reads it.

    Returns:
        What follows the title: the setting, figures, pictures, records, and how it was made.
    """
    config, results, lines = report["config"], report["results"], read_lines(folder, report)
    about = {
        "data": str(config.get("data", "")),
        "protocol": results[0]["protocol"],
        "records": number(config["n"]),
        "model": Path(config["model"]).name,
        "seed": number(config["seed"]),
    }
    if config.get("text"):
        about["tokens of running text, at most"] = number(config["text"]["tokens"])
    parts: list[Child] = [
        figures(about),
        element("p", f"Measured {results[0]['moment']}."),
        _figures(report),
        element("p", FIGURES.replace("`", ""), class_="faint"),
        *_data(report),
    ]
    for result in results[1:]:
        status = ", ".join(f"{number(count)} {name}" for name, count in result.get("requests", {}).items())
        parts.append(element("p", f"{result['method']}: of the requests, {status}.") if status else None)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    settings = json.dumps(config, ensure_ascii=False, indent=1)
    return [
        *parts,
        element("h2", "Pictures"),
        _pictures(folder, report, lines),
        *_records(report, lines),
        element("h2", "How it was made"),
        element("p", f"Data SHA-256 {report['data_sha256']}. {versions}."),
        element("details", element("summary", "all settings"), element("pre", settings, tabindex="0")),
    ]
