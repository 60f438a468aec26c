"""AlphaEdit as an editor: MEMIT's shares, written where general text hardly reads, beside the keys of earlier edits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from jax import Array
from jaxtyping import Float

from tpatch_jax.core.checks import check_positive, check_range
from tpatch_jax.editors.base import EditInfo, Editor, EditorFunctions
from tpatch_jax.editors.locating import with_spelling
from tpatch_jax.editors.registry import Method, register_editor
from tpatch_jax.editors.repeats import step_once
from tpatch_jax.editors.rome import memit as memit_module
from tpatch_jax.editors.rome.hidden_moment import hidden_moment, moment_rows, sampled_contexts
from tpatch_jax.editors.rome.memit import check_layers, step_layers
from tpatch_jax.editors.rome.rank_one import project_update
from tpatch_jax.editors.rome.state import (
    RomeState,
    check_moment,
    edited,
    null_space,
    restore,
    save,
)
from tpatch_jax.editors.rome.subject_value import ValueSettings, check_value
from tpatch_jax.models.model import Model
from tpatch_jax.models.networks import Batch
from tpatch_jax.requests import EditRequest
from tpatch_jax.typing import PathLike, Progress, RngKey

__all__ = ["ALPHAEDIT_PRESETS", "AlphaEditSettings", "alphaedit", "check_alphaedit"]


@dataclass(frozen=True)
class AlphaEditSettings:
    """Options of AlphaEdit, the authors' values but for the extra steps of `ValueSettings`.

    Attributes:
        layers: as for `tpatch_jax.editors.rome.memit.memit_layers`; the authors take MEMIT's.
        null_space: directions of ``C`` with an eigenvalue below this are the null space, in the units of ``C``.
        weight: ``λ``, by which updates are kept small; their code calls it ``L2``.
        value: how the stream's new values are trained, at the last of the layers.
        keep_failed: as for `tpatch_jax.editors.rome.memit.MemitSettings`.
        moment_tokens: at most so many tokens of a memory text count for ``C``.
        together: so many values are trained together at most.

    Raises:
        TPatchError: a value makes no sense.
    """

    layers: str = "auto"
    null_space: float = 0.02
    weight: float = 10.0
    value: ValueSettings = field(default_factory=lambda: ValueSettings(value_steps=25, clamp=0.75))
    keep_failed: bool = True
    moment_tokens: int = 65536
    together: int = 8

    def __post_init__(self) -> None:
        """Checks the values."""
        check_value(self.value)
        check_moment(self.moment_tokens, 0)
        check_positive(self, ("null_space", "weight"))
        check_range(self, ("together",), 1)


ALPHAEDIT_PRESETS: Mapping[str, AlphaEditSettings] = {"default": AlphaEditSettings()}
"""Named settings of AlphaEdit: ``default``, its authors' for GPT-J, with extra steps for targets that these miss.

Source: Fang et al. 2025, the published code.
"""


def check_alphaedit(model: Model, settings: AlphaEditSettings) -> tuple[int, ...]:
    """Make sure that AlphaEdit can edit a model with these options.

    Args:
        model: the model.
        settings: the options.

    Returns:
        The layers.

    Raises:
        TPatchError: as `tpatch_jax.editors.rome.memit.check_memit`.
    """
    return check_layers(model, "AlphaEdit", settings.layers)


def alphaedit(
    settings: AlphaEditSettings = ALPHAEDIT_PRESETS["default"],
    *,
    memory: PathLike | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Editor:
    """The AlphaEdit editor.

    Values, keys and shares are those of `tpatch_jax.editors.rome.memit.memit`; each layer then takes
    ``(P(KᵀK + E) + λI)⁻¹·PKᵀR``, where ``P`` projects on the directions that general text hardly uses and ``E`` is of
    the keys that earlier steps wrote: what is said to preserved keys stays by construction, what earlier edits say by
    least squares. Nothing can be taken out again but by going back to an earlier state.

    Where it differs from the authors' code: as MEMIT here does; and ``C`` is of 65,536 tokens where theirs is of
    100,000 articles, which leaves ``P`` larger on a model with many hidden neurons.

    Args:
        settings: its options.
        memory: a text file for ``C``; by default text is sampled from the model.
        cache: folder where statistics are kept between runs.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        The `Editor`; its state is a `tpatch_jax.editors.rome.state.RomeState`.

    Raises:
        TPatchError: on ``init``, as `tpatch_jax.editors.rome.memit.memit`; or no direction is below ``null_space``.

    Source: Fang et al., "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models", ICLR 2025.

    Example:
        >>> editor = alphaedit()
        >>> state = editor.init(model, jax.random.key(0))  # doctest: +SKIP
        >>> state, info = editor.step(state, requests, jax.random.key(0))  # doctest: +SKIP
    """

    def init(model: Model, rng: RngKey) -> RomeState:
        layers = check_alphaedit(model, settings)
        value = settings.value if settings.value.clamp else settings.value._replace(clamp=0.75)
        rows = moment_rows(model, memory, settings.moment_tokens, cache=cache, progress=progress)
        projections = {
            layer: null_space(
                hidden_moment(model, layer, rows, cache=cache, progress=progress), layer, settings.null_space
            )
            for layer in layers
        }
        settled = replace(settings, layers=",".join(map(str, layers)), value=value)
        contexts = sampled_contexts(model, memit_module.CONTEXTS)
        return RomeState(model, {}, {}, contexts, settled, projections)

    def step(state: RomeState, requests: Sequence[EditRequest], rng: RngKey) -> tuple[RomeState, EditInfo]:
        def run(given: list[EditRequest]) -> tuple[RomeState, EditInfo]:
            return step_layers(state, with_spelling(state.model, given), "AlphaEdit", _write, progress)

        return step_once(state.model, requests, run)

    def apply(state: RomeState, batch: Batch) -> Float[Array, "..."]:
        return edited(state).apply(batch)

    return EditorFunctions(init, step, apply)


def _write(state: RomeState, layer: int, keys: Array, residuals: Array) -> RomeState:
    network = edited(state).params["layers"][layer]["ffn"]
    projection, earlier = state.projections[layer], state.earlier.get(layer)
    after = project_update(network, keys, residuals, projection, state.settings.weight, earlier)
    return state.with_network(layer, after).with_keys(layer, keys)


register_editor(
    Method(
        name="alphaedit",
        presets=ALPHAEDIT_PRESETS,
        build=lambda settings, memory, cache, progress: alphaedit(
            settings, memory=memory, cache=cache, progress=progress
        ),
        model=edited,
        save=save,
        restore=restore,
        check=check_alphaedit,
        undo="none",
        stock_checkpoint=True,
    )
)
