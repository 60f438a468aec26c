"""One table of all editing methods: the same model, records and questions, each method from its configuration.

A table has parts (records and a protocol) and rows (configurations); a cell is one evaluation with a report
folder, so an interrupted table goes on where it was and each cell can be had again by itself. Rows stand beside what
their authors report, of other models and more edits: that says what a method can do, not what it should do here.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.report import read_report, shown
from tpatch_jax.storage.files import check_vacant, write_text
from tpatch_jax.storage.finished_parts import check_same_run
from tpatch_jax.storage.folders import REPORT

__all__ = [
    "FULL",
    "QUICK",
    "ROWS",
    "Cell",
    "Part",
    "Table",
    "as_markdown",
    "cells",
    "fill_table",
    "find_file",
    "heading",
    "open_table",
    "read_table",
]

SCHEMA = 1

CONFIG = "configuration.yaml"
"""Beside a cell's report: what it was measured with."""

ROWS: Mapping[str, str] = {
    "ft": "",
    "ft-kl": "",
    "rome": "CounterFact, one edit at a time: GPT-J ES .999, PS .991, NS .789; GPT-2 XL 1.000, .964, .754",
    "r-rome": "GPT-J and GPT-2 XL, CounterFact one after the other: none of the collapses that ROME has",
    "memit": "thousands of edits at once, GPT-J and GPT-NeoX",
    "memit-aligned": "",
    "alphaedit": "CounterFact, 2,000 edits, 100 at a time, Llama-3-8B: efficacy .99, paraphrases .94, neighbours .68",
    "ultraedit": "20,000 edits in under five minutes on Mistral-7B; up to two million edits",
    "locft": "100,000 edits kept; models of up to 72 billion parameters",
    "serac": "zsRE, GPT-J: reliability .902, generalization .900, locality .999",
    "grace": "thousands of edits one after the other, T5, BERT and GPT",
    "neuraldb": "CounterFact, 10,000 edits, Llama-3-8B: .992, paraphrases .859, neighbours .856; 100,000: .955",
    "wise": "zsRE, 1,000 edits one after the other, Mistral-7B: reliability .70, generalization .67, locality 1.00",
    "retrieval": "IKE on GPT-J: as successful as methods that take gradients, with fewer side effects",
    "tpatcher": "thousands of errors corrected one after the other, BERT and BART",
    "tpatcher-subject": "",
}
"""The rows in their order, fourteen methods: a method or its variant, and what its authors report."""

STREAMS = ("memit-aligned",)
"""Rows that differ from another one in a stream alone."""


class Part(NamedTuple):
    """Records and how they are edited.

    Attributes:
        name: its folder.
        data: the data set.
        file: the name of its file.
        protocol: ``batch``, ``single`` or ``sequential``.
        n: so many records.
        options: further arguments of ``tpatch eval``.
        figures: what the table shows of it, if it was measured.
        alone: whether each cell has a separate process, whose peak memory is the cell's.
    """

    name: str
    data: str
    file: str
    protocol: str
    n: int
    options: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()
    alone: bool = True


_COUNTERFACT = ("counterfact", "counterfact_full_dev.json")
_TOGETHER = (
    *("ES", "PS", "NS", "S", "exact", "generalization_exact", "locality", "subject_specificity"),
    *("bare_free_running", "chat_free_running", "perplexity"),
)
_STREAM = ("SR", "GR", "ER", "ES", "PS", "NS", "S", "locality", "perplexity")
_QUESTIONS = ("reliability", "exact", "generalization", "locality", "portability", "perplexity")

FULL = (
    Part("counterfact-batch", *_COUNTERFACT, "batch", 100, ("--forms", "bare,chat"), _TOGETHER),
    Part("counterfact-sequential", *_COUNTERFACT, "sequential", 100, ("--other-facts", "0"), _STREAM),
    Part(
        "zsre-batch",
        "zsre",
        "zsre_dev.json",
        "batch",
        200,
        ("--one-per-subject", "--reading", "easyedit", "--other-facts", "0"),
        _QUESTIONS,
    ),
)
"""The parts of a whole table."""

QUICK = (Part("counterfact-batch", *_COUNTERFACT, "batch", 8, ("--other-facts", "0"), _TOGETHER, alone=False),)
"""The part of a reduced one."""

COSTS = (
    *("forward_equivalents", "token_forward_equivalents", "token_forward_equivalents_elsewhere"),
    *("parameters_added", "peak_memory_mib"),
)
PROPERTIES = ("undo", "stock_checkpoint")
HEADINGS: Mapping[str, str] = {
    "forward_equivalents": "forward equivalents per edit",
    "token_forward_equivalents": "per generated token",
    "token_forward_equivalents_elsewhere": "elsewhere",
    "parameters_added": "numbers beside the model",
    "peak_memory_mib": "peak memory, MiB",
    "stock_checkpoint": "stock checkpoint",
    "subject_specificity": "other facts",
    "generalization_exact": "rephrasings, whole",
    "bare_free_running": "free-running",
    "chat_free_running": "in chat",
}
UNEDITED = "unedited"


class Cell(NamedTuple):
    """One evaluation of a table.

    Attributes:
        part: the records and the protocol.
        row: the row's name.
        config: its configuration.
        folder: its report.
    """

    part: Part
    row: str
    config: Path
    folder: Path

    def arguments(self, model: str, data: Path, common: Sequence[str]) -> list[str]:
        """The command line of ``tpatch`` that measures it.

        Args:
            model: the model's name.
            data: where the data sets are; see `find_file`.
            common: arguments that all cells have.
        """
        part = self.part
        chosen = ["--data", part.data, "--file", str(find_file(data, part.file)), "--protocol", part.protocol]
        chosen += ["-n", str(part.n), *part.options, *common, "-o", str(self.folder), "--quiet", "--json"]
        return ["eval", model, "--config", str(self.config), *chosen]


def find_file(data: Path, name: str) -> Path:
    """A file of a data set, in a folder or one of the folders in it.

    Raises:
        TPatchError: it is not there.
    """
    for path in (data / name, *sorted(data.glob(f"*/{name}"))):
        if path.is_file():
            return path
    raise TPatchError(f"{data} holds no {name}; give --data, the folder of the data sets")


def cells(parts: Sequence[Part], rows: Sequence[str], configs: str, output: Path) -> list[Cell]:
    """The cells of a table, row by row.

    Args:
        parts: its parts.
        rows: names of `ROWS`.
        configs: what the names of the configurations begin with, such as ``configs/smollm2-135m``. A row's is
            ``CONFIGS-ROW-DATA.yaml``, and where there is none for a data set that for CounterFact.
        output: the table's folder.

    Raises:
        TPatchError: there is no row of a name, or it has no configuration.
    """
    result = []
    for row in rows:
        if row not in ROWS:
            raise TPatchError(f"the table has no row {row!r}; choose from {', '.join(ROWS)}")
        for part in parts:
            if row in STREAMS and part.protocol != "sequential":
                continue
            paths = [Path(f"{configs}-{row}-{data}.yaml") for data in dict.fromkeys((part.data, "counterfact"))]
            config = next((path for path in paths if path.is_file()), None)
            if config is None:
                raise TPatchError(f"{paths[-1]} does not exist; give --configs, what the configurations begin with")
            result.append(Cell(part, row, config, output / part.name / row))
    return result


class Table(NamedTuple):
    """What is known of a table.

    Attributes:
        parts: its parts.
        results: by part and row what was measured, ``unedited`` among the rows: ``metrics``, ``cost`` and the rest of a
            result (`tpatch_jax.evaluation.runner.evaluate`).
        missing: by part and row why there is nothing.
    """

    parts: tuple[Part, ...]
    results: Mapping[str, Mapping[str, Mapping[str, Any]]]
    missing: Mapping[str, Mapping[str, str]]

    def to_json(self) -> dict[str, Any]:
        """What is written as ``table.json``."""
        parts = [part._asdict() for part in self.parts]
        rows = dict.fromkeys(row for of_part in self.results.values() for row in of_part if row != UNEDITED)
        reported = {row: ROWS[row] for row in rows if ROWS.get(row)}
        return {
            "schema": SCHEMA, "parts": parts, "results": self.results, "reported": reported, "missing": self.missing
        }  # fmt: skip


def open_table(output: Path, plan: Mapping[str, Any]) -> None:
    """Begin a table's folder, or go on with one of the same plan.

    Args:
        output: new, empty, or of an earlier run.
        plan: what its figures depend on, as JSON can hold it.

    Raises:
        TPatchError: the folder holds something else, or a table of another plan.
    """
    run = output / "run.json"
    if not run.exists():
        check_vacant(output, inside=True)
    try:
        if not run.exists():
            output.mkdir(parents=True, exist_ok=True)
            write_text(run, json.dumps(plan, indent=1) + "\n")
        earlier = json.loads(run.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TPatchError(f"{output} cannot be a table's folder ({error}); choose another one") from None
    check_same_run(earlier, dict(plan), output, "choose another output folder or remove it first")


def read_table(parts: Sequence[Part], output: Path, missing: Mapping[tuple[str, str], str] | None = None) -> Table:
    """What a table has come to so far, rows of earlier runs among them.

    Args:
        parts: its parts.
        output: its folder.
        missing: by part and row why one has no report.
    """
    results: dict[str, dict[str, Any]] = {}
    for part in parts:
        of_part = results[part.name] = {}
        for row in ROWS:
            if (output / part.name / row / REPORT).exists():
                unedited, *edited = read_report(output / part.name / row)["results"]
                of_part.setdefault(UNEDITED, unedited)
                of_part[row] = edited[0]
    reasons: dict[str, dict[str, str]] = {}
    for (part, row), reason in (missing or {}).items():
        reasons.setdefault(part, {})[row] = reason
    return Table(tuple(parts), results, reasons)


def fill_table(
    chosen: Sequence[Cell],
    measure: Callable[[Cell], None],
    parts: Sequence[Part],
    output: Path,
    tell: Callable[[Cell, int], None] = lambda cell, number: None,
    jobs: int = 1,
) -> Table:
    """Measure every cell that has no report yet; what fails is noted, and the others go on.

    ``table.json`` and ``table.md`` are written after each cell, so that what is known can be read at any time; with
    several jobs after each cell before which no other one is still being measured.

    Beside its report each cell keeps its configuration.

    Args:
        chosen: what shall be measured, from `cells`.
        measure: writes a cell's report.
        parts: the table's parts.
        output: the table's folder.
        tell: called before each cell that is measured with it and its number.
        jobs: so many cells at once, each in a thread, so that ``measure`` should start a process; one in this thread.

    Raises:
        TPatchError: a cell that has a report was measured with another configuration, or the disk is full.
    """

    def attempt(number: int) -> str:
        tell(chosen[number], number)
        try:
            measure(chosen[number])
            write_text(chosen[number].folder / CONFIG, chosen[number].config.read_text("utf-8"))
        except TPatchError as error:
            return str(error)
        return ""

    missing: dict[tuple[str, str], str] = {}
    table = _write(parts, missing, output)
    left = [number for number, cell in enumerate(chosen) if not _is_measured(cell)]
    with ThreadPoolExecutor(jobs) as pool:
        for number, reason in zip(left, (map if jobs == 1 else pool.map)(attempt, left), strict=True):
            if reason:
                missing[chosen[number].part.name, chosen[number].row] = reason
            table = _write(parts, missing, output)
    return table


def _is_measured(cell: Cell) -> bool:
    """Whether a cell has a report, of the configuration that it has now."""
    if not (cell.folder / REPORT).exists():
        return False
    kept = cell.folder / CONFIG
    if kept.exists() and kept.read_text("utf-8") != cell.config.read_text("utf-8"):
        raise TPatchError(
            f"{cell.folder} was measured with another {cell.config}; remove that folder, and the same command measures "
            "it anew"
        )
    return True


def _write(parts: Sequence[Part], missing: Mapping[tuple[str, str], str], output: Path) -> Table:
    table = read_table(parts, output, missing)
    try:
        write_text(output / "table.json", json.dumps(table.to_json(), ensure_ascii=False, indent=1) + "\n")
        write_text(output / "table.md", as_markdown(table))
    except OSError as error:
        raise TPatchError(f"cannot write {output}: {error.strerror}; choose another output folder") from None
    return table


def heading(part: Part, results: Mapping[str, Mapping[str, Any]]) -> str:
    """What one table is of: the data set, how many of its records were measured, and the protocol."""
    counts = {result["n"] for result in results.values()} or {part.n}
    return f"{part.data}, {' to '.join(map(str, sorted({min(counts), max(counts)})))} records, {part.protocol}"


def as_markdown(table: Table) -> str:
    """The page to read: a table for each part, quality first, then what it costs."""
    blocks = []
    for part in table.parts:
        results = table.results[part.name]
        title = f"## {heading(part, results)}"
        figures = [name for name in part.figures if any(name in result["metrics"] for result in results.values())]
        costs = [name for name in COSTS if any(name in result["cost"] for result in results.values())]
        # Of several methods in one process it is the most that any of them took.
        costs = [name for name in costs if part.alone or name != "peak_memory_mib"]
        quality = [["", *(HEADINGS.get(name, name) for name in figures)]]
        paid = [["", *(HEADINGS.get(name, name) for name in (*costs, *PROPERTIES)), "its authors report"]]
        for row, result in results.items():
            quality.append([row, *(_share(result["metrics"].get(name), name) for name in figures)])
            said = result.get("properties") or {}
            cells_ = [shown(result["cost"].get(name)) for name in costs]
            paid.append([row, *cells_, *(shown(said.get(name)) for name in PROPERTIES), ROWS.get(row, "")])
        blocks += [title, _rows(quality), _rows(paid)]
        blocks += [f"{row}: {reason}" for row, reason in table.missing.get(part.name, {}).items()]
    return "\n\n".join(["# Editing methods side by side", *blocks]) + "\n"


def _share(value: float | None, name: str) -> str:
    """A share with three digits behind the point, as papers have it; any other figure as it is shown elsewhere."""
    if value is None or name == "perplexity":
        return shown(value if value is None else round(value, 1))
    return f"{value:.3f}".removeprefix("0")


def _rows(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
