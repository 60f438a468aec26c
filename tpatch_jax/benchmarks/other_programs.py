"""The compiled programs of the other methods, of generation and of evaluation; see `tpatch_jax.benchmarks.programs`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jax.tree_util import Partial

from tpatch_jax.benchmarks.programs import (
    Places,
    Program,
    Workload,
    block_programs,
    fork_programs,
    fork_structs,
    pack_sizes,
)
from tpatch_jax.core import ffn
from tpatch_jax.core import lanes as stepping
from tpatch_jax.core.sizes import round_up
from tpatch_jax.editors import grace
from tpatch_jax.editors.fine_tuning import step as fine_tuning
from tpatch_jax.editors.rome import hidden_moment, rank_one, subject_value
from tpatch_jax.editors.rome.memit import MEMIT_PRESETS, memit_layers
from tpatch_jax.editors.rome.rome import rome_layer
from tpatch_jax.editors.serac import networks as serac_networks
from tpatch_jax.editors.serac.training import counterfactual_loss, scope_loss
from tpatch_jax.editors.subject_rows import KnownRows, runner
from tpatch_jax.evaluation import scoring
from tpatch_jax.models import generation, networks, stack
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.model import Model
from tpatch_jax.models.sharding import MODEL_AXIS
from tpatch_jax.training import loop
from tpatch_jax.typing import Params

__all__ = ["other_programs"]


def other_programs(places: Places, workload: Workload | None = None) -> list[Program]:
    """The programs of ROME, MEMIT, AlphaEdit, GRACE, fine-tuning and SERAC, of generation with a cache, of evaluation.

    Args:
        places: the network and the devices.
        workload: what a request asks for.

    Returns:
        Each program once; they run at no site of the T-Patcher editor.
    """
    workload = workload or Workload()
    programs = [*_whole_programs(places, workload)] if places.config.architecture != "decoder" else []
    programs += [*_evaluation_programs(places, workload), *_fine_tuning_programs(places, workload)]
    config = places.config
    if config.architecture == "decoder":
        programs += [*_generation_programs(places), *_grace_programs(places, workload)]
        if config.layers > 1:
            programs += _rome_programs(places, workload)
        programs += _counterfactual_programs(places, workload)
    if config.architecture == "encoder" and not config.labels:
        programs += _scope_programs(places, workload)
    return programs


@partial(jax.jit, static_argnames=("config", "layer"))
def _trace(config: NetworkConfig, layer: int, params: Params, batch: Any) -> networks.Trace:
    return networks.trace(config, params, batch, layer)


@jax.jit
def _resume(network: Partial, traced: networks.Trace, output: jax.Array) -> jax.Array:
    return network(traced, output)


def _whole_programs(places: Places, workload: Workload) -> list[Program]:
    """Networks that read whole inputs, cut in their last layer: there patches go."""
    config, params, last = places.config, places.params, places.config.layers - 1
    rows = 32
    tokens = places.rows((rows, workload.context), jnp.int32)
    batch = networks.Pair(tokens, tokens) if config.encoder else tokens
    if config.image is not None:
        batch = places.rows((rows, config.image.channels, *config.image.size), places.dtype)
    traced = jax.eval_shape(partial(_trace, config, last), params, batch)
    traced = jax.tree.map(lambda leaf: places.rows(leaf.shape, leaf.dtype), traced)
    network = Partial(partial(networks.resume, config), params)
    return [
        Program("inputs: trace", _trace, (config, last, params, batch)),
        Program("inputs: resume", _resume, (network, traced, traced.output)),
    ]


def _evaluation_programs(places: Places, workload: Workload) -> list[Program]:
    config, width, rows, neurons = places.config, places.config.hidden_size, 64, 1024
    if not networks.pointwise(config):
        return []
    part, wanted = places.stream(rows, width), places.rows((rows,), jnp.int32)
    patch, long = places.patch(neurons), (rows, width)
    programs = [
        Program("evaluation: scores of rows", scoring.read_scores, (config, places.last_weights, part, part, wanted)),
        Program("evaluation: where neurons fire", scoring.which_fire, (patch, places.rows(long))),
        Program(
            "evaluation: outputs with neurons", scoring.correct_outputs, (patch, places.rows(long), places.rows(long))
        ),
    ]
    if config.architecture == "decoder":
        layer = places.params["layers"][config.layers - 1]
        args = _block_args(places, rows, workload.prompt, {**layer, "ffn": ffn.attach(layer["ffn"], patch, relu=True)})
        programs.append(Program("evaluation: block with neurons beside it", stack.run_block, args))
    return programs


def _block_args(places: Places, rows: int, tokens: int, layer: Any) -> tuple[Any, ...]:
    config = places.config
    stream, numbers = places.stream(rows, tokens, config.hidden_size), places.rows((rows, tokens), jnp.int32)
    return config, config.kind(config.layers - 1), layer, stream, numbers, None, stack.Around()


def _generation_programs(places: Places, prompts: int = 8, tokens: int = 32, total: int = 128) -> list[Program]:
    config = places.config
    hidden, scalar = places.stream(prompts, config.hidden_size), places.array(())
    choose = (config, places.last_weights, hidden, places.key(), scalar)
    picked = places.stream(prompts, tokens, config.hidden_size), places.rows((prompts,), jnp.int32)
    return [
        *block_programs(places, "generation: prompts", prompts, tokens, 0, config.layers, total),
        *block_programs(places, "generation: next token", prompts, 1, 0, config.layers, total),
        Program("generation: last place", generation.pick_places, picked),
        Program("generation: most probable token", generation.choose_tokens, (*choose, 0)),
        Program("generation: drawn token", generation.choose_tokens, (*choose, 50)),
    ]


def _offset_program(
    places: Places, name: str, layer: int, requests: int, workload: Workload, settings: Any, stream: bool
):
    """Steps on ROME's or MEMIT's values: the loop of `tpatch_jax.editors.rome.subject_value.train_offsets`."""
    config, width = places.config, places.config.hidden_size
    each, count = 6, round_up(workload.target, 2)
    rows = each + 1
    fork = fork_structs(places, requests, pack_sizes(workload, rows), layer)
    program = subject_value.value_program(settings)
    stub: Any = Model(config, places.params, None)  # pyright: ignore[reportArgumentType]
    loss = Partial(program.loss, runner(stub, layer, stream=stream))
    wanted = (requests, each, count)
    problem = subject_value.OffsetProblem(
        KnownRows(
            tuple(fork[:-1]), places.rows((requests, rows), jnp.int32),
            places.rows((requests, each * count + 1), jnp.int32),
        ),
        places.rows(wanted, jnp.int32), places.rows(wanted), places.rows((requests,)),
    )  # fmt: skip
    one = places.rows((requests,))
    known = subject_value.OffsetState(one, one, places.over_vocabulary((requests, config.vocabulary)))
    moves = places.rows((requests, width))
    moments = jax.tree.map(
        lambda leaf: places.rows(leaf.shape, leaf.dtype), jax.eval_shape(program.optimiser.init, moves)
    )
    start = stepping.Descent(moves, known, moments)
    step = Partial(stepping.descent_of(program.optimiser), loss, Partial(program.project), Partial(program.stop))
    carry = stepping.LanesCarry(start, places.rows((requests,), jnp.bool_), places.rows((requests,), jnp.int32))
    most = settings.value_steps + settings.value_extra_steps - 1
    args = (step, carry, problem, places.array((1,), jnp.int32), most)
    return Program(name, stepping.advance_lanes, args, trips=settings.value_steps)


def _rome_programs(places: Places, workload: Workload) -> list[Program]:
    config, width = places.config, places.config.hidden_size
    layer, inner = rome_layer(config), config.ffn_width
    split = PartitionSpec(None, MODEL_AXIS) if inner % places.model == 0 else PartitionSpec()
    square = places.array((inner, inner), jnp.float32, split)
    network = places.params["layers"][layer]["ffn"]
    key, value = places.array((inner,)), places.array((width,))
    together = MEMIT_PRESETS["default"].together
    programs = [
        Program("ROME: sum of second moments", hidden_moment.sum_moments,
                (network, places.stream(16, 64, width), places.rows((16, 64)), config.activation)),
        Program("ROME: ridge", rank_one.damped, (square, places.array(()))),
        Program("ROME: solve", rank_one.solve_rank_one, (network["down"], key, value, square, key, None)),
        Program("AlphaEdit: solve", rank_one.solve_projected,
                (places.rows((128, inner)), places.rows((128, width)), square, places.array(()), square)),
        _offset_program(
            places, "ROME: steps on a value", layer, 1, workload, subject_value.ValueSettings(clamp=4.0), False
        ),
    ]  # fmt: skip
    if not config.sandwich and not config.post_norm:
        edits = 128
        last = memit_layers(config)[-1]
        programs += [
            *fork_programs(places, "MEMIT, rows", together, pack_sizes(workload, 7), last),
            _offset_program(
                places, "MEMIT: steps on values", last, together, workload, MEMIT_PRESETS["default"].value, True
            ),
            Program("MEMIT: solve", rank_one.solve_distributed,
                    (places.rows((edits, inner)), places.rows((edits, width)), square, places.array(()), None)),
        ]  # fmt: skip
    return programs


def _fine_tuning_programs(places: Places, workload: Workload) -> list[Program]:
    """Steps of Adam: on the last feed-forward network by what it reads, and on a whole network."""
    config, width, last = places.config, places.config.hidden_size, places.config.layers - 1
    rows, kept = 64, 256
    programs = []

    def like(part: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding), part)

    def moments_of(optimiser: Any, trained: Any) -> Any:
        """Adam's state, each array where its parameter lies."""
        by_shape = {leaf.shape: leaf for leaf in jax.tree.leaves(trained)}
        state = jax.eval_shape(optimiser.init, trained)
        return jax.tree.map(
            lambda leaf: (
                by_shape[leaf.shape] if leaf.shape in by_shape and leaf.ndim else places.array(leaf.shape, leaf.dtype)
            ),
            state,
        )

    scalar = places.array(())
    if networks.pointwise(config):
        trained = like({"layers": {last: {"ffn": places.params["layers"][last]["ffn"]}}})
        frozen = {**places.last_weights, "layers": {last: places.params["layers"][last]}}
        cut = lambda count: fine_tuning.Cut(places.stream(count, width), places.stream(count, width))  # noqa: E731
        lesson = fine_tuning.Lesson(cut(rows), places.rows((rows,), jnp.int32), places.rows((rows,)))
        calm = fine_tuning.Calm(cut(kept), places.stream(kept, width), places.stream(kept, width), places.rows((kept,)))
        args = (config, trained, moments_of(fine_tuning.ADAM, trained), frozen, lesson, calm, scalar, scalar, scalar)
        programs += [
            Program("fine-tuning: step on the last FFN", fine_tuning.update, args),
            Program("fine-tuning: look", fine_tuning.look, (config, trained, frozen, lesson)),
        ]
    tokens = places.rows((32, workload.context), jnp.int32)
    batch = networks.Pair(tokens, tokens) if config.encoder else tokens
    if config.architecture == "decoder":
        # Whole layers are trained here as well; one stands for all.
        trained = like({"layers": {last: places.params["layers"][last]}})
        seen = fine_tuning.Whole(batch, places.rows((rows,), jnp.int32), places.rows((rows,), jnp.int32))
        if last < 4:
            lesson = fine_tuning.Lesson(seen, places.rows((rows,), jnp.int32), places.rows((rows,)))
            args = (
                config,
                trained,
                moments_of(fine_tuning.ADAM, trained),
                places.params,
                lesson,
                None,
                scalar,
                scalar,
                scalar,
            )
            programs.append(Program("fine-tuning: step on whole layers", fine_tuning.update, args))
        return programs
    if config.labels or config.encoder:
        params = like(places.params)
        optimiser = loop.make_optimizer(loop.FinetuneSettings(), 100)
        answers = places.rows((32,) if config.labels else (32, workload.context), jnp.int32)
        weight = places.rows(answers.shape)
        args = (
            loop.cross_entropy_loss(config),
            optimiser,
            params,
            moments_of(optimiser, params),
            (batch, answers, weight),
        )
        programs += [
            Program("training: step on the network", loop.take_step, args),
            Program("training: which rows are right", loop.right_rows, (config, places.params, batch, answers, weight)),
        ]
    return programs


def _grace_programs(places: Places, workload: Workload) -> list[Program]:
    """Values of a codebook, trained through the rest of the network; in the last layer the loop is the same."""
    config, width, rows, tokens = places.config, places.config.hidden_size, 8, workload.context
    last, entries = config.layers - 1, 256
    stream = places.stream(rows, tokens, width)
    context = {"residual": stream, "positions": places.rows((rows, tokens), jnp.int32)}
    book = grace.Codebook(places.array((entries, width)), places.array((entries,)), places.array((entries, width)))
    target = (rows, workload.target)
    lessons = grace.Lessons(
        places.rows((rows,), jnp.int32),
        places.rows(target, jnp.int32),
        places.rows(target, jnp.int32),
        places.rows(target),
    )
    scalar = places.array(())
    args = (config, last, 100, places.params, (stream, stream, context), book, lessons, scalar, scalar)
    return [Program("GRACE: steps on values", grace.train_entries, args, trips=20)]


def _counterfactual_programs(places: Places, workload: Workload) -> list[Program]:
    """SERAC's counterfactual model: the first layers of the network, in float32, embeddings frozen."""
    import dataclasses

    layers = min(4, places.config.layers)
    config = dataclasses.replace(places.config, layers=layers, windows=places.config.windows[:layers])
    small = Places(config, places.mesh, "float32")
    trained = {name: small.params[name] for name in ("layers", "norm") if name in small.params}
    frozen = {name: entry for name, entry in small.params.items() if name not in trained}
    rows, tokens = 32, 2 * workload.context
    places_read = (rows, workload.target)
    lesson = (
        frozen, places.rows((rows, tokens), jnp.int32), places.rows(places_read, jnp.int32),
        places.rows(places_read, jnp.int32), places.rows(places_read),
    )  # fmt: skip
    return [
        _training_step("SERAC: step on the counterfactual model", small, counterfactual_loss(config), trained, lesson)
    ]


def _scope_programs(places: Places, workload: Workload) -> list[Program]:
    """SERAC's scope classifier: an encoder, a relation between the texts of a batch."""
    config, rows = places.config, 32
    tokens = places.rows((2 * rows, workload.context), jnp.int32)
    return [
        Program("SERAC: embeddings of texts", serac_networks.embed, (config, places.params, tokens)),
        _training_step("SERAC: step on the scope classifier", places, scope_loss(config), places.params,
                       (tokens, places.rows((rows, rows), jnp.int32))),
    ]  # fmt: skip


def _training_step(name: str, places: Places, loss: Any, trained: Any, lesson: tuple[Any, ...]) -> Program:
    optimiser: optax.GradientTransformation = loop.make_optimizer(loop.FinetuneSettings(), 100)
    by_shape = {leaf.shape: leaf for leaf in jax.tree.leaves(trained)}
    moments = jax.tree.map(
        lambda leaf: (
            by_shape.get(leaf.shape, places.array(leaf.shape, leaf.dtype))
            if leaf.ndim
            else places.array((), leaf.dtype)
        ),
        jax.eval_shape(optimiser.init, trained),
    )
    return Program(name, loop.take_step, (loss, optimiser, trained, moments, lesson))
