"""Resizing with torch's kernel and with Pillow: the same within 1 of 255."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from mlssl.views.resizing import resized


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("shape", [(20, 24), (64, 60), (33, 170), (1, 1)])
def test_with_and_without_torch_the_result_is_pillows(
    channels: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, channels), np.uint8)
    with_torch = resized(image, 32, 40)
    monkeypatch.delitem(sys.modules, "torch")
    without = resized(image, 32, 40)
    for result in (with_torch, without):
        assert (result.shape, result.dtype, result.flags.writeable) == ((32, 40, channels), np.uint8, True)
    np.testing.assert_allclose(with_torch.astype(int), without, atol=1)
    for channel in range(channels):
        theirs = Image.fromarray(image[:, :, channel]).resize((40, 32), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(without[:, :, channel], np.asarray(theirs))


def test_the_image_may_be_read_only_and_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    before = image.copy()
    image.flags.writeable = False
    for name in ("", "torch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        result = resized(image, 32, 32)
        result[:] = 0
        np.testing.assert_array_equal(image, before)
