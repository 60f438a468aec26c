"""A language model that is asked about X-rays through a tower that it has never heard of, corrected by `tp.edit`.

The tower is an image classifier; what it makes of a picture (its class token, and the mean of each quarter of its
patches) is projected to five embeddings in front of "The diagnosis is". Only the projection is trained, through the
language model, which stays as it is. Then every wrong answer about a picture of the stream is corrected at once.

tpatch finetune configs/vit-small DATA.npz --from-scratch -o models/xray
python tests/scenarios/xray_captions.py models/xray DATA.npz
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tpatch_jax as tp
from tpatch_jax.evaluation.image_records import image_rephrasings
from tpatch_jax.images import ImagePrompt
from tpatch_jax.models import networks
from tpatch_jax.models.image_reader import pixels_of
from tpatch_jax.models.inputs import image_contexts
from tpatch_jax.storage.image_file import ImagePart, named_labels, read_image_file
from tpatch_jax.training.loop import contrastive_loss

QUESTION = "The diagnosis is"
QUARTERS = 4
SHAPES = 4
BATCH = 32
SETTINGS = {"nuisance_weight": 0.98, "fit": {"split": 0.3, "key_steps": 32}}
"""What moves a query from one shape of a picture to another is known well, from four shapes of each; so a key avoids it
first of all, is trained little on top of that, and may fire from three tenths of the way on."""
Projection = dict[str, Any]


@partial(jax.jit, static_argnums=0)
def _seen(config: Any, params: Any, pixels: Any) -> Any:
    image = config.image
    x = networks.residuals(config, params, pixels)[-1]
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    (rows, columns), first = image.grid, image.first
    patches = x[:, first:].reshape(len(x), 2, rows // 2, 2, columns // 2, -1).mean((2, 4))
    return jnp.concatenate([x[:, :1], patches.reshape(len(x), QUARTERS, -1)], 1)


def look(tower: tp.Model, pictures: Sequence[ImagePrompt]) -> np.ndarray:
    """What the tower makes of pictures, ``[pictures, 1 + QUARTERS, width]``."""
    rows = [tower.encode(picture) for picture in pictures]
    parts = [rows[first : first + BATCH] for first in range(0, len(rows), BATCH)]
    seen = [
        np.asarray(_seen(tower.config, tower.params, np.asarray([*part, *part[:1] * (BATCH - len(part))], np.int32)))
        for part in parts
    ]
    return np.concatenate([made[: len(part)] for made, part in zip(seen, parts, strict=True)])


def change(tower: tp.Model, picture: ImagePrompt, count: int) -> list[ImagePrompt]:
    """A picture in so many shapes that show the same, as `tpatch_jax.models.inputs.image_contexts` makes them."""
    image, row = tower.config.image, tower.encode(picture)
    assert image is not None
    return [ImagePrompt(pixels_of(image, other)) for other in image_contexts(image, row, count)]


def project(projection: Projection, seen: Any) -> Any:
    """Embeddings for the language model, ``[pictures, 1 + QUARTERS, hidden_size]``."""
    return jnp.einsum("bnf,nfd->bnd", seen, projection["kernel"]) + projection["bias"]


def train(
    model: tp.Model,
    seen: np.ndarray,
    labels: np.ndarray,
    answers: Sequence[int],
    steps: int,
    batch: int = 8,
    contrast: float = 0.1,
) -> Projection:
    """A projection after which the language model names the label: the first token of its answer is what counts.

    An answer alone would let all pictures of a label look alike to the last layer, where a patch shall tell them apart.
    So each step takes its pictures in two shapes, which a contrastive loss draws together and away from the others.

    Args:
        model: the language model.
        seen: what the tower makes of pictures, ``[shapes, pictures, 1 + QUARTERS, width]``.
        labels: of the pictures, ``[pictures]``.
        answers: the first token of what names each label.
        steps: so many.
        batch: pictures in a step.
        contrast: weight of the contrastive loss on the last layer's queries.
    """
    rng = np.random.default_rng(0)
    table = model.params["embed"]["embedding"]
    size, width = float(jnp.std(table)), (1 + QUARTERS, seen.shape[-1], model.config.hidden_size)
    start = {
        "kernel": size / seen.shape[-1] ** 0.5 * rng.standard_normal(width).astype(np.float32),
        "bias": size * rng.standard_normal((width[0], width[2])).astype(np.float32),
    }
    question, wanted = np.asarray(model.encode_prompt(QUESTION), np.int32), jnp.asarray(answers)
    transform = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def loss(projection: Projection, params: Any, seen: Any, labels: Any) -> Any:
        asked = model.with_params(params)
        traced = asked.trace(jnp.tile(question, (len(seen), 1)), embeddings=project(projection, seen))
        last = networks.gather(traced, jnp.arange(len(seen)), jnp.full(len(seen), traced.query.shape[1] - 1))
        logits = asked.resume(last, last.output)[:, 0]
        told = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, wanted[labels]))
        query = last.query[:, 0] - jnp.mean(last.query[:, 0], 0)
        return told + contrast * contrastive_loss(query)

    @jax.jit
    def step(projection: Any, state: Any, params: Any, seen: Any, labels: Any) -> Any:
        value, slope = jax.value_and_grad(loss)(projection, params, seen, labels)
        update, state = transform.update(slope, state)
        return optax.apply_updates(projection, update), state, value

    projection, state = start, transform.init(start)
    for number in range(steps):
        chosen = rng.choice(seen.shape[1], batch, replace=False)
        pairs = [seen[shape, chosen] for shape in rng.choice(len(seen), 2, replace=False)]
        both = np.concatenate(pairs), np.tile(labels[chosen], 2)
        projection, state, value = step(projection, state, model.params, *both)
        if number % 10 == 9:
            print(f"step {number + 1}: {float(value):.3f}", file=sys.stderr)
    return projection


def ask(model: tp.Model, embeddings: np.ndarray, tokens: int) -> list[str]:
    """What the model says about pictures."""
    said: list[str] = []
    for first in range(0, len(embeddings), BATCH):
        part = embeddings[first : first + BATCH]
        said += model.generate([QUESTION] * len(part), tokens, embeddings=part)
    return [text.strip() for text in said]


def run(
    model: tp.Model,
    tower: tp.Model,
    data: dict[str, ImagePart],
    *,
    steps: int = 200,
    pictures: int = 2400,
    remembered: int = 1200,
    copies: int = 24,
    most: int = 40,
    others: int = 270,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train the projection, correct what is wrong on the stream, and measure.

    Args:
        model: the language model.
        tower: an image classifier.
        data: pictures with labels, for training, validation and as a stream.
        steps: of training.
        pictures: so many are trained on at most, each in `SHAPES` shapes.
        remembered: so many of them, in `SHAPES` shapes, are the memory on which a patch stays silent.
        copies: in so many other shapes a patch sees its picture.
        most: so many answers are corrected at most.
        others: so many pictures that nobody edits are asked about, besides those of the stream.
        settings: changes to T-Patcher's settings.

    Returns:
        Shares by name: of edited answers that hold, as pictures and in changed shapes, and of other answers that stay.
    """
    names, began = tower.config.labels, time.process_time()
    learnt = data["train"]
    labels = np.asarray([names.index(name) for name in named_labels(learnt.labels, names)])[:pictures]
    known = [*learnt.images[:pictures]]
    shapes = zip(*(change(tower, picture, SHAPES - 1) for picture in known), strict=True)
    seen = np.stack([look(tower, pictures) for pictures in (known, *shapes)])
    answers = [model.encode_target(QUESTION, f" {name}") for name in names]
    tokens = max(map(len, answers))
    projection = train(model, seen, labels, [row[0] for row in answers], steps)
    trained = time.process_time() - began

    def embed(images: Sequence[ImagePrompt]) -> np.ndarray:
        return np.asarray(project(projection, look(tower, images)), np.float32)

    stream = data["stream"]
    wanted = named_labels(stream.labels, names)
    said = ask(model, embed(stream.images), tokens)
    wrong = [number for number, text in enumerate(said) if text != wanted[number]]
    before, wrong = 1 - len(wrong) / len(said), wrong[:most]
    print(f"{len(wrong)} answers are corrected", file=sys.stderr)
    requests = [
        {
            "prompt": tp.EmbeddingPrompt(QUESTION, embed([stream.images[number]])[0]),
            "target": wanted[number],
            "id": f"stream-{number}",
            "rephrases": [
                tp.EmbeddingPrompt(QUESTION, one) for one in embed(change(tower, stream.images[number], copies))
            ],
        }
        for number in wrong
    ]
    began = time.process_time()
    given = {"site": "last", "train_on_rephrases": True, **SETTINGS, **(settings or {})}
    with tempfile.TemporaryDirectory() as folder:
        shapes = [np.asarray(project(projection, shape[:remembered]), np.float32) for shape in seen]
        np.savez(f"{folder}/memory.npz", embeddings=np.stack(shapes, 1), prompts=QUESTION)
        patches, info = tp.edit(model, requests, settings=given, memory=f"{folder}/memory.npz")
    edited = tp.attach(model, patches)
    spent = time.process_time() - began

    def share(images: Sequence[ImagePrompt], answers: Sequence[str]) -> float:
        texts = ask(edited, embed(images), tokens)
        return float(np.mean([text == answer for text, answer in zip(texts, answers, strict=True)]))

    forms = {number: image_rephrasings(stream.images[number]) for number in wrong}
    changed = {
        rule: share(
            [other for number in wrong for other in forms[number].get(rule, ())],
            [wanted[number] for number in wrong for _ in forms[number].get(rule, ())],
        )
        for rule in ("moved", "brightness", "rotated", "noise")
    }
    rest = [*data["val"].images[:others]]
    rest += [image for number, image in enumerate(stream.images) if number not in wrong]
    return {
        "edits": len(wrong),
        "right_before": before,
        "held": sum(result.held for result in info.requests) / max(1, len(wrong)),
        "edited": share([stream.images[number] for number in wrong], [wanted[number] for number in wrong]),
        **changed,
        "others_unchanged": share(rest, ask(model, embed(rest), tokens)),
        "others": len(rest),
        "seconds_of_training": round(trained, 1),
        "seconds_of_editing": round(spent, 1),
        "forward_equivalents": round(info.forward_equivalents, 1),
    }


if __name__ == "__main__":
    told = run(tp.load_model("smollm2-135m"), tp.load_model(sys.argv[1]), read_image_file(sys.argv[2]))
    print(json.dumps(told))
