"""What a folder is that was given in place of another kind of folder."""

from pathlib import Path

__all__ = ["BANK", "MODEL", "PATCHES", "REPORT", "describe_folder"]

BANK, PATCHES, REPORT, MODEL = "bank.json", "patches.json", "report.json", "config.json"

KINDS = (
    (BANK, "it is a bank, which `tpatch bank list` and `tpatch report` show"),
    (PATCHES, "it holds patches, which `tpatch inspect` shows"),
    (REPORT, "it holds a report, which `tpatch report` and `tpatch compare` show"),
    (MODEL, "it holds a model, which goes in the place of MODEL"),
)
"""A file that only this kind of folder has at its top, and what to do with such a folder."""


def describe_folder(folder: str | Path) -> str:
    """The end of a message that a folder is not what was asked for: ``"; it is …"`` if it is something else we make.

    Args:
        folder: where the user pointed.

    Returns:
        A text to put behind the message; empty where the folder is nothing known.

    Example:
        >>> describe_folder("nowhere")
        ''
    """
    return next((f"; {advice}" for name, advice in KINDS if (Path(folder) / name).is_file()), "")
