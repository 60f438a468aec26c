"""What generation costs with many neurons, attached beside a feed-forward network or merged into it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tpatch_jax.benchmarks.gauges import median_and_spread, seconds_of
from tpatch_jax.core.patch import Patch
from tpatch_jax.models import generation
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach, merge

__all__ = ["generation_overhead"]

PROMPT = "The history of the city begins"


def _neurons(model: Model, count: int) -> Patch:
    """Neurons like those that are fitted, which seldom fire."""
    keys = jax.random.split(jax.random.key(count), 2)
    width, dtype = model.config.hidden_size, jax.tree.leaves(model.params)[0].dtype
    key, value = (jax.random.normal(one, (count, width), dtype) * width**-0.5 for one in keys)
    return Patch(key, jnp.full(count, -8, dtype), value)


def generation_overhead(
    model: Model, counts: Sequence[int], tokens: int, repeats: int
) -> dict[str, dict[int, dict[str, float]]]:
    """Time of greedy generation with so many neurons in the last layer over that without any, in the same run.

    Args:
        model: a decoder.
        counts: how many neurons; 0 compares the model with itself, which says how much is noise.
        tokens: how many tokens are generated at a time.
        repeats: how often each is timed, in turn.

    Returns:
        Under ``"attached"`` and ``"merged"``, for each count the median of the ratios and their quartiles.
    """
    prompt = [model.encode_prompt(PROMPT)]

    def run(changed: Model):
        return lambda: generation.greedy(changed.config, changed.params, prompt, tokens)

    runs = {("attached", 0): run(model), ("merged", 0): run(model), "plain": run(model)}
    for count in counts:
        if count:
            patch = _neurons(model, count)
            runs["attached", count] = run(attach(model, patch))
            runs["merged", count] = run(merge(model, patch))
    seconds = seconds_of(runs, repeats)

    def ratios(name: tuple[str, int]) -> dict[str, float]:
        return median_and_spread([took / plain for took, plain in zip(seconds[name], seconds["plain"], strict=True)])

    return {form: {count: ratios((form, count)) for count in counts} for form in ("attached", "merged")}
