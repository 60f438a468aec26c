"""Options of fine-tuning as an editor, and the named sets of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tpatch_jax.core.checks import check_range
from tpatch_jax.errors import TPatchError

__all__ = ["FINE_TUNING_PRESETS", "FineTuningSettings"]


@dataclass(frozen=True)
class FineTuningSettings:
    """Options of fine-tuning.

    No name means something else in another method, so that each can be given alone on the command line.

    Attributes:
        scope: what is trained: ``"last"``, the last feed-forward network; ``"all"``, all layers, those of an encoder as
            well, without embeddings, final norm and head; or a number, that layer's feed-forward network.
        adam_rate: Adam's learning rate.
        passes: at most so often each request of a step is trained on.
        loss_enough: training ends where all requests hold and the loss of each, in nats a token, is below this; 0 is
            as soon as they hold. Huang et al. stop there; Meng et al. go on to 0.01.
        batch_size: at most so many requests share one update.
        kl: the weight of ``KL(before || now)`` on texts of the memory; 0 leaves it out.
        kl_tokens: about so many tokens of the memory are read at each update.
        max_change: how far a parameter may go from its unedited value; 0 is any way.
        keep_failed: keep the change if a request does not hold in the end, as the papers do. Otherwise all of the
            step's change is taken back, for one change serves all of its requests.

    Raises:
        TPatchError: a value makes no sense.
    """

    scope: str = "last"
    adam_rate: float = 5e-4
    passes: int = 25
    loss_enough: float = 0.0
    batch_size: int = 32
    kl: float = 0.0
    kl_tokens: int = 256
    max_change: float = 0.0
    keep_failed: bool = True

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.scope not in ("last", "all") and not self.scope.isdigit():
            raise TPatchError(f"scope {self.scope!r} does not exist; use scope=last, scope=all or a layer's number")
        check_range(self, ("passes", "batch_size", "kl_tokens"), 1)
        if not 0 < self.adam_rate < math.inf:
            raise TPatchError(f"adam_rate is {self.adam_rate}; give a positive number, such as 5e-4")
        for name in ("kl", "max_change", "loss_enough"):
            if not 0 <= getattr(self, name) < math.inf:
                raise TPatchError(f"{name} is {getattr(self, name)}; give 0, which leaves it out, or a positive number")


_LAST = FineTuningSettings()
_ALL = FineTuningSettings(scope="all", adam_rate=3e-5)

FINE_TUNING_PRESETS: Mapping[str, FineTuningSettings] = {
    "default": _LAST,
    "kl": replace(_LAST, kl=10.0),
    "all": _ALL,
    "all-kl": replace(_ALL, kl=1.0),
    "limit": replace(_LAST, max_change=2e-3),
}
"""Named settings: the last feed-forward network or all layers, with and without KL, and with a bound on each parameter.

Rates, bound and the weight of KL were chosen on a few CounterFact records with SmolLM2-135M; none came out in its last
feed-forward network with a bound of 2e-4 or 5e-4, which published settings have.

Source: Huang et al. 2023 (last or all layers, with and without KL); Meng et al. 2022 (one layer, the bound).
"""
