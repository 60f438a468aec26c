"""``tpatch finetune``: trains the model that editing needs."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from tpatch_jax.cli.common import Json, Quiet, settings_from
from tpatch_jax.display.console import print_json, progress_bar, result_console, result_table

__all__ = ["Finetune"]


@dataclass(frozen=True)
class Finetune:
    """Make a classifier of an encoder, of texts or of pictures, or a question answerer of an encoder-decoder."""

    model: Annotated[Positional[str], arg(metavar="MODEL", help="an encoder or encoder-decoder: a folder, or a hub id")]
    data: Annotated[
        Positional[str],
        arg(metavar="DATA", help="one JSON object a line, with prompt and target; or an .npz of pictures"),
    ]
    _: KW_ONLY
    output: Annotated[str, arg(aliases=["-o"], metavar="OUT", help="folder for the model; an interrupted run resumes")]
    validation: Annotated[
        str | None, arg(metavar="FILE", help="examples to measure on, like DATA; an .npz brings its own")
    ] = None
    labels: Annotated[str | None, arg(metavar="NAME,…", help="a classifier's labels; by default all in DATA")] = None
    prompt_field: Annotated[str, arg(help="the key of the prompt")] = "prompt"
    target_field: Annotated[str, arg(help="the key of the target, or label")] = "target"
    from_scratch: Annotated[bool, arg(help="random weights: MODEL needs no more than a config.json")] = False
    epochs: Annotated[int, arg(help="how often each example is seen")] = 3
    batch_size: Annotated[int, arg(help="examples a step; pictures count once, in two forms")] = 32
    learning_rate: Annotated[float | None, arg(help="by default 5e-5, or 1e-3 from scratch")] = None
    image_copies: Annotated[int, arg(help="of pictures: so many changed copies of each are learnt as well")] = 9
    image_contrast: Annotated[
        float, arg(help="of pictures: how much it counts that copies of one are alike, and told from others")
    ] = 1.0
    checkpoint_steps: Annotated[int, arg(help="save work every so many steps; 0 is every two minutes")] = 0
    dtype: Annotated[str | None, arg(help="of what is written: float32 (the default) or bfloat16")] = None
    seed: Annotated[int, arg(help="the same seed gives the same model")] = 0
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Train, save, and show the figures."""
        from rich.text import Text

        from tpatch_jax.storage.process import prepare_process
        from tpatch_jax.training.finetune import FinetuneSettings, finetune

        prepare_process()
        with progress_bar(self.quiet or self.json) as report:
            info = finetune(
                self.model,
                self.data,
                self.output,
                settings=settings_from(FinetuneSettings, self),
                validation=() if self.validation is None else self.validation,
                labels=self.labels.split(",") if self.labels is not None else None,
                prompt_field=self.prompt_field,
                target_field=self.target_field,
                dtype=self.dtype,
                progress=report,
            )
        result = info.to_json()
        if self.json:
            print_json(result)
            return
        console = result_console()
        heading = f"{info.examples:,} examples, {info.steps:,} steps, {info.seconds:.1f} s"
        table = result_table(heading, ("figure", "value"), ("value",))
        for name in ("epochs", "loss", "train_accuracy", "validation_accuracy"):
            if (value := result[name]) is not None:
                table.add_row(name, f"{value:.4g}")
        if info.labels:
            table.add_row("labels", Text(", ".join(info.labels)), end_section=True)
        console.print(table)
        if info.resumed:
            console.print(f"resumed after step {info.resumed:,}")
        console.print(f"model saved in {self.output}", markup=False)
