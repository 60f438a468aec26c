#!/usr/bin/env bash
# Question: does a byte-level tokenizer.json whose configuration names LlamaTokenizer (as Llama 3's relatives on hubs do)
#   write back the text that it reads, whatever release of transformers 5 reads it?
# Good guess: yes; tokenizer.json holds the whole tokenizer, decoder included, and the class is only a name.
# What happens: from 5.3.0 to 5.21.1 the class builds a tokenizer of SentencePiece's kind from the vocabulary and merges
#   in that file: the text comes back without its spaces, and no error or warning says so. 5.22.0 writes it whole again.
# Seen with transformers 5.3.0 and 5.22.0, 2026-11-29.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/read.py" <<'PYTHON'
import sys
from pathlib import Path

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

text, place = "The capital of France is", Path(sys.argv[1])
place.mkdir()
pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
backend = Tokenizer(models.BPE({piece: number for number, piece in enumerate(["<s>", "</s>", "<unk>", *pieces])}, []))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = decoders.ByteLevel()
backend.save(str(place / "tokenizer.json"))
(place / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
(place / "config.json").write_text('{"model_type": "llama"}')
assert backend.decode(backend.encode(text).ids) == text
tokenizer = AutoTokenizer.from_pretrained(place)
back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
print("transformers", transformers.__version__, "reads", repr(text), "and writes", repr(back))
assert (back == text) == (sys.argv[2] == "whole"), "this release writes something else now"
PYTHON
for pair in 5.3.0:spaceless 5.22.0:whole; do
  version=${pair%%:*}
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "transformers==$version"
  "$folder/$version/bin/python" "$folder/read.py" "$folder/tokenizer-$version" "${pair##*:}"
done
