"""What a process does before its work."""

import ctypes
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from tpatch_jax.storage import process


def return_freed_memory() -> None:
    process._return_freed_memory.__wrapped__()


def test_memory_is_asked_back_after_a_compilation_and_not_after_a_call(monkeypatch):
    calls = []
    library = SimpleNamespace(mallopt=lambda *given: calls.append(given), malloc_trim=lambda pad: calls.append((pad,)))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    return_freed_memory()
    assert calls == [(process.MAPPED_FROM, 2**20)]
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
