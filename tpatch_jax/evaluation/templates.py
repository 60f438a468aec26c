"""How a question is put to a model that was not tuned on bare questions."""

from collections.abc import Callable

from tpatch_jax.errors import TPatchError

__all__ = ["PLAIN", "QUESTION", "asker"]

QUESTION = "Question: {}\nAnswer:"
"""How a question is put to the model."""

PLAIN = "{}"
"""The template that leaves a question bare."""


def asker(template: str) -> Callable[[str], str]:
    """What puts a question into a template.

    Args:
        template: a text with one ``{}``.

    Raises:
        TPatchError: it has none, or several.

    Example:
        >>> asker("Q: {} A:")("Who built the bridge?")
        'Q: Who built the bridge? A:'
    """
    if template.count("{}") != 1:
        raise TPatchError(f"the template {template!r} must hold one {{}} for the question, as in {QUESTION!r}")
    return lambda question: template.replace("{}", question)
