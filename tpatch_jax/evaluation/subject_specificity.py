"""What an edit does to other facts about its subject: said, asked, and asked in chat.

A neuron that recognises a subject may change whatever is said of it, and no neighbour and no unrelated prompt shows
that. So each edited subject is asked a few other facts (`tpatch_jax.evaluation.other_facts`), and what is said greedily
before and after the edit is compared.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tpatch_jax.core.devices import automatically
from tpatch_jax.core.layers import LayerPatches
from tpatch_jax.core.patch import Patch
from tpatch_jax.editors.base import Routing
from tpatch_jax.editors.locating import locate_subject, split_at_subject
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.comparing import names, plain_words
from tpatch_jax.evaluation.generated import write
from tpatch_jax.evaluation.other_facts import choose_frames
from tpatch_jax.evaluation.templates import asker
from tpatch_jax.models.chat import chat_stops, has_template, render_chat
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach
from tpatch_jax.requests import EditRequest

__all__ = [
    "FIGURES",
    "FORMS",
    "FRAMES_EACH",
    "OtherFact",
    "compare_facts",
    "continue_facts",
    "facts_about",
    "measure_specificity",
    "specificity_figures",
    "specificity_totals",
]

FORMS = ("statements", "questions", "chat")
"""How facts are asked: unfinished statements, questions in a template, questions in the model's chat template."""

FIGURES = ("first_token_kept", "five_tokens_kept", "target_said")
"""What is measured in each form."""

FRAMES_EACH = 3
"""So many frames each edited subject is asked."""

TEMPLATE = "Q: {}\nA:"
"""How questions are put outside of a chat: many models tuned on chats end a text at once behind ``Answer:``."""

TOKENS = 12
FEW = 5
LANES = 32
WORDS = 4
"""Of a longer target so many words are looked for, since twelve tokens need not hold it whole."""


class OtherFact(NamedTuple):
    """Another fact about an edited subject, as a model is asked it.

    Attributes:
        number: of which request, by its position.
        form: one of `FORMS`.
        prompt: the text; in chat the question alone.
        row: what the model reads, in tokens.
        target: what the edit wants said, and must not come here.
    """

    number: int
    form: str
    prompt: str
    row: list[int]
    target: str


def facts_about(
    model: Model,
    requests: Sequence[EditRequest],
    forms: Iterable[str] = FORMS,
    count: int = FRAMES_EACH,
    together: Iterable[EditRequest] | None = None,
) -> list[OtherFact]:
    """Other facts about the subjects of requests, as a model can be asked them.

    An encoder-decoder is asked bare questions alone, a classifier nothing, and a model without a chat template is not
    asked in chat. Of a request without a subject, or whose subject is not in its prompt, there are none.

    Args:
        model: whose tokenizer and context count.
        requests: what is edited.
        forms: of `FORMS`.
        count: how many frames each subject is asked in each form.
        together: all that is edited at once, none of which is asked; by default `requests`.

    Returns:
        Request after request, form after form.

    Raises:
        TPatchError: there is no such form.

    Example:
        >>> request = EditRequest("The currency of Peru is the", "euro", subject="Peru")
        >>> facts_about(model, [request], ["statements"], 1)[0].prompt  # doctest: +SKIP
        'In winter the temperature in Peru drops to'
    """
    chosen = list(forms)
    if unknown := [form for form in chosen if form not in FORMS]:
        raise TPatchError(f"there is no form {unknown[0]!r}; choose from {', '.join(FORMS)}")
    asked = _ways_to_ask(model, chosen)
    # Only those of the same subject matter, which are few among thousands.
    by_subject: dict[str, list[EditRequest]] = {}
    for other in requests if together is None else together:
        by_subject.setdefault((other.subject or "").strip().casefold(), []).append(other)
    facts = []
    for number, request in enumerate(requests):
        name = (request.subject or "").strip()
        spans = locate_subject(model, request.prompt, name) if asked and name else []
        if not spans:
            continue
        before = split_at_subject(request)[0]
        called = f"the {name}" if before.casefold().endswith("the ") else name
        frames = choose_frames(request, count, by_subject.get(name.casefold(), ()))
        for form, text_of in asked.items():
            for frame in frames:
                prompt = (frame.statement if form == "statements" else frame.question).replace("{}", called)
                row = _row(model, text_of(prompt))
                if row:
                    facts.append(OtherFact(number, form, prompt, row, request.target))
    return facts


def _ways_to_ask(model: Model, forms: Sequence[str]) -> dict[str, Callable[[str], str]]:
    """What makes the text that a model reads of a statement or a question, by form."""
    if model.config.labels:
        return {}
    if model.config.architecture != "decoder":
        return {form: str for form in forms if form == "questions"}
    ways: dict[str, Callable[[str], str]] = {"statements": str, "questions": asker(TEMPLATE)}
    if "chat" in forms and (chat := _chat(model)) is not None:
        ways["chat"] = chat
    return {form: ways[form] for form in forms if form in ways}


def _chat(model: Model) -> Callable[[str], str] | None:
    """What puts a question into the model's chat template; ``None`` where it has none that can be used."""
    if not has_template(model.tokenizer):
        return None

    def chat(question: str) -> str:
        return render_chat(model, [{"role": "user", "content": question}])

    try:
        chat("What is it?")
    except TPatchError:
        return None
    return chat


def _row(model: Model, text: str) -> list[int]:
    """A text in tokens; none where the model cannot read it, or has no room for an answer."""
    try:
        row = model.encode_prompt(text)
    except TPatchError:
        return []
    return [] if model.excess(row, [0] * TOKENS) else row


def continue_facts(model: Model, facts: Sequence[OtherFact], routing: Routing | None = None) -> list[list[int]]:
    """What a model says to facts, greedily and in at most twelve tokens; what is asked twice is said once.

    Args:
        model: the model, edited or not.
        facts: what is asked.
        routing: which prompts another model answers.

    Returns:
        Tokens of each fact.
    """
    rows = {tuple(fact.row): fact.row for fact in facts}
    stops = chat_stops(model) if any(fact.form == "chat" for fact in facts) else None
    said = dict(zip(rows, write(model, list(rows.values()), routing, TOKENS, LANES, stops=stops), strict=True))
    return [said[tuple(fact.row)] for fact in facts]


def compare_facts(
    model: Model, facts: Sequence[OtherFact], before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """What became of each fact.

    Args:
        model: whose tokenizer it is.
        facts: what was asked.
        before: what the unedited model says, tokens of each.
        after: what the edited one says.

    Returns:
        Of each ``form, prompt, before, after`` (texts), and as truth values ``first_token_kept``, ``five_tokens_kept``
        and ``target_said``: whether the edit's target is said after the edit and was not before.
    """
    lines = []
    for fact, old, new in zip(facts, before, after, strict=True):
        old_text, new_text = (model.continuation(fact.row, tokens) for tokens in (old, new))
        lines.append(
            {
                "form": fact.form,
                "prompt": fact.prompt,
                "before": old_text,
                "after": new_text,
                "first_token_kept": list(old[:1]) == list(new[:1]),
                "five_tokens_kept": list(old[:FEW]) == list(new[:FEW]),
                "target_said": _says(new_text, fact.target) and not _says(old_text, fact.target),
            }
        )
    return lines


def _says(text: str, target: str) -> bool:
    """Whether a text says a target, or the first words of a long one."""
    begun = " ".join(plain_words(target).split()[:WORDS])
    return names(text, begun) if begun else target.strip() in text


def specificity_figures(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The figures of some facts: of one record, or of all.

    ``subject_specificity = mean_i [first token of i before = after]`` over all facts, and of each form that was asked
    ``specificity_<form>_first_token_kept``, ``…_five_tokens_kept`` (the first five tokens, all of them) and
    ``…_target_said`` (the target within twelve tokens where it was not said before; the less the better).

    Args:
        lines: what `compare_facts` returns.

    Returns:
        Figures by name; none of no facts.

    Example:
        >>> line = {"form": "chat", "first_token_kept": True, "five_tokens_kept": False, "target_said": False}
        >>> list(specificity_figures([line]).values())
        [1.0, 1.0, 0.0, 0.0]
    """
    every = list(lines)
    if not every:
        return {}
    figures = {"subject_specificity": float(np.mean([line["first_token_kept"] for line in every]))}
    for form in FORMS:
        if of_form := [line for line in every if line["form"] == form]:
            figures |= {
                f"specificity_{form}_{name}": float(np.mean([line[name] for line in of_form])) for name in FIGURES
            }
    return figures


def specificity_totals(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float | int]]:
    """The same as an object for each form, with how many prompts were asked in it.

    Args:
        lines: what `compare_facts` returns.

    Returns:
        ``{form: {"prompts", "first_token_kept", "five_tokens_kept", "target_said"}}``, of the forms that were asked.

    Example:
        >>> line = {"form": "chat", "first_token_kept": True, "five_tokens_kept": False, "target_said": False}
        >>> specificity_totals([line])["chat"]["prompts"]
        1
    """
    every = list(lines)
    figures = specificity_figures(every)
    counts = {form: sum(line["form"] == form for line in every) for form in FORMS}
    return {
        form: {"prompts": count, **{name: figures[f"specificity_{form}_{name}"] for name in FIGURES}}
        for form, count in counts.items()
        if count
    }


@automatically
def measure_specificity(
    model: Model,
    patches: LayerPatches | Patch | None,
    requests: Sequence[EditRequest],
    forms: Iterable[str] = ("statements",),
    count: int = FRAMES_EACH,
    together: Iterable[EditRequest] | None = None,
) -> list[list[dict[str, Any]]]:
    """What patches do to other facts about the subjects of requests.

    Args:
        model: the model without the patches.
        patches: the neurons, ``{layer: [n, d]}`` or one patch for the last layer; ``None`` for none.
        requests: the requests that are asked about.
        forms: of `FORMS`.
        count: how many frames each subject is asked in each form.
        together: all that is edited at once, none of which is asked; by default `requests`.

    Returns:
        For each request a list as `compare_facts` returns it, for `specificity_figures`.

    Example:
        >>> lines = measure_specificity(model, patches, requests)  # doctest: +SKIP
        >>> specificity_figures(line for of_one in lines for line in of_one)  # doctest: +SKIP
        {'subject_specificity': 0.97, 'specificity_statements_first_token_kept': 0.97, ...}
    """
    facts = facts_about(model, requests, forms, count, together)
    before = continue_facts(model, facts)
    after = continue_facts(attach(model, patches), facts) if patches and facts else before
    lines: list[list[dict[str, Any]]] = [[] for _ in requests]
    for fact, line in zip(facts, compare_facts(model, facts, before, after), strict=True):
        lines[fact.number].append(line)
    return lines
