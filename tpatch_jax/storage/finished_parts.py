"""The finished parts of work that takes hours, kept on disk until all of it is done, so that it can be gone on with.

A folder beside the result holds ``run.json``, what the work was begun with, and a safetensors file for each part, which
is there whole or not at all.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from tpatch_jax.errors import TPatchError
from tpatch_jax.storage.files import sync, temporary_path, write_text
from tpatch_jax.storage.reading import read_bytes
from tpatch_jax.typing import Arrays

__all__ = ["FinishedParts", "check_same_run", "hash_file", "load_arrays", "save_arrays", "unfinished_folder"]

RUN, ENDING = "run.json", ".safetensors"


def unfinished_folder(output: Path) -> Path:
    """Where the finished parts of a result are until it is there: beside it.

    Example:
        >>> unfinished_folder(Path("patches/facts")).as_posix()
        'patches/facts.unfinished'
    """
    return output.with_name(f"{output.name}.unfinished")


def hash_file(path: str | Path) -> str:
    """The SHA-256 of a file's bytes.

    Raises:
        TPatchError: it cannot be read.
    """
    try:
        # What comes through a pipe can be read only once.
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except OSError as error:
        raise TPatchError(f"{path} cannot be read ({error.strerror}); give a file that exists") from None


def check_same_run(earlier: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path, mend: str) -> None:
    """Make sure that work is gone on with as it was begun.

    Args:
        earlier: what it was begun with, by name.
        wanted: what it shall be gone on with, as JSON has it.
        folder: where it is.
        mend: what to do if they differ.

    Raises:
        TPatchError: they differ; the message names the first difference.
    """
    names = [name for name in {**earlier, **wanted} if earlier.get(name) != wanted.get(name)]
    if names:
        raise TPatchError(
            f"{folder} belongs to a run with {names[0]}={_short(earlier.get(names[0]))}, and this one has "
            f"{_short(wanted.get(names[0]))}; {mend}"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Write a safetensors file with arrays and what JSON can hold about them, whole or not at all.

    Raises:
        OSError: the disk is full; so safetensors says it as a ``SafetensorError``.
    """
    temporary = temporary_path(path)
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    try:
        save_file(whole, temporary, {"about": json.dumps(about)})
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_arrays(path: Path) -> tuple[Arrays, dict[str, Any]] | None:
    """What `save_arrays` wrote; ``None`` where there is nothing that can be read."""
    try:
        with safe_open(path, "numpy") as file:
            about = json.loads((file.metadata() or {})["about"])
        return load_file(path), about
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


class FinishedParts:
    """The parts of one piece of work that are finished.

    Attributes:
        folder: where they are; made when the first one is kept.
        count: how many there were at the start.
        taken: how many of them were taken since.
    """

    folder: Path
    count: int
    taken: int

    def __init__(self, folder: Path, config: Mapping[str, Any], *, resume: bool):
        """Begin, or go on with what an interrupted run of the same configuration finished.

        Args:
            folder: where the parts are.
            config: what determines the result, by name.
            resume: whether to go on; else there must be no finished part.

        Raises:
            TPatchError: the parts belong to another configuration, cannot be read, or were not asked for.
        """
        self.folder, self.count, self.taken = folder, 0, 0
        self._config = json.loads(json.dumps(config))
        if not folder.exists():
            return
        if not (folder / RUN).is_file():
            raise TPatchError(f"{folder} is in the way and was not left by an interrupted run; choose another output")
        self.count = self.kept
        again = f"or remove {folder} to start again"
        if not resume:
            if self.count:
                raise TPatchError(f"an interrupted run left finished work in {folder}; go on with --resume, {again}")
            self.remove()
            return
        try:
            earlier = json.loads((folder / RUN).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise TPatchError(f"{folder / RUN} is damaged ({error}); remove {folder} and start again") from None
        check_same_run(earlier, self._config, folder, f"go on as it was begun, {again}")

    @property
    def kept(self) -> int:
        """How many there are now."""
        return len(list(self.folder.glob(f"*{ENDING}")))

    def begin(self) -> None:
        """Write down what the work is begun with.

        Raises:
            TPatchError: the disk is full.
        """
        if not (self.folder / RUN).exists():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_text(self.folder / RUN, json.dumps(self._config, ensure_ascii=False, indent=1) + "\n")
            except OSError as error:
                raise TPatchError(f"cannot write {self.folder}: {error.strerror}; choose another output") from None

    def load(self, name: str, about: Mapping[str, Any]) -> Arrays | None:
        """A part that is finished.

        Args:
            name: the part.
            about: what it was made of; a part that was made of something else is none.
        """
        loaded = load_arrays(self.folder / f"{name}{ENDING}")
        if loaded is None or loaded[1] != json.loads(json.dumps(about)):
            return None
        self.taken += 1
        return loaded[0]

    def save(self, name: str, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
        """Keep a part that is finished.

        Raises:
            TPatchError: the disk is full; the parts before are still there.
        """
        self.begin()
        path = self.folder / f"{name}{ENDING}"
        try:
            save_arrays(path, arrays, about)
        except (OSError, SafetensorError) as error:
            # A full disk is an OSError from Python and a SafetensorError from safetensors.
            reason = getattr(error, "strerror", None) or error
            raise TPatchError(f"cannot write {path}: {reason}; free some room, and go on with --resume") from None

    def remove(self) -> None:
        """The work is done, and needs its parts no longer."""
        shutil.rmtree(self.folder, ignore_errors=True)
