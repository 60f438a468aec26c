"""General ability by multiple choice: which of a few answers a model holds likeliest, before and after edits.

A choice counts by the log-likelihood of its tokens after the question, as the common harnesses have it; normalised, by
that divided by its length in bytes. Questions come from a file of one's own, or are made from CounterFact: what stands
beside each of its records asks the same relation of other subjects, whose answer is the record's true one, and the
other choices are true answers of other records of that relation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tpatch_jax.core.checks import text_generator
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.comparing import name_finder
from tpatch_jax.evaluation.data_files import Entry, read_entries
from tpatch_jax.evaluation.data_notes import DataNotes
from tpatch_jax.evaluation.record import Probe
from tpatch_jax.evaluation.scoring import Base, Outcome

__all__ = ["CHOICES", "ChoiceQuestion", "choice_figures", "choice_probes", "choose_answers", "read_choices"]

CHOICES = "choices"
"""The name of this data set; also what a question's answers stand under."""

EACH = 4
"""A question that is made has so many answers to choose from."""


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question and the answers to choose from.

    Attributes:
        prompt: what the model reads.
        choices: two answers or more, as they follow it.
        answer: the number of the right one, from 0.

    Example:
        >>> ChoiceQuestion("The capital of France is", ("Rome", "Paris"), 1).choices[1]
        'Paris'
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int


def read_choices(path: str | Path, n: int | None = None, *, subjects: Sequence[str] = ()) -> list[ChoiceQuestion]:
    """Read questions with their choices, or make them from CounterFact.

    Args:
        path: JSON lines, or a JSON list, of ``prompt, choices, answer``, the last one's number from 0 or its text; or
            CounterFact in ROME's original record format.
        n: so many questions from the start; all when absent. Of CounterFact each record gives one first, then each a
            second one, and so on.
        subjects: of edits: questions that name one are left out, for they ask about what was changed.

    Raises:
        TPatchError: the file cannot be read, a question lacks a field or has an answer that is none of its choices, or
            there are fewer than ``n``.

    Example:
        >>> read_choices("questions.jsonl", 500)  # doctest: +SKIP
        [ChoiceQuestion(prompt='The capital of France is', choices=('Rome', 'Paris'), answer=1), ...]
    """
    if n is not None and n < 1:
        raise TPatchError(f"{n} questions were asked for; ask for 1 or more")
    entries = read_entries(path, CHOICES, DataNotes(strict=True))
    if "requested_rewrite" in entries[0].content:
        questions = _questions_about_neighbours(entries)
    else:
        questions = [_question(entry) for entry in entries]
    asks_of = name_finder(subjects)
    questions = [question for question in questions if not asks_of(question.prompt)]
    if not questions or (n is not None and n > len(questions)):
        about = " that name no edited subject" if subjects else ""
        raise TPatchError(f"{path} gives {len(questions)} questions{about}, but {n or 1} were asked for; ask for fewer")
    return questions[:n]


def _question(entry: Entry) -> ChoiceQuestion:
    prompt, choices, answer = entry.text("prompt"), entry.texts(CHOICES), entry.get("answer")
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise entry.wrong(CHOICES, "two different texts or more")
    if isinstance(answer, str) and answer.strip() in choices:
        answer = choices.index(answer.strip())
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise entry.wrong("answer", f"one of the choices, or its number from 0 to {len(choices) - 1}")
    return ChoiceQuestion(prompt, choices, answer)


def _questions_about_neighbours(entries: Sequence[Entry]) -> list[ChoiceQuestion]:
    """Questions of CounterFact, of which no file has choices: neighbours, with answers of the same relation."""
    answers: dict[str, set[str]] = {}
    read = []
    for entry in entries:
        relation, true = (entry.text(f"requested_rewrite.{field}") for field in ("relation_id", "target_true.str"))
        answers.setdefault(relation, set()).add(true)
        read.append((relation, true, entry.texts("neighborhood_prompts")))
    pools = {relation: sorted(true) for relation, true in answers.items()}
    made: dict[str, ChoiceQuestion] = {}
    for turn in range(max(len(prompts) for _, _, prompts in read)):
        for relation, true, prompts in read:
            if turn >= len(prompts) or prompts[turn] in made:
                continue
            others = [one for one in pools[relation] if one != true]
            if len(others) < EACH - 1:
                continue
            # Drawn from the prompt, so that a question is the same wherever in the file it stands.
            rng = text_generator(prompts[turn])
            chosen = [true, *(others[pick] for pick in rng.permutation(len(others))[: EACH - 1])]
            order = rng.permutation(EACH).tolist()
            choices = tuple(chosen[pick] for pick in order)
            made[prompts[turn]] = ChoiceQuestion(prompts[turn], choices, order.index(0))
    return list(made.values())


def choice_probes(questions: Sequence[ChoiceQuestion]) -> list[Probe]:
    """What a model is asked: each question with each of its choices, one question after the other.

    Args:
        questions: the questions.

    Example:
        >>> [probe.target for probe in choice_probes([ChoiceQuestion("2 + 2 =", ("4", "5"), 0)])]
        ['4', '5']
    """
    return [Probe(question.prompt, choice) for question in questions for choice in question.choices]


def choose_answers(
    questions: Sequence[ChoiceQuestion], base: Base, outcome: Outcome, *, normalised: bool = False
) -> np.ndarray:
    """The number of the choice that a model holds likeliest, ``argmax_c log p(c | prompt)``, of each question.

    Args:
        questions: the questions.
        base: what was asked: `choice_probes`, in tokens.
        outcome: what a model says to it.
        normalised: by ``log p(c | prompt)`` over the choice's length in bytes of UTF-8, so that short answers have no
            advantage.

    Returns:
        ``[questions]`` int; of equal ones the first.
    """
    likelihood = np.add.reduceat(outcome.log_p.astype(np.float64), base.asked.starts[:-1])
    chosen, first = [], 0
    for question in questions:
        each = likelihood[first : first + len(question.choices)]
        length = [len(choice.encode()) for choice in question.choices] if normalised else 1
        chosen.append(int(np.argmax(each / np.asarray(length))))
        first += len(question.choices)
    return np.asarray(chosen)


def choice_figures(questions: Sequence[ChoiceQuestion], base: Base, outcome: Outcome) -> dict[str, float]:
    """How many questions a model answers rightly, and how many as the unedited one does.

    Args:
        questions: the questions.
        base: what the unedited model says to `choice_probes`.
        outcome: what a model says to it, edited or not.

    Returns:
        ``choices_accuracy``, ``choices_accuracy_normalised`` and ``choices_unchanged``, shares of the questions.
    """
    right = np.asarray([question.answer for question in questions])
    chosen = choose_answers(questions, base, outcome)
    normalised = choose_answers(questions, base, outcome, normalised=True)
    return {
        "choices_accuracy": float(np.mean(chosen == right)),
        "choices_accuracy_normalised": float(np.mean(normalised == right)),
        "choices_unchanged": float(np.mean(chosen == choose_answers(questions, base, base.outcome))),
    }
