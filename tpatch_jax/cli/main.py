"""The ``tpatch`` command: which commands there are, and what becomes of errors."""

import os
import sys
from collections.abc import Mapping
from typing import Any

import tyro
from tyro.conf import FlagCreatePairsOff

from tpatch_jax.cli.bank.add import Add
from tpatch_jax.cli.bank.diff import Diff
from tpatch_jax.cli.bank.disable import Disable
from tpatch_jax.cli.bank.enable import Enable
from tpatch_jax.cli.bank.export import ExportBank
from tpatch_jax.cli.bank.group import Bank
from tpatch_jax.cli.bank.guard import Guard
from tpatch_jax.cli.bank.init import Init
from tpatch_jax.cli.bank.list import List
from tpatch_jax.cli.bank.log import Log
from tpatch_jax.cli.bank.merge import MergeBank
from tpatch_jax.cli.bank.pull import Pull
from tpatch_jax.cli.bank.push import Push
from tpatch_jax.cli.bank.remove import Remove
from tpatch_jax.cli.bank.repair import Repair
from tpatch_jax.cli.bank.show import Show
from tpatch_jax.cli.bank.verify import Verify
from tpatch_jax.cli.bench import Bench
from tpatch_jax.cli.chat import Chat
from tpatch_jax.cli.classify import Classify
from tpatch_jax.cli.common import Command
from tpatch_jax.cli.compare import Compare
from tpatch_jax.cli.demo import Demo
from tpatch_jax.cli.edit import Edit
from tpatch_jax.cli.eval import Eval
from tpatch_jax.cli.export import Export
from tpatch_jax.cli.finetune import Finetune
from tpatch_jax.cli.generate import Generate
from tpatch_jax.cli.inspect import Inspect
from tpatch_jax.cli.learn import Learn
from tpatch_jax.cli.merge import Merge
from tpatch_jax.cli.models import Models
from tpatch_jax.cli.prune import Prune
from tpatch_jax.cli.report import Report
from tpatch_jax.cli.rivals import Rivals
from tpatch_jax.cli.serac_train import SeracTrain
from tpatch_jax.cli.sweep import Sweep
from tpatch_jax.cli.transcribe import Transcribe
from tpatch_jax.cli.verify import VerifyPatches
from tpatch_jax.errors import TPatchError

__all__ = ["BANK_COMMANDS", "COMMANDS", "main"]

COMMANDS: Mapping[str, type[Command]] = {
    "bank": Bank,
    "bench": Bench,
    "chat": Chat,
    "classify": Classify,
    "compare": Compare,
    "demo": Demo,
    "edit": Edit,
    "eval": Eval,
    "export": Export,
    "finetune": Finetune,
    "generate": Generate,
    "inspect": Inspect,
    "merge": Merge,
    "models": Models,
    "prune": Prune,
    "report": Report,
    "learn": Learn,
    "rivals": Rivals,
    "serac-train": SeracTrain,
    "sweep": Sweep,
    "transcribe": Transcribe,
    "verify": VerifyPatches,
}
BANK_COMMANDS: Mapping[str, type[Command]] = {
    "add": Add,
    "diff": Diff,
    "disable": Disable,
    "enable": Enable,
    "export": ExportBank,
    "guard": Guard,
    "init": Init,
    "list": List,
    "log": Log,
    "merge": MergeBank,
    "pull": Pull,
    "push": Push,
    "remove": Remove,
    "repair": Repair,
    "show": Show,
    "verify": Verify,
}
ABOUT = "Correct what a trained transformer says, one neuron per mistake."
ABOUT_BANKS = "Patches that last: one folder, a journal, undo."


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
    try:
        if arguments[:1] == ["bank"]:
            command = _parse(BANK_COMMANDS, "tpatch bank", ABOUT_BANKS, arguments[1:])
        else:
            command = _parse(COMMANDS, "tpatch", ABOUT, arguments)
        command.run()
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


def _parse(commands: Mapping[str, Any], prog: str, description: str, arguments: list[str]) -> Command:
    return tyro.extras.subcommand_cli_from_dict(
        dict(commands), prog=prog, description=description, args=arguments, config=(FlagCreatePairsOff,)
    )


if __name__ == "__main__":
    sys.exit(main())
