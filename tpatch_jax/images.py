"""Images as prompts: what a request to an image classifier holds where another holds a text."""

import base64
import hashlib
import io
import warnings
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from tpatch_jax.errors import TPatchError

__all__ = ["IMAGE", "ImagePrompt", "as_image", "change_image", "find_file", "picture_source", "read_image"]

IMAGE = "image sha256 "
"""With this the names of images begin, which stand for them in files and reports."""

_MEND = "give the path of a picture, or an array [height, width] or [height, width, 3] of whole numbers from 0 to 255"


class ImagePrompt(str):
    """An image where a prompt stands. As a text it is its name, made of the digest of its pixels.

    So an image is told from others, kept in files and shown like any prompt, and only what reads prompts asks for its
    pixels. Files keep the name alone, never the picture.

    Attributes:
        pixels: ``[height, width]`` of a grey picture or ``[height, width, channels]``.
        source: the file that it was read from, if any.

    Example:
        >>> one, same = ImagePrompt(np.zeros((2, 2), np.uint8)), ImagePrompt(np.zeros((2, 2, 1), np.uint8))
        >>> one == same, str(one)
        (True, 'image sha256 660c5b93b24f779f')
    """

    pixels: UInt8[np.ndarray, "height width *channels"]
    source: str

    def __new__(cls, pixels: UInt8[np.ndarray, "height width *channels"], source: str = "") -> "ImagePrompt":
        """Name an image; its pixels are copied."""
        pixels = np.array(pixels, np.uint8, order="C")
        pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
        digest = hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:16]
        made = super().__new__(cls, f"{IMAGE}{digest}")
        pixels.setflags(write=False)
        made.pixels, made.source = pixels, source
        return made

    def strip(self, chars: str | None = None, /) -> "ImagePrompt":
        """The image itself: there is no white space around it."""
        return self

    def __deepcopy__(self, memo: Any) -> "ImagePrompt":
        """The image itself, which never changes."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """How it is copied and sent to other processes."""
        return ImagePrompt, (np.asarray(self.pixels), self.source)


def find_file(path: str | PathLike[str], folder: Path | None) -> Path:
    """Where a file is that a request names: relative names begin in the request's folder, if it is there.

    Args:
        path: its name.
        folder: the request's; without it, or where there is no such file, names begin in the working directory.
    """
    path = Path(path)
    there = path if folder is None or path.is_absolute() else folder / path
    return there if there.exists() else path


def as_image(image: Any, where: str = "the image", folder: Path | None = None) -> ImagePrompt:
    """An image as a prompt.

    Args:
        image: the path of a picture; an array ``[height, width]`` or ``[height, width, channels]`` of whole numbers
            from 0 to 255, or nested lists of them; a picture of Pillow's; or an image prompt, which stays as it is.
        where: what is read, as a message begins.
        folder: where relative paths begin; without it, or where there is no such file, in the working directory.

    Raises:
        TPatchError: it is none of these, the file is missing or holds no picture, or the array is of another kind.

    Example:
        >>> as_image([[0, 255], [255, 0]]).pixels.shape
        (2, 2)
    """
    if isinstance(image, ImagePrompt):
        return image
    if isinstance(image, str | PathLike):
        return read_image(find_file(image, folder), where)
    if callable(getattr(image, "getbands", None)):
        return ImagePrompt(_plain(image, where))
    try:
        array = np.asarray(image)
    except ValueError:
        array = np.zeros(0, object)
    kind = "an array of " + ("objects" if array.dtype == object else f"{array.dtype} {list(array.shape)}")
    if array.dtype == object or (array.ndim == 0 and not hasattr(image, "shape")):
        raise TPatchError(f"{where} is {_named(image)}, which is no image; {_MEND}")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3)):
        raise TPatchError(f"{where} is {kind}: a picture has two axes, and a third of 1 or 3 channels; {_MEND}")
    if not array.size:
        raise TPatchError(f"{where} is {kind}, which holds no pixel; {_MEND}")
    if not np.issubdtype(array.dtype, np.integer):
        raise TPatchError(
            f"{where} is {kind}; pixels are whole numbers from 0 to 255: of shares of one give "
            "(255 * image).round().astype('uint8')"
        )
    if array.min() < 0 or array.max() > 255:
        raise TPatchError(f"{where} has pixels from {array.min()} to {array.max()}; scale them to 0 to 255")
    return ImagePrompt(array.astype(np.uint8))


def _named(image: Any) -> str:
    return "nothing" if image is None else f"a {type(image).__name__}"


def read_image(path: str | PathLike[str], where: str = "the image") -> ImagePrompt:
    """Read a picture: anything that Pillow reads, turned as its EXIF data say; of several frames the first.

    Args:
        path: the file.
        where: what is read, as a message begins.

    Returns:
        The image, grey or of three colours; transparency is left out.

    Raises:
        TPatchError: there is no such file, it holds no whole picture, has more than 8 bits a channel, or Pillow is
            missing.

    Example:
        >>> read_image("chest.png").pixels.shape  # doctest: +SKIP
        (28, 28)
    """
    path = Path(path)
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise TPatchError(f"{where}: {path} {what}; give the path of a picture")
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise TPatchError(
            f"{where}: reading {path} needs Pillow; install it: pip install 'tpatch-jax[images]', or give an array"
        ) from None
    try:
        with warnings.catch_warnings(), Image.open(path) as picture:
            # Pillow warns of what it reads all the same.
            warnings.simplefilter("ignore")
            turned = ImageOps.exif_transpose(picture)
            turned.load()
    # Pillow has errors of many kinds for a file that is damaged or cut short.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TPatchError(f"{where}: {path} is no picture that can be read ({reason}); get it again") from None
    return ImagePrompt(_plain(turned, f"{where}: {path}"), str(path))


def _plain(picture: Any, where: str) -> np.ndarray:
    """A picture of Pillow's as grey or coloured bytes."""
    if picture.mode.startswith(("I", "F")):
        raise TPatchError(
            f"{where} has more than 8 bits a pixel (mode {picture.mode}); scale it to 0 to 255 and write it with 8"
        )
    grey = picture.mode in ("1", "L", "LA", "La")
    return np.asarray(picture.convert("L" if grey else "RGB"))


def change_image(
    pixels: UInt8[np.ndarray, "height width *channels"],
    *,
    down: float = 0.0,
    right: float = 0.0,
    degrees: float = 0.0,
    brightness: float = 1.0,
    noise: Float[np.ndarray, "height width *channels"] | None = None,
) -> UInt8[np.ndarray, "height width *channels"]:
    """A picture moved, turned about its middle, brightened and with noise added; its edges are drawn out.

    Args:
        pixels: the picture.
        down: by so many pixels.
        right: by so many pixels.
        degrees: counterclockwise.
        brightness: factor on all pixels.
        noise: added to the pixels.

    Example:
        >>> change_image(np.array([[1, 2], [3, 4]], np.uint8), right=1, brightness=2.0)
        array([[2, 2],
               [6, 6]], dtype=uint8)
    """
    changed = pixels.astype(np.float64)
    if down or right or degrees:
        height, width = pixels.shape[:2]
        y, x = np.mgrid[:height, :width].astype(np.float64)
        middle_y, middle_x, turn = (height - 1) / 2, (width - 1) / 2, np.deg2rad(degrees)
        y, x = y - down - middle_y, x - right - middle_x
        from_y = np.clip(np.cos(turn) * y + np.sin(turn) * x + middle_y, 0, height - 1)
        from_x = np.clip(np.cos(turn) * x - np.sin(turn) * y + middle_x, 0, width - 1)
        changed = _between(changed, from_y, from_x)
    changed = changed * brightness + (0 if noise is None else noise)
    return np.clip(np.rint(changed), 0, 255).astype(np.uint8)


def _between(pixels: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Pixels at places between them, bilinear."""
    above, left = np.floor(y).astype(int), np.floor(x).astype(int)
    below, beside = np.minimum(above + 1, pixels.shape[0] - 1), np.minimum(left + 1, pixels.shape[1] - 1)
    down, right = (share.reshape(*share.shape, *[1] * (pixels.ndim - 2)) for share in (y - above, x - left))
    upper = pixels[above, left] * (1 - right) + pixels[above, beside] * right
    lower = pixels[below, left] * (1 - right) + pixels[below, beside] * right
    return upper * (1 - down) + lower * down


def picture_source(prompt: ImagePrompt) -> str:
    """A picture as the source of an HTML image, a PNG in the page itself; empty without Pillow.

    Args:
        prompt: the picture.
    """
    try:
        from PIL import Image
    except ImportError:
        return ""
    file = io.BytesIO()
    Image.fromarray(np.asarray(prompt.pixels)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
