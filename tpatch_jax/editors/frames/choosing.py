"""Frames for a request: the same asked in other words, and other things about its subject."""

from collections.abc import Sequence

from tpatch_jax.core.checks import text_generator
from tpatch_jax.editors.frames.answering import answer_kinds, fits
from tpatch_jax.editors.frames.library import Form, check_form, frames_of_kind, relations
from tpatch_jax.editors.frames.matching import guess_kind, match_relation
from tpatch_jax.editors.frames.recognising import known_relation, likely_relations
from tpatch_jax.editors.locating import split_at_subject
from tpatch_jax.editors.wordings import Wording, question, question_within
from tpatch_jax.requests import EditRequest

__all__ = ["other_frames", "same_frames"]

CLOSE = 0.6
"""A relation may be the request's if its score is this share of the best one's."""
CLEAR = 0.8
"""What is the same fact as a relation with this share of the best score is left out, too."""
POSSIBLE = 0.02
"""A relation may be the request's if its probability is this share of the most probable one's."""
PROBABLE = 0.3
"""What is the same fact as a relation with this share of that probability is left out, too."""


def _prompt(request: EditRequest) -> str | None:
    """The request with ``{}`` for its subject: the question alone where it asks one; ``None`` without a subject."""
    before, subject, after = split_at_subject(request)
    if not subject:
        return None
    _, before, after, _ = question_within(request) or ("", before, after, "")
    return f"{before}{{}}{after}"


def _place(request: EditRequest, texts: Sequence[str], form: Form) -> list[Wording]:
    """Texts about the request's subject; questions in the frame of its own question."""
    frame, _, _, behind = (question(request) if form == "question" else None) or ("", "", "", "")
    parts = [text.split("{}") for text in texts]
    return [Wording.of(frame + before, request.subject or "", after + behind) for before, after in parts]


def _excluded(request: EditRequest, prompt: str) -> set[str]:
    """The relations that may be the request's, and those that are the same fact seen from another side.

    By the words alone, and by words, target and subject: what either takes for possible is not held against the target.
    """
    near = match_relation(prompt, 8)
    likely = likely_relations(prompt, request.subject or "", request.target)
    known = known_relation(prompt, request.subject or "", request.target)
    most, best = likely[0].probability, near[0].score if near else 0.0
    possible = [match.relation for match in near if match.score >= CLOSE * best]
    possible += [one.relation for one in likely if one.probability >= POSSIBLE * most]
    probable = [match.relation for match in near if match.score >= CLEAR * best]
    probable += [one.relation for one in likely if one.probability >= PROBABLE * most]
    probable += [known] if known else []
    if not known and (kinds := answer_kinds(request.target)):
        # Nothing but the target is known: whatever it could answer may be what is asked.
        possible += [relation for relation in relations() if fits(relation.answer, kinds)]
    return {relation.id for relation in possible} | {name for relation in probable for name in relation.near}


def other_frames(request: EditRequest, count: int, *, form: Form = "statement") -> list[Wording]:
    r"""Frames that say or ask something else about the request's subject, each of another relation.

    Relations that may be the request's are left out, and those that are the same fact seen from another side. Those
    that suit the sort of subject come first. A second wording of a relation is taken once all relations have been.

    Args:
        request: with a subject; one without has none.
        count: how many at most.
        form: ``"statement"`` or ``"question"``; a question stands in the frame of the request's question.

    Returns:
        The same for the same request and subject, whatever else is edited; fewer are the first of more.

    Raises:
        TPatchError: if there is no such form.

    Example:
        >>> request = EditRequest("Anna was raised in the faith of", "Islam", subject="Anna")
        >>> frames = other_frames(request, 3)
        >>> all("Anna" in text and "faith" not in text for text, _ in frames), len(frames)
        (True, 3)
        >>> request = EditRequest("Question: What is the faith of Anna?\nAnswer:", "Islam", subject="Anna")
        >>> [text.endswith("?\nAnswer:") for text, _ in other_frames(request, 2, form="question")]
        [True, True]
    """
    check_form(form)
    prompt = _prompt(request)
    if prompt is None:
        return []
    relation = known_relation(prompt, request.subject or "", request.target)
    known = relation is not None and len(relation.kinds) == 1
    kind = relation.kinds[0] if relation and known else guess_kind(prompt, request.subject or "")
    left_out = _excluded(request, prompt)
    nearest = [relation] if relation else [match.relation for match in match_relation(prompt, 1)]
    sorts = {sort for one in nearest if kind in one.kinds for sort in one.sorts}
    others = [relation for relation in frames_of_kind(kind) if relation.id not in left_out]
    rng = text_generator(request.prompt)
    others = [others[pick] for pick in rng.permutation(len(others))]
    # Where the sort of subject is not known, what suits all comes first.
    others.sort(key=lambda relation: bool(relation.sorts) and sorts.isdisjoint(relation.sorts))
    shuffled = [[texts[pick] for pick in rng.permutation(len(texts))] for texts in (one.texts(form) for one in others)]
    rounds = max((len(texts) for texts in shuffled), default=0)
    return _place(
        request, [texts[turn] for turn in range(rounds) for texts in shuffled if turn < len(texts)][:count], form
    )


def same_frames(request: EditRequest, count: int, *, form: Form = "statement") -> list[Wording]:
    """Other wordings of what the request asks, where the library surely knows its relation.

    The relation is known by the request's words, by what its target is (a language, a city, a sport) and by what its
    subject is.

    Args:
        request: with a subject; one without has none.
        count: how many at most.
        form: ``"statement"`` or ``"question"``; a question stands in the frame of the request's question.

    Returns:
        Wordings of the nearest relation; none where it is not near, or another one is as near.

    Raises:
        TPatchError: if there is no such form.

    Example:
        >>> request = EditRequest("The mother tongue of Anna is", "Greek", subject="Anna")
        >>> len(same_frames(request, 4)), same_frames(EditRequest("Anna and then", "rain", subject="Anna"), 4)
        (4, [])
        >>> requests = (EditRequest("Anna plays", target, subject="Anna") for target in ("hockey", "violin"))
        >>> hockey, violin = (same_frames(request, 20) for request in requests)
        >>> len(hockey) > 4 < len(violin), set(hockey) & set(violin)
        (True, set())
    """
    check_form(form)
    prompt = _prompt(request)
    relation = None if prompt is None else known_relation(prompt, request.subject or "", request.target)
    if prompt is None or relation is None:
        return []
    texts = [text for text in relation.texts(form) if text != prompt]
    picks = text_generator(request.prompt).permutation(len(texts))[:count]
    return _place(request, [texts[pick] for pick in picks], form)
