"""Tiny models that hold chats: the tiny tokenizer with the marks and the template of a chat."""

from typing import Any

from conftest import make_tiny_model
from tokenizers import AddedToken

from tpatch_jax.models.model import Model

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: "
    "{% endif %}"
)
MARKS = {CHATML: ("<|im_start|>", "<|im_end|>"), GEMMA: ("<start_of_turn>", "<end_of_turn>")}


def chat_model(template: str | None = CHATML, seed: int = 0, **changes: Any) -> Model:
    """A random Llama with a chat template, and room for a conversation."""
    model = make_tiny_model(seed, max_position_embeddings=256, **changes)
    tokenizer: Any = model.tokenizer
    marks = [AddedToken(mark, special=True) for mark in MARKS.get(template or "", ())]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.chat_template = template
    return model
