"""Patches on any Flax Linen module: its feed-forward network is intercepted, and widened by the module's options."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from tpatch_jax.core import ffn
from tpatch_jax.core.arguments import check_kind, describe
from tpatch_jax.core.patch import Patch
from tpatch_jax.errors import TPatchError
from tpatch_jax.models.foreign.checks import (
    Matrices,
    Path,
    arranged,
    check_path,
    create_network,
    example_inputs,
    layers_of,
    suggestion,
    widened,
)
from tpatch_jax.models.foreign.cut import capture, mark_output, mark_query
from tpatch_jax.models.foreign.network import Activation, Growth, Network

__all__ = ["from_linen"]

Call = Callable[[Any, Array], Any]
Widen = Callable[[Any, int], nn.Module]


def from_linen(
    module: nn.Module,
    params: Mapping[str, Any],
    ffn_path: Path,
    *,
    activation: str | Activation = "gelu",
    call: Call | None = None,
    widen: Widen | None = None,
    up: str | None = None,
    down: str | None = None,
    gate: str | None = None,
    example: Any = None,
) -> Network:
    """Cut a Linen module at one of its feed-forward networks, so that patches can be fitted and attached.

    Linen checks the shapes of parameters against the module's options, so that merging needs a wider module: ``widen``
    makes one. Where that option widens every FFN of the network, the others get neurons whose parameters are all zero.

    Args:
        module: the network.
        params: its parameters, or all its variables (``{"params": …, …}``).
        ffn_path: where the FFN is, such as ``"block_3/mlp"``; a module of its own that is called once in a pass, on
            ``[batch, tokens, d]`` as its first argument. Where it is written inline in a block, its linear layers:
            ``("block_3/Dense_0", "block_3/Dense_1")``, or gate, up and down.
        activation: the FFN's, a name in `tpatch_jax.core.ffn.ACTIVATIONS` (``"gelu"`` is exact, ``"gelu_tanh"`` what
            `jax.nn.gelu` does by default) or a function.
        call: ``(module, inputs) -> logits``, if it is not ``module(inputs)``; the module is bound to its parameters.
        widen: ``(module, n) -> module`` with ``n`` more hidden neurons; only merging needs it.
        up: the FFN's first ``nn.Dense``, by default ``"Dense_0"``.
        down: its last ``nn.Dense``, by default ``"Dense_1"``.
        gate: the ``nn.Dense`` whose output is activated, if there is one besides ``up``.
        example: what the network accepts: token ids, ``[batch, tokens]``, by default ``[2, 8]``; or any pytree of
            arrays, such as images, or features and tokens.

    Returns:
        The `Network`. Its ``merge`` returns a module and its parameters.

    Raises:
        TPatchError: the path leads nowhere, or not to a module that can be cut, or to a block around an FFN; on the
            example the FFN activates otherwise than ``activation`` says; the network does not run; the
            activation is unknown; the parameters are no dict.

    Example:
        >>> import flax.linen as nn
        >>> class Mlp(nn.Module):
        ...     hidden: int
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         hidden = nn.gelu(nn.Dense(self.hidden)(x))
        ...         return nn.Dense(x.shape[-1])(hidden)
        >>> class Tiny(nn.Module):
        ...     hidden: int = 32
        ...     @nn.compact
        ...     def __call__(self, tokens):
        ...         x = nn.Embed(50, 8)(tokens)
        ...         return nn.Dense(50)(x + Mlp(self.hidden, name="mlp")(x))
        >>> params = Tiny().init(jax.random.key(0), jnp.zeros((1, 4), int))["params"]
        >>> widen = lambda module, n: module.clone(hidden=module.hidden + n)
        >>> network = from_linen(Tiny(), params, "mlp", activation="gelu_tanh", widen=widen)
        >>> from tpatch_jax.core.patch import create
        >>> wider, wider_params = network.merge(create(8, neurons=2))
        >>> wider.hidden, wider_params["mlp"]["Dense_0"]["kernel"].shape
        (34, (8, 34))
    """
    call_shape = "from_linen(module, params, ffn_path)"
    check_path(ffn_path, call_shape)
    if not isinstance(params, Mapping):
        kind = type(params).__name__
        raise TPatchError(f"a {kind} is no dict of parameters; of a TrainState give its params")
    check_kind(module, nn.Module, call_shape, "a Linen module; an NNX one goes to from_nnx, without parameters")
    if widen is not None and not callable(widen):
        raise TPatchError(f"widen is {describe(widen)}; give a function (module, n) -> module with n more neurons")
    whole = isinstance(params.get("params"), Mapping)
    variables = unfreeze(dict(params)) if whole else {"params": unfreeze(dict(params))}
    given = variables
    variables = jax.tree.map(jnp.asarray, nn.meta.unbox(variables))
    run_module = call or (lambda module, tokens: module(tokens))
    names = layers_of(ffn_path, call_shape, (up, down, gate))
    path, ends = "", tuple(_cleaned(part) for part in names.values())
    place = " to ".join(ends)
    if isinstance(ffn_path, str):
        path = place = _cleaned(ffn_path)
        ends = (path,)
        names = {"up": up or "Dense_0", "down": down or "Dense_1"} | ({"gate": gate} if gate else {})
    names = {role: _cleaned(name) for role, name in names.items()}

    def run(variables: Any, inputs: Any) -> Array:
        def intercept(following: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            here = _path(context)
            if here == path and path:
                return capture(following, args, kwargs, place)
            marked = not path and here is not None
            output = mark_query(following, args, kwargs, place) if marked and here == ends[0] else None
            output = following(*args, **kwargs) if output is None else output
            return mark_output(output, place) if marked and here == ends[-1] else output

        with nn.intercept_methods(intercept):
            return nn.apply(run_module, module)(variables, inputs)

    called: set[str] = set()
    seen: list[tuple[str, bool]] = []
    runs, listed = suggestion(
        lambda tokens: _listen(run_module, module, variables, tokens, called, seen), seen, example
    )
    for end in ends if runs else ():
        if not end or end not in called:
            shown = end if len(ends) > 1 else ffn_path
            raise TPatchError(f"{shown!r} is not a module that this network calls; {listed}")
    growth: Growth | str = (
        f"Linen checks parameter shapes, so merging into {place!r} needs a wider module; pass "
        "widen=lambda module, n: module.clone(hidden=module.hidden + n), with your module's own option, or attach"
    )
    candidates = _matrices(variables["params"], path, names)
    if widen is not None:
        growth = _growth(module, variables, given, whole, run_module, path, names, widen, example)
    return create_network(run, variables, path or ends, activation, example, growth, candidates)


def _cleaned(path: str) -> str:
    """A path with its parts between single strokes."""
    return "/".join(part for part in path.replace(".", "/").split("/") if part)


def _path(context: Any) -> str | None:
    """The path of a module whose ``__call__`` is being intercepted."""
    path = context.module.scope.path if context.module.scope is not None else ()
    return "/".join(path) if context.method_name == "__call__" else None


def _listen(
    call: Call, module: nn.Module, variables: Any, tokens: Array, called: set[str], seen: list[tuple[str, bool]]
) -> Any:
    """Run a module and note every submodule, those that keep their input's shape, and whether they are Flax's own."""

    def intercept(following: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        output, path, kind = following(*args, **kwargs), _path(context), type(context.module)
        query = args[0] if args else next(iter(kwargs.values()), None)
        if path is not None:
            called.add(path)
        if path and getattr(query, "shape", ()) == getattr(output, "shape", None) and getattr(output, "ndim", 0) == 3:
            seen.append((path, kind.__module__.startswith("flax.") and kind is not nn.Sequential))
        return output

    with nn.intercept_methods(intercept):
        return nn.apply(call, module)(variables, tokens)


def _matrices(params: Mapping[str, Any], path: str, names: Mapping[str, str]) -> list[Matrices]:
    """What an FFN's linear layers are, if those of these names are there; else what they may be by their shapes."""
    inner = _inside(params, path)
    named = {role: _inside(inner, name) for role, name in names.items()}
    if all(getattr(_kernel(entry), "ndim", 0) == 2 for entry in named.values()):
        return [named]
    layers = {name: entry for name, entry in inner.items() if getattr(_kernel(entry), "ndim", 0) == 2}
    sizes = {_kernel(entry).shape[0] for entry in layers.values()}
    return [matrices for size in sorted(sizes) for matrices in arranged(list(layers.values()), size)]


def _inside(params: Any, path: str) -> Any:
    """What stands under a path; nothing where there is none."""
    for part in path.split("/") if path else ():
        params = params.get(part, {}) if isinstance(params, Mapping) else {}
    return params


def _kernel(entry: Any) -> Any:
    return entry.get("kernel") if isinstance(entry, Mapping) else None


def _growth(
    module: nn.Module,
    variables: dict[str, Any],
    boxed: dict[str, Any],
    whole: bool,
    call: Call,
    path: str,
    names: dict[str, str],
    widen: Widen,
    example: Any,
) -> Growth:
    inputs = example_inputs(example)
    parts = path.split("/") if path else []

    def entries(params: Mapping[str, Any]) -> dict[str, dict[str, Array]]:
        """The FFN's own sub-dict, by role."""
        inner = _inside(params, path)
        for role, name in names.items():
            if getattr(_kernel(_inside(inner, name)), "ndim", 0) != 2:
                there = ", ".join(inner) or "nothing"
                raise TPatchError(
                    f"{role}={name!r} is not an nn.Dense in {path!r}, which holds {there}; name it, or attach"
                )
        return {role: dict(_inside(inner, name)) for role, name in names.items()}

    base = entries(variables["params"])

    boxes = {place: leaf for place, leaf in flatten_dict(boxed["params"]).items() if _is_box(leaf)}

    def given(params: dict[tuple[str, ...], Any], inside: Mapping[tuple[str, ...], Any]) -> Any:
        """Parameters as the user has them: alone, or among all variables, each in its box that says how it is split."""
        # What is new, such as a bias, is boxed as the module itself does, if others of the user's are.
        there = {**(inside if boxes else {}), **boxes}
        put = {place: there[place].replace_boxed(leaf) if place in there else leaf for place, leaf in params.items()}
        return {**boxed, "params": unflatten_dict(put)} if whole else unflatten_dict(put)

    def grow(patch: Patch) -> tuple[nn.Module, Any]:
        neurons = patch.key.shape[0]
        wider = widen(module, neurons)
        init = nn.init(call, wider)
        shapes = flatten_dict(unfreeze(jax.eval_shape(lambda: init(jax.random.key(0), inputs)["params"])))
        expected = {place: nn.meta.unbox(leaf) for place, leaf in shapes.items()}
        merged = widened(base, patch, path or " to ".join(names.values()))
        inside = {
            (*parts, *names[role].split("/"), name): leaf for role in merged for name, leaf in merged[role].items()
        }
        have = {**flatten_dict(variables["params"]), **inside}
        result = {place: _fit(place, have.get(place), shape, neurons) for place, shape in expected.items()}
        lost = sorted("/".join(place) for place in set(have) - set(expected))
        if lost:
            raise TPatchError(
                f"the module that widen made has no parameter {lost[0]!r}; it must only add hidden neurons"
            )
        return wider, given(result, {place: leaf for place, leaf in shapes.items() if _is_box(leaf)})

    def shrink(wider: Any) -> tuple[tuple[nn.Module, Any], Patch]:
        if not isinstance(wider, tuple) or len(wider) != 2:
            raise TPatchError("unmerge takes what `merge` returned: a pair of a module and its parameters")
        params = nn.meta.unbox(wider[1]["params"] if whole else wider[1])
        there = entries(params)
        reader = "gate" if "gate" in names else "up"
        neurons = ffn.width(there) - ffn.width(base)
        if neurons < 0:
            raise TPatchError(f"{path!r} is narrower there than in this network; give what `merge` returned")
        _, patch = ffn.unmerge(there, neurons, added_bias="bias" not in base[reader])
        flat: Any = flatten_dict(params)
        original: Any = flatten_dict(variables["params"])
        before = {place: _first(flat[place], leaf.shape) for place, leaf in original.items()}
        return (module, given(before, {})), patch

    def apply(wider: Any, inputs: Any) -> Array:
        module, params = wider
        return jax.jit(nn.apply(call, module))(params if whole else {"params": params}, inputs)

    return Growth(grow, shrink, apply, tuple(entry["kernel"].dtype for entry in base.values()))


def _is_box(leaf: Any) -> bool:
    """Whether a parameter stands in a box of Flax's, such as `nn.Partitioned`, which says how it is split."""
    return isinstance(leaf, nn.meta.AxisMetadata)


def _first(leaf: Any, shape: tuple[int, ...]) -> Array:
    return leaf[tuple(slice(size) for size in shape)]


def _fit(place: tuple[str, ...], leaf: Array | None, shape: Any, neurons: int) -> Array:
    """A parameter in the shape that the wider module expects: new neurons of other FFNs are zero, and so silent."""
    name, expected = "/".join(place), tuple(shape.shape)
    if leaf is None and place[-1] == "bias":
        return jnp.zeros(expected, shape.dtype)
    if leaf is None:
        raise TPatchError(f"the module that widen made has a new parameter {name!r}; it must only add hidden neurons")
    missing = [there - here for here, there in zip(leaf.shape, expected, strict=False)]
    if leaf.ndim != len(expected) or any(count not in (0, neurons) for count in missing):
        raise TPatchError(
            f"the module that widen made expects {name!r} to be {list(expected)}, and with {neurons} more neurons it "
            f"is {list(leaf.shape)}; widen must add just that many"
        )
    return jnp.pad(leaf, [(0, count) for count in missing])
