"""Settings by name: a preset, a YAML file, and ``name=value`` changes on top.

A setting has a dotted name, the path to it through the nested settings, such as ``fit.weights.memory``. Its last part,
or its last few, will do where they fit no other setting.
"""

import contextlib
import dataclasses
import difflib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tpatch_jax.errors import TPatchError

__all__ = [
    "RENAMED",
    "RETIRED",
    "change",
    "change_each",
    "combine",
    "has_setting",
    "known_names",
    "read_config",
    "split_changes",
]

RENAMED: Mapping[str, str] = {"swaps": "other_subjects"}
"""What settings are called now, by what they were called before, both bare or dotted.

Old names go on working in YAML files, in the manifests of banks and on the command line. A prefix stays what it is:
``{"old": "new"}`` makes ``fit.new`` of ``fit.old``. A setting that has the old name now is meant before a renamed one.
"""

RETIRED = ("value.rate", "value.momentum", "value.decay", "subject.key_contrast")
"""Settings that there are no more, dotted. Banks and files that name one can still be read; it has no effect."""

Names = tuple[str, ...]


def read_config(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Args:
        path: the file.

    Raises:
        TPatchError: the file is missing, or is not a YAML mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise TPatchError(f"{path} does not exist; give a YAML file with 'name: value' lines") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TPatchError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise TPatchError(f"{path} holds {type(content).__name__} instead of 'name: value' lines")
    return content


def _paths(settings: Any, prefix: Names = ()) -> Iterator[Names]:
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
    """The dotted names of these settings.

    Example:
        >>> from tpatch_jax.core.objective import Weights
        >>> known_names(Weights())[:2]
        ['activation', 'entropy']
    """
    return sorted(".".join(path) for path in _paths(settings))


def has_setting(settings: Any, name: str) -> bool:
    """Whether a name, bare or dotted, means one of these settings or several."""
    return bool(_matches(settings, name))


def split_changes(changes: Sequence[str]) -> dict[str, Any]:
    """``"name=value"`` texts as values by name, each read as YAML; of two with one name the later counts.

    Raises:
        TPatchError: a text is not of this form.

    Example:
        >>> split_changes(["memory=5"])
        {'memory': 5}
    """
    values: dict[str, Any] = {}
    for text in changes:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise TPatchError(f"--set {text}: write it as name=value")
        values = combine(values, {name.strip(): _value(name, value)})
    return values


def combine(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Changes after one another, in this order, which counts where two names mean the same setting.

    Example:
        >>> combine({"memory": 1, "weights.memory": 2}, {"memory": 3})
        {'weights.memory': 2, 'memory': 3}
    """
    return {**{name: value for name, value in earlier.items() if name not in later}, **later}


def change(settings: Any, changes: Mapping[str, Any] | Sequence[str]) -> Any:
    """Settings with some values replaced, each by its dotted name or as much of its end as says which one is meant.

    Args:
        settings: a (nested) dataclass or named tuple.
        changes: new values by name, in dictionaries within one another as well, or ``"name=value"`` texts.

    Returns:
        New settings of the same type.

    Raises:
        TPatchError: a name does not exist (the nearest one is suggested) or fits several settings (all are named), or
            a value has the wrong type.

    Example:
        >>> from tpatch_jax.core.fit import FitSettings
        >>> change(FitSettings(), ["weights.memory=5"]).weights.memory
        5.0
        >>> change(FitSettings(), ["memory=5"]).weights.memory
        5.0
    """
    for name, value in _flat(changes if isinstance(changes, Mapping) else split_changes(changes)).items():
        matches = _matches(settings, name)
        if not matches and _retired(name) and has_setting(settings, "value.steps"):
            warnings.warn(f"the setting {name!r} has no effect any more; leave it out", stacklevel=2)
            continue
        if not matches:
            raise TPatchError(f"there is no setting {name!r}; {_hint(name, _paths(settings))}")
        if len(matches) > 1:
            names = ", ".join(".".join(path) for path in matches)
            raise TPatchError(f"several settings are called {name!r}; say which: {names}")
        settings = _replace(settings, matches[0], value)
    return settings


def change_each(settings: Mapping[str, Any], changes: Mapping[str, Any], methods: Iterable[str] = ()) -> dict[str, Any]:
    """Settings of several methods with some values replaced, each in the one method that has it.

    Args:
        settings: by the method's name.
        changes: new values by name, as `change` takes them; with a method's name in front (``rome.value_steps``) for
            this method alone.
        methods: names of further methods, which a change cannot be for.

    Returns:
        New settings by the method's name.

    Raises:
        TPatchError: no method has such a setting or several have it, the method is not among them, or a value has the
            wrong type.

    Example:
        >>> from tpatch_jax.core.fit import FitSettings
        >>> settings = {"one": FitSettings(), "other": FitSettings()}
        >>> change_each(settings, {"one.weights.memory": 5})["one"].weights.memory
        5.0
    """
    result = dict(settings)
    for name, value in _flat(changes).items():
        method, _, rest = str(name).partition(".")
        if rest and method in settings:
            result[method] = change(result[method], {rest: value})
            continue
        if rest and method in set(methods):
            raise TPatchError(
                f"{name!r} is a setting of {method}, which is not used here; leave it out or add {method}"
            )
        having = {method: _matches(of, name) for method, of in settings.items() if has_setting(of, name)}
        if not having:
            paths = [path for of in settings.values() for path in _paths(of)]
            raise TPatchError(f"there is no setting {name!r}; {_hint(name, paths)}")
        if len(having) > 1:
            names = ", ".join(".".join((method, *path)) for method, paths in having.items() for path in paths)
            raise TPatchError(f"several methods have a setting {name!r}; say which: {names}")
        (method,) = having
        result[method] = change(result[method], {name: value})
    return result


def _flat(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Changes in dictionaries within one another by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def _matches(settings: Any, name: str) -> list[Names]:
    """The one setting of this dotted name, else all whose names end with it; the same of a renamed one's new name."""
    paths = list(_paths(settings))
    for candidate in (str(name), _renamed(str(name))):
        parts = tuple(candidate.split("."))
        if parts in paths:
            return [parts]
        if matches := [path for path in paths if path[-len(parts) :] == parts]:
            return matches
    return []


def _renamed(name: str) -> str:
    for old, new in RENAMED.items():
        if name == old or name.endswith(f".{old}"):
            return name.removesuffix(old) + new
    return name


def _retired(name: str) -> bool:
    return any(f".{retired}".endswith(f".{name}") or name.endswith(f".{retired}") for retired in RETIRED)


def _hint(name: str, paths: Iterable[Names]) -> str:
    """What may have been meant; dotted if the name is."""
    paths = sorted(set(paths))
    prefix, _, last = str(name).rpartition(".")
    near = difflib.get_close_matches(last, [path[-1] for path in paths], 1)
    if not near:
        return f"known are {', '.join(sorted({path[-1] for path in paths}))}"
    if not prefix:
        return f"did you mean {near[0]!r}?"
    dotted = sorted({".".join(path) for path in paths if path[-1] == near[0]})
    return f"did you mean {' or '.join(map(repr, dotted))}?"


def _replace(settings: Any, path: Names, value: Any) -> Any:
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
