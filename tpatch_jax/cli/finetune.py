"""``tpatch finetune``: parses what the command line says, calls the library, shows the result."""

from rich.text import Text

from tpatch_jax.display.console import print_json, progress_bar, result_console, result_table
from tpatch_jax.storage.process import prepare_process
from tpatch_jax.training.finetune import FinetuneSettings
from tpatch_jax.training.finetune import finetune as train

__all__ = ["finetune"]


def finetune(
    model: str,
    data: str,
    output: str,
    *,
    validation: str | None,
    labels: str | None,
    fields: tuple[str, str],
    settings: FinetuneSettings,
    dtype: str | None,
    json: bool,
    quiet: bool,
) -> None:
    """``tpatch finetune``."""
    prepare_process()
    with progress_bar(quiet or json) as report:
        info = train(
            model,
            data,
            output,
            settings=settings,
            validation=() if validation is None else validation,
            labels=labels.split(",") if labels is not None else None,
            prompt_field=fields[0],
            target_field=fields[1],
            dtype=dtype,
            progress=report,
        )
    result = info.to_json()
    if json:
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
    console.print(f"model saved in {output}", markup=False)
