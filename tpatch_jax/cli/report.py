"""``tpatch report``: one page of a bank or an evaluation."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from tpatch_jax.cli.common import Json, Quiet
from tpatch_jax.display.console import print_json, result_console

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """Write one page to look at: a bank's edits, or an evaluation's figures and pictures."""

    folder: Annotated[Positional[str], arg(metavar="BANK|REPORT", help="a bank, or a folder that `tpatch eval` wrote")]
    _: KW_ONLY
    output: Annotated[str, arg(aliases=["-o"], metavar="PAGE.html", help="the page, all in one file")]
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Write the page and say how large it is."""
        from tpatch_jax.display.folder import folder_view
        from tpatch_jax.display.page import check_page, write_page

        check_page(Path(self.output))
        title, about, children = folder_view(Path(self.folder))
        size = write_page(self.output, title, children)
        if self.json:
            print_json({"page": self.output, "title": title, **about, "bytes": size})
        else:
            result_console().print(f"{title}: {self.output}, {size:,} bytes", markup=False, soft_wrap=True)
