"""Render a view of a block: apply sampled operations to 8-bit pixels in few OpenCV passes."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from mlssl.views.blurring import gaussian_kernel
from mlssl.views.draws import Jitter, Operations
from mlssl.views.hue import HueTurner
from mlssl.views.resizing import resized

Pixels = npt.NDArray[np.uint8]

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in gray (ITU-R BT.601), as in Pillow and torchvision."""

_TURNS = {1: cv2.ROTATE_90_CLOCKWISE, 2: cv2.ROTATE_180, 3: cv2.ROTATE_90_COUNTERCLOCKWISE}


class Renderer:
    """Render views of one size and number of channels, in reused buffers.

    Brightness, contrast and saturation each have the form a·x + b·luma(x) + c, and so does their composition while no
    value can leave 0–255, that is, for factors up to 1: such operations are applied in one pass and rounded once.

    See `mlssl.views.resizing`, `mlssl.views.hue` and `mlssl.views.blurring` for crops, hue and blur. Saturation, hue
    and gray need three channels (RGB); otherwise they are skipped, and contrast is relative to each channel's mean.

    Args:
        size: Side S of a view in pixels.
        channels: C.
    """

    def __init__(self, size: int, channels: int = 3) -> None:
        self.size = size
        self.channels = channels
        # New memory of this size would be mapped page by page in every operation.
        self._colour = np.empty((2, size, size, channels), np.uint8)
        self._gray = np.empty((2, size, size), np.uint8)
        self._turn_hue = HueTurner(size)

    def __call__(self, block: Pixels, operations: Operations, out: Pixels) -> None:
        """Render a view.

        Args:
            block: (H, W, C), not modified.
            operations: Operations of the view.
            out: (C, S, S), each channel contiguous; overwritten.
        """
        top, left, height, width = operations[:4]
        view = resized(block[top : top + height, left : left + width], self.size, self.size)
        if self.channels == 1:  # OpenCV represents such an image with two axes
            view = view[:, :, 0]
        if self.channels == 3:
            view = self._jittered(view, operations.jitters)
            if operations.gray:
                view = cv2.cvtColor(view, cv2.COLOR_RGB2GRAY, dst=self._gray[0])
        else:
            self._jitter_channels(view, operations.jitters)
        if operations.blur_sigma > 0:
            view = self._blurred(view, operations.blur_sigma)
        if operations.solarize_from is not None:
            view = self._solarized(view, operations.solarize_from)
        if operations.noise_std > 0:
            _add_noise(view, operations.noise_std, operations.noise_seed)
        if operations.erased is not None:
            _erase(view, operations.erased, operations.erase_seed)
        if operations.flip or operations.vertical_flip:
            axes = 0 if not operations.flip else -1 if operations.vertical_flip else 1
            view = cv2.flip(view, axes, dst=self._other(view))
        if view.ndim == 2:
            out[:] = view
        else:
            cv2.split(view, list(out))
        if operations.turns:
            for channel in out:  # cv2.rotate supports few numbers of channels
                channel[:] = cv2.rotate(channel, _TURNS[operations.turns])

    def _other(self, view: Pixels) -> Pixels:
        """The buffer of the view's shape that does not contain the view."""
        first, second = self._gray if view.ndim == 2 else self._colour
        other: Pixels = second if np.may_share_memory(view, first) else first
        return other

    def _jittered(self, view: Pixels, jitters: tuple[tuple[Jitter, float], ...]) -> Pixels:
        a, b, c = 1.0, 0.0, 0.0  # pending: x → a·x + b·luma(x) + c
        luma: float | None = None  # mean of the view, without pending operations
        for name, factor in jitters:
            if name == "brightness":
                a, b, c = factor * a, factor * b, factor * c
            elif name == "contrast":
                luma = _mean_luma(view) if luma is None else luma
                a, b, c = factor * a, factor * b, factor * c + (1 - factor) * ((a + b) * luma + c)
            elif name == "saturation":
                a, b = factor * a, b + (1 - factor) * a
            if name == "hue" or factor > 1:
                view, luma = self._mapped(view, a, b, c), None
                a, b, c = 1.0, 0.0, 0.0
            if name == "hue":
                view = self._turn_hue(view, factor, out=view)
        return self._mapped(view, a, b, c)

    def _mapped(self, view: Pixels, a: float, b: float, c: float) -> Pixels:
        if (a, b, c) == (1.0, 0.0, 0.0):
            return view
        red, green, blue = (b * weight for weight in LUMA)
        matrix = np.array([[a + red, green, blue, c], [red, a + green, blue, c], [red, green, a + blue, c]])
        mapped: Pixels = cv2.transform(view, matrix, dst=self._other(view))
        return mapped

    def _jitter_channels(self, view: Pixels, jitters: tuple[tuple[Jitter, float], ...]) -> None:
        wanted = [jitter for jitter in jitters if jitter[0] in ("brightness", "contrast")]
        if not wanted:
            return
        pixels = view.astype(np.float32)
        for name, factor in wanted:
            centre = pixels.mean(axis=(0, 1)) if name == "contrast" else 0
            pixels = ((pixels - centre) * factor + centre).clip(0, 255)
        np.rint(pixels, out=view, casting="unsafe")

    def _blurred(self, view: Pixels, sigma: float) -> Pixels:
        kernel = gaussian_kernel(sigma)
        blurred: Pixels = cv2.sepFilter2D(view, -1, kernel, kernel, dst=self._other(view))
        return blurred

    def _solarized(self, view: Pixels, threshold: int) -> Pixels:
        inverted = cv2.threshold(view, threshold - 1, 255, cv2.THRESH_BINARY, dst=self._other(view))[1]
        solarized: Pixels = cv2.bitwise_xor(view, inverted, dst=view)
        return solarized


def _add_noise(view: Pixels, std: float, seed: int) -> None:
    noisy = np.random.default_rng(seed).standard_normal(view.shape, np.float32)
    noisy *= 255 * std
    noisy += view
    np.rint(noisy.clip(0, 255, out=noisy), out=view, casting="unsafe")


def _erase(view: Pixels, box: tuple[int, int, int, int], seed: int) -> None:
    top, left, height, width = box
    part = view[top : top + height, left : left + width]
    part[:] = np.random.default_rng(seed).integers(0, 256, part.shape, np.uint8)


def _mean_luma(view: Pixels) -> float:
    return sum(weight * mean for weight, mean in zip(LUMA, cv2.mean(view), strict=False))
