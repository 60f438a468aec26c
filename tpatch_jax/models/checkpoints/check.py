"""What a checkpoint is, what would be read of it, and what stands against it, from its settings and headers alone."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from tpatch_jax.errors import TPatchError
from tpatch_jax.models.checkpoints.folder import plan_folder, quantisation, read_settings
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.promises import promised
from tpatch_jax.models.families.registry import configure, family_of
from tpatch_jax.models.families.text_parts import TEXT_OF

__all__ = ["check_folder"]

_CLASSIFIERS = ("ForImageClassification", "ForSequenceClassification")
_OTHER_TASKS = ("ForMaskedLM", "ForQuestionAnswering", "ForRewardModel", "ForTokenClassification", "RewardModel")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.gguf")


def check_folder(folder: Path) -> dict[str, Any]:
    """Say what a folder holds and whether it can be read, before any weight is.

    Args:
        folder: with ``config.json``; weights may be missing, and are then not judged.

    Returns:
        ``model_type``; ``family``, ``architecture``, ``sizes`` and ``export`` as far as the settings can be read;
        ``text_of``, the architecture of which only the text part is read, or ``None``; ``weights``, what the files
        hold and what of it is read, or ``None``; ``problems``, empty for what can be read.

    Raises:
        TPatchError: there is no such folder.

    Example:
        >>> check_folder(Path("models/falcon-3"))["family"]  # doctest: +SKIP
        'llama'
    """
    if not folder.is_dir():
        raise TPatchError(f"{folder} is no folder; --check takes a model's folder, with config.json in it")
    result: dict[str, Any] = {
        "folder": str(folder),
        "model_type": _model_type(folder),
        "family": None,
        "architecture": None,
        "sizes": None,
        "export": None,
        "text_of": None,
        "weights": None,
        "problems": [],
    }
    try:
        settings = read_settings(folder)
        result["family"] = family_of(settings).name
        result["export"] = promised(family_of(settings))["export"]
        result["text_of"] = settings.get(TEXT_OF)
        config = configure(settings)
        result |= {"architecture": config.architecture, "sizes": _sizes(config)}
        if config.mixture and not config.mixture.joined_width:
            # Some families have models of both kinds.
            result["export"] = "approximate only" if config.mixture.normalised and not config.mixture.limit else "none"
        if quantisation(folder, settings) or any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
            plan = plan_folder(folder, settings=settings, compare=False)
            result |= {"sizes": _sizes(plan.config), "problems": list(plan.problems)}
            result["weights"] = {
                "files": len(set(plan.shards.values())),
                "tensors": len(plan.names),
                "parameters": sum(plan.sizes.values()),
                "types": dict(sorted(Counter(plan.kinds.values()).items())),
                "left_out": sorted(plan.left_out),
            }
        elif problem := _other_head(settings, config):
            # Tensors would tell; without any, the name of the class that wrote them does.
            result["problems"] = [problem]
    except TPatchError as error:
        result["problems"] = [str(error)]
    return result


def _model_type(folder: Path) -> str | None:
    try:
        settings = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    named = settings.get("model_type") if isinstance(settings, dict) else None
    return named if isinstance(named, str) else None


def _other_head(settings: dict[str, Any], config: NetworkConfig) -> str:
    """Why a checkpoint's head cannot be read, by the class that it names; empty where it can or none is named."""
    named = settings.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    if not name:
        return ""
    if config.labels:
        if name.endswith(_CLASSIFIERS):
            return ""
        return (
            f"config.json names {name}, an encoder without a classification head; train one with `tpatch finetune`, or "
            "take a checkpoint that was made for sequence classification"
        )
    if name.endswith((*_CLASSIFIERS, *_OTHER_TASKS, "EncoderModel")):
        return (
            f"config.json names {name}, whose head does not say the next token, and only encoders are edited as "
            "classifiers; take the checkpoint that generates text"
        )
    return ""


def _sizes(config: NetworkConfig) -> dict[str, Any]:
    mixture = config.mixture
    experts = {}
    if mixture:
        experts = {"experts": mixture.experts, "experts_used": mixture.active, "expert_width": mixture.width}
    if mixture and mixture.joined_width:
        experts["shared_expert_width"] = mixture.joined_width
    return {
        "layers": config.layers,
        "hidden_size": config.hidden_size,
        "ffn_width": config.ffn_width,
        "heads": config.heads,
        "key_value_heads": config.key_value_heads,
        "context": config.context,
        "vocabulary": config.vocabulary,
        "tied": config.tied,
        "labels": list(config.labels),
        **experts,
    }
