"""``tpatch serac-train``: reads training data, leaves out what will be measured, trains SERAC's networks."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from tpatch_jax.cli.common import Json, ModelName, Quiet, Texts, load, settings_from
from tpatch_jax.display.console import format_count, print_json, progress_bar, result_console, result_table
from tpatch_jax.errors import TPatchError
from tpatch_jax.requests import EditRequest

__all__ = ["SeracTrain", "read_training"]


@dataclass(frozen=True)
class SeracTrain:
    """Train SERAC's scope classifier and counterfactual model, which `tpatch eval --method serac` needs."""

    model: ModelName
    data: Annotated[
        Positional[tuple[str, ...]], arg(metavar="KIND:FILE…", help="training data, such as counterfact:train.json")
    ]
    _: KW_ONLY
    encoder: Annotated[str, arg(metavar="ENCODER", help="an encoder for the scope classifier: a folder, or a hub id")]
    output: Annotated[str, arg(aliases=["-o"], metavar="OUT", help="folder for both networks; resumes if interrupted")]
    exclude: Annotated[Texts, arg(metavar="KIND:FILE", help="leave out subjects and questions of this data")] = ()
    most: Annotated[int | None, arg(help="at most so many requests of each file")] = None
    template: Annotated[str | None, arg(help="where questions go, with {} for the question")] = None
    strict: Annotated[bool, arg(help="a record that cannot be read is an error; else it is passed over")] = False
    layers: Annotated[int, arg(help="of the counterfactual model")] = 4
    scope_epochs: Annotated[int, arg(help="how often the scope classifier sees each request")] = 2
    counterfactual_epochs: Annotated[int, arg(help="the same of the counterfactual model")] = 7
    batch_size: Annotated[int, arg(help="requests a step")] = 16
    scope_rate: Annotated[float, arg(help="the highest learning rate of the scope classifier")] = 5e-5
    counterfactual_rate: Annotated[float, arg(help="the same of the counterfactual model")] = 1e-3
    dtype: Annotated[str | None, arg(help="of the base model: float32 or bfloat16")] = None
    seed: Annotated[int, arg(help="the same seed gives the same networks")] = 0
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Train, save, and show the figures."""
        from tpatch_jax.editors.serac.training import SeracTraining, train_serac
        from tpatch_jax.evaluation.records import QUESTION

        requests = read_training(self.data, self.exclude, self.most, self.template or QUESTION, self.strict)
        model = load(self.model, self.dtype, self.quiet or self.json)
        settings = settings_from(SeracTraining, self)
        with progress_bar(self.quiet or self.json) as report:
            info = train_serac(model, self.encoder, requests, self.output, settings=settings, progress=report)
        result = info.to_json()
        if self.json:
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
        advice = f"networks saved in {self.output}; edit with --method serac --set serac={self.output}"
        console.print(advice, markup=False)


def read_training(
    data: Sequence[str],
    exclude: Sequence[str],
    most: int | None,
    template: str | None = None,
    strict: bool = False,
) -> list[EditRequest]:
    """Requests to train on.

    Args:
        data: ``KIND:FILE`` each, the kind one of `tpatch_jax.evaluation.records.DATA`.
        exclude: the same; a request that is about a subject of one of these files, or asks what is asked there, is left
            out.
        most: at most so many requests of each file, from its start, after those were left out.
        template: where questions go; by default `tpatch_jax.evaluation.records.QUESTION`.
        strict: a record that cannot be read is an error; by default it is passed over, and the log says so.

    Raises:
        TPatchError: a text is not ``KIND:FILE``, a file cannot be read, or nothing is left.
    """
    from tpatch_jax.evaluation.records import DATA, QUESTION, read_records

    if most is not None and most < 1:
        raise TPatchError(f"--most {most} leaves no request; give 1 or more")

    def requests(source: str) -> list[EditRequest]:
        kind, colon, file = source.partition(":")
        if not colon or kind not in DATA:
            raise TPatchError(f"{source!r} is not KIND:FILE; the kinds are {', '.join(DATA)}")
        records = read_records(kind, file, template=QUESTION if template is None else template, strict=strict)
        return [request for record in records for request in record.requests]

    measured = [request for source in exclude for request in requests(source)]
    subjects = {request.subject for request in measured} - {None}
    texts = {text for request in measured for text in (request.prompt, *request.rephrases)}

    def kept(request: EditRequest) -> bool:
        return request.subject not in subjects and texts.isdisjoint((request.prompt, *request.rephrases))

    by_file = [[request for request in requests(source) if kept(request)][:most] for source in data]
    if not any(by_file):
        raise TPatchError("no request is left to train on; give data about other subjects than those excluded")
    return [request for of_file in by_file for request in of_file]
