"""Albumentations pipelines as branches: an object or a file, seeded per view, and for images only."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mlssl.data.datasets import ViewDataset
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.views.blocks import BlockViews
from mlssl.views.recipe import Recipe


@pytest.fixture(scope="module")
def A() -> Any:
    before = os.environ.get("NO_ALBUMENTATIONS_UPDATE")
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import albumentations

    if before is None:
        del os.environ["NO_ALBUMENTATIONS_UPDATE"]
    return albumentations


@pytest.fixture
def pipeline(A: Any) -> Any:
    steps = [
        A.RandomResizedCrop((16, 16)),
        A.OneOf([A.GaussNoise(p=1), A.RandomBrightnessContrast(p=1)], p=0.9),
        A.HorizontalFlip(p=0.5),
    ]
    return A.Compose(steps)


def noise(height: int = 40, width: int = 50, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def made(views: BlockViews) -> bytes:
    """Run in another process."""
    return views(noise(), np.random.default_rng(3)).numpy().tobytes()


@pytest.mark.slow
def test_views_of_a_pipeline_depend_only_on_the_generator(A: Any, pipeline: Any) -> None:
    grid = BlockViews(16, branches=[pipeline, Recipe()])
    first = grid(noise(), np.random.default_rng(3))
    pipeline(image=noise())
    np.random.default_rng(0)
    assert torch.equal(grid(noise(), np.random.default_rng(3)), first)
    assert not torch.equal(grid(noise(), np.random.default_rng(4)), first)
    assert len({view.numpy().tobytes() for view in first[0]}) == 4
    assert torch.equal(first[1], BlockViews(16, branches=[Recipe()] * 2)(noise(), np.random.default_rng(3))[1])
    assert torch.equal(pickle.loads(pickle.dumps(grid))(noise(), np.random.default_rng(3)), first)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(made, grid).result() == first.numpy().tobytes()


def test_a_file_restores_the_saved_pipeline(A: Any, pipeline: Any, tmp_path: Path) -> None:
    path = tmp_path / "xray.yaml"
    A.save(pipeline, path, data_format="yaml")
    from_file, from_object = (BlockViews(16, branches=[one]) for one in (str(path), pipeline))
    assert made(from_file) == made(from_object)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_single_transform_and_any_number_of_channels_work(channels: int, A: Any) -> None:
    grid = BlockViews(16, branches=[A.RandomCrop(16, 16)], channels=channels)
    view = grid(noise(channels=channels), np.random.default_rng(0))[0, 0]
    block = noise(channels=channels)[:28, :35].transpose(2, 0, 1)
    assert any(np.array_equal(view, block[:, y : y + 16, x : x + 16]) for y in range(13) for x in range(20))


def test_a_pipeline_that_ends_in_a_tensor_works(A: Any, pipeline: Any) -> None:
    with_tensor = A.Compose([*pipeline.transforms, A.ToTensorV2()])
    assert made(BlockViews(16, branches=[with_tensor])) == made(BlockViews(16, branches=[pipeline]))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_make_the_same_views_of_every_epoch(workers: int, A: Any, pipeline: Any) -> None:
    """An unseeded Compose would repeat its samples in every worker."""
    records = synthetic_scenes(size=32, count=6)
    dataset = ViewDataset(records, BlockViews(16, branches=[pipeline, "test_albumentations_branch.shade"]), seed=1)
    keys = [(epoch, index) for epoch in (0, 1) for index in range(6)]
    loader = torch.utils.data.DataLoader(dataset, 2, sampler=keys, num_workers=workers)  # type: ignore[arg-type]
    views = torch.cat([batch["views"] for batch in loader])
    for key, one in zip(keys, views, strict=True):
        image = records.image(key[1])
        assert torch.equal(one, dataset.views(image, np.random.default_rng([1, *key])))
    assert len({view.numpy().tobytes() for view in views}) == 12


def shade(block: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return np.full((3, 16, 16), generator.integers(256), np.uint8)


def test_photographs(coco256: Path, pipeline: Any) -> None:
    image = np.asarray(Image.open(min((coco256 / "val2017").glob("*.jpg"))).convert("RGB"))
    local = {"count": 3, "size": 16, "branch": pipeline}
    views = BlockViews(16, branches=[pipeline], local_views=local).arrays(image, np.random.default_rng(0))
    assert views["views"].std(axis=(2, 3, 4)).min() > 1
    assert views["local_views"].std(axis=(1, 2, 3)).min() > 1


def test_steps_for_other_targets_are_refused(A: Any, tmp_path: Path) -> None:
    crop = A.RandomResizedCrop((16, 16))
    for wrong, said in (
        (A.Compose([crop], bbox_params=A.BboxParams("coco", label_fields=[])), "bboxes"),
        (A.Compose([crop], keypoint_params=A.KeypointParams("xy")), "keypoints"),
        (A.Compose([crop], additional_targets={"second": "image"}), "second"),
        (A.Compose([crop, A.OneOf([A.MaskDropout(), A.HorizontalFlip()])]), "mask"),
        (A.Compose([A.RandomCropNearBBox()]), "cropping_bbox"),
    ):
        path = tmp_path / "wrong.yaml"
        A.save(wrong, path, data_format="yaml")
        for branch in (wrong, str(path)):
            with pytest.raises(
                ValueError, match=f"branch 1 is an albumentations pipeline with steps for {said}, and a"
            ):
                BlockViews(16, branches=[Recipe(), branch])


@pytest.mark.parametrize("content", [None, "", "- hue: 3", "transform: {__class_fullname__: Nothing}", "{ : : }"])
def test_a_file_that_cannot_be_read_is_refused(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(
        ValueError,
        match=r"branch 0 is '.*broken.yaml', which cannot be read as an albumentations pipeline \(.+\): write",
    ):
        BlockViews(16, branches=[str(path)])


def test_views_of_another_size_or_type_are_named_when_the_pipeline_is_set_up(A: Any) -> None:
    with pytest.raises(ValueError, match=r"branch 0 \(albumentations.*Compose\) returns pixels of shape \(3, 20, 20\)"):
        BlockViews(16, branches=[A.Compose([A.Resize(20, 20)])])
    with pytest.raises(
        TypeError, match=r"branch 0 \(albumentations.*\) returns float32, expected uint8 .*do not normalise"
    ):
        BlockViews(16, branches=[A.Compose([A.Resize(16, 16), A.Normalize()])])
    with pytest.raises(ValueError, match=r"branch 0 \(albumentations.*\) fails on a blank block"):
        BlockViews(16, branches=[A.Compose([A.RandomCrop(500, 500)])])


@pytest.mark.slow
@pytest.mark.parametrize("before", [None, "0", "1"])
def test_reading_opens_no_connection_and_restores_the_environment(
    before: str | None, A: Any, pipeline: Any, tmp_path: Path
) -> None:
    path = tmp_path / "xray.yaml"
    A.save(pipeline, path, data_format="yaml")
    code = """
import os, socket, sys, warnings
import cv2  # its loader extends LD_LIBRARY_PATH
def refuse(*arguments, **named):
    raise AssertionError("a socket was opened")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from mlssl.views.blocks import BlockViews
assert "albumentations" not in sys.modules
warnings.simplefilter("error")  # from here, for older releases of what is imported above warn
before = dict(os.environ)
BlockViews(16, branches=[sys.argv[1]])
assert "albumentations" in sys.modules
assert dict(os.environ) == before
"""
    environment = {name: value for name, value in os.environ.items() if name != "NO_ALBUMENTATIONS_UPDATE"}
    if before is not None:
        environment["NO_ALBUMENTATIONS_UPDATE"] = before
    done = subprocess.run(
        [sys.executable, "-c", code, path], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
