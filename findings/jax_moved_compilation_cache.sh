#!/usr/bin/env bash
# Question: is a persistent compilation cache of JAX still of use on a CPU when its folder has another name: moved, mounted at
#   another place in a container, restored by CI, or given by two commands under two names?
# Good guess: yes; a program is asked for by what it computes, the compiler's flags and JAX's version, and the folder holds it.
# What happens: nothing in it is found. With jax_persistent_cache_enable_xla_caches at its default the path of the folder
#   becomes part of every key, on a CPU too, which has none of the caches that the option is about (autotuning on a GPU). With
#   the option at "none" all programs are found in the moved folder.
# Seen with jax 0.10.2 and jaxlib 0.10.2, 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==0.10.2" "jaxlib==0.10.2"
cd "$folder"
cat > count.py <<'PYTHON'
import sys

import jax
import jax.numpy as jnp

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
if len(sys.argv) > 2:
    jax.config.update("jax_persistent_cache_enable_xla_caches", sys.argv[2])
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
jax.jit(lambda x: (x @ x).sum())(jnp.ones((8, 8))).block_until_ready()
print(len(hits))
PYTHON
export JAX_PLATFORMS=cpu
run() { "$folder/venv/bin/python" count.py "$@"; }
first=$(run "$folder/one")
again=$(run "$folder/one")
mv "$folder/one" "$folder/moved"
moved=$(run "$folder/moved")
none_first=$(run "$folder/two" none)
mv "$folder/two" "$folder/moved-too"
none_moved=$(run "$folder/moved-too" none)
echo "programs read: at first $first, again $again, from the moved folder $moved; with the option at none $none_first, moved $none_moved"
[ "$first" = 0 ] && [ "$again" -gt 0 ] && [ "$moved" = 0 ] && [ "$none_first" = 0 ] && [ "$none_moved" -gt 0 ]
