"""WikiText's raw form as a memory text, and data files that come through pipes."""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tpatch_jax.cli.main import main
from tpatch_jax.editors.model_memory import collect_model_memory
from tpatch_jax.evaluation.running_text import read_windows
from tpatch_jax.models.inputs import read_inputs
from tpatch_jax.models.memory_text import memory_rows, read_memory_text, text_mark
from tpatch_jax.models.model import Model
from tpatch_jax.models.wikitext import detokenize, is_raw_wikitext
from tpatch_jax.storage.json_lines import read_json_lines
from tpatch_jax.storage.reading import read_bytes, read_text

RAW = (
    " = Ada Low = \n \n Ada Low is an English film , television and theatre actor ; she had a guest @-@ starring "
    "role ( 1 @,@ 000 lines , 2 @.@ 5 hours ) in \" Teddy 's Story \" . \n = = Career = = \n The actors ' roles "
    "did n't cost $ 5 , or 10 % : she called it ' small ' . \n"
)
PLAIN = (
    "Ada Low\n\nAda Low is an English film, television and theatre actor; she had a guest-starring role (1,000 lines, "
    "2.5 hours) in \"Teddy's Story\".\nCareer\nThe actors' roles didn't cost $5, or 10%: she called it 'small'.\n"
)


@contextmanager
def pipe(content: bytes) -> Iterator[str]:
    """A path as a shell's ``<(…)`` gives it: what it holds comes once."""
    end, begin = os.pipe()

    def write() -> None:
        with os.fdopen(begin, "wb") as file:
            file.write(content)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield f"/dev/fd/{end}"
    finally:
        os.close(end)
        thread.join()


def test_raw_wikitext_becomes_ordinary_text() -> None:
    assert detokenize(RAW) == PLAIN


@pytest.mark.parametrize(
    ("text", "raw"),
    [
        (RAW, True),
        ("A guest @-@ starring role , and left .", True),
        (" = Ada Low = \n", True),
        ("She came , saw , and went . He stayed , and slept .", True),
        (PLAIN, False),
        ("", False),
        ("The sum a = b = c is right, and so it stays.", False),
        ("The marks are ` @-@ `, ` @,@ ` and others; they are rare, as one sees. So it is.", False),
        ("Est-ce vrai ? Oui ; il le dit : « oui » !", False),
    ],
)
def test_only_raw_wikitext_is_taken_for_it(text: str, raw: bool) -> None:
    assert is_raw_wikitext(text) is raw


def test_a_raw_memory_is_read_as_ordinary_text_and_told(
    tiny_model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw, plain = tmp_path / "raw.txt", tmp_path / "plain.txt"
    raw.write_text(RAW * 4, "utf-8")
    plain.write_text(PLAIN * 4, "utf-8")
    with caplog.at_level(logging.WARNING):
        assert memory_rows(tiny_model, plain)
        assert not caplog.records
        assert memory_rows(tiny_model, raw) == memory_rows(tiny_model, plain)
    assert [record.getMessage() for record in caplog.records] == [
        f"the memory text {raw} is WikiText in its raw form; it is detokenized by rule"
    ]
    assert read_memory_text(raw) == PLAIN * 4
    assert read_inputs(raw) == read_inputs(plain)


def test_what_was_cached_of_the_raw_form_is_not_taken_for_it(tiny_model: Model, tmp_path: Path) -> None:
    raw, plain = tmp_path / "raw.txt", tmp_path / "plain.txt"
    raw.write_text(RAW, "utf-8")
    plain.write_text(PLAIN, "utf-8")
    assert hashlib.sha256(RAW.encode()).hexdigest() not in text_mark(tiny_model, raw)
    assert text_mark(tiny_model, raw) == text_mark(tiny_model, plain)


def test_what_comes_through_a_pipe_is_read_as_often_as_needed(tiny_model: Model, tmp_path: Path) -> None:
    text = (PLAIN * 4).encode()
    with pipe(text) as path:
        assert read_bytes(path) == read_bytes(path) == text
        assert read_text(path, most=3) == "Ada"
    with pipe(text) as path:
        mark = text_mark(tiny_model, path)
        assert memory_rows(tiny_model, path) == memory_rows(tiny_model, path)
        assert len(collect_model_memory(tiny_model, 1, path, cache=tmp_path).query)
        assert text_mark(tiny_model, path) == mark
        assert read_windows(tiny_model, path, 100).rows == read_windows(tiny_model, path, 100).rows
    with pipe(b'{"a": 1}\n') as path:
        assert [line.value for line in read_json_lines(path, "object")] == [{"a": 1}]
        assert [line.value for line in read_json_lines(path, "object")] == [{"a": 1}]


def test_a_named_pipe_does_not_wait_for_a_second_writer(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    os.mkfifo(path)
    thread = threading.Thread(target=lambda: path.write_bytes(b"one"))
    thread.start()
    assert read_bytes(path) == read_bytes(path) == b"one"
    thread.join()


def test_a_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one\r\n", "utf-8")
    assert read_text(path) == "one\n"
    path.write_text("two", "utf-8")
    assert read_text(path) == "two"


def test_commands_read_their_data_and_memory_through_pipes(tiny_folder: Any, tmp_path: Path, capsys: Any) -> None:
    request = b'{"prompt": "Ada likes", "target": "red", "subject": "Ada"}\n'
    with pipe((PLAIN * 9).encode()) as memory, pipe(request) as file, pipe((PLAIN * 9).encode()) as text:
        arguments = ["--data", "requests", "--file", file, "--memory", memory, "--text", text, "--method", "unedited"]
        code = main(["eval", str(tiny_folder(tmp_path)), *arguments, "--json", "-o", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert json.loads(said.out)["config"]["n"] == 1
