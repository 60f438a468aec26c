#!/usr/bin/env bash
# Question: on a CPU, is a log-softmax right behind a product of bfloat16 (logits of a few tokens over a large vocabulary) worth fusing
#   with it, as XLA does?
# Good guess: yes, or it makes no difference; the maximum is taken while the product's numbers are still in a cache, and the product
#   is by far the larger work.
# What happens: XLA's CPU compiler puts the product, the maximum and the subtraction into one fusion of its new library of kernels,
#   which is slower than both alone, about twice in all on a processor with AMX. A conditional around the product, whose branch is
#   always the same, keeps the two apart and gives the same numbers in less time. In float32 the two are about as fast.
# Seen with jax 0.10.2 and jaxlib 0.10.2, 2026-12-01. Times are shown; what is required is the fusion, and on a processor with AMX
#   that it is not the faster one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==0.10.2" "jaxlib==0.10.2"
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

TOKENS, WIDTH, WORDS = 40, 576, 49152


def product(x, w):
    return jnp.matmul(x.astype(w.dtype), w, preferred_element_type=jnp.float32)


def fused(x, w):
    return jax.nn.log_softmax(product(x, w))


def apart(x, w):
    nothing = jnp.zeros((TOKENS, WORDS), jnp.float32)
    return jax.nn.log_softmax(jax.lax.cond(x[0, 0] < jnp.inf, lambda: product(x, w), lambda: nothing))


def computations(program):
    return re.split(r"\n}\n", program.as_text())


def fastest(function, *given):
    times = []
    for _ in range(30):
        began = time.perf_counter()
        function(*given).block_until_ready()
        times.append(time.perf_counter() - began)
    return 1e3 * min(times[1:])


rng, took = np.random.default_rng(0), {}
x = jnp.asarray(rng.normal(size=(TOKENS, WIDTH)), jnp.float32)
for dtype in (jnp.bfloat16, jnp.float32):
    w = jnp.asarray(rng.normal(size=(WIDTH, WORDS)), dtype)
    programs = {f.__name__: jax.jit(f).lower(x, w).compile() for f in (product, fused, apart)}
    took[dtype.__name__] = {name: fastest(program, x, w) for name, program in programs.items()}
    print(dtype.__name__, {name: f"{time_:.1f} ms" for name, time_ in took[dtype.__name__].items()})
    np.testing.assert_allclose(programs["fused"](x, w), programs["apart"](x, w), atol=1e-3)
    if dtype == jnp.bfloat16:
        together = [" dot(" in body and "reduce_max" in body and "subtract(" in body for body in computations(programs["fused"])]
        assert any(together), "the product and the maximum are not in one computation"
        assert not any(" dot(" in body and " reduce(" in body for body in computations(programs["apart"]))
print("jax", jax.__version__)
if "amx_bf16" in Path("/proc/cpuinfo").read_text().split():
    assert took["bfloat16"]["fused"] > took["bfloat16"]["apart"]
PYTHON
