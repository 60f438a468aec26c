"""``tpatch chat``: talk to a model in its own chat template, and correct it on the way."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from tpatch_jax.cli.common import Dtype, Json, MemoryText, Preset, Quiet, Set, System, settings_from
from tpatch_jax.display.console import print_json
from tpatch_jax.errors import TPatchError

if TYPE_CHECKING:
    from tpatch_jax.cli.chat_session import ChatSession

__all__ = ["Chat"]

HELP = """\
/edit QUESTION => ANSWER [| SUBJECT]   correct what is answered to a question; without QUESTION, the last one
/undo                                  take the last correction back
/why                                   which neurons fired at which token of the last exchange
/new                                   begin another conversation
/help                                  this
/quit                                  end"""


@dataclass(frozen=True)
class Chat:
    """Talk to a model, with its corrections, in a terminal; /edit corrects it, /help lists the rest."""

    model: Annotated[
        Positional[str | None],
        arg(metavar="MODEL", help="a name from `tpatch models`, a folder, or a hub id; by default that of --bank"),
    ] = None
    _: KW_ONLY
    patches: Annotated[str | None, arg(help="patches to attach; what is corrected in the chat is not kept there")] = (
        None
    )
    bank: Annotated[str | None, arg(metavar="BANK", help="a bank: its edits are active, /edit adds to it")] = None
    system: System = None
    temperature: Annotated[float, arg(help="0 says the most probable, more draws tokens")] = 0.0
    max_new_tokens: Annotated[int, arg(help="at most so many tokens an answer")] = 256
    preset: Preset = None
    changes: Set = ()
    memory: MemoryText = None
    dtype: Dtype = None
    seed: Annotated[int, arg(help="the same seed draws the same answers")] = 0
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Answer line after line until /quit or the end of the input."""
        from tpatch_jax.cli.chat_session import ChatOptions, open_session

        if self.max_new_tokens < 1:
            raise TPatchError(f"--max-new-tokens {self.max_new_tokens} says nothing; give 1 or more")
        session = open_session(replace(settings_from(ChatOptions, self), quiet=self.quiet or self.json))
        failed, events, typed = 0, [], sys.stdin.isatty()
        for line in _lines(typed, self.json):
            text = line.strip()
            if not text:
                continue
            if text == "/quit":
                break
            try:
                event = self._answer(session, text)
            except TPatchError as error:
                failed += 1
                event = {"line": text, "error": str(error)}
                sys.stderr.write(f"tpatch: {error}\n")
            events.append(event)
        if self.json:
            print_json({"events": events, "messages": session.messages, "edits": session.edits, "failed": failed})
        if failed and not typed:
            raise TPatchError(f"{failed} of {len(events)} lines could not be done; see above")

    def _answer(self, session: "ChatSession", text: str) -> dict[str, Any]:
        """What comes of one line, shown, and as ``--json`` has it."""
        command, _, rest = text.partition(" ")
        show = not self.json
        if command == "/help":
            self._print(HELP)
            return {"line": text}
        if command == "/new":
            session.begin()
            self._print("a new conversation")
            return {"line": text}
        if command == "/edit":
            edit = session.edit(rest)
            self._print(f"corrected ({edit['id']}): {edit['prompt']} => {edit['target']}")
            return {"line": text, "edit": edit}
        if command == "/undo":
            edit = session.undo()
            self._print(f"taken back ({edit['id']}): {edit['prompt']} => {edit['target']}")
            return {"line": text, "undone": edit}
        if command == "/why":
            fired = session.why()
            for one in fired:
                self._print(
                    f"{one['activation']:8.3g}  {one['token']!r} (token {one['position']} of the {one['of']}): neuron "
                    f"{one['neuron']} in layer {one['layer']}" + (f", {one['edit']}" if one["edit"] else "")
                )
            if not fired:
                self._print("no neuron fired: this is what the unedited model says")
            return {"line": text, "fired": fired}
        if text.startswith("/"):
            raise TPatchError(f"there is no command {command!r}; /help lists them")
        answer = session.say(text, _write if show else None)
        if show:
            sys.stdout.write("\n")
        return {"line": text, "answer": answer["text"], "ends": answer["ends"]}

    def _print(self, text: str) -> None:
        if not self.json:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _lines(typed: bool, quiet: bool) -> Iterator[str]:
    """What is typed or piped in, line by line."""
    if not typed:
        # A loop of its own: `yield from` would close what is read at the end.
        for line in sys.stdin:  # noqa: UP028
            yield line
        return
    with contextlib.suppress(ImportError):  # not on Windows
        importlib.import_module("readline")  # gives `input` arrow keys and a history
    while True:
        try:
            yield input("" if quiet else "> ")
        except EOFError:
            return
