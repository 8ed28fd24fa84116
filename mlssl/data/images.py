"""Image files and Pillow's images, of whatever mode, to RGB pixels of 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

ImageArray: TypeAlias = npt.NDArray[np.uint8]

_ORIENTATION = ExifTags.Base.Orientation
_END_OF_JPEG = b"\xff\xd9"


class BadImageError(ValueError):
    """An image that cannot be decoded. A reader of one's own raises it, so that such images can be skipped.

    Args:
        message: Which image, why, and what to do.
    """

    def __init__(self, message: str) -> None:  # one argument, by which loader workers hand it on
        super().__init__(message)


def decode_rgb(path: Path) -> ImageArray:
    """Read an image file of any mode that Pillow knows, upright; see `rgb_pixels`.

    Returns:
        RGB pixels (H, W, 3), 0–255, in an array of its own.

    Raises:
        FileNotFoundError: There is no such file.
        BadImageError: The file is no image, is cut off or is broken, or has pixels without a known range.
    """
    try:
        with Image.open(path) as file:
            if file.format == "JPEG" and file.mode in ("RGB", "L") and file.getexif().get(_ORIENTATION, 1) == 1:
                pixels = _decoded_jpeg(path)
                if pixels is not None:
                    return pixels
            return rgb_pixels(file)
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # a broken file makes Pillow's plugins raise almost anything
        raise BadImageError(
            f"cannot decode {str(path)!r} as an image ({error}): replace the file or leave it out of the data set"
        ) from error


def rgb_pixels(image: Image.Image) -> ImageArray:
    """Convert an image of Pillow's.

    Its EXIF orientation is applied, transparency is dropped, gray becomes three equal channels, and of 16 bits the
    upper 8 are kept: 65,535 becomes 255 and 256 becomes 1.

    Returns:
        RGB pixels (H, W, 3), 0–255, in an array of its own.

    Raises:
        ValueError: Floating-point pixels, or integers outside 0–65,535: nothing says which value is white.
    """
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")  # Pillow warns when a palette's alpha is dropped in one step
    if upright.mode == "F":
        raise ValueError("its pixels are floating-point numbers of no known range, read them by a decode of your own")
    if upright.mode.startswith("I"):  # Pillow would turn all above 255 to white
        deep = np.asarray(upright)
        if deep.min() < 0 or deep.max() > 0xFFFF:
            raise ValueError("its pixels lie outside 0-65535, read them by a decode of your own")
        upright = Image.fromarray((deep >> 8).astype(np.uint8))
    return np.array(upright.convert("RGB"))


def _decoded_jpeg(path: Path) -> ImageArray | None:
    """Pillow's own pixels in two thirds of its time, or None for a file that only Pillow should judge.

    OpenCV fills what a file lacks with gray, so one that does not end as a JPEG does is left to Pillow.
    """
    import cv2  # changes the process's environment, which a mere import of the package should not

    data = Path(path).read_bytes()
    if not data.endswith(_END_OF_JPEG):
        return None
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    pixels: ImageArray | None = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    return pixels
