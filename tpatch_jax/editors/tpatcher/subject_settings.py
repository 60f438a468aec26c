"""Options of the subject site."""

from dataclasses import dataclass, field

from tpatch_jax.core.checks import check_positive, check_range, check_types
from tpatch_jax.core.values import ValueTrainingSettings

__all__ = ["POSITIONS", "SubjectSettings"]

POSITIONS = ("subject", "prompt")


@dataclass(frozen=True)
class SubjectSettings:
    """Options of the subject site.

    No name stands for another setting of the editor as well, so that each can be given alone on the command line.

    Attributes:
        token: at whose last token: ``"subject"``, or ``"prompt"``, of use for comparison only.
        value: how values are trained.
        key_contexts: in how many contexts a key sees its subject at most; half of them without the rest of the prompt.
        value_contexts: through how many contexts a value is trained, the bare prompt included.
        shorter: through how many shorter wordings of the prompt as well, 0 to 3.
        same: through how many other wordings of the prompt's relation, where the library of frames knows it.
        neutral: on how many neutral prompts about the subject the edited model is kept close to the unedited one.
        chat: through how many conversations as well, where a request shall hold in chats.
        chat_neutral: so many of the neutral prompts are asked in a chat then.
        lower_case: whether a subject whose tokens are others in lower case gets a key for that spelling, too.
        key_floor: the lowest threshold of a key, where 0 is the mean query and 1 the subject's own.
        key_split: where the threshold lies between the hardest negative (0) and the edit's own queries (1).
        key_avoidance: how strongly the key of a statement turns away from subjects that end in the same word.
        key_rounds: how often a key turns away from what looks most like its subject and is something else.
        spelling_floor: the same as `key_floor` for keys of other spellings, whose tokens are those of common words.
        question_avoidance: how strongly the key of a question turns away from its subject where nothing is asked.
        question_aside: where between what such a key says of its subject in statements, the loudest of eight, and its
            own queries the threshold lies at least.
        question_floor: the same as `key_floor` for keys that turn away.
        question_split: the same as `key_split` for keys that turn away.
        key_nuisance: how strongly a key avoids directions in which only the context shows.
        value_lanes: how many values are trained together at most, on each device along the mesh axis ``"data"``; 0 is 2
            on a CPU, where more only take memory, and 8 elsewhere.
        value_precision: of the products by which values are trained: ``"float32"``; ``"bfloat16"``, summed in float32;
            or ``"auto"``, the latter where the devices multiply it faster and the network is large enough for that
            to matter. What a patch does is measured in the model's own precision in any case.
        key_raise_from: from so many edits at subjects on, those of earlier steps included, thresholds are raised by
            ``key_raise``, since of many keys one may well fire anywhere in a text.
        key_raise: so far from where a threshold is otherwise (0) to the edit's own queries (1).
        plateau: the response stops growing here, where 1 is that of the edit's own queries; it takes a second neuron.
            0 lets it grow.
        start: what predicts the values that training starts from: ``"auto"``, what comes with the library for this
            model, if anything; ``"none"``, which starts from zero; or a file that ``tpatch learn`` made.

    Raises:
        TPatchError: a value makes no sense.
    """

    token: str = "subject"
    value: ValueTrainingSettings = field(default_factory=ValueTrainingSettings)
    key_contexts: int = 6
    value_contexts: int = 3
    shorter: int = 3
    same: int = 4
    neutral: int = 16
    chat: int = 3
    chat_neutral: int = 6
    lower_case: bool = True
    key_floor: float = 0.7
    key_split: float = 0.4
    key_nuisance: float = 0.5
    key_avoidance: float = 0.05
    key_rounds: int = 3
    spelling_floor: float = 0.85
    question_avoidance: float = 0.05
    question_aside: float = 0.2
    question_floor: float = 0.5
    question_split: float = 0.4
    value_lanes: int = 0
    value_precision: str = "auto"
    key_raise_from: int = 256
    key_raise: float = 0.2
    plateau: float = 0.3
    start: str = "auto"

    def __post_init__(self) -> None:
        """Checks the values."""
        check_types(self)
        check_range(self, ("key_contexts", "value_contexts"), 1)
        check_range(self, ("neutral", "same", "chat", "chat_neutral", "value_lanes", "key_rounds", "key_raise_from"), 0)
        check_range(self, ("shorter",), 0, 3)
        check_range(
            self,
            ("key_floor", "spelling_floor", "key_split", "question_floor", "question_split", "key_nuisance"),
            0.0,
            1.0,
        )
        # At 1 a key would not fire on its own queries.
        check_range(self, ("key_raise", "question_aside"), 0.0, 0.9)
        check_range(self, ("key_avoidance", "question_avoidance", "plateau"), 0.0)
        check_range(self.value, ("steps",), 0)
        check_positive(self.value, ("aim", "damping", "farthest", "near"))
        check_positive(self.value, ("longest",), bounded=False)
        check_range(self.value, ("enough", "closeness"), 0.0)
