"""What a model that T-Patcher has edited is made of."""

from functools import partial
from typing import Any

from flax import struct

from tpatch_jax.core.patch import Patch
from tpatch_jax.editors.model_memory import ModelMemory
from tpatch_jax.editors.tpatcher.previous import PreviousEdits
from tpatch_jax.editors.tpatcher.settings import TPatcherSettings
from tpatch_jax.models.model import Model

__all__ = ["EditState"]

_static: Any = partial(struct.field, pytree_node=False)


@struct.dataclass
class EditState:
    """An edited model: the unedited one, the neurons, and what later edits need to know.

    Attributes:
        model: the model without any neuron.
        patches: the neurons so far, ``{layer: [n, d]}``: the last layer's, and those at subjects if that site is used.
        memory: what is known about the unedited model at its last layer.
        previous: the edits so far, on which later neurons stay silent and which they must not break.
        subject_memory: what is known about the unedited model at the layer of the subject site, if that is used.
        subject_layer: that layer.
        settings: the editor's options, as they are meant for this model.
    """

    model: Model
    patches: dict[int, Patch]
    memory: ModelMemory
    previous: PreviousEdits
    subject_memory: ModelMemory | None = None
    subject_layer: int | None = _static(default=None)
    settings: TPatcherSettings = _static(default_factory=TPatcherSettings)
