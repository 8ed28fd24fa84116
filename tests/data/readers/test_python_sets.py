"""Python data sets: torch's and Hugging Face's, wrapped in one line, train like any other."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.decoding import BadImageError
from mlssl.data.readers.corel5k import read_corel5k
from mlssl.data.readers.python_sets import read_dataset

CLASSES = ["sky", "sea", "sun"]
IDS = [[0, 2], [], [1], [0, 1, 2]]
LABELS = [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]]


def photograph(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (24, 30, 3), np.uint8)


class Pairs(Dataset[Any]):
    """A torch Dataset as anybody writes it."""

    def __init__(self, targets: list[Any], kind: str = "pillow") -> None:
        self.targets, self.kind, self.asked = targets, kind, 0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        self.asked += 1
        pixels = photograph(index)
        image = {
            "pillow": lambda: Image.fromarray(pixels),
            "numpy": lambda: pixels,
            "tensor": lambda: torch.from_numpy(pixels).permute(2, 0, 1),
            "floats": lambda: torch.from_numpy(pixels).permute(2, 0, 1) / 255,
        }[self.kind]()
        return image, self.targets[index]


@pytest.mark.parametrize("kind", ["pillow", "numpy", "tensor", "floats"])
def test_images_of_every_kind_are_decoded_alike(kind: str) -> None:
    records = read_dataset(Pairs(IDS, kind), CLASSES)
    assert records.labels is not None
    assert records.labels.tolist() == LABELS
    assert all(np.array_equal(records.image(index), photograph(index)) for index in range(4))
    assert np.array_equal(pickle.loads(pickle.dumps(records)).image(3), photograph(3))


@pytest.mark.parametrize(
    ("targets", "settings"),
    [
        (IDS, {}),
        ([np.array(ids, np.int64) for ids in IDS], {}),
        ([torch.tensor(ids, dtype=torch.int64) for ids in IDS], {}),
        (LABELS, {"target_kind": "multi_hot"}),
        ([torch.tensor(row, dtype=torch.bool) for row in LABELS], {"target_kind": "multi_hot"}),
    ],
)
def test_targets_are_ids_or_multi_hot(targets: list[Any], settings: dict[str, Any]) -> None:
    labels = read_dataset(Pairs(targets), CLASSES, **settings).labels
    assert labels is not None
    assert labels.tolist() == LABELS


def test_one_id_per_image_and_unknown_labels_are_accepted() -> None:
    one = read_dataset(Pairs([2, 0]), CLASSES).labels
    unknown = read_dataset(Pairs([[1, -1], [0, 0]]), target_kind="multi_hot")
    assert one is not None
    assert unknown.labels is not None
    assert one.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert (unknown.labels.tolist(), unknown.classes) == ([[1, -1], [0, 0]], ("0", "1"))


def test_items_may_be_dictionaries_with_any_keys() -> None:
    items = [{"photo": photograph(index), "tags": ids} for index, ids in enumerate(IDS)]
    labels = read_dataset(items, CLASSES, image="photo", target="tags").labels
    assert labels is not None
    assert labels.tolist() == LABELS
    assert read_dataset([{"image": photograph(0)}]).labels is None


def test_given_targets_avoid_reading_the_images() -> None:
    dataset = Pairs(IDS)
    labels = read_dataset(dataset, CLASSES, targets=IDS).labels
    assert labels is not None
    assert labels.tolist() == LABELS
    assert dataset.asked == 1


def test_views_probes_and_reproducible_sampling_work() -> None:
    train, val = read_dataset(Pairs(IDS), CLASSES), read_dataset(Pairs(IDS[:2]), CLASSES)
    batches = [
        next(iter(MultiLabelDataModule(train=train, val=val, batch_size=2, size=16, num_workers=n).train_dataloader()))
        for n in (0, 2)
    ]
    assert batches[0]["views"].shape == (2, 2, 4, 3, 16, 16)
    assert batches[0]["labels"].shape == (2, 3)
    assert torch.equal(batches[0]["views"], batches[1]["views"])


def test_gray_pixels_and_other_channels_are_accepted() -> None:
    gray = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert read_dataset([(gray,)]).image(0)[2, 3].tolist() == [11, 11, 11]
    bands = torch.zeros(13, 4, 5, dtype=torch.uint8)
    assert read_dataset([(bands,)], channels=13).image(0).shape == (4, 5, 13)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (np.zeros((4, 5, 3), np.float32), "a ndarray of float32 and shape .* was given: pass a Pillow image"),
        (np.zeros((4, 5, 3), np.uint16), "a ndarray of uint16"),
        (torch.full((3, 4, 5), 1.5), r"a float tensor with values from 1.5 to 1.5 was given: leave normalisation"),
        ("a.jpg", "a str of <U5"),
        (None, "a NoneType of object"),
    ],
)
def test_invalid_images_are_refused_by_item(image: Any, reason: str) -> None:
    with pytest.raises(BadImageError, match=rf"item 0 of the list has no valid image \({reason}"):
        read_dataset([(image,)]).image(0)


@pytest.mark.parametrize(
    ("dataset", "settings", "error", "sentence"),
    [
        (iter([1]), {}, TypeError, "is a list_iterator without length or items"),
        ([], {}, ValueError, "an empty data set was given"),
        (Pairs(IDS), {}, ValueError, "targets are ids without class names: pass classes="),
        (
            Pairs(LABELS),
            {"classes": CLASSES},
            ValueError,
            r"target 0 is \[1, 0, 1\]: .*or target_kind='multi_hot'",
        ),
        (Pairs([[3]]), {"classes": CLASSES}, ValueError, r"target 0 is \[3\]: pass each class id once, from 0 to 2"),
        (Pairs([["sky"]]), {"classes": CLASSES}, TypeError, r"target 0 is \['sky'\]: pass integer class ids"),
        (Pairs(IDS), {"classes": CLASSES, "target_kind": "hot"}, ValueError, "target_kind='hot' is unknown"),
        (Pairs(IDS), {"classes": CLASSES, "targets": IDS[:2]}, ValueError, "2 targets were given for 4 images"),
        (Pairs([[0.5, 1]]), {"target_kind": "multi_hot"}, TypeError, "labels of float64 were given"),
        ([{"photo": 1}], {}, KeyError, "an item has no image under 'image', it is 'photo': pass image=…"),
        ([{"image": 1}], {"target": "tags"}, KeyError, "an item has no target under 'tags', it is 'image'"),
    ],
)
def test_errors_are_reported_at_once(
    dataset: Any, settings: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        read_dataset(dataset, **settings)


def test_a_hugging_face_data_set_trains_with_its_own_class_names() -> None:
    import datasets  # takes seconds

    labels = datasets.Sequence(datasets.ClassLabel(names=CLASSES))
    features = datasets.Features({"image": datasets.Image(), "objects": labels})
    rows = {"image": [Image.fromarray(photograph(index)) for index in range(4)], "objects": IDS}
    wrapped = read_dataset(datasets.Dataset.from_dict(rows, features=features), target="objects")
    assert wrapped.labels is not None
    assert (wrapped.classes, wrapped.labels.tolist()) == (tuple(CLASSES), LABELS)
    assert np.array_equal(wrapped.image(1), photograph(1))
    data = MultiLabelDataModule(train=wrapped, batch_size=2, size=16, num_workers=2)
    assert sum(len(batch["views"]) for batch in data.train_dataloader()) == 4


def test_real_photographs_are_wrapped_with_their_labels(corel5k: Path) -> None:
    expected = read_corel5k(corel5k, "test").subset(range(20))
    assert expected.labels is not None
    items = [
        {"image": Image.open(expected.path(index)).convert("RGB"), "words": np.flatnonzero(expected.labels[index])}
        for index in range(20)
    ]
    wrapped = read_dataset(items, expected.classes, target="words")
    assert np.array_equal(wrapped.labels, expected.labels)
    assert np.array_equal(wrapped.image(19), expected.image(19))


def test_an_image_transform_is_not_called_for_the_labels() -> None:
    import datasets  # takes seconds

    photos = [Image.fromarray(np.full((12, 16), value, np.uint8)) for value in (0, 90, 180)]
    names = datasets.ClassLabel(names=["sky", "sea"])
    boxes = datasets.Sequence({"bbox": datasets.Sequence(datasets.Value("float32")), "category": names})
    features = datasets.Features({"image": datasets.Image(), "labels": datasets.Sequence(names), "objects": boxes})
    rows = {
        "image": photos,
        "labels": [[0], [0, 1], []],
        "objects": [{"bbox": [[0.0] * 4] * len(ids), "category": ids} for ids in ([0, 0], [1, 0, 1], [])],
    }
    dataset = datasets.Dataset.from_dict(rows, features=features)

    def to_rgb(batch: dict[str, Any]) -> dict[str, Any]:
        batch["image"] = [image.convert("RGB") for image in batch["image"]]
        return batch

    for given in (dataset, dataset.with_transform(to_rgb), dataset.with_format("torch", columns=["image", "labels"])):
        records = read_dataset(given, target="labels")
        assert records.labels is not None
        assert (records.classes, records.labels.tolist()) == (("sky", "sea"), [[1, 0], [1, 1], [0, 0]])
        assert records.image(1).shape == (12, 16, 3)
    for given in (dataset, dataset.with_transform(to_rgb)):
        records = read_dataset(given, target="objects")
        assert records.labels is not None
        assert (records.classes, records.labels.tolist()) == (("sky", "sea"), [[1, 0], [1, 1], [0, 0]])


def test_a_detection_target_without_ids_is_refused() -> None:
    items: list[Any] = [(np.zeros((4, 5, 3), np.uint8), {"boxes": []})]
    with pytest.raises(KeyError, match="a target has 'boxes': expected object ids under 'category'"):
        read_dataset(items, ["sky"])
