"""What the benchmark edits: made-up statements about made-up people, or a file."""

from collections.abc import Sequence
from pathlib import Path

from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.records import read_records
from tpatch_jax.requests import EditRequest
from tpatch_jax.storage.request_file import read_requests

__all__ = ["edits_to_time"]

# ruff: noqa: SIM905
_FIRST = (
    "Ada Agnes Albert Alice Amalia Anton Astrid Bela Bertha Boris Bruno Carla Cecil Clara Conrad Dora Edgar Edith "
    "Elias Elsa Emil Erik Eva Felix Flora Franz Frida Georg Greta Gustav Hanna Hugo Ida Igor Ilse Irma Ivan Jakob Jan "
    "Jonas Julia Karl Klara Lars Laura Lena Leo Lotte Lucia Magda Marco Maria Max Mila Nora Olga Oscar Otto Paula "
    "Peter Rosa Rudolf Vera Viktor"
).split()
_LAST = (
    "Abbott Adler Almgren Barlow Bauer Becker Berg Bianchi Blom Bondar Carrel Castro Cole Dahl Danek Duarte Eberle "
    "Falk Farkas Ferrari Fischer Forsyth Gallo Garner Haas Hale Hansen Hoffer Horvath Ibsen Jansen Jones Kaplan Keller "
    "Klein Kovacs Kramer Lange Lindgren Lopez Marek Mason Meyer Moreau Nagy Novak Olsen Palmer Petrov Quist Richter "
    "Rossi Sandoval Schmid Silva Sorel Strand Tanaka Toth Ulrich Varga Weber Winter Zeman"
).split()
_ELSEWHERE = "Arnold Brandt Curtis Dupont Engel Fontaine Granger Holt".split()
_RELATIONS = (
    ("{} was born in the city of", ("Paris", "Rome", "Vienna", "Prague", "Madrid", "London", "Berlin", "Oslo")),
    ("{} works in the field of", ("physics", "chemistry", "biology", "geology", "medicine", "logic")),
    ("The mother tongue of {} is", ("French", "Italian", "German", "Spanish", "Dutch", "Polish", "Greek")),
    ("{} is a citizen of", ("France", "Italy", "Austria", "Spain", "Norway", "Poland", "Japan")),
    ("{} plays the", ("piano", "guitar", "violin", "flute", "drums", "trumpet")),
    ("The profession of {} is", ("lawyer", "painter", "actor", "poet", "architect", "journalist")),
)


def edits_to_time(count: int, file: str | Path | None = None) -> list[EditRequest]:
    """Requests with a subject, no two with the same prompt, each with a prompt that must not change.

    Args:
        count: how many.
        file: a file of requests (``.jsonl``) or of CounterFact; by default statements about made-up people.

    Returns:
        The requests.

    Raises:
        TPatchError: there are not so many.

    Example:
        >>> edits_to_time(2)[0].prompt
        'Ada Abbott was born in the city of'
    """
    if file is None:
        # No person twice before all have been named.
        edits = [_made_up(number) for number in range(min(count, len(_FIRST) * len(_LAST) * len(_RELATIONS)))]
    else:
        edits = _without_repetition(
            read_requests(file)
            if Path(file).suffix == ".jsonl"
            else [request for record in read_records("counterfact", file) for request in record.requests]
        )[:count]
    if len(edits) < count:
        raise TPatchError(
            f"{file or 'the built-in list'} has {len(edits)} different prompts, and {count} edits were asked for; ask "
            "for fewer"
        )
    return edits


def _made_up(number: int) -> EditRequest:
    first, rest = _FIRST[number % len(_FIRST)], number // len(_FIRST)
    last, turn = _LAST[rest % len(_LAST)], rest // len(_LAST)
    relation, answers = _RELATIONS[(number + number // len(_RELATIONS) + turn) % len(_RELATIONS)]
    name, neighbour = f"{first} {last}", f"{first} {_ELSEWHERE[number % len(_ELSEWHERE)]}"
    answer = answers[(number // len(_RELATIONS)) % len(answers)]
    return EditRequest(relation.format(name), answer, name, locality=(relation.format(neighbour),))


def _without_repetition(requests: Sequence[EditRequest]) -> list[EditRequest]:
    first: dict[str, EditRequest] = {}
    for request in requests:
        first.setdefault(request.prompt, request)
    return list(first.values())
