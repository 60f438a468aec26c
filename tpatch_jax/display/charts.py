"""Small pictures as SVG, which a page holds as it is: they take its colours and stay sharp on a phone."""

from collections.abc import Sequence
from xml.etree.ElementTree import Element

import numpy as np

from tpatch_jax.display.markup import element, number

__all__ = ["heat", "histogram", "steps"]

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 10, 36
COLOUR = "#4682dc"


def _picture(title: str, described: str, children: Sequence[Element], height: int = HEIGHT) -> Element:
    drawing = element(
        "svg",
        element("title", described),
        *children,
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        aria_label=described,
        xmlns="http://www.w3.org/2000/svg",
    )
    return element("figure", element("h3", title), drawing)


def _text(x: float, y: float, text: str, anchor: str = "middle", **more: str) -> Element:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text_anchor": anchor}
    return element("text", text, **place, fill="currentColor", font_size="11", **more)


def _line(x1: float, y1: float, x2: float, y2: float, opacity: float = 0.4) -> Element:
    ends = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
    return element("line", **ends, stroke="currentColor", stroke_opacity=opacity)


def _axes(x_range: tuple[float, float], y_range: tuple[float, float], x_label: str, height: int) -> list[Element]:
    """The frame, the ends of both ranges, and what is along the bottom."""
    bottom = height - BOTTOM
    return [
        _line(LEFT, bottom, WIDTH - RIGHT, bottom),
        _line(LEFT, TOP, LEFT, bottom),
        _text(LEFT, bottom + 14, number(x_range[0])),
        _text(WIDTH - RIGHT, bottom + 14, number(x_range[1]), "end"),
        _text(LEFT - 5, bottom + 2, number(y_range[0]), "end"),
        _text(LEFT - 5, TOP + 9, number(y_range[1]), "end"),
        _text((LEFT + WIDTH - RIGHT) / 2, height - 6, x_label),
    ]


def steps(title: str, points: Sequence[tuple[int, int]], x_label: str, y_label: str) -> Element:
    """A quantity that changes in steps.

    Args:
        title: above the picture.
        points: where it changes, and to what, in order.
        x_label: what is along the bottom.
        y_label: what is counted.
    """
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_range, y_range = (min(xs), max(max(xs), min(xs) + 1)), (0, max(*ys, 1))
    x_scale = (WIDTH - RIGHT - LEFT) / (x_range[1] - x_range[0])
    y_scale = (HEIGHT - BOTTOM - TOP) / y_range[1]
    places = [(LEFT + (x - x_range[0]) * x_scale, HEIGHT - BOTTOM - y * y_scale) for x, y in points]
    path = f"M{places[0][0]:.1f} {places[0][1]:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in places[1:])
    drawn = element("path", d=path, fill="none", stroke=COLOUR, stroke_width=2)
    described = f"{title}: {number(ys[0])} {y_label} at {x_label} {xs[0]}, {number(ys[-1])} at {xs[-1]}"
    return _picture(title, described, [*_axes(x_range, y_range, x_label, HEIGHT), drawn])


def histogram(title: str, values: Sequence[float], x_label: str) -> Element:
    """How often values occur, in 20 bins.

    Args:
        title: above the picture.
        values: at least one.
        x_label: what they are.
    """
    counts, edges = np.histogram(np.asarray(values, np.float64), bins=20)
    most, slot = int(counts.max()), (WIDTH - RIGHT - LEFT) / len(counts)
    bars = []
    for place, count in enumerate(counts.tolist()):
        tall = count / most * (HEIGHT - BOTTOM - TOP)
        size = {"x": f"{LEFT + place * slot + 0.5:.1f}", "y": f"{HEIGHT - BOTTOM - tall:.1f}"}
        bars.append(element("rect", **size, width=f"{slot - 1:.1f}", height=f"{tall:.1f}", fill=COLOUR))
    middle = float(np.median(np.asarray(values, np.float64)))
    described = f"{title}: {number(float(edges[0]))} to {number(float(edges[-1]))}, median {number(middle)}"
    return _picture(title, described, [*_axes((edges[0], edges[-1]), (0, most), x_label, HEIGHT), *bars])


def heat(title: str, values: np.ndarray, described: str, labels: tuple[str, str]) -> Element:
    """A matrix of activations: the stronger, the more colour; what is zero is empty.

    Args:
        title: above the picture.
        values: ``[rows, columns]``, at least one of each.
        described: what is to be seen, for those who cannot see it.
        labels: what rows and columns are.
    """
    rows, columns = values.shape
    size = min((WIDTH - RIGHT - LEFT) / columns, 240 / rows)
    height, top = TOP + size * rows + BOTTOM, max(float(values.max()), 1e-30)
    cells = []
    for row, column in np.argwhere(values > 0).tolist():
        shade = 0.3 + 0.7 * float(values[row, column]) / top
        place = {"x": f"{LEFT + column * size:.2f}", "y": f"{TOP + row * size:.2f}"}
        what = element("title", f"{row + 1}, {column + 1}: {number(float(values[row, column]))}")
        side = f"{size:.2f}"
        cells.append(element("rect", what, **place, width=side, height=side, fill=COLOUR, fill_opacity=f"{shade:.2f}"))
    frame = {"x": str(LEFT), "y": str(TOP), "width": f"{size * columns:.1f}", "height": f"{size * rows:.1f}"}
    around = element("rect", **frame, fill="none", stroke="currentColor", stroke_opacity="0.4")
    left, middle = LEFT - 10, TOP + size * rows / 2
    words = [
        _text(LEFT + size * columns / 2, TOP + size * rows + 16, f"{labels[1]} (1 to {columns})"),
        _text(left, middle, f"{labels[0]} (1 to {rows})", transform=f"rotate(-90 {left} {middle:.1f})"),
    ]
    return _picture(title, described, [around, *cells, *words], round(height))
