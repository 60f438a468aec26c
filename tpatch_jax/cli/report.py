"""``tpatch report``: one page of a bank or an evaluation."""

from pathlib import Path

from tpatch_jax.display.console import print_json, result_console
from tpatch_jax.display.folder import folder_view
from tpatch_jax.display.page import check_page, write_page

__all__ = ["report_command"]


def report_command(folder: str, output: str, *, json: bool) -> None:
    """``tpatch report``."""
    check_page(Path(output))
    title, about, children = folder_view(Path(folder))
    size = write_page(output, title, children)
    if json:
        print_json({"page": output, "title": title, **about, "bytes": size})
    else:
        result_console().print(f"{title}: {output}, {size:,} bytes", markup=False, soft_wrap=True)
