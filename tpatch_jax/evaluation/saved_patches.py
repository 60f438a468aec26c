"""What patches that were saved do to running text and to general ability; nothing is edited."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from tpatch_jax.core.devices import automatically
from tpatch_jax.core.layers import LayerPatches, count_neurons
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.choices import ChoiceQuestion, choice_figures, choice_probes
from tpatch_jax.evaluation.circumstances import package_versions, peak_memory
from tpatch_jax.evaluation.data_notes import DataNotes
from tpatch_jax.evaluation.journal import finish_report, reporting
from tpatch_jax.evaluation.protocols import MOMENTS
from tpatch_jax.evaluation.report import SCHEMA, write_report
from tpatch_jax.evaluation.running_text import WINDOW, patch_figures, read_windows, text_figures
from tpatch_jax.evaluation.scoring import Base, ScoredPrompts, ask, base_scores, model_scores
from tpatch_jax.models.fingerprint import fingerprint, fingerprint_attached
from tpatch_jax.models.model import Model
from tpatch_jax.models.patching import attach
from tpatch_jax.storage.cache import cache_folder
from tpatch_jax.storage.finished_parts import hash_file
from tpatch_jax.typing import Progress

__all__ = ["evaluate_choices", "evaluate_patches"]


@automatically
def evaluate_patches(
    model: Model,
    patches: LayerPatches,
    text: str | Path,
    *,
    text_tokens: int = 16384,
    output: str | Path | None = None,
    cache: bool = True,
    about: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure what patches that were saved do to running text; nothing is edited.

    Args:
        model: the unedited model.
        patches: ``{layer: [n, d]}``, of `tpatch_jax.load_patches` or `tpatch_jax.bank_patch`.
        text: a UTF-8 text file.
        text_tokens: at most so many tokens of it, from its start.
        output: the report folder; a report of the very same that is there already is read. ``None`` writes nothing.
        cache: keep what the unedited model says on disk between runs.
        about: further entries of the report's ``config``.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        A report as `evaluate` returns it, whose methods are ``unedited`` and ``patches``; the figures of the latter are
        those of `tpatch_jax.evaluation.running_text.patch_figures`.

    Raises:
        TPatchError: the text cannot be read, or the folder holds something else or is being written by another process.

    Example:
        >>> report = evaluate_patches(model, tp.load_patches("patches", model), "wiki.txt")  # doctest: +SKIP
        >>> report["results"][1]["metrics"]["perplexity_ratio"]  # doctest: +SKIP
        1.0004
    """
    windows = read_windows(model, text, text_tokens)
    config = {**(about or {}), "text": {"sha256": hash_file(text), "tokens": text_tokens, "window": WINDOW}}
    return _measure_patches(
        model, patches, windows, config, output, cache, progress, "reading the text",
        lambda base: (text_figures(base, base.outcome), patch_figures(model, base, patches)),
    )  # fmt: skip


@automatically
def evaluate_choices(
    model: Model,
    patches: LayerPatches,
    questions: Sequence[ChoiceQuestion],
    *,
    output: str | Path | None = None,
    cache: bool = True,
    about: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure what patches that were saved do to a model's general ability, by multiple choice; nothing is edited.

    Args:
        model: the unedited model.
        patches: ``{layer: [n, d]}``, of `tpatch_jax.load_patches` or `tpatch_jax.bank_patch`.
        questions: of `read_choices`.
        output: the report folder; a report of the very same that is there already is read. ``None`` writes nothing.
        cache: keep what the unedited model says on disk between runs.
        about: further entries of the report's ``config``.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        A report as `evaluate` returns it, whose methods are ``unedited`` and ``patches``, with the figures of
        `tpatch_jax.evaluation.choices.choice_figures`; of the latter also ``choices_accuracy_unedited`` and
        ``choices_points``, by how many hundredths the accuracy went up.

    Raises:
        TPatchError: the model labels texts, a question is too long for it, there is none, or the folder holds something
            else or is being written by another process.

    Example:
        >>> report = evaluate_choices(model, tp.load_patches("patches", model), questions)  # doctest: +SKIP
        >>> report["results"][1]["metrics"]["choices_points"]  # doctest: +SKIP
        -0.2
    """
    if model.config.labels:
        raise TPatchError(f"{model.name!r} labels its inputs and weighs no answers; give a model that writes text")
    if not questions:
        raise TPatchError("there are no questions; give one or more")
    probes = choice_probes(questions)
    content = json.dumps([[question.answer, len(question.choices)] for question in questions] + list(probes))
    config = {**(about or {}), "questions": hashlib.sha256(content.encode()).hexdigest()}

    def figures(base: Base) -> tuple[dict[str, float], dict[str, float]]:
        before = choice_figures(questions, base, base.outcome)
        after = choice_figures(questions, base, model_scores(attach(model, patches), base))
        known = before["choices_accuracy"]
        points = 100 * (after["choices_accuracy"] - known)
        return before, {**after, "choices_accuracy_unedited": known, "choices_points": points}

    return _measure_patches(
        model, patches, ask(model, probes), config, output, cache, progress, "asking the questions", figures,
        n=len(questions),
    )  # fmt: skip


def _measure_patches(
    model: Model,
    patches: LayerPatches,
    asked: ScoredPrompts,
    about: Mapping[str, Any],
    output: str | Path | None,
    cache: bool,
    progress: Progress | None,
    what: str,
    figures: Callable[[Base], tuple[dict[str, float], dict[str, float]]],
    n: int = 0,
) -> dict[str, Any]:
    """The report of saved patches: ``figures`` gives those of the unedited model and of the edited one."""
    config: dict[str, Any] = {
        "text": None, **about, "model": model.name, "fingerprint": fingerprint(model),
        "patches": fingerprint_attached(attach(model, patches)), "methods": ["patches"], "protocol": "batch", "n": n,
        "settings": {}, "activation": model.config.activation, "memory": None, "generate": False,
        "every": 50, "seed": 0,
    }  # fmt: skip
    folder = None if output is None else Path(output)
    tell, began = progress or (lambda what, done, total: None), time.perf_counter()
    with reporting(folder, config) as whole, jax.default_matmul_precision("highest"):
        if whole is not None:
            return whole
        base = base_scores(
            model, asked, cache=cache_folder() if cache else None, tell=lambda done: tell(what, done, len(asked.rows))
        )
        results = []
        for name, metrics in zip(("unedited", "patches"), figures(base), strict=True):
            cost = {"seconds": 0.0, "total_seconds": time.perf_counter() - began, "peak_memory_mib": peak_memory()}
            common = {"method": name, "protocol": "batch", "moment": MOMENTS["batch"], "n": n}
            result = {**common, "metrics": metrics, "cost": cost, "requests": {}}
            results.append(json.loads(json.dumps(result)))
        results[1]["neurons"] = count_neurons(patches)
        report = {
            "schema": SCHEMA, "config": config, "seed": 0, "versions": package_versions(), "data_sha256": None,
            "data": DataNotes().summary(), "probes": {}, "results": results,
        }  # fmt: skip
        if folder is not None:
            write_report(folder, report, {result["method"]: [] for result in results})
            finish_report(folder)
        return report
