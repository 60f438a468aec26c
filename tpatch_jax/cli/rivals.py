"""``tpatch rivals``: one table of all editing methods, each from its configuration."""

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import FlagCreatePairsOff, arg

from tpatch_jax.cli.common import Json, ModelName, Quiet, load, show_rows
from tpatch_jax.cli.eval import Eval
from tpatch_jax.display.console import print_json, result_console
from tpatch_jax.errors import TPatchError

if TYPE_CHECKING:
    from tpatch_jax.evaluation.rivals import Cell, Part, Table
    from tpatch_jax.models.model import Model

__all__ = ["Rivals"]

TEXT = "wikitext-2-raw.test.txt"
HELD = 600_000
"""From this character on the text is for memories and statistics; perplexity is of its beginning."""

TRAINING = Lock()
"""Of several cells that need SERAC's networks one trains them."""


@dataclass(frozen=True)
class Rivals:
    """Fill one table of all editing methods, each from its configuration; an interrupted table goes on."""

    model: ModelName
    _: KW_ONLY
    data: Annotated[str, arg(metavar="DATA", help="folder of the data sets: CounterFact, zsRE and WikiText")]
    output: Annotated[str, arg(aliases=["-o"], metavar="TABLE", help="folder of the table and its reports")]
    quick: Annotated[bool, arg(help="8 CounterFact records in one step and one process, for a pull request")] = False
    rows: Annotated[str | None, arg(metavar="NAME[,…]", help="by default all")] = None
    configs: Annotated[str, arg(metavar="CONFIGS", help="what the names of the configurations begin with")] = (
        "configs/smollm2-135m"
    )
    serac: Annotated[str | None, arg(metavar="FOLDER", help="SERAC's two networks, of `tpatch serac-train`")] = None
    encoder: Annotated[
        str | None, arg(metavar="ENCODER", help="without --serac: train them first, from this encoder, for 41 minutes")
    ] = None
    n: Annotated[int | None, arg(aliases=["-n"], metavar="N", help="so many records of each part")] = None
    jobs: Annotated[int, arg(metavar="N", help="so many cells at once, each of about 4 GB; one for a core")] = 1
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Measure what has no report yet, each cell in a separate process, write the table, and show it."""
        from tpatch_jax.evaluation.rivals import fill_table, open_table

        if self.jobs < 1 or (self.jobs > 1 and self.quick):
            mend = "give 1 or more" if self.jobs < 1 else "a quick table is made in one process; leave it out"
            raise TPatchError(f"--jobs {self.jobs}: {mend}")
        output, chosen, remark = Path(self.output), self.cells(), ""
        if self.serac is None and self.encoder is None and any(cell.row == "serac" for cell in chosen):
            chosen = [cell for cell in chosen if cell.row != "serac"]
            remark = "serac is left out: its two networks have to be trained first; give --serac or --encoder"
        if not chosen:
            raise TPatchError(remark or "the table has no row that this part measures; leave --rows or --quick out")
        began = time.monotonic()

        def tell(cell: "Cell", number: int) -> None:
            if not (self.quiet or self.json):
                minutes = (time.monotonic() - began) / 60
                what = f"{cell.part.name}: {cell.row} ({number + 1} of {len(chosen)}, {minutes:.1f} min)"
                sys.stderr.write(f"tpatch: {what}\n")

        loaded = cache(lambda: load(self.model, None, True))
        parts = self.parts()
        open_table(output, self.plan())
        table = fill_table(chosen, lambda cell: self.measure(cell, output, loaded), parts, output, tell, self.jobs)
        self._draw(table, output)
        if self.json:
            print_json(table.to_json())
        else:
            self._show(table, output)
            if remark:
                result_console().print(remark, markup=False)
        failed = [f"{part}: {row}" for part, of_part in table.missing.items() for row in of_part]
        if failed:
            first = next(reason for of_part in table.missing.values() for reason in of_part.values())
            raise TPatchError(
                f"{len(failed)} of {len(chosen)} cells failed ({', '.join(failed)}); the first: {first}; the same "
                "command tries them again"
            )

    def plan(self) -> dict[str, Any]:
        """What all cells of the table depend on."""
        from tpatch_jax.evaluation.rivals import find_file
        from tpatch_jax.storage.finished_parts import hash_file

        parts = self.parts()
        names = dict.fromkeys((*(part.file for part in parts), TEXT))
        return {
            "model": self.model,
            "parts": [part.name for part in parts],
            "n": [part.n for part in parts],
            "data": {name: hash_file(find_file(Path(self.data), name)) for name in names},
        }

    def parts(self) -> tuple["Part", ...]:
        """The parts of the table.

        Raises:
            TPatchError: they would have no records.
        """
        from tpatch_jax.evaluation.rivals import FULL, QUICK

        if self.n is not None and self.n < 1:
            raise TPatchError(f"-n {self.n} leaves no record; give 1 or more")
        parts = QUICK if self.quick else FULL
        return parts if self.n is None else tuple(part._replace(n=self.n) for part in parts)

    def cells(self) -> list["Cell"]:
        """The cells of the table.

        Raises:
            TPatchError: there is no such row, or a configuration or a file of data is missing.
        """
        from tpatch_jax.evaluation.rivals import ROWS, cells, find_file

        parts = self.parts()
        rows = list(ROWS) if self.rows is None else [row.strip() for row in self.rows.split(",") if row.strip()]
        for name in (*(part.file for part in parts), TEXT):
            find_file(Path(self.data), name)
        return cells(parts, rows, self.configs, Path(self.output))

    def measure(self, cell: "Cell", output: Path, loaded: "Callable[[], Model]") -> None:
        """Measure one cell: in a separate process, whose peak memory is the cell's; of a quick table in this one.

        Raises:
            TPatchError: it failed.
        """
        arguments = self.arguments(cell, output)
        if not cell.part.alone:
            # A process takes as long to start as a few records to be measured.
            parse_command(arguments).evaluate(loaded())
        else:
            _run(arguments)

    def arguments(self, cell: "Cell", output: Path) -> list[str]:
        """The command line of ``tpatch`` that measures one cell; SERAC's networks are trained before, if need be."""
        from tpatch_jax.evaluation.rivals import find_file
        from tpatch_jax.storage.files import write_text
        from tpatch_jax.storage.reading import read_text

        data, memory = Path(self.data), output / "memory.txt"
        text = find_file(data, TEXT)
        if not memory.exists():
            written = read_text(text)
            # A short text, as in a trial, is both.
            write_text(memory, written[HELD:] or written)
        tokens = 2048 if self.quick else 8192
        common = ["--memory", str(memory), "--text", str(text), "--text-tokens", str(tokens)]
        if cell.row == "serac":
            with TRAINING:
                common += ["--set", f"serac={self._networks(output)}"]
        return cell.arguments(self.model, data, common)

    def _networks(self, output: Path) -> str:
        """The folder of SERAC's two networks, which are trained if they are not given."""
        from tpatch_jax.evaluation.rivals import find_file

        if self.serac is not None:
            return self.serac
        folder, data = output / "serac", Path(self.data)
        if not (folder / "serac.json").exists():
            kinds = (("counterfact", "counterfact_flat_train.json"), ("knowedit", "knowedit_zsre_train.json"))
            measured = (("counterfact", "counterfact_full_dev.json"), ("counterfact", "counterfact_flat_dev.json"))
            measured += (("zsre", "zsre_dev.json"),)
            arguments = ["serac-train", self.model, *(f"{kind}:{find_file(data, name)}" for kind, name in kinds)]
            for kind, name in measured:
                arguments += ["--exclude", f"{kind}:{find_file(data, name)}"]
            _run([*arguments, "--most", "4000", "--encoder", str(self.encoder), "-o", str(folder), "--quiet", "--json"])
        return str(folder)

    def _draw(self, table: "Table", output: Path) -> None:
        """The picture, if matplotlib is there."""
        from tpatch_jax.evaluation.pictures import draw_tradeoff

        for part in table.parts:
            results = [(row, result) for row, result in table.results[part.name].items() if row != "unedited"]
            quality = next((name for name in ("S", "generalization") if name in part.figures), None)
            if not results or quality is None:
                continue
            try:
                draw_tradeoff(output / f"{part.name}.png", results, quality)
            except TPatchError as error:
                if "matplotlib" not in str(error):
                    raise
                sys.stderr.write(f"tpatch: {error}\n")
                return

    def _show(self, table: "Table", output: Path) -> None:
        from tpatch_jax.evaluation.report import table as as_rows
        from tpatch_jax.evaluation.rivals import heading

        for part in table.parts:
            results = table.results[part.name]
            if results:
                kept = {
                    row: {**result, "metrics": {n: v for n, v in result["metrics"].items() if n in part.figures}}
                    for row, result in results.items()
                }
                show_rows(heading(part, results), as_rows(list(kept.items())))
        result_console().print(f"table in {output / 'table.md'}", markup=False)


def parse_command(arguments: Sequence[str]) -> Eval:
    """``tpatch eval`` as a command line says it.

    Args:
        arguments: as `tpatch_jax.evaluation.rivals.Cell.arguments` gives them.
    """
    return tyro.cli(Eval, args=list(arguments[1:]), config=(FlagCreatePairsOff,))


def _run(arguments: Sequence[str]) -> None:
    """Run ``tpatch`` in a separate process."""
    done: Any = subprocess.run(
        [sys.executable, "-m", "tpatch_jax.cli.main", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
        raise TPatchError(f"{said.removeprefix('tpatch: ')} (`tpatch {shlex.join(arguments[:3])} …`)")
