#!/usr/bin/env bash
# Question: can an image classifier be built from a fresh `DeiTConfig` by `AutoModelForImageClassification.from_config`, as one from
#   a `ViTConfig` can?
# Good guess: yes; `architectures` in a configuration says what a checkpoint was saved as, and a fresh one need not have it.
# What happens: of a DeiT there are two classifiers (one with a distillation token's head), and the choice between them iterates over
#   `architectures`, which is None in a fresh configuration: TypeError, "'NoneType' object is not iterable". With
#   `architectures=["DeiTForImageClassification"]` in the configuration the same call works; a ViT needs no such entry. Whoever
#   writes a DeiT's config.json without that entry has written a folder that the Auto classes do not open.
# Seen with transformers 5.24.0 and torch 2.13.0, 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "transformers==5.24.0" "torch==2.13.0"
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import transformers
from transformers import AutoModelForImageClassification, DeiTConfig, ViTConfig

SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}
seen = {}
for name, config in (
    ("ViT", ViTConfig(**SIZES)),
    ("DeiT", DeiTConfig(**SIZES)),
    ("DeiT with architectures", DeiTConfig(**SIZES, architectures=["DeiTForImageClassification"])),
):
    try:
        seen[name] = type(AutoModelForImageClassification.from_config(config)).__name__
    except TypeError as error:
        seen[name] = f"TypeError: {error}"
    print(f"{name}: {seen[name]}")
print("transformers", transformers.__version__)
assert seen["ViT"] == "ViTForImageClassification"
assert seen["DeiT"].startswith("TypeError")
assert seen["DeiT with architectures"] == "DeiTForImageClassification"
PYTHON
