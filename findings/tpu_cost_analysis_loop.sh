#!/usr/bin/env bash
# Question: how many FLOPs does the TPU compiler's cost analysis report for a loop whose trip count it knows?
# Good guess: those of the body times the trip count; the count is a constant in the program, and the compiler's own
#   schedule has to know how long the loop takes.
# What happens: `compiled.cost_analysis()["flops"]` has the body once, whatever the count: a product that is taken seven times
#   in a fori_loop costs as much as one that is taken once. Written out seven times it costs seven times as much. Rooflines of
#   training loops and of scans over layers are wrong by the number of turns, unless that is multiplied in by hand.
# Seen with jax 0.10.2, jaxlib 0.10.2, libtpu 0.0.42.1, 2026-11-30; no TPU is needed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==0.10.2" "jaxlib==0.10.2" "libtpu==0.0.42.1"
cd "$folder"
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

chip = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=(1, 1, 1)).devices[0]
place = NamedSharding(Mesh([chip], "x"), PartitionSpec())
matrix = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=place)


def looped(x, y, times):
    return jax.lax.fori_loop(0, times, lambda _, z: z @ y, x)


def written_out(x, y, times):
    for _ in range(times):
        x = x @ y
    return x


def flops(function, times):
    compiled = jax.jit(function, static_argnums=2).lower(matrix, matrix, times).compile()
    return compiled.cost_analysis()["flops"]


one = flops(written_out, 1)
looped_seven, written_seven = flops(looped, 7), flops(written_out, 7)
print(f"one product {one:.3g}, seven in a loop {looped_seven:.3g}, seven written out {written_seven:.3g}; jax {jax.__version__}")
assert written_seven > 6.5 * one
assert looped_seven < 1.5 * one
PYTHON
