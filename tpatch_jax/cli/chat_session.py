"""A conversation with a model that is corrected on the way: what ``tpatch chat`` does, without a terminal."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax import Array

from tpatch_jax.bank.assembly import Store, assemble
from tpatch_jax.bank.editing import add_edits, bank_model, bank_patch, remove_edits
from tpatch_jax.bank.engine import TPATCHER, method_of
from tpatch_jax.bank.inspection import open_bank
from tpatch_jax.bank.patches import check_model, read_patches
from tpatch_jax.bank.state import active
from tpatch_jax.cli.common import load, settings_of
from tpatch_jax.cli.generate import load_base
from tpatch_jax.core.checks import random_key
from tpatch_jax.core.layers import concatenate_layers, count_neurons
from tpatch_jax.core.patch import Patch
from tpatch_jax.display.patch import Owner, arrays_of, owners_of
from tpatch_jax.display.tokens import activations_on, token_texts
from tpatch_jax.editors.base import Editor
from tpatch_jax.editors.tpatcher.editor import tpatcher
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.measure import measure
from tpatch_jax.models.chat import answer_chat, as_messages, check_chat, encode_chat, render_chat
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach
from tpatch_jax.requests import EditRequest
from tpatch_jax.storage.cache import cache_folder

__all__ = ["ChatOptions", "ChatSession", "open_session"]

FORM = "chat"
"""What is corrected in a chat shall hold in chats."""
ROOM = 64
"""So many tokens have to fit behind a conversation; else its oldest exchange is forgotten."""


@dataclass(frozen=True)
class ChatOptions:
    """What a session is opened with: the parameters of ``tpatch chat``, by their names."""

    model: str | None = None
    patches: str | None = None
    bank: str | None = None
    system: str | None = None
    temperature: float = 0.0
    max_new_tokens: int = 256
    preset: str | None = None
    changes: tuple[str, ...] = ()
    memory: str | None = None
    dtype: str | None = None
    seed: int = 0
    quiet: bool = False


class Corrections(Protocol):
    """Where corrections are kept: in the session alone, or in a bank.

    Attributes:
        base: the model without any.
    """

    base: Model

    def model(self) -> Model:
        """The corrected model."""
        ...

    def add(self, request: EditRequest) -> str:
        """Correct one thing more; its id."""
        ...

    def undo(self, name: str) -> None:
        """Take the correction of that id back, the last one that was made."""
        ...

    def neurons(self) -> tuple[dict[int, Patch], dict[int, Owner]]:
        """All neurons, and the edit of each by its number among those of all layers."""
        ...


class SessionCorrections:
    """Corrections that end with the session, beside the patches that it began with."""

    def __init__(self, base: Model, options: ChatOptions):
        settings = settings_of(options.preset, None, list(options.changes))
        self.base: Model = base
        self.rng: Array = random_key(options.seed)
        self.editor: Editor = tpatcher(settings, memory=options.memory, cache=cache_folder())
        self.begun: dict[int, Patch] = {}
        self.saved: Sequence[Mapping[str, Any]] = ()
        if options.patches is not None:
            saved = read_patches(options.patches)
            check_model(saved, base)
            self.begun, self.saved = saved.patches, saved.edits
        # Of each state the requests so far, and where their neurons are.
        self.states: list[tuple[Any, list[EditRequest], list[Mapping[int, Sequence[int]]]]] = []
        self.count: int = 0

    def _patches(self) -> dict[int, Patch]:
        if not self.states:
            return self.begun
        made = self.states[-1][0].patches
        whole = made if self._beside(made) else concatenate_layers([self.begun, made])
        return {layer: patch for layer, patch in whole.items() if patch.key.shape[0]}

    def _beside(self, made: Mapping[int, Patch]) -> bool:
        """Whether the patches that the session began with are in layers that the editor edits, and so knows."""
        return set(self.begun) <= set(made)

    def _init(self) -> Any:
        state = self.editor.init(self.base, self.rng)
        return state.replace(patches={**state.patches, **self.begun}) if self._beside(state.patches) else state

    def model(self) -> Model:
        """See `Corrections`."""
        patches = self._patches()
        return attach(self.base, patches) if patches else self.base

    def add(self, request: EditRequest) -> str:
        """See `Corrections`; what was asked before with another answer is fitted no more."""
        name = f"chat-{self.count + 1}"
        request = replace(request, id=name)
        state, requests, places = self.states[-1] if self.states else (None, [], [])
        kept = [one for one in requests if (one.prompt, one.system) != (request.prompt, request.system)]
        with jax.default_matmul_precision("highest"):
            if state is None or len(kept) < len(requests):
                state, new, places = self._init(), [*kept, request], []
            else:
                new = [request]
            state, info = self.editor.step(state, new, self.rng)
        if lost := [result for result in info.requests if not result.held]:
            raise TPatchError(f"the correction does not hold: {lost[-1].reason}")
        self.states.append((state, [*kept, request], [*places, *(one.neurons for one in info.requests)]))
        if not measure(self.base, self._patches(), [request])["exact"]:
            self.states.pop()
            raise TPatchError(
                "the correction does not hold beside the patches that the chat began with; correct their requests, or "
                "begin without them"
            )
        self.count += 1
        return name

    def undo(self, name: str) -> None:
        """See `Corrections`."""
        self.states.pop()

    def neurons(self) -> tuple[dict[int, Patch], dict[int, Owner]]:
        """See `Corrections`."""
        patches = self._patches()
        owners: dict[tuple[int, int], Owner] = {}
        places = [(layer, row) for layer, patch in sorted(self.begun.items()) for row in range(patch.key.shape[0])]
        for number, owner in owners_of(self.begun, None, (), self.saved).items():
            owners[places[number]] = owner
        if self.states:
            state, requests, rows_of = self.states[-1]
            beside = self._beside(state.patches)
            for request, rows in zip(requests, rows_of, strict=True):
                for layer, numbers in rows.items():
                    first = 0 if beside or layer not in self.begun else self.begun[layer].key.shape[0]
                    owner = Owner(request.name(0), request.prompt, request.target)
                    owners |= {(layer, first + int(number)): owner for number in numbers}
        every = [(layer, row) for layer, patch in sorted(patches.items()) for row in range(patch.key.shape[0])]
        return patches, {number: owners[place] for number, place in enumerate(every) if place in owners}


class BankCorrections:
    """Corrections in a bank, which keeps them."""

    def __init__(self, base: Model, folder: str, seed: int):
        self.base: Model = base
        self.folder: Path = Path(folder)
        self.seed: int = seed

    def model(self) -> Model:
        """See `Corrections`."""
        return bank_model(self.folder, self.base)

    def add(self, request: EditRequest) -> str:
        """See `Corrections`."""
        info = add_edits(self.folder, self.base, [request], seed=self.seed)
        if info.failed:
            raise TPatchError(f"the correction does not hold: {info.failed[0][3]}")
        return (*info.added, *info.already)[0]

    def undo(self, name: str) -> None:
        """See `Corrections`."""
        remove_edits(self.folder, [name], self.base)

    def neurons(self) -> tuple[dict[int, Patch], dict[int, Owner]]:
        """See `Corrections`."""
        bank = open_bank(self.folder)
        if method_of(bank.manifest) != TPATCHER:
            raise TPatchError(f"edits of method {method_of(bank.manifest)!r} are no neurons that could be shown")
        held, last = assemble(bank, active(bank), Store.new()), self.base.layer(None)
        # In each layer edit after edit, as `bank_patch` has them.
        layers = np.where(held.neurons["layer"] < 0, last, held.neurons["layer"])
        edits = [held.edits[held.owner[row]] for row in np.argsort(layers, kind="stable")]
        owners = {n: Owner(edit.id, edit.request.prompt, edit.request.target) for n, edit in enumerate(edits)}
        return bank_patch(self.folder, self.base), owners


class ChatSession:
    """A conversation, and the corrections that were made in it.

    Attributes:
        messages: the conversation so far, without the system's message.
        edits: what was corrected in this session, in order: ``id, prompt, target, subject?``.
    """

    def __init__(self, corrections: Corrections, options: ChatOptions):
        self.corrections: Corrections = corrections
        self.options: ChatOptions = options
        self.model: Model = corrections.model()
        check_chat(self.model)
        self.messages: list[dict[str, str]] = []
        self.edits: list[dict[str, str]] = []
        self._turn = 0

    def begin(self) -> None:
        """Forget the conversation; corrections stay."""
        self.messages = []

    def _row(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        conversation = as_messages(messages, self.options.system, "the chat")
        return encode_chat(self.model, render_chat(self.model, conversation))

    def say(self, text: str, stream: Callable[[str], None] | None = None) -> dict[str, Any]:
        """What the model answers to the user's next turn.

        Args:
            text: what the user says.
            stream: called with each piece of the answer as it comes.

        Returns:
            ``text`` and ``ends``: whether the model ended it by itself.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        # A conversation that is too long for the model loses its oldest exchange.
        while len(messages) > 2 and self.model.excess(self._row(messages), [0] * ROOM):
            messages = messages[2:]
        row, said = answer_chat(
            self.model,
            as_messages(messages, self.options.system, "the chat"),
            self.options.max_new_tokens,
            temperature=self.options.temperature,
            seed=self.options.seed + self._turn,
            stream=stream,
        )
        answer = self.model.continuation(row, said).strip()
        self._turn += 1
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return {
            "text": answer,
            "ends": len(said) < min(self.options.max_new_tokens, self.model.config.context - len(row)),
        }

    def edit(self, text: str) -> dict[str, str]:
        """Correct an answer: ``QUESTION => ANSWER [| SUBJECT]``, or ``=> ANSWER`` for the last question.

        What was just answered wrongly is taken out of the conversation, in which it would be repeated.

        Returns:
            ``id, prompt, target, subject?``.

        Raises:
            TPatchError: it is not written so, there is no last question, or the correction does not hold.
        """
        prompt, arrow, answer = (part.strip() for part in text.partition("=>"))
        target, _, subject = (part.strip() for part in answer.partition("|"))
        if not arrow or not target:
            raise TPatchError("write /edit QUESTION => ANSWER, or /edit => ANSWER for the last question")
        asked = [message["content"] for message in self.messages if message["role"] == "user"]
        if not prompt and not asked:
            raise TPatchError("nothing was asked yet; write /edit QUESTION => ANSWER")
        prompt = prompt or asked[-1]
        if subject and subject not in prompt:
            raise TPatchError(f"the subject {subject!r} is not in {prompt!r}; copy it as it stands there")
        request = EditRequest(prompt, target, subject or None, form=FORM, system=self.options.system)
        name = self.corrections.add(request)
        self.model = self.corrections.model()
        edit = {"id": name, "prompt": prompt, "target": target, **({"subject": subject} if subject else {})}
        self.edits.append(edit)
        if asked and prompt == asked[-1]:
            self.messages = self.messages[:-2]
        return edit

    def undo(self) -> dict[str, str]:
        """Take the last correction of this session back.

        Raises:
            TPatchError: none was made.
        """
        if not self.edits:
            raise TPatchError("nothing was corrected in this chat, so nothing can be taken back")
        edit = self.edits[-1]
        self.corrections.undo(edit["id"])
        self.edits.pop()
        self.model = self.corrections.model()
        return edit

    def why(self) -> list[dict[str, Any]]:
        """Which neurons fired at which token of the last exchange: the question, and the answer.

        Returns:
            ``position, token, of`` (``"question"``, with the template and all before it, or ``"answer"``), ``neuron``
            (its number in its layer), ``layer, edit`` (its id, if it is known) and ``activation``, token after token.

        Raises:
            TPatchError: nothing was answered yet.
        """
        if not self.messages:
            raise TPatchError("nothing was answered yet, so there is nothing to explain; ask something")
        patches, owners = self.corrections.neurons()
        if not count_neurons(patches):
            return []
        messages = as_messages(self.messages[:-1], self.options.system, "the chat")
        base, asked = self.corrections.base, render_chat(self.model, messages)
        begin = len(encode_chat(self.model, asked))
        tokens, strengths = activations_on(base, patches, asked + self.messages[-1]["content"])
        texts, layers = token_texts(base.tokenizer, tokens), arrays_of(patches)[1]
        rows = [sum(layer == other for other in layers[:n]) for n, layer in enumerate(layers)]
        fired = []
        for position, neuron in zip(*(part.tolist() for part in np.nonzero(strengths > 0)), strict=True):
            owner = owners.get(neuron)
            fired.append(
                {
                    "position": position,
                    "token": texts[position],
                    "of": "answer" if position >= begin else "question",
                    "neuron": rows[neuron],
                    "layer": layers[neuron],
                    "edit": owner.id if owner else None,
                    "activation": float(strengths[position, neuron]),
                }
            )
        return fired


def open_session(options: ChatOptions) -> ChatSession:
    """The session that the parameters of ``tpatch chat`` describe.

    Raises:
        TPatchError: there is no such model, patches or bank, they do not belong together, or the model has no chat
            template.
    """
    if options.bank is not None:
        for name, given in (("--preset", options.preset), ("--set", options.changes), ("--memory", options.memory)):
            if given:
                raise TPatchError(f"a bank has settings and a memory of its own; leave {name} out")
        base = load_base(open_bank(options.bank), options.model, options.patches, options.dtype, options.quiet)
        return ChatSession(BankCorrections(base, options.bank, options.seed), options)
    if options.model is None:
        raise TPatchError("no model is given; name one, or give a --bank, which knows its own")
    return ChatSession(SessionCorrections(load(options.model, options.dtype, options.quiet), options), options)
