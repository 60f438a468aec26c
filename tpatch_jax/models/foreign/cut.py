"""Cutting any JAX function in two at its feed-forward network, on the function's own jaxpr.

The caller wraps one call inside the function in `capture`, which names the call's input and output. `cut` then traces
the function and sorts its equations:

* ``after``: those that depend on the named output, which becomes an input: the rest of the network;
* ``before``: those that the named input, the named output, or the rest need from the tokens;
* equations that see parameters only (a cast, a causal mask) belong to neither and are run in whichever half reads them.

What the rest reads from the first half is the context. ``jit`` and ``remat`` equations are opened so that the cut goes
through them; any other equation with functions inside (a scan, a custom derivative) stays whole.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from tpatch_jax.errors import TPatchError

__all__ = ["Cut", "capture", "cut", "is_tokens", "mark_output", "mark_query"]

_QUERY, _OUTPUT = "tpatch_jax.query", "tpatch_jax.output"
# By their names in all jax versions that are supported.
_TRANSPARENT = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"}
_SUMS = {"add", "add_any", "convert_element_type", "copy", "reshape"}
_RANDOM = {"random_bits", "random_gamma", "rng_bit_generator", "rng_uniform", "threefry2x32"}


class _Step(NamedTuple):
    """One equation; values are numbered, because equations of one inner jaxpr may be run in several places."""

    equation: JaxprEqn
    reads: tuple[int, ...]
    writes: tuple[int, ...]


def capture(call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Array:
    """Call a feed-forward network and name its input and its output, so that `cut` finds them.

    Args:
        call: the network.
        args: its positional arguments; the first is the query. Without any, the first keyword argument is.
        kwargs: its keyword arguments.
        name: what errors call it.

    Returns:
        Its output.

    Raises:
        TPatchError: the query or the output is not one array.
    """
    return mark_output(mark_query(call, args, kwargs, name), name)


def mark_query(call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Any:
    """Call the first layer of a feed-forward network and name its input; see `capture`."""
    args, kwargs = list(args), dict(kwargs)
    holder, place = (args, 0) if args else (kwargs, next(iter(kwargs), None))
    query = holder[place] if place is not None else None  # type: ignore[index]
    if not isinstance(query, jax.Array):
        raise TPatchError(f"{name!r} is called on {_said(query)}; its first argument must be the query, one array")
    holder[place] = checkpoint_name(query, _QUERY)  # type: ignore[index]
    return call(*args, **kwargs)


def mark_output(output: Any, name: str) -> Array:
    """Name what the last layer of a feed-forward network returned; see `capture`."""
    if not isinstance(output, jax.Array):
        raise TPatchError(
            f"{name!r} returns {_said(output)}, not one array; name the submodule that computes its output"
        )
    return checkpoint_name(output, _OUTPUT)


def _said(thing: Any) -> str:
    return "nothing" if thing is None else f"a {type(thing).__name__}"


class _Program:
    """The equations of a jaxpr in one list, with `capture`'s two names taken out of it."""

    def __init__(self, closed: ClosedJaxpr):
        self.steps: list[_Step] = []
        self.constants: dict[int, Any] = {}
        self.types: list[Any] = []
        self.queries: list[int] = []
        self.outputs: list[tuple[int, int]] = []  # the network's own, and what stands for it afterwards
        self.hidden_in: list[str] = []
        self.inputs = [self._new(var.aval) for var in closed.jaxpr.invars]
        self.results = self._read(closed.jaxpr, self._held(closed), self.inputs)

    def _new(self, aval: Any) -> int:
        self.types.append(aval)
        return len(self.types) - 1

    def _constant(self, value: Any, aval: Any) -> int:
        number = self._new(aval)
        self.constants[number] = value
        return number

    def _held(self, closed: ClosedJaxpr) -> list[int]:
        pairs = zip(closed.consts, closed.jaxpr.constvars, strict=True)
        return [self._constant(value, variable.aval) for value, variable in pairs]

    def _read(self, jaxpr: Jaxpr, constants: Sequence[int], inputs: Sequence[int]) -> list[int]:
        known: dict[Any, int] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))

        def number(atom: Any) -> int:
            return self._constant(atom.val, atom.aval) if isinstance(atom, Literal) else known[atom]

        for equation in jaxpr.eqns:
            reads = [number(atom) for atom in equation.invars]
            kind, mark = equation.primitive.name, equation.params.get("name")
            inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
            if kind == "name" and mark == _QUERY:
                writes = reads
                self.queries += reads
            elif kind == "name" and mark == _OUTPUT:
                writes = [self._new(equation.outvars[0].aval)]
                self.outputs.append((reads[0], writes[0]))
            elif kind in _TRANSPARENT and isinstance(inner, ClosedJaxpr):
                writes = self._read(inner.jaxpr, self._held(inner), reads)
            elif kind in _TRANSPARENT and isinstance(inner, Jaxpr):
                writes = self._read(inner, [], reads)
            else:
                writes = [self._new(var.aval) for var in equation.outvars]
                self.steps.append(_Step(equation, tuple(reads), tuple(writes)))
                if any(inside.params.get("name") == _OUTPUT for inside in _inside(equation)):
                    self.hidden_in.append(kind)
            known.update(zip(equation.outvars, writes, strict=True))
        return [number(atom) for atom in jaxpr.outvars]


def _inside(equation: JaxprEqn) -> Iterator[JaxprEqn]:
    """All equations within an equation, at any depth."""
    for value in equation.params.values():
        for entry in value if isinstance(value, tuple | list) else (value,):
            jaxpr = entry.jaxpr if isinstance(entry, ClosedJaxpr) else entry
            if isinstance(jaxpr, Jaxpr):
                for inner in jaxpr.eqns:
                    yield inner
                    yield from _inside(inner)


def _run(steps: Sequence[_Step], values: dict[int, Any]) -> None:
    for step in steps:
        primitive = step.equation.primitive
        bound = primitive.get_bind_params(step.equation.params)
        # Before jax 0.10 the functions inside an equation came apart from its other parameters.
        functions, params = bound if isinstance(bound, tuple) else ((), bound)
        result = primitive.bind(*functions, *(values[number] for number in step.reads), **params)
        values.update(zip(step.writes, result if primitive.multiple_results else [result], strict=True))


@dataclass(frozen=True, eq=False)
class Cut:
    """A function of parameters and inputs in two halves, for one shape of inputs; see `cut`.

    Attributes:
        before: equations of the first half.
        after: equations of the second half.
        inside: those of the first half that lead from the FFN's input to its output.
        adds_input: whether that output is a sum of which the input is a part.
        context: the shape and type of what the second half reads from the first, besides the FFN's output.
        query: the shape and type of the FFN's input.
        logits: the shape and type of the result.
    """

    before: tuple[_Step, ...] = field(repr=False)
    after: tuple[_Step, ...] = field(repr=False)
    inside: tuple[_Step, ...] = field(repr=False)
    adds_input: bool
    context: dict[str, Any]
    query: Any
    logits: Any
    _constants: dict[int, Any] = field(repr=False)
    _params: tuple[int, ...] = field(repr=False)
    _inputs: tuple[int, ...] = field(repr=False)
    _numbers: dict[str, int] = field(repr=False)
    _context: dict[str, int] = field(repr=False)

    def trace(self, params: Any, inputs: Any) -> tuple[Array, Array, dict[str, Array]]:
        """The first half: the FFN's input and output, and the context."""
        values = self._start(params, inputs)
        _run(self.before, values)
        context = {name: values[number] for name, number in self._context.items()}
        return values[self._numbers["query"]], values[self._numbers["output"]], context

    def network(self, params: Any, inputs: Any, query: Array) -> Array:
        """The FFN's output where its input is another than the first half gives it."""
        values = self._start(params, inputs)
        _run(self.before, values)
        values[self._numbers["query"]] = query
        _run(self.inside, values)
        return values[self._numbers["output"]]

    def resume(self, params: Any, context: Mapping[str, Array], output: Array) -> Array:
        """The second half: from the FFN's output to the result."""
        values = self._start(params)
        values.update({number: context[name] for name, number in self._context.items()})
        values[self._numbers["given"]] = output.astype(self.query.dtype)
        _run(self.after, values)
        return values[self._numbers["logits"]]

    def _start(self, params: Any, inputs: Any = ()) -> dict[int, Any]:
        given = [(self._params, params), *([(self._inputs, inputs)] if jax.tree.leaves(inputs) else [])]
        pairs = (pair for numbers, tree in given for pair in zip(numbers, jax.tree.leaves(tree), strict=True))
        return {**self._constants, **dict(pairs)}

    @cached_property
    def jit_trace(self) -> Callable[..., tuple[Array, Array, dict[str, Array]]]:
        """`trace`, compiled once."""
        return jax.jit(self.trace)

    @cached_property
    def jit_network(self) -> Callable[..., Array]:
        """`network`, compiled once."""
        return jax.jit(self.network)

    @cached_property
    def jit_resume(self) -> Callable[..., Array]:
        """`resume`, compiled once."""
        return jax.jit(self.resume)


def cut(function: Callable[[Any, Any], Array], params: Any, inputs: Any, name: str) -> Cut:
    """Cut a function in two at the call that `capture` wraps.

    ``function(params, inputs) == resume(params, context, output)``
    with ``query, output, context = trace(params, inputs)``.

    Args:
        function: pure, of parameters and inputs, such as tokens ``[batch, tokens]``; one array, of any shape.
        params: a pytree of arrays.
        inputs: a pytree of shapes and types.
        name: what errors call the feed-forward network.

    Returns:
        The `Cut`, for inputs of these shapes.

    Raises:
        TPatchError: the function fails, draws random numbers or does not return one array; or the call does not happen
            just once, or not from ``[batch, positions, d]`` to the same shape, or has no effect on the result.

    Example:
        >>> def function(params, tokens):
        ...     x = params["embed"][tokens]
        ...     return (x + capture(jnp.tanh, [x @ params["mix"]], {}, "mlp")) @ params["embed"].T
        >>> params = {"embed": jnp.ones((10, 4)), "mix": jnp.eye(4)}
        >>> halves = cut(function, params, jax.ShapeDtypeStruct((1, 3), jnp.int32), "mlp")
        >>> query, output, context = halves.trace(params, jnp.zeros((1, 3), jnp.int32))
        >>> halves.resume(params, context, output).shape, [step.equation.primitive.name for step in halves.after]
        ((1, 3, 10), ['add', 'transpose', 'dot_general'])
    """
    try:
        closed, result = jax.make_jaxpr(function, return_shape=True)(params, inputs)
    except TPatchError:
        raise
    except Exception as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise TPatchError(
            f"the network does not run on {_described(inputs)} ({type(error).__name__}: {reason}); "
            "say how it is called with call=lambda module, tokens: …, or give tokens, or whatever it reads, as example="
        ) from error
    if not isinstance(result, jax.ShapeDtypeStruct):
        raise TPatchError(
            f"the network returns {_said(result)}; pick the logits with call=lambda module, tokens: module(tokens)[0]"
        )
    program = _Program(closed)
    _check(program, inputs, name)
    return _halves(program, len(jax.tree.leaves(inputs)), name)


def is_tokens(inputs: Any) -> bool:
    """Whether what a network reads, or its shape and type, is one table of token ids."""
    integers = jnp.issubdtype(getattr(inputs, "dtype", jnp.float32), jnp.integer)
    return integers and getattr(inputs, "ndim", 0) == 2


def _described(inputs: Any) -> str:
    if is_tokens(inputs):
        return f"tokens of shape {inputs.shape}"
    return "inputs " + ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(inputs))


def _check(program: _Program, inputs: Any, name: str) -> None:
    if program.hidden_in:
        raise TPatchError(
            f"{name!r} is called inside {program.hidden_in[0]!r}, where one layer cannot be told from another; "
            "build the network with its layers unrolled (a Python loop in place of scan)"
        )
    if not program.outputs:
        raise TPatchError(f"{name!r} is never called on the way to the logits; name the FFN that the network runs")
    if not program.queries:
        raise TPatchError(f"the first layer of {name!r} is never called on the way to the logits; name one that is")
    if (calls := max(len(program.outputs), len(program.queries))) > 1:
        raise TPatchError(
            f"{name!r} is called {calls} times in one pass (shared between layers?); a patch needs an "
            "FFN that is called once: give each layer its own"
        )
    query, output = (program.types[number] for number in (program.queries[0], program.outputs[0][0]))
    tokens = is_tokens(inputs)
    if query.shape != output.shape or (tokens and query.shape[:2] != inputs.shape) or query.ndim != 3:
        raise TPatchError(
            f"{name!r} maps {list(query.shape)} to {list(output.shape)} on {_described(inputs)}; an FFN maps "
            f"[batch, {'tokens' if tokens else 'positions'}, d] to the same shape: name the module around its layers. "
            "One that is written inline in a block has none; name its first and its last linear layer as a pair, "
            "('blocks.3.fc1', 'blocks.3.fc2')"
        )
    equations = [equation for step in program.steps for equation in (step.equation, *_inside(step.equation))]
    drawn = next((equation.primitive.name for equation in equations if equation.primitive.name in _RANDOM), None)
    if drawn:
        raise TPatchError(
            f"the network draws random numbers ({drawn}), so two passes differ; turn dropout off: module.eval() for "
            "NNX, or call=lambda module, tokens: module(tokens, deterministic=True)"
        )


def _halves(program: _Program, count: int, name: str) -> Cut:
    params, inputs = program.inputs[:-count], program.inputs[-count:]
    (query,), ((output, given),), (logits,) = program.queries, program.outputs, program.results
    second, first = {given}, set(inputs)
    for step in program.steps:
        side = second if second.intersection(step.reads) else first if first.intersection(step.reads) else None
        if side is not None:
            side.update(step.writes)
    if logits not in second:
        raise TPatchError(f"the output of {name!r} has no effect on the logits; name the FFN that the network uses")

    def needed(steps: Sequence[_Step], wanted: set[int]) -> tuple[list[_Step], set[int]]:
        """The steps that lead to the wanted values, and everything that these steps read."""
        kept = []
        for step in reversed(steps):
            if wanted.intersection(step.writes):
                kept.append(step)
                wanted = wanted.union(step.reads)
        return kept[::-1], wanted

    after, read = needed([step for step in program.steps if not first.intersection(step.writes)], {logits})
    shared = sorted(read & first)
    before, _ = needed([s for s in program.steps if not second.intersection(s.writes)], {query, output, *shared})
    reached = {query}
    for step in before:
        if reached.intersection(step.reads):
            reached.update(step.writes)
    if output not in reached:
        raise TPatchError(
            f"what {name!r} returns does not depend on what it reads; name its first layer first and its last one last"
        )
    # Not the step that makes the query itself.
    inside, _ = needed([step for step in before if (reached - {query}).intersection(step.writes)], {output})
    context = {f"{place}": number for place, number in enumerate(shared)}
    return Cut(
        tuple(before),
        tuple(after),
        tuple(inside),
        query in _summands(inside, output),
        {place: jax.ShapeDtypeStruct(*_shaped(program.types[number])) for place, number in context.items()},
        jax.ShapeDtypeStruct(*_shaped(program.types[output])),
        jax.ShapeDtypeStruct(*_shaped(program.types[logits])),
        program.constants,
        tuple(params),
        tuple(inputs),
        {"query": query, "output": output, "given": given, "logits": logits},
        context,
    )


def _summands(steps: Sequence[_Step], number: int) -> set[int]:
    """A value and, where it is a sum, everything that is added up in it."""
    written = {one: step for step in steps for one in step.writes}
    parts, waiting = {number}, [number]
    while waiting:
        step = written.get(waiting.pop())
        if step is not None and step.equation.primitive.name in _SUMS:
            waiting += [one for one in step.reads if one not in parts]
            parts.update(step.reads)
    return parts


def _shaped(aval: Any) -> tuple[tuple[int, ...], Any]:
    return aval.shape, aval.dtype
