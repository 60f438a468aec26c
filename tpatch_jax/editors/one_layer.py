"""The one layer whose down projection a method trains or copies."""

from tpatch_jax.core import ffn
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.model import Model
from tpatch_jax.models.quantising import check_float

__all__ = ["check_no_experts", "check_one_layer"]


def check_one_layer(model: Model, wanted: str, height: float, method: str, verb: str) -> int:
    """Make sure that a method can work on a layer of a model.

    Args:
        model: the model.
        wanted: a number, or ``"auto"``.
        height: where ``"auto"`` lies, 0 being the first layer and 1 the last.
        method: its name, for messages.
        verb: what the method does to the layer, for messages.

    Returns:
        The layer.

    Raises:
        TPatchError: there is no such layer, its network is a mixture of experts, something is attached there, or the
            weights are in INT8.
    """
    last = model.config.layers - 1
    layer = round(height * last) if wanted == "auto" else int(wanted)
    if layer > last:
        raise TPatchError(f"layer {wanted!r} does not exist; use layer=auto or 0 to {last}")
    check_no_experts(model, layer, method)
    if ffn.attached(model.params["layers"][layer]["ffn"]):
        raise TPatchError(f"something is attached to layer {layer}, which {method} {verb}; merge or detach it first")
    check_float(model, method)
    return layer


def check_no_experts(model: Model, layer: int, method: str) -> None:
    """Make sure that a layer has one down projection, which a method changes or copies.

    Args:
        model: the model.
        layer: the layer.
        method: its name, for the message.

    Raises:
        TPatchError: the layer's network is a mixture of experts.
    """
    if model.config.mixed(layer):
        dense = model.config.dense_layers
        others = f"take one of the layers without experts, {', '.join(map(str, dense))}, or " if dense else ""
        raise TPatchError(
            f"layer {layer} of {model.name!r} is a mixture of experts, which has no one down projection for {method}; "
            f"{others}use method tpatcher or grace, which stand beside the experts"
        )
