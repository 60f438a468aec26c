"""Probes that do not measure what they seem to: neighbours that are edited, questions that name the answer."""

from collections.abc import Mapping, Sequence

from tpatch_jax.evaluation.comparing import names
from tpatch_jax.evaluation.record import Record

__all__ = ["contaminated_probes", "count_probes"]

ELSEWHERE = ("neighborhood_new", "neighborhood_true", "locality", "locality_answer", "relation_specificity")
FOLLOWING = ("portability", "multi_hop")


def contaminated_probes(records: Sequence[Record], together: bool = True) -> list[dict[str, tuple[bool, ...]]]:
    """Which probes of each record are contaminated.

    A prompt about something else (a neighbour, a locality prompt) is, if it is itself the prompt or a rephrasing of an
    edit that is active; a question that follows from an edit (portability, several hops), if it names a new object,
    which then needs only be copied. White space and punctuation at a prompt's end make no other prompt; an object is
    named in any case, as whole words.

    Args:
        records: what is edited and asked.
        together: whether the edits of all records are active when one is measured; otherwise only its own.

    Returns:
        For each record by kind of probe ``[probes]`` bool, for the kinds that can be contaminated.

    Example:
        >>> from tpatch_jax.evaluation.record import Probe
        >>> from tpatch_jax.requests import EditRequest
        >>> probes = {"portability": (Probe("What river is Lyon on?", "Rhône"),)}
        >>> contaminated_probes([Record("one", (EditRequest("The capital of France is", "Lyon"),), probes)])
        [{'portability': (True,)}]
    """
    edited = [
        {_as_asked(text) for request in record.requests for text in (request.prompt, *request.rephrases)}
        for record in records
    ]
    everywhere: set[str] = set().union(*edited) if together else set()
    marks = []
    for record, here in zip(records, edited, strict=True):
        active = everywhere or here
        targets = {request.target for request in record.requests}
        marks.append(
            {
                kind: tuple(
                    _as_asked(probe.prompt) in active
                    if kind in ELSEWHERE
                    else any(names(probe.prompt, target) for target in targets)
                    for probe in probes
                )
                for kind, probes in record.probes.items()
                if kind in ELSEWHERE or kind.startswith(FOLLOWING)
            }
        )
    return marks


def _as_asked(prompt: str) -> str:
    return " ".join(prompt.split()).rstrip(".?! ")


def count_probes(records: Sequence[Record], marks: Sequence[Mapping[str, Sequence[bool]]]) -> dict[str, dict[str, int]]:
    """How many probes of each kind there are, and how many of them are contaminated.

    Args:
        records: what is asked.
        marks: of the same records, from `contaminated_probes`.

    Returns:
        By kind ``{"all", "contaminated"}``.
    """
    counts: dict[str, dict[str, int]] = {}
    for record, marked in zip(records, marks, strict=True):
        for kind, probes in record.probes.items():
            count = counts.setdefault(kind, {"all": 0, "contaminated": 0})
            count["all"] += len(probes)
            count["contaminated"] += sum(marked.get(kind, ()))
    return counts
