"""Patches on any Flax NNX module: its feed-forward network is captured in a copy, and widened in another."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
from flax import nnx
from jax import Array

from tpatch_jax.core import ffn
from tpatch_jax.core.arguments import check_kind
from tpatch_jax.core.patch import Patch
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.foreign.checks import (
    Matrices,
    arranged,
    check_path,
    create_network,
    suggestion,
    widened,
)
from tpatch_jax.models.foreign.cut import capture
from tpatch_jax.models.foreign.network import Activation, Growth, Network
from tpatch_jax.models.pytrees import same_arrays

__all__ = ["from_nnx"]

Call = Callable[[Any, Array], Any]


def from_nnx(
    module: nnx.Module,
    ffn_path: str,
    *,
    activation: str | Activation = "gelu",
    call: Call | None = None,
    up: str | None = None,
    down: str | None = None,
    gate: str | None = None,
    example: Any = None,
) -> Network:
    """Cut an NNX module at one of its feed-forward networks, so that patches can be fitted, attached and merged.

    Args:
        module: the network, in evaluation mode; not changed, and later changes to it are not seen.
        ffn_path: where the FFN is, such as ``"blocks.3.mlp"``; a module of its own that is called once in a pass, on
            ``[batch, tokens, d]`` as its first argument; a block in which the FFN is written inline is none.
        activation: the FFN's, a name in `tpatch_jax.core.ffn.ACTIVATIONS` (``"gelu"`` is exact, ``"gelu_tanh"`` what
            `jax.nn.gelu` does by default) or a function.
        call: ``(module, tokens) -> logits``, if it is not ``module(tokens)``.
        up: the FFN's first ``nnx.Linear``, such as ``"fc1"``; only merging needs it.
        down: its last ``nnx.Linear``.
        gate: the ``nnx.Linear`` whose output is activated, if there is one besides ``up``.
        example: token ids that the network accepts, ``[batch, tokens]``; by default ``[2, 8]``.

    Returns:
        The `Network`. Its ``merge`` returns an NNX module.

    Raises:
        TPatchError: the path leads nowhere, or not to a module that can be cut, or to a block around an FFN; on the
            example the FFN activates otherwise than ``activation`` says; the network does not run; the
            activation is unknown.

    Example:
        >>> from flax import nnx
        >>> class Mlp(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.fc1, self.fc2 = nnx.Linear(8, 32, rngs=rngs), nnx.Linear(32, 8, rngs=rngs)
        ...     def __call__(self, x):
        ...         return self.fc2(nnx.gelu(self.fc1(x)))
        >>> class Tiny(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.embed, self.mlp = nnx.Embed(50, 8, rngs=rngs), Mlp(rngs)
        ...     def __call__(self, tokens):
        ...         x = self.embed(tokens)
        ...         return self.embed.attend(x + self.mlp(x))
        >>> network = from_nnx(Tiny(nnx.Rngs(0)), "mlp", activation="gelu_tanh", up="fc1", down="fc2")
        >>> traced = network.trace(jnp.array([[3, 1, 4]]))
        >>> traced.query.shape, network.resume(traced, traced.output).shape
        ((1, 3, 8), (1, 3, 50))
        >>> from tpatch_jax.core.patch import create
        >>> network.merge(create(8, neurons=2)).mlp.fc1.out_features
        34
    """
    call_shape = "from_nnx(module, ffn_path)"
    check_kind(module, nnx.Module, call_shape, "an NNX module; a Linen one goes to from_linen, with its parameters")
    check_path(ffn_path, call_shape)
    for name, value in (("up", up), ("down", down), ("gate", gate)):
        check_kind(value, str | None, f"from_nnx(…, {name}=…)", "the name of a layer inside the FFN, such as 'fc1'")
    if bool(up) != bool(down) or (gate and not up):
        raise TPatchError(f"{call_shape}: merging needs both up= and down=, and only one is given; name both or none")
    graph, state = nnx.split(module)
    params, run_module = _copy(state), call or (lambda module, tokens: module(tokens))

    def bare() -> nnx.Module:
        return nnx.merge(graph, _copy(params))

    def run(params: Any, tokens: Array) -> Array:
        copy = nnx.merge(graph, params)
        module_at = _walk(copy, ffn_path)
        # The copy alone gets another class; the user's module and its class stay as they are.
        object.__setattr__(module_at, "__class__", _captured(type(module_at), ffn_path))
        return run_module(copy, tokens)

    module_at = _walk(bare(), ffn_path)
    if not isinstance(module_at, nnx.Module) or not ffn_path.strip("./"):
        kind = "the whole network" if isinstance(module_at, nnx.Module) else f"a {type(module_at).__name__}"
        what = "is not in this network" if module_at is _NOTHING else f"is {kind}, not one of its modules"
        raise TPatchError(f"{ffn_path!r} {what}; {_candidates(bare(), run_module, example)}")
    candidates = _matrices(module_at)
    growth: Growth | str = (
        f"how to merge into {ffn_path!r} is not known; name its nnx.Linear layers, as in "
        'from_nnx(…, up="fc1", down="fc2"), or attach'
    )
    if up and down:
        names = {"up": up, "down": down} | ({"gate": gate} if gate else {})
        candidates = [_entries(_linears(bare(), ffn_path, names))]
        growth = _growth(bare, run_module, ffn_path, names)
    return create_network(run, params, ffn_path, activation, example, growth, candidates)


def _copy(tree: Any) -> Any:
    """The same arrays in variables of their own."""
    return jax.tree.map(lambda leaf: leaf, tree)


_NOTHING = object()


def _walk(module: Any, path: str) -> Any:
    for part in path.replace("/", ".").strip(".").split(".") if path.strip("./") else ():
        if isinstance(module, nnx.Module) and hasattr(module, part):
            module = getattr(module, part)
            continue
        try:
            module = module[int(part) if part.lstrip("-").isdigit() else part]  # type: ignore[index]
        except (TypeError, KeyError, IndexError, AttributeError):
            return _NOTHING
    return module


@lru_cache(maxsize=64)
def _captured(kind: type, path: str) -> type:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Array:
        return capture(lambda *args, **kwargs: kind.__call__(self, *args, **kwargs), args, kwargs, path)

    return type(kind)(kind.__name__, (kind,), {"__call__": __call__, "__module__": kind.__module__})


def _candidates(module: nnx.Module, call: Call, example: Any) -> str:
    """The paths of modules that keep their input's shape, as a sentence; the user's own kinds of module first."""
    seen: list[tuple[str, bool]] = []

    def listen(path: str, submodule: nnx.Module) -> None:
        kind: Any = type(submodule)
        call_kind = kind.__call__

        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = call_kind(self, *args, **kwargs)
            if args and getattr(args[0], "shape", ()) == getattr(output, "shape", None) and output.ndim == 3:
                seen.append((path, kind.__module__.startswith("flax.") and kind is not nnx.Sequential))
            return output

        object.__setattr__(submodule, "__class__", type(kind)(kind.__name__, (kind,), {"__call__": __call__}))

    for parts, submodule in list(nnx.iter_modules(module)):
        if parts:
            listen(".".join(map(str, parts)), submodule)
    return suggestion(lambda tokens: call(module, tokens), seen, example)[1]


def _linears(module: nnx.Module, path: str, names: dict[str, str]) -> dict[str, nnx.Linear]:
    """The linear layers of an FFN, by role."""
    linears = {role: _walk(_walk(module, path), name) for role, name in names.items()}
    for role, layer in linears.items():
        if not isinstance(layer, nnx.Linear):
            kind = "missing" if layer is _NOTHING else f"a {type(layer).__name__}"
            raise TPatchError(f"{role}={names[role]!r} in {path!r} is {kind}; name an nnx.Linear, or attach")
    return linears


def _entries(linears: dict[str, nnx.Linear]) -> dict[str, dict[str, Array]]:
    return {role: _entry(layer) for role, layer in linears.items()}


def _entry(layer: nnx.Linear) -> dict[str, Array]:
    return {"kernel": layer.kernel[...]} | ({} if layer.bias is None else {"bias": layer.bias[...]})


def _matrices(module: nnx.Module) -> list[Matrices]:
    """What the linear layers of a module may be in an FFN, if nobody names them."""
    layers = [_entry(layer) for _, layer in nnx.iter_modules(module) if isinstance(layer, nnx.Linear)]
    writers = {layer["kernel"].shape[1] for layer in layers} & {layer["kernel"].shape[0] for layer in layers}
    return [matrices for size in sorted(writers) for matrices in arranged(layers, size)]


def _growth(bare: Callable[[], nnx.Module], call: Call, path: str, names: dict[str, str]) -> Growth:
    readers = ("gate", "up") if "gate" in names else ("up",)
    original = _entries(_linears(bare(), path, names))
    biased = {"bias" in original[role] for role in readers}
    if len(biased) > 1:
        raise TPatchError(f"of {' and '.join(names[role] for role in readers)} in {path!r} only one has a bias; attach")

    def changed(module: Any, params: dict[str, dict[str, Array]]) -> nnx.Module:
        for role in names:
            layer, entry = _walk(_walk(module, path), names[role]), params[role]
            # What keeps its shape is left as it is, for another layer may share it.
            if layer.kernel.shape != entry["kernel"].shape:
                layer.kernel = layer.kernel.replace(entry["kernel"])
            layer.in_features, layer.out_features = entry["kernel"].shape
            layer.use_bias = "bias" in entry
            if not layer.use_bias:
                layer.bias = nnx.data(None)
            elif layer.bias is None:
                layer.bias = nnx.Param(entry["bias"])
            elif layer.bias.shape != entry["bias"].shape:
                layer.bias = layer.bias.replace(entry["bias"])
        return module

    def shared_again(module: Any) -> nnx.Module:
        """The narrow module, where layers that shared a variable before the merge share it, if it is still the same."""
        before, there = bare(), dict(nnx.iter_modules(module))
        for role in names:
            first, last = (_walk(_walk(each, path), names[role]) for each in (before, module))
            for name in ("kernel", "bias"):
                held, variable = getattr(first, name), getattr(last, name)
                for place, submodule in nnx.iter_modules(before) if isinstance(held, nnx.Variable) else ():
                    for other in [key for key, value in vars(submodule).items() if value is held]:
                        if same_arrays(getattr(there[place], other)[...], variable[...]):
                            setattr(there[place], other, variable)
        return module

    def grow(patch: Patch) -> nnx.Module:
        return changed(bare(), widened(original, patch, path))

    def shrink(wider: Any) -> tuple[nnx.Module, Patch]:
        graph, state = nnx.split(wider)
        copy = nnx.merge(graph, _copy(state))
        params = _entries(_linears(copy, path, names))
        added = ffn.width(params) - ffn.width(original)
        if added < 0:
            raise TPatchError(f"{path!r} of that module is narrower than this network's; give what `merge` returned")
        before, patch = ffn.unmerge(params, added, added_bias=biased == {False})
        return shared_again(changed(copy, before)), patch

    def apply(wider: Any, tokens: Array) -> Array:
        graph, state = nnx.split(wider)
        return jax.jit(lambda state, tokens: call(nnx.merge(graph, state), tokens))(state, tokens)

    return Growth(grow, shrink, apply, tuple(entry["kernel"].dtype for entry in original.values()))
