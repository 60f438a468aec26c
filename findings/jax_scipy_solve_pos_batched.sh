#!/usr/bin/env bash
# Question: does jax.scipy.linalg.solve treat a batch of matrices [n, r, r] with right-hand sides [n, r, k] alike for each assume_a?
# Good guess: yes; both are plainly batches of two-dimensional systems, and assume_a only picks the factorization.
# What happens: assume_a="gen" solves them silently. assume_a="pos" gives the same numbers, but with a FutureWarning that
#   "batched 1D solves with b.ndim > 1 are deprecated", although no right-hand side is one-dimensional; where warnings
#   are errors it raises. jnp.linalg.cholesky with jax.scipy.linalg.cho_solve on the same arrays does not warn.
# Seen with jax 0.10.2 and jaxlib 0.10.2, 2026-11-29.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==0.10.2" "jaxlib==0.10.2"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import jax
import jax.numpy as jnp

matrices = jnp.stack([2 * jnp.eye(3), 3 * jnp.eye(3)])
right = jnp.arange(12.0).reshape(2, 3, 2)


def solve(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solution = function()
    return solution, [f"{one.category.__name__}: {one.message}" for one in caught]


general, silent = solve(lambda: jax.scipy.linalg.solve(matrices, right, assume_a="gen"))
positive, warned = solve(lambda: jax.scipy.linalg.solve(matrices, right, assume_a="pos"))
direct, quiet = solve(lambda: jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(matrices), True), right))
print("jax", jax.__version__)
print("gen", general.shape, silent)
print("pos", positive.shape, warned)
print("cho_solve", direct.shape, quiet)
assert jnp.allclose(general, positive) and jnp.allclose(general, direct)
assert not silent and not quiet
assert len(warned) == 1 and warned[0].startswith("FutureWarning") and "batched 1D solves" in warned[0]
PYTHON
