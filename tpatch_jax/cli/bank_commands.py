"""The ``tpatch bank`` commands: what they take."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

__all__ = ["BANK_COMMANDS", "Prompt", "Subject", "Target"]

Bank = Annotated[Positional[str], arg(metavar="BANK", help="the bank's folder")]
Ids = Annotated[Positional[tuple[str, ...]], arg(metavar="ID…", help="as `tpatch bank list` shows them")]
Where = Annotated[str | None, arg(help="where the bank's model is now, if it moved")]
Json = Annotated[bool, arg(help="print one JSON object as the last line")]
Quiet = Annotated[bool, arg(help="show no progress bar")]
Texts = UseAppendAction[tuple[str, ...]]

# Read by `str`: the word None is a text like any other.
_text = partial(arg, metavar="TEXT", constructor=str, help_behavior_hint="")
Prompt = Annotated[str | None, _text(help="a single edit: the text that the model continues wrongly")]
Target = Annotated[str | None, _text(help="a single edit: what it should say instead")]
Subject = Annotated[str | None, _text(help="a single edit: what the prompt is about")]


def init(
    bank: Bank,
    *,
    model: Annotated[str, arg(help="a name from `tpatch models`, a folder, or a hub id")],
    preset: Annotated[str | None, arg(help="default, paper or paper-fever")] = None,
    config: Annotated[str | None, arg(metavar="FILE", help="a YAML file of settings, 'name: value' lines")] = None,
    changes: Annotated[Texts, arg(name="set", metavar="NAME=VALUE", help="change a setting")] = (),
    memory: Annotated[str | None, arg(help="a text file on which patches stay silent")] = None,
    dtype: Annotated[str | None, arg(help="float32 or bfloat16; by default the checkpoint's")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make an empty bank for a model; all its edits are fitted with the settings given here."""
    from tpatch_jax.cli import bank as bank_command

    bank_command.init(
        bank, model, preset=preset, config=config, changes=changes, memory=memory, dtype=dtype, json=json, quiet=quiet
    )


def add(
    bank: Bank,
    requests: Annotated[Positional[str | None], arg(metavar="REQUESTS.jsonl", help="one JSON request a line")] = None,
    *,
    prompt: Prompt = None,
    target: Target = None,
    subject: Subject = None,
    batch: Annotated[int, arg(help="so many requests are fitted together and committed at once")] = 50,
    resume: Annotated[bool, arg(help="pass over what the bank already holds: go on after an interruption")] = False,
    force: Annotated[bool, arg(help="let guarded answers change")] = False,
    model: Where = None,
    seed: Annotated[int, arg(help="the same seed gives the same patches")] = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit requests beside what is active, check everything, and commit batch after batch."""
    from tpatch_jax.cli import bank as bank_command

    bank_command.add(
        bank, requests, single=(prompt, target, subject), batch=batch, resume=resume, force=force, model=model,
        seed=seed, json=json, quiet=quiet,
    )  # fmt: skip


def disable(bank: Bank, ids: Ids, model: Where = None, json: Json = False, quiet: Quiet = False) -> None:
    """Leave edits out for a while."""
    from tpatch_jax.cli import bank as bank_command

    bank_command.change_edits("disable", bank, ids, model=model, json=json, quiet=quiet)


def enable(bank: Bank, ids: Ids, model: Where = None, json: Json = False, quiet: Quiet = False) -> None:
    """Bring disabled edits back."""
    from tpatch_jax.cli import bank as bank_command

    bank_command.change_edits("enable", bank, ids, model=model, json=json, quiet=quiet)


def remove(bank: Bank, ids: Ids, model: Where = None, json: Json = False, quiet: Quiet = False) -> None:
    """Take edits out for good; the last ones without a trace in what the model says."""
    from tpatch_jax.cli import bank as bank_command

    bank_command.change_edits("remove", bank, ids, model=model, json=json, quiet=quiet)


def list_edits(bank: Bank, json: Json = False) -> None:
    """List every edit and its state: active, disabled, superseded, removed or lost."""
    from tpatch_jax.cli import bank as bank_command

    bank_command.list_edits(bank, json=json)


def show(bank: Bank, name: Annotated[Positional[str], arg(metavar="ID", help="an edit")], json: Json = False) -> None:
    """Show one edit: what was asked, the evidence, and what happened to it since."""
    from tpatch_jax.cli import bank as bank_command

    bank_command.show(bank, name, json=json)


def log(bank: Bank, json: Json = False) -> None:
    """Show the journal: what was done, when, and by whom."""
    from tpatch_jax.cli import bank as bank_command

    bank_command.log(bank, json=json)


def verify(bank: Bank, model: Where = None, json: Json = False, quiet: Quiet = False) -> None:
    """Read every active edit's prompt again and see whether its target comes out."""
    from tpatch_jax.cli import bank as bank_command

    bank_command.verify(bank, model=model, json=json, quiet=quiet)


def guard(
    bank: Bank,
    *,
    prompt: Annotated[Texts, arg(metavar="TEXT", help="a prompt that must keep its answer; may be repeated")] = (),
    answer: Annotated[str | None, arg(help="of a single prompt; by default what the model says now")] = None,
    file: Annotated[str | None, arg(metavar="FILE", help="JSON lines of prompts and targets to keep")] = None,
    tokens: Annotated[int, arg(help="so many tokens of what the model says are kept")] = 5,
    lift: Annotated[Texts, arg(metavar="TEXT", help="a prompt to guard no longer; may be repeated")] = (),
    model: Where = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Have the bank keep answers: `add` leaves out what would change one. Without options, list them."""
    from tpatch_jax.cli import bank as bank_command

    bank_command.guard(
        bank, prompts=prompt, answer=answer, file=file, tokens=tokens, lift=lift, model=model, json=json, quiet=quiet
    )


def merge(
    bank: Bank,
    output: Annotated[str, arg(aliases=["-o"], metavar="OUT", help="folder for the model")],
    model: Where = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the model with all active edits inside its feed-forward networks."""
    from tpatch_jax.cli import bank as bank_command

    bank_command.merge(bank, output, model=model, json=json, quiet=quiet)


def diff(
    left: Annotated[Positional[str], arg(metavar="A", help="a bank")],
    right: Annotated[Positional[str], arg(metavar="B", help="another")],
    json: Json = False,
) -> None:
    """Compare what two banks hold."""
    from tpatch_jax.cli import bank as bank_command

    bank_command.diff(left, right, json=json)


def pull(
    bank: Bank,
    source: Annotated[Positional[str], arg(metavar="SOURCE", help="a bank's folder, or hf://owner/name")],
    json: Json = False,
) -> None:
    """Bring the bank up to date from another copy of it, or make it."""
    from tpatch_jax.cli import bank as bank_command

    bank_command.pull(bank, source, json=json)


def push(
    bank: Bank,
    target: Annotated[Positional[str], arg(metavar="TARGET", help="a folder, or hf://owner/name")],
    json: Json = False,
) -> None:
    """Bring another copy of the bank up to date, or make it."""
    from tpatch_jax.cli import bank as bank_command

    bank_command.push(bank, target, json=json)


def repair(bank: Bank, json: Json = False) -> None:
    """Mend damaged files from their second copy; what was damaged is kept aside."""
    from tpatch_jax.cli import bank as bank_command

    bank_command.repair(bank, json=json)


BANK_COMMANDS: dict[str, Callable[..., Any]] = {
    "add": add,
    "diff": diff,
    "disable": disable,
    "enable": enable,
    "guard": guard,
    "init": init,
    "list": list_edits,
    "log": log,
    "merge": merge,
    "pull": pull,
    "push": push,
    "remove": remove,
    "repair": repair,
    "show": show,
    "verify": verify,
}
