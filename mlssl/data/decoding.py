"""Image files and Pillow's images, of whatever mode, to RGB pixels of 8 bits."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

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
        BadImageError: The file is no image, is cut off or is broken, has pixels without a known range, or more of them
            than Pillow holds for safe (``PIL.Image.MAX_IMAGE_PIXELS``, 89 million unless you set it).
    """
    try:
        content = Path(path).read_bytes()
    except (FileNotFoundError, PermissionError):
        raise
    except (OSError, ValueError) as error:  # a folder, a name that no file can have, a disk that fails
        raise _not_decoded(str(path), error) from error
    return decode_rgb_bytes(content, str(path))


def decode_rgb_bytes(content: bytes, name: str) -> ImageArray:
    """Decode what stands in an image file; `decode_rgb` for files that lie elsewhere than in a folder.

    Args:
        content: The whole file.
        name: What to call it in an error.

    Returns:
        RGB pixels (H, W, 3), 0–255, in an array of its own.

    Raises:
        BadImageError: As for `decode_rgb`.
    """
    try:
        with Image.open(io.BytesIO(content)) as file:
            _check_size(file)
            if file.format == "JPEG" and file.mode in ("RGB", "L") and file.getexif().get(_ORIENTATION, 1) == 1:
                pixels = _decoded_jpeg(content)
                if pixels is not None:
                    return pixels
            return rgb_pixels(file)
    except MemoryError:
        raise
    except Exception as error:  # a broken file makes Pillow's plugins raise almost anything
        raise _not_decoded(name, error) from error


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


def _not_decoded(name: str, error: Exception) -> BadImageError:
    # Pillow's own words name the buffer that it read from.
    reason = "it is of no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
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
    """Pillow's own pixels in two thirds of its time, or None for a file that only Pillow should judge.

    OpenCV fills what a file lacks with gray, so one that does not end as a JPEG does is left to Pillow.
    """
    import cv2  # changes the process's environment, which a mere import of the package should not

    if not content.endswith(_END_OF_JPEG):
        return None
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    pixels: ImageArray | None = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    return pixels
