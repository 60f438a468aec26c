"""Image classifiers: pictures as prompts, as training data and as a stream; what of a picture makes a neuron fire."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative
from tiny_families import tiny_model, tiny_pictures, tiny_settings, write_pictures

import tpatch_jax as tp
from tpatch_jax.bank.patches import read_patches, saved_requests
from tpatch_jax.cli import main as cli
from tpatch_jax.editors.tpatcher.settings import PRESETS
from tpatch_jax.errors import TPatchError
from tpatch_jax.evaluation.image_firing import image_firing
from tpatch_jax.evaluation.image_records import RULES, image_rephrasings, read_image_records
from tpatch_jax.images import ImagePrompt, as_image, change_image, read_image
from tpatch_jax.models.image_reader import pixels_of
from tpatch_jax.models.inputs import image_contexts, read_inputs
from tpatch_jax.models.model import Model
from tpatch_jax.requests import parse_request
from tpatch_jax.storage.image_file import named_labels, read_image_file
from tpatch_jax.storage.settings import change

Image = pytest.importorskip("PIL.Image", reason="pictures are read with Pillow: the 'images' extra")
pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths")

PROMOTION = "standard"  # optax takes steps
QUICK = change(
    PRESETS["default"], {"input_contexts": 3, "attempts": 2, "input_key_steps": 8, "value_steps": 8, "lanes": 2}
)
GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
LABELS = ("no", "yes", "maybe")


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("vit")


@pytest.fixture(scope="module")
def memory(model, tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("memory") / "pictures.npz", model)


@pytest.fixture
def png(tmp_path) -> Path:
    Image.fromarray(GREY).save(tmp_path / "chest.png")
    return tmp_path / "chest.png"


def other_label(model: Model, image: Any) -> str:
    (said,) = model.classify([image])
    return next(label for label in model.config.labels if label != said)


# --- images as prompts ---


def test_an_image_is_known_by_its_pixels_alone(png):
    array, read = as_image(GREY), read_image(png)
    assert array == read == as_image(GREY[..., None]) == as_image(GREY.tolist()) == as_image(Image.open(png))
    assert array != as_image(GREY + 1)
    # Grey and coloured pictures are told apart, and so are those of other shapes with the same bytes.
    assert len({array, as_image(np.repeat(GREY[..., None], 3, -1)), as_image(GREY.reshape(4, 16))}) == 3
    assert (array.source, read.source) == ("", str(png))
    assert array.strip() is array
    for other in (copy.copy(read), copy.deepcopy(read), pickle.loads(pickle.dumps(read))):
        assert (other, other.source) == (read, str(png))
        np.testing.assert_array_equal(other.pixels, GREY)
    # Files keep the name, never the picture.
    assert json.loads(json.dumps({"prompt": read})) == {"prompt": str(read)}


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("nowhere.png", "nowhere.png does not exist"),
        (".", "is no file"),
        (None, "is nothing, which is no image"),
        (3, "is a int, which is no image"),
        ([[1, 2], [3]], "which is no image"),
        ({"a": 1}, "which is no image"),
        (np.zeros((8, 8, 4), np.uint8), r"\[8, 8, 4\]: a picture has two axes, and a third of 1 or 3 channels"),
        (np.zeros((3, 8, 8), np.uint8), "a third of 1 or 3 channels"),
        (np.zeros(8, np.uint8), "a picture has two axes"),
        (np.zeros((0, 8), np.uint8), "holds no pixel"),
        (np.zeros((8, 8)), "float64.*whole numbers from 0 to 255: of shares of one give"),
        (np.zeros((8, 8), bool), "whole numbers from 0 to 255"),
        (np.full((8, 8), 256), "pixels from 256 to 256; scale them"),
        (np.full((8, 8), -1), "pixels from -1 to -1; scale them"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(TPatchError, match=message):
        as_image(image)


@pytest.mark.parametrize("content", [b"", b"no picture", "cut"])
def test_a_broken_picture_is_refused(png, tmp_path, content):
    broken = tmp_path / "broken.png"
    broken.write_bytes(png.read_bytes()[:-40] if content == "cut" else content)
    with pytest.raises(TPatchError, match=r"broken\.png is no picture that can be read \(.*get it again"):
        read_image(broken)


def test_pictures_of_other_kinds_are_read_as_they_look(tmp_path):
    red = np.zeros((4, 6, 3), np.uint8)
    red[:, :3, 0] = 200
    for mode, shape in (("RGBA", (4, 6, 3)), ("P", (4, 6, 3)), ("LA", (4, 6)), ("1", (4, 6))):
        Image.fromarray(red).convert(mode).save(tmp_path / "any.png")
        assert read_image(tmp_path / "any.png").pixels.shape == shape, mode
    turned = Image.fromarray(red)
    turned.getexif()[0x0112] = 6  # a camera held upright
    turned.save(tmp_path / "turned.jpg", exif=turned.getexif())
    assert read_image(tmp_path / "turned.jpg").pixels.shape == (6, 4, 3)
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(TPatchError, match="more than 8 bits a pixel"):
        read_image(tmp_path / "deep.png")


def test_changes_move_turn_and_brighten():
    np.testing.assert_array_equal(change_image(GREY), GREY)
    np.testing.assert_array_equal(change_image(GREY, down=2)[2:], GREY[:-2])
    np.testing.assert_array_equal(change_image(GREY, right=-1)[:, :-1], GREY[:, 1:])
    np.testing.assert_array_equal(change_image(GREY, degrees=90), np.rot90(GREY))
    np.testing.assert_array_equal(change_image(GREY, brightness=2.0), np.minimum(2 * GREY.astype(int), 255))
    coloured = np.stack([GREY, GREY.T, GREY], -1)
    np.testing.assert_array_equal(change_image(coloured, degrees=-90), np.rot90(coloured, -1))


def test_rephrasings_and_contexts_are_drawn_from_the_picture(model):
    image = ImagePrompt(tiny_pictures(model, 1)[0])
    made = image_rephrasings(image)
    assert list(made) == list(RULES)
    assert made == image_rephrasings(ImagePrompt(image.pixels))
    # A black picture is as dark as before, wherever it is moved.
    assert list(image_rephrasings(ImagePrompt(np.zeros((8, 8), np.uint8)))) == ["noise"]
    row = model.encode_prompt(image)
    contexts = image_contexts(model.config.image, row, 4)
    assert contexts[:2] == image_contexts(model.config.image, row, 2)
    assert len({tuple(context) for context in [row, *contexts]}) == 5
    assert all(context[64:] == row[64:] for context in contexts)
    # What measures was not seen.
    seen = {
        ImagePrompt(pixels_of(model.config.image, context)) for context in image_contexts(model.config.image, row, 20)
    }
    assert not seen & {other for others in made.values() for other in others}


# --- requests ---


def test_requests_hold_images(png, tmp_path):
    record = {"image": "chest.png", "target": "yes", "id": "a", "rephrases": [GREY], "locality": [(GREY.T).tolist()]}
    request = parse_request(record, "line 1", tmp_path)
    assert request.prompt == as_image(GREY)
    assert request.rephrases == (as_image(GREY),)
    assert request.locality == (as_image(GREY.T),)
    lines = tmp_path / "requests.jsonl"
    lines.write_text(json.dumps({"image": "chest.png", "target": "yes", "locality": ["chest.png"]}), "utf-8")
    (read,) = tp.read_requests(lines)
    assert read.prompt.source == str(png)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": GREY}, "line 1: no 'target'"),
        ({"image": GREY, "target": "yes", "prompt": "a"}, "'image' stands beside 'prompt', which belongs to texts"),
        ({"image": GREY, "target": "yes", "subject": "a"}, "'image' stands beside 'subject'"),
        ({"image": GREY, "target": "yes", "rephrases": "a.png"}, "'rephrases' must be a list of images"),
        (
            {"image": GREY, "target": "yes", "locality": [GREY, "a.png"]},
            "line 1: image 1 of 'locality': a.png does not",
        ),
        ({"image": "a.png", "target": "yes"}, "line 1: 'image': a.png does not exist"),
        ({"image": GREY, "target": "yes", "keep": [GREY]}, "'keep' holds"),
        ({"imgae": GREY, "target": "yes"}, "unknown key 'imgae'"),
    ],
)
def test_bad_requests_name_what_is_wrong(record, message):
    with pytest.raises(TPatchError, match=message):
        parse_request(record, "line 1")


# --- what the network reads ---


def test_channels_and_sizes_must_fit(model):
    coloured = np.stack([GREY, GREY, GREY], -1)
    # What is grey in three channels says the same in one, and the other way round.
    assert model.encode_prompt(as_image(coloured)) == model.encode_prompt(as_image(GREY))
    deit = tiny_model("deit")
    wide = np.arange(96, dtype=np.uint8).reshape(8, 12)
    assert deit.encode_prompt(as_image(wide)) == deit.encode_prompt(as_image(np.stack([wide] * 3, -1)))
    coloured[0, 0, 0] = 9
    with pytest.raises(TPatchError, match="is coloured and the model reads grey pictures of one channel; convert it"):
        model.classify([coloured])
    with pytest.raises(TPatchError, match="is 7 by 9 pixels, the model reads 8 by 8, and its preproc"):
        model.classify([np.zeros((7, 9), np.uint8)])
    with pytest.raises(TPatchError, match="'the cat': the model reads images; give the picture"):
        model.encode_prompt("the cat")
    with pytest.raises(TPatchError, match="only the name of that image is kept, not the picture"):
        model.encode_prompt(str(as_image(GREY)))
    with pytest.raises(TPatchError, match="is an image, and 'tiny' reads texts"):
        tiny_model("bert").encode_prompt(as_image(GREY))
    with pytest.raises(
        TPatchError, match=r"the images are float32 \[1, 3, 8, 8\]; give pixel_values \[batch, 1, 8, 8\]"
    ):
        model.apply(jnp.zeros((1, 3, 8, 8)))
    with pytest.raises(TPatchError, match=r"or pixels \[batch, 64\] of whole numbers"):
        model.apply(jnp.zeros((1, 60), jnp.int32))


TOLD = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 8, "width": 12},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.4],
}


@pytest.mark.parametrize(
    "changes",
    [{}, {"do_center_crop": True, "size": {"height": 12, "width": 16}, "crop_size": [8, 12]}, {"do_normalize": False}],
)
def test_a_checkpoint_preprocesses_as_its_file_says(changes, tmp_path):
    """Beside the library's own image processor, pictures of any size, kept through writing and exporting."""
    from transformers import ViTImageProcessorPil

    if "crop_size" in changes:
        changes = {**changes, "crop_size": {"height": 8, "width": 12}}
    told = {**TOLD, **changes}
    tp.save_model(tiny_model("deit", preprocessor_config=told), tmp_path / "one")
    model = tp.load_model(tmp_path / "one")
    assert json.loads((tmp_path / "one" / "preprocessor_config.json").read_text("utf-8")).items() >= told.items()
    assert "preprocessor_config" not in json.loads((tmp_path / "one" / "config.json").read_text("utf-8"))
    pictures = [np.random.default_rng(n).integers(0, 256, (9 + n, 20 - n, 3), np.uint8) for n in range(2)]
    processor = ViTImageProcessorPil(**told)
    values = processor(images=pictures, return_tensors="np", input_data_format="channels_last")["pixel_values"]
    rows = [model.encode_prompt(as_image(picture))[:-1] for picture in pictures]
    wanted = model.apply(jnp.asarray(values, jnp.float32))
    assert relative(model.apply(jnp.asarray(rows, jnp.int32)), wanted) < 1e-5
    tp.export_model(model, tmp_path / "two")
    assert tp.load_model(tmp_path / "two").encode_prompt(as_image(pictures[0]))[:-1] == rows[0]


def test_the_mean_of_all_positions_is_edited_too(memory):
    pooled = tiny_model("vit", classifier_pooling="mean")
    picture = tiny_pictures(pooled, 1)[0]
    hidden = pooled.trace(jnp.asarray([pooled.encode_prompt(as_image(picture))[:-1]], jnp.int32))
    assert hidden.query.shape == (1, 5, 16)
    wanted = other_label(pooled, picture)
    patches, info = tp.edit(pooled, [{"image": picture, "target": wanted}], settings=QUICK, memory=memory, cache=False)
    assert [(one.held, one.reason) for one in info.requests] == [(True, "")]
    assert tp.merge(pooled, patches).classify([picture]) == [wanted]
    with pytest.raises(TPatchError, match="reads the mean of all tokens, and a stock vit reads the first"):
        tp.export_model(pooled, "nowhere")


# --- editing ---


def test_a_bad_request_fails_alone(model, memory):
    good, lacking, wide = tiny_pictures(model, 2)[0], tiny_pictures(model, 2)[1], np.zeros((9, 9), np.uint8)
    requests: list[Any] = [
        {"image": good, "target": other_label(model, good)},
        {"image": lacking, "target": "perhaps"},
        {"image": wide, "target": "yes"},
    ]
    patches, info = tp.edit(model, requests, settings=QUICK, memory=memory, cache=False)
    assert [one.held for one in info.requests] == [True, False, False]
    assert "no label 'perhaps'; it has no, yes, maybe" in info.requests[1].reason
    assert "is 9 by 9 pixels" in info.requests[2].reason
    assert tp.attach(model, patches).classify([good]) == [requests[0]["target"]]


def test_a_bank_keeps_edits_of_pictures_and_no_picture(model, memory, tmp_path):
    bank, pictures = tmp_path / "bank", tiny_pictures(model, 2, seed=3)
    # No part of any picture, as bytes or as numbers of four bytes, those of the memory among them.
    shown = [picture.reshape(-1) for picture in (*pictures, *tiny_pictures(model, 40, 1))]
    hidden = [part for picture in shown for part in (picture[:8].tobytes(), picture[:8].astype(np.int32).tobytes())]
    quick = {"input_contexts": 3, "attempts": 2, "input_key_steps": 8, "value_steps": 8, "lanes": 2}
    tp.create_bank(bank, model, memory=memory, settings=quick)
    first, second = ({"image": one, "target": other_label(model, one), "id": f"p{n}"} for n, one in enumerate(pictures))
    assert tp.add_edits(bank, model, [first]).added == ("p0",)
    # Another process knows the names of earlier pictures alone, and goes on beside them.
    info = tp.add_edits(bank, model, [second])
    assert (info.added, info.broken) == (("p1",), ())
    assert tp.add_edits(bank, model, [{**first, "id": "again"}]).already == ("p0",)
    corrected = tp.bank_model(bank, model)
    assert corrected.classify([*pictures]) == [first["target"], second["target"]]
    assert tp.verify_bank(bank, model)[:2] == ((), 2)
    files = [path for path in bank.rglob("*") if path.is_file()]
    assert not [path for path in files if any(part in path.read_bytes() for part in hidden)]
    assert (bank / "memory.safetensors").is_file()
    assert not (bank / "memory.txt").exists()
    assert json.loads((bank / "journal.jsonl").read_text("utf-8").splitlines()[0])["edits"][0]["prompt"] == as_image(
        pictures[0]
    )
    # The same picture with another label takes its place, and gives it back.
    third = next(label for label in LABELS if label not in (first["target"], *model.classify([pictures[0]])))
    assert tp.add_edits(bank, model, [{**first, "target": third, "id": "p2"}]).superseded == (("p0", "p2"),)
    assert tp.bank_model(bank, model).classify([*pictures]) == [third, second["target"]]
    tp.remove_edits(bank, ["p2"], model)
    assert tp.bank_model(bank, model).classify([*pictures]) == [first["target"], second["target"]]


def test_what_a_bank_of_pictures_cannot_do(model, memory, tmp_path):
    with pytest.raises(TPatchError, match=r"an \.npz of pictures"):
        tp.create_bank(tmp_path / "bank", model)
    with pytest.raises(TPatchError, match="edits of T-Patcher"):
        tp.create_bank(tmp_path / "bank", model, method="grace", memory=memory)
    tp.create_bank(tmp_path / "bank", model, memory=memory)
    with pytest.raises(TPatchError, match="'keep' of the requests"):
        tp.guard_bank(tmp_path / "bank", model, [as_image(GREY)])
    info = tp.add_edits(tmp_path / "bank", model, [tp.EditRequest(str(as_image(GREY)) + "", "yes")])
    assert "only the name of that image" in info.failed[0][3]
    (tmp_path / "bank" / "memory.safetensors").write_bytes(b"no")
    with pytest.raises(TPatchError, match="repair"):
        tp.add_edits(tmp_path / "bank", model, [{"image": GREY, "target": "yes"}])


def test_a_picture_contradicts_itself_under_another_name(model, memory, png):
    requests = [{"image": str(png), "target": label} for label in ("no", "yes")]
    _, info = tp.edit(
        model, [*requests, {"image": GREY.T, "target": "maybe"}], settings=QUICK, memory=memory, cache=False
    )
    assert "contradicts 'edit-0'" in info.requests[1].reason


def test_a_memory_of_pictures_is_asked_for(model, tmp_path):
    with pytest.raises(TPatchError, match=r"reads images, of which patches need some .*an \.npz with train_images"):
        tp.edit(model, [{"image": GREY, "target": "yes"}], cache=False)
    (tmp_path / "texts.txt").write_text("one\ntwo", "utf-8")
    with pytest.raises(TPatchError, match="'one': the model reads images"):
        tp.edit(model, [{"image": GREY, "target": "yes"}], memory=tmp_path / "texts.txt", cache=False)


def test_the_patches_that_make_a_neuron_fire(model, memory):
    """Neurons are silent on a covered picture as far as they are said to be, and what is shown says so."""
    picture = ImagePrompt(tiny_pictures(model, 1)[0])
    request = {"image": picture, "target": other_label(model, picture)}
    patches, info = tp.edit(model, [request], settings=QUICK, memory=memory, cache=False)
    firing = image_firing(model, patches, picture)
    count = len(firing.activation)
    assert firing.effect.shape == (count, 2, 2)
    assert (firing.activation > 0).all()
    covered = picture.pixels.copy()
    covered[:4, 4:] = np.rint(covered.mean())
    alone = image_firing(model, patches, ImagePrompt(covered))
    assert firing.activation[0] - alone.activation[0] == pytest.approx(firing.effect[0, 0, 1], rel=1e-3)
    shown = tp.show(patches, model=model, image=picture, info=info, requests=[request])
    assert f"{model.classify([picture])[0]} before, {request['target']} with the patch" in shown.text
    assert f"{count} of {count} neurons fire" in shown.text
    assert shown.html.count("data:image/png;base64,") == count
    assert shown.html.count("<i ") == 4 * count
    assert tp.show(patches, model=model, text=picture).text.split("\n")[0] == shown.text.split("\n")[0]
    assert "target" in tp.show(info, requests=[request], model=model, patch=patches).text
    with pytest.raises(TPatchError, match="reads no images"):
        image_firing(tiny_model("bert"), patches, picture)
    with pytest.raises(TPatchError, match="give `model=` too"):
        tp.show(patches, image=picture)


# --- files of pictures ---


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": GREY}, "none of the arrays train_images, val_images, stream_images; it has pictures"),
        ({"train_images": GREY}, r"train_images is \[8, 8\]; give pictures"),
        ({"train_images": np.zeros((0, 8, 8), np.uint8)}, r"train_images is \[0, 8, 8\]"),
        ({"train_images": np.zeros((2, 8, 8))}, "train_images 0 is an array of float64"),
        ({"train_images": np.zeros((2, 8, 8, 4), np.uint8)}, "a third of 1 or 3 channels"),
        ({"train_images": GREY[None], "train_labels": np.zeros(2, int)}, "has 1 pictures and train_labels is"),
        ({"train_images": GREY[None], "train_labels": np.zeros(1)}, "train_labels is float64; give numbers"),
        ({"train_images": GREY[None], "train_labels": np.full(1, -1)}, "train_labels has -1; labels are counted"),
        ({"train_images": GREY[None], "train_labels": np.array([None])}, r"is no \.npz that can be read"),
    ],
)
def test_bad_files_of_pictures(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(TPatchError, match=message):
        read_image_file(tmp_path / "bad.npz")


def test_files_that_are_none(tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 cut short")
    for name, message in (
        ("bad.npz", r"is no \.npz that can be read"),
        ("none.npz", "does not exist"),
        (".", "is no file"),
    ):
        with pytest.raises(TPatchError, match=message):
            read_image_file(tmp_path / name)
    np.savez(tmp_path / "unlabelled.npz", stream_images=GREY[None])
    with pytest.raises(TPatchError, match="has stream_images and no stream_labels"):
        read_image_records(tmp_path / "unlabelled.npz", LABELS)
    np.savez(tmp_path / "lacking.npz", stream_images=GREY[None], stream_labels=[7])
    with pytest.raises(TPatchError, match="stream_labels 0: the classifier has no label '7'; it has no, yes, maybe"):
        read_image_records(tmp_path / "lacking.npz", LABELS)


def test_labels_are_numbers_or_names(tmp_path):
    assert named_labels(("0", "2"), LABELS) == ("no", "maybe")
    assert named_labels(("0", "3"), LABELS) == ("0", "3")
    assert named_labels(("yes",), LABELS) == ("yes",)
    np.savez(tmp_path / "column.npz", val_images=np.stack([GREY, GREY.T]), val_labels=np.array([[1], [0]], np.uint8))
    records = read_image_records(tmp_path / "column.npz", LABELS)
    assert [(record.id, record.request.target) for record in records] == [("val-0", "yes"), ("val-1", "no")]
    assert set(records[0].probes) == {"reliability", *(f"rephrasing_{rule}" for rule in RULES)}
    assert read_inputs(tmp_path / "column.npz") == [as_image(GREY), as_image(GREY.T)]


# --- from a config to a report, by commands ---


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Bright pictures and dark ones, and a stream in which two are labelled otherwise."""
    rng = np.random.default_rng(0)
    parts = {}
    for part, count in (("train", 64), ("val", 16), ("stream", 8)):
        labels = np.arange(count) % 2
        images = rng.integers(0, 100, (count, 8, 8)) + 150 * labels[:, None, None]
        labels = np.where(np.arange(count) < 2, 1 - labels, labels) if part == "stream" else labels
        parts |= {f"{part}_images": images.astype(np.uint8), f"{part}_labels": labels.astype(np.uint8)}
    path = tmp_path_factory.mktemp("data") / "pictures.npz"
    np.savez(path, **parts)
    return path


def test_the_commands_from_a_config_to_a_report(data, tmp_path, capsys, restored, monkeypatch):
    monkeypatch.setenv("TPATCH_CACHE", str(tmp_path / "cache"))

    def run(*arguments: str | Path) -> dict[str, Any]:
        assert cli.main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    (tmp_path / "small").mkdir()
    labels = {"id2label": {"0": "dark", "1": "bright"}, "label2id": {"dark": 0, "bright": 1}}
    settings = {**tiny_settings("vit"), **labels, "num_hidden_layers": 2, "initializer_range": 0.2}
    (tmp_path / "small" / "config.json").write_text(json.dumps(settings), "utf-8")
    made = tmp_path / "made"
    common = ("--from-scratch", "--epochs", "4", "--image-copies", "1")
    trained = run("finetune", tmp_path / "small", data, *common, "-o", made)
    assert trained["labels"] == ["dark", "bright"]
    assert (trained["examples"], trained["train_accuracy"], trained["validation_accuracy"]) == (64, 1.0, 1.0)
    assert json.loads((made / "config.json").read_text("utf-8"))["architectures"] == ["ViTForImageClassification"]
    stock = tp.load_model(made)
    answers = run("classify", made, "--file", data)
    assert answers["accuracy"] == 0.75
    assert answers["answers"][0] == {"input": "stream-0", "label": "dark", "true": "bright"}

    picture = tmp_path / "picture.png"
    Image.fromarray(read_image_file(data)["stream"].images[0].pixels).save(picture)
    requests = tmp_path / "requests.jsonl"
    requests.write_text(json.dumps({"image": "picture.png", "target": "bright", "id": "first"}), "utf-8")
    quick = ("--set", "input_key_steps=8", "--set", "input_contexts=3", "--memory", data)
    edited = run("edit", made, requests, *quick, "-o", tmp_path / "patches")
    assert (edited["exact"], edited["failed"]) == (1.0, [])
    assert edited["records"][0]["after"] == "bright"
    assert run("classify", made, picture, "--patches", tmp_path / "patches")["answers"][0]["label"] == "bright"
    assert run("classify", made, picture)["answers"][0]["label"] == "dark"
    saved = read_patches(tmp_path / "patches")
    assert saved.edits[0]["prompt"] == str(read_image(picture))
    with pytest.raises(TPatchError, match="only the name of that image is kept"):
        stock.encode_prompt(saved_requests(saved)[0].prompt)

    report = tmp_path / "report"
    options = ("--data", "images", "--file", data, "--train-set", data, "--protocol", "sequential", *quick)
    result = run("eval", made, *options, "-o", report)["results"][1]
    figures = result["metrics"]
    assert result["edits"] == 2
    assert (figures["SR"], figures["ER"]) == (1.0, 1.0)
    assert {"GR", "TrainR", "TestR", "other_images_changed", *(f"GR_{rule}" for rule in RULES)} <= set(figures)
    lines = [json.loads(line) for line in (report / "records-tpatcher.jsonl").read_text("utf-8").splitlines()]
    assert [line["wrong"] for line in lines] == [True, True, *[False] * 6]
    assert lines[0]["image"]["picture"].startswith("data:image/png;base64,")
    assert np.shape(lines[0]["image"]["effect"]) == (2, 2)
    assert "image" not in lines[2]
    assert cli.main(["report", str(report), "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "picture, and what makes the neuron fire" in page
    assert page.count('alt="the picture"') == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("classify", "MODEL"), "there is nothing to classify"),
        (("classify", "MODEL", "nowhere.png"), "input 0: nowhere.png does not exist"),
        (("classify", "MODEL", "--file", "DATA", "--part", "test"), "there is no part 'test'; choose from train"),
        (("eval", "MODEL", "--data", "images", "-o", "OUT"), "--file is missing"),
        (
            ("eval", "MODEL", "--data", "images", "--file", "DATA", "--train-set", "DATA", "-o", "OUT"),
            "use --protocol seq",
        ),
        (("eval", "MODEL", "--data", "images", "--file", "DATA", "-n", "9", "-o", "OUT"), "holds 8 pictures, but 9"),
        (("eval", "MODEL", "--data", "images", "--file", "none.npz", "-o", "OUT"), "none.npz does not exist"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, model, data, tmp_path, capsys, restored):
    tp.save_model(model, tmp_path / "model")
    names = {"MODEL": tmp_path / "model", "DATA": data, "OUT": tmp_path / "out"}
    assert cli.main([str(names.get(one, one)) for one in arguments]) == 1
    assert message in capsys.readouterr().err
