"""Corrected models for the stock transformers library: one width for all layers, and biases only where it has them.

`tpatch_jax.merge` widens the layers that hold patches and gives them biases. Stock networks want one width everywhere,
so the other layers get neurons of zeros, which add exactly nothing; and where a stock network can have no biases, the
model is written as another architecture that can (`FORMS`), if it is one in all but name. A T5's encoder is as wide as
its decoder. Beside experts most stock networks have no place for neurons, so each expert gets them, if their weights
for a token add up to one; where some experts are for every token, there are more of them.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tpatch_jax.core import ffn
from tpatch_jax.core.arguments import as_path, check_call
from tpatch_jax.core.devices import automatically
from tpatch_jax.core.patch import Patch
from tpatch_jax.core.per_tensor import merge_per_tensor, weight_excess
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import networks
from tpatch_jax.models.chat import render_request
from tpatch_jax.models.checkpoints import folder as checkpoint
from tpatch_jax.models.checkpoints.layout import flatten
from tpatch_jax.models.checkpoints.outliers import spread_outliers
from tpatch_jax.models.checkpoints.rounded_edits import round_weights, strengthen_edits
from tpatch_jax.models.collection import collect, predicted
from tpatch_jax.models.config import NetworkConfig
from tpatch_jax.models.families.family import is_longrope
from tpatch_jax.models.families.registry import configure, family_of
from tpatch_jax.models.memory_text import memory_rows
from tpatch_jax.models.model import Model, check_loaded
from tpatch_jax.models.patching import unmerge
from tpatch_jax.models.quantising import check_float
from tpatch_jax.models.rows import ASK
from tpatch_jax.models.shapes import merged_neurons, parameter_shapes
from tpatch_jax.requests import EditRequest, as_requests
from tpatch_jax.storage.cache import cache_folder
from tpatch_jax.storage.files import check_vacant, replace_folder
from tpatch_jax.typing import Params, Progress

__all__ = [
    "PER_TENSOR",
    "ExportError",
    "ExportInfo",
    "ask_requests",
    "common_width",
    "constant_direction",
    "describe_exact",
    "export_model",
    "first_position",
    "merge_attached",
    "requests_said",
]


MULTIPLES = (256, 32, 8)
"""Widths are rounded up to the first of these that the original's is a multiple of, or else to the last: llama.cpp's
quantiser works on blocks of 32 weights, its K-quants on 256, and leaves the down projection of every layer in 16 bits
where they do not fill a row; matrix units read widths off 8 more slowly.
"""
PER_TENSOR = "per-tensor"
OUTLIER_TEXTS = 32
"""On so many memory texts neurons are looked for that fire hundreds of times as strongly as others."""
RIDGE = 1e-3
HELD_OUT = 4
"""One memory text in so many measures the error; the others choose the direction that stands for a bias."""
EXPORT = "tpatch_export.json"
CONSTANT = 1e-4
"""By so much rounding may change a bias that is folded away exactly."""

_DENSE_WIDTH = "intermediate_size"
"""In ``config.json`` of a mixture of experts: the width of the layers without experts."""


class ExportError(NamedTuple):
    """How far an approximate export is from the corrected model, on memory texts that it was not made from.

    Attributes:
        tokens: so many positions were compared.
        max_logit_difference: the largest absolute difference of any logit.
        mean_logit_difference: the mean absolute difference.
        same_argmax: share of positions whose most probable next token is the same.
        held: the requests that still hold, by id.
        lost: those that do not any more.
    """

    tokens: int
    max_logit_difference: float
    mean_logit_difference: float
    same_argmax: float
    held: tuple[str, ...]
    lost: tuple[str, ...]


class ExportInfo(NamedTuple):
    """What became of a model for the stock transformers library.

    Attributes:
        form: ``"exact"``, ``"exact as"`` an architecture of `FORMS`, or ``"approximate"``.
        model_type: the architecture that ``config.json`` names.
        neurons: how many patch neurons it holds.
        silent_neurons: how many neurons of zeros were added so that all layers have one width, a T5's encoder included;
            of a mixture to each expert.
        ffn_width: that width, of a mixture that of each expert, or of those together that every token passes through.
        parameters_added: numbers more than the uncorrected model has.
        bytes_added: and bytes.
        share: ``parameters_added`` as a share of the uncorrected model's.
        error: of an approximate export or one that is safe for others' quantisation, else ``None``.
        safe_for: ``"per-tensor"`` if it is, else ``None``.
        weight_excess: how many times as large as the network's largest weight the largest of the patches is, in a
            matrix that both are in; above 1, quantising per tensor costs the network bits.
        split_neurons: of a safe export how many neurons were added to share hidden values that would set the scale of
            all others; they stand where silent ones would.
        held_rounded: of a safe export, the requests that still hold after its layers' matrices were rounded to INT8
            with one scale each, by id.
        lost_rounded: those that do not any more.
    """

    form: str
    model_type: str
    neurons: int
    silent_neurons: int
    ffn_width: int
    parameters_added: int
    bytes_added: int
    share: float
    error: ExportError | None = None
    safe_for: str | None = None
    weight_excess: float = 0.0
    split_neurons: int = 0
    held_rounded: tuple[str, ...] = ()
    lost_rounded: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {**self._asdict(), "error": self.error and self.error._asdict()}


@automatically
def export_model(
    model: Model,
    folder: str | Path,
    *,
    approximate: bool = False,
    safe_for: str | None = None,
    requests: Sequence[EditRequest] = (),
    memory: str | Path | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> ExportInfo:
    """Write a corrected model as a folder that the stock transformers library loads, whole or not at all.

    All feed-forward networks get the width of the widest, by neurons of zeros. Biases that the architecture can have
    are added, zero but for the patches. A network whose stock code has no biases there becomes another that has, where
    that is the very same: a Mistral, Qwen2 or Phi-3 a Llama, or with windows a SmolLM3; a Gemma a Granite; a Qwen3 a
    Doge.

    With ``approximate``, an architecture without biases holds ``q·k + b`` as ``q·(k + b·u)``, with ``u`` by ridge least
    squares such that ``q·u ≈ 1`` on queries of unrelated text and of the requests.

    With ``safe_for="per-tensor"`` no weight of a patch is larger than the network's largest, so that INT8 with one
    scale for each matrix, which dynamic quantisation of torch and onnxruntime uses by default, costs the network no
    more than without patches. Neurons are less sharp then (`tpatch_jax.core.per_tensor`), and what that changes is
    measured. A decoder's activations that dwarf all others are spread (`tpatch_jax.models.checkpoints.outliers`), which
    changes nothing that is computed, so that what is rounded with one scale for all tokens keeps the others.

    Args:
        model: a model with merged patches; attached ones are merged first. Not changed.
        folder: must not exist yet, or be empty.
        approximate: if the model cannot be written exactly, write it approximately, and measure how far off it is.
        safe_for: ``"per-tensor"``, or ``None``.
        requests: what the patches are for; an approximate or a safe export says which of them still hold.
        memory: for these, a text file to fit and measure on; by default text is sampled from the model.
        cache: keep that text on disk between runs, where `tpatch_jax.edit` keeps it.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        The `ExportInfo`; it is also written into the folder, as ``tpatch_export.json``.

    Raises:
        TPatchError: the architecture cannot hold the patches exactly and ``approximate`` was not given, a patch is
            attached with ReLU to a network of another activation, the folder holds something already, or a safe form
            is asked for where there are no patches, or no biases that it needs.

    Example:
        >>> import tpatch_jax as tp
        >>> model = tp.load_model("smollm2-135m")  # doctest: +SKIP
        >>> patch = tp.load_patches("patches/lyon", model)  # doctest: +SKIP
        >>> tp.export_model(tp.merge(model, patch), "lyon").form  # doctest: +SKIP
        'exact'
    """
    call = "export_model(model, folder)"
    check_loaded(model, call)
    check_float(model, "export_model")
    folder = as_path(folder, call, "a folder; give its path")
    requests = as_requests(requests)
    memory = None if memory is None else as_path(memory, call, "a text file; give its path")
    check_call(progress=progress)
    if safe_for not in (None, PER_TENSOR):
        raise TPatchError(f"safe_for={safe_for!r} is no way to quantise; give {PER_TENSOR!r}, or leave it out")
    check_vacant(folder)
    # ModernBERT's stock network knows both, the others do not.
    if model.config.pooling != "first" and model.config.family != "modernbert":
        raise TPatchError(
            f"the head of {model.name!r} reads the {model.config.pooling} of all tokens, and a stock "
            f"{model.settings['model_type']} reads the first; use tp.save_model, whose folder this library reads"
        )
    model = merge_attached(model)
    _check_shares(model)
    settings, target, form, problems = describe_exact(model, common_width(model), tuple(FORMS))
    error, params = None, model.params
    if safe_for is not None and (problems or not (target.ffn_bias or target == model.config)):
        why = " and ".join(problems) or f"a {model.settings['model_type']} has none"
        raise TPatchError(
            f"{model.name!r} cannot be made safe for quantising per tensor: that needs biases in its feed-forward "
            f"networks, and {why}; quantise it per channel instead"
        )
    if problems and not approximate:
        raise TPatchError(
            f"{model.name!r} cannot be written exactly for the stock transformers library: "
            f"a {model.settings['model_type']} has no biases in its feed-forward networks there, and this one is no "
            f"{form.removeprefix('exact as ') or 'Llama'}, because {' and '.join(problems)}. Use --approximate "
            "(approximate=True), which folds the biases away and states the error that it measured; or keep the "
            "patches beside the model (tpatch generate MODEL --patches PATCHES, tp.attach); or write it for this "
            "library (tpatch merge, tp.save_model)"
        )
    if problems:
        form = "approximate"
        settings = {**model.settings, **_widths(model, common_width(model))}
        target = _described(settings, model.config)
        with jax.default_matmul_precision("highest"):
            approximated, error = _approximate(model, requests, memory, cache, progress)
        params = _in_experts(approximated)
    elif form == "exact" and not target.ffn_bias and merged_neurons(model.config, model.params):
        params = _without_biases(model)
    safe = None
    if safe_for is not None:
        with jax.default_matmul_precision("highest"):
            safe = _safe_per_tensor(model, requests, memory, cache, progress)
        model, params, error = safe.merged, safe.split.params, safe.error
        settings, target, form, _ = describe_exact(model, common_width(model), tuple(FORMS))
    grown = _grown(_renamed(params, model.config, target), parameter_shapes(target), jax.tree.leaves(params)[0].dtype)
    merged = merged_neurons(model.config, model.params)
    excess = max(
        (weight_excess(model.params["layers"][index]["ffn"], count) for index, count in merged.items()), default=0
    )
    info = _info(model, form, settings["model_type"], target, grown, error)._replace(weight_excess=excess)
    if safe is not None:
        info = info._replace(
            safe_for=safe_for,
            split_neurons=safe.added,
            silent_neurons=info.silent_neurons - safe.added,
            held_rounded=safe.held_rounded,
            lost_rounded=safe.lost_rounded,
        )
    with replace_folder(folder) as temporary:
        checkpoint.write_folder(temporary, target, grown, settings, model.folder)
        _write_tokenizer(temporary, model, settings["model_type"] != model.settings["model_type"])
        if _described(checkpoint.read_settings(temporary), target) != target:
            raise TPatchError(
                f"transformers reads the config.json of {model.name!r} otherwise than it was written; upgrade "
                "transformers, or use tp.save_model, whose folder this library reads"
            )
        (temporary / EXPORT).write_text(json.dumps(info.to_json(), ensure_ascii=False, indent=1) + "\n", "utf-8")
    return info


def merge_attached(model: Model) -> Model:
    """The model with its attached patches merged.

    Args:
        model: patches may be attached to it; not changed.

    Raises:
        TPatchError: one is activated by ReLU, and the network by something else.
    """
    layers = dict(model.params["layers"])
    for index, layer in layers.items():
        network = ffn.detach(layer["ffn"])
        for name, patch in ffn.attached(layer["ffn"]).items():
            if name == "relu_patch" and model.config.activation != "relu":
                raise TPatchError(
                    f"the patch attached to layer {index} is activated by ReLU, and the network there by "
                    f"{model.config.activation}: a stock network has one activation; attach it without relu=True"
                )
            network = ffn.merge(network, patch)
        layers[index] = {**layer, "ffn": network}
    return model.with_params({**model.params, "layers": layers})


def common_width(model: Model, block: int = 1) -> int:
    """The width of the widest feed-forward network, rounded up; without merged patches that which all have.

    Where a network stands beside experts, it is told in experts.

    Args:
        model: patches may be merged into it.
        block: the width is a multiple of this; of 1, it is a multiple of one of `MULTIPLES`.
    """
    config = model.config
    if config.mixture and config.mixture.joined_width:
        # What every token passes through is as wide as so many experts.
        return -(-(config.mixture.joined_width + _most_merged(model, True)) // config.mixture.width)
    width = config.mixture.width if config.mixture else config.ffn_width
    return _rounded_up(width, _most_merged(model, config.mixture is not None), block)


def _most_merged(model: Model, mixed: bool) -> int:
    """How many neurons are merged into that layer which has most of them, among those with experts or without."""
    merged = merged_neurons(model.config, model.params)
    return max((count for layer, count in merged.items() if model.config.mixed(layer) == mixed), default=0)


def _rounded_up(width: int, added: int, block: int = 1) -> int:
    multiple = block if block > 1 else next((each for each in MULTIPLES if width % each == 0), MULTIPLES[-1])
    return -(-(width + added) // multiple) * multiple if added else width


def _widths(model: Model, width: int) -> dict[str, Any]:
    """What ``config.json`` says of the width of feed-forward networks: of experts, and of layers without them."""
    config, widths = model.config, {family_of(model.settings).ffn_width: width}
    if config.mixture and config.dense_layers:
        widths[_DENSE_WIDTH] = _rounded_up(config.ffn_width, _most_merged(model, False))
    return widths


def _check_shares(model: Model) -> None:
    """Make sure that neurons in every expert of a mixture would add what they add beside it.

    Raises:
        TPatchError: the weights of the chosen experts do not add up to one, or their neurons are bounded.
    """
    mixture = model.config.mixture
    if mixture and mixture.joined_width:
        return
    if mixture and mixture.limit and _most_merged(model, True):
        raise TPatchError(
            f"{model.name!r} cannot be written for the stock transformers library: a {model.settings['model_type']} "
            "has no feed-forward network there beside its experts, and in those a neuron goes no further than "
            f"{mixture.limit:g}, which neurons of patches do. Keep the patches beside the model (tpatch generate MODEL "
            "--patches PATCHES, tp.attach); or write it for this library (tpatch merge, tp.save_model)"
        )
    if mixture and not mixture.normalised and _most_merged(model, True):
        raise TPatchError(
            f"{model.name!r} cannot be written for the stock transformers library: a {model.settings['model_type']} "
            "has no feed-forward network there beside its experts, and the weights of the experts that it chooses do "
            "not add up to one ('norm_topk_prob' is false), so that neurons in every expert would not add what a patch "
            "adds. Keep the patches beside the model (tpatch generate MODEL --patches PATCHES, tp.attach); or write it "
            "for this library (tpatch merge, tp.save_model)"
        )


def _in_experts(model: Model) -> Params:
    """The parameters with the neurons beside experts in every one of them: their weights for a token add up to one."""
    layers = dict(model.params["layers"])
    for index, layer in layers.items():
        network, count = layer["ffn"], ffn.width(layer["ffn"])
        if not model.config.mixed(index) or not count or model.config.width(index):
            continue
        experts = dict(layer["experts"])
        for name, axis in (("gate", 2), ("up", 2), ("down", 1)):
            kernel, added = experts[name]["kernel"], network[name]["kernel"]
            added = jnp.broadcast_to(added, (kernel.shape[0], *added.shape))
            experts[name] = {"kernel": jnp.concatenate([kernel, added], axis)}
        bare = {
            name: {"kernel": entry["kernel"][:0] if name == "down" else entry["kernel"][:, :0]}
            for name, entry in network.items()
        }
        layers[index] = {**layer, "ffn": bare, "experts": experts}
    return {**model.params, "layers": layers}


def _described(settings: Mapping[str, Any], config: NetworkConfig) -> NetworkConfig:
    """What settings describe, with an unembedding of its own or without as in `config`, for the weights decide."""
    return dataclasses.replace(configure(settings), tied=config.tied)


def describe_exact(
    model: Model, width: int, forms: Sequence[str] = ("Llama",)
) -> tuple[dict[str, Any], NetworkConfig, str, list[str]]:
    """Settings whose stock network is the given one, their description, how it is called, and why there are none.

    Args:
        model: patches may be merged into it.
        width: of all its feed-forward networks.
        forms: names of `FORMS`, architectures that may stand for its own, the first that is the same network.
    """
    config, family = model.config, family_of(model.settings)
    settings = {**model.settings, **_widths(model, width)}
    if config.mixture:
        merged = merged_neurons(config, model.params)
        if merged and family.export == "exact":
            settings[family.biases], merged = True, {}
        problems = ["its layers are mixtures of experts"] if merged else []
        return settings, _described(settings, config), "exact", problems
    if width == config.ffn_width:
        return settings, _described(settings, config), "exact", []
    if family.export == "exact":
        settings.update({family.biases: True} if family.biases and not config.ffn_bias else {})
        target = _described(settings, config)
        return settings, target, "exact", [] if target.ffn_bias else _inconstant(model)
    if config.encoder:
        return settings, _described(settings, config), "", ["it is an encoder-decoder"]
    tried = []
    for name in forms:
        other = FORMS[name](config, model.settings, width)
        target = configure(other)
        problems = [*_differences(config, target, model.settings), *_unrepresentable(model, target)]
        if not problems:
            return other, target, f"exact as {name}", []
        tried.append((other, target, f"exact as {name}", problems))
    # Of the nearest the fewest reasons have to be told.
    return min(tried, key=lambda each: len(each[-1]))


def _inconstant(model: Model) -> list[str]:
    """Why biases cannot be folded away exactly, in words; see `constant_after_norm`."""
    for layer, patch in unmerge(model)[1].items():
        if constant_after_norm(model, layer, float(jnp.max(jnp.abs(patch.bias)))) is None:
            return [f"what its norms make has no constant part that is large enough in layer {layer}"]
    return []


def constant_after_norm(model: Model, layer: int, largest: float) -> Float[Array, " d"] | None:
    """The direction ``u`` on which all that a layer norm returns is one, if there is one: ``q·u = 1``.

    With ``q = γ∘z + β`` and ``Σz = 0``, it is ``u = γ⁻¹/c`` with ``c = Σβ/γ``.

    Args:
        model: whose feed-forward networks read what norms return.
        layer: which one.
        largest: how large a number is multiplied by it; ``None`` is returned where it would be off by 1e-4.
    """
    config, weights = model.config, model.params["layers"][layer]
    if config.norm != "layer" or not config.norm_bias or config.post_norm or not config.pre_norm:
        return None
    norm = weights["norm_1" if config.block == "shared" else "norm_2"]
    scale, bias = (np.asarray(norm[name], np.float64) for name in ("scale", "bias"))
    scale = scale + config.norm_shift
    if not scale.all():
        return None
    constant = np.sum(bias / scale)
    rounded = float(jnp.finfo(norm["scale"].dtype).eps) * np.sqrt(len(scale) + np.sum(np.square(bias / scale)))
    if not rounded * largest <= CONSTANT * abs(constant):
        return None
    return jnp.asarray(1 / (scale * constant), jnp.float32)


def _without_biases(model: Model) -> Params:
    """The parameters with merged patches whose biases are a constant part of what the norms return."""
    base, patches = unmerge(model)
    layers = dict(base.params["layers"])
    for layer, patch in patches.items():
        constant = constant_after_norm(model, layer, 0.0)
        assert constant is not None
        layers[layer] = {**layers[layer], "ffn": ffn.merge_without_bias(layers[layer]["ffn"], patch, constant)}
    return {**base.params, "layers": layers}


def _as_llama(config: NetworkConfig, settings: Mapping[str, Any], width: int) -> dict[str, Any]:
    """The ``config.json`` of a Llama that is as near to a network as can be."""
    kept = ("rope_parameters", "rope_theta", "rope_scaling", "bos_token_id", "eos_token_id", "pad_token_id")
    result: dict[str, Any] = {name: settings[name] for name in kept if settings.get(name) is not None}
    for name in ("rope_parameters", "rope_scaling"):
        # Llama turns whole heads; where that makes a difference, the two descriptions differ.
        if name in result:
            result[name] = {rule: value for rule, value in result[name].items() if rule != "partial_rotary_factor"}
    return {
        **result,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocabulary,
        "hidden_size": config.hidden_size,
        "intermediate_size": width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": config.context,
        "hidden_act": _STOCK_ACTIVATIONS.get(config.activation, config.activation),
        "rms_norm_eps": config.norm_epsilon,
        "attention_bias": config.query_bias or config.output_bias,
        "mlp_bias": True,
        "tie_word_embeddings": config.tied,
    }


_STOCK_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}


def _as_smollm_3(config: NetworkConfig, settings: Mapping[str, Any], width: int) -> dict[str, Any]:
    """A SmolLM3 whose layers all rotate: a Llama that may have windows."""
    seen = max(config.windows, default=0)
    kinds = ["sliding_attention" if window else "full_attention" for window in config.windows]
    return {
        **_as_llama(config, settings, width),
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "no_rope_layers": [1] * config.layers,
        # Its defaults are tokens of a large vocabulary.
        **{name: settings.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "use_sliding_window": bool(seen),
        **({"sliding_window": seen, "layer_types": kinds} if seen else {}),
    }


def _as_granite(config: NetworkConfig, settings: Mapping[str, Any], width: int) -> dict[str, Any]:
    """A Granite whose other factors are one: a Llama whose embeddings are scaled, as a Gemma's are."""
    return {
        **_as_llama(config, settings, width),
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "embedding_multiplier": config.embed_scale,
        "attention_multiplier": _attention_scale(config),
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }


def _as_doge(config: NetworkConfig, settings: Mapping[str, Any], width: int) -> dict[str, Any]:
    """A Doge whose gates let everything through and whose scores of keys are nothing: a Llama with norms of queries."""
    seen = set(config.windows) or {0}
    # It has one window for all layers, or none.
    window = {"sliding_window": max(seen)} if len(seen) == 1 and max(seen) else {}
    return {
        **_as_llama(config, settings, width),
        "architectures": ["DogeForCausalLM"],
        "model_type": "doge",
        "keep_window_size": config.context,
        **window,
    }


FORMS = {"Llama": _as_llama, "SmolLM3": _as_smollm_3, "Granite": _as_granite, "Doge": _as_doge}
"""Architectures whose feed-forward networks may have biases, by name: settings of the one nearest to a network."""

_FILLED = {"gate_attention": 1.0, "gate_ffn": 1.0, "decay": -1e4}
"""What parameters are that only the other architecture has, where not zero: ``exp(-1e4·log 2)`` is zero in any type."""


def _unrepresentable(model: Model, target: NetworkConfig) -> list[str]:
    """Which parameters another architecture would keep otherwise, and could not in the model's type, in words."""
    if model.config.norm_shift == target.norm_shift:
        return []
    shift = model.config.norm_shift - target.norm_shift
    scales = [np.asarray(leaf) for path, leaf in flatten(model.params) if path.endswith(".scale")]
    lost = (_shifted(leaf, shift).astype(np.float32) != leaf.astype(np.float32) + np.float32(shift) for leaf in scales)
    if not any(each.any() for each in lost):
        return []
    return [f"the weights of its norms plus {shift:g} are no numbers of {model.dtype} (load it with dtype float32)"]


def _shifted(scale: Any, shift: float) -> Any:
    return (scale.astype(np.float32) + np.float32(shift)).astype(scale.dtype)


def _renamed(params: Params, config: NetworkConfig, target: NetworkConfig) -> Params:
    """Parameters as another architecture keeps them: the scales of norms whole, where a network's are less one."""
    shift = config.norm_shift - target.norm_shift

    def changed(entry: Any, name: str) -> Any:
        if isinstance(entry, Mapping):
            return {key: changed(part, str(key)) for key, part in entry.items()}
        return _shifted(entry, shift) if name == "scale" else entry

    return changed(params, "") if shift else params


_WORDS = {
    "activation": "its activation is another",
    "attention_cap": "its attention scores are capped",
    "attention_scale": "its attention scores are scaled otherwise",
    "embed_scale": "its embeddings are scaled",
    "local_rope_frequencies": "its layers rotate by different rules",
    "logit_cap": "its logits are capped",
    "norm_shift": "its norms multiply by one more than their weight",
    "query_norm": "it normalises queries and keys",
    "rope_frequencies": "it rotates only a part of each head",
    "sandwich": "it normalises what attention and feed-forward networks return",
}
_FREE = ("family", "ffn_width", "ffn_bias", "query_bias", "output_bias", "windows", "attention_scale")
_FREE_OF = {"granite": ("norm_shift",), "doge": ("key_scores", "residual_gates")}
"""What else another architecture may have otherwise, by its family: parameters are written so that it is the same."""


def _differences(config: NetworkConfig, target: NetworkConfig, settings: Mapping[str, Any]) -> list[str]:
    """Why a network is no Llama, in words; biases that are added are zero and make no difference."""
    seen, others = _windows_within(config, config.context), _windows_within(target, config.context)
    reasons = []
    if seen != others:
        narrowest = min(window for window in [*seen, *others] if window)
        reasons.append(f"its attention sees only {narrowest} of {config.context} tokens in some layers")
    free = (*_FREE, *_FREE_OF.get(target.family, ()))
    names = [field.name for field in dataclasses.fields(config) if field.name not in free]
    reasons += [
        _WORDS.get(name, f"its {name} differs") for name in names if getattr(config, name) != getattr(target, name)
    ]
    if _attention_scale(config) != _attention_scale(target):
        reasons.append(_WORDS["attention_scale"])
    # Our reading of it is for short texts; a stock Llama would change the rule with the text's length.
    if is_longrope(settings):
        reasons.append("its rotation is scaled by longrope")
    if config.hidden_size % config.heads:
        reasons.append(f"its width {config.hidden_size} is not a multiple of its {config.heads} heads")
    return reasons


def _windows_within(config: NetworkConfig, context: int) -> list[int]:
    """How far back each layer sees, 0 where that is everything in texts of a length."""
    windows = (config.kind(layer).window for layer in range(config.layers))
    return [window if window < context else 0 for window in windows]


def _attention_scale(config: NetworkConfig) -> float:
    return config.head_width**-0.5 if config.attention_scale is None else config.attention_scale


def _grown(params: Params, shapes: Params, dtype: Any) -> Params:
    """Parameters of larger shapes: zeros behind the end of every axis, and zeros or `_FILLED` for what is missing."""
    result: Params = {}
    for name, wanted in shapes.items():
        if isinstance(wanted, Mapping):
            result[name] = _grown(params.get(name, {}), dict(wanted), dtype)
        elif name not in params:
            result[name] = jnp.full(wanted.shape, _FILLED.get(name, 0.0), dtype)
        else:
            missing = [(0, new - old) for old, new in zip(params[name].shape, wanted.shape, strict=True)]
            result[name] = jnp.pad(params[name], missing) if any(map(any, missing)) else params[name]
    return result


def _stock_width(config: NetworkConfig, layer: int) -> int:
    """The width of a layer's feed-forward network, or of each of its experts."""
    return config.width(layer) or (config.mixture.width if config.mixture else 0)


def _info(
    model: Model, form: str, model_type: str, target: NetworkConfig, params: Params, error: ExportError | None
) -> ExportInfo:
    neurons = sum(merged_neurons(model.config, model.params).values())
    before = sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(model.config)))
    leaves = jax.tree.leaves(params)
    added = sum(leaf.size for leaf in leaves) - before
    wider = sum(_stock_width(target, layer) - _stock_width(model.config, layer) for layer in range(target.layers))
    if target.encoder and model.config.encoder:
        wider += (target.encoder.ffn_width - model.config.encoder.ffn_width) * target.encoder.layers
    return ExportInfo(
        form,
        model_type,
        neurons,
        wider - neurons,
        _stock_width(target, target.layers - 1),
        added,
        added * leaves[0].dtype.itemsize,
        added / before,
        error,
    )


def _write_tokenizer(folder: Path, model: Model, renamed: bool) -> None:
    """The tokenizer, where its files were not copied, or would be read otherwise beside another ``model_type``."""
    if model.tokenizer is None or not (renamed or model.folder is None):
        return
    model.tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    if model.tokenizer.is_fast:
        # What tokenizer.json says, and nothing that transformers would do for a Llama besides.
        settings = json.loads(path.read_text("utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        path.write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", "utf-8")


def _approximate(
    model: Model, requests: Sequence[EditRequest], memory: str | Path | None, cache: bool, progress: Progress | None
) -> tuple[Model, ExportError]:
    """The model with its merged patches as weights alone, and how far off it is."""
    base, patches = unmerge(model)
    rows = memory_rows(base, memory, cache=cache_folder() if cache else None, progress=progress)
    measured = rows[::HELD_OUT]
    fitted = [row for number, row in enumerate(rows) if number % HELD_OUT] or rows
    asked = ask_requests(model, requests)
    layers = dict(base.params["layers"])
    for done, (layer, patch) in enumerate(patches.items()):
        if progress:
            progress("folding biases", done, len(patches))
        query = collect(model, fitted, [range(first_position(model, row, 1), len(row)) for row in fitted], layer).query
        queries = collect(model, [row for row, _ in asked], [places for _, places in asked], layer).query
        layers[layer] = {
            **layers[layer],
            "ffn": ffn.merge_without_bias(layers[layer]["ffn"], patch, constant_direction(query, queries)),
        }
    approximated = base.with_params({**base.params, "layers": layers})
    return approximated, _error(model, approximated, measured, requests, asked)


class _Safe(NamedTuple):
    """A model whose patches set no scale, the same after neurons were split, how far that is off, and what holds."""

    merged: Model
    split: Model
    added: int
    error: ExportError
    held_rounded: tuple[str, ...]
    lost_rounded: tuple[str, ...]


def _safe_per_tensor(
    model: Model, requests: Sequence[EditRequest], memory: str | Path | None, cache: bool, progress: Progress | None
) -> _Safe:
    """The model with merged patches none of whose weights sets a scale, and no neuron that of what ``down`` reads."""
    if not merged_neurons(model.config, model.params):
        raise TPatchError(f"{model.name!r} has no patches, so there is nothing to make safe; leave safe_for out")
    base, patches = unmerge(model)
    rows = memory_rows(base, memory, cache=cache_folder() if cache else None, progress=progress)
    measured, fitted = rows[::HELD_OUT], [row for number, row in enumerate(rows) if number % HELD_OUT] or rows
    asked = ask_requests(model, requests)
    layers = dict(base.params["layers"])
    for layer, patch in patches.items():
        places = [range(first_position(model, row, 0), len(row)) for row, _ in asked]
        firing = _firing(patch, collect(model, [row for row, _ in asked], places, layer).query) if asked else None
        layers[layer] = {**layers[layer], "ffn": merge_per_tensor(layers[layer]["ffn"], patch, firing)}
    merged = base.with_params({**base.params, "layers": layers})
    texts = [*fitted[:OUTLIER_TEXTS], *(row for row, _ in asked)]
    split, added = spread_outliers(merged, texts, common_width(merged))
    split = strengthen_edits(split, _patch_neurons(base, merged, split), asked, progress)
    error = _error(model, split, measured, requests, asked)
    return _Safe(merged, split, added, error, *requests_said(round_weights(split), requests, asked))


def _patch_neurons(base: Model, merged: Model, split: Model) -> dict[int, np.ndarray]:
    """The neurons of patches by layer, and those that take a part of one: these have its column in ``gate``."""
    neurons = {}
    for layer, entry in merged.params["layers"].items():
        width, wider = (ffn.width(each["ffn"]) for each in (base.params["layers"][layer], entry))
        if wider > width:
            places = np.arange(width, wider)
            network = split.params["layers"][layer]["ffn"]
            if "gate" in network:
                columns = np.asarray(network["gate"]["kernel"], np.float32).T
                known = {column.tobytes() for column in columns[places]}
                added = [n for n in range(wider, len(columns)) if columns[n].tobytes() in known]
                places = np.append(places, np.asarray(added, int))
            neurons[layer] = places
    return neurons


def _firing(patch: Patch, query: Any) -> Float[np.ndarray, "neurons d"]:
    """Of each neuron the query at which it fires most, of those at hand; NaN where it fires at none."""
    rows, key = np.asarray(query, np.float32), np.asarray(patch.key, np.float32)
    inputs = rows @ key.T + np.asarray(patch.bias, np.float32)
    # Two neurons of one key, whose response together is level, have their largest input at the same query.
    return np.where(inputs.max(0)[:, None] > 0, rows[inputs.argmax(0)], np.nan)


def constant_direction(
    query: Float[Array, "rows d"], requested: Float[Array, "requests d"] | None = None, *, ridge: float = RIDGE
) -> Float[Array, " d"]:
    """A direction on which all queries are nearly one: ``u = (QᵀQ + λI)⁻¹ Qᵀ1``.

    Args:
        query: ``Q`` of unrelated text, ``[rows, d]``.
        requested: queries of the requests, ``[edits, d]``; together they count as much as all others.
        ridge: ``λ`` as a share of the mean eigenvalue of ``QᵀQ``.

    Returns:
        ``u``, ``[d]``, float32.

    Example:
        >>> query = jnp.stack([jnp.array([2.0, 0.0]), jnp.array([2.0, 1.0])])
        >>> [round(float(value), 2) for value in constant_direction(query)]
        [0.5, 0.0]
    """
    # On the host and in float64: one small system, and queries have a few directions that dwarf all others.
    rows = np.asarray(query, np.float64)
    moment, sums = rows.T @ rows / len(rows), rows.mean(0)
    if requested is not None and len(requested):
        rows = np.asarray(requested, np.float64)
        moment, sums = moment + rows.T @ rows / len(rows), sums + rows.mean(0)
    width = len(sums)
    return jnp.asarray(np.linalg.solve(moment + ridge * np.trace(moment) / width * np.eye(width), sums), jnp.float32)


def first_position(model: Model, row: Sequence[int], least: int) -> int:
    """The first position of a row that counts: the one that decides an encoder-decoder's first token, or `least`.

    Args:
        model: whose tokens.
        row: one text in tokens.
        least: of any other model.
    """
    return row.index(ASK) + len(model.begin) if model.config.encoder else least


def ask_requests(model: Model, requests: Sequence[EditRequest]) -> list[tuple[list[int], range]]:
    """The prompt and target of each request in tokens, and the positions whose next tokens are the target.

    Args:
        model: whose tokens.
        requests: the requests.
    """
    return [_asked(model, request) for request in requests]


def _asked(model: Model, request: EditRequest) -> tuple[list[int], range]:
    """A request's prompt and target in tokens, and the positions whose next tokens are the target."""
    request = render_request(model, request)
    prompt = model.encode_prompt(request.prompt)
    target = model.encode_target(request.prompt, request.continuation)
    # What an encoder reads takes no room from what the decoder writes.
    read = prompt.index(ASK) + 1 if model.config.encoder else 0
    row = [*prompt, *target][: read + model.config.context]
    return row, range(len(prompt) - 1, len(row) - 1)


def _error(
    model: Model,
    approximated: Model,
    rows: Sequence[Sequence[int]],
    requests: Sequence[EditRequest],
    asked: Sequence[tuple[list[int], range]],
) -> ExportError:
    places = [range(first_position(model, row, 0), len(row)) for row in rows]
    hidden, other = (_hidden(each, rows, places) for each in (model, approximated))
    largest, total, same = 0.0, 0.0, 0
    chunk = 256
    for first in range(0, hidden.shape[0], chunk):
        wanted, given = (
            np.asarray(networks.logits(model.config, model.params, part[first : first + chunk]))
            for part in (hidden, other)
        )
        difference = np.abs(wanted - given)
        largest, total = max(largest, float(difference.max())), total + float(difference.mean(-1).sum())
        same += int((wanted.argmax(-1) == given.argmax(-1)).sum())
    held, lost = requests_said(approximated, requests, asked)
    count = hidden.shape[0]
    return ExportError(count, largest, total / count, same / count, held, lost)


def requests_said(
    model: Model, requests: Sequence[EditRequest], asked: Sequence[tuple[list[int], range]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The requests whose targets a model says, token for token, and the others, by id.

    Args:
        model: it.
        requests: the requests.
        asked: what `ask_requests` made of them.
    """
    held, lost = [], []
    said, end = np.zeros(0, np.int32), 0
    if asked:
        rows, positions = [row for row, _ in asked], [places for _, places in asked]
        said = predicted(model, collect(model, rows, positions, model.layer(None)))
    for number, (request, (row, places)) in enumerate(zip(requests, asked, strict=True)):
        holds = said[end : end + len(places)].tolist() == row[len(row) - len(places) :]
        (held if holds else lost).append(request.name(number))
        end += len(places)
    return tuple(held), tuple(lost)


def _hidden(
    model: Model, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
) -> Float[Array, "places d"]:
    """The residual stream after the last block at chosen positions, ``[n, d]``."""
    sites = collect(model, rows, positions, model.layer(None))
    return networks.leave_last(model.config, model.params, sites.residual, sites.output)
