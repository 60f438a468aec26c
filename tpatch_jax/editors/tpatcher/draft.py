"""Edits that are fitted and not yet committed: values that the stages of a step hand on."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
from flax import struct

from tpatch_jax.core.layers import LayerPatches
from tpatch_jax.core.patch import Patch, concatenate, sized, take
from tpatch_jax.editors.tpatcher.previous import PreviousEdits, find_firing, refresh_sites
from tpatch_jax.editors.tpatcher.rounds import Fitted, TargetTokens
from tpatch_jax.editors.tpatcher.subject_site import SubjectNeuron, Subjects
from tpatch_jax.models.collection import Sites
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach

__all__ = ["Draft", "SubjectDraft", "with_subject_neurons"]

_static: Any = partial(struct.field, pytree_node=False)


def with_subject_neurons(model: Model, layer: int | None, patch: Patch) -> Model:
    """The model with neurons at subjects attached, in few sizes, so that a new number seldom compiles anything."""
    return attach(model, {layer: sized(patch)}) if layer is not None and patch.key.shape[0] else model


@struct.dataclass
class SubjectDraft:
    """The neurons at subjects in one step.

    Attributes:
        unedited: the model without any neuron.
        model: the same with all neurons at subjects, of earlier steps and of this one: what the last layer stands on.
        before: those of earlier steps, ``[n, d]``.
        patch: those of this step, ``[n, d]``.
        previous: the earlier edits as the last layer sees them with these neurons.
        layer: where they are; ``None`` where this site is not used.
        neurons: what each neuron of this step is.
        subjects: the subjects of this step's requests.
    """

    unedited: Model
    model: Model
    before: Patch
    patch: Patch
    previous: PreviousEdits
    layer: int | None = _static(default=None)
    neurons: tuple[SubjectNeuron, ...] = _static(default=())
    subjects: Subjects | None = _static(default=None)

    def without(self, positions: Iterable[int]) -> "SubjectDraft":
        """The same with the neurons of some requests taken out; itself if they have none."""
        dropped = set(positions)
        kept = [neuron for neuron in self.neurons if neuron.position not in dropped]
        if len(kept) == len(self.neurons):
            return self
        left = take(self.patch, [neuron.neuron for neuron in kept])
        lost = take(self.patch, [neuron.neuron for neuron in self.neurons if neuron.position in dropped])
        model = with_subject_neurons(self.unedited, self.layer, concatenate([self.before, left]))
        previous = refresh_sites(model, self.previous, find_firing(self.previous, lost))
        kept = tuple(neuron._replace(neuron=number) for number, neuron in enumerate(kept))
        return self.replace(model=model, patch=left, neurons=kept, previous=previous)  # type: ignore[attr-defined]


@struct.dataclass
class Draft:
    """Edits that are fitted and not yet committed.

    Attributes:
        subjects: the neurons at subjects.
        bare: what the cut in the last layer gives at the target tokens after the bare prompts, with those neurons.
        former: the neurons of earlier steps in the last layer, as they were, ``[n, d]``.
        last: the same, some with their threshold raised above queries where something else is wanted now.
        targets: the target tokens.
        fitted: the neurons in the last layer, ``last`` first, and how their fits went.
        raised_for: the target tokens for which thresholds were raised.
        already: positions of requests that held before anything was fitted in the last layer.
        kept: which of the new neurons in the last layer stay; before `verify_draft`, all.
        failures: items whose target does not come out, with the reason.
    """

    subjects: SubjectDraft
    bare: Sites
    former: Patch
    last: Patch
    targets: TargetTokens = _static()
    fitted: Fitted = _static()
    raised_for: np.ndarray = _static()
    already: frozenset[int] = _static()
    kept: np.ndarray = _static()
    failures: dict[int, str] = _static(default_factory=dict)

    def patches(self, last_layer: int) -> LayerPatches:
        """The neurons so far and those that stay, by layer."""
        older = self.last.key.shape[0]
        final = take(self.fitted.patch, np.r_[np.arange(older), older + self.kept])
        if self.subjects.layer is None:
            return {last_layer: final}
        return {self.subjects.layer: concatenate([self.subjects.before, self.subjects.patch]), last_layer: final}
