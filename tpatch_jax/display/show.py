"""`show`: something to look at, whatever it is given."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax import Array

from tpatch_jax.bank.patches import SavedPatches
from tpatch_jax.bank.state import Bank
from tpatch_jax.core.arguments import check_kind
from tpatch_jax.core.devices import automatically
from tpatch_jax.core.layers import LayerPatches
from tpatch_jax.core.patch import Patch
from tpatch_jax.display.bank import bank_summary, bank_title, bank_view
from tpatch_jax.display.edit import show_edit
from tpatch_jax.display.image import show_image
from tpatch_jax.display.markup import element, fragment
from tpatch_jax.display.patch import owners_of, show_patch
from tpatch_jax.display.tokens import show_tokens
from tpatch_jax.display.trace import show_trace
from tpatch_jax.display.view import Shown
from tpatch_jax.editors.base import EditInfo
from tpatch_jax.errors import TPatchError
from tpatch_jax.images import ImagePrompt, as_image
from tpatch_jax.models.chat import conversation
from tpatch_jax.models.model import Model, check_loaded
from tpatch_jax.models.networks import Trace
from tpatch_jax.models.patching import check_patches
from tpatch_jax.requests import EditRequest, as_requests

__all__ = ["show"]


@automatically
def show(
    thing: Patch | LayerPatches | SavedPatches | EditInfo | Trace | Bank,
    *,
    model: Model | None = None,
    text: str | Sequence[Mapping[str, str]] | None = None,
    patch: Patch | LayerPatches | None = None,
    requests: Sequence[EditRequest] = (),
    info: EditInfo | None = None,
    tokens: Array | Sequence[Sequence[int]] | None = None,
    image: Any = None,
) -> Shown:
    """Something to look at: compact HTML in a notebook, plain text elsewhere.

    ====================================  =====================================================================
    ``show(patch)``                       each neuron: layer, norms of key and value, bias
    ``show(patch, info=…, requests=…)``   … and the request that it belongs to
    ``show(patch, model=…, text=…)``      what fires where: ``max(0, q·k + b)``, token by token
    ``show(patch, model=…, image=…)``     the picture, its label before and after, and which of its patches make which
                                          neuron fire
    ``show(info, requests=…)``            each request: held, margin, site, neurons, steps, losses
    ``show(info, requests=…, model=…,     … and what the model says before and after: to each prompt, its
    patch=…)``                            rephrasings, and its locality prompts
    ``show(trace)``                       norms of query, FFN output and residual stream at each token
    ``show(trace, patch=…, tokens=…,      … and the strongest activation there, with the tokens' texts
    model=…)``
    ``show(bank)``                        its edits, guards, journal and pictures
    ====================================  =====================================================================

    Args:
        thing: a `Patch` ``[n, d]`` (or a batch of them), a dict from layers to patches, what
            `read_patches` returns, an `EditInfo`, a `Trace` or a `Bank`.
        model: the model without the patch.
        text: what it reads; a conversation, messages ``{"role", "content"}``, is put into the model's chat template.
        patch: with an `EditInfo`, what the same edit returned; with a `Trace`, neurons ``[n, d]``.
        requests: what was asked for, in the order of ``info``.
        info: with a `Patch`, what the same edit returned.
        tokens: with a `Trace`, the batch that was traced, ``[batch, tokens]`` int.
        image: what an image classifier reads: the path of a picture, an array, or what `tpatch_jax.read_image` returns.

    Returns:
        A `Shown`, which a notebook displays and ``print`` prints.

    Raises:
        TPatchError: there is nothing to show of such a thing, what belongs together is given in part, or the text is
            empty or too long.

    Example:
        >>> from tpatch_jax.core.patch import Patch
        >>> print(show(Patch(jnp.ones((1, 4)), jnp.zeros(1), jnp.ones((1, 4)))))
        Patch: 1 neuron of width 4, 9 parameters
        1 in the last layer
        neuron   layer   ‖key‖   bias   ‖value‖
        ...
             0   last        2      0         2
    """
    call = "show(thing, model=…, text=…, patch=…, requests=…, info=…, tokens=…, image=…)"
    requests = as_requests(requests)
    for value, kinds, mend in (
        (info, EditInfo | None, "an EditInfo; give the second of what `edit` returned"),
        (text, str | list | tuple | None, "a text, or a list of messages"),
    ):
        check_kind(value, kinds, call, mend)
    if model is not None:
        check_loaded(model, call)
    for neurons in (thing, patch):
        if isinstance(neurons, Patch | Mapping) or neurons is patch is not None:
            check_patches({-1: neurons} if isinstance(neurons, Patch) else neurons, alike=False)
    given: dict[str, Any] = {"model": model, "text": text, "patch": patch, "info": info, "tokens": tokens}
    given["requests"] = requests or None
    image = text if isinstance(text, ImagePrompt) and image is None else image
    given["image"] = image
    if isinstance(thing, Patch | SavedPatches | Mapping):
        _only(given, "a patch", ("model", "text", "info", "requests", "image"))
        neurons, edits = (thing.patches, thing.edits) if isinstance(thing, SavedPatches) else (thing, ())
        if requests and info is None:
            raise TPatchError("which neuron belongs to which request stands in `info`, which `tp.edit` returned too")
        owners = owners_of(_layers(neurons, info), info, requests, edits)
        if image is not None:
            if model is None:
                raise TPatchError("what fires on a picture is shown for a model; give `model=` too")
            return show_image(model, neurons, as_image(image), owners)
        if (model is None) != (text is None):
            raise TPatchError("what fires where is shown for a model and a text; give both `model=` and `text=`")
        if model is None or text is None:
            return show_patch(neurons, owners)
        return show_tokens(model, neurons, text if isinstance(text, str) else conversation(model, text), owners)
    if isinstance(thing, EditInfo):
        _only(given, "an edit", ("model", "patch", "requests"))
        if (model is None) != (patch is None) or (model is not None and not requests):
            raise TPatchError("answers before and after need all of `model=`, `patch=` and `requests=`")
        return show_edit(thing, requests, model, patch)
    if isinstance(thing, Trace):
        _only(given, "a trace", ("model", "patch", "tokens", "info", "requests"))
        owners = owners_of(_layers(patch, info), info, requests)
        return show_trace(thing, patch=patch, model=model, tokens=tokens, owners=owners)
    if isinstance(thing, Bank):
        _only(given, "a bank", ())
        title, about = bank_title(thing), ", ".join(f"{value} {name}" for name, value in bank_summary(thing).items())
        return Shown(fragment(element("h3", title), *bank_view(thing)), f"{title}\n{about}")
    raise TPatchError(
        f"{type(thing).__name__} cannot be shown; give a patch, the info of an edit, a trace, or a bank that "
        "`tp.open_bank` read"
    )


def _layers(patches: Patch | LayerPatches | None, info: EditInfo | None) -> LayerPatches:
    """The neurons by layer; those of one patch are where ``info`` says."""
    if not isinstance(patches, Patch):
        return patches or {}
    named = {layer for result in info.requests for layer in result.neurons} if info is not None else set()
    return {named.pop() if len(named) == 1 else -1: patches}


def _only(given: dict[str, Any], what: str, names: Sequence[str]) -> None:
    for name, value in given.items():
        if value is not None and name not in names:
            raise TPatchError(f"{name}= says nothing about {what}; leave it out")
