#!/usr/bin/env bash
# Question: does `jnp.asarray` of a NumPy array compile anything, in a loop over host arrays of many shapes such as rows of text?
# Good guess: no; it copies bytes to the device, as `jax.device_put` does, and only operations on what comes out are compiled.
# What happens: each new shape (and each new type) is traced, lowered and compiled as a program of its own, named `stage`,
#   about ten milliseconds on a CPU, and it takes a place in the compilation cache. `jax.device_put` compiles nothing.
# Seen with jax 0.10.2, jaxlib 0.10.2 and numpy 2.4.6, 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==0.10.2" "jaxlib==0.10.2" "numpy==2.4.6"
cat > "$folder/count.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

compiled = []
name = "/jax/core/compile/backend_compile_duration"
jax.monitoring.register_event_duration_secs_listener(lambda event, _, **__: compiled.append(event == name))


def count(put, dtype):
    before = sum(compiled)
    for rows in range(1, 21):
        jax.block_until_ready(put(np.zeros((rows, 3), dtype)))
    return sum(compiled) - before


print(count(jax.device_put, np.float32), count(jnp.asarray, np.float32), count(jnp.asarray, np.int32))
PYTHON
read -r put floats ints < <(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/count.py")
echo "programs compiled for arrays of 20 shapes: by device_put $put; by jnp.asarray $floats of floats, $ints more of ints"
[ "$put" = 0 ] && [ "$floats" = 20 ] && [ "$ints" = 20 ]
