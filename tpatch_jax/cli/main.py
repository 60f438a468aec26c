"""The ``tpatch`` command: parses, calls the library, prints."""

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

from tpatch_jax.cli.bank_commands import BANK_COMMANDS, Prompt, Subject, Target
from tpatch_jax.errors import TPatchError

__all__ = ["main"]

Model = Annotated[Positional[str], arg(metavar="MODEL", help="a name from `tpatch models`, a folder, or a hub id")]
Patches = Annotated[Positional[str], arg(metavar="PATCHES", help="a folder that `tpatch edit` wrote")]
Json = Annotated[bool, arg(help="print one JSON object as the last line")]
Quiet = Annotated[bool, arg(help="show no progress bar")]
Set = Annotated[UseAppendAction[tuple[str, ...]], arg(name="set", metavar="NAME=VALUE", help="change a setting")]
Config = Annotated[str | None, arg(metavar="FILE", help="a YAML file of settings, 'name: value' lines")]


def bench(
    model: Annotated[
        Positional[str], arg(metavar="MODEL", help="a decoder, as `tpatch models` names it")
    ] = "smollm2-135m",
    *,
    file: Annotated[str | None, arg(metavar="FILE", help="edits: requests or CounterFact; by default made up")] = None,
    output: Annotated[str | None, arg(aliases=["-o"], metavar="PICTURE", help="also draw it, e.g. bench.png")] = None,
    quick: Annotated[bool, arg(help="fewer edits and repeats: under five minutes on two CPU cores")] = False,
    plan: Annotated[bool, arg(help="measure nothing: what many edits of large models would cost, on paper")] = False,
    dtype: Annotated[str | None, arg(help="float32 or bfloat16; by default the checkpoint's")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what editing costs: time, memory, generation, compilations, beside the paper's loop."""
    from tpatch_jax.cli.bench import bench_command, plan_command

    if plan:
        plan_command(json=json)
        return
    bench_command(model, file, output, short=quick, dtype=dtype, json=json, quiet=quiet)


def demo(
    output: Annotated[str, arg(aliases=["-o"], help="where to save the patches")] = "patches/demo",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Correct eight facts of a real language model and show what changed."""
    from tpatch_jax.cli.demo import run

    run(output, json=json, quiet=quiet)


def edit(
    model: Model,
    requests: Annotated[Positional[str | None], arg(metavar="REQUESTS.jsonl", help="one JSON request a line")] = None,
    *,
    output: Annotated[str, arg(aliases=["-o"], metavar="PATCHES", help="folder for the patches")],
    prompt: Prompt = None,
    target: Target = None,
    subject: Subject = None,
    config: Config = None,
    preset: Annotated[str | None, arg(help="default, paper or paper-fever")] = None,
    changes: Set = (),
    memory: Annotated[str | None, arg(help="a text file on which patches stay silent")] = None,
    train_on_rephrases: Annotated[bool, arg(help="fit on the rephrases too, which otherwise only measure")] = False,
    dtype: Annotated[str | None, arg(help="float32 or bfloat16; by default the checkpoint's")] = None,
    seed: Annotated[int, arg(help="the same seed gives the same patches")] = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Correct a model: fit neurons that make it say each target after its prompt."""
    from tpatch_jax.cli import commands

    commands.edit(
        model,
        requests,
        output,
        single=(prompt, target, subject),
        config=config,
        preset=preset,
        changes=[*changes, *(["train_on_rephrases=true"] if train_on_rephrases else [])],
        memory=memory,
        dtype=dtype,
        seed=seed,
        json=json,
        quiet=quiet,
    )


def evaluate(
    model: Model,
    *,
    output: Annotated[
        str, arg(aliases=["-o"], metavar="REPORT", help="folder for the report; an interrupted run resumes")
    ],
    data: Annotated[str | None, arg(help="counterfact, zsre, knowedit, requests, mquake, fever or text")] = None,
    file: Annotated[str | None, arg(metavar="FILE", help="the data set's file")] = None,
    method: Annotated[str | None, arg(metavar="NAME[,…]", help="by default tpatcher")] = None,
    protocol: Annotated[str | None, arg(help="single, batch (the default) or sequential")] = None,
    n: Annotated[int | None, arg(aliases=["-n"], metavar="N", help="so many records from the start")] = None,
    config: Annotated[
        str | None, arg(metavar="FILE", help="a YAML file of options and settings, such as those in configs/")
    ] = None,
    preset: Annotated[str | None, arg(help="default, paper or paper-fever")] = None,
    changes: Set = (),
    seed: Annotated[int | None, arg(help="the same seed gives the same figures")] = None,
    one_per_subject: Annotated[bool, arg(help="keep each subject's first record")] = False,
    reading: Annotated[str | None, arg(help="of zsRE: easyedit (the default) or rome")] = None,
    template: Annotated[str | None, arg(help="where questions go, with {} for the question")] = None,
    text: Annotated[str | None, arg(metavar="FILE", help="a text file: adds perplexity and the certificate")] = None,
    text_tokens: Annotated[int | None, arg(help="at most so many tokens of the text; 16384 by default")] = None,
    edits: Annotated[str | None, arg(metavar="FILE", help="with --data text: what is edited; else nothing is")] = None,
    edits_data: Annotated[str | None, arg(help="the data set of --edits; counterfact by default")] = None,
    generate: Annotated[bool, arg(help="also sample continuations for GE (slow)")] = False,
    every: Annotated[int | None, arg(help="sequential: ask all edits again every so many; 50 by default")] = None,
    train_set: Annotated[str | None, arg(metavar="FILE", help="sequential: only asked, for TrainR")] = None,
    test_set: Annotated[str | None, arg(metavar="FILE", help="sequential: only asked, for TestR")] = None,
    memory: Annotated[str | None, arg(help="a text file on which patches stay silent")] = None,
    dtype: Annotated[str | None, arg(help="float32 or bfloat16; by default the checkpoint's")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what editing does, by a named protocol, and write a report."""
    from tpatch_jax.cli import evaluate as commands

    given = {
        "data": data,
        "file": file,
        "method": method,
        "protocol": protocol,
        "n": n,
        "seed": seed,
        "preset": preset,
        "one_per_subject": one_per_subject or None,
        "reading": reading,
        "template": template,
        "text": text,
        "text_tokens": text_tokens,
        "edits": edits,
        "edits_data": edits_data,
        "generate": generate or None,
        "every": every,
        "train_set": train_set,
        "test_set": test_set,
    }
    commands.evaluate_command(
        model,
        given,
        output,
        config=config,
        changes=changes,
        memory=memory,
        dtype=dtype,
        json=json,
        quiet=quiet,
    )


def bank(*arguments: str) -> None:
    """Patches that last: a folder of edits with undo, which survives crashes; `tpatch bank --help`."""
    raise SystemExit(main(["bank", *arguments]))


def compare(
    reports: Annotated[Positional[tuple[str, ...]], arg(metavar="REPORT…", help="folders that `tpatch eval` wrote")],
    output: Annotated[
        str | None, arg(aliases=["-o"], metavar="PICTURE", help="also draw them, e.g. compare.png")
    ] = None,
    json: Json = False,
) -> None:
    """Show several reports side by side."""
    from tpatch_jax.cli import evaluate as commands

    commands.compare(reports, output, json=json)


def export(
    model: Model,
    patches: Annotated[
        Positional[str | None],
        arg(metavar="PATCHES", help="a folder that `tpatch edit` wrote; none if MODEL has them merged"),
    ] = None,
    *,
    output: Annotated[str, arg(aliases=["-o"], metavar="OUT", help="folder for the model")],
    approximate: Annotated[
        bool, arg(help="where the architecture has no biases, fold them away and measure the error")
    ] = False,
    memory: Annotated[str | None, arg(help="with --approximate: a text file to fit and measure on")] = None,
    dtype: Annotated[str | None, arg(help="float32 or bfloat16; as given to `tpatch edit`")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the corrected model for the stock transformers library."""
    from tpatch_jax.cli import commands

    commands.export(model, patches, output, approximate=approximate, memory=memory, dtype=dtype, json=json, quiet=quiet)


def finetune(
    model: Annotated[
        Positional[str], arg(metavar="MODEL", help="an encoder or encoder-decoder: a folder, or a hub id")
    ],
    data: Annotated[Positional[str], arg(metavar="DATA.jsonl", help="one JSON object a line, with prompt and target")],
    *,
    output: Annotated[str, arg(aliases=["-o"], metavar="OUT", help="folder for the model; an interrupted run resumes")],
    validation: Annotated[str | None, arg(metavar="FILE", help="examples to measure on, like DATA.jsonl")] = None,
    labels: Annotated[str | None, arg(metavar="NAME,…", help="a classifier's labels; by default all in DATA")] = None,
    prompt_field: Annotated[str, arg(help="the key of the prompt")] = "prompt",
    target_field: Annotated[str, arg(help="the key of the target, or label")] = "target",
    from_scratch: Annotated[bool, arg(help="random weights: MODEL needs no more than a config.json")] = False,
    epochs: Annotated[int, arg(help="how often each example is seen")] = 3,
    batch_size: Annotated[int, arg(help="examples a step")] = 32,
    learning_rate: Annotated[float | None, arg(help="by default 5e-5, or 1e-3 from scratch")] = None,
    checkpoint_steps: Annotated[int, arg(help="save work every so many steps; 0 is every two minutes")] = 0,
    dtype: Annotated[str | None, arg(help="of what is written: float32 (the default) or bfloat16")] = None,
    seed: Annotated[int, arg(help="the same seed gives the same model")] = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a classifier of an encoder, or a question answerer of an encoder-decoder."""
    from tpatch_jax.cli import finetune as finetuning_command
    from tpatch_jax.training.finetune import FinetuneSettings

    settings = FinetuneSettings(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        from_scratch=from_scratch,
        checkpoint_steps=checkpoint_steps,
    )
    finetuning_command.finetune(
        model,
        data,
        output,
        validation=validation,
        labels=labels,
        fields=(prompt_field, target_field),
        settings=settings,
        dtype=dtype,
        json=json,
        quiet=quiet,
    )


def generate(
    model: Model,
    prompt: Annotated[str, arg(help="the text to continue, answer or classify")],
    patches: Annotated[str | None, arg(help="patches to attach")] = None,
    max_new_tokens: int = 32,
    dtype: Annotated[str | None, arg(help="float32 or bfloat16")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue a text greedily, answer a question or name a label: whatever the model does, with or without patches."""
    from tpatch_jax.cli import commands

    commands.generate(model, prompt, patches, max_new_tokens, dtype=dtype, json=json, quiet=quiet)


def inspect(patches: Patches, json: Json = False) -> None:
    """List every edit in a folder of patches."""
    from tpatch_jax.cli import commands

    commands.inspect(patches, json=json)


def merge(
    model: Model,
    patches: Patches,
    output: Annotated[str, arg(aliases=["-o"], metavar="OUT", help="folder for the model")],
    dtype: Annotated[str | None, arg(help="float32 or bfloat16")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the model with the patches inside its feed-forward network, as a Hugging Face style folder."""
    from tpatch_jax.cli import commands

    commands.merge(model, patches, output, dtype=dtype, json=json, quiet=quiet)


def models(json: Json = False) -> None:
    """Say what MODEL may be, and how each is obtained."""
    from tpatch_jax.cli import commands

    commands.models(json=json)


def report(
    folder: Annotated[Positional[str], arg(metavar="BANK|REPORT", help="a bank, or a folder that `tpatch eval` wrote")],
    *,
    output: Annotated[str, arg(aliases=["-o"], metavar="PAGE.html", help="the page, all in one file")],
    json: Json = False,
) -> None:
    """Write one page to look at: a bank's edits, or an evaluation's figures and pictures."""
    from tpatch_jax.cli.report import report_command

    report_command(folder, output, json=json)


def serac_train(
    model: Model,
    data: Annotated[
        Positional[tuple[str, ...]], arg(metavar="KIND:FILE…", help="training data, such as counterfact:train.json")
    ],
    *,
    encoder: Annotated[str, arg(metavar="ENCODER", help="an encoder for the scope classifier: a folder, or a hub id")],
    output: Annotated[str, arg(aliases=["-o"], metavar="OUT", help="folder for both networks; resumes if interrupted")],
    exclude: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="KIND:FILE", help="leave out subjects and questions of this data")
    ] = (),
    most: Annotated[int | None, arg(help="at most so many requests of each file")] = None,
    template: Annotated[str | None, arg(help="where questions go, with {} for the question")] = None,
    layers: Annotated[int, arg(help="of the counterfactual model")] = 4,
    scope_epochs: Annotated[int, arg(help="how often the scope classifier sees each request")] = 2,
    counterfactual_epochs: Annotated[int, arg(help="the same of the counterfactual model")] = 7,
    batch_size: Annotated[int, arg(help="requests a step")] = 16,
    scope_rate: Annotated[float, arg(help="the highest learning rate of the scope classifier")] = 5e-5,
    counterfactual_rate: Annotated[float, arg(help="the same of the counterfactual model")] = 1e-3,
    dtype: Annotated[str | None, arg(help="of the base model: float32 or bfloat16")] = None,
    seed: Annotated[int, arg(help="the same seed gives the same networks")] = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train SERAC's scope classifier and counterfactual model, which `tpatch eval --method serac` needs."""
    from tpatch_jax.cli import serac_train as serac_command
    from tpatch_jax.editors.serac.training import SeracTraining

    settings = SeracTraining(
        layers=layers,
        scope_epochs=scope_epochs,
        counterfactual_epochs=counterfactual_epochs,
        batch_size=batch_size,
        scope_rate=scope_rate,
        counterfactual_rate=counterfactual_rate,
        seed=seed,
    )
    serac_command.serac_train(
        model,
        data,
        encoder,
        output,
        exclude=exclude,
        most=most,
        template=template,
        settings=settings,
        dtype=dtype,
        json=json,
        quiet=quiet,
    )


def sweep(
    model: Model,
    requests: Annotated[Positional[str], arg(metavar="REQUESTS.jsonl", help="requests with subjects and rephrases")],
    *,
    output: Annotated[str, arg(aliases=["-o"], metavar="OUT", help="folder for figures, settings and a picture")],
    layers: Annotated[str | None, arg(help="such as 2,6,10; by default eight over the whole height")] = None,
    positions: Annotated[str, arg(help="subject, prompt or both: at whose last token")] = "subject,prompt",
    n: Annotated[int | None, arg(aliases=["-n"], metavar="N", help="so many requests from the start")] = None,
    config: Config = None,
    changes: Set = (),
    memory: Annotated[str | None, arg(help="a text file on which patches stay silent")] = None,
    dtype: Annotated[str | None, arg(help="float32 or bfloat16; by default the checkpoint's")] = None,
    seed: Annotated[int, arg(help="the same seed gives the same figures")] = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the layer and position for patches at subjects: edit at each, measure, and choose."""
    from tpatch_jax.cli import evaluate as commands

    commands.sweep_command(
        model,
        requests,
        output,
        layers=layers,
        positions=positions,
        n=n,
        config=config,
        changes=changes,
        memory=memory,
        dtype=dtype,
        seed=seed,
        json=json,
        quiet=quiet,
    )


COMMANDS: dict[str, Callable[..., Any]] = {
    "bank": bank,
    "bench": bench,
    "compare": compare,
    "demo": demo,
    "edit": edit,
    "eval": evaluate,
    "export": export,
    "finetune": finetune,
    "generate": generate,
    "inspect": inspect,
    "merge": merge,
    "models": models,
    "report": report,
    "serac-train": serac_train,
    "sweep": sweep,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; by default the process's own.

    Returns:
        The exit status: 0, 1 after a mistake that the message explains or a pipe that was closed, 130 after Ctrl-C.
    """
    # Without torch, which nothing here needs, transformers would say so at every start.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    arguments = sys.argv[1:] if arguments is None else arguments
    commands, prog, said = COMMANDS, "tpatch", "Correct what a trained transformer says, one neuron per mistake."
    if arguments[:1] == ["bank"]:
        arguments, commands, prog = arguments[1:], BANK_COMMANDS, "tpatch bank"
        said = "Patches that last: one folder, a journal, undo."
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog=prog,
            description=said,
            args=arguments,
            config=(FlagCreatePairsOff,),
        )
    except TPatchError as error:
        sys.stderr.write(f"tpatch: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("tpatch: stopped\n")
        return 130
    except BrokenPipeError:
        # Who reads has seen enough; what Python flushes at its end shall not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
