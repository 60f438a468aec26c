"""HTML as trees of elements: whatever text goes in is escaped when it is written.

Colours are translucent and text inherits its own, so that the same fragment suits a light and a dark notebook; only a
whole page (`tpatch_jax.display.page`) chooses what is behind it.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from tpatch_jax.errors import TPatchError

__all__ = ["STYLE", "Child", "bar", "code", "element", "figures", "fragment", "number", "shorten", "table", "written"]

Child = Element | str | None
"""What an element holds: elements, and text, which is escaped; ``None`` is nothing."""

LONG = 20

STYLE = """
.tpatch { font: 14px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
.tpatch h2 { font-size: 1.2em; margin: 1.6em 0 .4em; }
.tpatch h3 { font-size: 1em; margin: 0 0 .4em; }
.tpatch p { margin: .4em 0; }
.tpatch .faint { opacity: .72; font-size: .92em; }
.tpatch .scroll { overflow-x: auto; max-width: 100%; margin: .6em 0; }
.tpatch table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.tpatch th, .tpatch td { padding: .25em .6em; border-bottom: 1px solid rgba(128, 128, 128, .35); text-align: left;
  vertical-align: top; overflow-wrap: normal; }
.tpatch th { font-weight: 600; white-space: nowrap; }
.tpatch td.number, .tpatch th.number { text-align: right; white-space: nowrap; }
.tpatch td.short { white-space: nowrap; }
.tpatch td.text { min-width: 11em; max-width: 28em; overflow-wrap: anywhere; white-space: pre-wrap; }
@media (max-width: 30em) { .tpatch th, .tpatch td { padding: .25em .4em; } .tpatch td code { font-size: .85em; } }
.tpatch .good { color: #1a8f4c; font-weight: 600; }
.tpatch .bad { color: #d4483b; font-weight: 600; }
.tpatch dl { display: flex; flex-wrap: wrap; gap: .5em 1.6em; margin: .6em 0; }
.tpatch dt { opacity: .72; font-size: .86em; }
.tpatch dd { margin: 0; font-size: 1.15em; font-weight: 600; font-variant-numeric: tabular-nums; }
.tpatch .tokens { margin: .6em 0; }
.tpatch .tokens span { display: inline-block; white-space: pre-wrap; line-height: 1.5; margin: 1px 1px 1px 0;
  border-radius: 3px; outline: 1px solid rgba(128, 128, 128, .3); }
.tpatch svg { width: 100%; max-width: 30em; height: auto; display: block; }
.tpatch code { font-size: .93em; }
"""


def _clean(text: str) -> str:
    # Half of a surrogate pair cannot be written, and control characters are not allowed in HTML.
    kept = text.encode("utf-8", "replace").decode()
    return "".join(letter if letter in "\n\t" or (letter >= " " and letter != "\x7f") else "\ufffd" for letter in kept)


def element(tag: str, *children: Child, **attributes: Any) -> Element:
    """An HTML element.

    Args:
        tag: its name.
        children: what it holds, in order; text is escaped when it is written.
        attributes: ``class_`` is ``class``, underscores are hyphens, ``None`` leaves an attribute out.

    Returns:
        The element.

    Example:
        >>> written(element("p", "a <b> c", element("code", "x"), "d", class_="faint"))
        '<p class="faint">a &lt;b&gt; c<code>x</code>d</p>'
    """
    named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    made = Element(tag, {name: _clean(str(value)) for name, value in named.items()})
    last: Element | None = None
    for child in children:
        if isinstance(child, Element):
            made.append(child)
            last = child
        elif child is not None and last is None:
            made.text = (made.text or "") + _clean(child)
        elif child is not None and last is not None:
            last.tail = (last.tail or "") + _clean(child)
    return made


def written(made: Element) -> str:
    """An element as HTML."""
    return ElementTree.tostring(made, encoding="unicode", method="html")


def fragment(*children: Child) -> str:
    """Elements as HTML that brings its style along, to stand anywhere: in a notebook, say."""
    return written(element("div", element("style", STYLE), *children, class_="tpatch"))


def code(text: str) -> Element:
    """Text as code."""
    return element("code", text)


def number(value: float | int | None) -> str:
    """A number to read; nothing where there is none.

    Example:
        >>> number(1234567), number(0.123456), number(None)
        ('1,234,567', '0.1235', '')
    """
    if value is None:
        return ""
    return f"{value:,.0f}" if isinstance(value, int) or 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def shorten(text: str, most: int = 300) -> str:
    """A text cut to a readable length.

    Example:
        >>> shorten("abcdef", 4)
        'abc…'
    """
    return text if len(text) <= most else f"{text[: most - 1]}…"


def bar(share: float) -> str:
    """The style of a cell with a bar behind its number, ``0 <= share <= 1``."""
    edge = f"{100 * min(1.0, max(0.0, share)):.1f}%"
    return f"background: linear-gradient(to right, rgba(70, 130, 220, .28) {edge}, transparent {edge})"


def table(columns: Sequence[str], rows: Sequence[Sequence[Child]], *, numbers: Sequence[str] = ()) -> Element:
    """A table that scrolls sideways where it is wider than the screen.

    Args:
        columns: the headings.
        rows: the cells, texts or elements; a ``td`` is taken as the cell itself.
        numbers: the columns that hold numbers, which stand to the right.

    Raises:
        TPatchError: a row has another number of cells than there are columns.
    """
    for row in rows:
        if len(row) != len(columns):
            raise TPatchError(f"a row of {len(row)} cells does not fit {len(columns)} columns; give one for each")
    texts = [[cell for cell in column if isinstance(cell, str)] for column in zip(*rows, strict=True)]
    longest = [max(map(len, column), default=0) for column in texts] or [0] * len(columns)
    # Only what is long may break into lines, and then not into too many.
    kinds = [
        "number" if name in numbers else "text" if length > LONG else "short"
        for name, length in zip(columns, longest, strict=True)
    ]
    body = element("tbody")
    for row in rows:
        cells = [
            cell if isinstance(cell, Element) and cell.tag == "td" else element("td", cell, class_=kind)
            for kind, cell in zip(kinds, row, strict=True)
        ]
        body.append(element("tr", *cells))
    heads = [
        element("th", name, class_="number" if kind == "number" else None, scope="col")
        for name, kind in zip(columns, kinds, strict=True)
    ]
    whole = element("table", element("thead", element("tr", *heads)), body)
    # Reachable by keyboard, so that it can be scrolled without a mouse.
    return element("div", whole, class_="scroll", tabindex="0")


def figures(values: Mapping[str, str]) -> Element:
    """A few named figures side by side."""
    return element(
        "dl", *(element("div", element("dt", name), element("dd", value)) for name, value in values.items() if value)
    )
