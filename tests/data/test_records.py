"""Records use little memory, decode real files, and refuse invalid input with a message."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mlssl.data.decoding import decode_rgb
from mlssl.data.records import Records

PATHS = ["a.jpg", "b/c.png", "d.jpg"]
LABELS = [[1, 0], [0, -1], [0, 0]]


def records(**settings: Any) -> Records:
    return Records(**{"paths": PATHS, "labels": LABELS, "classes": ["sky", "sea"], "root": "photos", **settings})


def constant(path: Path) -> np.ndarray:
    return np.full((4, 5, 3), len(path.name), np.uint8)


# ---------------------------------------------------------------------- contents of records


def test_paths_labels_ids_and_classes_come_back_in_order() -> None:
    given = records(image_ids=[7, 3, 5])
    assert [given.path(index).as_posix() for index in range(3)] == ["photos/a.jpg", "photos/b/c.png", "photos/d.jpg"]
    assert given.labels is not None
    assert given.labels.tolist() == LABELS
    assert given.labels.dtype == np.int8
    assert given.image_ids.tolist() == [7, 3, 5]
    assert given.classes == ("sky", "sea")
    assert len(given) == 3


def test_ids_are_indices_by_default() -> None:
    assert records().image_ids.tolist() == [0, 1, 2]


def test_a_negative_index_counts_from_the_end_and_one_past_it_is_refused() -> None:
    assert records().path(-1) == records().path(2)
    for index in (3, -4):
        with pytest.raises(IndexError):
            records().path(index)


@pytest.mark.parametrize("name", ["ä ö/ü.jpg", os.fsdecode(b"\xff\xfe.jpg"), "a\nb.jpg"])
def test_any_name_of_a_file_survives(name: str) -> None:
    assert str(Records(["first.jpg", name, "last.jpg"]).path(1)) == name


@pytest.mark.parametrize("kind", [bool, np.uint8, np.int64, torch.int32])
def test_labels_of_bool_and_of_any_integer_are_kept_as_int8(kind: Any) -> None:
    labels: Any = [[True, False], [False, False], [True, True]]
    given = torch.tensor(labels, dtype=kind) if isinstance(kind, torch.dtype) else np.array(labels, dtype=kind)
    kept = records(labels=given).labels
    assert kept is not None
    assert kept.tolist() == [[1, 0], [0, 0], [1, 1]]
    assert kept.dtype == np.int8


def test_subset_keeps_ids_labels_and_decoding() -> None:
    kept = records(image_ids=[7, 3, 5], decode=constant).subset([2, 0])
    assert kept.labels is not None
    assert [kept.path(0).name, kept.path(1).name] == ["d.jpg", "a.jpg"]
    assert (kept.image_ids.tolist(), kept.labels.tolist()) == ([5, 7], [[0, 0], [1, 0]])
    assert kept.image(0).shape == (4, 5, 3)
    assert records().subset(np.array([False, True, False])).path(0).name == "c.png"
    assert Records(PATHS).subset([1]).labels is None


def test_with_classes_keeps_the_images_and_orders_the_classes() -> None:
    kept = records(image_ids=[7, 3, 5]).with_classes([1])
    assert kept.labels is not None
    assert (len(kept), kept.classes, kept.labels.tolist()) == (3, ("sea",), [[0], [-1], [0]])
    assert kept.image_ids.tolist() == [7, 3, 5]
    assert records().with_classes(np.array([True, False])).classes == ("sky",)


def test_repr_gives_the_number_of_images() -> None:
    assert repr(records()) == "Records(3 images, 2 classes, root='photos')"
    assert "unlabelled" in repr(Records(PATHS))


def test_118_000_images_of_80_classes_stay_within_15_megabytes() -> None:
    n, classes = 118_000, 80
    large = Records(
        [f"{index:012d}.jpg" for index in range(n)],
        np.zeros((n, classes), np.int8),
        [f"class {index}" for index in range(classes)],
        image_ids=np.arange(n) * 5,
        root="/data/coco/train2017",
    )
    size = len(pickle.dumps(large))
    assert size < 15e6
    assert size < 1.3 * n * (classes + 8 + 8 + 16)  # labels, ids, ends of names, names: nothing else grows with n
    # Few objects: nothing for a worker's reference counting to copy page by page.
    assert sum(isinstance(value, (list, tuple, dict)) and len(value) > classes for value in vars(large).values()) == 0
    assert large.path(-1) == Path("/data/coco/train2017/000000117999.jpg")


def test_a_copy_by_pickle_reads_the_same(tmp_path: Path) -> None:
    Image.fromarray(np.full((6, 8, 3), 200, np.uint8)).save(tmp_path / "a.jpg")
    given = Records(["a.jpg"], [[1]], ["sky"], root=tmp_path)
    copy = pickle.loads(pickle.dumps(given))
    assert np.array_equal(copy.image(0), given.image(0))
    assert (copy.path(0), copy.classes) == (given.path(0), given.classes)


# ---------------------------------------------------------------------- what records refuse


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"paths": []}, ValueError, "records without images were given: pass at least one path"),
        ({"paths": "a.jpg"}, TypeError, "paths is one string, 'a.jpg': pass a list"),
        ({"labels": np.ones((3, 2))}, TypeError, "labels of float64 were given: pass bool or integers"),
        ({"labels": [1, 0, 1]}, ValueError, r"labels of shape \(3,\) were given for 3 images"),
        ({"labels": [[1, 0]]}, ValueError, r"labels of shape \(1, 2\) were given for 3 images"),
        ({"labels": np.ones((3, 0), int)}, ValueError, r"labels of shape \(3, 0\) .* L at least 1"),
        ({"labels": np.ones((3, 4), int)}, ValueError, "2 class names were given for 4 columns"),
        ({"labels": [[2, 0], [0, 0], [255, -2]]}, ValueError, r"labels have the values -2, 2, 255: use only 1 present"),
        ({"labels": None}, ValueError, "2 class names were given without labels"),
        ({"image_ids": [0.0, 1.0, 2.0]}, TypeError, "image ids of float64 were given: pass integers"),
        ({"image_ids": [1, 2]}, ValueError, r"image ids of shape \(2,\) were given for 3 images"),
        ({"image_ids": [4, 5, 4]}, ValueError, "image ids 4 occur more than once"),
    ],
)
def test_refuses_invalid_arguments(settings: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        records(**settings)


def test_refuses_invalid_selections() -> None:
    with pytest.raises(IndexError):
        records().subset([3])
    with pytest.raises(ValueError, match="records without images were given"):
        records().subset([])
    with pytest.raises(ValueError, match="image ids 0 occur more than once"):
        records().subset([0, 0])
    with pytest.raises(IndexError):
        records().with_classes([2])
    with pytest.raises(ValueError, match="L at least 1"):
        records().with_classes([])
    with pytest.raises(ValueError, match="no labels to select classes from"):
        Records(PATHS).with_classes([0])


@pytest.mark.parametrize(
    ("result", "description"),
    [
        (np.zeros((4, 5), np.uint8), r"uint8 and shape \(4, 5\)"),
        (np.zeros((4, 5, 3)), "float64"),
        (np.zeros((3, 4, 5), np.uint8), r"shape \(3, 4, 5\)"),
        (None, "NoneType"),
    ],
)
def test_refuses_invalid_output_of_a_custom_decoder(result: Any, description: str) -> None:
    with pytest.raises(
        TypeError, match=rf"decode returned .*{description}.* for 'photos/a.jpg': return numpy RGB pixels"
    ):
        records(decode=lambda _path: result).image(0)


# ---------------------------------------------------------------------- decoding


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp", "a.ppm"])
def test_decodes_lossless_formats_exactly(tmp_path: Path, name: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / name, lossless=True)
    decoded = decode_rgb(tmp_path / name)
    assert np.array_equal(decoded, pixels)
    assert decoded.flags.writeable


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_decodes_every_mode_to_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (7, 9), (255, 255, 255)).convert(mode).save(path)
    decoded = decode_rgb(path)
    assert decoded.shape == (9, 7, 3)
    assert decoded.dtype == np.uint8
    assert decoded.min() == 255


def test_drops_transparency_without_a_warning(tmp_path: Path) -> None:
    Image.new("P", (4, 4)).save(tmp_path / "a.png", transparency=b"\x00\x10")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_rgb(tmp_path / "a.png").shape == (4, 4, 3)


def test_sixteen_bits_of_gray_become_eight(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 255, 256, 32768, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert decode_rgb(tmp_path / "a.png")[0].tolist() == [[0] * 3, [0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_applies_the_exif_orientation(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: turn by 90°
    image.save(tmp_path / "a.jpg", exif=exif)
    assert decode_rgb(tmp_path / "a.jpg").shape == (8, 4, 3)


def test_names_a_missing_or_broken_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jpg"):
        decode_rgb(tmp_path / "none.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:600])
    for name in ("text.jpg", "cut.jpg"):
        with pytest.raises(ValueError, match=rf"cannot decode '.*{name}' as an image .*: replace the file"):
            decode_rgb(tmp_path / name)


@pytest.mark.parametrize(
    ("classes", "sentence"),
    [
        (["sky", "sky"], "classes 0 and 1 are both named 'sky': merge their columns, or give each its own name"),
        (["caf\u00e9", "cafe\u0301"], "classes 0 and 1 are both named"),
        (["sky", ""], "class 1 has the name '': give each class a non-empty name"),
        (["sky", "\t"], "class 1 has the name"),
        (["sky", None], "class 1 has the name None"),
        ([1, "sky"], "class 0 has the name 1"),
    ],
)
def test_refuses_empty_and_repeated_class_names(classes: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        records(classes=classes)
