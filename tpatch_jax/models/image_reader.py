"""What stands in a tokenizer's place in a model that reads images: from a picture to the pixels that the network sees.

An image's tokens are the bytes of its pixels, row by row, channels innermost, in the network's size. Scaling and
normalising them is a part of the network; see `tpatch_jax.models.config.ImageInput`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from tpatch_jax.errors import TPatchError
from tpatch_jax.images import IMAGE, ImagePrompt
from tpatch_jax.models.config import ImageInput, NetworkConfig
from tpatch_jax.models.families.family import Settings
from tpatch_jax.models.families.vit import preprocessing

__all__ = ["FILE", "ImageReader", "image_reader", "pixels_of"]

FILE = "preprocessor_config.json"
_SHAPING = ("do_resize", "size", "resample", "do_center_crop", "crop_size")
_NAMES = {1: "grey", 3: "coloured"}


class ImageReader:
    """Reads images as a tokenizer reads texts, by a checkpoint's ``preprocessor_config.json``.

    Attributes:
        image: what the network reads.
        settings: of the image processor, none left open.
    """

    bos_token_id: int | None = None
    eos_token_id: int | None = None
    unk_token: str | None = None
    unk_token_id: int | None = None
    eos_token: str | None = None
    chat_template: Any = None
    is_fast: bool = False

    def __init__(self, image: ImageInput, settings: dict[str, Any]):
        self.image: ImageInput = image
        self.settings: dict[str, Any] = settings
        self.special_tokens_map: dict[str, Any] = {}
        self.all_special_tokens: list[str] = []
        self.added_tokens_decoder: dict[int, Any] = {}
        self._processor: Any = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The pixels of an image prompt as bytes.

        Raises:
            TPatchError: it is a text, the name of an image that is not at hand, or an image of another kind or size.
        """
        if not isinstance(text, ImagePrompt):
            what = "the model reads images"
            if text.startswith(IMAGE):
                what = "only the name of that image is kept, not the picture"
            raise TPatchError(f'{text[:40]!r}: {what}; give the picture: {{"image": PATH}} or tp.read_image(PATH)')
        return self.shape(text).reshape(-1).tolist()

    def shape(self, prompt: ImagePrompt) -> UInt8[np.ndarray, "height width channels"]:
        """An image in the network's size and with its channels.

        Raises:
            TPatchError: it has other channels, or another size and the preprocessor does not resize.
        """
        pixels, image, name = prompt.pixels, self.image, prompt.source or str(prompt)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        if pixels.shape[-1] != image.channels:
            grey = pixels.shape[-1] == 1 or not np.ptp(pixels, -1).any()
            if not grey:
                raise TPatchError(
                    f"{name} is {_NAMES[pixels.shape[-1]]} and the model reads {_NAMES[image.channels]} pictures of "
                    "one channel; convert it first (Pillow: picture.convert('L'))"
                )
            # A grey picture says the same in three channels as in one.
            pixels = np.repeat(pixels[..., :1], image.channels, -1)
        if self.settings["do_resize"] or self.settings["do_center_crop"]:
            pixels = self._processed(pixels, name)
        if pixels.shape[:2] != image.size:
            wanted, has = (f"{height} by {width}" for height, width in (image.size, pixels.shape[:2]))
            raise TPatchError(
                f"{name} is {has} pixels, the model reads {wanted}, and its {FILE} does not resize; resize it first, "
                'or set "do_resize": true there'
            )
        return pixels

    def _processed(self, pixels: np.ndarray, name: str) -> np.ndarray:
        """What the library's image processor makes of a picture, as bytes."""
        if self._processor is None:
            self._processor = _library_processor(self.settings)
        # The library reads pictures of three channels alike.
        coloured = np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else pixels
        try:
            made = self._processor(images=coloured, return_tensors="np", input_data_format="channels_last")
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise TPatchError(f"{name} cannot be resized as {FILE} says ({error}); mend that file") from None
        return np.moveaxis(np.asarray(made["pixel_values"][0], np.uint8), 0, -1)[..., : self.image.channels]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Nothing: pixels are no text."""
        return ""

    def convert_ids_to_tokens(self, ids: int) -> str:
        """A pixel's value."""
        return str(ids)

    def get_vocab(self) -> dict[str, int]:
        """The values of a pixel."""
        return {str(value): value for value in range(256)}

    def save_pretrained(self, save_directory: Path) -> object:
        """Write ``preprocessor_config.json``."""
        text = json.dumps(self.settings, indent=2, sort_keys=True) + "\n"
        return (Path(save_directory) / FILE).write_text(text, "utf-8")

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any:
        """There is none."""
        raise TPatchError("a model that reads images holds no chats; leave the chat out")

    def __call__(self, text: str, *, add_special_tokens: bool, return_offsets_mapping: bool) -> dict[str, Any]:
        """An image has no offsets of words."""
        return {"input_ids": self.encode(text), "offset_mapping": []}


def _library_processor(settings: dict[str, Any]) -> Any:
    try:
        from transformers import ViTImageProcessorPil
    except ImportError:
        raise TPatchError(
            "resizing pictures needs Pillow; install it: pip install 'tpatch-jax[images]', or give pictures of the "
            'model\'s size and set "do_resize": false in preprocessor_config.json'
        ) from None
    shaping = {name: settings[name] for name in _SHAPING if settings.get(name) is not None}
    # Scaling and normalising are the network's part, so that what is kept of a picture is bytes.
    return ViTImageProcessorPil(**shaping, do_rescale=False, do_normalize=False)


def image_reader(config: NetworkConfig, settings: Settings) -> ImageReader:
    """The reader of a model's images.

    Args:
        config: the network's description.
        settings: of ``config.json``, with those of ``preprocessor_config.json`` in them.

    Raises:
        TPatchError: the network reads tokens.
    """
    if config.image is None:
        raise TPatchError(f"a {config.family} reads tokens and no images")
    return ImageReader(config.image, preprocessing(settings))


def pixels_of(image: ImageInput, row: Any) -> UInt8[np.ndarray, "height width channels"]:
    """The picture that a row of tokens begins with.

    Args:
        image: what the network reads.
        row: token ids, as `tpatch_jax.models.model.Model.encode_prompt` gives them.
    """
    return np.asarray(row[: image.pixels], np.uint8).reshape(*image.size, image.channels)
