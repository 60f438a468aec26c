"""What several commands share: parameters of the command line, and what is made of them.

Nothing here imports JAX before a command runs, so that ``--help`` answers at once.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar

from tyro.conf import Positional, UseAppendAction, arg

from tpatch_jax.display.console import result_console, result_table
from tpatch_jax.errors import TPatchError
from tpatch_jax.requests import EditRequest, check_request

if TYPE_CHECKING:
    from tpatch_jax.editors.tpatcher.settings import TPatcherSettings
    from tpatch_jax.models.model import Model

__all__ = [
    "Command",
    "Config",
    "Dtype",
    "Form",
    "Join",
    "Json",
    "MemoryText",
    "ModelName",
    "Patches",
    "Preset",
    "Prompt",
    "Quiet",
    "RequestsFile",
    "Set",
    "Subject",
    "System",
    "Target",
    "Texts",
    "load",
    "preset_of",
    "requests_of",
    "settings_from",
    "settings_of",
    "show_rows",
    "split_base",
]

Texts = UseAppendAction[tuple[str, ...]]

ModelName = Annotated[Positional[str], arg(metavar="MODEL", help="a name from `tpatch models`, a folder, or a hub id")]
Patches = Annotated[Positional[str], arg(metavar="PATCHES", help="a folder that `tpatch edit` wrote")]
RequestsFile = Annotated[Positional[str | None], arg(metavar="REQUESTS.jsonl", help="one JSON request a line")]
Config = Annotated[str | None, arg(metavar="FILE", help="a YAML file of settings, 'name: value' lines")]
Preset = Annotated[str | None, arg(help="default, paper or paper-fever")]
Set = Annotated[Texts, arg(name="set", metavar="NAME=VALUE", help="change a setting")]
MemoryText = Annotated[str | None, arg(help="a text file on which patches stay silent")]
Dtype = Annotated[str | None, arg(help="float32, bfloat16 or int8 (weights alone); by default the checkpoint's")]
Json = Annotated[bool, arg(help="print one JSON object as the last line")]
Quiet = Annotated[bool, arg(help="show no progress bar")]

# Read by `str`: the word None is a text like any other.
_text = partial(arg, metavar="TEXT", constructor=str, help_behavior_hint="")
Prompt = Annotated[str | None, _text(help="a single edit: the text that the model continues wrongly")]
Target = Annotated[str | None, _text(help="a single edit: what it should say instead")]
Subject = Annotated[str | None, _text(help="a single edit: what the prompt is about")]
Join = Annotated[
    Literal["space", "none"] | None,
    arg(metavar="{space,none}", help="a single edit: what joins the two; by default as their last and first sign are"),
]
Form = Annotated[
    Literal["bare", "chat", "both"] | None,
    arg(metavar="{bare,chat,both}", help="a single edit: where it shall hold; a chat is in the model's template"),
]
System = Annotated[str | None, _text(help="of a chat: the system's message; by default the template's own")]


class Command(Protocol):
    """A command: a frozen dataclass whose fields are its parameters, and whose docstring is its help.

    All have ``json`` and ``quiet``, those that show no bar as well, so that scripts may give them everywhere.
    """

    def run(self) -> None:
        """Do it, and print what came of it."""


S = TypeVar("S")


def settings_from(kind: type[S], command: Any) -> S:
    """Settings of the library from those parameters of a command that have the same names; the rest as by default."""
    names = [field.name for field in dataclasses.fields(kind) if hasattr(command, field.name)]  # type: ignore[arg-type]
    return kind(**{name: getattr(command, name) for name in names})


def load(name: str, dtype: str | None, quiet: bool) -> "Model":
    """Load the model that a command names."""
    from tpatch_jax.models.model import load_model
    from tpatch_jax.storage.process import prepare_process

    prepare_process()
    return load_model(name, dtype=dtype, quiet=quiet)


BASES = {"base=int8": "int8", "base=float32": "float32", "base=bfloat16": "bfloat16"}
"""``--set base=…`` says in which precision the model is loaded, as ``--dtype`` does."""


def split_base(changes: Sequence[str], dtype: str | None) -> tuple[list[str], str | None]:
    """The changes of settings without the one that says how the base model is loaded, and that.

    Args:
        changes: as ``--set`` has them.
        dtype: what ``--dtype`` says.

    Raises:
        TPatchError: there is no such precision, or the two say different things.
    """
    rest = [change for change in changes if change.partition("=")[0].strip() != "base"]
    for change in (change for change in changes if change not in rest):
        name = BASES.get("base=" + change.partition("=")[2].strip())
        if name is None:
            raise TPatchError(
                f"{change!r} is no precision of a base model; give base=int8, base=float32 or base=bfloat16"
            )
        if dtype not in (None, name):
            raise TPatchError(f"--set {change} and --dtype {dtype} say different things; leave one of them out")
        dtype = name
    return rest, dtype


def settings_of(preset: str | None, config: str | None, changes: Sequence[str]) -> "TPatcherSettings":
    """Settings from a preset, a YAML file and ``name=value`` changes, in this order."""
    from tpatch_jax.editors.tpatcher.settings import PRESETS
    from tpatch_jax.storage.settings import change

    name, values = preset_of(preset, config)
    return change(change(PRESETS[name], values), changes)


def preset_of(preset: str | None, config: str | None) -> tuple[str, dict[str, Any]]:
    """The name of a preset, and what else a YAML file sets, which may name one, too."""
    from tpatch_jax.editors.tpatcher.settings import PRESETS
    from tpatch_jax.storage.settings import read_config

    values = read_config(config) if config else {}
    name = preset or values.pop("preset", "default")
    values.pop("preset", None)
    if not isinstance(name, str) or name not in PRESETS:
        raise TPatchError(f"preset {name!r} does not exist; choose from {', '.join(sorted(PRESETS))}")
    return name, values


def requests_of(
    path: str | None,
    single: tuple[str | None, str | None, str | None],
    action: str = "edit",
    join: str | None = None,
    form: str | None = None,
    system: str | None = None,
) -> list[EditRequest]:
    """Requests from a file, or the one that ``--prompt``, ``--target`` and what goes with them make."""
    from tpatch_jax.storage.request_file import read_requests

    prompt, target, subject = single
    if path is not None:
        if any(text is not None for text in (*single, join, form, system)):
            raise TPatchError("give either a file of requests or --prompt and --target, not both")
        return read_requests(path)
    if prompt is None or target is None:
        given = [name for name, text in zip(("prompt", "target", "subject"), single, strict=True) if text is not None]
        lacking = [f"--{name}" for name in ("prompt", "target") if name not in given]
        what = f"--{given[0]} is given without {' and '.join(lacking)}" if given else "no request is given"
        raise TPatchError(f"nothing to {action}: {what}; give a file of requests, or --prompt and --target")
    request = EditRequest(prompt, target, subject, join=join, form=form, system=system)
    return [check_request(request, "the request of the command line")]


def show_rows(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first row holds the headings; all columns but the first hold numbers.

    Where the terminal is too narrow for whole words, the headings stand above and columns have numbers; where it is too
    narrow for these, the table is continued below.
    """
    from rich.text import Text

    console, headings = result_console(), rows[0]
    if _width(rows) > console.width:
        console.print(title, markup=False)
        for number, heading in enumerate(headings[1:], 1):
            console.print(f"[{number}] {heading}", markup=False)
        title, headings = "", [headings[0], *(f"[{number}]" for number in range(1, len(headings)))]
    rows = [headings, *rows[1:]]
    for columns in _parts(rows, console.width):
        table = result_table(title, [headings[n] for n in columns], [headings[n] for n in columns[1:]])
        table.title = table.title if title else None
        for row in rows[1:]:
            table.add_row(*(Text(row[n]) for n in columns))
        console.print(table)


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """What each column takes at least, if no word is cut and no figure broken, with the rule beside it."""
    longest = lambda texts: max((len(text) for text in texts), default=0)  # noqa: E731
    return [3 + max(longest(column[0].split()), longest(column[1:])) for column in zip(*rows, strict=True)]


def _width(rows: Sequence[Sequence[str]]) -> int:
    return 1 + sum(_widths(rows))


def _parts(rows: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """Columns by their numbers, the first in every part, as many in each as are no wider than the terminal."""
    first, *others = _widths(rows)
    parts: list[list[int]] = [[0]]
    room = width - 1 - first
    for number, needed in enumerate(others, 1):
        if needed > room and len(parts[-1]) > 1:
            parts.append([0])
            room = width - 1 - first
        parts[-1].append(number)
        room -= needed
    return parts
