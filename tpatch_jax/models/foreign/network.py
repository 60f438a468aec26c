"""A network that is not from this library, cut at one of its feed-forward networks.

`tpatch_jax.models.foreign.nnx.from_nnx` and `tpatch_jax.models.foreign.linen.from_linen` make a `Network` from a Flax
module. It keeps the contract of the library's own models: ``trace``, ``resume``, ``apply``, ``attach``, ``merge``.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, Partial
from jaxtyping import Array, Float, Int

from tpatch_jax.core.arguments import check_kind, describe
from tpatch_jax.core.patch import Patch, concatenate, contribution, sized
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import networks
from tpatch_jax.models.foreign.cut import Cut, cut, is_tokens
from tpatch_jax.models.networks import Trace
from tpatch_jax.models.pytrees import same_arrays
from tpatch_jax.typing import Activation

__all__ = ["Activation", "Growth", "Network", "added", "as_inputs", "shapes_of", "token_table", "tolerance"]


class Growth(NamedTuple):
    """How a patch goes into the parameters of a foreign module, for the kind of module at hand.

    Attributes:
        grow: ``patch -> wider``, a new module, or a new module and its parameters.
        shrink: ``wider -> (original, patch)``, the inverse.
        apply: ``(wider, inputs) -> logits``.
        dtypes: the types of the FFN's matrices, in which a merged patch is kept.
    """

    grow: Callable[[Patch], Any]
    shrink: Callable[[Any], tuple[Any, Patch]]
    apply: Callable[[Any, Array], Array]
    dtypes: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class _Facts:
    """What of a network is not trained, as one value that compares and hashes, as what is static in a pytree must."""

    run: Callable[[Any, Array], Array]
    path: str
    layer: int
    activation: Activation
    example: Any
    growth: Growth | str
    memo: dict[Any, Any]

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, _Facts):
            return NotImplemented
        plain = (self.run, self.path, self.layer, self.activation, self.growth)
        same = plain == (other.run, other.path, other.layer, other.activation, other.growth)
        return same and same_arrays(self.example, other.example)

    def __hash__(self) -> int:
        return hash((self.path, self.layer))


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, eq=False)
class Network:
    """Somebody's network, cut at one feed-forward network. Immutable: `attach` returns another one.

    A pytree: its parameters and attached patches are the leaves and all else is static, so that a network goes through
    ``jit``, ``vmap`` and ``grad`` as an argument as well. Networks are equal if they were cut from one module at one
    place and their arrays are the same, bit for bit.

    Attributes:
        run: the network as a pure function, ``(params, inputs) -> logits``, its FFN captured. What it reads are tokens
            ``[batch, tokens]``, or any pytree of arrays.
        params: its parameters, a pytree; a snapshot, which later changes of the user's module do not reach.
        path: where the FFN is.
        layer: the last number in ``path``, 0 without one.
        activation: what patch neurons activate with; the FFN's own.
        example: what the network accepts: token ids ``[batch, tokens]``, or any pytree of arrays.
        beside: attached patches, by the names of `tpatch_jax.core.ffn`.
        growth: how to merge, or why it is impossible.
    """

    run: Callable[[Any, Array], Array] = field(repr=False)
    params: Any = field(repr=False)
    path: str
    layer: int
    activation: Activation
    example: Any = field(repr=False)
    beside: Mapping[str, Patch] = field(default_factory=dict, repr=False)
    growth: Growth | str = field(default="", repr=False)
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], _Facts]:
        """Parameters and patches, and what is static; for `jax.tree`."""
        facts = _Facts(self.run, self.path, self.layer, self.activation, self.example, self.growth, self._memo)
        return ((GetAttrKey("params"), self.params), (GetAttrKey("beside"), dict(self.beside))), facts

    @classmethod
    def tree_unflatten(cls, facts: _Facts, children: tuple[Any, Mapping[str, Patch]]) -> "Network":
        """The inverse of `tree_flatten_with_keys`."""
        place = (facts.path, facts.layer, facts.activation, facts.example)
        return cls(facts.run, children[0], *place, children[1], facts.growth, facts.memo)

    def __eq__(self, other: object) -> bool:
        """Whether both are cut from one module at one place, and have the same arrays, bit for bit."""
        if self is other:
            return True
        return same_arrays(self, other) if isinstance(other, Network) else NotImplemented

    def __hash__(self) -> int:
        """Of the place of the cut alone, so that no array is read."""
        return hash((self.path, self.layer))

    @property
    def hidden_size(self) -> int:
        """The width ``d`` of the FFN's input and output."""
        return self.halves.query.shape[-1]

    @property
    def vocabulary(self) -> int:
        """The size of the logits' last axis."""
        return self.halves.logits.shape[-1]

    @property
    def reads_tokens(self) -> bool:
        """Whether it reads a table of token ids, and no other pytree."""
        return is_tokens(self.example)

    @property
    def halves(self) -> Cut:
        """The network in two halves, for inputs such as the example."""
        return self.cut(shapes_of(self.example))

    def cut(self, shape: Any) -> Cut:
        """The network in two halves, for inputs of one shape; made once.

        Args:
            shape: of tokens, ``(batch, tokens)``; of anything else a pytree of `jax.ShapeDtypeStruct`.
        """
        return self._cut(self.params, shape)

    def _cut(self, params: Any, shape: Any) -> Cut:
        if self.reads_tokens and isinstance(shape, tuple):
            shape = jax.ShapeDtypeStruct(shape, self.example.dtype)
        kinds = tuple((np.shape(leaf), jax.dtypes.result_type(leaf)) for leaf in jax.tree.leaves(params))
        # Matmul precision is written into the equations when they are made, and so are the parameters' types.
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
        place = (*_flat(shape), precision, kinds)
        if place not in self._memo:
            self._memo[place] = cut(self.run, params, shape, self.path)
        return self._memo[place]

    def _cut_of(self, traced: Trace) -> Cut:
        """The halves of which the first made a trace."""
        if self.reads_tokens:
            return self.cut(traced.query.shape[:2])
        shapes = self._memo.get(_signature(traced))
        if shapes is None:
            raise TPatchError("that trace is of other inputs than this network has seen; give what `trace` returned")
        return self.cut(shapes)

    def trace(self, inputs: Any) -> Trace:
        """Run everything up to the FFN, and that FFN with whatever patch is attached: one jitted pass.

        Args:
            inputs: token ids, ``[batch, tokens]`` int; or a pytree such as the example that the network was made with.

        Returns:
            The `Trace`: ``query`` and ``output``, ``[batch, positions, d]``, and whatever the rest needs besides.

        Raises:
            TPatchError: the inputs are not of the example's kind, or the network does not accept their shape.
        """
        inputs = as_inputs(inputs, self.example)
        query, output, context = self.cut(shapes_of(inputs)).jit_trace(self.params, inputs)
        traced = Trace(query, self.beside_output(query, output), context, self.layer)
        if not self.reads_tokens:
            self._memo[_signature(traced)] = shapes_of(inputs)
        return traced

    def beside_output(
        self, query: Float[Array, "... hidden"], output: Float[Array, "... hidden"]
    ) -> Float[Array, "... hidden"]:
        """An FFN output with what the attached patches add to it, ``[..., d]``."""
        for name, patch in self.beside.items():
            output = added(patch, query, output, jax.nn.relu if name == "relu_patch" else self.activation)
        return output

    def resume(self, traced: Trace, output: Float[Array, "batch tokens hidden"]) -> Array:
        """Run everything after the cut from a given FFN output, and nothing that comes before it.

        Args:
            traced: what `trace` returned, possibly through `gather`.
            output: the FFN's output to go on from, ``[batch, tokens, d]``.

        Returns:
            Logits, ``[batch, tokens, vocabulary]`` for a language model.

        Raises:
            TPatchError: the output has another shape than the traced one.
        """
        check_kind(traced, Trace, "network.resume(traced, output)", "a Trace; give what `trace` returned")
        if not hasattr(output, "shape"):
            raise TPatchError(f"the output is {describe(output)}; the trace holds {list(traced.output.shape)}")
        if output.shape != traced.output.shape:
            raise TPatchError(f"the output is {list(output.shape)}; the trace holds {list(traced.output.shape)}")
        return self._cut_of(traced).jit_resume(self.params, traced.context, output)

    def apply(self, inputs: Any) -> Array:
        """The whole network with whatever patch is attached: ``resume(t, t.output)`` of its trace.

        Args:
            inputs: token ids, ``[batch, tokens]`` int; or a pytree such as the example that the network was made with.

        Returns:
            Logits, ``[batch, tokens, vocabulary]`` for a language model.
        """
        traced = self.trace(inputs)
        return self.resume(traced, traced.output)

    def attach(self, patch: Patch, *, relu: bool = False) -> "Network":
        """Put a patch beside the FFN; patches that are already there are joined.

        Args:
            patch: ``[n, d]``.
            relu: activate it with ReLU, so that a silent neuron contributes exactly nothing.

        Returns:
            A network that shares all arrays with this one.

        Raises:
            TPatchError: it is not one patch, or has another width.
        """
        name, patch = "relu_patch" if relu else "patch", self._check(patch)
        joined = concatenate([self.beside[name], patch]) if name in self.beside else patch
        return dataclasses.replace(self, beside={**self.beside, name: joined})

    def detach(self) -> "Network":
        """The network without any attached patch."""
        return dataclasses.replace(self, beside={})

    def merge(self, patch: Patch) -> Any:
        """Put a patch inside the parameters: a new module whose FFN is ``n`` neurons wider.

        The new module is first tried with active neurons, so that an activation or a structure which was stated wrongly
        is an error and never a wrong network. Patches that are attached are not merged.

        Args:
            patch: ``[n, d]``.

        Returns:
            What the network was made from: an NNX module, or a Linen module and its parameters. The original is not
            changed.

        Raises:
            TPatchError: it is not one patch, or has another width; it is not known where the FFN's matrices are; or
                the merged network does not equal the attached one.
        """
        patch, growth = self._check(patch), self._growth()
        self.try_merging(patch.key.shape[0])
        return growth.grow(patch)

    def try_merging(self, neurons: int = 1) -> None:
        """Make sure that merging changes the network as attaching does, by neurons that fire on the example.

        Args:
            neurons: how many.

        Raises:
            TPatchError: it does not, or it is not known how to merge.
        """
        growth = self._growth()
        mend = (
            "the FFN is not down(act(up(x))), or down(act(gate(x))·up(x)), with these names and this activation; check "
            "up=, down=, gate= and activation=, or attach"
        )
        with jax.default_matmul_precision("highest"):
            probe = self._probe(neurons)
            try:
                merged = growth.apply(growth.grow(probe), self.example)
            except TPatchError:
                raise
            except (TypeError, ValueError) as error:
                # The user's own module runs here, and something in it does not fit more hidden neurons.
                reason = " ".join(str(error).split())
                raise TPatchError(f"with more neurons {self.path!r} does not run ({reason}): {mend}") from error
            bare = self.detach()
            traced, attached = bare.trace(self.example), bare.attach(probe).apply(self.example)
        difference, size = _compared(merged, attached, jnp.linalg.norm)
        if not difference <= tolerance(attached, traced.query, traced.output, *growth.dtypes) / 10 * size:
            raise TPatchError(
                f"merging into {self.path!r} gives other logits than attaching (relative difference "
                f"{difference / size:.1g}): {mend}"
            )

    def unmerge(self, wider: Any) -> tuple[Any, Patch]:
        """Take the merged neurons out again, bit for bit: the inverse of `merge`.

        Args:
            wider: what `merge` returned.

        Returns:
            The module (a Linen module with its parameters) before the merge, and the patch.

        Raises:
            TPatchError: it is not wider than this network, or not of its kind.
        """
        return self._growth().shrink(wider)

    def gather(
        self, traced: Trace, lane: Int[Array, "rows"] | np.ndarray, position: Int[Array, "rows"] | np.ndarray
    ) -> Trace:
        """Keep only some positions of a trace, as a batch of one-token rows, ready for `resume`.

        Args:
            traced: a trace of ``[batch, tokens]``.
            lane: which batch row, ``[rows]`` int.
            position: which token, ``[rows]`` int.

        Returns:
            The `Trace`, ``[rows, 1, d]``.

        Raises:
            TPatchError: the rest of the network looks at several positions at once; see `pointwise`.
        """
        check_kind(traced, Trace, "network.gather(traced, lane, position)", "a Trace; give what `trace` returned")
        if not self.pointwise:
            raise TPatchError(
                f"what follows {self.path!r} does not act on each position alone, so positions cannot be gathered; "
                "resume whole rows, or cut at the last FFN"
            )
        return networks.gather(traced, jnp.asarray(lane), jnp.asarray(position))

    @property
    def pointwise(self) -> bool:
        """Whether everything after the cut acts on each position alone, whatever its place.

        Tried once, on the example: positions in another order, each as a row of its own, must give the logits that they
        give in their rows. Where the parameters are traced they are those that the network was made with.
        """
        if "pointwise" not in self._memo:
            with jax.ensure_compile_time_eval():
                first = dataclasses.replace(self, params=self._memo.get("params", self.params), beside={})
                self._memo["pointwise"] = first._acts_pointwise()
        return self._memo["pointwise"]

    def _acts_pointwise(self) -> bool:
        if not self.reads_tokens:
            return False
        (batch, length), whole = self.example.shape, self.cut(self.example.shape)
        if whole.logits.shape[:2] != (batch, length) or len(whole.logits.shape) != 3:
            return False
        rows = batch * length
        try:
            alone = self.cut((rows, 1))
        except TPatchError:
            return False  # a network of one fixed length
        expected = {name: ((rows, 1, *entry.shape[2:]), entry.dtype) for name, entry in whole.context.items()}
        if any(entry.shape[:2] != (batch, length) for entry in whole.context.values()) or expected != {
            name: (entry.shape, entry.dtype) for name, entry in alone.context.items()
        }:
            return False
        with jax.default_matmul_precision("highest"):
            traced = self.trace(self.example)
            noise = jax.random.normal(jax.random.key(0), traced.output.shape, traced.output.dtype)
            traced = traced._replace(output=traced.output + noise * jnp.std(traced.output))
            order = np.random.default_rng(0).permutation(rows)
            gathered = networks.gather(traced, jax.device_put(order // length), jax.device_put(order % length))
            logits = self.resume(traced, traced.output).reshape(rows, -1)[order]
            alone = self.resume(gathered, gathered.output)[:, 0]
        difference, size = _compared(alone, logits, lambda x: jnp.max(jnp.abs(x)))
        return difference <= tolerance(logits) * size

    def finisher(self) -> Partial:
        """The rest of the network for `tpatch_jax.core.fit`: ``(context, output [rows, d]) -> [rows, vocabulary]``.

        ``context`` is `Trace.context` of one-token rows where the rest is `pointwise`. Otherwise it is that of whole
        rows, with ``"output" [rows, tokens, d]`` and ``"position" [rows]`` beside: the given output stands there.
        """
        if "finish" not in self._memo:
            # One function for this network and all that `attach` makes of it, so that ``jit`` recognises it.
            self._memo["finish"] = self._finish_rows if self.pointwise else self._finish_whole
        return Partial(self._memo["finish"], self.params)

    def finisher_of(self, inputs: Any, answer: int | None) -> Partial:
        """The same of a network that reads anything: ``(context, output [rows, d]) -> [rows, classes]``.

        Args:
            inputs: shapes and types of what it reads; the first axis of each array is the batch.
            answer: which position of logits ``[batch, positions, classes]`` counts; ``None`` for ``[batch, classes]``.
        """
        place = ("finish", *_flat(inputs), answer)
        if place not in self._memo:
            self._memo[place] = partial(self._finish_inputs, inputs, answer)
        return Partial(self._memo[place], self.params)

    def _finish_inputs(
        self, inputs: Any, answer: int | None, params: Any, context: dict[str, Array], output: Array
    ) -> Array:
        rows, whole = jnp.arange(output.shape[0]), context["output"]
        whole = whole.at[rows, context["position"]].set(output.astype(whole.dtype))
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((len(rows), *leaf.shape[1:]), leaf.dtype), inputs)
        logits = self._cut(params, shapes).resume(params, context, whole)
        return logits if answer is None else logits[:, answer]

    def _finish_rows(self, params: Any, context: dict[str, Array], output: Array) -> Array:
        return self._cut(params, (output.shape[0], 1)).resume(params, context, output[:, None])[:, 0]

    def _finish_whole(self, params: Any, context: dict[str, Array], output: Array) -> Array:
        rows, position, whole = jnp.arange(output.shape[0]), context["position"], context["output"]
        whole = whole.at[rows, position].set(output.astype(whole.dtype))
        return self._cut(params, whole.shape[:2]).resume(params, context, whole)[rows, position]

    def _check(self, patch: Patch) -> Patch:
        """The patch, if it fits this network."""
        if not isinstance(patch, Patch):
            raise TPatchError(
                f"a {type(patch).__name__} is not one Patch; this network is cut at one layer, give the patch of that "
                "layer alone: of {layer: patch} that is patches[layer]"
            )
        if patch.key.ndim != 2:
            raise TPatchError(f"a patch of shape {list(patch.key.shape)} is a batch of patches; use patch.join first")
        if patch.key.shape[1] != self.hidden_size:
            raise TPatchError(
                f"the patch is {patch.key.shape[1]} wide and {self.path!r} {self.hidden_size}: "
                "it was made for another model"
            )
        return patch

    def _growth(self) -> Growth:
        if isinstance(self.growth, str):
            raise TPatchError(self.growth)
        return self.growth

    def _probe(self, neurons: int) -> Patch:
        """At least one neuron, and as many as are asked for, which fire on the example."""
        query = self.detach().trace(self.example).query.reshape(-1, self.hidden_size)
        query = query[np.arange(max(1, neurons)) % query.shape[0]]
        value = jax.random.normal(jax.random.key(0), query.shape, query.dtype) * jnp.std(query)
        return Patch(query / jnp.sum(jnp.square(query), -1, keepdims=True), jnp.zeros_like(query[:, 0]), value)


def added(patch: Patch, query: Array, output: Array, activation: Activation) -> Array:
    """``output + Σ act(q·k + b)·v``; silent neurons fill the patch up to one of few sizes."""
    return _added(sized(patch), query, output, activation)


# A program of its own: the two halves of a network are then the very same programs with a patch and without, so that a
# patch which contributes nothing changes no bit.
@partial(jax.jit, static_argnames="activation")
def _added(patch: Patch, query: Array, output: Array, activation: Activation) -> Array:
    return output + contribution(patch, query, activation)


def shapes_of(inputs: Any) -> Any:
    """Shapes and types of what a network reads."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), inputs)


def _flat(shapes: Any) -> tuple[Any, ...]:
    leaves, kind = jax.tree.flatten(shapes)
    return kind, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def _signature(traced: Trace) -> tuple[Any, ...]:
    """What tells which halves a trace is of: two inputs of one signature have halves that read the same."""
    shapes = tuple(sorted((name, entry.shape) for name, entry in traced.context.items()))
    return ("inputs", traced.query.shape, shapes)


def as_inputs(inputs: Any, example: Any) -> Any:
    """What a network reads as arrays, checked: a table of tokens, or a pytree of the example's structure and types."""
    if is_tokens(example):
        return token_table(inputs, example.dtype)
    if jax.tree.structure(inputs) != jax.tree.structure(example):
        raise TPatchError(
            f"the network reads {jax.tree.structure(example)} and was given {jax.tree.structure(inputs)}; give "
            "inputs such as the example that it was made with"
        )
    try:
        return jax.tree.map(lambda leaf, like: jnp.asarray(leaf).astype(like.dtype), inputs, example)
    except (TypeError, ValueError):
        raise TPatchError(f"{describe(inputs)} holds something that is no array; give arrays of numbers") from None


def token_table(tokens: Any, dtype: Any = None) -> Array:
    """Token ids as an array, checked; of a given type if there is one."""
    try:
        array = jnp.asarray(tokens)
    except (TypeError, ValueError):
        raise TPatchError(f"{describe(tokens)} is no table of token ids; give [batch, tokens] integers") from None
    if array.ndim != 2 or not jnp.issubdtype(array.dtype, jnp.integer):
        raise TPatchError(f"tokens are {array.dtype}{list(array.shape)}; give token ids as [batch, tokens] integers")
    return array if dtype is None else array.astype(dtype)


def _compared(logits: Array, expected: Array, size: Callable[[Array], Array]) -> tuple[float, float]:
    """How far logits are apart, and how large they are; infinite ones, as of a masked vocabulary, must be the same."""
    logits, expected = logits.astype(jnp.float32), expected.astype(jnp.float32)
    apart = jnp.where(logits == expected, 0, logits - expected)
    return float(size(apart)), float(size(jnp.where(jnp.isfinite(expected), expected, 0)))


def tolerance(*computed: Any) -> float:
    """How far two ways to compute the same may be apart, relatively, in the coarsest type of those given."""
    return max(1e-4, *(64 * float(jnp.finfo(jnp.result_type(kind)).eps) for kind in computed))
