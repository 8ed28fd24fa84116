"""COCO's layout: the real sample if available, generated folders, and wrong annotation files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mlssl.data.readers.coco import read_coco

Content = dict[str, Any]

CATEGORIES = [{"id": 18, "name": "dog", "supercategory": "animal"}, {"id": 1, "name": "person", "supercategory": ""}]
NAMES = {"train2017": "{:012d}.jpg", "val2014": "COCO_val2014_{:012d}.jpg"}


def content(split: str) -> Content:
    """Three images, the last without an object; ids neither dense nor sorted, and one crowd."""
    name = NAMES[split].format
    boxes = [(30, 18, 0), (9, 1, 1), (30, 18, 0), (30, 1, 0)]
    return {
        "info": {"year": 2017, "id": 3},
        "images": [{"id": i, "file_name": name(i), "height": 12, "width": 20} for i in (30, 9, 25)],
        "annotations": [
            {"id": i, "image_id": image, "category_id": category, "iscrowd": crowd, "segmentation": {"counts": [3, 4]}}
            for i, (image, category, crowd) in enumerate(boxes)
        ],
        "categories": CATEGORIES,
    }


def write(root: Path, split: str, what: Content | list[Any] | str | None = None) -> Path:
    what = content(split) if what is None else what
    file = root / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(what if isinstance(what, str) else json.dumps(what))
    return root


@pytest.fixture(params=list(NAMES))
def split(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def root(tmp_path: Path, split: str) -> Path:
    (tmp_path / split).mkdir()
    for number in (30, 9, 25):
        Image.effect_noise((20, 12), 60).save(tmp_path / split / NAMES[split].format(number))
    return write(tmp_path, split)


def test_real_sample_has_128_images_of_each_split_and_80_classes(coco256: Path) -> None:
    train, val = read_coco(coco256), read_coco(coco256, "val2017")
    assert (len(train), len(val)) == (128, 128)
    assert train.classes == val.classes
    assert len(train.classes) == 80
    assert (train.classes[0], train.classes[-1]) == ("person", "toothbrush")
    assert train.labels is not None
    assert (train.labels.sum(axis=1) == 0).sum() == 2  # images without an object
    assert train.path(0).name == f"{train.image_ids[0]:012d}.jpg"
    assert train.image(0).ndim == 3


def test_reads_both_years_with_ids_classes_and_images(root: Path, split: str) -> None:
    records = read_coco(root, split)
    assert records.classes == ("person", "dog")
    assert records.image_ids.tolist() == [30, 9, 25]
    assert records.labels is not None
    assert records.labels.tolist() == [[1, 1], [1, 0], [0, 0]]
    assert records.path(1) == root / split / NAMES[split].format(9)
    assert records.image(2).shape == (12, 20, 3)


def test_images_may_be_in_subfolders_and_annotations_may_be_empty(root: Path, split: str) -> None:
    (root / split / "day").mkdir()
    Image.new("RGB", (4, 4)).save(root / split / "day" / "1.png")
    changed = content(split) | {"annotations": []}
    changed["images"][1]["file_name"] = "day/1.png"
    records = read_coco(write(root, split, changed), split)
    assert records.path(1) == root / split / "day" / "1.png"
    assert records.labels is not None
    assert not records.labels.any()


def test_names_the_missing_folder_file_or_image(root: Path, split: str) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no folder '.*gone': pass as root the folder with COCO's annotations/"
    ):
        read_coco(root / "gone")
    with pytest.raises(
        FileNotFoundError, match=rf"no annotation file '.*instances_test.json' .*existing split: {split}"
    ):
        read_coco(root, "test")
    (root / split / NAMES[split].format(9)).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 of 3 images listed in '.*json' are not in .*first .*0009\.jpg: put"
    ):
        read_coco(root, split)
    (root / split).rename(root / "images")
    with pytest.raises(FileNotFoundError, match=rf"no folder '.*{split}': put the images of"):
        read_coco(root, split)
    (root / "annotations" / f"instances_{split}.json").rename(root / "annotations" / "captions.json")
    with pytest.raises(FileNotFoundError, match=r"put it there \(annotation files found: captions\.json\)"):
        read_coco(root, split)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is not JSON .*: fetch the annotation file again"),
        ('{"images": [', "is not JSON"),
        ("version https://git-lfs.github.com/spec/v1", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1, 2]", "contains a list: expected an object with the lists images, annotations and categories"),
        ('"text"', "contains a str: expected"),
        ('{"images": [], "annotations": []}', "contains images, annotations: expected"),
        ('{"images": {}, "annotations": [], "categories": []}', "contains images, annotations, categories: expected"),
        (
            '{"images": [], "annotations": [], "categories": []}',
            "lists 0 images and 0 categories: expected at least one",
        ),
    ],
)
def test_refuses_files_that_are_not_coco_json(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=rf"instances_train2017\.json' {sentence}"):
        read_coco(write(tmp_path, "train2017", text))


@pytest.mark.parametrize(
    ("key", "entry", "sentence"),
    [
        ("images", {"id": 4}, "incomplete entries: expected id and file_name of each image"),
        ("images", 7, "incomplete entries"),
        ("annotations", {"image_id": 9, "caption": "a dog"}, "incomplete entries"),
        ("categories", {"id": 3}, "incomplete entries"),
        ("images", {"id": "4", "file_name": "x.jpg"}, "ids of images that are not integers, such as '4'"),
        (
            "annotations",
            {"image_id": 9, "category_id": 1.5},
            "annotations of category_id that are not integers, such as 1.5",
        ),
        (
            "annotations",
            {"image_id": [9], "category_id": 1},
            r"annotations of image_id that are not integers, such as \[9\]",
        ),
        ("images", {"id": 9, "file_name": "x.jpg"}, "images that share an id, such as 9: expected each id once"),
        ("categories", {"id": 18, "name": "cat"}, "categories that share an id, such as 18"),
    ],
)
def test_refuses_malformed_entries(tmp_path: Path, key: str, entry: Any, sentence: str) -> None:
    changed = content("train2017")
    changed[key] = [*changed[key], entry]
    with pytest.raises(ValueError, match=rf"instances_train2017\.json' has {sentence}"):
        read_coco(write(tmp_path, "train2017", changed))


@pytest.mark.parametrize(("key", "unknown"), [("image_id", 4), ("category_id", 99)])
def test_refuses_annotations_of_images_or_categories_that_are_not_listed(
    tmp_path: Path, key: str, unknown: int
) -> None:
    changed = content("train2017")
    changed["annotations"][1][key] = unknown
    with pytest.raises(
        ValueError, match=rf"1 annotations in .* have a {key} that the file does not list, first {unknown}:"
    ):
        read_coco(write(tmp_path, "train2017", changed))


@pytest.mark.parametrize(
    "name",
    [
        "../secret.jpg",
        "a/../../secret.jpg",
        "/etc/secret.jpg",
        "..",
        ".",
        "",
        "..\\secret.jpg",
        "C:\\a.jpg",
        "C:a.jpg",
        None,
        5,
    ],
)
def test_refuses_names_that_leave_the_folder_even_if_the_file_exists(root: Path, split: str, name: Any) -> None:
    Image.new("RGB", (4, 4)).save(root / "secret.jpg")
    changed = content(split)
    changed["images"][2]["file_name"] = name
    with pytest.raises(
        ValueError, match=r"names the image .*: expected a path inside the image folder, without '\.\.'"
    ):
        read_coco(write(root, split, changed), split)


def test_a_name_may_contain_dots(root: Path, split: str) -> None:
    changed = content(split)
    changed["images"][2]["file_name"] = "a..b.jpg"
    Image.new("RGB", (4, 4)).save(root / split / "a..b.jpg")
    assert read_coco(write(root, split, changed), split).path(2).name == "a..b.jpg"


@pytest.mark.parametrize("other", ["a.jpg", "./a.jpg", ".//a.jpg", "cafe\u0301.jpg"])
def test_a_repeated_image_is_refused_in_any_spelling(tmp_path: Path, other: str) -> None:
    first = "caf\u00e9.jpg" if "caf" in other else "a.jpg"
    images = [{"id": 1, "file_name": first}, {"id": 2, "file_name": "b.jpg"}, {"id": 100, "file_name": other}]
    write(tmp_path, "train2017", {"images": images, "annotations": [], "categories": CATEGORIES})
    with pytest.raises(ValueError, match=r"lists the image '.*' twice, under the ids 1 and 100: keep one of them"):
        read_coco(tmp_path)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("dog", "has two categories named 'dog', with the ids 18 and 7: give the annotations of both one id"),
        ("", "has the name '' for category 7: write a name"),
        (" ", "has the name ' ' for category 7"),
        (None, "has the name None for category 7"),
        (3, "has the name 3 for category 7"),
    ],
)
def test_a_repeated_or_unnamed_class_is_refused(tmp_path: Path, name: Any, sentence: str) -> None:
    categories = [*CATEGORIES, {"id": 7, "name": name}]
    images = [{"id": 1, "file_name": "a.jpg"}]
    write(tmp_path, "train2017", {"images": images, "annotations": [], "categories": categories})
    with pytest.raises(ValueError, match=sentence):
        read_coco(tmp_path)
