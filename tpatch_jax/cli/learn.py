"""``tpatch learn``: learns from many requests where the values of later edits start."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from tpatch_jax.cli.common import Json, ModelName, Quiet, Texts, load, settings_from
from tpatch_jax.cli.serac_train import read_training
from tpatch_jax.display.console import format_count, print_json, progress_bar, result_console, result_table
from tpatch_jax.errors import TPatchError

__all__ = ["Learn"]


@dataclass(frozen=True)
class Learn:
    """Learn from requests what values of later edits start from; nothing is edited."""

    model: ModelName
    requests: Annotated[
        Positional[tuple[str, ...]],
        arg(metavar="REQUESTS…", help="a file of requests, or KIND:FILE such as counterfact:train.json"),
    ]
    _: KW_ONLY
    output: Annotated[str, arg(aliases=["-o"], metavar="START", help="a .safetensors file; --set start=START uses it")]
    exclude: Annotated[Texts, arg(metavar="KIND:FILE", help="leave out subjects and questions of this data")] = ()
    begin: Annotated[str | None, arg(metavar="START", help="go on from a start that was learnt before")] = None
    memory: Annotated[str | None, arg(metavar="TEXT", help="a text file for contexts; sampled by default")] = None
    layer: Annotated[str, arg(help="of the subject site: auto or a number")] = "auto"
    steps: Annotated[int, arg(help="steps of the optimiser")] = 400
    lanes: Annotated[int, arg(help="requests a step")] = 8
    width: Annotated[int, arg(help="of the network's inner layer")] = 256
    rate: Annotated[float, arg(help="the highest learning rate")] = 8e-4
    closeness: Annotated[float, arg(help="weight of what should stay as it is")] = 1.0
    held_out: Annotated[int, arg(help="so many subjects only measure")] = 32
    dtype: Annotated[str | None, arg(help="of the model: float32 or bfloat16")] = None
    seed: Annotated[int, arg(help="the same seed gives the same start")] = 0
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Learn, save, and show the figures."""
        from tpatch_jax.editors.tpatcher.learning import LearningSettings, learn_start
        from tpatch_jax.editors.tpatcher.start_file import check_start_path, load_start, save_start
        from tpatch_jax.editors.tpatcher.subject_site import subject_layer
        from tpatch_jax.storage.request_file import read_requests

        settings = settings_from(LearningSettings, self)
        check_start_path(self.output)
        subject_layer(1, self.layer)  # a layer that is none is a mistake before the model is loaded
        start = None if self.begin is None else load_start(self.begin)
        if self.memory is not None and not Path(self.memory).is_file():
            raise TPatchError(f"there is no memory text at {self.memory}; give a text file")
        files = [text for text in self.requests if ":" not in text or Path(text).is_file()]
        if files and self.exclude:
            raise TPatchError(
                f"--exclude belongs to KIND:FILE; leave requests out of {files[0]} itself, or give requests:{files[0]}"
            )
        requests = [request for file in files for request in read_requests(file)]
        if len(files) < len(self.requests):
            requests += read_training([text for text in self.requests if text not in files], self.exclude, None)
        model = load(self.model, self.dtype, self.quiet or self.json)
        layer = model.layer(subject_layer(model.config.layers, self.layer))
        with progress_bar(self.quiet or self.json) as report:
            made, info = learn_start(
                model, requests, layer, settings=settings, memory=self.memory, seed=self.seed, start=start,
                progress=report,
            )  # fmt: skip
        save_start(self.output, made)
        result = info.to_json() | {"start": self.output, "layer": layer}
        if self.json:
            print_json(result)
            return
        console = result_console()
        heading = f"{format_count(info.requests, 'request')}, {info.seconds:.1f} s"
        table = result_table(heading, ("figure", "value"), ("value",))
        for name in ("steps", "loss", "divergence", "held_out", "said_at_start", "divergence_at_start"):
            value = result[name]
            table.add_row(name, f"{value:.4f}" if isinstance(value, float) else f"{value:,}")
        console.print(table)
        console.print(f"saved in {self.output}; edit with --set start={self.output}", markup=False)
