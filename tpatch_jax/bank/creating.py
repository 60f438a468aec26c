"""A new bank, and the model that it is for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from tpatch_jax.bank.commit import write_bank
from tpatch_jax.bank.engine import TPATCHER, create_engine, settings_of
from tpatch_jax.bank.inspection import open_bank
from tpatch_jax.bank.layout import FORMAT, QUERIES
from tpatch_jax.bank.state import Bank
from tpatch_jax.core.arguments import as_path, check_kind
from tpatch_jax.core.devices import automatically
from tpatch_jax.editors.model_memory import collect_model_memory, pack_memory
from tpatch_jax.editors.registry import find_method
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.fingerprint import fingerprint
from tpatch_jax.models.model import DTYPES, Model, check_loaded, load_model
from tpatch_jax.storage.cache import cache_folder
from tpatch_jax.storage.files import check_vacant
from tpatch_jax.storage.reading import read_bytes

__all__ = ["check_model", "create_bank", "load_banked_model"]


@automatically
def create_bank(
    folder: str | Path,
    model: Model,
    *,
    method: str = TPATCHER,
    preset: str = "default",
    settings: Mapping[str, Any] | None = None,
    memory: str | Path | None = None,
) -> Bank:
    """Make an empty bank for a model.

    Args:
        folder: must not exist yet, or be empty.
        model: the model whose edits it will hold.
        method: how edits are made: ``"tpatcher"``, ``"grace"``, or another that can say what an edit is made of; see
            `tpatch_jax.editors.registry`.
        preset: the method's options by name: of T-Patcher ``"default"``, ``"paper"`` or ``"paper-fever"``.
        settings: changes to them by name; all edits of the bank are fitted with these.
        memory: a text file on which patches stay silent; copied into the bank. By default text is sampled from the
            model; classifiers and encoder-decoders need a file, an input a line. Of pictures, an ``.npz``, what the
            edited layer sees is kept, and no picture.

    Returns:
        The `Bank`.

    Raises:
        TPatchError: the folder is taken, a setting does not exist, or the memory cannot be read.

    Example:
        >>> import tpatch_jax as tp
        >>> bank = tp.create_bank("banks/facts", tp.load_model("smollm2-135m"))  # doctest: +SKIP
    """
    call = "create_bank(folder, model)"
    folder = as_path(folder, call, "a folder; give its path")
    check_loaded(model, call)
    if model.audio is not None:
        raise TPatchError(
            f"{model.name!r} reads sound, and a bank keeps texts, which it asks again; keep edits of recordings in "
            "folders of patches (tpatch edit -o PATCHES, tp.save_patches)"
        )
    check_kind(method, str, call, "the name of a method; give one such as 'tpatcher'")
    check_kind(settings, Mapping | None, call, "settings; give changes by name such as {'site': 'last'}, and preset=")
    memory = None if memory is None else as_path(memory, call, "a text file; give its path")
    changes = dict(settings or {})
    check_vacant(folder)
    editing, pictures = find_method(method), model.config.image is not None
    if pictures and method != TPATCHER:
        raise TPatchError(f"a bank of pictures holds edits of T-Patcher; {method!r} would read its pictures again")
    if preset not in editing.presets:
        raise TPatchError(f"preset {preset!r} does not exist; choose from {', '.join(sorted(editing.presets))}")
    manifest: dict[str, Any] = {"format": FORMAT, "preset": preset, "settings": changes}
    if method != TPATCHER:
        manifest["method"] = method
    # The editor refuses settings that make no sense, which the bank could never be rid of.
    create_engine(model, manifest)
    editing.check(model, settings_of(manifest))
    if memory is None and method == TPATCHER and model.config.architecture != "decoder":
        what = "an .npz of pictures" if pictures else "an input a line"
        raise TPatchError(f"{model.name!r} is no decoder and cannot sample text: give a memory file, {what}")
    text = None
    if memory is not None and pictures:
        # What the edited layer sees of them is enough: the pictures stay where they are.
        with jax.default_matmul_precision("highest"):
            known = collect_model_memory(model, model.layer(None), memory, cache=cache_folder())
        text, manifest["memory_file"] = pack_memory(known), QUERIES
    elif memory is not None:
        try:
            text = read_bytes(memory)
            text.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TPatchError(f"the memory {memory} cannot be read ({error}); give a UTF-8 text file") from None
    about = {
        "name": model.name
        if model.folder is None or not Path(model.name).exists()
        else str(Path(model.name).resolve()),
        "fingerprint": fingerprint(model),
        "family": model.config.family,
        "width": model.config.hidden_size,
        "layers": model.config.layers,
        "dtype": model.dtype,
    }
    write_bank(folder, {**manifest, "model": about}, text)
    return open_bank(folder)


def load_banked_model(bank: Bank, model: str | None = None, *, quiet: bool = True) -> Model:
    """Load the model that a bank is for, in the precision that it is for.

    Args:
        bank: the bank.
        model: where the model is now; by default where it was when the bank was made.
        quiet: show no progress bar while fetching.

    Raises:
        TPatchError: it cannot be loaded, or is another model.
    """
    about = bank.manifest["model"]
    # Any other precision is the checkpoint's own, which no name asks for.
    dtype = about["dtype"] if about["dtype"] in DTYPES else None
    loaded = load_model(model or about["name"], dtype=dtype, quiet=quiet)
    check_model(bank, loaded)
    return loaded


def check_model(bank: Bank, model: Model) -> None:
    """Make sure that a bank is for this very model.

    Raises:
        TPatchError: it was made for another configuration, other weights or another precision.
    """
    wanted, actual = bank.manifest["model"], fingerprint(model)
    if wanted["fingerprint"] != actual:
        raise TPatchError(
            f"{bank.folder} is for {wanted['name']!r} in {wanted['dtype']} (fingerprint {wanted['fingerprint']}), and "
            f"{model.name!r} has fingerprint {actual}: another configuration, other weights or another precision; "
            "use the model that the bank was made for, or make a bank for this one"
        )
