"""Patches on any Flax NNX module: its feed-forward network is captured in a copy, and widened in another."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import Array

from tpatch_jax.core import ffn
from tpatch_jax.core.arguments import check_kind
from tpatch_jax.core.patch import Patch
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.foreign.checks import (
    Matrices,
    Path,
    arranged,
    check_path,
    create_network,
    layers_of,
    suggestion,
    widened,
)
from tpatch_jax.models.foreign.cut import capture, mark_output, mark_query
from tpatch_jax.models.foreign.network import Activation, Growth, Network
from tpatch_jax.models.pytrees import same_arrays

__all__ = ["LinearKind", "from_nnx"]

Call = Callable[[Any, Array], Any]


def from_nnx(
    module: nnx.Module,
    ffn_path: Path,
    *,
    activation: str | Activation = "gelu",
    call: Call | None = None,
    up: str | None = None,
    down: str | None = None,
    gate: str | None = None,
    example: Any = None,
    linears: "Mapping[type, LinearKind] | None" = None,
) -> Network:
    """Cut an NNX module at one of its feed-forward networks, so that patches can be fitted, attached and merged.

    Args:
        module: the network, in evaluation mode; not changed, and later changes to it are not seen.
        ffn_path: where the FFN is, such as ``"blocks.3.mlp"``; a module of its own that is called once in a pass, on
            ``[batch, tokens, d]`` as its first argument. Where it is written inline in a block, its linear layers:
            ``("blocks.3.fc1", "blocks.3.fc2")``, or gate, up and down.
        activation: the FFN's, a name in `tpatch_jax.core.ffn.ACTIVATIONS` (``"gelu"`` is exact, ``"gelu_tanh"`` what
            `jax.nn.gelu` does by default) or a function.
        call: ``(module, inputs) -> logits``, if it is not ``module(inputs)``.
        up: the FFN's first ``nnx.Linear``, such as ``"fc1"``; only merging needs it.
        down: its last ``nnx.Linear``.
        gate: the ``nnx.Linear`` whose output is activated, if there is one besides ``up``.
        example: what the network accepts: token ids, ``[batch, tokens]``, by default ``[2, 8]``; or any pytree of
            arrays, such as images, or features and tokens.
        linears: kinds of linear layers besides ``nnx.Linear``, by class; see `LinearKind`.

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
    names = layers_of(ffn_path, call_shape, (up, down, gate))
    kinds = {nnx.Linear: PLAIN, **_checked(linears)}
    if bool(up) != bool(down) or (gate and not up):
        raise TPatchError(f"{call_shape}: merging needs both up= and down=, and only one is given; name both or none")
    graph, state = nnx.split(module)
    params, run_module = _copy(state), call or (lambda module, tokens: module(tokens))

    def bare() -> nnx.Module:
        return nnx.merge(graph, _copy(params))

    first, last = (ffn_path, ffn_path) if isinstance(ffn_path, str) else (ffn_path[0], ffn_path[-1])
    place, whole = (ffn_path, ffn_path) if isinstance(ffn_path, str) else ("", " to ".join(ffn_path))
    roles = ("whole",) if place else ("first", "last")

    def run(params: Any, inputs: Any) -> Array:
        copy = nnx.merge(graph, params)
        ends = _walk(copy, first), _walk(copy, last)
        # The copy alone gets other classes; the user's modules and their classes stay as they are.
        for module_at, role in zip(ends, roles, strict=False):
            object.__setattr__(module_at, "__class__", _captured(type(module_at), whole, role))
        return run_module(copy, inputs)

    for path in (ffn_path,) if isinstance(ffn_path, str) else ffn_path:
        module_at = _walk(bare(), path)
        if not isinstance(module_at, nnx.Module) or not path.strip("./"):
            kind = "the whole network" if isinstance(module_at, nnx.Module) else f"a {type(module_at).__name__}"
            what = "is not in this network" if module_at is _NOTHING else f"is {kind}, not one of its modules"
            raise TPatchError(f"{path!r} {what}; {_candidates(bare(), run_module, example)}")
    candidates = [] if names else _matrices(_walk(bare(), place))
    growth: Growth | str = (
        f"how to merge into {whole!r} is not known; name its nnx.Linear layers, as in "
        'from_nnx(…, up="fc1", down="fc2"), or attach'
    )
    if up and down:
        names = {"up": up, "down": down} | ({"gate": gate} if gate else {})
    if names:
        try:
            linears_at = _linears(bare(), place, names, kinds)
        except TPatchError as error:
            # Layers that the path names are marked whatever they are; merging alone has to know them.
            if isinstance(ffn_path, str):
                raise
            growth, names = str(error), {}
        else:
            candidates = [_entries(linears_at)]
            growth = _growth(bare, run_module, place, names, kinds, whole)
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
def _captured(kind: type, path: str, role: str) -> type:
    """A class whose call is named: of a whole FFN, or of its first or its last layer."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Array:
        def run(*args: Any, **kwargs: Any) -> Any:
            return kind.__call__(self, *args, **kwargs)

        if role == "first":
            return mark_query(run, args, kwargs, path)
        return mark_output(run(*args, **kwargs), path) if role == "last" else capture(run, args, kwargs, path)

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


class LinearKind(NamedTuple):
    """How a class of linear layers keeps its kernel and its bias, for `from_nnx` to merge into it.

    Attributes:
        read: ``layer -> {"kernel": [in, out], "bias"?: [out]}``.
        write: ``(layer, the same, wider) -> None``, changes the layer, whatever says how wide it is included.

    Example:
        >>> from flax import nnx
        >>> class Turned(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.weight = nnx.Param(rngs.params.normal((32, 8)))
        ...     def __call__(self, x):
        ...         return x @ self.weight[...].T
        >>> def write(layer, entry):
        ...     layer.weight = nnx.Param(entry["kernel"].T)
        >>> turned = LinearKind(lambda layer: {"kernel": layer.weight[...].T}, write)
        >>> turned.read(Turned(nnx.Rngs(0)))["kernel"].shape
        (8, 32)
    """

    read: Callable[[Any], Mapping[str, Array]]
    write: Callable[[Any, Mapping[str, Array]], None]


def _read_linear(layer: Any) -> dict[str, Array]:
    return {"kernel": layer.kernel[...]} | ({} if layer.bias is None else {"bias": layer.bias[...]})


def _write_linear(layer: Any, entry: Mapping[str, Array]) -> None:
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


PLAIN = LinearKind(_read_linear, _write_linear)


def _checked(linears: Any) -> Mapping[type, LinearKind]:
    """The kinds of linear layers that a user gave."""
    call = "from_nnx(…, linears=…)"
    check_kind(linears, Mapping | None, call, "a dict from classes of linear layers to LinearKind(read, write)")
    for kind, adapter in (linears or {}).items():
        check_kind(kind, type, call, "a class of linear layers, such as nnx.Linear")
        check_kind(adapter, LinearKind, call, "what reads and writes such a layer, LinearKind(read, write)")
    return linears or {}


class _Linear(NamedTuple):
    """A linear layer, and how its class keeps its kernel and its bias."""

    layer: nnx.Module
    kind: LinearKind


def _linears(
    module: nnx.Module, path: str, names: dict[str, str], kinds: Mapping[type, LinearKind]
) -> dict[str, _Linear]:
    """The linear layers of an FFN, by role."""
    linears = {}
    for role, name in names.items():
        layer = _walk(_walk(module, path), name)
        kind = next((kinds[base] for base in type(layer).__mro__ if base in kinds), None)
        if kind is None:
            what = "missing" if layer is _NOTHING else f"a {type(layer).__name__}"
            mend = "" if layer is _NOTHING else f", say how it keeps its kernel (linears={{{type(layer).__name__}: …}})"
            where = f" in {path!r}" if path else ""
            raise TPatchError(f"{role}={names[role]!r}{where} is {what}; name an nnx.Linear{mend}, or attach")
        if isinstance(layer, nnx.Linear) and not _is_plain(layer):
            raise TPatchError(
                f"{role}={names[role]!r} keeps its kernel as a {type(layer.kernel[...]).__name__}, quantised, and what "
                "is merged needs plain numbers; attach the patch, whose neurons stay in float"
            )
        linears[role] = _Linear(layer, kind)
    return linears


def _is_plain(layer: Any) -> bool:
    """Whether a linear layer's kernel is an array of numbers; a library that quantises puts something else there."""
    return isinstance(layer.kernel[...], Array)


def _entries(linears: Mapping[str, _Linear]) -> dict[str, dict[str, Array]]:
    entries = {}
    for role, (layer, kind) in linears.items():
        entries[role] = dict(kind.read(layer))
        if getattr(entries[role].get("kernel"), "ndim", 0) != 2 or entries[role].keys() - {"kernel", "bias"}:
            raise TPatchError(
                f"what `read` of linears= makes of the {type(layer).__name__} for {role} is not "
                '{"kernel": [in, out]} with or without "bias": [out]; mend it'
            )
    return entries


def _matrices(module: nnx.Module) -> list[Matrices]:
    """What the linear layers of a module may be in an FFN, if nobody names them."""
    layers = [
        _read_linear(layer)
        for _, layer in nnx.iter_modules(module)
        if isinstance(layer, nnx.Linear) and _is_plain(layer)
    ]
    writers = {layer["kernel"].shape[1] for layer in layers} & {layer["kernel"].shape[0] for layer in layers}
    return [matrices for size in sorted(writers) for matrices in arranged(layers, size)]


def _growth(
    bare: Callable[[], nnx.Module],
    call: Call,
    path: str,
    names: dict[str, str],
    kinds: Mapping[type, LinearKind],
    whole: str,
) -> Growth:
    readers = ("gate", "up") if "gate" in names else ("up",)

    def entries(module: nnx.Module) -> dict[str, dict[str, Array]]:
        return _entries(_linears(module, path, names, kinds))

    original = entries(bare())
    biased = {"bias" in original[role] for role in readers}
    if len(biased) > 1:
        raise TPatchError(f"of {' and '.join(names[role] for role in readers)} in {path!r} only one has a bias; attach")

    def changed(module: Any, params: dict[str, dict[str, Array]]) -> nnx.Module:
        for role, (layer, kind) in _linears(module, path, names, kinds).items():
            kind.write(layer, params[role])
        return module

    def shared_again(module: Any) -> nnx.Module:
        """The narrow module, where layers that shared a variable before the merge share it, if it is still the same."""
        before, there = bare(), dict(nnx.iter_modules(module))
        for role in names:
            first, last = (_walk(_walk(each, path), names[role]) for each in (before, module))
            for name, held in [pair for pair in vars(first).items() if isinstance(pair[1], nnx.Variable)]:
                variable = getattr(last, name)
                for place, submodule in nnx.iter_modules(before):
                    for other in [key for key, value in vars(submodule).items() if value is held]:
                        if same_arrays(getattr(there[place], other)[...], variable[...]):
                            setattr(there[place], other, variable)
        return module

    def grow(patch: Patch) -> nnx.Module:
        return changed(bare(), widened(original, patch, whole))

    def shrink(wider: Any) -> tuple[nnx.Module, Patch]:
        graph, state = nnx.split(wider)
        copy = nnx.merge(graph, _copy(state))
        params = entries(copy)
        added = ffn.width(params) - ffn.width(original)
        if added < 0:
            raise TPatchError(f"{whole!r} of that module is narrower than this network's; give what `merge` returned")
        before, patch = ffn.unmerge(params, added, added_bias=biased == {False})
        return shared_again(changed(copy, before)), patch

    def apply(wider: Any, inputs: Any) -> Array:
        graph, state = nnx.split(wider)
        return jax.jit(lambda state, inputs: call(nnx.merge(graph, state), inputs))(state, inputs)

    return Growth(grow, shrink, apply, tuple(entry["kernel"].dtype for entry in original.values()))
