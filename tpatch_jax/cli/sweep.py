"""``tpatch sweep``: edits at each of several layers and positions, and says which is best."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from tpatch_jax.cli.common import (
    Config,
    Dtype,
    Json,
    MemoryText,
    ModelName,
    Quiet,
    Set,
    load,
    settings_of,
    show_rows,
)
from tpatch_jax.display.console import format_count, print_json, progress_bar, result_console
from tpatch_jax.errors import TPatchError

__all__ = ["Sweep"]


@dataclass(frozen=True)
class Sweep:
    """Find the layer and position for patches at subjects: edit at each, measure, and choose."""

    model: ModelName
    requests: Annotated[Positional[str], arg(metavar="REQUESTS.jsonl", help="requests with subjects and rephrases")]
    _: KW_ONLY
    output: Annotated[str, arg(aliases=["-o"], metavar="OUT", help="folder for figures, settings and a picture")]
    layers: Annotated[str | None, arg(help="such as 2,6,10; by default eight over the whole height")] = None
    positions: Annotated[str, arg(help="subject, prompt or both: at whose last token")] = "subject,prompt"
    n: Annotated[int | None, arg(aliases=["-n"], metavar="N", help="so many requests from the start")] = None
    config: Config = None
    changes: Set = ()
    memory: MemoryText = None
    dtype: Dtype = None
    seed: Annotated[int, arg(help="the same seed gives the same figures")] = 0
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Edit at each site, write figures, settings and a picture, and show the figures."""
        from tpatch_jax.editors.tpatcher.subject_settings import POSITIONS
        from tpatch_jax.evaluation.sweep import best, sweep, write_sweep
        from tpatch_jax.storage.files import check_vacant, replace_folder
        from tpatch_jax.storage.request_file import read_requests

        requests = read_requests(self.requests)
        if self.n is not None and not 0 < self.n <= len(requests):
            raise TPatchError(f"-n {self.n}: {self.requests} has {len(requests)} requests")
        requests = requests[: self.n]
        positions = [position.strip() for position in self.positions.split(",")]
        for position in positions:
            if position not in POSITIONS:
                raise TPatchError(f"position {position!r} does not exist; choose from {', '.join(POSITIONS)}")
        settings = settings_of(None, self.config, self.changes)
        check_vacant(Path(self.output))
        model = load(self.model, self.dtype, self.quiet or self.json)
        layers = self._layers(model.config.layers - 1)
        with progress_bar(self.quiet or self.json) as report:
            rows = sweep(
                model, requests, settings, layers, positions, memory=self.memory, seed=self.seed, progress=report
            )
        about = {"requests": Path(self.requests).name, "n": len(requests), "seed": self.seed}
        with replace_folder(Path(self.output)) as folder:
            names = write_sweep(folder, model, rows, about)
        chosen = best(rows)
        if self.json:
            print_json({"rows": rows, "best": chosen, "files": [str(Path(self.output) / name) for name in names]})
            return
        texts = [
            [f"{v:.4g}" if isinstance(v, float) else "" if v is None else str(v) for v in row.values()] for row in rows
        ]
        title = f"{self.model}: {format_count(len(requests), 'request')} edited together at each site"
        show_rows(title, [list(rows[0]), *texts])
        line = f"best: layer {chosen['layer']}, at the {chosen['position']}'s last token; written to {self.output}"
        result_console().print(line, markup=False)

    def _layers(self, last: int) -> list[int]:
        if not self.layers:
            return sorted({last * k // 8 for k in range(8)})
        try:
            return [int(layer) for layer in self.layers.split(",")]
        except ValueError:
            raise TPatchError(f"--layers {self.layers!r} is no list of layers; write for instance 2,6,10") from None
