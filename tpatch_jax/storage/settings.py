"""Settings by name: a preset, a YAML file, and ``name=value`` changes on top."""

import contextlib
import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tpatch_jax.errors import TPatchError

__all__ = ["change", "known_names", "read_config", "split_changes"]


def read_config(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Args:
        path: the file.

    Raises:
        TPatchError: the file is missing, or is not a YAML mapping.
    """
    try:
        found = yaml.safe_load(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise TPatchError(f"{path} does not exist; give a YAML file with 'name: value' lines") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TPatchError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise TPatchError(f"{path} holds {type(found).__name__} instead of 'name: value' lines")
    return found


def _paths(settings: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    fields = (
        settings._fields if hasattr(settings, "_fields") else [field.name for field in dataclasses.fields(settings)]
    )
    for name in fields:
        value = getattr(settings, name)
        if dataclasses.is_dataclass(value) or hasattr(value, "_fields"):
            yield from _paths(value, (*prefix, name))
        else:
            yield (*prefix, name)


def known_names(settings: Any) -> list[str]:
    """The names that `change` understands for these settings."""
    return sorted(path[-1] for path in _paths(settings))


def split_changes(changes: Sequence[str]) -> dict[str, Any]:
    """``"name=value"`` texts as values by name, each read as YAML.

    Raises:
        TPatchError: a text is not of this form.

    Example:
        >>> split_changes(["memory=5"])
        {'memory': 5}
    """
    pairs = [text.partition("=") for text in changes]
    for (name, equals, _), text in zip(pairs, changes, strict=True):
        if not name or not equals:
            raise TPatchError(f"--set {text}: write it as name=value")
    return {name.strip(): _value(name, value) for name, _, value in pairs}


def change(settings: Any, changes: Mapping[str, Any] | Sequence[str]) -> Any:
    """Settings with some values replaced, wherever in the nested settings a name lives.

    Args:
        settings: a (nested) dataclass or named tuple.
        changes: new values by name, or ``"name=value"`` texts.

    Returns:
        New settings of the same type.

    Raises:
        TPatchError: a name does not exist (the nearest one is suggested), or a value has the wrong type.

    Example:
        >>> from tpatch_jax.core.fit import FitSettings
        >>> change(FitSettings(), ["memory=5"]).weights.memory
        5.0
    """
    if not isinstance(changes, Mapping):
        changes = split_changes(changes)
    paths = {path[-1]: path for path in _paths(settings)}
    for name, value in changes.items():
        short = str(name).rpartition(".")[2]
        if short not in paths:
            near = difflib.get_close_matches(short, paths, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(paths))}"
            raise TPatchError(f"there is no setting {name!r}{hint}")
        settings = _replace(settings, paths[short], value)
    return settings


def _replace(settings: Any, path: tuple[str, ...], value: Any) -> Any:
    name, *rest = path
    old = getattr(settings, name)
    new = _replace(old, tuple(rest), value) if rest else _coerced(name, old, value)
    return (
        settings._replace(**{name: new})
        if hasattr(settings, "_fields")
        else dataclasses.replace(settings, **{name: new})
    )


def _value(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise TPatchError(
            f"--set {name}={text}: the value cannot be read; give a number, a word, true or false"
        ) from None


def _coerced(name: str, old: Any, value: Any) -> Any:
    if isinstance(old, float) and isinstance(value, str):
        # YAML takes 1e-3, which has no point, for a text
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(old, str) and isinstance(value, int) and not isinstance(value, bool):
        # a setting that is a word or a number, such as layer=auto
        return str(value)
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, type(old)) and isinstance(value, bool) == isinstance(old, bool):
        return value
    raise TPatchError(f"setting {name!r} is {value!r}; give {_article(type(old))} such as {old!r}")


def _article(kind: type) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}.get(kind, kind.__name__)
