"""Options of the T-Patcher editor, and the named sets of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

from tpatch_jax.core.arguments import describe
from tpatch_jax.core.checks import check_positive, check_range, check_types
from tpatch_jax.core.fit import FitSettings
from tpatch_jax.core.objective import Weights
from tpatch_jax.core.products import PRECISIONS
from tpatch_jax.editors.tpatcher.subject_settings import POSITIONS, SubjectSettings
from tpatch_jax.errors import TPatchError
from tpatch_jax.storage.settings import change

__all__ = ["PRESETS", "TPatcherSettings", "as_settings", "check_settings"]

LOUD = 64.0
"""`FitSettings.value_limit` of encoder-decoders."""


@dataclass(frozen=True)
class TPatcherSettings:
    """Options of the T-Patcher editor.

    Attributes:
        site: where patches go: ``"last"``, the mistaken token in the last layer; ``"subject"``, the last token of the
            subject in an earlier layer, completed in the last layer where that does not say the whole target;
            ``"auto"``, the subject if the model has an earlier layer for it. A request without a subject is edited in
            the last layer in any case.
        layer: of the subject site: ``"auto"``, a third of the way up, or a number.
        complete: whether what a neuron at a subject leaves wrong is completed in the last layer. A request without a
            subject is edited there all the same.
        fit: how a patch in the last layer is fitted.
        subject: how a patch at the subject is fitted.
        contexts: in how many contexts each prompt is seen, the bare one included.
        input_contexts: the same of models that read whole inputs: classifiers and encoder-decoders.
        rewordings: of an encoder-decoder at most so many of those contexts are other wordings that its memory has for
            the same question.
        input_key_steps: `FitSettings.key_steps` of those models.
        label_split: `FitSettings.split` of classifiers, whose queries tell inputs apart more plainly.
        image_split: the same of classifiers of images.
        answer_split: the same of encoder-decoders that read text.
        audio_split: the same of those that read sound: people who speak are less alike than a memory of voices knows.
        answer_negatives: `FitSettings.negatives` of encoder-decoders.
        answer_overshoot: `FitSettings.overshoot` of encoder-decoders: a norm behind it bounds what a value can do, and
            a rephrasing often makes a neuron fire but faintly.
        other_subjects: on how many versions of a prompt with another subject a patch must stay silent (needs a
            subject).
        other_edits: whether the other edits' queries are negatives as well.
        many_from: from so many requests on what stands inside their prompts is a negative too, since of many patches
            one may well fire anywhere (decoders).
        attempts: how often what does not hold yet is fitted again, in the presence of what does.
        most_tokens: at most so many wrong target tokens of one request get a neuron.
        nuisance_weight: how strongly the key avoids directions in which only the context shows.
        shrinkage: of the covariance behind the whitened key.
        train_on_rephrases: use the requests' rephrases as further contexts; otherwise they only measure.

    Raises:
        TPatchError: a value makes no sense.
    """

    site: str = "auto"
    layer: str = "auto"
    complete: bool = True
    fit: FitSettings = field(default_factory=FitSettings)
    subject: SubjectSettings = field(default_factory=SubjectSettings)
    contexts: int = 4
    input_contexts: int = 8
    rewordings: int = 5
    input_key_steps: int = 128
    label_split: float = 0.7
    image_split: float = 0.5
    answer_split: float = 0.3
    audio_split: float = 0.6
    answer_negatives: int = 512
    answer_overshoot: float = 8.0
    other_subjects: int = 4
    other_edits: bool = True
    many_from: int = 256
    attempts: int = 3
    most_tokens: int = 64
    nuisance_weight: float = 0.8
    shrinkage: float = 0.1
    train_on_rephrases: bool = False

    def __post_init__(self) -> None:
        """Checks the values; a layer may be given as a number."""
        if isinstance(self.layer, Integral) and not isinstance(self.layer, bool):
            object.__setattr__(self, "layer", str(int(self.layer)))
        check_types(self)
        check_range(self, ("contexts", "input_contexts", "answer_negatives", "most_tokens"), 1)
        check_range(self, ("rewordings", "input_key_steps", "other_subjects", "many_from", "attempts"), 0)
        check_positive(self, ("answer_overshoot",))
        check_range(self, ("nuisance_weight",), 0.0)
        check_range(self, ("label_split", "image_split", "answer_split", "audio_split", "shrinkage"), 0.0, 1.0)
        if self.fit.lanes & (self.fit.lanes - 1):
            raise TPatchError(f"lanes is {self.fit.lanes}; give a power of two")

    def for_inputs(self, answers: bool, pointwise: bool, inputs: str = "text") -> "TPatcherSettings":
        """The options as they are meant for a model that reads whole inputs.

        Args:
            answers: whether it is an encoder-decoder, not a classifier.
            pointwise: whether a single query decides what the model says.
            inputs: what it reads: ``"text"``, ``"image"`` or ``"audio"``.
        """
        splits = {"image": self.image_split, "audio": self.audio_split}
        split = splits.get(inputs, self.answer_split if answers else self.label_split)
        fit = replace(
            self.fit,
            key_steps=self.input_key_steps,
            negatives=self.answer_negatives if answers else self.fit.negatives,
            split=split,
            overshoot=self.answer_overshoot if answers else self.fit.overshoot,
            value_limit=LOUD if answers else self.fit.value_limit,
            eager=self.fit.eager or not pointwise,
        )
        return replace(self, contexts=self.input_contexts, fit=fit)


_PAPER = TPatcherSettings(
    fit=FitSettings(
        recipe="joint",
        weights=Weights(activation=1.0, memory=10.0, limit=0.0, margin=0.0, hardest=1000, label_smoothing=0.1),
        weight_decay=0.01,
    ),
    site="last",
    contexts=1,
    input_contexts=1,
    rewordings=0,
    other_subjects=0,
    other_edits=False,
    attempts=1,
    most_tokens=5,
)

PRESETS: Mapping[str, TPatcherSettings] = {
    "default": TPatcherSettings(fit=FitSettings(weights=Weights(memory=5.0, hardest=32))),
    "paper": _PAPER,
    "paper-fever": replace(
        _PAPER,
        fit=replace(
            _PAPER.fit,
            weights=Weights(activation=1.0, memory=5.0, limit=-3.0, margin=3.0, hardest=1000, entropy=0.1),
        ),
    ),
}
"""Named settings: ``default``, this library's best; ``paper`` and ``paper-fever``, the values of the paper's zsRE and
FEVER experiments. Two things differ from the authors' code: the neurons of one answer are fitted one by one and not
together, and the value's factor of ten is a constant and not trained beside it.

Source: Huang et al. 2023, section 5 and appendix.
"""


def as_settings(settings: TPatcherSettings | Mapping[str, Any] | str) -> TPatcherSettings:
    """Settings as a caller may give them.

    Args:
        settings: the settings; the name of a preset; or what to change in one by name, as ``--set`` has the names, in
            which ``preset`` may say in which.

    Raises:
        TPatchError: there is no such preset or setting, a value has the wrong type, or it is something else.

    Example:
        >>> as_settings({"site": "last", "fit.key_steps": 8}).fit.key_steps
        8
        >>> as_settings("paper") is as_settings({"preset": "paper"})
        True
    """
    if isinstance(settings, TPatcherSettings):
        return settings
    if isinstance(settings, Mapping):
        changes = {name: value for name, value in settings.items() if name != "preset"}
        return change(_preset(settings.get("preset", "default")), changes)
    if isinstance(settings, str):
        return _preset(settings)
    raise TPatchError(
        f"{describe(settings)} is no settings; give the name of a preset ({', '.join(sorted(PRESETS))}), changes by "
        'name such as {"site": "last", "fit.key_steps": 32}, or a TPatcherSettings'
    )


def _preset(name: Any) -> TPatcherSettings:
    if not isinstance(name, str) or name not in PRESETS:
        raise TPatchError(
            f"preset {name!r} does not exist; choose from {', '.join(sorted(PRESETS))}, or give changes by name such "
            'as {"site": "last"}'
        )
    return PRESETS[name]


def check_settings(settings: TPatcherSettings) -> None:
    """Make sure that an editor can be made with these options.

    Raises:
        TPatchError: a setting names nothing that exists, or two of them exclude each other.
    """
    if settings.site not in ("auto", "last", "subject"):
        raise TPatchError(f"site {settings.site!r} does not exist; use site=auto, site=last or site=subject")
    if settings.subject.token not in POSITIONS:
        raise TPatchError(f"token {settings.subject.token!r} does not exist; use token=subject or token=prompt")
    if settings.subject.value_precision not in PRECISIONS:
        raise TPatchError(
            f"value_precision {settings.subject.value_precision!r} does not exist; use one of {', '.join(PRECISIONS)}"
        )
    if settings.layer != "auto" and not settings.layer.isdecimal():
        raise TPatchError(f"layer {settings.layer!r} is not a layer; use layer=auto or a number, 0 being the lowest")
    if settings.fit.output_bias and settings.fit.recipe == "staged":
        raise TPatchError("output_bias trains without a threshold, which the staged recipe needs; use recipe=joint")
