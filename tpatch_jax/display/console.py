"""What the commands show: progress bars that stay quiet off a terminal, and JSON lines."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["WIDE", "format_count", "print_json", "progress_bar", "result_console", "result_table"]

Report = Callable[[str, int, int], None]

WIDE = 160
"""So many characters has a line where no terminal says how wide it is: in pipes, files and logs."""


def result_console() -> "Console":
    """Where results are printed: texts as they are, without emoji for what stands between colons."""
    from rich.console import Console

    console = Console(highlight=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDE
    return console


def result_table(title: str, columns: Sequence[str], right: Sequence[str] = ()) -> "Table":
    """An empty table that shows every text whole and as it is; fill it with `rich.text.Text`.

    Args:
        title: above it.
        columns: their headings.
        right: those of numbers, which stand on the right.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for name in columns:
        table.add_column(Text(name), justify="right" if name in right else "left", overflow="fold")
    return table


def format_count(count: int, noun: str) -> str:
    """A count and what is counted, as people write it.

    Args:
        count: how many.
        noun: in the singular, of those whose plural ends in s.

    Example:
        >>> format_count(1, "edit"), format_count(2000, "edit")
        ('1 edit', '2,000 edits')
    """
    return f"{count:,} {noun}{'s' * (count != 1)}"


def print_json(value: Any) -> None:
    """One object on one line, as every ``--json`` ends."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Report]:
    """A report function ``(what, done, total)`` that draws one bar for each thing being done, with its time left.

    Args:
        quiet: draw nothing; nothing is drawn off a terminal either.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report
