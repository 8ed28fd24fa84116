"""Convert image files and Pillow images of any mode to 8-bit RGB pixels."""

from __future__ import annotations

import importlib.util
import io
import warnings
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mlssl.data.decoder_messages import decoder_messages
from mlssl.data.paths import IMAGE_EXTENSIONS

ImageArray: TypeAlias = npt.NDArray[np.uint8]

_ORIENTATION = ExifTags.Base.Orientation
_START_OF_JPEG, _END_OF_JPEG = b"\xff\xd8", b"\xff\xd9"
_OF_LIBJPEG = ("Corrupt JPEG data", "Premature end of JPEG", "Invalid JPEG", "Inconsistent progression")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

WHITE = 0xFFFF
"""Default white level of images of more than 8 bits."""

FEW_BITS = 14
"""A 16-bit image that uses at most this many bits keeps a quarter of the 256 grays or fewer, and causes a warning."""

MAX_WARNINGS = 3
"""Warnings per process about images that use few of their bits: usually all images of a set do."""


class BadImageError(ValueError):
    """An image cannot be decoded. A custom reader raises it so that such images can be skipped.

    Args:
        message: Which image, why, and what to do.
    """

    def __init__(self, message: str) -> None:  # a single argument, as pickling in loader workers needs
        super().__init__(message)


class DamagedImageWarning(UserWarning):
    """An image was decoded, but some of its pixels are not the original ones."""


class FewBitsWarning(UserWarning):
    """A 16-bit image uses so few bits that little of it is left at 8 bits."""


def readable_extensions() -> tuple[str, ...]:
    """Image file extensions that can be decoded here: AVIF needs Pillow 11.3, HEIC needs pillow-heif."""
    missing = [] if _reads_avif() else [".avif"]
    missing += [] if _reads_heif() else [".heic", ".heif"]
    return tuple(one for one in IMAGE_EXTENSIONS if one not in missing)


def decode_rgb(path: Path, *, white: float | None = None) -> ImageArray:
    """Read an image file of any Pillow mode, upright; see `rgb_pixels`.

    A `DamagedImageWarning` names a JPEG file with missing pixels.

    Args:
        path: The file.
        white: White level of images of more than 8 bits, see `rgb_pixels`.

    Returns:
        RGB pixels (H, W, 3), 0–255, in a new array.

    Raises:
        FileNotFoundError: The file does not exist.
        BadImageError: The file is not an image, is truncated or broken, has pixels of unknown range, or more pixels
            than ``PIL.Image.MAX_IMAGE_PIXELS`` (89 million by default).
    """
    try:
        content = Path(path).read_bytes()
    except (FileNotFoundError, PermissionError):
        raise
    except (OSError, ValueError) as error:  # a folder, an invalid name, a failing disk
        raise _not_decoded(str(path), error) from error
    return decode_rgb_bytes(content, str(path), white=white)


def decode_rgb_bytes(content: bytes, name: str, *, white: float | None = None) -> ImageArray:
    """Decode the content of an image file; `decode_rgb` for files that are not in a folder.

    Args:
        content: The whole file.
        name: Name of the image in errors and warnings.
        white: See `rgb_pixels`.

    Returns:
        RGB pixels (H, W, 3), 0–255, in a new array.

    Raises:
        BadImageError: See `decode_rgb`.
    """
    _register_heif(content)
    try:
        with decoder_messages(name, kept=_OF_LIBJPEG) as messages:
            pixels = _decoded(content, name, white)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise almost anything for a broken file
        raise _not_decoded(name, error, content) from error
    message = next((line for line in messages if line.startswith(_OF_LIBJPEG)), None)
    if message is not None:
        warnings.warn(
            f"{name!r} is damaged ({message}), and some of its pixels are wrong: replace the file or leave it out of "
            "the data set",
            DamagedImageWarning,
            stacklevel=2,
        )
    return pixels


def rgb_pixels(image: Image.Image, *, white: float | None = None, name: str = "an image") -> ImageArray:
    """Convert a Pillow image.

    Applies the EXIF orientation, drops transparency, repeats gray in three channels, and keeps the upper 8 of 16 bits:
    65,535 becomes 255 and 256 becomes 1.

    Args:
        image: Image of any mode.
        white: Value > 0 that becomes 255 in gray images of more than 8 bits, 4095 for 12 bits in a 16-bit file; also
            allows floating-point pixels and wider integers. None: 65,535, with a `FewBitsWarning` for an image that
            stays far below it.
        name: Name of the image in a warning.

    Returns:
        RGB pixels (H, W, 3), 0–255, in a new array.

    Raises:
        ValueError: A pixel is negative, above `white` or not finite, or a floating-point image comes without `white`.
    """
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")  # Pillow warns when a palette's alpha is dropped in one step
    if upright.mode == "F" and white is None:
        raise ValueError(
            "its pixels are floating-point numbers of unknown range, pass the white level (--data.white) or a custom "
            "decode"
        )
    if upright.mode == "F" or upright.mode.startswith("I"):  # Pillow would turn all above 255 to white
        upright = Image.fromarray(_eight_bits(np.asarray(upright), white, name))
    return np.array(upright.convert("RGB"))


def _eight_bits(deep: npt.NDArray[Any], white: float | None, name: str) -> ImageArray:
    least, most = float(deep.min()), float(deep.max())
    if not (least >= 0 and most <= (WHITE if white is None else white)):
        raise ValueError(
            f"its pixels lie outside 0-{WHITE}, pass the white level (--data.white) or a custom decode"
            if white is None
            else f"its pixels lie between {least:g} and {most:g} and white={white:g}, pass the highest value"
        )
    if white is not None:
        return np.asarray(np.rint(deep.astype(np.float32) * (255 / white)), dtype=np.uint8)
    bits = int(most).bit_length()
    if 0 < bits <= FEW_BITS and len(_warned_about) < MAX_WARNINGS and name not in _warned_about:
        _warned_about.add(name)
        warnings.warn(
            f"{name!r} has no value above {most:.0f} of {WHITE}, which leaves {(int(most) >> 8) + 1} of 256 grays: if "
            f"the images have {bits} bits, pass white={2**bits - 1} (--data.white {2**bits - 1})",
            FewBitsWarning,
            stacklevel=4,
        )
    return np.asarray(deep >> 8).astype(np.uint8)


_warned_about: set[str] = set()


def _decoded(content: bytes, name: str, white: float | None) -> ImageArray:
    with Image.open(io.BytesIO(content)) as file:
        _check_size(file)
        if file.format == "JPEG" and file.mode in ("RGB", "L"):
            pixels = _decoded_jpeg(content)
            if pixels is not None:
                turn = _UPRIGHT.get(file.getexif().get(_ORIENTATION, 1))
                return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))
        if content.startswith(_START_OF_JPEG):
            _print_messages_of_libjpeg(content)
        return rgb_pixels(file, white=white, name=name)


def _reads_avif() -> bool:
    try:
        from PIL import AvifImagePlugin
    except ImportError:  # Pillow before 11.3
        return False
    return bool(AvifImagePlugin.SUPPORTED)


def _reads_heif() -> bool:
    return importlib.util.find_spec("pillow_heif") is not None


def _brand(content: bytes) -> bytes:
    """The four-letter brand of AVIF and HEIC files; empty for other formats."""
    return content[8:12] if content[4:8] == b"ftyp" else b""


def _register_heif(content: bytes) -> None:
    if _brand(content) in _HEIF and _reads_heif():
        # Registering changes what Pillow opens, so do it only for such a file.
        importlib.import_module("pillow_heif").register_heif_opener()


_HEIF = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_AVIF = (b"avif", b"avis")


def _not_decoded(name: str, error: Exception, content: bytes = b"") -> BadImageError:
    reason: object = error
    if isinstance(error, UnidentifiedImageError):  # Pillow's message names its buffer
        reason = "Pillow does not know its format"
        if _brand(content) in _AVIF:
            reason = "it is AVIF, which needs Pillow 11.3"
        elif _brand(content) in _HEIF and not _reads_heif():
            reason = "it is HEIC, which needs the package pillow-heif"
    return BadImageError(
        f"cannot decode {name!r} as an image ({reason}): replace the file or leave it out of the data set"
    )


def _check_size(image: Image.Image) -> None:
    limit, pixels = Image.MAX_IMAGE_PIXELS, image.width * image.height
    if limit is not None and pixels > limit:
        raise ValueError(
            f"it would unpack to {image.width} × {image.height} pixels, more than the {limit} of "
            "PIL.Image.MAX_IMAGE_PIXELS"
        )


def _decoded_jpeg(content: bytes) -> ImageArray | None:
    """The same pixels as Pillow's in two thirds of the time, or None for a file that Pillow should check.

    OpenCV fills missing data with gray, so a file without JPEG's end marker is left to Pillow.
    """
    import cv2  # changes the process's environment, which importing the package should not

    if not content.endswith(_END_OF_JPEG):
        return None
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    pixels: ImageArray | None = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    return pixels


def _print_messages_of_libjpeg(content: bytes) -> None:
    """Decode at reduced size, to print the warnings that Pillow suppresses."""
    import cv2

    cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8)
