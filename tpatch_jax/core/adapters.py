"""How something that is no neuron joins a feed-forward network: one function of its input and its output.

A codebook that replaces outputs, a side memory, a correction of a quantised network: each is a pytree with
``contribute``, stands beside the network's parameters as ``"adapter"`` (`tpatch_jax.core.ffn.attach_adapter`), and is
part of every compiled pass from then on.
"""

from typing import Protocol, runtime_checkable

from jax import Array
from jaxtyping import Float

__all__ = ["Adapter"]


@runtime_checkable
class Adapter(Protocol):
    """What joins a feed-forward network.

    It is a pytree (a dataclass under `jax.tree_util.register_dataclass`), so that it crosses ``jit``, ``vmap`` and
    ``grad`` with the parameters. Where it has nothing to say it gives the output back as it is, bit for bit: an
    evaluation tells from this where an edit acts, and runs nothing else again.

    Example:
        >>> import jax
        >>> from dataclasses import dataclass
        >>> @jax.tree_util.register_dataclass
        ... @dataclass(frozen=True)
        ... class Shift:
        ...     by: Array
        ...
        ...     def contribute(self, query, output):
        ...         return output + self.by
        >>> isinstance(Shift(jax.numpy.ones(4)), Adapter)
        True
    """

    def contribute(
        self, query: Float[Array, "*batch hidden"], output: Float[Array, "*batch hidden"]
    ) -> Float[Array, "*batch hidden"]:
        """The network's output with what the adapter makes of it, each position on its own.

        Args:
            query: the network's input, ``[..., d]``.
            output: its output, attached patches included, ``[..., d]``.

        Returns:
            The output that goes on, ``[..., d]``, in the given one's type.
        """
        ...
