"""Training crops are sampled as in torchvision, and test crops are fixed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from mlssl.data.records import Records
from mlssl.evaluation.crops import Crops, random_crop


def noise(folder: Path, count: int) -> Records:
    generator = np.random.default_rng(0)
    names = [f"{index}.png" for index in range(count)]
    for name in names:
        Image.fromarray(generator.integers(0, 256, (60, 80, 3), np.uint8)).save(folder / name)
    return Records(names, [[1]] * count, ["noise"], root=folder)


def test_crops_depend_only_on_seed_epoch_and_index(tmp_path: Path) -> None:
    records = noise(tmp_path, 3)
    crops = Crops(records, 24, 32, augment=True)
    state = np.random.get_state()[1].tolist(), torch.random.get_rng_state()  # noqa: NPY002
    first = crops[1, 2]["image"]
    assert first.shape == (3, 24, 24)
    assert first.dtype == torch.uint8
    assert torch.equal(first, crops[1, 2]["image"])
    assert not torch.equal(first, crops[2, 2]["image"])
    assert not torch.equal(first, Crops(records, 24, 32, augment=True, seed=1)[1, 2]["image"])
    assert np.random.get_state()[1].tolist() == state[0]  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), state[1])


def test_test_images_are_resized_and_cropped_as_in_the_protocol(tmp_path: Path) -> None:
    pixels = np.zeros((40, 100, 3), dtype=np.uint8)
    pixels[:, 30:70] = 255  # what a centre crop of a square keeps
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    records = Records(["wide.png"], [[1]], ["white"], root=tmp_path)
    centre = Crops(records, 40, 40)[0]["image"]
    assert (centre == 255).all()
    whole = Crops(records, 50)[0]["image"]
    assert whole.shape == (3, 50, 50)
    assert 0.3 < (whole == 255).float().mean() < 0.45


def test_random_crops_are_inside_with_the_areas_and_aspects_of_the_recipe() -> None:
    generator = np.random.default_rng(0)
    areas = []
    for _ in range(2000):
        top, left, height, width = random_crop(300, 400, generator)
        assert 0 <= top <= 300 - height
        assert 0 <= left <= 400 - width
        assert 0.74 < width / height < 1.35
        areas.append(height * width / (300 * 400))
    assert min(areas) < 0.1
    assert max(areas) > 0.9
    blank = torch.zeros(3, 300, 400)
    theirs = [RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)]
    assert np.mean(areas) == pytest.approx(np.mean([box[2] * box[3] for box in theirs]) / (300 * 400), abs=0.03)
    top, left, height, width = random_crop(1000, 3, generator)  # no draw fits
    assert (left, width) == (0, 3)
    assert width / height == pytest.approx(3 / 4, abs=0.01)
