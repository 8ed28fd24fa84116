"""Synthetic scenes: determined by (seed, split, index), several objects of several classes, and not too easy."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from mlssl.data.readers.synthetic import MAX_CLASSES, NUM_OBJECTS, SHAPES, SPLITS, synthetic_scenes


def test_a_scene_depends_only_on_seed_split_and_index() -> None:
    few, many = synthetic_scenes(count=3), synthetic_scenes(count=40)
    assert few.labels is not None
    assert many.labels is not None
    assert np.array_equal(few.labels, many.labels[:3])
    later = [many.image(index) for index in (2, 0, 1)]  # in another order, too
    for index, image in zip((2, 0, 1), later, strict=True):
        assert np.array_equal(few.image(index), image)
        assert np.array_equal(pickle.loads(pickle.dumps(few)).image(index), image)


def test_seed_split_and_index_change_the_scene() -> None:
    sets = [synthetic_scenes(split, seed=seed, count=8) for split in SPLITS for seed in (0, 1)]
    images = [records.image(index) for records in sets for index in range(8)]
    assert len({image.tobytes() for image in images}) == len(images)
    assert len({records.labels.tobytes() for records in sets if records.labels is not None}) == len(sets)


@pytest.mark.parametrize("size", [32, 75, 128])
def test_scenes_are_square_rgb_of_the_requested_size(size: int) -> None:
    image = synthetic_scenes(size=size, count=1).image(0)
    assert (image.shape, image.dtype) == ((size, size, 3), np.uint8)


def test_a_scene_keeps_its_labels_and_layout_at_every_size() -> None:
    small, large = (synthetic_scenes(size=size, count=4) for size in (64, 128))
    assert small.labels is not None
    assert np.array_equal(small.labels, large.labels)
    for index in range(4):
        shrunk = large.image(index).reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
        assert np.corrcoef(shrunk.ravel(), small.image(index).ravel())[0, 1] > 0.9


def test_scenes_contain_one_to_three_classes_each_several_times() -> None:
    labels = synthetic_scenes(count=2000).labels
    assert labels is not None
    per_scene = labels.sum(axis=1)
    assert (per_scene.min(), per_scene.max()) == (1, MAX_CLASSES)
    assert NUM_OBJECTS // MAX_CLASSES >= 3
    assert set(np.unique(labels)) == {0, 1}
    share = labels.mean(axis=0)
    assert labels.shape[1] == len(SHAPES) == 12
    assert 0.12 < share.min() <= share.max() < 0.22  # 2 of 12 classes a scene


def test_colour_is_independent_of_the_class() -> None:
    """The mean colour of a scene with a class is that of one without, within the noise of 600 scenes."""
    records = synthetic_scenes(size=32, count=600)
    assert records.labels is not None
    means = np.stack([records.image(index).mean(axis=(0, 1)) for index in range(600)])
    for column in range(len(SHAPES)):
        present = records.labels[:, column] == 1
        gap = means[present].mean(axis=0) - means[~present].mean(axis=0)
        error = means.std(axis=0) * np.sqrt(1 / present.sum() + 1 / (~present).sum())
        assert (np.abs(gap) < 4.5 * error).all()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"split": "val"}, "no synthetic scenes of split 'val': use 'train' or 'test'"),
        ({"size": 31}, "with size = 31 were requested: use size >= 32"),
        ({"seed": -1}, "with seed = -1 were requested: use seed >= 0"),
        ({"count": 0}, "with count = 0 were requested: use count >= 1"),
    ],
)
def test_refuses_invalid_scenes(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        synthetic_scenes(**settings)  # type: ignore[arg-type]
