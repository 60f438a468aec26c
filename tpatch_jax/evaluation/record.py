"""One record of a data set: what is edited and what is asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tpatch_jax.requests import EditRequest

__all__ = ["Probe", "Record", "asked_only"]


class Probe(NamedTuple):
    """A question to the model, answered under teacher forcing: the text is ``prompt + join_target(prompt, target)``.

    Attributes:
        prompt: what the model reads.
        target: what is scored. Empty where no answer is known: then nothing is joined, and only the argmax of the next
            token after the prompt counts (`Score.predicted` has length one), enough to see whether it changed.

    Example:
        >>> Probe("The capital of France is", "Lyon").target
        'Lyon'
    """

    prompt: str
    target: str


@dataclass(frozen=True)
class Record:
    """One record of a data set.

    Attributes:
        id: names it in reports, e.g. ``cf-7``.
        requests: what is edited; one, except in MQuAKE.
        probes: by kind, none of them empty. The kind says which figure they serve (`tpatch_jax.evaluation.metrics`):

            - ``rewrite_new, rewrite_true, paraphrase_new, paraphrase_true, neighborhood_new, neighborhood_true``
              (CounterFact): the same prompts, in the same order, with the new and with the true target;
            - ``reliability, generalization`` (the others): the edit's prompt and its rephrasings, with the target;
            - ``rephrasing_<rule>`` (FEVER): the rephrasings that one rule makes;
            - ``accuracy``: an input of a training or test set, with its true answer, which is never edited;
            - ``locality``: prompts whose argmaxes must not change; ``locality_answer``: prompts that must be answered
              right;
            - ``keep`` (request files): prompts after which the model must go on as before, on which is trained;
            - ``portability``, or ``portability_<kind>`` in KnowEdit: questions that follow from the edit;
            - ``relation_specificity`` (KnowEdit): other facts about the edited subject, with their true answers;
            - ``multi_hop`` (MQuAKE): the questions, with the new answer.
        generation: openings that are continued freely for GE.
        questions: what is answered freely for the any-of-three rule.
        answers: what is accepted as an answer to them, the aliases included.
        old_answers: what was the answer before the edit; a longer name of theirs gives no new answer.

    Example:
        >>> request = EditRequest("The capital of France is", "Lyon")
        >>> record = Record("one", (request,), {"reliability": (Probe(request.prompt, request.target),)})
        >>> record.request.target
        'Lyon'
    """

    id: str
    requests: tuple[EditRequest, ...]
    probes: Mapping[str, tuple[Probe, ...]]
    generation: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    old_answers: tuple[str, ...] = ()

    @property
    def request(self) -> EditRequest:
        """The first of `requests`."""
        return self.requests[0]


def asked_only(records: Sequence[Record]) -> list[Record]:
    """Records whose requests are true and are only asked: a training set or a test set.

    Args:
        records: as a reader gives them.

    Returns:
        The same with one kind of probe, ``accuracy``.
    """
    return [
        Record(record.id, record.requests, {"accuracy": tuple(Probe(r.prompt, r.target) for r in record.requests)})
        for record in records
    ]
