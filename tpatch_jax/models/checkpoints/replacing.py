"""Patches in the place of neurons that a network uses least: it neither grows nor changes its description."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tpatch_jax.core import ffn
from tpatch_jax.core.arguments import as_path, check_call
from tpatch_jax.core.devices import automatically, host
from tpatch_jax.core.layers import LayerPatches
from tpatch_jax.core.patch import Patch
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import networks
from tpatch_jax.models.checkpoints.export import (
    HELD_OUT,
    ask_requests,
    constant_direction,
    first_position,
    requests_said,
)
from tpatch_jax.models.collection import collect
from tpatch_jax.models.fingerprint import fingerprint
from tpatch_jax.models.memory_text import memory_rows
from tpatch_jax.models.model import Model, check_loaded
from tpatch_jax.models.patching import attach, by_layer
from tpatch_jax.models.quantising import check_float
from tpatch_jax.models.shapes import merged_neurons
from tpatch_jax.requests import EditRequest, as_requests
from tpatch_jax.storage.cache import cache_folder
from tpatch_jax.typing import Params, Progress

__all__ = ["REPLACED", "Replaced", "read_replaced", "replace_unused", "restore_replaced", "write_replaced"]

REPLACED = "tpatch_replaced.safetensors"
"""Beside a model: what stood where its patches are."""

CHUNK = 256


class Replaced(NamedTuple):
    """What patches took the place of, and what that costs.

    Attributes:
        neurons: the numbers of the neurons that went, by layer, in the order of the patches' neurons.
        weights: what they were: the network's matrices and biases at these neurons, a row each, by layer.
        patches: what is there now.
        fingerprint: of the model without them.
        exact: whether the neurons are what they were beside the model; otherwise the network has no biases, and what
            stands for them was chosen on text.
        perplexity: of held-out memory text, before and after; ``None`` of a model that writes none.
        held: the requests that hold, by id.
        lost: those that do not.
    """

    neurons: dict[int, Int[np.ndarray, "neurons"]]
    weights: dict[int, dict[str, Float[np.ndarray, "neurons ..."]]]
    patches: dict[int, Patch]
    fingerprint: str
    exact: bool
    perplexity: tuple[float, float] | None
    held: tuple[str, ...]
    lost: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """What it cost, as plain JSON values."""
        return {
            "replaced": {str(layer): chosen.tolist() for layer, chosen in self.neurons.items()},
            "exact": self.exact,
            "perplexity": self.perplexity and list(self.perplexity),
            "held": list(self.held),
            "lost": list(self.lost),
        }


@automatically
def replace_unused(
    model: Model,
    patches: LayerPatches | Patch,
    *,
    requests: Sequence[EditRequest] = (),
    memory: str | Path | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> tuple[Model, Replaced]:
    """Put patches in the place of the neurons that their networks use least.

    A neuron's use is ``E|h|·‖v‖``, what it adds to the output of its feed-forward network on memory text. Where the
    network has no biases, ``q·k + b`` becomes ``q·(k + b·u)``, with ``u`` as in `tpatch_jax.export_model`.

    Args:
        model: a model without patches; not changed.
        patches: ``{layer: [n, d]}``, or one patch for the last layer.
        requests: what the patches are for; the result says which of them hold.
        memory: a text file to measure use on; by default text is sampled from the model.
        cache: keep that text on disk between runs, where `tpatch_jax.edit` keeps it.
        progress: called with what is being done, how much is done, and how much there is.

    Returns:
        A model of the same shapes, and the `Replaced`, by which `restore_replaced` takes them out, bit for bit.

    Raises:
        TPatchError: the model has patches already or weights in INT8, or a layer has fewer neurons than its patch.

    Example:
        >>> import tpatch_jax as tp
        >>> model = tp.load_model("smollm2-135m")  # doctest: +SKIP
        >>> corrected, replaced = tp.replace_unused(model, patches)  # doctest: +SKIP
        >>> tp.restore_replaced(corrected, replaced) == model  # doctest: +SKIP
        True
    """
    call = "replace_unused(model, patches)"
    check_loaded(model, call)
    check_float(model, "replace_unused")
    requests = as_requests(requests)
    memory = None if memory is None else as_path(memory, call, "a text file; give its path")
    check_call(progress=progress)
    chosen = by_layer(model, patches)
    if merged_neurons(model.config, model.params) or ffn.any_attached(model.params):
        raise TPatchError(f"{model.name!r} has patches already; give the model without them (tp.unmerge, tp.detach)")
    for layer, patch in chosen.items():
        if patch.key.shape[0] > model.config.ffn_width:
            raise TPatchError(
                f"the patch of layer {layer} has {patch.key.shape[0]} neurons and the network there "
                f"{model.config.ffn_width}; merge it instead (tp.merge), which makes the network wider"
            )
    rows = memory_rows(model, memory, cache=cache_folder() if cache else None, progress=progress)
    fitted = [row for number, row in enumerate(rows) if number % HELD_OUT] or rows
    asked, beside = ask_requests(model, requests), attach(model, chosen)
    places = [range(first_position(model, row, 1), len(row)) for row in fitted]
    layers, neurons, weights = dict(model.params["layers"]), {}, {}
    for done, (layer, patch) in enumerate(chosen.items()):
        if progress is not None:
            progress("choosing neurons", done, len(chosen))
        network, query = layers[layer]["ffn"], jax.device_put(np.asarray(collect(beside, fitted, places, layer).query))
        constant = None
        if not model.config.ffn_bias:
            queries = collect(beside, [row for row, _ in asked], [spots for _, spots in asked], layer).query
            constant = constant_direction(query, queries)
        use = _use(network, query, model.config.activation)
        neurons[layer] = np.sort(np.argsort(use, kind="stable")[: patch.key.shape[0]]).astype(np.int32)
        weights[layer] = _at(network, neurons[layer])
        layers[layer] = {
            **layers[layer],
            "ffn": ffn.merge_in_place(network, patch, jax.device_put(neurons[layer]), constant),
        }
    replaced = model.with_params({**model.params, "layers": layers})
    held, lost = requests_said(replaced, requests, asked)
    perplexities = None
    if model.config.architecture == "decoder":
        perplexities = (_perplexity(model, rows[::HELD_OUT]), _perplexity(replaced, rows[::HELD_OUT]))
    exact = model.config.ffn_bias
    return replaced, Replaced(neurons, weights, chosen, fingerprint(model), exact, perplexities, held, lost)


def _use(network: Params, query: Float[Array, "rows d"], activation: str) -> Float[np.ndarray, "width"]:
    """What each neuron adds to a network's output on average."""
    hidden = jnp.mean(jnp.abs(ffn.hidden(network, query, activation)), 0)
    return np.asarray(hidden * jnp.linalg.norm(network["down"]["kernel"], axis=1), np.float64)


def _at(network: Params, neurons: Int[np.ndarray, "neurons"]) -> dict[str, np.ndarray]:
    """A network's weights at some neurons, a row each."""
    result = {"down.kernel": host(network["down"]["kernel"])[neurons]}
    for name in ("gate", "up"):
        for part, array in network.get(name, {}).items():
            result[f"{name}.{part}"] = host(array)[..., neurons].T
    return result


def _perplexity(model: Model, rows: Sequence[Sequence[int]]) -> float:
    """Of texts, each token predicted from those before it."""
    sites = collect(model, rows, [range(len(row) - 1) for row in rows], model.layer(None))
    hidden = networks.leave_last(model.config, model.params, sites.residual, sites.output)
    wanted = np.concatenate([np.asarray(row[1:], np.int32) for row in rows])
    total = 0.0
    for first in range(0, len(wanted), CHUNK):
        part = jax.nn.log_softmax(networks.logits(model.config, model.params, hidden[first : first + CHUNK]))
        total -= float(jnp.take_along_axis(part, wanted[first : first + CHUNK, None], 1).sum())
    return float(np.exp(total / len(wanted)))


@automatically
def restore_replaced(model: Model, replaced: Replaced) -> Model:
    """The model before patches took the place of its neurons, bit for bit.

    Args:
        model: what `replace_unused` returned, or the same read from a folder; not changed.
        replaced: what that returned besides.

    Returns:
        The model without the patches.

    Raises:
        TPatchError: the model is another one, or was changed since.
    """
    check_loaded(model, "restore_replaced(model, replaced)")
    layers = dict(model.params["layers"])
    for layer, neurons in replaced.neurons.items():
        if layer not in layers or ffn.width(layers[layer]["ffn"]) <= int(neurons.max(initial=-1)):
            raise TPatchError(f"{model.name!r} is not the model whose neurons were replaced: it lacks some of them")
        network = {name: dict(entry) for name, entry in layers[layer]["ffn"].items()}
        for path, rows in replaced.weights[layer].items():
            name, part = path.split(".")
            array = network.get(name, {}).get(part)
            if array is None or array.shape[0 if name == "down" else -1] < len(rows):
                raise TPatchError(f"{model.name!r} is not the model whose neurons were replaced: it has no {path}")
            rows = jnp.asarray(rows, array.dtype)
            network[name][part] = array.at[neurons].set(rows) if name == "down" else array.at[..., neurons].set(rows.T)
        layers[layer] = {**layers[layer], "ffn": network}
    result = model.with_params({**model.params, "layers": layers})
    if fingerprint(result) != replaced.fingerprint:
        raise TPatchError(
            f"with its neurons put back {model.name!r} is not the model that it was made of: its other weights were "
            "changed since, or it is in another precision"
        )
    return result


def write_replaced(folder: str | Path, replaced: Replaced) -> None:
    """Keep what was replaced beside a model, as ``tpatch_replaced.safetensors``.

    Args:
        folder: the model's.
        replaced: what `replace_unused` returned.
    """
    arrays = {}
    for layer, neurons in replaced.neurons.items():
        parts = {"neurons": neurons, **replaced.weights[layer]}
        parts |= {f"patch.{name}": host(leaf) for name, leaf in replaced.patches[layer]._asdict().items()}
        arrays |= {f"{layer}.{name}": np.ascontiguousarray(array) for name, array in parts.items()}
    told = {"fingerprint": replaced.fingerprint, **replaced.to_json()}
    save_file(arrays, Path(folder) / REPLACED, metadata={"tpatch": json.dumps(told)})


def read_replaced(folder: str | Path) -> Replaced:
    """What was replaced in a model, as `write_replaced` kept it beside it.

    Args:
        folder: the model's.

    Raises:
        TPatchError: it is not there, or damaged.
    """
    path = as_path(folder, "read_replaced(folder)", "a folder; give its path") / REPLACED
    if not path.is_file():
        raise TPatchError(f"{path} is not there: nothing was replaced in that model, or the file was left behind")
    try:
        with safe_open(path, "np") as file:
            told = json.loads(file.metadata()["tpatch"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a handle is no mapping)
        layers = [int(layer) for layer in told["replaced"]]
        neurons = {layer: arrays[f"{layer}.neurons"] for layer in layers}
        patches = {
            layer: Patch(*(jax.device_put(arrays[f"{layer}.patch.{name}"]) for name in Patch._fields))
            for layer in layers
        }
        weights = {layer: _weights(arrays, layer, len(neurons[layer])) for layer in layers}
        pair = told["perplexity"]
        return Replaced(
            neurons,
            weights,
            patches,
            str(told["fingerprint"]),
            bool(told["exact"]),
            None if pair is None else (pair[0], pair[1]),
            tuple(told["held"]),
            tuple(told["lost"]),
        )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise TPatchError(f"{path} is damaged ({error}); write the model again") from None


def _weights(arrays: Mapping[str, np.ndarray], layer: int, count: int) -> dict[str, np.ndarray]:
    result = {}
    for name, array in arrays.items():
        number, _, rest = name.partition(".")
        if number == str(layer) and rest.split(".")[0] in ("gate", "up", "down"):
            if len(array) != count:
                raise ValueError(f"{name} is of {len(array)} neurons, and {count} were replaced")
            result[rest] = array
    if "down.kernel" not in result:
        raise KeyError(f"{layer}.down.kernel")
    return result
