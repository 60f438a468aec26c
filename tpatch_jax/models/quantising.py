"""A model's own weights in INT8: a quarter of the memory, and patches in float beside them."""

from typing import Any

import jax

from tpatch_jax.core import ffn
from tpatch_jax.core.devices import automatically
from tpatch_jax.core.int8 import has_int8, is_int8, plain_tree, quantise
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.model import Model, check_loaded
from tpatch_jax.typing import Params

__all__ = ["check_float", "dequantize_base", "quantize_base"]


@automatically
def quantize_base(model: Model) -> Model:
    """The model with its matrices in INT8, a scale for each output channel and for each token's embedding.

    ``w ≈ q·s`` with ``q = round(w / s)`` and ``s = max|w| / 127.5``. Weights alone: what is computed stays in float.
    Norms, biases, a classifier's head and what is attached stay as they are. An edit of such a model is fitted through
    the quantised network.

    Args:
        model: the model; not changed.

    Returns:
        A model that holds ``qwix.QArray`` in the place of its matrices, and whose ``dtype`` is ``"int8"``.

    Raises:
        TPatchError: the qwix package is missing, or the model is a mixture of experts.

    Example:
        >>> import tpatch_jax as tp
        >>> model = tp.quantize_base(tp.load_model("smollm2-135m"))  # doctest: +SKIP
        >>> patches, info = tp.edit(model, requests)  # doctest: +SKIP
        >>> tp.attach(model, patches).generate("The capital of France is", 1)  # doctest: +SKIP
        ' Lyon'
    """
    check_loaded(model, "quantize_base(model)")
    if model.config.mixture:
        raise TPatchError(
            f"{model.name!r} is a mixture of experts, whose kernels are not kept in INT8; load it in bfloat16 instead"
        )
    params = {name: _quantised(name, entry) for name, entry in model.params.items()}
    return model.with_params(params)


def _quantised(name: str, entry: Params) -> Params:
    """A part of the parameters with its matrices in INT8."""
    if name == "embed":
        # A row for each token: what is read of it alone, and as an unembedding a channel of the output.
        table = entry["embedding"]
        return {**entry, "embedding": table if is_int8(table) else quantise(table, 0)}
    return _kernels(entry) if name in ("layers", "head", "encoder") else entry


def _kernels(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    matrix = lambda name, leaf: name == "kernel" and not is_int8(leaf) and leaf.ndim == 2  # noqa: E731
    return {name: quantise(leaf, 1) if matrix(name, leaf) else _kernels(leaf) for name, leaf in entry.items()}


@automatically
def dequantize_base(model: Model) -> Model:
    """The model with all its weights as plain numbers again: those that the ones in INT8 stand for, ``q·s``.

    Args:
        model: what `quantize_base` returned, or any other model; not changed.

    Example:
        >>> corrected = tp.merge(tp.dequantize_base(model), patches)  # doctest: +SKIP
    """
    check_loaded(model, "dequantize_base(model)")
    return model.with_params(jax.jit(plain_tree)(model.params)) if has_int8(model.params) else model


def check_float(model: Model, what: str) -> None:
    """Make sure that a model's weights are plain numbers.

    Args:
        model: the model.
        what: what needs them, for the message.

    Raises:
        TPatchError: they are in INT8.
    """
    layers = {index: {**layer, "ffn": ffn.detach(layer["ffn"])} for index, layer in model.params["layers"].items()}
    if has_int8({**model.params, "layers": layers}):
        raise TPatchError(
            f"{model.name!r} has weights in INT8, and {what} needs plain ones; give tp.dequantize_base(model), or load "
            "it in float32"
        )
