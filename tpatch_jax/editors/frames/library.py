"""The relations of the library, read once they are needed.

They are written in the ``.toml`` files beside this module; what is read is ``compiled.json``, made of them by
``python -m tpatch_jax.editors.frames.compiling``, which takes a hundredth of a second to read.
"""

import json
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple

from tpatch_jax.errors import TPatchError

__all__ = [
    "KINDS",
    "Form",
    "Relation",
    "check_form",
    "check_kind",
    "compiled",
    "frames_of_kind",
    "read_relations",
    "read_toml",
    "relations",
]

Form = Literal["statement", "question"]

KINDS = ("person", "place", "organisation", "work", "thing")
"""What a subject can be; a thing is all that is none of the others: a species, a food, a disease, a language."""


class Relation(NamedTuple):
    """Something that can be said of a subject, in several wordings.

    Attributes:
        id: its name in words, behind the kind of its subjects: ``"person.native_language"``.
        kinds: the kinds of subject that it is asked of.
        answer: what kind of answer follows: ``"language"``, ``"person"``, ``"date"``.
        statements: texts with one ``{}`` for the subject, unfinished, so that the answer follows.
        questions: the same, asked.
        sorts: the sorts of subject within a kind that it suits, such as ``"city"``; none if it suits all.
        near: the ids of relations that are the same fact, or almost, seen from another side.
        words: further words by which people speak of it, for matching.
    """

    id: str
    kinds: tuple[str, ...]
    answer: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    sorts: tuple[str, ...] = ()
    near: tuple[str, ...] = ()
    words: tuple[str, ...] = ()

    def texts(self, form: Form) -> tuple[str, ...]:
        """The wordings of one form.

        Example:
            >>> Relation("person.pet", ("person",), "animal", ("{} keeps a",), ("What is {}'s pet?",)).texts("question")
            ("What is {}'s pet?",)
        """
        check_form(form)
        return self.questions if form == "question" else self.statements


def check_form(form: str) -> None:
    """Refuses what is no form of a wording.

    Raises:
        TPatchError: if it is neither ``"statement"`` nor ``"question"``.
    """
    if form not in ("statement", "question"):
        raise TPatchError(f"form is {form!r}; it is 'statement' or 'question'")


def check_kind(kind: str) -> None:
    """Refuses what is no kind of subject.

    Raises:
        TPatchError: if it is none of `KINDS`.
    """
    if kind not in KINDS:
        raise TPatchError(f"kind is {kind!r}; it is one of {', '.join(KINDS)}")


def _relation(file: str, name: str, entry: dict[str, Any]) -> Relation:
    kinds = tuple(entry.pop("kinds", (file,)))
    return Relation(f"{file}.{name}", kinds, entry.pop("answer"), **{key: tuple(value) for key, value in entry.items()})


def read_toml(name: str) -> dict[str, Any]:
    """One of the files that are written by hand."""
    return tomllib.loads(files("tpatch_jax.editors.frames").joinpath(f"{name}.toml").read_text("utf-8"))


def read_relations() -> tuple[Relation, ...]:
    """All relations as they are written by hand, in the order of the files."""
    return tuple(_relation(file, name, entry) for file in (*KINDS, "any") for name, entry in read_toml(file).items())


@cache
def compiled() -> Mapping[str, Any]:
    """What is made of the files that are written by hand."""
    return json.loads(files("tpatch_jax.editors.frames").joinpath("compiled.json").read_text("utf-8"))


@cache
def relations() -> tuple[Relation, ...]:
    """All relations of the library, in the order of its files.

    Example:
        >>> next(relation.answer for relation in relations() if relation.id == "person.native_language")
        'language'
    """
    return tuple(
        Relation(name, tuple(kinds), answer, *(tuple(texts) for texts in further))
        for name, kinds, answer, *further in compiled()["relations"]
    )


def frames_of_kind(kind: str, sort: str | None = None) -> tuple[Relation, ...]:
    """The relations that can be asked of a kind of subject.

    Args:
        kind: one of `KINDS`.
        sort: a sort within the kind, such as ``"city"``; relations that only suit others are left out.

    Returns:
        In the order of the library.

    Raises:
        TPatchError: if there is no such kind.

    Example:
        >>> ids = [relation.id for relation in frames_of_kind("place", "river")]
        >>> "place.mouth" in ids, "place.continent" in ids, "place.mayor" in ids, "work.author" in ids
        (True, True, False, False)
    """
    check_kind(kind)
    of_kind = (relation for relation in relations() if kind in relation.kinds)
    return tuple(relation for relation in of_kind if sort is None or not relation.sorts or sort in relation.sorts)
