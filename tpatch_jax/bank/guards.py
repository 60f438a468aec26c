"""Guarded prompts: how an editor reads them, and whether their answers are still what is guarded.

An answer is compared by what the model says of its own accord up to the end of the sentence; what comes after, and
case, white space and punctuation within, may change. The tokens in which it says it are remembered, since a model is
asked in one pass whether it still says just these.
"""

from collections.abc import Callable, Mapping, Sequence

from tpatch_jax.bank.state import Guard, prompt_key
from tpatch_jax.editors.reading import Item
from tpatch_jax.models.model import Model
from tpatch_jax.models.sentences import SENTENCE_TOKENS, agrees, say_tokens
from tpatch_jax.requests import EditRequest

__all__ = ["GuardedAnswers", "guarded_reason", "refused_by_guards"]

SLACK = 8
"""So many tokens more than a guarded answer has may say the same."""


class GuardedAnswers:
    """The guarded answers of one bank, as its model says them."""

    def __init__(self, model: Model):
        """The unedited model, whose tokenizer all edited ones share."""
        self.model = model
        self._tokens: dict[Guard, list[int]] = {}

    def items(self, guards: Sequence[Guard]) -> list[Item]:
        """Each guarded prompt with its answer, in tokens."""
        items = []
        for number, guard in enumerate(guards):
            # An answer is what comes next to the letter, which need not begin with a space.
            prompt = self.model.encode_prompt(guard.prompt)
            answer = self._tokens.get(guard) or self.model.encode_target(guard.prompt, guard.answer)
            items.append(Item(number, answer, [prompt + answer], [len(prompt)], [guard.prompt]))
        return items

    def changed(
        self, edited: Model, guards: Sequence[Guard], wrong: Callable[[list[Item]], Sequence[int]]
    ) -> list[Guard]:
        """The guards whose answer is no longer what an edited model says.

        Args:
            edited: the model.
            guards: what must keep its answer.
            wrong: those of some items whose tokens do not come out one after the other.
        """
        items = self.items(guards)
        doubtful = [guards[number] for number in wrong(items)]
        if self.model.config.labels or not doubtful:
            return doubtful
        most = max(SENTENCE_TOKENS, *(len(items[guards.index(guard)].target) + SLACK for guard in doubtful))
        changed = []
        for guard, tokens in zip(doubtful, say_tokens(edited, [guard.prompt for guard in doubtful], most), strict=True):
            text = self.model.continuation(self.model.encode_prompt(guard.prompt), tokens)
            if not agrees(text, guard.answer):
                changed.append(guard)
            elif tokens and self.model.config.architecture == "decoder":
                self._tokens[guard] = tokens
        return changed


def guarded_reason(guard: Guard) -> str:
    """Why a request is not taken in that would change a guarded answer."""
    return (
        f"it would change the guarded answer {guard.answer.strip()!r} after {guard.prompt!r}; --force allows that, "
        "`tpatch bank guard --lift` gives the guard up"
    )


def refused_by_guards(requests: Sequence[EditRequest], guards: Sequence[Guard]) -> Mapping[int, str]:
    """Requests that want something else after a guarded prompt itself, which takes no fit to know.

    Args:
        requests: in order.
        guards: prompts that must keep their answers.

    Returns:
        From a request's position to the reason.

    Example:
        >>> sorted(refused_by_guards([EditRequest("Two and two is", "five")], [Guard("Two and two is", " four.")]))
        [0]
    """
    answers = {prompt_key(guard.prompt): guard for guard in guards}
    refused = {}
    for position, request in enumerate(requests):
        # What is asked in a chat alone is another prompt.
        guard = answers.get(prompt_key(request.prompt)) if request.form != "chat" else None
        if guard and not (agrees(guard.answer, request.target) or agrees(request.target, guard.answer)):
            refused[position] = guarded_reason(guard)
    return refused
