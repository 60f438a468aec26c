"""The page on all commands, made of the dataclasses that the command line is made of.

Written anew by ``python -m tpatch_jax.cli.reference docs/commands.md``.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import tyro

from tpatch_jax.cli.common import Command
from tpatch_jax.cli.main import ABOUT, ABOUT_BANKS, BANK_COMMANDS, COMMANDS
from tpatch_jax.storage.files import write_text

__all__ = ["command_reference", "main"]

ARGUMENT: type = type(tyro.conf.arg())
POSITIONAL: Any = tyro.conf.Positional[str].__metadata__[0]  # type: ignore[attr-defined]

HEAD = f"""# Commands

<!-- Made by: python -m tpatch_jax.cli.reference docs/commands.md -->

{ABOUT} Every command takes `--help`, `--json` (its last line is one JSON object)
and `--quiet`. It ends with status 0; with 1 after a mistake, which the message explains; with 130 after Ctrl-C.

`--set` takes a [setting](api/editing.md) by its dotted name, such as `fit.key_steps=32`, or by as much of its end as
fits no other setting (`key_steps=32`). In `tpatch eval --method tpatcher,rome` the method's name may stand in front
(`rome.value_steps=30`), and must where several of the methods have such a setting.
"""


class _Parameter(NamedTuple):
    """A parameter of a command, as the page shows it."""

    shown: str  # as a synopsis has it: its shortest name, and what stands for its value
    long: str  # its long name where that is another
    help: str
    default: str
    positional: bool
    required: bool


def command_reference() -> str:
    """The page, in Markdown.

    Example:
        >>> command_reference().splitlines()[0]
        '# Commands'
    """
    sections = [HEAD]
    sections += [_section("tpatch", name, command) for name, command in COMMANDS.items() if name != "bank"]
    sections += [f"## tpatch bank\n\n{ABOUT_BANKS}\n"]
    sections += [_section("tpatch bank", name, command) for name, command in BANK_COMMANDS.items()]
    return "\n".join(sections)


def _section(program: str, name: str, command: type[Command]) -> str:
    parameters = list(_parameters(command))
    words = [one.shown if one.required else f"[{one.shown}]" for one in parameters if one.positional]
    words += [one.shown for one in parameters if one.required and not one.positional]
    level = "##" if program == "tpatch" else "###"
    lines = [f"{level} {program} {name}", "", str(command.__doc__), "", f"    {' '.join([program, name, *words])}", ""]
    lines += ["| parameter | what it is | default |", "| --- | --- | --- |"]
    for one in parameters:
        # `|` would end a cell.
        names = ", ".join(f"`{name}`" for name in (one.shown, one.long) if name)
        cells = (names, one.help, "required" if one.required else one.default and f"`{one.default}`")
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


def _parameters(command: type[Any]) -> Iterator[_Parameter]:
    hints = get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        hint = hints[field.name]
        notes = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        argument: Any = next((note for note in notes if isinstance(note, ARGUMENT)), tyro.conf.arg())
        kind, required = _kind(hint), field.default is dataclasses.MISSING
        value = argument.metavar or {bool: "", str: "TEXT"}.get(kind, kind.__name__.upper())
        default = "" if required or field.default in (None, False, ()) else str(field.default)
        long, positional = f"--{(argument.name or field.name).replace('_', '-')}", POSITIONAL in notes
        short = "" if positional else (argument.aliases or (long,))[0]
        yield _Parameter(
            f"{short} {value}".strip(),
            "" if positional or short == long else long,
            argument.help or "",
            default,
            positional,
            required,
        )


def _kind(hint: Any) -> type:
    """What one value is: of ``str | None`` and of ``tuple[str, ...]`` it is ``str``."""
    while get_origin(hint) is not None:
        hint = next(one for one in get_args(hint) if one is not type(None))
    return hint


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page.

    Args:
        arguments: where to, by default ``docs/commands.md``; those of the command line if absent.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tpatch_jax.cli.reference", description="Write the page on commands."
    )
    parser.add_argument("page", type=Path, nargs="?", default=Path("docs/commands.md"), help="default: %(default)s")
    write_text(parser.parse_args(arguments).page, command_reference())


if __name__ == "__main__":
    main()
