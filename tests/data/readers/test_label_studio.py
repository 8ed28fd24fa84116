"""Label Studio's JSON and JSON-MIN: names, annotators who disagree, and where the images are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlssl.data.readers.label_studio import read_label_studio
from mlssl.data.records import Records


def result(*names: str, kind: str = "choices", control: str = "scene") -> dict[str, Any]:
    return {"from_name": control, "to_name": "image", "type": kind, "value": {kind: list(names), "x": 1.5}}


def task(image: str, *results: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "id": 1,
        "data": {"image": image, "caption": "a street"},
        "annotations": [{"result": one} for one in results],
    } | more


def write(folder: Path, tasks: Any, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    path = folder / "export.json"
    path.write_text(json.dumps(tasks))
    return path


def shown(records: Records) -> list[list[int]]:
    assert records.labels is not None
    return records.labels.tolist()


def test_reads_choices_and_labels_of_every_shape(tmp_path: Path) -> None:
    boxes = [result("car", kind="rectanglelabels", control="box"), result("sky", kind="polygonlabels", control="box")]
    tasks = [
        task("/data/upload/1/0a1b2c3d-1.jpg", [result("night", "rain"), *boxes]),
        task("/data/local-files/?d=street%5C2.jpg", []),
        {"data": {"image": "3.jpg"}, "completions": [{"result": [result("night")]}]},
    ]
    path = write(tmp_path, tasks, "upload/1/0a1b2c3d-1.jpg", "street/2.jpg", "3.jpg")
    records = read_label_studio(path)
    assert records.classes == ("car", "night", "rain", "sky")
    assert shown(records) == [[1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert read_label_studio(path, label_columns="box").classes == ("car", "sky")
    with pytest.raises(
        ValueError, match=r"export.json' has no control 'sceen' \(did you mean 'scene'\?\): it has box, scene"
    ):
        read_label_studio(path, label_columns=["sceen"])
    few = read_label_studio(path, classes=["rain", "car"], leave_out_others=True)
    assert (shown(few)[0], few.left_out["labels of other classes"]) == ([1, 1], 3)


def test_skipped_and_disputed_labels_are_unknown(tmp_path: Path) -> None:
    skipped = task("2.jpg", [result("night")])
    skipped["annotations"][0]["was_cancelled"] = True
    tasks = [task("1.jpg", [result("night", "rain")], [result("night")]), skipped, task("3.jpg"), task("4.jpg", [])]
    records = read_label_studio(write(tmp_path, tasks, *(f"{number}.jpg" for number in range(1, 6))))
    assert shown(records) == [[1, -1], [-1, -1], [-1, -1], [0, 0]]
    assert records.left_out == {
        ".jpg": 1,
        "tasks skipped or not annotated": 2,
        "labels that annotators disagree on": 1,
    }
    unlabelled = read_label_studio(write(tmp_path, [task("1.jpg"), task("2.jpg")]))
    assert unlabelled.labels is None


def test_reads_json_min(tmp_path: Path) -> None:
    tasks = [
        {
            "id": 5,
            "image": "/data/upload/1/0a1b2c3d-1.jpg",
            "scene": {"choices": ["night", "rain"]},
            "annotation_id": 1,
        },
        {"id": 5, "image": "/data/upload/1/0a1b2c3d-1.jpg", "scene": {"choices": ["night"]}, "annotation_id": 2},
        {
            "id": 6,
            "image": "2.jpg",
            "box": [{"rectanglelabels": ["car"], "x": 1}],
            "updated_at": "2024",
            "annotation_id": 3,
        },
    ]
    records = read_label_studio(write(tmp_path, tasks, "1.jpg", "2.jpg"))
    assert (records.classes, shown(records)) == (("car", "night", "rain"), [[0, 1, -1], [1, 0, 0]])
    single = [{"id": 1, "image": "1.jpg", "choice": "night"}, {"id": 2, "image": "2.jpg", "choice": "day"}]
    path = write(tmp_path, single)
    with pytest.raises(
        ValueError, match=r"task 1 of .*the text 'night' as 'choice', .* \(--data\.label_columns\).*\[choice\]"
    ):
        read_label_studio(path)
    assert shown(read_label_studio(path, label_columns="choice")) == [[0, 1], [1, 0]]
    with pytest.raises(ValueError, match=r"task 1 of .* has an empty label: write a name, or leave it out"):
        read_label_studio(write(tmp_path, [single[0] | {"choice": " "}]), label_columns="choice")


@pytest.mark.parametrize(
    ("image", "file"),
    [
        ("/data/upload/3/0a1b2c3d-a_b.jpg", "media/upload/3/0a1b2c3d-a_b.jpg"),
        ("/data/upload/3/0a1b2c3d-a_b.jpg", "media/0a1b2c3d-a_b.jpg"),
        ("/data/upload/3/0a1b2c3d-a_b.jpg", "media/a_b.jpg"),
        ("/data/upload/0a1b2c3d-caf%C3%A9.jpg", "media/café.jpg"),
        ("/data/local-files/?d=mnt/photos/a/1%20.jpg", "media/a/1 .jpg"),
        ("http://host:8080/data/local-files/?d=a/1.jpg", "media/a/1.jpg"),
        ("s3://bucket/photos/1.jpg", "media/photos/1.jpg"),
        ("https://host/photos/1.jpg?sig=x/y", "media/1.jpg"),
        ("/home/me/photos/1.jpg", "media/1.jpg"),
    ],
)
def test_images_are_found_by_path_suffix(tmp_path: Path, image: str, file: str) -> None:
    path = write(tmp_path, [task(image, [result("night")])], file)
    assert read_label_studio(path, tmp_path / "media").path(0) == tmp_path / file


@pytest.mark.parametrize(
    ("tasks", "sentence"),
    [
        ([], "contains no task: export the project in Label Studio's format JSON or JSON-MIN"),
        ({"data": {}}, "contains something other than a list of tasks"),
        ([1], "contains something other than a list of tasks"),
        ([task("1.jpg"), {"id": 2}], "task 2 of .* has no data, but others have"),
        (
            [task("a street")],
            r"task 1 of .* has 0 image paths \(image, caption\): pass path_column \(--data\.path_col",
        ),
        ([{"data": {"a": "1.jpg", "b": "2.jpg"}}], r"has 2 image paths \(a, b\)"),
        ([task("1.jpg", annotations=3)], "task 1 of .* has annotations 3: export the project again"),
        ([task("1.jpg", annotations=[{"result": {}}])], "has the result {}: expected a list"),
        ([task("1.jpg", [result("")])], r"has choices \[''\]: expected a list of non-empty names"),
        ([task("1.jpg", [result(None)])], r"has choices \[None\]"),  # type: ignore[arg-type]
        ([task("1.jpg", [result("a")]), task("/x/1.jpg", [])], "task 2 of .* repeats '1.jpg' of task 1: keep one"),
        ([task("../1.jpg", [result("a")])], r"names the image '\.\./1\.jpg': expected a path inside the image folder"),
    ],
)
def test_refuses_unreadable_files(tmp_path: Path, tasks: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        read_label_studio(write(tmp_path, tasks, "1.jpg"))
    assert "export.json" in str(caught.value)


def test_refuses_files_that_are_not_json_or_lack_a_key(tmp_path: Path) -> None:
    path = write(tmp_path, [task("1.jpg", [result("a")])], "1.jpg")
    with pytest.raises(ValueError, match=r"task 1 of .* has no 'picture': it has image, caption"):
        read_label_studio(path, path_column="picture")
    with pytest.raises(
        FileNotFoundError, match=r"1 of 1 images listed in .* are not in '.*gone', first 1\.jpg|no folder"
    ):
        read_label_studio(path, tmp_path / "gone")
    for text in ("[{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"export\.json' is not JSON \(.*\): export the project again"):
            read_label_studio(path)
    assert np.asarray(read_label_studio(write(tmp_path, [task("1.jpg", [result("a")])])).labels).shape == (1, 1)
