"""What predicts where values start, for one model and layer: its file, and those that come with the library."""

from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tpatch_jax.core.start import StartParams
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.fingerprint import fingerprint
from tpatch_jax.models.model import Model
from tpatch_jax.storage.finished_parts import load_arrays, save_arrays

__all__ = ["AUTO", "NONE", "Start", "find_start", "load_start", "save_start"]

AUTO, NONE = "auto", "none"

SCHEMA = "tpatch-jax-start-1"


class Start(NamedTuple):
    """What predicts values, and for which model.

    Attributes:
        params: the network.
        layer: whose values it predicts.
        model: the fingerprint of the model it was made for.
    """

    params: StartParams
    layer: int
    model: str

    def check(self, model: Model, layer: int) -> None:
        """Make sure that it was made for this model and layer.

        Raises:
            TPatchError: it was not.
        """
        if self.model != fingerprint(model):
            raise TPatchError(f"the start was learnt for other weights than {model.name!r}'s; make one: tpatch learn")
        if self.layer != layer:
            raise TPatchError(f"the start was learnt for layer {self.layer}, and the subject site is layer {layer}")


def save_start(path: str | Path, start: Start) -> None:
    """Write a start to one safetensors file, in half precision.

    Args:
        path: of the file.
        start: what to write.

    Raises:
        TPatchError: it cannot be written.
    """
    arrays = {name: np.asarray(array, np.float16) for name, array in start.params._asdict().items()}
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_arrays(Path(path), arrays, {"schema": SCHEMA, "layer": start.layer, "model": start.model})
    except OSError as error:
        raise TPatchError(f"the start cannot be written to {path}: {error}") from error


def load_start(path: str | Path) -> Start:
    """Read what `save_start` wrote.

    Args:
        path: of the file.

    Raises:
        TPatchError: there is no such file, or it is something else.
    """
    if not Path(path).is_file():
        raise TPatchError(f"there is no start at {path}; tpatch learn MODEL REQUESTS -o {path} makes one")
    read = load_arrays(Path(path))
    if read is None or read[1].get("schema") != SCHEMA or set(read[0]) != set(StartParams._fields):
        raise TPatchError(f"{path} is no start that tpatch learn wrote; make one: tpatch learn MODEL REQUESTS -o …")
    arrays, about = read
    params = StartParams(*(np.asarray(arrays[name], np.float32) for name in StartParams._fields))  # type: ignore[arg-type]
    return Start(params, int(about["layer"]), str(about["model"]))


@lru_cache(maxsize=1)
def _shipped() -> dict[tuple[str, int], Path]:
    """The starts that come with the library, by model and layer."""
    folder = Path(str(files("tpatch_jax.editors") / "starts"))
    starts = {}
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        if (read := load_arrays(path)) is not None:
            starts[str(read[1]["model"]), int(read[1]["layer"])] = path
    return starts


def find_start(model: Model, layer: int, wanted: str) -> StartParams | None:
    """The network that a setting names.

    Args:
        model: which is edited.
        layer: of the subject site.
        wanted: ``"auto"``, one that comes with the library if there is one for this model; ``"none"``; or a file.

    Raises:
        TPatchError: there is no such file, or it is for another model or layer.
    """
    if wanted == NONE:
        return None
    if wanted == AUTO:
        path = _shipped().get((fingerprint(model), layer))
        return None if path is None else load_start(path).params
    start = load_start(wanted)
    start.check(model, layer)
    return start.params
