"""``tpatch serac-train``: reads training data, leaves out what will be measured, trains, shows the result."""

from collections.abc import Sequence

from tpatch_jax.cli.commands import load
from tpatch_jax.display.console import format_count, print_json, progress_bar, result_console, result_table
from tpatch_jax.editors.serac.training import SeracTraining, train_serac
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.records import DATA, QUESTION, read_records
from tpatch_jax.requests import EditRequest

__all__ = ["read_training", "serac_train"]


def read_training(
    data: Sequence[str], exclude: Sequence[str], most: int | None, template: str = QUESTION
) -> list[EditRequest]:
    """Requests to train on.

    Args:
        data: ``KIND:FILE`` each, the kind one of `tpatch_jax.evaluation.records.DATA`.
        exclude: the same; a request that is about a subject of one of these files, or asks what is asked there, is left
            out.
        most: at most so many requests of each file, from its start, after those were left out.
        template: where questions go.

    Raises:
        TPatchError: a text is not ``KIND:FILE``, a file cannot be read, or nothing is left.
    """
    if most is not None and most < 1:
        raise TPatchError(f"--most {most} leaves no request; give 1 or more")

    def requests(source: str) -> list[EditRequest]:
        kind, colon, file = source.partition(":")
        if not colon or kind not in DATA:
            raise TPatchError(f"{source!r} is not KIND:FILE; the kinds are {', '.join(DATA)}")
        return [one for record in read_records(kind, file, template=template) for one in record.requests]

    measured = [one for source in exclude for one in requests(source)]
    subjects = {one.subject for one in measured} - {None}
    texts = {text for one in measured for text in (one.prompt, *one.rephrases)}

    def kept(one: EditRequest) -> bool:
        return one.subject not in subjects and texts.isdisjoint((one.prompt, *one.rephrases))

    found = [[one for one in requests(source) if kept(one)][:most] for source in data]
    if not any(found):
        raise TPatchError("no request is left to train on; give data about other subjects than those excluded")
    return [one for part in found for one in part]


def serac_train(
    model: str,
    data: Sequence[str],
    encoder: str,
    output: str,
    *,
    exclude: Sequence[str],
    most: int | None,
    template: str | None,
    settings: SeracTraining,
    dtype: str | None,
    json: bool,
    quiet: bool,
) -> None:
    """``tpatch serac-train``."""
    requests = read_training(data, exclude, most, template or QUESTION)
    loaded = load(model, dtype, quiet or json)
    with progress_bar(quiet or json) as report:
        info = train_serac(loaded, encoder, requests, output, settings=settings, progress=report)
    result = info.to_json()
    if json:
        print_json(result)
        return
    console = result_console()
    heading = f"{format_count(info.requests, 'request')}, {info.seconds:.1f} s"
    table = result_table(heading, ("figure", "value"), ("value",))
    for name in ("scope_losses", "counterfactual_losses"):
        table.add_row(name, ", ".join(f"{loss:.4f}" for loss in result[name]))
    for name in ("held_out", "in_scope", "out_of_scope", "exact", "parameters"):
        if (value := result[name]) is not None:
            table.add_row(name, f"{value:.4f}" if isinstance(value, float) else f"{value:,}")
    console.print(table)
    console.print(f"networks saved in {output}; edit with --method serac --set serac={output}", markup=False)
