"""ROME, R-ROME and MEMIT beside a plain loop in torch, written from the papers: a tiny random GPT-2, float32.

torch is an extra (``pip install -e ".[parity]"``); where it is absent these tests are skipped.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import END, relative, tiny_tokenizer

torch = pytest.importorskip("torch", reason="torch is only needed to compare with it: the 'parity' extra")

import transformers  # noqa: E402

from tpatch_jax import EditRequest  # noqa: E402
from tpatch_jax.editors.reading import read_item  # noqa: E402
from tpatch_jax.editors.rome.hidden_moment import hidden_moment  # noqa: E402
from tpatch_jax.editors.rome.memit import MemitSettings, memit  # noqa: E402
from tpatch_jax.editors.rome.rank_one import damped, rank_one  # noqa: E402
from tpatch_jax.editors.rome.rome import find_update  # noqa: E402
from tpatch_jax.editors.rome.state import RomeState, edited  # noqa: E402
from tpatch_jax.editors.rome.subject_value import ValueSettings  # noqa: E402
from tpatch_jax.models.model import Model, load_model  # noqa: E402

PROMOTION = "standard"  # optax takes steps
pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]

CONTEXTS = ("so it is.", "in the end.")
REQUESTS = (EditRequest("He met Eve in", "the", "Eve"), EditRequest("So Bob", "in", "Bob"))
TEXTS = ("the cat sat in the inn and hit the hen", "who said that it is the end of the thing?")
RIDGE, WEIGHT = 1e-3, 20
SETTINGS = ValueSettings(value_steps=12, value_extra_steps=0, clamp=3.0)


class Twins(NamedTuple):
    theirs: Any
    tokenizer: Any
    ours: Model


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=16, n_layer=3, n_head=2, n_inner=32, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    theirs, generator = transformers.GPT2LMHeadModel(config).eval(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            around = 1.0 if "ln_" in name and "weight" in name else 0.0
            parameter.copy_(around + 0.3 * torch.randn(parameter.shape, generator=generator))
            parameter.requires_grad_(False)
    folder, tokenizer = tmp_path_factory.mktemp("gpt2"), tiny_tokenizer()
    theirs.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert tokenizer.bos_token == END
    return Twins(theirs, tokenizer, load_model(Path(folder)))


@contextmanager
def hooked(module: Any, hook: Callable[..., Any], before: bool = False) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def ids_of(twins: Twins, text: str) -> list[int]:
    return twins.tokenizer(text, add_special_tokens=False)["input_ids"]


def subject_place(twins: Twins, text: str, subject: str) -> int:
    return len(ids_of(twins, text[: text.rindex(subject) + len(subject)])) - 1


def inputs_of(twins: Twins, module: Any, ids: list[int]) -> Any:
    """What a module of the network reads, ``[tokens, ...]``."""
    seen = []
    with hooked(module, lambda _, arguments: seen.append(arguments[0][0].clone()), before=True):
        twins.theirs(torch.tensor([ids]))
    return seen[0]


def moment(twins: Twins, layer: int) -> Any:
    down = twins.theirs.transformer.h[layer].mlp.c_proj
    read = torch.cat([inputs_of(twins, down, ids_of(twins, text)) for text in TEXTS])
    found = read.T @ read / len(read)
    return found + RIDGE * found.diagonal().mean() * torch.eye(len(found))


def texts_of(request: EditRequest) -> list[str]:
    return [request.prompt, *(f"{context} {request.prompt}" for context in CONTEXTS)]


def keys_of(twins: Twins, request: EditRequest, layer: int) -> Any:
    """What the down projection reads at the subject in each context, ``[contexts, h]``."""
    down = twins.theirs.transformer.h[layer].mlp.c_proj
    return torch.stack(
        [
            inputs_of(twins, down, ids_of(twins, text))[subject_place(twins, text, request.subject or "")]
            for text in texts_of(request)
        ]
    )


def train(twins: Twins, request: EditRequest, module: Any, settings: ValueSettings) -> tuple[Any, Any, int]:
    """What a module should say at the subject, the same before, and the steps: one text after the other, no padding."""
    target, subject = ids_of(twins, f" {request.target}"), request.subject or ""
    rows = [(ids_of(twins, text), subject_place(twins, text, subject)) for text in texts_of(request)]
    alone = ids_of(twins, f"{subject} is a"), subject_place(twins, f"{subject} is a", subject)
    delta = torch.zeros(16, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=settings.value_rate)
    initial: list[Any] = []

    def logs(ids: list[int], place: int) -> Any:
        def hook(_: Any, arguments: Any, output: Any) -> Any:
            whole = output[0] if isinstance(output, tuple) else output
            if not initial:
                initial.append(whole[0, place].detach().clone())
            mask = torch.zeros(whole.shape[1], 1)
            mask[place] = 1
            changed = whole + mask * delta
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        with hooked(module, hook):
            return torch.log_softmax(twins.theirs(torch.tensor([ids])).logits[0], -1)

    before, steps = None, 0
    for number in range(settings.value_steps):
        optimizer.zero_grad()
        each = []
        for ids, place in rows:
            found = logs(ids + target[:-1], place)
            each.append(-torch.stack([found[len(ids) - 1 + n, token] for n, token in enumerate(target)]).mean())
        now = logs(*alone)[alone[1]]
        before = now.detach() if before is None else before
        divergence = (now.exp() * (now - before)).sum()
        decay = settings.value_decay * delta.norm() / initial[0].norm() ** 2
        loss = torch.stack(each).mean() + settings.value_closeness * divergence + decay
        steps = number
        if loss < settings.value_enough or number == settings.value_steps - 1:
            break
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            most = settings.clamp * initial[0].norm()
            if delta.norm() > most:
                delta *= most / delta.norm()
    return (initial[0] + delta).detach(), initial[0], steps


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("request_", REQUESTS, ids=["middle", "end"])
@pytest.mark.parametrize("layer", [0, 1])
def test_rome_and_r_rome_agree(twins: Twins, request_: EditRequest, layer: int) -> None:
    keys, known = keys_of(twins, request_, layer), moment(twins, layer)
    value, initial, steps = train(twins, request_, twins.theirs.transformer.h[layer].mlp, SETTINGS)
    item = read_item(twins.ours, 0, request_, CONTEXTS, False)
    found = find_update(twins.ours, layer, request_, item, SETTINGS)
    assert relative(found.bare, keys[0]) < 1e-5
    assert relative(found.key, keys.mean(0)) < 1e-5
    assert int(found.info.steps[0]) == steps > 3
    # Twelve steps of Adam, whose first ones go by little more than the gradients' signs.
    assert relative(found.value, value) < 1e-3
    assert relative(value, initial) > 0.1
    rows = [ids_of(twins, text) for text in TEXTS]
    ours = damped(hidden_moment(twins.ours, layer, rows), RIDGE)
    assert relative(ours, known) < 1e-5
    down = twins.theirs.transformer.h[layer].mlp.c_proj
    direction = torch.linalg.solve(known.double(), keys.mean(0).double())
    direction = direction / direction.norm()
    network = twins.ours.params["layers"][layer]["ffn"]
    for at, given in ((keys[0], found.bare), (keys.mean(0), found.key)):
        said = at.double() @ down.weight.double() + down.bias.double()
        expected = torch.outer(direction, (value.double() - said) / (at.double() @ direction))
        after = rank_one(network, found.key, found.value, ours, at=given)
        change = np.asarray(after["down"]["kernel"]) - np.asarray(network["down"]["kernel"])
        assert relative(change, expected) < 5e-3


def test_memit_agrees(twins: Twins) -> None:
    layers = (0, 1)
    settings = MemitSettings("0,1", str(WEIGHT), SETTINGS)
    blocks = twins.theirs.transformer.h
    goals = torch.stack([train(twins, request, blocks[1], SETTINGS)[0] for request in REQUESTS])
    kept = [blocks[layer].mlp.c_proj.weight.clone() for layer in layers]
    moments = [moment(twins, layer) for layer in layers]
    rows = [ids_of(twins, text) for text in TEXTS]
    known = {layer: damped(hidden_moment(twins.ours, layer, rows), RIDGE) for layer in layers}
    try:
        for number, layer in enumerate(layers):
            streams = [
                inputs_of(twins, blocks[2], ids_of(twins, request.prompt))[
                    subject_place(twins, request.prompt, request.subject or "")
                ]
                for request in REQUESTS
            ]
            missing = (goals - torch.stack(streams)).double() / (len(layers) - number)
            contexts = [keys_of(twins, request, layer) for request in REQUESTS]
            keys = torch.stack([(found[0] + found[1:].mean(0)) / 2 for found in contexts]).double()
            solved = torch.linalg.solve(WEIGHT * moments[number].double() + keys.T @ keys, keys.T)
            blocks[layer].mlp.c_proj.weight += (solved @ missing).float()
        changed = [blocks[layer].mlp.c_proj.weight.clone() for layer in layers]
        batch = [ids_of(twins, "He met Eve in the inn")]
        logits = twins.theirs(torch.tensor(batch)).logits.numpy()
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            blocks[layer].mlp.c_proj.weight.copy_(weight)
    editor = memit(settings)
    state, info = editor.step(RomeState(twins.ours, {}, known, CONTEXTS, settings), REQUESTS, jax.random.key(0))
    assert all(request.steps > 3 for request in info.requests)
    for layer, before, after in zip(layers, kept, changed, strict=True):
        assert relative(np.asarray(state.down_projections[layer]) - before.numpy(), after - before) < 5e-3
    np.testing.assert_allclose(editor.apply(state, jnp.asarray(batch)), logits, rtol=0, atol=2e-3)
    assert relative(edited(state).apply(jnp.asarray(batch)), twins.ours.apply(jnp.asarray(batch))) > 1e-3
