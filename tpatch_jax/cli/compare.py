"""``tpatch compare``: reports side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from tpatch_jax.cli.common import Json, Quiet, show_rows
from tpatch_jax.display.console import print_json, result_console
from tpatch_jax.errors import TPatchError

__all__ = ["Compare"]


@dataclass(frozen=True)
class Compare:
    """Show several reports side by side."""

    reports: Annotated[Positional[tuple[str, ...]], arg(metavar="REPORT…", help="folders that `tpatch eval` wrote")]
    output: Annotated[str | None, arg(aliases=["-o"], metavar="PICTURE", help="also draw them, e.g. compare.png")] = (
        None
    )
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Read the reports, draw them if asked to, and print a column for each."""
        from tpatch_jax.evaluation.pictures import draw_comparison
        from tpatch_jax.evaluation.report import comparison, differences, read_report

        if not self.reports:
            raise TPatchError("nothing to compare; give one report folder or more")
        folders = list(dict.fromkeys(self.reports))
        reports: Mapping[str, Any] = {
            name: read_report(folder) for name, folder in zip(_names(folders), folders, strict=True)
        }
        rows, columns = comparison(reports)
        if self.output is not None:
            draw_comparison(Path(self.output), columns)
        remarks = differences(reports, columns)
        if self.json:
            print_json({"columns": [{"name": name, **result} for name, result in columns], "remarks": remarks})
            return
        show_rows("reports side by side", rows)
        for remark in remarks:
            result_console().print(remark, markup=False)
        if self.output is not None:
            result_console().print(f"picture in {self.output}", markup=False)


def _names(folders: Sequence[str]) -> list[str]:
    short = [Path(folder).resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else list(folders)
