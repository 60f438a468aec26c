"""What every family of models promises, and which test holds it to that: the table of ``tpatch models``."""

from typing import NamedTuple

from tpatch_jax.models.families.family import Family

__all__ = ["PROMISES", "Promise", "promised"]


class Promise(NamedTuple):
    """One column of the table.

    Attributes:
        name: its heading.
        claim: what is promised, the same for all families; empty where `Family` says it.
        test: the test that checks it, once for each family.
    """

    name: str
    claim: str
    test: str


PROMISES = (
    Promise("parity", "2e-4", "tests/test_reference.py::test_the_logits_agree"),
    Promise("merge = attach", "1e-5", "tests/test_reference.py::test_merged_equals_attached"),
    Promise("unmerge", "bit for bit", "tests/test_reference.py::test_unmerge_gives_back_model_and_patches_bit_for_bit"),
    Promise("export", "", "tests/test_export.py::test_stock_transformers_says_the_same"),
    Promise("bfloat16", "5%", "tests/test_reference.py::test_bfloat16_stays_near"),
    Promise("edit", "holds", "tests/test_families.py::test_an_edit_holds"),
)
"""Logits beside torch's, absolute; merged beside attached, relative; in bfloat16 beside float32, relative."""


def promised(family: Family) -> dict[str, str]:
    """The cells of one family, by the headings of their columns."""
    return {promise.name: promise.claim or family.export for promise in PROMISES}
