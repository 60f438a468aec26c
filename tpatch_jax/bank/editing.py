"""A bank and its model: adding, taking out, verifying, guarding, and the patch that it amounts to."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tpatch_jax.bank.adding import AddInfo, add_with
from tpatch_jax.bank.assembly import Store, assemble
from tpatch_jax.bank.changing import ChangeInfo, change_with, guard_with
from tpatch_jax.bank.creating import check_model
from tpatch_jax.bank.engine import TPATCHER, create_engine, method_of
from tpatch_jax.bank.inspection import open_bank
from tpatch_jax.bank.layout import MEMORY
from tpatch_jax.bank.method import Engine
from tpatch_jax.bank.state import Bank, Guard, active
from tpatch_jax.bank.tpatcher_engine import patches_of
from tpatch_jax.core.devices import with_automatic_axes
from tpatch_jax.core.patch import Patch
from tpatch_jax.editors.reading import read_request
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import generation
from tpatch_jax.models.model import Model
from tpatch_jax.requests import EditRequest, as_requests, join_target
from tpatch_jax.storage.cache import cache_folder
from tpatch_jax.typing import Progress

__all__ = [
    "VerifyInfo",
    "add_edits",
    "bank_model",
    "bank_patch",
    "disable_edits",
    "enable_edits",
    "guard_bank",
    "remove_edits",
    "verify_bank",
]


class VerifyInfo(NamedTuple):
    """What a model with a bank's patch says.

    Attributes:
        broken: ids of active edits whose target does not come out.
        checked: how many active edits there are.
        guards_broken: guarded prompts whose answers do not come out.
        guards: how many there are.
    """

    broken: tuple[str, ...]
    checked: int
    guards_broken: tuple[str, ...]
    guards: int


def _engine(model: Model, seed: int, progress: Progress | None, bank: Bank) -> Engine:
    check_model(bank, model)
    memory = bank.folder / MEMORY if bank.manifest.get("memory") else None
    return create_engine(model, bank.manifest, memory=memory, cache=cache_folder(), seed=seed, progress=progress)


@with_automatic_axes
def add_edits(
    folder: str | Path,
    model: Model,
    requests: Sequence[EditRequest | Mapping[str, Any]],
    *,
    batch: int = 50,
    resume: bool = False,
    force: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> AddInfo:
    """Fit requests beside what is active in a bank, check them and everything else, and commit batch after batch.

    A request with the prompt of an active edit, as the tokenizer reads it, and another target supersedes it. Earlier
    edits that a newcomer breaks are fitted again with it. What fails, or would change a guarded answer, is left out and
    reported. After a crash the batches that were committed are there, whole, and the others are not.

    Args:
        folder: the bank.
        model: the model that it is for.
        requests: what to correct, in order.
        batch: so many requests are fitted together and committed at once.
        resume: pass over the requests that the bank already holds, so that an interrupted run goes on.
        force: whether guarded answers may change.
        seed: the same seed gives the same patches on one machine.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        What became of each request: an `AddInfo`.

    Raises:
        TPatchError: the bank is damaged, another process is writing it, the model is not its own, an id is taken, or
            the disk is full; what was committed before stays.

    Example:
        >>> info = add_edits("banks/facts", model, [EditRequest("The capital of France is", "Lyon")])  # doctest: +SKIP
        >>> info.added  # doctest: +SKIP
        ('edit-1',)
    """
    wanted = as_requests([one if isinstance(one, EditRequest) else dict(one) for one in requests])
    engine = partial(_engine, model, seed, progress)
    return add_with(
        Path(folder),
        wanted,
        engine,
        reads=partial(read_request, model),
        batch=batch,
        resume=resume,
        force=force,
        seed=seed,
        progress=progress,
    )


@with_automatic_axes
def _change(
    folder: str | Path, kind: str, ids: Sequence[str], model: Model | None, progress: Progress | None
) -> ChangeInfo:
    engine = None if model is None else partial(_engine, model, 0, progress)
    return change_with(Path(folder), kind, [ids] if isinstance(ids, str) else ids, engine)


def disable_edits(
    folder: str | Path, ids: Sequence[str], model: Model | None = None, *, progress: Progress | None = None
) -> ChangeInfo:
    """Leave edits out for a while; `enable_edits` brings the very same neurons back.

    An edit that they superseded comes back meanwhile. With a model, other edits that no longer come out without them
    are fitted again.

    Args:
        folder: the bank.
        ids: which edits.
        model: the bank's model; without it nothing is checked.
        progress: called with what is being done, how much is done, and how much there is.

    Raises:
        TPatchError: there is no such edit, or it was removed; or as `add_edits`.

    Example:
        >>> disable_edits("banks/facts", ["lyon"]).states  # doctest: +SKIP
        {'lyon': 'disabled'}
    """
    return _change(folder, "disable", ids, model, progress)


def enable_edits(
    folder: str | Path, ids: Sequence[str], model: Model | None = None, *, progress: Progress | None = None
) -> ChangeInfo:
    """Bring disabled edits back, and with a model fit again what does not come out beside everything else.

    With a model, nothing is enabled if a guarded answer would change.

    Args:
        folder: the bank.
        ids: which edits.
        model: the bank's model; without it nothing is checked.
        progress: called with what is being done, how much is done, and how much there is.

    Raises:
        TPatchError: there is no such edit, or it was removed, or a guarded answer would change; or as `add_edits`.

    Example:
        >>> enable_edits("banks/facts", ["lyon"]).states  # doctest: +SKIP
        {'lyon': 'active'}
    """
    return _change(folder, "enable", ids, model, progress)


def remove_edits(
    folder: str | Path, ids: Sequence[str], model: Model | None = None, *, progress: Progress | None = None
) -> ChangeInfo:
    """Take edits out for good; the journal keeps that they were there.

    What only they superseded is active again. If nothing was added after them (all edits of the last batch are
    removed), neurons and thresholds are, bit for bit, those of a bank that never held them. Otherwise the other edits
    keep the neurons that they were fitted with, and with a model those that no longer come out are fitted again.

    Args:
        folder: the bank.
        ids: which edits.
        model: the bank's model; without it nothing is checked.
        progress: called with what is being done, how much is done, and how much there is.

    Raises:
        TPatchError: there is no such edit, or it was removed before; or as `add_edits`.

    Example:
        >>> remove_edits("banks/facts", ["lyon"]).states  # doctest: +SKIP
        {'lyon': 'removed'}
    """
    return _change(folder, "remove", ids, model, progress)


@with_automatic_axes
def bank_patch(folder: str | Path, model: Model) -> dict[int, Patch]:
    """The neurons of a bank's active edits: what `tpatch_jax.merge` or `tpatch_jax.attach` puts into the model.

    Args:
        folder: the bank.
        model: the model that it is for.

    Returns:
        The patches, ``{layer: [n, d]}``, in each edit after edit.

    Raises:
        TPatchError: the bank is damaged, the model is not its own, or its edits are no neurons.

    Example:
        >>> corrected = tp.merge(model, bank_patch("banks/facts", model))  # doctest: +SKIP
    """
    bank = open_bank(folder)
    check_model(bank, model)
    if method_of(bank.manifest) != TPATCHER:
        raise TPatchError(
            f"edits of method {method_of(bank.manifest)!r} are no neurons that could be merged; get the corrected "
            "model with tp.bank_model"
        )
    neurons = assemble(bank, active(bank), Store.new()).neurons
    return jax.tree.map(jnp.asarray, patches_of(neurons, model.layer(None)))


@with_automatic_axes
def bank_model(folder: str | Path, model: Model) -> Model:
    """The model with a bank's active edits attached, whatever method they were made with.

    Args:
        folder: the bank.
        model: the model that it is for; not changed.

    Raises:
        TPatchError: the bank is damaged, or the model is not its own.

    Example:
        >>> bank_model("banks/facts", model).generate("The capital of France is", 1)  # doctest: +SKIP
        ' Lyon'
    """
    bank = open_bank(folder)
    return _engine(model, 0, None, bank).model(assemble(bank, active(bank), Store.new()))


@with_automatic_axes
def verify_bank(folder: str | Path, model: Model, *, progress: Progress | None = None) -> VerifyInfo:
    """Read every active edit's prompt again and see whether its target comes out of greedy decoding.

    Args:
        folder: the bank.
        model: the model that it is for.
        progress: called with what is being done, how much is done, and how much there is.

    Raises:
        TPatchError: the bank is damaged, or the model is not its own.

    Example:
        >>> verify_bank("banks/facts", model)  # doctest: +SKIP
        VerifyInfo(broken=(), checked=12, guards_broken=(), guards=0)
    """
    bank = open_bank(folder)
    engine = _engine(model, 0, progress, bank)
    held = assemble(bank, active(bank), Store.new())
    lost = engine.guards_broken(held, bank.guards)
    return VerifyInfo(
        tuple(engine.verify(held)), len(held.edits), tuple(guard.prompt for guard in lost), len(bank.guards)
    )


@with_automatic_axes
def guard_bank(
    folder: str | Path,
    model: Model | None,
    prompts: Sequence[str | tuple[str, str]] = (),
    *,
    tokens: int = 5,
    lift: Sequence[str] = (),
) -> tuple[Guard, ...]:
    """Have a bank keep the answers to some prompts: `add_edits` leaves out what would change one.

    Args:
        folder: the bank.
        model: the model that it is for; only needed where there are new prompts.
        prompts: each a prompt, whose answer is what the model says with the bank's patch now, or prompt and answer.
        tokens: how many tokens of what the model says are kept.
        lift: guarded prompts to give up.

    Returns:
        All guards of the bank.

    Raises:
        TPatchError: an answer is not what comes out, a prompt is not guarded; or as `add_edits`.

    Example:
        >>> guard_bank("banks/facts", model, ["The capital of Italy is"], tokens=1)  # doctest: +SKIP
        (Guard(prompt='The capital of Italy is', answer=' Rome'),)
    """
    if not prompts:
        return guard_with(Path(folder), (), lift).guards if lift else open_bank(folder).guards
    if model is None:
        raise TPatchError("what a prompt's answer is takes the model to find out; give the bank's model")
    bank = open_bank(folder)
    engine = _engine(model, 0, None, bank)
    held = assemble(bank, active(bank), Store.new())
    guards = []
    for entry in prompts:
        if isinstance(entry, str):
            prompt, answer = entry, _answer(engine.model(held), entry, tokens)
        else:
            prompt, answer = entry[0], join_target(*entry)
        if reason := engine.problems([EditRequest(prompt, answer)]).get(0):
            raise TPatchError(f"cannot guard {prompt!r}: {reason}")
        guards.append(Guard(prompt, answer))
    if lost := engine.guards_broken(held, guards):
        raise TPatchError(
            f"the answer {lost[0].answer!r} does not come out after {lost[0].prompt!r}; give the one that does"
        )
    return guard_with(Path(folder), guards, lift).guards


def _answer(edited: Model, prompt: str, tokens: int) -> str:
    if not prompt.strip():
        raise TPatchError("a guarded prompt is empty; write the text whose answer must stay")
    if edited.config.labels:
        return edited.classify([prompt])[0]
    read = edited.encode_prompt(prompt)
    said = generation.greedy(edited.config, edited.params, [read], tokens, edited.stops)[0]
    if not edited.decode(said).strip():
        raise TPatchError(f"the model says nothing that can be read after {prompt!r}; guard another prompt")
    # The answer has to be the same tokens when it is read again behind the prompt.
    while said and edited.encode_target(prompt, edited.continuation(read, said))[: len(said)] != list(said):
        said = said[:-1]
    return edited.continuation(read, said)
