"""What a folder holds that is worth a page: a bank, or an evaluation."""

from pathlib import Path
from typing import Any

from tpatch_jax.bank.inspection import open_bank
from tpatch_jax.bank.layout import is_bank
from tpatch_jax.display.bank import bank_summary, bank_title, bank_view
from tpatch_jax.display.markup import Child
from tpatch_jax.display.report import report_title, report_view
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.report import read_report
from tpatch_jax.storage.folders import REPORT, describe_folder

__all__ = ["folder_view"]


def folder_view(folder: Path) -> tuple[str, dict[str, Any], list[Child]]:
    """A bank or a report to look at.

    Args:
        folder: a bank, or what ``tpatch eval`` wrote.

    Returns:
        Its title, what it is in a few values, and what follows the title.

    Raises:
        TPatchError: it is neither, or damaged.
    """
    if is_bank(folder):
        bank = open_bank(folder)
        return bank_title(bank), {"kind": "bank", **bank_summary(bank)}, bank_view(bank)
    if (folder / REPORT).exists():
        report = read_report(folder)
        methods = [result["method"] for result in report["results"]]
        about = {"kind": "report", "methods": methods, "n": report["config"]["n"]}
        return report_title(report), about, report_view(folder, report)
    raise TPatchError(
        f"{folder} is neither a bank nor a finished report; give a folder that `tpatch bank init` or "
        f"`tpatch eval … -o REPORT` made{describe_folder(folder)}"
    )
