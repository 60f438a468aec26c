"""Folders and files appear whole or not at all."""

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tpatch_jax.errors import TPatchError
from tpatch_jax.storage import files
from tpatch_jax.storage.files import check_vacant, replace_folder, write_text


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_folder_appears_with_all_that_was_put_into_it(tmp_path: Path):
    target = tmp_path / "new" / "deep"
    with replace_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("a")
        assert folder.parent == target.parent  # a rename within one file system
        assert not target.exists()
    assert (target / "sub" / "a.txt").read_text() == "a"
    assert os.listdir(target.parent) == ["deep"]


def test_an_empty_folder_is_replaced(tmp_path: Path):
    target = tmp_path / "empty"
    target.mkdir()
    with replace_folder(target) as folder:
        (folder / "a.txt").write_text("a")
    assert (target / "a.txt").read_text() == "a"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, TPatchError])
def test_nothing_is_left_when_the_block_raises(tmp_path: Path, error: type[BaseException]):
    def begin() -> None:
        with replace_folder(tmp_path / "out") as folder:
            (folder / "a.txt").write_text("a")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        begin()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_taken_name_is_refused_and_kept(tmp_path: Path, kind: str):
    target = tmp_path / "out"
    kept = target / "old.txt" if kind == "folder" else target
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("old")
    with pytest.raises(TPatchError, match="out already exists"), replace_folder(target):
        pytest.fail("the block must not begin")
    assert kept.read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_a_parent_that_is_a_file_is_an_error(tmp_path: Path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(TPatchError, match="is no folder"), replace_folder(tmp_path / "file" / "out"):
        pytest.fail("the block must not begin")


def test_a_place_that_cannot_be_written_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("old")
    for place in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(TPatchError, match=r"cannot write .*: .*file is no folder; choose another"):
            check_vacant(place)
    check_vacant(tmp_path / "new" / "deep")
    check_vacant(Path("new"))
    (tmp_path / "empty").mkdir()
    # Root may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    for name in ("new/deep", "empty"):
        with pytest.raises(TPatchError, match="no permission to write in"):
            check_vacant(tmp_path / name)
    # What is put into a folder that is there needs no more than that folder.
    check_vacant(tmp_path / "empty", inside=True)


@pytest.mark.parametrize("allowed", [0o022, 0o077])
def test_files_are_readable_as_the_user_has_set(tmp_path: Path, allowed: int):
    before = os.umask(allowed)
    try:
        with replace_folder(tmp_path / "out") as folder:
            save_file({"x": np.zeros(2)}, folder / "x.safetensors")
            (folder / "a.txt").write_text("a")
    finally:
        os.umask(before)
    modes = [(tmp_path / "out" / name).stat().st_mode & 0o777 for name in ("x.safetensors", "a.txt")]
    assert modes == [0o666 & ~allowed] * 2
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~allowed


@pytest.mark.parametrize("where", ["block", "sync", "replace", "mkdtemp"])
def test_a_full_disk_is_an_error_to_mend_and_the_old_state_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    target = tmp_path / "out"
    target.mkdir()
    if where == "mkdtemp":
        monkeypatch.setattr(files.tempfile, "mkdtemp", full)
    elif where != "block":
        monkeypatch.setattr(files if where == "sync" else files.os, where, full)

    def begin() -> None:
        with replace_folder(target) as folder:
            (folder / "a.txt").write_text("a")
            if where == "block":
                full()

    with pytest.raises(TPatchError, match="No space left"):
        begin()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(target) == []


def test_a_kill_in_the_middle_leaves_nothing_under_the_name(tmp_path: Path):
    script = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tpatch_jax.storage.files import replace_folder
with replace_folder(Path(sys.argv[1])) as folder:
    (folder / "a.txt").write_text("a")
    os._exit(9)
"""
    target = tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", script, str(target)], check=False).returncode == 9
    assert not target.exists()
    with replace_folder(target) as folder:  # and what it left does not stand in the way
        (folder / "b.txt").write_text("b")
    assert os.listdir(target) == ["b.txt"]


def test_write_text_replaces_the_whole_file(tmp_path: Path):
    path = tmp_path / "a.txt"
    write_text(path, "long old text")
    write_text(path, "né")
    assert path.read_bytes() == "né".encode()
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("where", ["sync", "replace"])
def test_write_text_that_fails_keeps_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    monkeypatch.setattr(files if where == "sync" else files.os, where, full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_write_text_never_shows_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, seen = tmp_path / "a.txt", []
    write_text(path, "old")
    monkeypatch.setattr(files, "sync", lambda _: seen.append(path.read_text()))
    write_text(path, "new")
    assert seen == ["old", "new"]


def test_a_link_to_an_empty_folder_is_followed(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    (tmp_path / "nowhere").symlink_to(tmp_path / "later")
    for name, real in (("out", "disk"), ("nowhere", "later")):
        with replace_folder(tmp_path / name) as folder:
            (folder / "a.txt").write_text("a")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / real / "a.txt").read_text() == "a"


def test_a_folder_whose_place_none_can_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(TPatchError, match="here is the current folder, whose place no other can take; choose an"):
        check_vacant(Path("."))
    check_vacant(Path("."), inside=True)
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "disk")
    with pytest.raises(TPatchError, match="disk is where a disk is mounted, whose place no other can take"):
        check_vacant(tmp_path / "disk")


def test_what_is_not_for_want_of_room_does_not_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files.os, "replace", refuse)
    with (
        pytest.raises(TPatchError, match="Input/output error; choose another output folder"),
        replace_folder(tmp_path / "out"),
    ):
        pass


def test_threads_that_write_the_same_file_are_in_nobodys_way(tmp_path: Path):
    path, texts = tmp_path / "text", [letter * 1000 for letter in "abcd"]
    with ThreadPoolExecutor(len(texts)) as pool:
        for _ in range(20):
            # Each ends without an error, and one of them was last.
            list(pool.map(write_text, [path] * len(texts), texts))
            assert path.read_text("utf-8") in texts
    assert list(tmp_path.iterdir()) == [path]
