"""What callers give: each argument is of the kind that a function takes, or a message says how the call is written.

Python finds out about arguments in the wrong order, or of the wrong kind, only deep inside; the command line cannot
mistake them.
"""

import os
from collections.abc import Callable
from numbers import Integral
from pathlib import Path
from typing import Any

from tpatch_jax.errors import TPatchError

__all__ = ["as_count", "as_path", "check_call", "check_kind", "describe", "install_advice"]


def describe(value: Any) -> str:
    """What something is, in a few words.

    Example:
        >>> describe(None), describe("paper"), describe({}), describe(3)
        ('None', "'paper'", 'a dict', '3')
    """
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, str | bytes):
        return repr(value[:40])
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[:1] in 'AEIOaeiou' else 'a'} {name}"


def install_advice(package: str, extra: str) -> str:
    """How to install a package that is missing, whether this library came from an index or from a clone.

    Args:
        package: what to install, with its version.
        extra: the extra of this library that has it.

    Example:
        >>> install_advice("gguf>=0.17", "demo").split(", or")[0]
        'pip install "gguf>=0.17"'
    """
    whole = f'in a clone pip install -e ".[{extra}]", elsewhere pip install "tpatch-jax[{extra}]"'
    return f'pip install "{package}", or with all of its extra: {whole}'


def check_kind(value: Any, kinds: Any, call: str, mend: str) -> None:
    """Make sure that an argument is of a kind.

    Args:
        value: the argument.
        kinds: a type, or a union of types.
        call: how the function is called, for the message.
        mend: what the argument should be.

    Raises:
        TPatchError: it is something else.
    """
    if not isinstance(value, kinds):
        raise TPatchError(f"{call}: {describe(value)} is not {mend}")


def as_path(value: Any, call: str, mend: str = "a path; give a text or a Path") -> Path:
    """A file or folder that a caller names.

    Args:
        value: a text or anything else that stands for a path.
        call: how the function is called, for the message.
        mend: what the argument should be.

    Raises:
        TPatchError: it is something else, or no path can be written like this.

    Example:
        >>> as_path("banks/facts", "open_bank(folder)").name
        'facts'
    """
    if isinstance(folder := getattr(value, "folder", None), Path) and not isinstance(value, os.PathLike):
        raise TPatchError(f"{call}: {describe(value)} is not {mend}; perhaps its own, {str(folder)!r}")
    check_kind(value, str | os.PathLike, call, mend)
    if "\0" in str(value):
        raise TPatchError(f"{call}: {str(value)!r} holds a character that no path can have; take it out")
    return Path(value)


def as_count(value: Any, name: str, least: int = 1) -> int:
    """A whole number that a caller gives.

    Args:
        value: the number.
        name: what messages call it.
        least: the least that makes sense.

    Raises:
        TPatchError: it is no whole number, or less than that.

    Example:
        >>> as_count(3, "batch")
        3
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise TPatchError(f"{name} is {describe(value)}; give a whole number, {least} or more")
    return int(value)


def check_call(**functions: Callable[..., Any] | None) -> None:
    """Make sure that what is to be called can be called; nothing is as good.

    Args:
        functions: by the name of the argument.

    Raises:
        TPatchError: one of them cannot be called; it names the first.
    """
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TPatchError(f"{name} is {describe(function)}; give a function, or leave it out")
