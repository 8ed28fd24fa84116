"""No reader follows a listed name out of the data set's folder, and missing files are named before a run starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mlssl.data.paths import check_files
from mlssl.data.readers.coco import read_coco
from mlssl.data.readers.corel5k import read_corel5k
from mlssl.data.readers.cvat import read_cvat
from mlssl.data.readers.folder import read_folder
from mlssl.data.readers.manifest import read_manifest
from mlssl.data.readers.roboflow import read_roboflow
from mlssl.data.readers.voc import read_voc
from mlssl.data.records import Records


def coco(root: Path, name: str) -> Records:
    image, category = {"id": 1, "file_name": f"{name}.jpg"}, {"id": 1, "name": "dog"}
    content = {"images": [image], "annotations": [], "categories": [category]}
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return read_coco(root, "val2017")


def voc(root: Path, name: str) -> Records:
    folder = root / "VOC2012"
    for below in ("ImageSets/Main", "Annotations", "JPEGImages/a"):
        (folder / below).mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "trainval.txt").write_text(f"{name}\n")
    return read_voc(root)


def csv(root: Path, name: str) -> Records:
    (root / "train.csv").write_text(f"path,labels\n{name}.jpg,dog\n")
    return read_manifest(root / "train.csv")


def json_lines(root: Path, name: str) -> Records:
    (root / "train.jsonl").write_text(json.dumps({"path": f"{name}.jpg", "labels": ["dog"]}))
    return read_manifest(root / "train.jsonl", root=root)


def corel5k(root: Path, name: str) -> Records:
    for below in ("labels", "train_jpeg"):
        (root / below).mkdir()
    (root / "labels" / "words").write_text("dog\n")
    (root / "labels" / "training_label").write_text(f"{name} 1\n")
    return read_corel5k(root)


def cvat(root: Path, name: str) -> Records:
    (root / "annotations.xml").write_text(f'<annotations><image name="{name}.jpg"/></annotations>')
    return read_cvat(root / "annotations.xml")


def roboflow(root: Path, name: str) -> Records:
    (root / "train").mkdir()
    (root / "train" / "_classes.csv").write_text(f"filename, dog\n{name}.jpg, 1\n")
    return read_roboflow(root)


NAMES = ["../secret", "a/../../secret", "{outside}/secret", "a\\..\\..\\secret", "C:\\secret", "\\\\host\\secret", ".."]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("read", [coco, voc, csv, json_lines, corel5k, cvat, roboflow])
def test_a_name_that_leaves_the_folder_is_refused(
    read: Callable[[Path, str], Records], name: str, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    for folder in (root / "a", root / "val2017" / "a"):
        folder.mkdir(parents=True)
    for folder in (tmp_path, root):  # where the names lead from the root, and from a folder of images in it
        Image.new("RGB", (8, 8)).save(folder / "secret.jpg")
    name = name.format(outside=tmp_path)
    refusal = "expected an image number" if read is corel5k else "expected a path inside the image folder"
    if name == ".." and read not in (voc, corel5k):
        name = "../."  # to which they add the suffix
    with pytest.raises(ValueError, match=refusal):
        read(root, name)


def test_a_folder_contains_its_files_and_linked_files(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (root, elsewhere):
        folder.mkdir()
        Image.new("RGB", (8, 8)).save(folder / f"{folder.name}.jpg")
    assert [path.name for path in all_of(read_folder(root))] == ["data.jpg"]
    (root / "link").symlink_to(elsewhere)
    assert [path.name for path in all_of(read_folder(root))] == ["data.jpg", "elsewhere.jpg"]


def all_of(records: Records) -> list[Path]:
    return [records.path(index) for index in range(len(records))]


def test_files_are_checked_per_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "in/b.jpg"):
        (tmp_path / name).touch()
    check_files(tmp_path, ["a.jpg", "in/b.jpg"], Path("list.txt"))
    with pytest.raises(
        FileNotFoundError, match=r"3 of 4 images listed in 'list.txt' are not .*first in/a.jpg, no/b.jpg, b.jpg:"
    ):
        check_files(tmp_path, ["a.jpg", "in/a.jpg", "no/b.jpg", "b.jpg"], Path("list.txt"))
    with pytest.raises(FileNotFoundError, match=r"no folder '.*gone': put the images of 'list.txt' there"):
        check_files(tmp_path / "gone", ["a.jpg"], Path("list.txt"))
