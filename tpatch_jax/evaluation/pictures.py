"""Pictures of a report, drawn with matplotlib if it is there."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tpatch_jax.core.arguments import install_advice
from tpatch_jax.errors import TPatchError

__all__ = ["draw_comparison", "draw_report", "draw_sweep", "draw_tradeoff"]

Lines = Sequence[Mapping[str, Any]]

MISSING = f"pictures need matplotlib: {install_advice('matplotlib>=3.9', 'report')}"
KINDS = (
    ("the edit", ("rewrite_new", "reliability")),
    ("rephrasings", ("paraphrase_new", "generalization")),
    ("elsewhere", ("neighborhood_true", "locality", "locality_answer", "relation_specificity")),
)
SHARES = (
    *("exact", "generalization_exact", "reliability", "generalization", "locality", "portability", "ES", "PS", "NS"),
    *("SR", "GR", "ER", "mquake", "subject_specificity", "next_token_agreement", "certificate_tokens"),
)


LAYOUT: Literal["constrained"] | None = "constrained"
"""How matplotlib gives titles and labels their room."""


def _figure(width: float, height: float) -> Any:
    """A figure that draws to files only, whatever display there is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=LAYOUT)
    FigureCanvasAgg(figure)
    return figure


def draw_report(folder: Path, report: Mapping[str, Any], lines: Mapping[str, Lines]) -> list[str]:
    """Draw whatever a report has figures for.

    Args:
        folder: where the pictures go.
        report: the report.
        lines: the records of each method.

    Returns:
        The names of the files: ``curves.png`` (a stream's retention and locality over the number of edits),
        ``activations-METHOD.png`` (edits × queries), ``before-after.png``, ``cost.png``. None without matplotlib.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        sys.stderr.write(f"tpatch: {MISSING}\n")
        return []
    drawn = []
    edited = [result for result in report["results"] if result["method"] != "unedited"]
    if any(result.get("curves") for result in edited):
        drawn.append(_save(_curves(edited), folder / "curves.png"))
    for result in edited:
        shown = [line for line in lines[result["method"]] if line.get("activations")]
        rows, ids = [line["activations"] for line in shown], [line["id"] for line in shown]
        if rows:
            drawn.append(_save(_heat(rows, ids), folder / f"activations-{result['method']}.png"))
    if edited and lines["unedited"]:
        drawn.append(_save(_before_after(lines), folder / "before-after.png"))
        drawn.append(_save(_cost([(result["method"], result) for result in edited]), folder / "cost.png"))
    return drawn


def draw_comparison(path: Path, columns: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Several results side by side: their shares as bars, and what they cost.

    Args:
        path: the picture.
        columns: heading and result of each.

    Raises:
        TPatchError: matplotlib is missing, or the picture cannot be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise TPatchError(MISSING) from None
    names = [name for name in SHARES if any(name in result["metrics"] for _, result in columns)]
    figure = _figure(max(7.0, 1.1 * len(names)), 4.5)
    axes, width = figure.subplots(), 0.8 / max(1, len(columns))
    for number, (heading, result) in enumerate(columns):
        places = [index - 0.4 + width * (number + 0.5) for index in range(len(names))]
        # What a report lacks is no bar, and not one of no height.
        heights = [result["metrics"].get(name, float("nan")) for name in names]
        axes.bar(places, heights, width, label=_literal(heading))
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_ylabel("share")
    figure.legend(fontsize=8, ncols=3, loc="outside lower center")
    _save(figure, path)


def draw_tradeoff(path: Path, points: Sequence[tuple[str, Mapping[str, Any]]], quality: str) -> None:
    """Quality over cost: over that of an edit, and over that of each token that is generated afterwards.

    Args:
        path: the picture.
        points: name and result of each method.
        quality: the metric that counts.

    Raises:
        TPatchError: matplotlib is missing, or the picture cannot be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise TPatchError(MISSING) from None
    figure = _figure(11, 5)
    panels = (
        ("forward_equivalents", "forward equivalents per edit", "log"),
        ("token_forward_equivalents", "forward equivalents per generated token", "linear"),
    )
    for axes, (cost, title, scale) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        for name, result in points:
            over, height = result["cost"].get(cost), result["metrics"].get(quality)
            if height is None or over is None or (scale == "log" and over <= 0):
                continue
            axes.plot(over, height, "o", markersize=5)
            axes.annotate(_literal(name), (over, height), (4, 3), textcoords="offset points", fontsize=8)
        axes.set_xscale(scale)
        axes.set_xlabel(title)
        axes.margins(x=0.15)
    figure.axes[0].set_ylabel(quality)
    _save(figure, path)


def _literal(text: str) -> str:
    """A text of the user's, in which matplotlib shall see no formula."""
    return text.replace("$", r"\$")


def _save(figure: Any, path: Path) -> str:
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise TPatchError(f"cannot write {path}: {error}; choose another place, with a name such as .png") from None
    return path.name


def _curves(results: Sequence[Mapping[str, Any]]) -> Any:
    figure = _figure(7, 4)
    axes = figure.subplots()
    for result in results:
        for name, points in result["curves"].items():
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=f"{name}, {result['method']}")
    axes.set_xlabel("edits")
    axes.set_ylabel("share")
    axes.set_ylim(-0.02, 1.02)
    axes.set_title("Over a stream: right after each edit (SR, GR), retained (ER), unchanged elsewhere", fontsize=10)
    axes.legend(fontsize=8)
    return figure


def _heat(rows: Sequence[Sequence[float]], ids: Sequence[str]) -> Any:
    figure = _figure(6.5, 5.5)
    axes = figure.subplots()
    image = axes.imshow(rows, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
    axes.set_xlabel("queries: the edit prompt of each record")
    axes.set_ylabel("edits: the neurons of each record")
    axes.set_title("Strongest activation of each edit's neurons on each edit prompt")
    if len(ids) <= 24:
        axes.set_yticks(range(len(rows)), [_literal(name) for name in ids], fontsize=7)
    figure.colorbar(image, ax=axes, label="max(0, q·k + b)")
    return figure


def _probabilities(lines: Lines, kinds: Sequence[str]) -> list[float]:
    import math

    return [math.exp(-line["nll"][kind]) for line in lines for kind in kinds if kind in line.get("nll", {})]


def _before_after(lines: Mapping[str, Lines]) -> Any:
    panels_of = {title: {m: _probabilities(records, kinds) for m, records in lines.items()} for title, kinds in KINDS}
    panels = {title: methods for title, methods in panels_of.items() if any(methods.values())} or panels_of
    figure = _figure(max(4.5, 3 * len(panels)), 3.4)
    for axes, (title, methods) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for method, values in methods.items():
            if values:
                axes.hist(values, bins=20, range=(0, 1), alpha=0.55, label=method)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("probability per target token")
        axes.legend(fontsize=7) if any(methods.values()) else None
    return figure


def _cost(columns: Sequence[tuple[str, Mapping[str, Any]]]) -> Any:
    figure = _figure(8, 3)
    names = [heading for heading, _ in columns]
    parts = (
        ("seconds", "seconds of editing"),
        ("forward_equivalents", "forward equivalents per request"),
        ("parameters_added", "parameters added"),
    )
    for axes, (name, title) in zip(figure.subplots(1, len(parts)), parts, strict=True):
        bars = axes.bar(names, [result["cost"].get(name, 0.0) for _, result in columns])
        axes.bar_label(bars, fmt="{:,.4g}", fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.margins(y=0.15)
    return figure


def draw_sweep(folder: Path, rows: Lines) -> list[str]:
    """Draw quality over layers, a panel for each position.

    Args:
        folder: where the picture goes.
        rows: from `tpatch_jax.evaluation.sweep.sweep`.

    Returns:
        ``["sweep.png"]``, or nothing without matplotlib.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        sys.stderr.write(f"tpatch: {MISSING}\n")
        return []
    positions = list(dict.fromkeys(row["position"] for row in rows))
    figure = _figure(4.5 * len(positions), 3.4)
    for axes, position in zip(figure.subplots(1, len(positions), squeeze=False)[0], positions, strict=True):
        here = sorted((row for row in rows if row["position"] == position), key=lambda row: row["layer"])
        for name in ("exact", "rephrase_exact", "rephrase_token_accuracy", "locality", "score"):
            if all(row[name] is not None for row in here):
                style = "k--" if name == "score" else "o-"
                axes.plot([row["layer"] for row in here], [row[name] for row in here], style, label=name, markersize=3)
        axes.set_title(f"at the last token of the {position}", fontsize=10)
        axes.set_xlabel("layer")
        axes.set_ylim(-0.02, 1.02)
    figure.axes[0].legend(fontsize=7)
    return [_save(figure, folder / "sweep.png")]
