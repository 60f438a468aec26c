"""All measurements of ``tpatch bench`` in one run, and the table and picture of them."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tpatch_jax.benchmarks.edits_to_time import edits_to_time
from tpatch_jax.benchmarks.gauges import median_and_spread
from tpatch_jax.benchmarks.overhead import generation_overhead
from tpatch_jax.benchmarks.paper_loop import paper_step_seconds
from tpatch_jax.benchmarks.probe import probe
from tpatch_jax.benchmarks.recompilation import recompilations
from tpatch_jax.editors.model_memory import collect_model_memory
from tpatch_jax.editors.tpatcher.editor import tpatcher
from tpatch_jax.editors.tpatcher.settings import PRESETS
from tpatch_jax.models.model import Model
from tpatch_jax.storage.cache import cache_folder
from tpatch_jax.typing import Progress

__all__ = ["FULL", "QUICK", "Plan", "bench"]


class Plan(NamedTuple):
    """What a run measures.

    Attributes:
        edits: of each site, how many edits in one call.
        repeats: how often calls of at most `TIMED_AGAIN` edits are timed; larger ones are timed once.
        compared: how many edits the paper's loop is compared on.
        paper_steps: how many steps of the paper's loop are timed for each of them.
        paper_whole: whether the paper's stopping rule is followed to its end to see how many steps it takes; else the
            least that it allows are counted.
        neurons: with how many neurons generation is timed.
        tokens: how many tokens are generated at a time.
        rounds: how often generation is timed.
        warm: edit counts after which nothing shall be compiled any more.
        new: edit counts that follow.
    """

    edits: Mapping[str, tuple[int, ...]]
    repeats: int
    compared: int
    paper_steps: int
    paper_whole: bool
    neurons: tuple[int, ...]
    tokens: int
    rounds: int
    warm: tuple[int, ...]
    new: tuple[int, ...]


TIMED_AGAIN = {"last": 256, "subject": 16}
"""Calls of more edits take so long that their spread says little."""

FULL = Plan(
    edits={"last": (1, 16, 256, 4096), "subject": (1, 16, 256)},
    repeats=3,
    compared=8,
    paper_steps=10,
    paper_whole=True,
    neurons=(0, 100, 1000, 10_000),
    tokens=32,
    rounds=9,
    warm=(1, 2, 4, 8, 16, 32, 64, 128, 256, 300),
    new=(3, 7, 21, 50, 113, 200, 299),
)
QUICK = Plan(
    edits={"last": (1, 16, 64), "subject": (1, 4)},
    repeats=2,
    compared=8,
    paper_steps=2,
    paper_whole=False,
    neurons=(0, 100, 1000, 10_000),
    tokens=12,
    rounds=5,
    warm=(1, 2, 4, 8, 16),
    new=(3, 7, 13),
)


def bench(
    model: Model, name: str, plan: Plan, file: str | Path | None, dtype: str | None, progress: Progress
) -> dict[str, Any]:
    """Measure what editing costs.

    Args:
        model: the model, a decoder.
        name: what it is loaded as in other processes.
        plan: `FULL` or `QUICK`.
        file: see `edits_to_time`.
        dtype: of the weights.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        ``forward_equivalents_per_edit`` and ``fit_forward_equivalents_per_edit`` (by site and number of edits, medians;
        ``spread`` has the quartiles), ``seconds_per_edit``, ``exact`` and ``locality_tokens`` with all edits active,
        ``peak_memory`` in bytes and ``peak_memory_ratio`` (most edits over 16 in the last layer, without the patches
        themselves), ``speedup_over_paper_loop`` (``single`` edits, and as a ``batch``), ``paper_loop``,
        ``attached_overhead`` and ``merged_overhead`` (by number of neurons), and ``recompilations``.
    """
    began, file = time.perf_counter(), None if file is None else str(file)
    probes: dict[str, dict[int, dict[str, Any]]] = {}
    total, done = sum(map(len, plan.edits.values())), 0
    for site, counts in plan.edits.items():
        for count in counts:
            progress("editing", done, total)
            repeats = plan.repeats if count <= TIMED_AGAIN[site] else 1
            probes.setdefault(site, {})[count] = probe(name, site, count, repeats, file, dtype)
            done += 1
    progress("editing", done, total)
    progress("the paper's loop", 0, 1)
    paper = _against_paper(model, plan, file)
    progress("the paper's loop", 1, 1)
    progress("generation", 0, 1)
    overhead = generation_overhead(model, plan.neurons, plan.tokens, plan.rounds)
    progress("generation", 1, 1)
    progress("new numbers of edits", 0, 1)
    compiled, growth = recompilations(model, edits_to_time(max(*plan.warm, *plan.new), file), plan.warm, plan.new)
    progress("new numbers of edits", 1, 1)

    def each(figure: Callable[[int, dict[str, Any]], Any]) -> dict[str, dict[str, Any]]:
        return {
            site: {str(count): figure(count, measured) for count, measured in by_count.items()}
            for site, by_count in probes.items()
        }

    last = probes["last"]
    most = max(last)
    return {
        "model": name,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "forward_equivalents_per_edit": each(lambda _, measured: statistics.median(measured["forward_equivalents"])),
        "fit_forward_equivalents_per_edit": each(
            lambda _, measured: statistics.median(measured["fit_forward_equivalents"])
        ),
        "spread": each(lambda _, measured: median_and_spread(measured["forward_equivalents"])),
        "seconds_per_edit": each(lambda count, measured: statistics.median(measured["seconds"]) / count),
        "exact": each(lambda _, measured: measured["exact"]),
        "locality_tokens": each(lambda _, measured: measured["locality_tokens"]),
        "peak_memory": each(lambda _, measured: measured["peak"]),
        "peak_memory_ratio": (last[most]["peak"] - last[most]["patch"]) / last[16]["peak"],
        "speedup_over_paper_loop": {form: paper[form] for form in ("single", "batch")},
        "paper_loop": {name: value for name, value in paper.items() if name not in ("single", "batch")},
        **{
            f"{form}_overhead": {str(count): ratio["median"] for count, ratio in overhead[form].items()}
            for form in ("attached", "merged")
        },
        "overhead_spread": overhead,
        "recompilations": compiled,
        "memory_growth": growth,
        "seconds": time.perf_counter() - began,
    }


def _against_paper(model: Model, plan: Plan, file: str | None) -> dict[str, Any]:
    """Seconds of the same edits by this library, one by one and together, and by the paper's loop."""
    requests = edits_to_time(plan.compared, file)
    key, known = jax.random.key(0), collect_model_memory(model, model.layer(None), cache=cache_folder())

    def editor(preset: str):
        return tpatcher(dataclasses.replace(PRESETS[preset], site="last"), cache=cache_folder())

    with jax.default_matmul_precision("highest"):
        ours = editor("default")
        state = ours.init(model, key)

        def together() -> tuple[float, list[bool]]:
            info = ours.step(state, requests, key)[1]
            return info.seconds, [request.held for request in info.requests]

        def apart() -> tuple[list[float], list[bool]]:
            infos = [ours.step(state, [request], key)[1] for request in requests]
            return [info.seconds for info in infos], [info.requests[0].held for info in infos]

        together()  # compiled now, as is the next
        apart()
        batch = [together() for _ in range(plan.repeats)]
        single = [apart() for _ in range(plan.repeats)]
        least = PRESETS["paper"].fit.least_steps
        steps, held = [least] * len(requests), [True] * len(requests)
        if plan.paper_whole:
            # The same arithmetic on cached queries takes as many steps.
            paper_editor = editor("paper")
            info = paper_editor.step(paper_editor.init(model, key), requests, key)[1]
            held = [request.held for request in info.requests]
            # One that holds without a neuron was right before; one that fails has run to the end.
            steps = [request.steps or PRESETS["paper"].fit.most_steps for request in info.requests]
    step_seconds = paper_step_seconds(model, known, requests, plan.paper_steps)
    # Where both succeed; if the paper's loop never does, its least steps are what it would need at the very least.
    both = [number for number in range(len(requests)) if held[number] and batch[0][1][number] and single[0][1][number]]
    if not both:
        both, steps = list(range(len(requests))), [least] * len(requests)
    paper = sum(step_seconds[number] * steps[number] for number in both)
    own_batch = statistics.median(seconds for seconds, _ in batch)
    own_single = statistics.median(sum(seconds[number] for number in both) for seconds, _ in single)
    return {
        # All edits were made in the batch; those that do not count are given to it for nothing.
        "single": paper / own_single,
        "batch": paper / own_batch,
        "edits": len(requests),
        "counted": len(both),
        "steps": steps,
        "steps_followed": plan.paper_whole,
        "step_seconds": statistics.median(step_seconds),
        "steps_timed": plan.paper_steps * len(requests),
        "paper_seconds": paper,
        "batch_seconds": own_batch,
        "single_seconds": own_single,
    }
