"""What `tpatch_jax.show` returns: HTML in a notebook, plain text everywhere else, both made of the same rows."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from xml.etree.ElementTree import Element

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as TextTable
from rich.text import Text

from tpatch_jax.display.markup import Child, element, fragment, table

__all__ = ["Rows", "Shown", "compose"]

TEXT_WIDTH = 120


@dataclass(frozen=True, repr=False)
class Shown:
    """Something to look at.

    Attributes:
        html: a fragment that brings its own style along and asks nothing of a network.
        text: the same for a terminal.

    Example:
        >>> Shown("<p>two neurons</p>", "two neurons")
        two neurons
    """

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        """The text, so that a plain Python prompt shows it too."""
        return self.text


class Rows(NamedTuple):
    """A table before it is either HTML or text.

    Attributes:
        columns: the headings.
        rows: the cells.
        numbers: the columns that hold numbers.
        judged: the columns whose ``yes`` is good and whose ``no`` is bad.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[str] = ()
    judged: Sequence[str] = ()


def _as_html(rows: Rows) -> Element:
    def cell(name: str, text: str) -> Child:
        if name not in rows.judged or not text:
            return text
        return element("td", text, class_="good" if text.startswith("yes") else "bad")

    cells = [[cell(name, text) for name, text in zip(rows.columns, row, strict=True)] for row in rows.rows]
    return table(rows.columns, cells, numbers=rows.numbers)


def _as_text(rows: Rows) -> str:
    made = TextTable(box=SIMPLE_HEAD, pad_edge=False)
    for name in rows.columns:
        made.add_column(Text(name), justify="right" if name in rows.numbers else "left", overflow="fold")
    for row in rows.rows:
        # Line breaks in a cell would look like further rows.
        made.add_row(*(Text(cell.replace("\n", "⏎")) for cell in row))
    file = io.StringIO()
    Console(file=file, width=TEXT_WIDTH, color_system=None, legacy_windows=False).print(made)
    return "\n".join(line.rstrip() for line in file.getvalue().strip("\n").split("\n"))


def compose(title: str, notes: Sequence[str], tables: Sequence[Rows], html_only: Sequence[Child] = ()) -> Shown:
    """Something to look at, from a title, sentences and tables.

    Args:
        title: what it is.
        notes: what else there is to say.
        tables: what there is to read.
        html_only: elements that stand between notes and tables in HTML.
    """
    html = fragment(
        element("h3", title),
        *(element("p", note) for note in notes),
        *html_only,
        *(_as_html(rows) for rows in tables if rows.rows),
    )
    return Shown(html, "\n".join([title, *notes, *(_as_text(rows) for rows in tables if rows.rows)]))
