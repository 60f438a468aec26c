"""What a process does before its work."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from tpatch_jax.storage import process


def return_freed_memory() -> None:
    process._return_freed_memory.__wrapped__()


def test_memory_is_asked_back_after_a_compilation_and_not_after_a_call(monkeypatch):
    calls = []
    library = SimpleNamespace(mallopt=lambda *given: calls.append(given), malloc_trim=lambda pad: calls.append((pad,)))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    return_freed_memory()
    assert calls == [(process.MAPPED_FROM, process.LARGE), (process.KEPT, process.AT_HAND)]
    run, x = jax.jit(lambda x: x * 5 - 2), jnp.ones(11)
    run(x)
    assert calls[-1] == (0,)
    before = len(calls)
    run(x)
    assert len(calls) == before


@pytest.mark.parametrize("library", [None, SimpleNamespace(mallopt=lambda *given: 1)])
def test_a_c_library_without_these_functions_is_fine(monkeypatch, library):
    def load(name: str | None) -> SimpleNamespace:
        if library is None:
            raise OSError("no such library")
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    return_freed_memory()


def test_a_cache_that_cannot_be_written_is_no_obstacle(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("", "utf-8")
    monkeypatch.setenv("TPATCH_CACHE", str(tmp_path / "file"))
    kept = jax.config.jax_compilation_cache_dir
    process._keep_compilations()
    assert jax.config.jax_compilation_cache_dir == kept


def test_compiled_programs_are_read_from_a_cache_that_was_moved(monkeypatch, tmp_path, restored):
    hits = []
    monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)

    def compile_in(folder: Path) -> int:
        monkeypatch.setenv("TPATCH_CACHE", str(folder))
        process._keep_compilations()
        compilation_cache.reset_cache()
        jax.clear_caches()
        hits.clear()
        jax.jit(lambda x: jnp.sum(x @ x) * 7)(jnp.ones((5, 5))).block_until_ready()
        return len(hits)

    assert compile_in(tmp_path / "one") == 0
    (tmp_path / "one").rename(tmp_path / "moved")
    assert compile_in(tmp_path / "moved") > 0


COUNTED = """
import sys
from jax import monitoring
import tpatch_jax as tp
from tpatch_jax.storage.process import prepare_process

prepare_process()
counts = {}
monitoring.register_event_listener(lambda event, **_: counts.update({event: counts.get(event, 0) + 1}))
model = tp.load_model(sys.argv[1])
prompt, target = sys.argv[3:]
tp.edit(model, [tp.EditRequest(prompt, target)], memory=sys.argv[2], settings={"attempts": 1, "fit.key_steps": 4})
tp.merge(model, {}).generate(prompt, 2)
print([counts.get(f"/jax/compilation_cache/cache_{name}", 0) for name in ("hits", "misses")])
"""


def test_another_process_compiles_nothing_for_another_prompt_of_the_same_bucket(tmp_path, tiny_folder, letters):
    folder = str(tiny_folder(tmp_path / "model"))
    environment = {**os.environ, "TPATCH_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}

    def counts(prompt: str, target: str) -> list[int]:
        command = [sys.executable, "-c", COUNTED, folder, str(letters), prompt, target]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return json.loads(run.stdout.splitlines()[-1])

    assert counts("the cat sat in", "b")[1] > 10
    hits, misses = counts("the hen sat in", "q")
    assert hits > 10
    assert misses == 0
