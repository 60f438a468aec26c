"""The compiled programs that an edit runs, each with arguments that are only said to exist: shapes, types, places.

What is listed is what the library calls, not a copy: the jitted functions themselves. The T-Patcher editor's are here,
`tpatch_jax.benchmarks.other_programs` has those of the other methods, of generation and of evaluation.
"""

from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from tpatch_jax.core import fit as fitting
from tpatch_jax.core import lanes as stepping
from tpatch_jax.core import memory as memories
from tpatch_jax.core import values
from tpatch_jax.core.devices import DATA_AXIS, automatic
from tpatch_jax.core.ffn import ACTIVATIONS
from tpatch_jax.core.fit import FitProblem, FitSettings
from tpatch_jax.core.memory import Memory
from tpatch_jax.core.patch import Patch
from tpatch_jax.core.products import rounds_products
from tpatch_jax.core.sizes import in_blocks, in_halves, in_steps, power_of_two, round_up
from tpatch_jax.core.values import KeptRows, TargetRows
from tpatch_jax.editors import holding, subject_rows
from tpatch_jax.editors.subject_rows import KnownRows
from tpatch_jax.editors.tpatcher import last_site, subject_site, subject_values
from tpatch_jax.editors.tpatcher.settings import PRESETS, TPatcherSettings
from tpatch_jax.editors.tpatcher.subject_prompts import AVOIDED
from tpatch_jax.models import collection, networks, stack, tracing
from tpatch_jax.models.blocks import Around, Cache, Seen
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.rows import row_length
from tpatch_jax.models.shapes import parameter_shapes
from tpatch_jax.models.sharding import MODEL_AXIS, neuron_spec, spec
from tpatch_jax.typing import Params

__all__ = ["Places", "Program", "Workload", "edit_programs", "sites_of"]

Struct: TypeAlias = Any
"""A `jax.ShapeDtypeStruct`, which stands where an array would."""

NO_RUNS: Mapping[str, float] = MappingProxyType({})
"""Of a program that the editor runs at no site, or once for a model."""


NOTHING = Around()
"""Blocks of a decoder read nothing besides the stream, but for packed rows."""


class Workload(NamedTuple):
    """What an average request asks for. Measured on CounterFact where nothing else is said.

    Attributes:
        prompt: tokens of a bare prompt with its target.
        context: of one behind a prefix.
        row: of one among those that a value is trained on, of which what they begin with is read once.
        end: of such a one from the end of its subject on.
        target: tokens of a target.
        neurons: in the last layer, for a request.
        missing: of these, how many need steps on their value.
        attempts: how often a neuron in the last layer is fitted.
        completed: of the requests at subjects, how many need a neuron in the last layer as well.
        memory: rows of unrelated text.
        others: of a request, texts about other subjects that are read for it.
        inside: places inside its prompt on which others stay silent.
    """

    prompt: int = 16
    context: int = 32
    row: float = 9.5
    end: float = 4.5
    target: int = 2
    neurons: float = 1.06
    missing: float = 0.1
    attempts: float = 1.3
    completed: float = 0.25
    memory: int = 16_384
    others: float = 4.0
    inside: float = 8.0


class Program(NamedTuple):
    """A program, what it is called with, and how often.

    Attributes:
        name: what it does.
        function: from ``jax.jit``.
        args: what it is called with, structures of `jax.ShapeDtypeStruct` and static values.
        kwargs: the same by name.
        trips: how often a loop in it goes round whose end shows only as it runs.
        runs: how often it is called, by site (``"subject"``, ``"last"``); none is once for a model, or another method.
        resident: arrays that lie in memory meanwhile, whether or not they are arguments.
    """

    name: str
    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = MappingProxyType({})
    trips: int = 1
    runs: Mapping[str, float] = NO_RUNS
    resident: Any = ()


class Places:
    """A network's parameters and other arrays on a mesh, without any of them.

    Attributes:
        config: the network's description.
        mesh: with the axes ``"data"`` and ``"model"``.
        dtype: of the parameters.
    """

    def __init__(self, config: NetworkConfig, mesh: Mesh, dtype: str = "bfloat16"):
        self.config: NetworkConfig = config
        self.mesh: Mesh = automatic(mesh)
        self.dtype: np.dtype = jnp.dtype(dtype)

    @property
    def data(self) -> int:
        """Over how many devices rows are split."""
        return self.mesh.shape[DATA_AXIS]

    @property
    def model(self) -> int:
        """Over how many devices weights are split."""
        return self.mesh.shape[MODEL_AXIS]

    def array(self, shape: tuple[int, ...], dtype: Any = jnp.float32, spec: PartitionSpec | None = None) -> Struct:
        """An array that lies as it is said, by default whole on every device."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec or PartitionSpec()))

    def rows(self, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Struct:
        """An array split by its rows, as `tpatch_jax.core.devices.shard_rows` does it."""
        split = bool(shape) and shape[0] % self.data == 0
        return self.array(shape, dtype, PartitionSpec(DATA_AXIS) if split else None)

    def over_vocabulary(self, shape: tuple[int, ...]) -> Struct:
        """Rows of logits, split by rows and vocabulary."""
        names: list[Any] = [None] * len(shape)
        names[0] = DATA_AXIS if shape[0] % self.data == 0 else None
        names[-1] = MODEL_AXIS if shape[-1] % self.model == 0 else None
        return self.array(shape, jnp.float32, PartitionSpec(*names))

    def stream(self, *shape: int) -> Struct:
        """Rows in the parameters' type."""
        return self.rows(shape, self.dtype)

    @cached_property
    def params(self) -> Params:
        """The network's parameters as `tpatch_jax.load_model` places them."""

        def place(path: Any, leaf: Struct) -> Struct:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            return self.array(leaf.shape, self.dtype, spec(name, leaf.shape, self.mesh))

        return jax.tree_util.tree_map_with_path(place, parameter_shapes(self.config))

    def matrices(self, params: Params, rounded: bool) -> Params:
        """Parameters as `tpatch_jax.core.products.round_matrices` leaves them, if they are rounded."""
        if not rounded:
            return params
        return jax.tree.map(lambda leaf: leaf.update(dtype=jnp.bfloat16) if leaf.ndim > 1 else leaf, params)

    @cached_property
    def last_weights(self) -> Params:
        """What the rest after the last feed-forward network reads."""
        return networks.final_weights(self.config, self.params)

    def key(self, *shape: int) -> Struct:
        """Typed random keys."""
        return self.array(shape, jax.random.key(0).dtype)

    def cache(self, *shape: int) -> Cache:
        """A block's keys and values of ``[rows, …, tokens]``, heads split like the weights that make them."""
        config, between = self.config, (None,) * (len(shape) - 2)
        names = (DATA_AXIS if shape[0] % self.data == 0 else None, *between,
                 MODEL_AXIS if config.key_value_heads % self.model == 0 else None)  # fmt: skip
        shape = (*shape[:-1], config.key_value_heads, shape[-1], config.head_width)
        part = self.array(shape, self.dtype, PartitionSpec(*names))
        return Cache(part, part)

    def patch(self, neurons: int) -> Patch:
        """Neurons, split as `tpatch_jax.models.sharding.split_neurons` does it."""
        spec, width = neuron_spec(neurons, self.mesh), self.config.hidden_size
        return Patch(*(self.array(shape, spec=spec) for shape in ((neurons, width), (neurons,), (neurons, width))))

    def memory(self, rows: int) -> Memory:
        """A memory with its rows split."""
        width, rows = self.config.hidden_size, round_up(rows, self.data)
        return Memory(
            self.rows((rows, width)), self.rows((rows,), jnp.int32), self.array((width,)), self.array((width, width))
        )

    def layers_by_kind(self, first: int, last: int) -> dict[Any, tuple[int, int]]:
        """Of each kind of layer in a range one of its layers, and how many there are."""
        kinds: dict[Any, tuple[int, int]] = {}
        for index in range(first, last):
            kind = self.config.kind(index)
            one, count = kinds.get(kind, (index, 0))
            kinds[kind] = one, count + 1
        return kinds


def sites_of(config: NetworkConfig) -> tuple[str, ...]:
    """The sites at which a network is edited."""
    return ("subject", "last") if config.architecture == "decoder" and config.layers > 1 else ("last",)


def edit_programs(
    places: Places,
    edits: int,
    settings: TPatcherSettings | None = None,
    workload: Workload | None = None,
    every: bool = False,
) -> list[Program]:
    """The programs of one call that edits so many requests.

    Args:
        places: the network and the devices.
        edits: how many requests.
        settings: the editor's options; by default the preset ``default``.
        workload: what a request asks for.
        every: also those that run only where they are asked for: the paper's recipe, and a fit that is no one's lane.

    Returns:
        Each program once, with how often it runs at each site.
    """
    settings, workload = settings or PRESETS["default"], workload or Workload()
    programs = [*_memory_programs(places, workload), *_last_programs(places, edits, settings, workload, every)]
    if places.config.architecture == "decoder":
        programs += _reading_programs(places, edits, settings, workload)
    if "subject" in sites_of(places.config):
        programs += _subject_programs(places, edits, settings, workload)
    return programs


def _batch(tokens: int) -> tuple[int, int]:
    """Rows and tokens of a full batch of texts of one length."""
    length = row_length(tokens)
    return 1 << (max(1, collection.TOKENS_PER_BATCH // length).bit_length() - 1), length


def block_programs(
    places: Places,
    what: str,
    rows: int,
    tokens: int,
    first: int,
    last: int,
    seen: int = 0,
    runs: Mapping[str, float] = NO_RUNS,
    around: Around = NOTHING,
    rounded: bool = False,
) -> list[Program]:
    """Whole blocks of a range of layers, one program for each kind of layer.

    Args:
        places: the network and the devices.
        what: what they are run for.
        rows: of the batch.
        tokens: of each row.
        first: the first layer.
        last: the one behind the last.
        seen: how many tokens a cache has room for; 0 is no cache.
        runs: how often the range is run.
        around: what all of them read besides.
        rounded: whether their products are of bfloat16; see `tpatch_jax.core.products`.
    """
    config = places.config
    programs = []
    for number, (kind, (index, count)) in enumerate(places.layers_by_kind(first, last).items()):
        args = (
            config, kind, places.matrices(places.params["layers"][index], rounded),
            places.stream(rows, tokens, config.hidden_size), places.rows((rows, tokens), jnp.int32),
            places.cache(rows, seen) if seen else None, around,
        )  # fmt: skip
        times = {site: count * each for site, each in runs.items()}
        name = f"{what}: block" + (f", kind {number + 1}" if number else "")
        programs.append(Program(name, stack.run_block, args, {"rounded": True} if rounded else {}, runs=times))
    return programs


def _enter_program(
    places: Places, what: str, rows: int, tokens: int, layer: int, runs: Mapping[str, float],
    around: Around = NOTHING
) -> Program:  # fmt: skip
    config = places.config
    args = (
        config, config.kind(layer), places.params["layers"][layer], places.stream(rows, tokens, config.hidden_size),
        places.rows((rows, tokens), jnp.int32), None, around,
    )  # fmt: skip
    return Program(f"{what}: block up to its FFN's output", stack.enter_block, args, runs=runs)


def _reading_programs(places: Places, edits: int, settings: TPatcherSettings, workload: Workload) -> list[Program]:
    """Texts of a decoder run up to a layer: prompts, their contexts, other subjects."""
    config, params, width = places.config, places.params, places.config.hidden_size
    last, middle = config.layers - 1, subject_site.subject_layer(config.layers, settings.layer)
    rows, tokens = _batch(workload.prompt)
    texts = {
        # Requests once to see what is wrong, then bare prompts, inside many of them, and other subjects.
        "last": edits * (2 + (edits >= settings.many_from)) + edits * workload.others,
        # The same, and again with neurons at subjects; what is completed is read in all contexts.
        "subject": edits * (2 + workload.completed * (1 + workload.others)),
    }
    whole = {site: float(len(in_steps(round(count), rows))) for site, count in texts.items()}
    contexts = edits * (settings.contexts - 1)
    after = {
        "last": len(in_steps(contexts, rows)),
        "subject": len(in_steps(round(workload.completed * contexts), rows)),
    }
    subject = settings.subject
    seen = edits * (1 + subject.key_contexts + AVOIDED + (1 + subject.key_contexts) * 0.5)
    at_subjects = {"subject": float(len(in_steps(round(seen), rows)))}
    embedded = {site: whole[site] + after[site] + at_subjects.get(site, 0.0) for site in whole}
    embed = {name: params[name] for name in ("embed", "positions", "token_types", "norm_embed") if name in params}
    numbers = places.rows((rows, tokens), jnp.int32)
    begun, which = places.cache(power_of_two(settings.contexts - 1), tokens), places.rows((rows,), jnp.int32)
    stream = places.stream(rows, tokens, width)
    programs = [
        Program("reading: embeddings", stack.embed_rows, (config, embed, numbers, numbers, None), runs=embedded),
        *block_programs(places, "reading", rows, tokens, 0, last, runs=whole),
        _enter_program(places, "reading, last layer", rows, tokens, last, whole),
        *block_programs(places, "reading up to the subject's layer", rows, tokens, 0, middle, runs=at_subjects),
        _enter_program(places, "reading, subject's layer", rows, tokens, middle, at_subjects),
    ]
    for number, (kind, (index, count)) in enumerate(places.layers_by_kind(0, last).items()):
        args = (config, kind, params["layers"][index], stream, numbers, begun, which)
        name = "reading behind a prefix: block" + (f", kind {number + 1}" if number else "")
        times = {site: float(count * each) for site, each in after.items()}
        programs.append(Program(name, tracing.run_block_after, args, runs=times))
    args = (config, config.kind(last), params["layers"][last], stream, numbers, begun, which)
    name = "reading behind a prefix: block up to its FFN's output"
    programs.append(Program(name, tracing.enter_block_after, args, runs={site: float(n) for site, n in after.items()}))
    return programs


def _memory_programs(places: Places, workload: Workload) -> list[Program]:
    """Statistics of unrelated text, most of them once for a model."""
    width = places.config.hidden_size
    square, scalar = places.array((width, width)), places.array(())
    return [
        Program("memory: mean and covariance", memories.second_moments, (places.rows((workload.memory, width)),)),
        Program(
            "memory: how contexts move a query", jax.jit(memories.nuisance_scatter), (places.rows((256, 6, width)),)
        ),
        Program("memory: mixture of scatters", memories.blended, (square, square, scalar),
                runs={"subject": 1.0, "last": 1.0}),
        Program(
            "memory: whitening", memories.whitening_matrix, (square, square, scalar, scalar),
            runs={"subject": 1.0 + workload.completed, "last": 1.0},
        ),
    ]  # fmt: skip


def last_memory_rows(edits: int, settings: TPatcherSettings, workload: Workload) -> int:
    """How many rows the memory has when so many requests are fitted in the last layer."""
    bare = edits * workload.target
    rows = bare + min(last_site.CONTEXT_ROWS, bare * (settings.contexts - 1))
    if edits >= settings.many_from:
        rows += min(last_site.INNER_ROWS, round(edits * workload.inside))
    return workload.memory + in_blocks(rows, last_site.LEAST_ROWS, last_site.BLOCK)


def _last_programs(
    places: Places, edits: int, settings: TPatcherSettings, workload: Workload, every: bool
) -> list[Program]:
    """Neurons in the last layer: both recipes, what they start from, and what the network says with them."""
    config, width, weights = places.config, places.config.hidden_size, places.last_weights
    act, fit = ACTIVATIONS[config.activation], settings.fit
    pointwise = networks.pointwise(config)
    neurons = edits * workload.neurons * workload.attempts
    memory = places.memory(last_memory_rows(edits, settings, workload))
    contexts = settings.contexts if config.architecture == "decoder" else settings.input_contexts
    contexts *= 1 if pointwise else workload.context
    lanes = fit.lanes * places.data
    few = round_up(min(4, fit.lanes), places.data)
    size = lanes if neurons > 4 else few
    shares = {"last": 1.0, "subject": workload.completed}

    def times(count: float, least: float = 1.0) -> dict[str, float]:
        return {site: max(least, count * share) for site, share in shares.items()}

    def problems(count: int) -> FitProblem:
        context: dict[str, Any] = {"residual": places.rows((count, contexts, width), places.dtype)}
        if not pointwise:
            context["valid"] = places.rows((count, contexts), jnp.bool_)
            context["text"] = places.rows((count, contexts), jnp.int32)
        return FitProblem(
            places.rows((count, contexts, width)), places.rows((count, contexts, width)),
            places.rows((count, settings.other_subjects, width)), context, places.rows((count,), jnp.int32),
            places.rows((count, width)), places.rows((count,)),
        )  # fmt: skip

    head = Partial(networks.finisher(config), weights)
    problem, some = problems(size), problems(few)
    settle = (problem, memory, head, fit, act, places.array((), jnp.int32))
    settled = _shapes(fitting.settle_many, places, *settle)
    # On one part of a mesh the loop is that of one device.
    over = places.mesh if places.data > 1 else None
    settled_few = jax.tree.map(lambda leaf: places.rows((few, *leaf.shape[1:]), leaf.dtype), settled)
    steps = fit.key_steps // fit.rounds
    programs = [
        Program("last layer: keys, thresholds, first values", fitting.settle_many, settle, trips=steps,
                runs=times(neurons / size), resident=memory),
        Program("last layer: steps on values", fitting.improve_many, (settled_few, some, head, fit, act, over),
                trips=fit.value_steps, runs=times(neurons * workload.missing / few, 0.0), resident=memory),
        Program("last layer: patches", fitting.end_staged_many, (settled, problem, head, fit, act),
                runs=times(neurons / size), resident=memory),
        *(_asked_programs(places, problem, memory, head, size) if every else ()),
        *_start_programs(places, edits, settings, size, contexts, times(neurons / size)),
    ]  # fmt: skip
    rows = places.rows((holding.ROWS, width), places.dtype)
    if pointwise:
        patch = places.patch(in_blocks(round(edits * workload.neurons), collection.NEURONS, 4096))
        sites = collection.Sites(rows, rows, rows)
        looks = edits * workload.target * (1 + 2 * workload.attempts) / holding.ROWS
        args = (config, weights, patch, sites)
        wanted = places.rows((holding.ROWS,), jnp.int32)
        programs += [
            Program("last layer: what is said", collection.predict_sites, args, runs=times(looks), resident=memory),
            # Asked before a request is edited, and of some texts afterwards.
            Program("margins of what is asked", holding.margins_of_sites, (config, weights, sites, wanted)),
        ]
    return programs


def _shapes(function: Any, places: Places, *args: Any) -> Any:
    """What a function of lanes returns, its rows split."""
    lanes = jax.eval_shape(function, *args)
    return jax.tree.map(lambda leaf: places.rows(leaf.shape, leaf.dtype), lanes)


def _asked_programs(places: Places, problem: FitProblem, memory: Memory, head: Partial, size: int) -> list[Program]:
    """The paper's recipe, and single fits by both recipes."""
    settings: FitSettings = PRESETS["paper"].fit
    act = ACTIVATIONS[places.config.activation]
    states = _shapes(fitting.begin_many, places, problem, places.key(size), settings)
    args = (states, problem, memory, head, settings, act)
    one = jax.tree.map(lambda leaf: places.array(leaf.shape[1:], leaf.dtype), problem)
    single = jax.jit(fitting.fit, static_argnames=("settings", "activation"))
    alone = {"head": head, "rng": places.key(), "activation": act}
    staged = {**alone, "settings": PRESETS["default"].fit}
    return [
        Program("one fit, staged", single, (one, memory), staged, trips=PRESETS["default"].fit.key_steps),
        Program("one fit, joint", single, (one, memory), {**alone, "settings": settings}, trips=settings.least_steps),
        Program("paper's recipe: start", fitting.begin_many, (problem, places.key(size), settings)),
        Program(f"paper's recipe: {settings.patience} steps", fitting.advance_many, args, resident=memory),
        Program("paper's recipe: patches", fitting.end_many, args, resident=memory),
    ]


def _start_programs(
    places: Places, edits: int, settings: TPatcherSettings, size: int, contexts: int, runs: Mapping[str, float]
) -> list[Program]:
    """Where values in the last layer start."""
    config, width = places.config, places.config.hidden_size
    if config.labels or not networks.pointwise(config):
        return []
    weights = {**places.last_weights, "layers": {config.layers - 1: places.last_weights["layer"]}}
    table = jax.eval_shape(lambda params: networks.unembedding(config, params), places.params)
    split = PartitionSpec(MODEL_AXIS) if table.shape[0] % places.model == 0 else None
    given = {name: places.rows((size, contexts, width), places.dtype) for name in ("query", "output", "residual")}
    given["targets"] = places.rows((size,), jnp.int32)
    args = (config, weights, places.array((width, width)), places.patch(collection.NEURONS), given)
    return [
        Program(
            "last layer: moment of the unembedding", last_site.moment, (places.array(table.shape, table.dtype, split),)
        ),
        Program("last layer: where values start", last_site.prepare_starts, args, runs=runs),
    ]


class PackSizes(NamedTuple):
    """How many sequences a pack of rows has, and how many tokens, ends and beginnings each of them."""

    sequences: int
    tokens: int
    ends: int
    begins: int


def pack_sizes(workload: Workload, rows: int) -> PackSizes:
    """Sizes of so many packed rows, as `tpatch_jax.editors.subject_rows.pack_lanes` pads them."""
    every = round(workload.end * rows)
    ends = in_halves(min(every, subject_rows.ENDS), 16)
    sequences = -(-every // ends)
    tokens = in_halves(-(-round(workload.row * rows) // sequences), 32)
    return PackSizes(sequences, tokens, ends, in_halves(max(1, tokens - ends), 32))


def fork_structs(places: Places, packs: int, sizes: PackSizes, layer: int) -> networks.Fork:
    """Packed rows cut at a layer, as `tpatch_jax.models.networks.fork` leaves them."""
    sequences, _, ends, begins = sizes
    part = places.stream(packs, sequences * ends, places.config.hidden_size)
    place = places.rows((packs, sequences * ends), jnp.int32)
    caches = [places.cache(packs, sequences, begins) for _ in range(layer + 1, places.config.layers)]
    shape = (packs, sequences, begins + ends)
    seen = Seen(places.rows((*shape[:2], ends, shape[2]), jnp.bool_), places.rows(shape, jnp.int32))
    return networks.Fork(part, part, part, place, seen, caches, part, layer)


def fork_programs(
    places: Places, what: str, packs: int, sizes: PackSizes, layer: int, runs: Mapping[str, float] = NO_RUNS,
    rounded: bool = False,
) -> list[Program]:  # fmt: skip
    """Packed rows run through the whole network, with what running their ends again needs kept."""
    config, last = places.config, places.config.layers
    packs, tokens = packs * sizes.sequences, sizes.tokens
    stream = places.stream(packs, tokens, config.hidden_size)
    weights = stack.without_ffn(places.params["layers"][layer])
    caches = [places.cache(packs, tokens) for _ in range(layer + 1, last)]
    leave = (config, config.kind(layer), weights, stream, stream)
    seen = Seen(places.rows((packs, tokens, tokens), jnp.bool_), places.rows((packs, tokens), jnp.int32))
    around = Around(seen=seen)
    programs = block_programs(
        places, f"{what} up to the layer", packs, tokens, 0, layer, runs=runs, around=around, rounded=rounded
    )
    programs.append(_enter_program(places, f"{what} up to the layer", packs, tokens, layer, runs, around))
    programs.append(Program(f"{what}: end of the layer's block", stack.leave_block, leave, runs=runs))
    behind = f"{what} behind the layer"
    for program in block_programs(
        places, behind, packs, tokens, layer + 1, last, runs=runs, around=around, rounded=rounded
    ):
        programs.append(program._replace(resident=caches))
    return programs


def _subject_programs(places: Places, edits: int, settings: TPatcherSettings, workload: Workload) -> list[Program]:
    """Neurons at subjects: keys in closed form, and values trained through the rest of the network."""
    config, width = places.config, places.config.hidden_size
    subject, layer = settings.subject, subject_site.subject_layer(config.layers, settings.layer)
    keys = power_of_two(round(edits * 1.5))
    # Every token up to the subject, and the contexts, of each request.
    negative = power_of_two(round(edits * (0.5 * workload.prompt + 2 * subject.key_contexts)), 64)
    memory = places.memory(workload.memory + negative)
    scalar = places.array((keys,))
    lanewise = (
        places.array((keys, 1 + subject.key_contexts, width)), places.array((keys,), jnp.int32), scalar, scalar,
        places.array((keys, AVOIDED, width)), scalar, scalar,
    )  # fmt: skip
    most = places.data * (subject.value_lanes or subject_site.ELSEWHERE)
    lanes = min(subject_site.lanes_together(edits, places.data), most)
    chunks = {"subject": float(-(-edits // lanes))}
    # Besides, the prompt behind a longer text and with its subject in lower case.
    aims, beside = subject.value_contexts + subject.shorter + subject.same + 2, subject.neutral
    sizes = pack_sizes(workload, aims + beside)
    ends = sizes.sequences * sizes.ends
    read = power_of_two(workload.target, 2)
    said = (config, places.last_weights, places.stream(lanes, ends, width), places.rows((lanes, beside), jnp.int32))
    rounded = rounds_products(subject.value_precision, config.hidden_size, places.dtype, faster=True)
    exact, after = subject_rows.runner_function(config, layer, False), networks.after(places.params, layer)
    run = Partial(subject_rows.runner_function(config, layer, False, rounded), places.matrices(after, rounded))
    problem, state = _value_structs(places, lanes, aims, beside, sizes, read, layer)
    alone, _ = _value_structs(places, lanes, 1, 0, pack_sizes(workload, 1), read, layer)
    carry = stepping.LanesCarry(state, places.rows((lanes,), jnp.bool_), places.rows((lanes,), jnp.int32))
    step = Partial(values.value_step(subject.value._replace(steps=0)), run)
    number, half = places.rows((places.data,), jnp.int32), places.rows((max(places.data, lanes // 2),), jnp.int32)
    # On one part of a mesh the loop is that of one device.
    over = places.mesh if places.data > 1 else None
    return [
        Program("subjects: keys", subject_site.fit_keys, (*lanewise, memory), {"rounds": subject.key_rounds},
                runs={"subject": 1.0}),
        *fork_programs(places, "values, rows", lanes, sizes, layer, chunks, rounded),
        Program("values: what is said unedited", subject_rows.log_probs_at, said, runs=chunks),
        Program("values: slopes before any step", subject_values.target_slope,
                (Partial(exact, after), alone.known, alone.targets), runs=chunks),
        # A look at each number of steps, none included.
        Program("values: steps", stepping.advance_lanes, (step, carry, problem, number, subject.value.steps, over),
                trips=subject.value.steps + 1, runs=chunks),
        Program("values: fewer lanes", stepping.take_lanes_by_part,
                ((carry, problem), half, lanes // places.data, over), runs=chunks),
    ]  # fmt: skip


def _value_structs(
    places: Places, lanes: int, aims: int, beside: int, sizes: PackSizes, read: int, layer: int
) -> tuple[Any, Any]:
    """What values are trained on, and where training starts."""
    config, width, count = places.config, places.config.hidden_size, aims + beside
    fork = fork_structs(places, lanes, sizes, layer)
    first = places.rows((lanes, count), jnp.int32)
    known = KnownRows(tuple(fork[:-1]), first, places.rows((lanes, aims * read + beside), jnp.int32))
    wanted = (lanes, aims, read)
    targets = TargetRows(places.rows((lanes, aims)), places.rows(wanted, jnp.int32), places.rows(wanted))
    kept = KeptRows(places.rows((lanes, beside)), places.over_vocabulary((lanes, beside, config.vocabulary)))
    move = places.rows((lanes, width))
    state = values.ValueState(
        move, places.rows((lanes, aims)), places.rows((lanes, beside)), places.rows((lanes,), jnp.bool_)
    )
    return values.ValueProblem(known, targets, kept, places.rows((lanes, 1)), places.array((), jnp.int32)), state
