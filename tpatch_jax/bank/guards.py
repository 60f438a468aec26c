"""Guarded prompts as an editor reads requests."""

from collections.abc import Sequence

from tpatch_jax.bank.state import Guard
from tpatch_jax.editors.reading import Item
from tpatch_jax.models.model import Model

__all__ = ["read_guards"]


def read_guards(model: Model, guards: Sequence[Guard]) -> list[Item]:
    """Each guarded prompt with its answer, in tokens.

    Args:
        model: the unedited model.
        guards: what must keep its answer.
    """
    items = []
    for number, guard in enumerate(guards):
        # An answer is what comes next to the letter, which need not begin with a space.
        prompt, answer = model.encode_prompt(guard.prompt), model.encode_target(guard.prompt, guard.answer)
        items.append(Item(number, answer, [prompt + answer], [len(prompt)], [guard.prompt]))
    return items
