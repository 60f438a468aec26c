#!/usr/bin/env bash
# Question: does jax.lax.optimization_barrier keep XLA from fusing what stands before it into what stands behind it, on the CPU?
# Good guess: yes; its documentation says that operations before the barrier may not be fused into one kernel with those
#   after it. So a cosine of positions, computed once and then used by every head, stays a computation of its own.
# What happens: on the CPU the barrier is dropped before fusion. The compiled program holds no barrier, and the cosine stands
#   inside the fusion over all heads, where it is computed once for each head; with and without the barrier alike.
# Seen with jax 0.10.2 and jaxlib 0.10.2, 2026-11-29.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==0.10.2" "jaxlib==0.10.2"
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp


def rotate(angles, heads, barrier):
    cosine = jnp.cos(angles)
    if barrier:
        cosine = jax.lax.optimization_barrier(cosine)
    return heads * cosine[:, None, :]


angles, heads = jnp.ones((128, 64)), jnp.ones((128, 9, 64))
seen = {}
for barrier in (False, True):
    lowered = jax.jit(rotate, static_argnums=2).lower(angles, heads, barrier)
    asked = "optimization_barrier" in lowered.as_text()
    compiled = lowered.compile().as_text()
    parts, entry = compiled.split("ENTRY ")
    inside = [line for line in parts.splitlines() if " cosine(" in line]
    seen[barrier] = (asked, "opt-barrier" in compiled, len(inside), " cosine(" in entry)
    print(f"barrier written: {asked}, kept: {seen[barrier][1]}, cosines inside a fusion: {len(inside)}, alone: {seen[barrier][3]}")
print("jax", jax.__version__)
assert seen[True][0] and not seen[True][1]
assert seen[True][2:] == seen[False][2:] == (1, False)
PYTHON
