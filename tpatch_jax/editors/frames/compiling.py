"""Makes ``compiled.json`` of the files that are written by hand: ``python -m tpatch_jax.editors.frames.compiling``."""

import json
from pathlib import Path

from tpatch_jax.editors.frames.answering import build_names
from tpatch_jax.editors.frames.library import read_relations
from tpatch_jax.editors.frames.matching import build_words
from tpatch_jax.editors.frames.recognising import build_concepts, build_synonyms

__all__ = ["compile_library"]


def compile_library() -> str:
    """The text of ``compiled.json``: relations, the index of their words, synonyms, and what names are.

    Example:
        >>> compile_library().startswith('{')
        True
    """
    relations, synonyms = read_relations(), build_synonyms()
    content = {
        "relations": relations,
        "words": build_words(relations),
        "synonyms": synonyms,
        "concepts": build_concepts(relations, synonyms),
        "names": build_names(),
    }
    texts = (json.dumps({key: value}, ensure_ascii=False, separators=(",", ":")) for key, value in content.items())
    return "{" + ",\n".join(text[1:-1] for text in texts) + "}\n"


if __name__ == "__main__":
    Path(__file__).with_name("compiled.json").write_text(compile_library(), "utf-8")
