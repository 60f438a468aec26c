"""What predicts where values start, for one model and layer: its file, and those that come with the library."""

import json
import os
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError

from tpatch_jax.core.start import PARTS, StartParams
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.fingerprint import fingerprint
from tpatch_jax.models.model import Model
from tpatch_jax.storage.finished_parts import load_arrays, save_arrays

__all__ = ["AUTO", "NONE", "Start", "check_start_path", "find_start", "load_start", "save_start"]

AUTO = "auto"
"""The setting that takes a start that comes with the library for this very model, if there is one."""

NONE = "none"
"""The setting that starts from zero."""

SCHEMA = "tpatch-jax-start-1"

SHIPPED = Path(str(files("tpatch_jax.editors") / "starts"))


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
        path: of the file; a start that is there already is replaced.
        start: what to write.

    Raises:
        TPatchError: it cannot be written, or something else stands there.
    """
    check_start_path(path)
    arrays = {name: np.asarray(array, np.float16) for name, array in start.params._asdict().items()}
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_arrays(Path(path), arrays, {"schema": SCHEMA, "layer": start.layer, "model": start.model})
    except (OSError, SafetensorError) as error:
        # A full disk is an OSError from Python and a SafetensorError from safetensors.
        raise TPatchError(
            f"the start cannot be written to {path}: {getattr(error, 'strerror', None) or error}"
        ) from None


def check_start_path(path: str | Path) -> None:
    """Make sure that a start can be written there, before any work begins.

    Args:
        path: of the file.

    Raises:
        TPatchError: what stands there is no start, or its folder is no folder or cannot be written.
    """
    path = Path(path).absolute()
    if path.exists() and _read(path) is None:
        raise TPatchError(f"{path} already exists and is no start; choose another output")
    above = next(place for place in path.parents if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise TPatchError(f"the start cannot be written to {path}: {above} is no folder to write in; choose another")


def _read(path: Path) -> Start | None:
    """The start in a file; ``None`` if it holds anything else."""
    read = load_arrays(path)
    if read is None or not _is_about_start(read[1]) or set(read[0]) != set(StartParams._fields):
        return None
    arrays, about = read
    params = StartParams(*(np.asarray(arrays[name], np.float32) for name in StartParams._fields))  # type: ignore[arg-type]
    (features, width), hidden_size = (
        np.shape(params.inner) if params.inner.ndim == 2 else (0, 0),
        params.direct.shape[-1],
    )
    shapes = (features, width), (width,), (width, hidden_size), (features, hidden_size)
    fits = features in (5 * hidden_size, PARTS * hidden_size) and tuple(leaf.shape for leaf in params) == shapes
    if not fits or not all(np.isfinite(leaf).all() for leaf in params):
        return None
    return Start(params, about["layer"], about["model"])


def _is_about_start(about: Any) -> bool:
    if not isinstance(about, dict) or about.get("schema") != SCHEMA:
        return False
    return isinstance(about.get("layer"), int) and isinstance(about.get("model"), str)


def load_start(path: str | Path) -> Start:
    """Read what `save_start` wrote.

    Args:
        path: of the file.

    Raises:
        TPatchError: there is no such file, or it is something else.
    """
    if not Path(path).is_file():
        raise TPatchError(f"there is no start at {path}; tpatch learn MODEL REQUESTS -o {path} makes one")
    if (start := _read(Path(path))) is None:
        raise TPatchError(f"{path} is no start that tpatch learn wrote; make one: tpatch learn MODEL REQUESTS -o …")
    return start


@lru_cache(maxsize=1)
def _shipped() -> dict[tuple[str, int], Start]:
    """The starts that come with the library, by model and layer."""
    starts = map(load_start, sorted(SHIPPED.glob("*.safetensors")))
    return {(start.model, start.layer): start for start in starts}


@lru_cache(maxsize=1)
def _same_weights() -> dict[str, str]:
    """From models that have the same weights in INT8 or bfloat16 to the one in float32 for which a start was learnt.

    What is predicted is where steps begin; weights that are a little off are off by as little in what it says.
    """
    file = SHIPPED / "same_weights.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def find_start(model: Model, layer: int, wanted: str) -> StartParams | None:
    """The network that a setting names.

    Args:
        model: which is edited.
        layer: of the subject site.
        wanted: ``"auto"``, one that comes with the library if there is one for this model, be it in float32, bfloat16
            or INT8; ``"none"``; or a file.

    Raises:
        TPatchError: there is no such file, or it is for another model or layer.
    """
    if wanted == NONE:
        return None
    if wanted == AUTO:
        if not any(SHIPPED.glob("*.safetensors")):
            return None
        name = fingerprint(model)
        shipped = _shipped().get((_same_weights().get(name, name), layer))
        return None if shipped is None else shipped.params
    start = load_start(wanted)
    start.check(model, layer)
    return start.params
