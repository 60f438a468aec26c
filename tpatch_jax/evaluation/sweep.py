"""Where a patch at an earlier layer does best: every layer asked for, at the subject's end and at the prompt's."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpatch_jax.core.devices import automatically
from tpatch_jax.editors.tpatcher.editor import edit
from tpatch_jax.editors.tpatcher.settings import TPatcherSettings
from tpatch_jax.editors.tpatcher.subject_settings import POSITIONS
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.measure import measure
from tpatch_jax.models.model import Model
from tpatch_jax.requests import EditRequest
from tpatch_jax.storage.files import write_text
from tpatch_jax.storage.settings import change
from tpatch_jax.typing import Progress

__all__ = ["best", "sweep", "write_sweep"]

FIGURES = ("exact", "rephrase_exact", "rephrase_token_accuracy", "locality")


@automatically
def sweep(
    model: Model,
    requests: Sequence[EditRequest],
    settings: TPatcherSettings,
    layers: Sequence[int],
    positions: Sequence[str] = POSITIONS,
    *,
    memory: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Edit the same requests together at each layer and position, and measure each.

    What a neuron there leaves wrong is not completed in the last layer, so that the figures are the site's alone.

    Args:
        model: the model; not changed.
        requests: what to correct; each has a subject, and rephrasings and unrelated prompts to measure with.
        settings: the editor's options; ``site``, ``layer`` and ``token`` are set here.
        layers: which layers, none of them the last.
        positions: ``"subject"``, ``"prompt"`` or both: at whose last token.
        memory: as for `tpatch_jax.edit`.
        seed: as for `tpatch_jax.edit`.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        One object for each: ``layer, position, exact, rephrase_exact, rephrase_token_accuracy, locality, score,
        forward_equivalents``. The score is the harmonic mean of ``exact``, ``rephrase_exact`` and ``locality``.

    Raises:
        TPatchError: a layer is not one, or a request has no subject.
    """
    for layer in layers:
        if not 0 <= layer < model.config.layers - 1:
            raise TPatchError(f"layer {layer} cannot be swept; choose from 0 to {model.config.layers - 2}")
    for number, request in enumerate(requests):
        if not request.subject:
            raise TPatchError(f"{request.name(number)} has no subject; a sweep needs requests with subjects")
    rows = []
    places = [(layer, position) for position in positions for layer in layers]
    for number, (layer, position) in enumerate(places):
        here = change(
            dataclasses.replace(settings, site="subject", layer=str(layer), complete=False), {"token": position}
        )
        patches, info = edit(model, requests, settings=here, memory=memory, seed=seed)
        figures = measure(model, patches, requests)
        row: dict[str, Any] = {"layer": layer, "position": position}
        row |= {name: figures[name] for name in FIGURES}
        row["score"] = _harmonic([figures[name] for name in ("exact", "rephrase_exact", "locality")])
        rows.append({**row, "forward_equivalents": info.forward_equivalents})
        if progress:
            progress(f"layer {layer}, {position}", number + 1, len(places))
    return rows


def _harmonic(shares: Sequence[float | None]) -> float:
    known = [share for share in shares if share is not None]
    return len(known) / sum(1 / share for share in known) if all(known) and known else 0.0


def best(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row with the highest score; of equals the cheapest.

    Example:
        >>> best([{"score": 0.5, "forward_equivalents": 1}, {"score": 0.9, "forward_equivalents": 2}])["score"]
        0.9
    """
    return max(rows, key=lambda row: (round(row["score"], 3), -row["forward_equivalents"]))


def write_sweep(folder: Path, model: Model, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> list[str]:
    """Write what a sweep measured: ``sweep.json``, settings for ``--config`` and, with matplotlib, a picture.

    Args:
        folder: where to.
        model: the model.
        rows: from `sweep`.
        about: what was swept, for the record.

    Returns:
        The names of the files.
    """
    from tpatch_jax.evaluation.pictures import draw_sweep

    chosen = best(rows)
    config = model.config
    written = {
        **about,
        "model": {"family": config.family, "layers": config.layers, "width": config.hidden_size},
        "rows": list(rows),
        "best": chosen,
    }
    write_text(folder / "sweep.json", json.dumps(written, indent=2) + "\n")
    lines = [f"# chosen by `tpatch sweep` among {len(rows)} sites, by the score in sweep.json: {chosen['score']:.3f}"]
    lines += ["site: subject", f"layer: {chosen['layer']}", f"token: {chosen['position']}", ""]
    write_text(folder / "settings.yaml", "\n".join(lines))
    return ["sweep.json", "settings.yaml", *draw_sweep(folder, rows)]
