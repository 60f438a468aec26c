"""Inputs of models that do not write running text: whole claims and questions, one at a time.

A classifier and an encoder-decoder cannot sample text to stay silent on, so it is the user's to give: one input a line.
Their prompts are seen in other contexts than a decoder's: a text before them would be read as a part of them.
"""

import json
from pathlib import Path

import numpy as np

from tpatch_jax.errors import TPatchError

__all__ = ["FIELDS", "input_contexts", "read_inputs"]

FIELDS = ("prompt", "text", "claim", "question", "sentence", "input", "src")
"""In JSON lines, the first of these that is there is the input."""


def read_inputs(path: str | Path) -> list[str]:
    """The inputs in a file: one a line, or one JSON object a line.

    Args:
        path: the file, UTF-8; empty lines and repeated inputs are passed over. In JSON lines the input is the first of
            `FIELDS` that an object has.

    Returns:
        The inputs in order.

    Raises:
        TPatchError: the file cannot be read, holds no input, or a line has none of the fields.
    """
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TPatchError(f"the memory text {path} cannot be read ({error}); give a UTF-8 text file") from None
    lines = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    found = dict.fromkeys(_input(line, f"{path}, line {number}") for number, line in lines)
    if not found:
        raise TPatchError(f"{path} holds no input; give a file with one input a line")
    return list(found)


def _input(line: str, where: str) -> str:
    if not line.startswith("{"):
        return line
    try:
        record = json.loads(line)
    except ValueError:
        return line
    for name in FIELDS:
        if isinstance(record.get(name), str) and record[name].strip():
            return record[name].strip()
    raise TPatchError(f"{where}: none of the fields {', '.join(FIELDS)} holds a text; name the input by one of them")


def input_contexts(text: str, others: tuple[str, ...], count: int) -> list[str]:
    """An input in other shapes that mean the same, or nearly: what its patch should hear as well.

    Words are left out, one at a time, never the longest ones, and another input is put before or behind it. Which words
    is drawn from the text itself.

    Args:
        text: the input.
        others: other inputs.
        count: how many.

    Example:
        >>> input_contexts("The sun is a star.", ("Water is wet.",), 2)
        ['The sun is star.', 'Water is wet. The sun is a star.']
    """
    rng, words = np.random.default_rng(list(text.encode())), text.split()
    short = sorted(range(len(words)), key=lambda number: (len(words[number]), number))[: max(1, len(words) // 2)]
    order = [short[pick] for pick in rng.permutation(len(short))]
    found = []
    for number in range(count):
        other = others[number // 3 % len(others)] if others else ""
        if number % 3 == 1 and other:
            found.append(f"{other} {text}")
        elif number % 3 == 2 and other:
            found.append(f"{text} {other}")
        elif len(words) > 2:
            out = order[(number // 3) % len(order)]
            found.append(" ".join(word for place, word in enumerate(words) if place != out))
        else:
            found.append(text)
    return found
