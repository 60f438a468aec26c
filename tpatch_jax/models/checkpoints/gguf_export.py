"""Corrected models as GGUF files, for llama.cpp and what is built on it: no byte of an original weight changes.

The patch neurons of a layer become more rows of its gate and up projections and more columns of its down projection,
whole blocks behind the original's. llama.cpp wants one width for all layers, so the others get neurons of zeros. Their
biases are separate tensors, ``blk.N.ffn_gate.bias`` and ``blk.N.ffn_up.bias``, which llama.cpp adds where they are.
"""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from tpatch_jax.core.arguments import as_path, check_call, check_kind, install_advice
from tpatch_jax.core.devices import automatically
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.checkpoints.export import merge_attached
from tpatch_jax.models.checkpoints.gguf_blocks import TYPES, type_named
from tpatch_jax.models.checkpoints.gguf_plan import FilePlan, ModelPlan, Plan, PlannedTensor
from tpatch_jax.models.model import Model, check_loaded
from tpatch_jax.models.quantising import check_float
from tpatch_jax.storage.files import check_new_file, replace_file
from tpatch_jax.typing import Progress

__all__ = ["KEEP", "GGUFInfo", "check_gguf_output", "export_gguf"]

KEEP = "keep"
"""In place of a type: every tensor stays in the type that it has."""


class GGUFInfo(NamedTuple):
    """What became of a model as a GGUF file.

    Attributes:
        architecture: as llama.cpp calls it.
        type: ``"keep"``, or the type of all matrices.
        neurons: how many patch neurons it holds.
        silent_neurons: how many neurons of zeros were added so that all layers have one width, of whole blocks.
        ffn_width: that width.
        copied: tensors that are those of the source, byte for byte.
        widened: tensors that hold all of the source's blocks as they were, and more.
        added: tensors that the source does not have, such as the patches' biases.
        converted: matrices that were stored anew, in that type.
        rounding: how far the patches' weights are off in the file, relative to themselves.
        bytes: the size of the file.
        bytes_added: so many more than the GGUF file has that the model was read from; 0 if it was read from a folder.
    """

    architecture: str
    type: str
    neurons: int
    silent_neurons: int
    ffn_width: int
    copied: int
    widened: int
    added: int
    converted: int
    rounding: float
    bytes: int
    bytes_added: int

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return self._asdict()


@automatically
def export_gguf(model: Model, path: str | Path, *, type: str = KEEP, progress: Progress | None = None) -> GGUFInfo:
    """Write a corrected model as a GGUF file, whole or not at all.

    Of a model that was read from a GGUF file, keys, tokenizer and chat template are copied, and so is every weight,
    byte for byte: a patched feed-forward network gets new rows in its gate and up projections and new blocks in its
    down projection, the others get neurons of zeros, for llama.cpp wants one width. With another ``type`` all matrices
    are stored in it instead, embeddings in at least eight bits unless they had fewer.

    Of a model that was read from a folder, all is written anew: a Llama, what `tpatch_jax.export_model` writes as one,
    or a GPT-2, whose tokenizer is a byte-level BPE.

    Args:
        model: a model with merged patches; attached ones are merged first. Not changed.
        path: the file to write, ``NAME.gguf``; must not exist yet.
        type: ``"keep"``, or what all matrices are stored as: ``"f32"``, ``"f16"``, ``"bf16"``, ``"q8_0"``, ``"q5_1"``,
            ``"q5_0"``, ``"q4_1"`` or ``"q4_0"``.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        The `GGUFInfo`.

    Raises:
        TPatchError: llama.cpp has no biases for such a model, the model's weights are not those of the GGUF file that
            it was read from, new neurons cannot be written in a tensor's type, or the output exists.

    Example:
        >>> import tpatch_jax as tp
        >>> model = tp.load_model("model.gguf")  # doctest: +SKIP
        >>> patch = tp.load_patches("patches/lyon", model)  # doctest: +SKIP
        >>> tp.export_gguf(tp.merge(model, patch), "corrected.gguf").neurons  # doctest: +SKIP
        4
    """
    call = "export_gguf(model, path)"
    check_loaded(model, call)
    check_float(model, "export_gguf")
    path = as_path(path, call, "a file; give its path")
    check_kind(type, str, "export_gguf(model, path, type=…)", "the name of a type; give 'keep', 'f16' or 'q8_0'")
    check_call(progress=progress)
    check_gguf_output(path, model.name, type)
    source, kind = _source(model), None if type == KEEP else type_named(type)
    merged = merge_attached(model)
    plan = FilePlan(merged, source, kind) if source else ModelPlan(merged, kind)
    tensors = list(plan.tensors())
    with replace_file(path) as temporary:
        _write(plan, tensors, temporary, progress)
        size = temporary.stat().st_size
    fates = Counter(tensor.fate for tensor in tensors)
    return GGUFInfo(
        architecture=plan.metadata["general.architecture"],
        type=type,
        neurons=sum(plan.merged.values()),
        silent_neurons=plan.silent,
        ffn_width=plan.target.ffn_width,
        copied=fates["copied"],
        widened=fates["widened"],
        added=fates["added"],
        converted=fates["converted"],
        rounding=plan.rounding,
        bytes=size,
        bytes_added=size - source.stat().st_size if source else 0,
    )


def check_gguf_output(path: Path, source: str, type: str) -> None:
    """Make sure that a GGUF file can be written, before any work begins.

    Args:
        path: the file.
        source: what the user calls the model.
        type: as for `export_gguf`.

    Raises:
        TPatchError: the file exists, is the model itself or has another ending, there is no such type, or the gguf
            package is missing.
    """
    try:
        import gguf  # noqa: F401 (only whether it is there)
    except ImportError as error:
        raise TPatchError(f"writing GGUF needs the gguf package: {install_advice('gguf>=0.17', 'gguf')}") from error
    if type != KEEP and type not in TYPES:
        type_named(type)
    if path.suffix.lower() != ".gguf":
        raise TPatchError(f"{path} is no name of a GGUF file; write to NAME.gguf")
    if path.exists() and Path(source).exists() and path.samefile(source):
        raise TPatchError(f"{path} is the model itself, which stays as it is; choose another output file")
    check_new_file(path)


def _source(model: Model) -> Path | None:
    """The GGUF file that a model was read from, if it was."""
    source = Path(model.name).expanduser()
    if source.suffix.lower() != ".gguf" or source.is_dir():
        return None
    if not source.is_file():
        raise TPatchError(
            f"{source}, which the model was read from, is not there any more; put it back, or load the model from "
            "where it is now"
        )
    return source


def _write(plan: Plan, tensors: list[PlannedTensor], path: Path, progress: Progress | None) -> None:
    writer = plan.writer(path)
    for tensor in tensors:
        tensor.announce(writer)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, tensor in enumerate(tensors, 1):
            writer.write_tensor_data(tensor.content())
            if progress is not None:
                progress("writing", done, len(tensors))
    finally:
        writer.close()
