"""Where an edit holds, as it is used: what a model says by itself to a request in several forms.

A request is put to the model in bare text and in a chat, behind long text, with its subject in other spellings, and the
model goes on freely: greedily, or drawing tokens. What it says is looked at as a reader would: does it name the target,
does it come to an end, does it go round in circles, does it say the old answer too.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tpatch_jax.core.checks import random_key
from tpatch_jax.core.devices import automatically
from tpatch_jax.core.layers import LayerPatches
from tpatch_jax.core.patch import Patch
from tpatch_jax.editors.base import Routing
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.chat_questions import CHAT_QUESTIONS
from tpatch_jax.evaluation.comparing import names, plain_words
from tpatch_jax.evaluation.generated import write
from tpatch_jax.evaluation.metrics import generation_entropy
from tpatch_jax.evaluation.record import Probe, Record
from tpatch_jax.models.chat import (
    as_turn,
    chat_stops,
    encode_chat,
    form_of,
    has_template,
    in_chat,
    render_chat,
    render_requests,
)
from tpatch_jax.models.memory_text import memory_rows
from tpatch_jax.models.model import Model, check_loaded
from tpatch_jax.models.patching import attach
from tpatch_jax.models.sentences import first_sentence, say
from tpatch_jax.requests import EditRequest, as_requests, join_target
from tpatch_jax.storage.cache import cache_folder
from tpatch_jax.storage.reading import read_text

__all__ = [
    "FORM_FIGURES",
    "FORM_NAMES",
    "FormPrompt",
    "answer_forms",
    "answer_questions",
    "as_forms",
    "check_decoder",
    "compare_forms",
    "default_forms",
    "form_figures",
    "form_prompts",
    "form_totals",
    "holds_in",
    "is_chat",
    "long_text",
    "measure_forms",
    "old_answers",
    "question_rows",
    "questions_unchanged",
    "records_in_chat",
]

FORM_NAMES = (
    *("bare", "long", "lower", "upper", "alias"),
    *("chat", "chat-long", "chat-lower", "chat-upper", "chat-alias", "chat-system", "chat-turns"),
)
"""The forms: bare text or a chat; behind long text, with the subject in lower or upper case or under another name; with
another message of the system's, after another turn.
"""

FORM_FIGURES = ("free_running", "said", "said_first", "ends", "loops", "contradicts", "fluency")
"""What is measured in each form."""

TOKENS = 60
"""So many tokens at most are said."""
SAID_TOKENS = 24
"""Within so many the target has to come."""
SLACK = 8
LOOP, TIMES = 4, 3
"""An answer goes round in circles if a run of so many tokens is in it so often."""
SAME_TOKENS = 24
"""So many tokens of an answer to an unrelated question are compared."""
LONG_TOKENS = 300
LONG_PART = (300_000, 310_000)
"""Of a long file these characters are read, else its beginning."""
TEMPERATURE = 0.7
LANES = 32
OLD_WORDS = 4
"""What a model said before is taken for its old answer if it has no more words."""
SYSTEM = "You are a careful expert. Answer truthfully."
TURNS = (("user", "Hello! I have a question."), ("assistant", "Hello! What would you like to know?"))


class FormPrompt(NamedTuple):
    """A request as it is put to a model in one form.

    Attributes:
        number: of which request or record, by its position.
        form: one of `FORM_NAMES`.
        text: what is asked, without the template and without the long text.
        row: what the model reads, in tokens.
        target: what should be said.
        tokens: its tokens, as they follow the row.
        old: answers that should not be said any more.
        wanted: whether the request shall hold in this form.
    """

    number: int
    form: str
    text: str
    row: list[int]
    target: str
    tokens: list[int]
    old: tuple[str, ...]
    wanted: bool

    @property
    def chat(self) -> bool:
        """Whether it is asked in a chat."""
        return is_chat(self.form)


def is_chat(form: str) -> bool:
    """Whether a form is that of a chat."""
    return form.partition("-")[0] == "chat"


def as_forms(forms: str | Iterable[str]) -> list[str]:
    """Names of forms, checked, each once.

    Args:
        forms: names, or one text with commas between them.

    Raises:
        TPatchError: there is no such form, or none at all.

    Example:
        >>> as_forms("bare, chat,bare")
        ['bare', 'chat']
    """
    given = forms.split(",") if isinstance(forms, str) else list(forms)
    chosen = list(dict.fromkeys(name.strip() if isinstance(name, str) else name for name in given))
    for name in chosen:
        if name not in FORM_NAMES:
            raise TPatchError(f"there is no form {name!r}; choose from {', '.join(FORM_NAMES)}")
    if not chosen:
        raise TPatchError(f"no form is given; choose from {', '.join(FORM_NAMES)}")
    return chosen


def check_decoder(model: Model) -> None:
    """Make sure that a model goes on freely.

    Raises:
        TPatchError: it is no decoder.
    """
    if model.config.architecture != "decoder":
        raise TPatchError(f"{model.name!r} is an {model.config.architecture}; forms are measured of decoders")


def default_forms(model: Model) -> list[str]:
    """Bare text, and a chat for a model with a chat template."""
    return ["bare", "chat"] if has_template(model.tokenizer) else ["bare"]


def holds_in(model: Model, request: EditRequest, form: str) -> bool:
    """Whether a request shall hold in a form: in bare text, in chats, or in both.

    Args:
        model: the model.
        request: the request.
        form: one of `FORM_NAMES`.
    """
    return form_of(model, request) in ("both", "chat" if is_chat(form) else "bare")


def long_text(model: Model, file: str | Path | None = None) -> str:
    """A text of 300 tokens that stands before a request: of a file, or what the model itself sampled.

    Args:
        model: whose tokens count.
        file: a UTF-8 text file; of a long one a part far behind its beginning.

    Raises:
        TPatchError: the file cannot be read.
    """
    if file is None:
        rows = memory_rows(model, cache=cache_folder())
        ids: list[int] = []
        for row in rows:
            ids += row[len(model.start) :] if list(row[: len(model.start)]) == list(model.start) else row
            if len(ids) >= LONG_TOKENS:
                break
    else:
        try:
            whole = read_text(file)
        except (OSError, UnicodeDecodeError) as error:
            raise TPatchError(f"the long text {file} cannot be read ({error}); give a UTF-8 text file") from None
        first, last = LONG_PART
        ids = model.encode(whole[first:last] if len(whole) >= last else whole[: last - first])
    return model.decode(ids[:LONG_TOKENS]) + "\n\n"


def form_prompts(
    model: Model,
    requests: Sequence[EditRequest],
    forms: Sequence[str],
    *,
    long: str = "",
    old: Sequence[Sequence[str]] = (),
    numbers: Sequence[int] | None = None,
) -> list[FormPrompt]:
    """Requests as they are put to a model, form after form.

    What cannot be asked is left out: a spelling of a subject that is not in its prompt, an alias that there is not, a
    chat of a model without a template, what has no room for an answer.

    Args:
        model: whose tokenizer and template count.
        requests: what was corrected.
        forms: of `FORM_NAMES`.
        long: what stands before a request in the long forms; see `long_text`.
        old: of each request the answers that should not be said any more.
        numbers: what each request's prompts are numbered by; by default its position.

    Returns:
        Request after request.

    Raises:
        TPatchError: chats are asked for, and the model has no chat template.

    Example:
        >>> form_prompts(model, [EditRequest("Who leads the UN?", "Anna", "UN")], ["lower"])[0].text  # doctest: +SKIP
        'Who leads the un?'
    """
    check_decoder(model)
    prompts = []
    for position, request in enumerate(requests):
        for form in forms:
            asked = _asked(model, request, form, long)
            if asked is None:
                continue
            text, row, tokens = asked
            if not row or not tokens or model.excess(row, [0] * TOKENS):
                continue
            answers = tuple(old[position]) if len(old) else ()
            number = position if numbers is None else numbers[position]
            wanted = holds_in(model, request, form)
            prompts.append(FormPrompt(number, form, text, row, request.target.strip(), tokens, answers, wanted))
    return prompts


def _asked(model: Model, request: EditRequest, form: str, long: str) -> tuple[str, list[int], list[int]] | None:
    """What is asked in a form, its tokens, and those of the target behind them; ``None`` if it cannot be asked so."""
    chat, variant = is_chat(form), form.removeprefix("chat").removeprefix("-")
    text = as_turn(request.prompt) if chat else request.prompt
    subject = request.subject or ""
    if variant in ("lower", "upper", "alias"):
        other = {"lower": subject.lower(), "upper": subject.upper(), "alias": next(iter(request.aliases), "")}[variant]
        if not subject or subject not in text or not other:
            return None
        text = text.replace(subject, other)
    asked = replace(request, prompt=text, rephrases=())
    before = long if variant == "long" else ""
    try:
        if not chat:
            read = before + text
            target = join_target(text, request.target.strip(), request.join)
            return text, model.encode_prompt(read), model.encode_target(read, target)
        changes: dict[str, Any] = {"system": SYSTEM} if variant == "system" else {}
        changes |= {"turns": (*request.turns, *TURNS)} if variant == "turns" else {}
        # The text is a turn already: what was put before it makes no sentence of it.
        rendered = in_chat(model, replace(asked, **changes), turn=before + text)
        tokens = model.encode_target(
            rendered.prompt, join_target(rendered.prompt, request.target.strip(), rendered.join)
        )
        return text, encode_chat(model, rendered.prompt), tokens
    except TPatchError:
        if chat and not has_template(model.tokenizer):
            raise
        return None


def answer_forms(
    model: Model,
    prompts: Sequence[FormPrompt],
    routing: Routing | None = None,
    *,
    seed: int | None = None,
    temperature: float = TEMPERATURE,
) -> list[list[int]]:
    """What a model says by itself, in at most 60 tokens, up to the end of its turn or text.

    Args:
        model: the model, edited or not.
        prompts: what is asked.
        routing: which prompts another model answers.
        seed: tokens are drawn with this seed; by default the most probable ones are said.
        temperature: divides the logits before they are drawn.

    Returns:
        The tokens of each, without those that end it.
    """
    rows = list(dict.fromkeys((prompt.chat, tuple(prompt.row)) for prompt in prompts))
    said: dict[tuple[bool, tuple[int, ...]], list[int]] = {}
    for chat in (False, True):
        part = [row for row in rows if row[0] == chat]
        if not part:
            continue
        draw = None if seed is None else (random_key(seed), temperature)
        stops = chat_stops(model) if chat else model.stops
        tokens = write(model, [list(row) for _, row in part], routing, TOKENS, LANES, stops=stops, draw=draw)
        said |= dict(zip(part, tokens, strict=True))
    return [said[prompt.chat, tuple(prompt.row)] for prompt in prompts]


def compare_forms(model: Model, prompts: Sequence[FormPrompt], said: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """What is to be said of each answer.

    Args:
        model: whose tokenizer it is.
        prompts: what was asked.
        said: what was answered, tokens of each.

    Returns:
        Of each ``form, prompt, answer`` (texts), ``wanted`` (whether the request shall hold there), and

        - ``said``: the target is in the first 24 tokens, whatever its case, and not as a part of a longer word;
        - ``said_first``: the answer begins with it, token for token;
        - ``ends``: the model ends the answer by itself, within 60 tokens;
        - ``loops``: four tokens in a row come three times or more;
        - ``contradicts``: the old answer is named as well; only where one is known;
        - ``free_running``: up to the natural stop (the end of the answer; in bare text, of the first sentence, too) the
          target is said, the stop comes, and nothing loops;
        - ``fluency``: GE's weighted entropy of n-grams, of question and answer.

    Example:
        >>> compare_forms(model, prompts, answer_forms(model, prompts))[0]["said"]  # doctest: +SKIP
        True
    """
    lines = []
    for prompt, tokens in zip(prompts, said, strict=True):
        answer = model.continuation(prompt.row, tokens)
        first = model.continuation(prompt.row, tokens[: max(SAID_TOKENS, len(prompt.tokens) + SLACK)])
        ends, turns = len(tokens) < TOKENS, _loops(tokens)
        whole = answer if prompt.chat or ends else first_sentence(answer)
        stopped = ends or (not prompt.chat and len(whole.rstrip()) < len(answer.rstrip()))
        spoken = turns
        if not prompt.chat:
            # What follows the sentence is no part of it.
            whole = first_sentence(answer)
            spoken = _loops(model.encode(whole))
        line: dict[str, Any] = {"form": prompt.form, "prompt": prompt.text, "answer": answer, "wanted": prompt.wanted}
        line |= {
            "free_running": stopped and _says(whole, prompt.target) and not spoken,
            "said": _says(first, prompt.target),
            "said_first": list(tokens[: len(prompt.tokens)]) == prompt.tokens,
            "ends": ends,
            "loops": turns,
        }
        old = [name for name in prompt.old if not names(f"{prompt.text} | {prompt.target}", name)]
        if old:
            line["contradicts"] = any(names(answer, name) for name in old)
        line["fluency"] = generation_entropy([prompt.text + ("\n" if prompt.chat else "") + answer])
        lines.append(line)
    return lines


def _says(text: str, target: str) -> bool:
    """Whether a text says a target, whatever its case: not as a part of a word, where letters have two cases.

    "Nigeria" does not say "Niger", "Anna's" says "Anna". Of other scripts some write words without spaces.
    """
    text, target = text.casefold(), target.casefold()
    ends = [bool(end) and end.isalnum() and unicodedata.category(end) != "Lo" for end in (target[:1], target[-1:])]
    before, behind = ("(?<!\\w)" if ends[0] else "", "(?!\\w)" if ends[1] else "")
    return re.search(f"{before}{re.escape(target)}{behind}", text) is not None


def _loops(tokens: Sequence[int]) -> bool:
    runs = Counter(tuple(tokens[at : at + LOOP]) for at in range(len(tokens) - LOOP + 1))
    return max(runs.values(), default=0) >= TIMES


def form_figures(lines: Iterable[Mapping[str, Any]], sampled: Iterable[Mapping[str, Any]] = ()) -> dict[str, float]:
    """The figures of some answers: of one record, or of all.

    Of each form that was asked ``<form>_<figure>``, the mean of the figure over the answers, with ``_`` for the form's
    hyphen, as in ``chat_long_said``; and ``<form>_sampled_<figure>`` of the answers that were drawn.

    Args:
        lines: what `compare_forms` returns.
        sampled: the same of answers that were drawn, with any seed.

    Returns:
        Figures by name; none of no answers.

    Example:
        >>> line = {"form": "chat-long", "said": True, "ends": False}
        >>> form_figures([line, {**line, "ends": True}])
        {'chat_long_said': 1.0, 'chat_long_ends': 0.5}
    """
    figures: dict[str, float] = {}
    for mark, some in (("", list(lines)), ("sampled_", list(sampled))):
        for form in FORM_NAMES:
            of_form = [line for line in some if line["form"] == form]
            for name in FORM_FIGURES:
                if values := [line[name] for line in of_form if name in line]:
                    figures[f"{form.replace('-', '_')}_{mark}{name}"] = float(np.mean(values))
    return figures


def form_totals(
    lines: Iterable[Mapping[str, Any]], sampled: Iterable[Mapping[str, Any]] = ()
) -> dict[str, dict[str, Any]]:
    """The same as an object for each form, with how many prompts were asked in it.

    Args:
        lines: what `compare_forms` returns.
        sampled: the same of answers that were drawn.

    Returns:
        ``{form: {"n", "free_running", "said", …, "sampled"?: {"n", "free_running", …}}}``.

    Example:
        >>> form_totals([{"form": "chat", "said": True}])
        {'chat': {'n': 1, 'said': 1.0}}
    """
    totals: dict[str, dict[str, Any]] = {}
    every, drawn = list(lines), list(sampled)
    for form in FORM_NAMES:
        parts = [[line for line in some if line["form"] == form] for some in (every, drawn)]
        told = [
            {"n": len(part), **{name.removeprefix(f"{form.replace('-', '_')}_"): value
                                for name, value in form_figures(part).items()}}
            for part in parts
        ]  # fmt: skip
        if parts[0]:
            totals[form] = {**told[0], **({"sampled": told[1]} if parts[1] else {})}
    return totals


def answer_questions(
    model: Model, questions: Sequence[str] | None = None, routing: Routing | None = None
) -> list[list[int]]:
    """What a model answers in a chat to questions that no edit is about: the first 24 tokens, greedily.

    Args:
        model: a model with a chat template, edited or not.
        questions: what is asked; by default `tpatch_jax.evaluation.chat_questions.CHAT_QUESTIONS`.
        routing: which questions another model answers.
    """
    return write(model, question_rows(model, questions), routing, SAME_TOKENS, LANES, stops=chat_stops(model))


def question_rows(model: Model, questions: Sequence[str] | None = None) -> list[list[int]]:
    """What a model reads of `answer_questions`, in tokens.

    Args:
        model: a model with a chat template.
        questions: what is asked; by default `tpatch_jax.evaluation.chat_questions.CHAT_QUESTIONS`.
    """
    asked = CHAT_QUESTIONS if questions is None else questions
    return [encode_chat(model, render_chat(model, [{"role": "user", "content": text}])) for text in asked]


def questions_unchanged(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> float:
    """The share of answers that are the same, token for token.

    ``mean_i [before_i = after_i]``.

    Args:
        before: of the unedited model, `answer_questions`.
        after: of the edited one, to the same questions.

    Example:
        >>> questions_unchanged([[1, 2], [3]], [[1, 2], [4]])
        0.5
    """
    return float(np.mean([list(old) == list(new) for old, new in zip(before, after, strict=True)]))


def old_answers(
    requests: Sequence[EditRequest],
    said: Sequence[str | None],
    known: Sequence[Sequence[str]] = (),
) -> list[tuple[str, ...]]:
    """The answers before the edit: those that a data set names, or what the unedited model said if that is short.

    Args:
        requests: the requests.
        said: what the unedited model said to each, up to the end of the sentence.
        known: of each the answers that are known; empty where none is.

    Example:
        >>> request = EditRequest("The capital of France is", "Lyon")
        >>> old_answers([request] * 2, [" Paris.", " a city of which much is told."])
        [('Paris',), ()]
    """
    answers = []
    for number, (request, text) in enumerate(zip(requests, said, strict=True)):
        given = tuple(known[number]) if len(known) else ()
        short = first_sentence(text or "").strip().strip(".,;:!?\"' ")
        if not given and short and len(short.split()) <= OLD_WORDS:
            given = (short,)
        target = plain_words(request.target)
        # What is a part of the target, or has it as a part, tells nothing.
        answers.append(tuple(one for one in given if not names(target, one) and not names(one, target)))
    return answers


@automatically
def measure_forms(
    model: Model,
    patches: LayerPatches | Patch | Model | None,
    requests: Sequence[EditRequest | Mapping[str, Any]],
    forms: str | Iterable[str] | None = None,
    *,
    long: str | Path | None = None,
    samples: int = 0,
    seed: int = 0,
    questions: bool = True,
) -> dict[str, Any]:
    """How a model with patches answers requests as they are used: form by form, going on freely to a natural stop.

    Args:
        model: the model without the patches.
        patches: the neurons, ``{layer: [n, d]}`` or one patch for the last layer; or the corrected model itself;
            ``None`` measures the model as it is.
        requests: what was corrected.
        forms: of `FORM_NAMES`, or one text with commas; by default bare text, and a chat where the model has a
            template.
        long: a text file for the long forms; by default text that the model itself sampled.
        samples: so many answers to each prompt are drawn at temperature 0.7 as well, each with a seed of its own.
        seed: the first of these seeds.
        questions: whether a hundred unrelated questions are asked in a chat, where any form is one of a chat.

    Returns:
        ``forms`` (`form_totals`); ``edits``: of each request ``id``, ``held`` (whether the target is said in every form
        where it shall hold; ``None`` if it cannot be asked in any) and ``answers``, a list as `compare_forms` returns
        it; and ``chat_questions`` with ``n`` and ``unchanged``.

    Raises:
        TPatchError: there is no such form, or a chat is asked for and the model has no chat template.

    Example:
        >>> measure_forms(model, patches, requests, "bare,chat")["forms"]["chat"]["said"]  # doctest: +SKIP
        1.0
    """
    check_loaded(model, "measure_forms(model, patches, requests)")
    check_decoder(model)
    wanted, chosen = as_requests(requests), default_forms(model) if forms is None else as_forms(forms)
    text = long_text(model, long) if any(form.endswith("long") for form in chosen) else ""
    # What was said before is shortest after the bare prompt.
    said = say(model, [request.prompt for request in wanted])
    old = old_answers(wanted, said)
    prompts = form_prompts(model, wanted, chosen, long=text, old=old)
    edited = patches if isinstance(patches, Model) else model if not patches else attach(model, patches)
    lines = compare_forms(model, prompts, answer_forms(edited, prompts))
    sampled: list[dict[str, Any]] = []
    for number in range(samples):
        sampled += compare_forms(model, prompts, answer_forms(edited, prompts, seed=seed + number))
    edits = []
    for number, request in enumerate(wanted):
        of_one = [line for prompt, line in zip(prompts, lines, strict=True) if prompt.number == number]
        right = [line["said"] for line in of_one if line["wanted"]]
        held = all(right) if right else None
        edits.append({"id": request.name(number), "held": held, "answers": of_one})
    result: dict[str, Any] = {"forms": form_totals(lines, sampled), "edits": edits}
    if questions and any(map(is_chat, chosen)):
        before = answer_questions(model)
        after = before if edited is model else answer_questions(edited)
        result["chat_questions"] = {"n": len(before), "unchanged": questions_unchanged(before, after)}
    return result


def records_in_chat(model: Model, records: Sequence[Record]) -> list[Record]:
    """Records whose requests hold in a chat alone, with prompts and rephrasings asked there; others as they are.

    Args:
        model: the model.
        records: as a reader gives them.

    Raises:
        TPatchError: a request shall hold in a chat, and the model has no chat template; the message names it.
    """
    result = []
    for record in records:
        rendered = render_requests(model, record.requests)
        moved: dict[Probe, Probe] = {}
        for request, asked in zip(record.requests, rendered, strict=True):
            if request is not asked:
                old = (request.prompt, *request.rephrases)
                new = (asked.prompt, *asked.rephrases)
                moved |= {
                    Probe(one, request.target): Probe(other, asked.target) for one, other in zip(old, new, strict=True)
                }
        probes = record.probes
        if moved:
            probes = {kind: tuple(moved.get(probe, probe) for probe in some) for kind, some in probes.items()}
        result.append(replace(record, probes=probes) if moved else record)
    return result
