#!/usr/bin/env bash
# Question: does `precision="BF16_BF16_F32"` round the factors of a product of float32 on a CPU, where it is accepted?
# Good guess: yes. An algorithm "names the computation exactly" (JAX's page on matmul precision), and those that a CPU cannot do
#   are refused, as XLA's protocol wants it: TF32_TF32_F32, F16_F16_F32 and BF16_BF16_F32_X9 raise "not supported by dot_general on CPU".
# What happens: BF16_BF16_F32 and its _X3 and _X6 are accepted without a warning and not followed: the result is that of float32, bit
#   for bit, also by `jax.default_matmul_precision`. A program tuned on a CPU has seen nothing of the rounding that a TPU or a GPU
#   does by that name, and nothing gets faster. Factors that are converted to bfloat16 give another result.
# Seen with jax 0.10.2 and jaxlib 0.10.2, 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==0.10.2" "jaxlib==0.10.2" "numpy==2.4.6"
cat > "$folder/dot.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

left, right = (np.random.default_rng(seed).normal(size=(64, 64)).astype(np.float32) for seed in (0, 1))


def multiply(precision):
    return np.asarray(jax.jit(lambda x, y: jnp.matmul(x, y, precision=precision))(left, right))


exact = multiply("highest")
names = ("BF16_BF16_F32", "BF16_BF16_F32_X3", "BF16_BF16_F32_X6")
same = [np.array_equal(multiply(name), exact) for name in names]
with jax.default_matmul_precision("BF16_BF16_F32"):
    same.append(np.array_equal(multiply(None), exact))
refused = 0
for name in ("TF32_TF32_F32", "F16_F16_F32", "BF16_BF16_F32_X9"):
    try:
        multiply(name)
    except ValueError as error:
        refused += "not supported" in str(error)
half = [jnp.asarray(factor).astype(jnp.bfloat16) for factor in (left, right)]
rounded = np.asarray(jnp.matmul(*half, preferred_element_type=jnp.float32))
print(sum(same), refused, float(np.abs(rounded - exact).max() > 1e-3))
PYTHON
read -r same refused rounded < <(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/dot.py")
echo "$same of 4 ways to ask for bfloat16 gave the bits of float32, $refused of 3 other algorithms were refused; converted factors gave another result: $rounded"
[ "$same" = 4 ] && [ "$refused" = 3 ] && [ "$rounded" = 1.0 ]
