"""Products of rounded numbers with exact sums: what processors with units for matrices do several times as fast, those
with instructions for it up to twice, and what is left of a network whose activations somebody rounds.

Both multiply numbers of 8 significant bits (bfloat16) and sum in float32. XLA uses them on a CPU where both factors of
a product are bfloat16 and its result is float32, and only there: a function that is written for float32 has to be
turned into one that asks for that.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core.primitives import closed_call_p, dot_general_p, jit_p, remat_p
from jaxtyping import Array, Bool, Float

from tpatch_jax.core.int8 import is_int8
from tpatch_jax.typing import Params

__all__ = [
    "PRECISIONS",
    "in_float32",
    "is_bfloat16_faster",
    "round_inputs",
    "round_matrices",
    "round_products",
    "round_tensor",
    "rounds_products",
]

PRECISIONS = ("auto", "float32", "bfloat16")
"""Of the products by which values are trained."""

LARGE = 256
"""Networks this wide spend their time in products with their matrices; smaller ones gain nothing from faster ones."""

CPU_FACTS = Path("/proc/cpuinfo")
"""Where Linux says what a processor has."""

CPU_FLAGS = {"amx_bf16", "avx512_bf16"}
"""Of processors with units for matrices, and with instructions for dot products, of bfloat16."""

P = ParamSpec("P")
R = TypeVar("R")

_NESTED = {jit_p: "jaxpr", closed_call_p: "call_jaxpr", remat_p: "jaxpr"}
"""What only stands around other operations, and the name under which it has them."""


@lru_cache(maxsize=1)
def is_bfloat16_faster() -> bool:
    """Whether the devices multiply matrices of bfloat16 faster than those of float32.

    A CPU does that has AMX, or AVX-512's dot products of bfloat16; an NVIDIA GPU from compute capability 8 on, an AMD
    GPU of the CDNA family, and every TPU.
    """
    backend = jax.default_backend()
    if backend == "gpu":
        # "9.0" where NVIDIA made it, "gfx942" where AMD did.
        capability = str(getattr(jax.devices()[0], "compute_capability", ""))
        number = capability.partition(".")[0]
        return int(number) >= 8 if number.isdecimal() else capability.startswith("gfx9")
    if backend != "cpu":
        return backend == "tpu"
    try:
        return not CPU_FLAGS.isdisjoint(CPU_FACTS.read_text().split())
    except OSError:
        return False


def rounds_products(precision: str, hidden_size: int, dtype: Any, faster: bool) -> bool:
    """Whether values are trained with products of bfloat16, in a network that is of float32.

    Args:
        precision: one of `PRECISIONS`; ``"auto"`` leaves it to the devices and the network's width.
        hidden_size: that width.
        dtype: the type in which the network computes.
        faster: what `is_bfloat16_faster` says of the devices.

    Example:
        >>> rounds_products("auto", 576, jnp.float32, True), rounds_products("auto", 576, jnp.float32, False)
        (True, False)
    """
    if dtype != jnp.float32:
        return False
    return hidden_size >= LARGE and faster if precision == "auto" else precision == "bfloat16"


@jax.jit
def round_matrices(params: Params) -> Params:
    """All matrices of float32 in bfloat16, half as large; vectors, and what is in INT8, stay as they are.

    Args:
        params: a pytree of arrays.

    Example:
        >>> rounded = round_matrices({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)})
        >>> str(rounded["kernel"].dtype), str(rounded["bias"].dtype)
        ('bfloat16', 'float32')
    """

    def rounded(leaf: Any) -> Any:
        return leaf.astype(jnp.bfloat16) if not is_int8(leaf) and leaf.ndim > 1 and leaf.dtype == jnp.float32 else leaf

    return jax.tree.map(rounded, params, is_leaf=is_int8)


def in_float32(params: Params) -> Params:
    """All arrays of bfloat16 in float32: what a function reads that was written for numbers of that type."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, params)


def round_products(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, each product of a matrix rounded to bfloat16 and summed in float32, its derivatives too.

    ``x·W`` becomes ``bf16(x)·bf16(W)``, with sums in float32: each term is off by 2⁻⁸ of itself at most. Products that
    have batches on both sides, such as attention's scores, stay as they are, and so does all that is not float32 and
    whatever stands in a loop of its own. What precision a product asks for does not matter.

    Args:
        function: of pytrees of arrays; pure.

    Returns:
        A function of the same pytrees, as traceable as the first. Its reverse derivatives have rounded products as
        well; forward ones it has none.

    Example:
        >>> exact = jnp.ones((1, 3)) @ jnp.full((3, 2), 1.001)
        >>> rounded = round_products(jnp.matmul)(jnp.ones((1, 3)), jnp.full((3, 2), 1.001))
        >>> rounded.dtype == exact.dtype, float(rounded[0, 0])
        (True, 3.0)

    Source: Micikevicius et al. 2018 for mixed precision; Kalamkar et al. 2019 for bfloat16.
    """
    return _with_products(
        function, lambda params, *factors: _product(params["dimension_numbers"], params["out_sharding"], *factors)
    )


def round_inputs(
    function: Callable[P, R], levels: Float[Array, ""] | float, valid: Bool[Array, "tokens 1"] | None = None
) -> Callable[P, R]:
    """The same function as dynamic quantisation has it: what a matrix is multiplied with is rounded, `round_tensor`.

    Args:
        function: of pytrees of arrays; pure. Activations have a leading axis of their own, matrices have none, and so
            the factor with more axes is what is rounded; where both have two, none is.
        levels: steps from the smallest to the largest number of a factor; 0 leaves all as they are.
        valid: which tokens are no padding, on the axis before the last one of all activations.

    Example:
        >>> matrix, inputs = jnp.eye(2), jnp.array([[[0.0, 0.4], [1.0, 0.7]]])
        >>> round_inputs(jnp.matmul, 2)(inputs, matrix).tolist()
        [[[0.0, 0.5], [1.0, 0.5]]]
    """

    def multiply(params: dict[str, Any], left: Array, right: Array) -> Array:
        left = round_tensor(left, levels, valid) if left.ndim > right.ndim else left
        right = round_tensor(right, levels, valid) if right.ndim > left.ndim else right
        return dot_general_p.bind(left, right, **params)

    return _with_products(function, multiply)


def round_tensor(
    x: Float[Array, "..."], levels: Float[Array, ""] | float, valid: Bool[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """An array in equal steps from its smallest number to its largest, of which zero is one.

    ``q = clip(round(x/s) + z, 0, levels) - z``, times ``s = (max - min)/levels``, with ``z = round(-min/s)``.

    Args:
        x: the array, which one scale serves.
        levels: how many steps; 0 leaves it as it is.
        valid: which of its numbers count for the scale; all by default.

    Example:
        >>> round_tensor(jnp.array([0.0, 0.3, 1.0]), 2).tolist()
        [0.0, 0.5, 1.0]

    Source: Jacob et al. 2018, section 2.1; torch has 127 levels by default, onnxruntime 255.
    """
    counted = x if valid is None else jnp.where(valid, x, 0)
    low, high = jnp.minimum(jnp.min(counted), 0), jnp.maximum(jnp.max(counted), 0)
    step = (high - low) / jnp.maximum(levels, 1)
    step = jnp.where(step > 0, step, 1)
    zero = jnp.round(-low / step)
    rounded = (jnp.clip(jnp.round(x / step) + zero, 0, levels) - zero) * step
    return jnp.where(jnp.asarray(levels) > 0, rounded, x)


Multiply = Callable[[dict[str, Any], Array, Array], Array]


def _with_products(function: Callable[P, R], multiply: Multiply) -> Callable[P, R]:
    """The same function, its products without batches computed by another one."""

    def rounded(*args: P.args, **kwargs: P.kwargs) -> R:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args, **kwargs)
        results = _evaluate(closed, jax.tree.leaves((args, kwargs)), multiply)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return rounded


def _evaluate(closed: core.ClosedJaxpr, args: list[Any], multiply: Multiply) -> list[Any]:
    """Run a traced function, its products computed by another one."""
    jaxpr = closed.jaxpr
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))

    def read(atoms: Iterable[Any]) -> list[Any]:
        return [atom.val if isinstance(atom, core.Literal) else known[atom] for atom in atoms]

    for equation in jaxpr.eqns:
        primitive, params, inputs = equation.primitive, equation.params, read(equation.invars)
        if primitive is dot_general_p and _is_rounded(params, *inputs):
            results = [multiply(params, *inputs)]
        elif primitive in _NESTED:
            inner = params[_NESTED[primitive]]
            inner = inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())
            results = _evaluate(inner, inputs, multiply)
        else:
            results = _bind(primitive, params, inputs)
        known.update(zip(equation.outvars, results, strict=True))
    return read(jaxpr.outvars)


def _bind(primitive: core.Primitive, params: dict[str, Any], inputs: list[Any]) -> list[Any]:
    """An operation called anew: its functions are parameters as well since JAX 0.10, and came first before."""
    bound: Any = primitive.get_bind_params(params)
    functions, named = bound if isinstance(bound, tuple) else ((), bound)
    results: Any = primitive.bind(*functions, *inputs, **named)
    return results if primitive.multiple_results else [results]


def _is_rounded(params: dict[str, Any], left: Array, right: Array) -> bool:
    """Whether a product is of float32 and has no batches."""
    return not params["dimension_numbers"][1][0] and left.dtype == right.dtype == jnp.float32


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(dimensions: Any, sharding: Any, left: Float[Array, "..."], right: Float[Array, "..."]) -> Array:
    left, right = left.astype(jnp.bfloat16), right.astype(jnp.bfloat16)
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32, out_sharding=sharding)


@jax.tree_util.register_static
class _Shape(tuple[int, ...]):
    """The shape of a factor, which is no array."""


def _forward(dimensions: Any, sharding: Any, left: Any, right: Any) -> tuple[Array, Any]:
    # What is kept for the way back: of each factor that is not constant the other one, rounded as it was multiplied. A
    # constant matrix is then kept as it is given, and what it is multiplied with is let go.
    kept = [
        (_Shape(factor.value.shape), other.value.astype(jnp.bfloat16) if factor.perturbed else None)
        for factor, other in ((left, right), (right, left))
    ]
    return _product(dimensions, sharding, left.value, right.value), kept


def _backward(dimensions: Any, sharding: Any, kept: Any, slope: Array) -> tuple[Array | None, Array | None]:
    def pull(side: int) -> Array | None:
        shape, other = kept[side]
        # No slope at all: nothing depends on this product.
        if other is None or not isinstance(slope, jax.Array):
            return None

        def slopes(other: Array, slope: Array) -> Array:
            def multiply(factor: Array) -> Array:
                pair = (other, factor) if side else (factor, other)
                return jax.lax.dot_general(*pair, dimensions, out_sharding=sharding)

            return jax.linear_transpose(multiply, jax.ShapeDtypeStruct(shape, slope.dtype))(slope)[0]

        return round_products(slopes)(other.astype(jnp.float32), slope)

    return pull(0), pull(1)


_product.defvjp(_forward, _backward, symbolic_zeros=True)
