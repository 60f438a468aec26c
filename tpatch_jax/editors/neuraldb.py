"""NeuralDB: a table of keys and residuals beside one feed-forward network, read at the hidden neurons of every token.

A key is what the down projection reads at the last token of an edit's subject; a residual is what the network's output
lacks there for the model to say the target. At every token the key nearest by cosine is looked up, and where it is near
enough its residual is added; everywhere else the model is the unedited one, bit for bit::

    FFN'(q) = FFN(q) + r_j·1[cos(k, k_j) > γ]        k = the hidden neurons at q,  j = argmax_i cos(k, k_i)

Keys and residuals are those of the methods that write into the down projection: a key is the mean of the bare prompt's
and of the mean of five sampled contexts', a residual is trained as MEMIT's values are, at one layer. Nothing is solved
for, so no statistics are collected, and no edit changes another: editing one by one or all at once is the same.

The authors' code was not at hand; what their paper leaves to it is read so:

- The residual is trained in the unedited model, beside no other entry.
- The layer is ROME's, and ``γ`` lies between what paraphrases and other subjects' prompts reach on SmolLM2-135M: there
  a subject's key in a paraphrase has a cosine of .81 to .98 with its edit's, and no token of a neighbour's prompt more
  than .42 (eight records of CounterFact).
- Two edits of one subject have nearly the same key, and the nearer one answers for both.

Source: Fei et al., "NeuralDB: Scaling Knowledge Editing in LLMs to 100,000 Facts with Neural KV Database", ICLR 2026.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from tpatch_jax.core import ffn
from tpatch_jax.core.checks import check_positive, check_range
from tpatch_jax.core.sizes import power_of_two
from tpatch_jax.editors.base import EditInfo, Editor, EditorFunctions
from tpatch_jax.editors.locating import with_spelling
from tpatch_jax.editors.registry import Method, register_editor
from tpatch_jax.editors.repeats import step_once
from tpatch_jax.editors.rome import memit as memit_module
from tpatch_jax.editors.rome.hidden_moment import sampled_contexts
from tpatch_jax.editors.rome.memit import check_layers, subject_keys, subject_streams
from tpatch_jax.editors.rome.rome import rome_layer
from tpatch_jax.editors.rome.state import Attempt, RomeState, read_requests, report, says
from tpatch_jax.editors.rome.subject_value import ValueSettings, check_value, train_together, value_rows
from tpatch_jax.editors.stored import find_kept, name_request, restore_stored, save_stored
from tpatch_jax.editors.subject_rows import PromptRow
from tpatch_jax.editors.tpatcher.last_site import forward_seconds
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.model import Model
from tpatch_jax.models.networks import Batch
from tpatch_jax.models.patching import attach_adapters
from tpatch_jax.requests import EditRequest
from tpatch_jax.typing import Arrays, Params, Progress

__all__ = [
    "NEURALDB_PRESETS",
    "Database",
    "NeuralDBSettings",
    "NeuralDBState",
    "edited_model",
    "forget",
    "neuraldb",
    "neuraldb_layer",
    "restore_edits",
    "save_edits",
]

ENTRIES = 8
"""A database counts as so many entries at least, so that few sizes are compiled."""


@dataclasses.dataclass(frozen=True)
class NeuralDBSettings:
    """Options of NeuralDB.

    Attributes:
        layer: ``"auto"``, see `neuraldb_layer`, or a number.
        threshold: ``γ``, how near a key has to be, as a cosine; above 0, and at most 1.
        value: how a residual is trained, as MEMIT's authors have it but for the extra steps of `ValueSettings`.
        keep_failed: keep an entry whose target does not come out.
        together: so many residuals are trained together at most.

    Raises:
        TPatchError: a value makes no sense.
    """

    layer: str = "auto"
    threshold: float = 0.65
    value: ValueSettings = dataclasses.field(default_factory=lambda: ValueSettings(value_steps=25, clamp=0.75))
    keep_failed: bool = True
    together: int = 8

    def __post_init__(self) -> None:
        """Checks the values."""
        check_value(self.value)
        if self.layer != "auto" and not self.layer.isdigit():
            raise TPatchError(f"layer {self.layer!r} is not a layer; use layer=auto or a number")
        check_positive(self, ("threshold",))
        check_range(self, ("threshold",), 0, 1)
        check_range(self, ("together",), 1)


NEURALDB_PRESETS: Mapping[str, NeuralDBSettings] = {"default": NeuralDBSettings()}
"""Named settings of NeuralDB: ``default``."""


# --- the adapter ---


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Database:
    """The entries, as they join a feed-forward network: a `tpatch_jax.core.adapters.Adapter`.

    Attributes:
        reader: the network's own maps up to its hidden neurons, ``{"up", "gate"?}``.
        key: ``[entries, h]``, each of length one; an entry of zeros is padding and never fires.
        value: the residuals, ``[entries, d]``.
        threshold: ``γ``, positive.
        activation: the network's, a name in `tpatch_jax.core.ffn.ACTIVATIONS`.

    Example:
        >>> reader = {"up": {"kernel": jnp.eye(2)}}
        >>> table = Database(reader, jnp.eye(2)[:1], jnp.asarray([[5.0, 7.0]]), jnp.asarray(0.9), "relu")
        >>> table.contribute(jnp.asarray([[3.0, 0.1], [1.0, 1.0]]), jnp.ones((2, 2))).tolist()
        [[6.0, 8.0], [1.0, 1.0]]
    """

    reader: Params
    key: Float[Array, "entries hidden_neurons"]
    value: Float[Array, "entries hidden"]
    threshold: Float[Array, ""]
    activation: str = dataclasses.field(metadata={"static": True})

    def nearest(self, query: Float[Array, "*batch hidden"]) -> tuple[Int[Array, "*batch"], Bool[Array, "*batch"]]:
        """The entry whose key is nearest to the hidden neurons at each query, and whether it is near enough."""
        inner = ffn.hidden(self.reader, query, self.activation).astype(jnp.float32)
        along = jnp.matmul(inner, self.key.T, precision="highest")
        entry = jnp.argmax(along, -1)
        length = jnp.sqrt(jnp.sum(jnp.square(inner), -1))
        return entry, jnp.take_along_axis(along, entry[..., None], -1)[..., 0] > self.threshold * length

    def contribute(
        self, query: Float[Array, "*batch hidden"], output: Float[Array, "*batch hidden"]
    ) -> Float[Array, "*batch hidden"]:
        """The output with the nearest entry's residual where it is near enough, else the output as it is."""
        entry, fires = self.nearest(query)
        return jnp.where(fires[..., None], output + self.value[entry].astype(output.dtype), output)


# --- the editor ---


class NeuralDBState(NamedTuple):
    """What an edited model is made of.

    Attributes:
        model: the unedited model.
        layer: where the database is.
        requests: the edits in their order, each under a name that no other has.
        keys: of each, ``[edits, h]`` float32, of length one.
        values: the residual of each, ``[edits, d]`` float32.
        contexts: texts to put before a prompt.
        settings: the editor's options.
    """

    model: Model
    layer: int
    requests: tuple[EditRequest, ...]
    keys: np.ndarray
    values: np.ndarray
    contexts: tuple[str, ...]
    settings: NeuralDBSettings


def neuraldb_layer(config: NetworkConfig, wanted: str = "auto") -> int:
    """The layer of the database: the one that ROME edits.

    Args:
        config: the network's description.
        wanted: ``"auto"`` or a number.

    Raises:
        TPatchError: the network has no such layer.
    """
    return rome_layer(config, wanted)


def check_neuraldb(model: Model, settings: NeuralDBSettings) -> int:
    """Make sure that a model can get a database with these options.

    Returns:
        The layer.

    Raises:
        TPatchError: it is no decoder, its feed-forward networks do not write into the stream directly, it has no such
            layer, or something is attached there.
    """
    layer = neuraldb_layer(model.config, settings.layer)
    check_layers(model, "NeuralDB", str(layer))
    return layer


def neuraldb(settings: NeuralDBSettings = NEURALDB_PRESETS["default"], *, progress: Progress | None = None) -> Editor:
    """The NeuralDB editor: no parameter changes, edits become entries of a table beside one layer.

    ``FFN'(q) = FFN(q) + r_j`` where the nearest key's cosine is above ``γ``; everywhere else the model is the unedited
    one, bit for bit. A later edit of the same prompt goes before an earlier one. `forget` takes edits out again,
    exactly; so does an earlier state.

    Args:
        settings: its options.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        The `Editor`; its state is a `NeuralDBState`.

    Raises:
        TPatchError: on ``init``, where the model is no decoder, its feed-forward networks do not write into the stream
            directly, it has no such layer, or something is attached there.

    Source: Fei et al. 2026; `tpatch_jax.editors.neuraldb` says how it is read.

    Example:
        >>> editor = neuraldb(NeuralDBSettings(threshold=0.7))
        >>> state = editor.init(model, jax.random.key(0))  # doctest: +SKIP
        >>> state, info = editor.step(state, requests, jax.random.key(0))  # doctest: +SKIP
        >>> forget(state, ["edit-0"])  # doctest: +SKIP
    """

    def init(model: Model, rng: Array) -> NeuralDBState:
        layer, config = check_neuraldb(model, settings), model.config
        value = settings.value if settings.value.clamp else settings.value._replace(clamp=0.75)
        keys, values = (np.zeros((0, width), np.float32) for width in (_width(model, layer), config.hidden_size))
        contexts = sampled_contexts(model, memit_module.CONTEXTS)
        return NeuralDBState(model, layer, (), keys, values, contexts, dataclasses.replace(settings, value=value))

    def step(state: NeuralDBState, requests: Sequence[EditRequest], rng: Array) -> tuple[NeuralDBState, EditInfo]:
        return step_once(state.model, requests, lambda given: _step(state, with_spelling(state.model, given), progress))

    def apply(state: NeuralDBState, batch: Batch) -> Array:
        return edited_model(state).apply(batch)

    return EditorFunctions(init, step, apply)


def _width(model: Model, layer: int) -> int:
    return ffn.width(model.params["layers"][layer]["ffn"])


def _adapters(state: NeuralDBState) -> dict[int, Database]:
    """The database, filled up to one of few sizes with entries that never fire."""
    # The last edit of each prompt answers for all of them; their keys are the same.
    latest = sorted({request.prompt: number for number, request in enumerate(state.requests)}.values())
    if not latest:
        return {}
    network = state.model.params["layers"][state.layer]["ffn"]
    missing = power_of_two(len(latest), ENTRIES) - len(latest)
    key, value = (jax.device_put(np.pad(array[latest], ((0, missing), (0, 0)))) for array in (state.keys, state.values))
    reader = {name: network[name] for name in ("up", "gate") if name in network}
    threshold = jnp.asarray(state.settings.threshold, jnp.float32)
    return {state.layer: Database(reader, key, value, threshold, state.model.config.activation)}


def edited_model(state: NeuralDBState) -> Model:
    """The model with the database attached; it shares all arrays with the unedited one.

    Args:
        state: after some steps.
    """
    return attach_adapters(state.model, _adapters(state))


def forget(state: NeuralDBState, names: Sequence[str]) -> NeuralDBState:
    """The database without some edits, as if they had never been made.

    Args:
        state: after some steps.
        names: ids of requests.

    Raises:
        TPatchError: there is no edit of that name.

    Example:
        >>> forget(state, ["edit-3"])  # doctest: +SKIP
    """
    kept = find_kept(state.requests, names, "database")
    requests = tuple(state.requests[number] for number in kept)
    return state._replace(requests=requests, keys=state.keys[kept], values=state.values[kept])


class _Entry(NamedTuple):
    """What one edit puts into the database, and how its residual was trained."""

    key: np.ndarray
    value: np.ndarray
    attempt: Attempt


def _entries(state: NeuralDBState, rows: Sequence[list[PromptRow]], progress: Progress | None) -> list[_Entry]:
    """Key and residual of each edit, whose rows are in all contexts, in the unedited model."""
    model, settings = state.model, state.settings
    keys = np.asarray(subject_keys(model, [each[:-1] for each in rows], state.layer))
    keys = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    before = subject_streams(model, [each[0] for each in rows], state.layer)
    order = sorted(range(len(rows)), key=lambda n: max(len(row.tokens) for row in rows[n]))
    trained = train_together(
        model, rows, state.layer, before, order, settings.together, settings.value, progress, "training residuals"
    )
    entries = []
    for key, (offset, info, lane) in zip(keys, trained, strict=True):
        finite = bool(np.isfinite(offset).all() and np.isfinite(key).all())
        reason = "" if finite else "the residual is not finite; nothing was kept; try a smaller value_rate"
        entries.append(_Entry(key, offset, Attempt(info, lane, reason)))
    return entries


def _step(
    state: NeuralDBState, requests: list[EditRequest], progress: Progress | None
) -> tuple[NeuralDBState, EditInfo]:
    model, names = state.model, [request.name(position) for position, request in enumerate(requests)]
    items, problems = read_requests(RomeState(model, {}, {}, state.contexts, state.settings), requests, "NeuralDB")
    unit = forward_seconds(model, items)
    began = time.perf_counter()
    rows = [value_rows(model, requests[item.position], item) for item in items]
    entries = _entries(state, rows, progress) if items else []
    fit_seconds = time.perf_counter() - began
    attempts = {item.position: entry.attempt for item, entry in zip(items, entries, strict=True)}
    taken = {request.id for request in state.requests}
    fitted = [pair for pair in zip(items, entries, strict=True) if not pair[1].attempt.reason]
    named = {item.position: name_request(requests[item.position], names[item.position], taken) for item, _ in fitted}
    after = state._replace(
        requests=(*state.requests, *named.values()),
        keys=np.concatenate([state.keys, *(entry.key[None] for _, entry in fitted)]),
        values=np.concatenate([state.values, *(entry.value[None] for _, entry in fitted)]),
    )
    held = dict(zip((item.position for item in items), says(edited_model(after), items), strict=True))
    lost = [position for position in named if not held[position]]
    if lost and not state.settings.keep_failed:
        after = forget(after, [str(named[position].id) for position in lost])
        for position in lost:
            reason = "the target does not come out with its entry, which was taken out again; try another layer"
            attempts[position] = attempts[position]._replace(reason=reason)
        held = dict(zip((item.position for item in items), says(edited_model(after), items), strict=True))
    times = (time.perf_counter() - began, fit_seconds, unit)
    info = report(names, problems, attempts, held, state.settings.keep_failed, times)
    width = state.keys.shape[1] + state.values.shape[1]
    return after, info._replace(parameters_added=(len(after.keys) - len(state.keys)) * width)


# --- resuming ---


def save_edits(state: NeuralDBState) -> Arrays:
    """The edits as arrays: keys, residuals, and the requests as JSON in UTF-8.

    Args:
        state: after some steps.
    """
    return save_stored(state, "keys", "values")


def restore_edits(state: NeuralDBState, arrays: Arrays) -> NeuralDBState:
    """The inverse of `save_edits`.

    Args:
        state: fresh, from ``init`` with the same settings and model.
        arrays: what was saved.
    """
    return restore_stored(state, arrays, "keys", "values")


register_editor(
    Method(
        name="neuraldb",
        presets=NEURALDB_PRESETS,
        build=lambda settings, memory, cache, progress: neuraldb(settings, progress=progress),
        model=edited_model,
        save=save_edits,
        restore=restore_edits,
        adapters=_adapters,
        check=check_neuraldb,
        undo="exact",
        stock_checkpoint=False,
    )
)
