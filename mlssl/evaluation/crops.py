"""Square crops of labelled images as in published code: random ones to train on, fixed ones to test on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import center_crop, resize, resized_crop

from mlssl.data.records import Records
from mlssl.views.draws import CROP_UNIFORMS, draw_crop

CROP_AREA = (0.08, 1.0)
"""Area of a training crop as a fraction of the image: torchvision's default, used by the published code."""

CROP_ASPECT = (3 / 4, 4 / 3)
"""Width ÷ height of a training crop, also torchvision's default."""


class Crops(Dataset[dict[str, Any]]):
    """Crops of images: random crops and flips for a key (epoch, index), or fixed ones.

    Args:
        records: Labelled images.
        side: S of a crop in pixels.
        test_resize: Size of the shorter side before a fixed centre crop; None resizes the whole image.
        augment: Whether crops are random, over the whole image.
        seed: Seed of the random crops.
    """

    def __init__(
        self, records: Records, side: int, test_resize: int | None = None, *, augment: bool = False, seed: int = 0
    ) -> None:
        self.records, self.side, self.test_resize, self.augment, self.seed = records, side, test_resize, augment, seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        """Image uint8 (3, S, S), image id and labels (L,)."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        pixels = torch.from_numpy(self.records.image(index)).permute(2, 0, 1)
        side = [self.side, self.side]
        if self.augment:
            generator = np.random.default_rng([self.seed, epoch, index])
            top, left, height, width = random_crop(pixels.shape[1], pixels.shape[2], generator)
            pixels = resized_crop(pixels, top, left, height, width, side, antialias=True)
            pixels = pixels.flip(2) if generator.random() < 0.5 else pixels
        elif self.test_resize is None:
            pixels = resize(pixels, side, antialias=True)
        else:
            pixels = center_crop(resize(pixels, [self.test_resize], antialias=True), side)
        assert self.records.labels is not None
        return {
            "image": pixels.contiguous(),
            "image_ids": int(self.records.image_ids[index]),
            "labels": torch.from_numpy(np.array(self.records.labels[index])),
        }


def random_crop(height: int, width: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop with an area of 8–100 % and an aspect of 3/4–4/3, log-uniform."""
    return draw_crop(CROP_AREA, CROP_ASPECT, height, width, generator.random(CROP_UNIFORMS).tolist())
