"""A bank and its model: adding, taking out, verifying, guarding, and the patch that it amounts to."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tpatch_jax.bank.adding import AddInfo, add_with
from tpatch_jax.bank.assembly import Store, assemble
from tpatch_jax.bank.changing import ChangeInfo, change_with, guard_with
from tpatch_jax.bank.creating import check_model
from tpatch_jax.bank.engine import TPATCHER, create_engine, method_of
from tpatch_jax.bank.inspection import open_bank
from tpatch_jax.bank.layout import memory_name
from tpatch_jax.bank.method import Engine
from tpatch_jax.bank.state import Bank, Guard, active
from tpatch_jax.bank.tpatcher_engine import patches_of
from tpatch_jax.core.arguments import as_count, as_path, check_call, check_kind
from tpatch_jax.core.devices import automatically
from tpatch_jax.core.patch import Patch
from tpatch_jax.editors.reading import read_request
from tpatch_jax.embeddings import is_named
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.chat import render_requests
from tpatch_jax.models.model import Model, check_loaded
from tpatch_jax.models.sentences import SENTENCE_TOKENS, first_sentence, say, say_tokens
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


def _checked(folder: Any, model: Any, call: str) -> Path:
    """A bank's folder, if it is one that can be named, and the model beside it is loaded."""
    folder = as_path(folder, call, "the folder of a bank; give its path")
    check_loaded(model, call)
    return folder


def _guard_entries(prompts: Any) -> Sequence[str | tuple[str, str]]:
    """Prompts to guard, with their answers where these are given."""
    call = "guard_bank(folder, model, prompts)"
    if isinstance(prompts, Mapping):
        prompts = list(prompts.items())
    listed = [prompts] if isinstance(prompts, str) or not isinstance(prompts, Iterable) else list(prompts)
    for one in listed:
        pair = isinstance(one, tuple | list) and len(one) == 2 and all(isinstance(text, str) for text in one)
        if not pair:
            check_kind(one, str, call, "a prompt; give texts, or pairs of prompt and answer")
    return listed


def _engine(model: Model, seed: int, progress: Progress | None, bank: Bank) -> Engine:
    check_model(bank, model)
    memory = bank.folder / memory_name(bank.manifest) if bank.manifest.get("memory") else None
    return create_engine(model, bank.manifest, memory=memory, cache=cache_folder(), seed=seed, progress=progress)


@automatically
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
    folder = _checked(folder, model, "add_edits(folder, model, requests)")
    wanted = as_requests(requests)
    batch = as_count(batch, "batch")
    for name, value in (("resume", resume), ("force", force)):
        check_kind(value, bool, f"add_edits(…, {name}=…)", "True or False")
    check_call(progress=progress)
    render_requests(model, wanted)  # what cannot be asked in a chat says so before anything is fitted
    engine = partial(_engine, model, seed, progress)
    return add_with(
        folder,
        wanted,
        engine,
        reads=partial(_reads, model),
        batch=batch,
        resume=resume,
        force=force,
        seed=seed,
        progress=progress,
        say=lambda engine, held, asked: say(engine.model(held), [one.prompt for one in render_requests(model, asked)]),
    )


def _reads(model: Model, request: EditRequest) -> Any:
    """A request as the tokenizer reads it; of a picture or embeddings their name says what is read."""
    return None if is_named(request.prompt) else read_request(model, request)


@automatically
def _change(
    folder: str | Path, kind: str, ids: Sequence[str], model: Model | None, progress: Progress | None
) -> ChangeInfo:
    call = f"{kind}_edits(folder, ids, model)"
    folder = as_path(folder, call, "the folder of a bank; give its path")
    named: list[Any] = [ids] if isinstance(ids, str) or not isinstance(ids, Iterable) else list(ids)
    for one in named:
        check_kind(one, str, call, "the id of an edit; give a list of ids, which `open_bank(folder).edits` have")
    if model is not None:
        check_loaded(model, call)
    check_call(progress=progress)
    engine = None if model is None else partial(_engine, model, 0, progress)
    return change_with(folder, kind, named, engine)


@automatically
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


@automatically
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


@automatically
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


@automatically
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
    bank = open_bank(_checked(folder, model, "bank_patch(folder, model)"))
    check_model(bank, model)
    if method_of(bank.manifest) != TPATCHER:
        raise TPatchError(
            f"edits of method {method_of(bank.manifest)!r} are no neurons that could be merged; get the corrected "
            "model with tp.bank_model"
        )
    neurons = assemble(bank, active(bank), Store.new()).neurons
    return jax.device_put(patches_of(neurons, model.layer(None)))


@automatically
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
    bank = open_bank(_checked(folder, model, "bank_model(folder, model)"))
    return _engine(model, 0, None, bank).model(assemble(bank, active(bank), Store.new()))


@automatically
def verify_bank(folder: str | Path, model: Model, *, progress: Progress | None = None) -> VerifyInfo:
    """Read every active edit's prompt again and see whether its target comes out of greedy decoding.

    Of a picture, and of embeddings, a bank keeps what the edited layer sees of them, and that is looked at again.

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
    bank = open_bank(_checked(folder, model, "verify_bank(folder, model)"))
    engine = _engine(model, 0, progress, bank)
    held = assemble(bank, active(bank), Store.new())
    lost = engine.guards_broken(held, bank.guards)
    return VerifyInfo(
        tuple(engine.verify(held)), len(held.edits), tuple(guard.prompt for guard in lost), len(bank.guards)
    )


@automatically
def guard_bank(
    folder: str | Path,
    model: Model | None,
    prompts: Sequence[str | tuple[str, str]] = (),
    *,
    tokens: int = SENTENCE_TOKENS,
    lift: Sequence[str] = (),
) -> tuple[Guard, ...]:
    """Have a bank keep the answers to some prompts: `add_edits` leaves out what would change one.

    Args:
        folder: the bank.
        model: the model that it is for; only needed where there are new prompts.
        prompts: each a prompt, whose answer is what the model says with the bank's patch now, up to the end of the
            sentence, or prompt and answer.
        tokens: so many tokens of what the model says are kept at most.
        lift: guarded prompts to give up.

    Returns:
        All guards of the bank.

    Raises:
        TPatchError: an answer is not what comes out, a prompt is not guarded; or as `add_edits`.

    Example:
        >>> guard_bank("banks/facts", model, ["The capital of Italy is"])  # doctest: +SKIP
        (Guard(prompt='The capital of Italy is', answer=' Rome.'),)
    """
    folder = as_path(folder, "guard_bank(folder, model, prompts)", "the folder of a bank; give its path")
    prompts, lift = _guard_entries(prompts), [lift] if isinstance(lift, str) else lift
    for prompt in lift if isinstance(lift, Iterable) else [lift]:
        check_kind(prompt, str, "guard_bank(…, lift=…)", "a guarded prompt; give a list of texts")
    as_count(tokens, "tokens")
    if not prompts:
        return guard_with(Path(folder), (), lift).guards if lift else open_bank(folder).guards
    if model is None:
        raise TPatchError("what a prompt's answer is takes the model to find out; give the bank's model")
    check_loaded(model, "guard_bank(folder, model, prompts)")
    if model.config.image is not None or any(is_named(one if isinstance(one, str) else one[0]) for one in prompts):
        raise TPatchError(
            "a guard's answer is asked for again after each edit, and a bank keeps no picture or embeddings to ask "
            "about; give them as 'keep' of the requests instead"
        )
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
    (said,) = say_tokens(edited, [prompt], tokens)
    text = edited.continuation(edited.encode_prompt(prompt), said)
    # The token that ends the sentence may hold more than its end, and the last one a part of a character.
    answer = first_sentence(text).rstrip("\ufffd")
    if not answer.strip():
        raise TPatchError(f"the model says nothing that can be read after {prompt!r}; guard another prompt")
    return answer
