"""Training of SERAC's two networks, once, before any edit."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from tpatch_jax.core import ffn
from tpatch_jax.core.checks import check_positive, check_range
from tpatch_jax.editors.serac.editor import SeracSettings, SeracState, route, says
from tpatch_jax.editors.serac.examples import counterfactual_lessons, scope_lessons
from tpatch_jax.editors.serac.networks import (
    RADIUS,
    SeracNetworks,
    edit_text,
    embed,
    embeddings,
    read_encoder,
    shallow,
    write_networks,
)
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import networks
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.fingerprint import fingerprint
from tpatch_jax.models.model import Model
from tpatch_jax.requests import EditRequest, request_fields
from tpatch_jax.storage.files import check_vacant
from tpatch_jax.training.loop import FinetuneSettings, learn
from tpatch_jax.typing import Params, Progress

__all__ = ["SeracInfo", "SeracTraining", "counterfactual_loss", "scope_loss", "train_serac"]


HELD_OUT = 200


@dataclass(frozen=True)
class SeracTraining:
    """How SERAC's networks are trained.

    Attributes:
        layers: of the counterfactual model.
        scope_epochs: how often the scope classifier sees each request.
        counterfactual_epochs: how often the counterfactual model sees each request.
        batch_size: requests a step.
        scope_rate: the highest learning rate of the scope classifier.
        counterfactual_rate: that of the counterfactual model.
        seed: the same seed gives the same networks.

    Raises:
        TPatchError: a value makes no sense.
    """

    layers: int = 4
    scope_epochs: int = 2
    counterfactual_epochs: int = 7
    batch_size: int = 16
    scope_rate: float = 5e-5
    counterfactual_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values."""
        check_range(self, ("layers", "scope_epochs", "counterfactual_epochs", "batch_size"), 1)
        check_range(self, ("seed",), 0)
        check_positive(self, ("scope_rate", "counterfactual_rate"))


@dataclass(frozen=True)
class SeracInfo:
    """What `train_serac` did.

    Attributes:
        output: the folder of the networks.
        requests: how many they were trained on.
        held_out: how many they were measured on.
        scope_losses: of the scope classifier, the mean of each epoch's steps.
        counterfactual_losses: the same of the counterfactual model.
        in_scope: of the held-out rephrasings the share that counts as in the scope of its edit, all held-out
            edits stored.
        out_of_scope: of the held-out locality prompts the share that counts as in no scope.
        exact: of the held-out requests the share whose whole label the counterfactual model says, given the edit.
        parameters: of both networks, without those that are the base model's.
        seconds: the time of training, earlier runs included.
    """

    output: Path
    requests: int
    held_out: int
    scope_losses: tuple[float, ...]
    counterfactual_losses: tuple[float, ...]
    in_scope: float | None
    out_of_scope: float | None
    exact: float | None
    parameters: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {**dataclasses.asdict(self), "output": str(self.output), "seconds": round(self.seconds, 1)}


@lru_cache(maxsize=8)
def scope_loss(config: NetworkConfig) -> Callable[..., Array]:
    """Balanced binary cross-entropy of the scope classifier, the same object every time.

    With ``d = ‖e_edit − e_input‖²`` and ``sim = exp(−d)``: half the mean of ``−log sim = d`` over pairs in scope, plus
    half the mean of ``−log(1 − sim)`` over the inputs, each beside the nearest edit in whose scope it is not, for
    the nearest is the one that is asked.

    Args:
        config: the encoder's description.

    Returns:
        ``(params, tokens, relation) -> loss``; see `tpatch_jax.editors.serac.examples.ScopeLesson`.

    Source: Mitchell et al. 2022 (SERAC), section 3.
    """

    def loss_of(params: Params, tokens: Array, relation: Array) -> Array:
        embedded = embed(config, params, tokens)
        edits, inputs = embedded[: relation.shape[1]], embedded[relation.shape[1] :]
        far = 2 * RADIUS**2 - 2 * inputs @ edits.T
        inside, outside = (relation > 0).astype(far.dtype), relation < 0
        positive = jnp.sum(far * inside) / jnp.maximum(jnp.sum(inside), 1)
        nearest = jnp.min(jnp.where(outside, far, 4 * RADIUS**2), 1)
        counted = jnp.any(outside, 1).astype(far.dtype)
        negative = jnp.sum(-jnp.log(-jnp.expm1(-jnp.maximum(nearest, 1e-3))) * counted)
        negative /= jnp.maximum(jnp.sum(counted), 1)
        return 0.5 * (positive + negative)

    return loss_of


@lru_cache(maxsize=8)
def counterfactual_loss(config: NetworkConfig) -> Callable[..., Array]:
    """``−log p(answer | edit input, edit label, test input)``, mean over tokens, the same object every time.

    Args:
        config: the counterfactual model's description.

    Returns:
        ``(trained, frozen, tokens, place, answer, weight) -> loss``; see
        `tpatch_jax.editors.serac.examples.CounterfactualLesson`.

    Source: Mitchell et al. 2022 (SERAC), section 3.
    """

    def loss_of(trained: Params, frozen: Params, tokens: Array, place: Array, answer: Array, weight: Array) -> Array:
        params = {**frozen, **trained}
        hidden = networks.residuals(config, params, tokens)[-1]
        said = networks.logits(config, params, networks.take_tokens(hidden, place))
        losses = optax.softmax_cross_entropy_with_integer_labels(said, answer)
        return jnp.sum(losses * weight) / jnp.sum(weight)

    return loss_of


def train_serac(
    model: Model,
    encoder: str | Path,
    requests: Sequence[EditRequest],
    output: str | Path,
    *,
    settings: SeracTraining | None = None,
    progress: Progress | None = None,
) -> SeracInfo:
    """Train a scope classifier and a counterfactual model and write them into a folder.

    Nothing of the base model changes. Unfinished work is kept in ``OUTPUT.partial``: the same call goes on there.

    Where it differs from the authors': the two parts are trained apart, for no parameter is in both; AdamW with a
    linear warm-up at 5e-5 and 1e-3 in place of Adam at 1e-5, for there are thousands of steps fewer; the classifier is
    a MiniLM whose embedding has a fixed length; the counterfactual model is the first layers of the base model
    itself, embeddings frozen, so that both have the same vocabulary and a switch gives logits, where theirs is a
    small model of the same family; three of four labels are other requests' targets and subjects; negatives are,
    besides locality prompts, the other edits of a batch, some of which ask the same of other subjects, and other
    questions about the same subject.

    Args:
        model: the base model, a decoder.
        encoder: where the scope classifier starts: a folder of a BERT or the like, or a hub id.
        requests: training requests with subjects, rephrases and locality prompts, none of which will be measured.
        output: the folder for the networks; must not exist yet, or be empty.
        settings: how they are trained.
        progress: called with what is being done, how much of it is done, and how much there is.

    Returns:
        The `SeracInfo`; `tpatch_jax.editors.serac.editor.serac` reads the folder.

    Raises:
        TPatchError: there are too few requests or none with rephrases and locality prompts, the model is no decoder,
            the folder is taken, or its unfinished work is of another training.

    Example:
        >>> train_serac(model, "minilm", requests, "models/serac").exact  # doctest: +SKIP
        1.0

    Source: Mitchell et al. 2022, "Memory-Based Model Editing at Scale".
    """
    settings = settings or SeracTraining()
    output = Path(output)
    check_vacant(output)
    for name in ("rephrases", "locality"):
        if not any(getattr(request, name) for request in requests):
            raise TPatchError(f"no request has {name}, from which SERAC learns the scope of an edit; give such data")
    if ffn.any_attached(model.params):
        raise TPatchError("a patch is attached to the model; merge or detach it before training")
    scope, small = read_encoder(encoder), shallow(model, settings.layers)
    small = small.with_params(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), small.params))
    aside = min(HELD_OUT, len(requests) // 10)
    order = np.random.default_rng(settings.seed).permutation(len(requests))
    held_out, taught = ([requests[pick] for pick in part] for part in (order[:aside], order[aside:]))
    size = min(settings.batch_size, len(taught))
    record = {
        "model": fingerprint(model),
        "encoder": _content(scope),
        "data": hashlib.sha256(json.dumps([request_fields(one) for one in requests]).encode()).hexdigest(),
    }
    partial = output.with_name(f"{output.name}.partial")

    def options(epochs: int, rate: float) -> tuple[FinetuneSettings, dict[str, Any]]:
        chosen = FinetuneSettings(epochs=epochs, batch_size=size, learning_rate=rate, seed=settings.seed)
        return chosen, {**record, "settings": {**dataclasses.asdict(settings), **dataclasses.asdict(chosen)}}

    count = -(-len(taught) // size)
    chosen, about = options(settings.scope_epochs, settings.scope_rate)
    scoped = learn(
        scope.params, scope_loss(scope.config), count,
        lambda epoch, first: scope_lessons(scope, taught, size, settings.seed, epoch, first),
        chosen, partial / "scope", about, progress, "scope classifier",
    )  # fmt: skip
    trained = {name: small.params[name] for name in ("layers", "norm") if name in small.params}
    frozen = {name: entry for name, entry in small.params.items() if name not in trained}
    chosen, about = options(settings.counterfactual_epochs, settings.counterfactual_rate)
    copied = learn(
        trained, counterfactual_loss(small.config), count,
        lambda epoch, first: counterfactual_lessons(small, taught, frozen, size, settings.seed, epoch, first),
        chosen, partial / "counterfactual", about, progress, "counterfactual model",
    )  # fmt: skip
    small = small.with_params({**frozen, **copied.params})
    shared = sum(leaf.size for name in ("embed", "head") for leaf in jax.tree.leaves(frozen.get(name, {})))
    learnt = SeracNetworks(scope.with_params(scoped.params), small, shared)
    info = SeracInfo(
        output, len(taught), len(held_out), _means(scoped.losses, settings.scope_epochs),
        _means(copied.losses, settings.counterfactual_epochs), *_measure(model, learnt, held_out),
        learnt.parameter_count, scoped.seconds + copied.seconds,
    )  # fmt: skip
    result = {name: entry for name, entry in info.to_json().items() if name != "output"}
    write_networks(output, learnt, {**record, "base": model.name, "settings": dataclasses.asdict(settings), **result})
    shutil.rmtree(partial, ignore_errors=True)
    return info


def _means(losses: np.ndarray, epochs: int) -> tuple[float, ...]:
    return tuple(float(np.mean(part)) for part in np.split(losses, epochs))


def _content(model: Model) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(model.params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:32]


def _measure(
    model: Model, networks: SeracNetworks, requests: Sequence[EditRequest]
) -> tuple[float | None, float | None, float | None]:
    """``in_scope``, ``out_of_scope`` and ``exact`` of `SeracInfo`, all requests stored together."""
    if not requests:
        return None, None, None
    stored = embeddings(
        networks.scope, [edit_text(request.prompt, request.target, request.join) for request in requests]
    )
    state = SeracState(model, networks, tuple(requests), stored, SeracSettings(), {})
    inside = [(number, text) for number, request in enumerate(requests) for text in request.rephrases]
    outside = [text for request in requests for text in request.locality]
    chosen = route(state, [text for _, text in inside])
    silent = route(state, outside)
    return (
        float(np.mean([pick == number for pick, (number, _) in zip(chosen, inside, strict=True)])) if inside else None,
        float(np.mean([pick is None for pick in silent])) if outside else None,
        float(np.mean(says(state, requests, range(len(requests))))),
    )
