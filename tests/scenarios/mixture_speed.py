"""What patches cost a mixture of experts when it writes: attached, attached with ReLU, merged, beside the model alone.

In each round all four write the same tokens, in another order each time; what is said is the median of the rounds'
ratios, of CPU time. Random weights, silent neurons: the four write the same. Ten minutes a family on one core:

python tests/scenarios/mixture_speed.py mixtral qwen3_moe olmoe
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import tpatch_jax as tp
from tpatch_jax.core.patch import Patch
from tpatch_jax.models import generation

sys.path.insert(0, str(Path(__file__).parents[1]))

ROUNDS, TOKENS, NEURONS, LAYER = 81, 16, 16, 2
SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {"hidden_size": 768, "moe_intermediate_size": 512, "num_experts": 32, "num_experts_per_tok": 4},
    "olmoe": {"hidden_size": 768, "intermediate_size": 512, "num_experts": 32, "num_experts_per_tok": 4},
}
"""So large that time goes into products and not into starting programs."""


def make(name: str) -> tp.Model:
    """A random model of four layers."""
    from conftest import make_tiny_model
    from tiny_families import tiny_settings

    heads = SIZES[name]["hidden_size"] // 64
    more = {"head_dim": 64, "num_attention_heads": heads, "num_key_value_heads": heads // 2, "num_hidden_layers": 4}
    return make_tiny_model(defaults=tiny_settings(name, **SIZES[name], **more, max_position_embeddings=256))


def measure(model: tp.Model) -> tuple[float, dict[str, float]]:
    """Milliseconds that the model alone takes for a token, and how many times as long each form does."""
    rng = np.random.default_rng(0)
    key, value = (jnp.asarray(rng.normal(size=(NEURONS, model.config.hidden_size)), jnp.float32) for _ in range(2))
    patches = {LAYER: Patch(0.05 * key, jnp.full(NEURONS, -30.0), 0.1 * value)}
    models = {
        "alone": model,
        "attached": tp.attach(model, patches),
        "attached, ReLU": tp.attach(model, patches, relu=True),
        "merged": tp.merge(model, patches),
    }
    prompt = rng.integers(1, 260, 16).tolist()

    def write(form: str) -> list[list[int]]:
        return generation.greedy(models[form].config, models[form].params, [prompt], TOKENS)

    said = [write(form) for form in models]
    assert all(tokens == said[0] for tokens in said)
    times: dict[str, list[float]] = {form: [] for form in models}
    for number in range(ROUNDS):
        first = number % len(models)
        for form in [*models][first:] + [*models][:first]:
            begun = time.process_time()
            write(form)
            times[form].append(time.process_time() - begun)
    ratios = {form: float(np.median(np.divide(taken, times["alone"]))) for form, taken in times.items()}
    return 1000 * float(np.median(times["alone"])) / TOKENS, ratios


def main(names: Sequence[str]) -> None:
    """Prints a line for each family."""
    for name in names or SIZES:
        alone, ratios = measure(make(name))
        print(f"{name}: {alone:.1f} ms a token;", ", ".join(f"{form} {ratio:.3f}" for form, ratio in ratios.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
