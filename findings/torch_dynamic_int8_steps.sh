#!/usr/bin/env bash
# Question: into how many steps does torch's dynamic INT8 (`quantize_dynamic`, qint8) divide a layer's inputs?
# Good guess: 255 or 256, as the name says, whatever engine multiplies.
# What happens: with the engines of x86 processors, the default there, half as many, since their observers have
#   `reduce_range=True` (sums of products of 8 and 8 bits overflow older vector instructions): 129 different outputs over a ramp.
#   qnnpack, the engine of ARM processors that x86 builds have as well, ignores `reduce_range` (and warns) and gives 255. So the same
#   quantised model is twice as coarse on a desktop as on a telephone, and what was tested in one engine may round otherwise in the
#   other: a small change of a model that holds there by less than a step is lost here.
# Seen with torch 2.13.0, 2026-12-01.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "numpy"
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch.ao.quantization import quantize_dynamic

EXPECTED = {"x86": 129, "fbgemm": 129, "onednn": 129, "qnnpack": 255}
layer = torch.nn.Linear(1, 1, bias=False)
with torch.no_grad():
    layer.weight.fill_(1.0)
ramp = torch.linspace(-1, 1, 4001)[:, None]
seen = {}
for engine in torch.backends.quantized.supported_engines:
    if engine in EXPECTED:
        torch.backends.quantized.engine = engine
        said = quantize_dynamic(torch.nn.Sequential(layer), {torch.nn.Linear}, dtype=torch.qint8)(ramp)
        seen[engine] = len(torch.unique(said))
        print(f"{engine}: {seen[engine]} different outputs for {len(ramp)} inputs from -1 to 1")
print("torch", torch.__version__)
assert len(seen) > 1, f"this build has the engines {seen} alone"
assert seen == {engine: EXPECTED[engine] for engine in seen}
PYTHON
