"""CVAT for images 1.1: labels of shapes and tags, subsets, and folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlssl.data.readers.cvat import SHAPES, read_cvat

META = (
    "<meta><task><labels><label><name>car</name></label><label><name>night</name></label>"
    "<label><name>nose</name><parent>person</parent></label></labels></task></meta>"
)
IMAGES = """<image id="0" name="a/1.jpg" subset="Train"><box label="car" xtl="1"/><tag label="night"/></image>
<image id="1" name="2.jpg" subset="Train"/><image id="2" name="3.jpg" subset="Validation"><mask label="car"/></image>"""


def write(folder: Path, inside: str, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    path = folder / "annotations.xml"
    path.write_text(f'<?xml version="1.0" encoding="utf-8"?><annotations>{inside}</annotations>')
    return path


def test_reads_shapes_and_tags_of_the_declared_labels(tmp_path: Path) -> None:
    path = write(tmp_path, META + IMAGES, "images/a/1.jpg", "images/2.jpg", "images/3.jpg", "images/4.jpg")
    records = read_cvat(path)
    assert records.labels is not None
    assert (records.classes, records.labels.tolist()) == (("car", "night"), [[1, 1], [0, 0], [1, 0]])
    assert records.left_out == {".jpg": 1}
    assert [len(read_cvat(path, subset=one)) for one in ("Train", "Validation")] == [2, 1]
    assert read_cvat(path, classes=["night"], leave_out_others=True).left_out["labels of other classes"] == 2
    with pytest.raises(
        ValueError, match=r"has no image of the subset 'Test': .* existing one, Train, Validation, or val_fraction"
    ):
        read_cvat(path, subset="Test")


def test_images_are_next_to_the_file_in_a_folder_or_in_a_subset_folder(tmp_path: Path) -> None:
    beside = write(tmp_path / "beside", IMAGES, "a/1.jpg", "2.jpg", "3.jpg")
    assert read_cvat(beside).classes == ("car", "night")
    other = write(tmp_path / "other", IMAGES)
    assert read_cvat(other, tmp_path / "beside").path(0) == tmp_path / "beside" / "a" / "1.jpg"
    of_subset = write(
        tmp_path / "subset", IMAGES, "images/Train/a/1.jpg", "images/Train/2.jpg", "images/Validation/3.jpg"
    )
    assert read_cvat(of_subset).path(2).parts[-3:] == ("images", "Validation", "3.jpg")


def test_every_kind_of_shape_counts_once(tmp_path: Path) -> None:
    shapes = "".join(f'<{shape} label="{shape}"/>' * 2 for shape in sorted(SHAPES))
    path = write(tmp_path, f'<image name="1.jpg">{shapes}<points/></image>', "1.jpg")
    with pytest.raises(ValueError, match=r"annotations\.xml' has a points without a label in '1\.jpg': name it"):
        read_cvat(path)
    records = read_cvat(write(tmp_path, f'<image name="1.jpg">{shapes}</image>'))
    assert records.classes == tuple(sorted(SHAPES))
    assert np.asarray(records.labels).all()


@pytest.mark.parametrize(
    ("inside", "sentence"),
    [
        ('<track id="0"/>', r"contains tracks of a video: export the task in CVAT's format 'CVAT for images 1\.1'"),
        ("", "contains no image: export the task"),
        ('<image name="1.jpg"/><image name="./1.jpg"/>', "image 2 of .* repeats './1.jpg' of image 1: keep one"),
        ('<image name="../1.jpg"/>', r"names the image '\.\./1\.jpg': expected a path inside the image folder"),
        ("<image/>", "names the image None: expected a path"),
        (f'{META}<image name="1.jpg"><tag label="caar"/></image>', r"image 1 of .* 'caar' \(did you mean 'car'\?\)"),
        ('<!DOCTYPE a><image name="1.jpg"/>', "is not XML"),
    ],
)
def test_refuses_unreadable_files(tmp_path: Path, inside: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        read_cvat(write(tmp_path, inside, "1.jpg"))
    assert "annotations.xml" in str(caught.value)


def test_other_xml_is_named(tmp_path: Path) -> None:
    (tmp_path / "1.xml").write_text("<annotation/>")
    with pytest.raises(ValueError, match=r"1\.xml' is XML of 'annotation', not CVAT: export the task"):
        read_cvat(tmp_path / "1.xml")
