"""What the commands show: progress bars that stay quiet off a terminal, and JSON lines."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["print_json", "progress_bar", "so_many"]

Report = Callable[[str, int, int], None]


def so_many(count: int, noun: str) -> str:
    """A count and what is counted, as people write it.

    Args:
        count: how many.
        noun: in the singular, of those whose plural ends in s.

    Example:
        >>> so_many(1, "edit"), so_many(2000, "edit")
        ('1 edit', '2,000 edits')
    """
    return f"{count:,} {noun}{'s' * (count != 1)}"


def print_json(value: Any) -> None:
    """One object on one line, as every ``--json`` ends."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Report]:
    """A report function ``(what, done, total)`` that draws one bar for each thing being done.

    Args:
        quiet: draw nothing; nothing is drawn off a terminal either.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report
