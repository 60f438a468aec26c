#!/usr/bin/env bash
# Question: does safetensors.numpy write a NumPy array that is a transposed view as what it shows?
# Good guess: yes, by a copy; or an error that asks for a contiguous array, as safetensors.torch raises one for tensors.
# What happens: the file holds the memory behind the view in its own order under the view's shape, without an error or a
#   warning. Reading it back gives other numbers than were saved. np.ascontiguousarray before saving avoids it.
# Seen with safetensors 0.8.0 and numpy 2.3.5, 2026-11-29.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "safetensors==0.8.0" "numpy==2.3.5"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

array = np.arange(6, dtype=np.float32).reshape(2, 3)
save_file({"view": array.T, "copy": np.ascontiguousarray(array.T)}, "arrays.safetensors")
read = load_file("arrays.safetensors")
print("safetensors", safetensors.__version__, "numpy", np.__version__)
print("saved    ", array.T.tolist())
print("read view", read["view"].tolist())
print("read copy", read["copy"].tolist())
assert read["view"].shape == array.T.shape
assert np.array_equal(read["copy"], array.T)
assert not np.array_equal(read["view"], array.T), "a view is written as it shows now"
assert read["view"].ravel().tolist() == array.ravel().tolist()
PYTHON
