"""The picture of a benchmark, drawn with matplotlib."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpatch_jax.core.arguments import install_advice
from tpatch_jax.errors import TPatchError

__all__ = ["check_picture", "draw_bench"]


def check_picture(path: Path) -> None:
    """Make sure that a picture can be drawn, before what it shows is measured.

    Raises:
        TPatchError: matplotlib is missing, or draws no files of this kind.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise TPatchError(f"pictures need matplotlib: {install_advice('matplotlib>=3.9', 'report')}") from None
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix.removeprefix(".").lower() not in kinds:
        raise TPatchError(f"{path} is of no kind that pictures have; give one of {', '.join(sorted(kinds))}")


def draw_bench(path: Path, result: Mapping[str, Any]) -> None:
    """Cost and memory over the number of edits, and generation over the number of neurons.

    Args:
        path: the picture.
        result: from `tpatch_jax.benchmarks.bench.bench`.

    Raises:
        TPatchError: matplotlib is missing, or the picture cannot be written.
    """
    check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    cost, memory, overhead = figure.subplots(1, 3)
    for site, by_count in result["forward_equivalents_per_edit"].items():
        counts = [int(count) for count in by_count]
        (line,) = cost.plot(counts, list(by_count.values()), "o-", label=f"{site}, everything", markersize=3)
        fit = list(result["fit_forward_equivalents_per_edit"][site].values())
        cost.plot(counts, fit, "o--", color=line.get_color(), label=f"{site}, fit", markersize=3)
        peaks = [bytes_ / 2**30 for bytes_ in result["peak_memory"][site].values()]
        memory.plot(counts, peaks, "o-", color=line.get_color(), label=site, markersize=3)
    cost.set_yscale("log")
    for axes, title in ((cost, "forward equivalents per edit"), (memory, "peak memory, GiB")):
        axes.set_xscale("log", base=4)
        axes.set_xlabel("edits in one call")
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=7)
    memory.set_ylim(bottom=0)
    for form in ("attached", "merged"):
        by_count = result[f"{form}_overhead"]
        overhead.plot(list(by_count), list(by_count.values()), "o-", label=form, markersize=3)
    overhead.set_xlabel("neurons")
    overhead.set_title("generation over that without neurons", fontsize=10)
    overhead.legend(fontsize=7)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise TPatchError(f"cannot write {path}: {error}; choose another place, with a name such as .png") from None
