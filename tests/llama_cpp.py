"""llama.cpp itself, as the wheel ``xllamacpp`` has it: what a GGUF file says there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest


class LlamaCpp:
    """A GGUF file that llama.cpp has loaded, on one core."""

    def __init__(self, path: Path, context: int) -> None:
        llama = pytest.importorskip("xllamacpp", reason="llama.cpp is only needed to run files: the 'gguf' extra")
        params = llama.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup = context, 1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self.server = llama.Server(params)

    def complete(self, prompt: str | Sequence[int], tokens: int, **options: Any) -> dict[str, Any]:
        """The greedy continuation of a text or of token ids, as the server answers."""
        request = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "cache_prompt": False, **options}
        return self.server.handle_completions(request)["choices"][0]

    def generate(self, prompt: str, tokens: int) -> str:
        return self.complete(prompt, tokens)["text"]

    def log_probabilities(self, prompt: Sequence[int], count: int) -> dict[int, float]:
        """Those of the most probable next tokens, by token; none where that is no whole character."""
        told = self.complete(list(prompt), 1, logprobs=count)["logprobs"]
        entries = told["content"][0]["top_logprobs"] if told and told.get("content") else ()
        return {entry["id"]: entry["logprob"] for entry in entries}

    def chat(self, question: str, tokens: int) -> str:
        """The greedy answer to a user's turn, in the chat template of the file."""
        messages = [{"role": "user", "content": question}]
        request = {"messages": messages, "max_tokens": tokens, "temperature": 0}
        return self.server.handle_chat_completions(request)["choices"][0]["message"]["content"]
