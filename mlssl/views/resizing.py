"""Resizing as Pillow does it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import interpolate


def resized(pixels: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """Interpolate bilinearly, and where pixels become fewer, average over all that fall into one.

    Pillow and torchvision's transforms of its images do that too: the result is theirs within 1 of 255. Interpolation
    that looks at four pixels alone would leave a view sharper, and noisier, than the recipe means it.

    Args:
        pixels: (H, W, C), also a part of a larger image.
        height: Of the result, at least 1.
        width: Of the result, at least 1.

    Returns:
        (height, width, C).
    """
    if not pixels.flags.writeable:  # torch would warn
        pixels = pixels.copy()
    # In this order torch takes its fast path for pixels whose channels lie side by side, and keeps them so.
    images = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    result: npt.NDArray[np.uint8] = (
        interpolate(images, (height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    )
    return result
