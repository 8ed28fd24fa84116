"""Packing: standard archives, reproducible bytes, complete or absent, and nothing overwritten."""

from __future__ import annotations

import errno
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mlssl.atomic
import mlssl.data.packing
from mlssl.data.packing import pack_shards
from mlssl.data.readers.shards import read_shards
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.data.records import Records

NAMES = ["a/1.jpg", "a/2.jpg", "b/3.jpg", "4.jpg"]


def content(tree: Path) -> dict[str, bytes]:
    return {path.relative_to(tree).as_posix(): path.read_bytes() for path in tree.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def records(tmp_path: Path) -> Records:
    for number, name in enumerate(NAMES):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((20 + number, 16), 60).save(tmp_path / "photos" / name)
    return Records(NAMES, root=tmp_path / "photos")


def test_archives_hold_the_files_under_their_names(records: Records, tmp_path: Path) -> None:
    pack_shards({"train": records}, tmp_path / "new" / "packed")
    assert sorted(content(tmp_path / "new")) == ["packed/train/000000.tar", "packed/train/index.jsonl"]
    with tarfile.open(tmp_path / "new" / "packed" / "train" / "000000.tar") as tar:
        assert tar.getnames() == NAMES
        tar.extractall(tmp_path / "again", filter="data")
    assert content(tmp_path / "again") == content(tmp_path / "photos")


def test_webdataset_reads_them_each_image_once(records: Records, tmp_path: Path) -> None:
    from webdataset import tariterators as iterators

    pack_shards({"train": records}, tmp_path / "packed")
    # `WebDataset` itself does the same, but leaves its files open.
    with (tmp_path / "packed" / "train" / "000000.tar").open("rb") as file:
        samples = list(iterators.group_by_keys(iterators.tar_file_expander([{"url": "0", "stream": file}])))
    assert [f"{one['__key__']}.jpg" for one in samples] == NAMES
    assert [one["jpg"] for one in samples] == [records.path(row).read_bytes() for row in range(4)]


def test_the_same_images_give_the_same_bytes(records: Records, tmp_path: Path) -> None:
    for name in ("one", "two"):
        pack_shards({"train": records, "val": records.subset([3, 0])}, tmp_path / name)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_archives_respect_the_size_limit_except_for_larger_images(tmp_path: Path) -> None:
    sizes = [300_000, 600_000, 200_000, 2_500_000, 0, 100_000, 899_000]
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}.jpg").write_bytes(bytes(size))
    records = Records([f"{number}.jpg" for number in range(len(sizes))], root=tmp_path)
    pack_shards({"train": records}, tmp_path / "packed", 1)
    found = read_shards(tmp_path / "packed")
    assert [found.path(row).parent.name for row in range(7)] == [f"{one:06d}.tar" for one in (0, 0, 1, 2, 3, 3, 4)]


@pytest.mark.parametrize(
    "name", ["x" * 120 + "/" + "y" * 130 + ".jpg", "ä ö.jpg", os.fsdecode(b"\xff\xfe.jpg"), "a\nb.jpg", "no_ending"]
)
def test_any_name_of_a_file_survives(name: str, tmp_path: Path) -> None:
    (tmp_path / "photos" / name).parent.mkdir(parents=True)
    Image.new("RGB", (4, 3), (9, 9, 9)).save(tmp_path / "photos" / name, format="png")
    Image.new("RGB", (4, 3), (7, 7, 7)).save(tmp_path / "photos" / "last.png")
    pack_shards({"train": Records([name, "last.png"], root=tmp_path / "photos")}, tmp_path / "packed")
    found = read_shards(tmp_path / "packed")
    assert found.path(0) == tmp_path / "packed" / "train" / "000000.tar" / name
    assert [int(found.image(row).max()) for row in (0, 1)] == [9, 7]


@pytest.mark.parametrize("there", ["folder", "file", "link"])
def test_existing_files_are_never_changed(there: str, records: Records, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    if there == "folder":
        packed.mkdir()
        (packed / "mine").write_text("1")
    elif there == "file":
        packed.write_text("1")
    else:
        packed.symlink_to("nowhere")
    with pytest.raises(FileExistsError, match=r"'.*packed' exists, and nothing in it was changed: choose another path"):
        pack_shards({"train": records}, packed)
    assert names(tmp_path) == ["packed", "photos"]
    assert there != "folder" or content(packed) == {"mine": b"1"}


def test_files_created_meanwhile_are_not_changed(records: Records, tmp_path: Path) -> None:
    def write_and_make() -> None:
        with mlssl.atomic.folder_written_aside(tmp_path / "packed") as aside:
            (aside / "new").write_text("2")
            (tmp_path / "packed").mkdir()

    with pytest.raises(FileExistsError, match="exists, and nothing in it was changed"):
        write_and_make()
    assert names(tmp_path) == ["packed", "photos"]
    assert content(tmp_path / "packed") == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_packing_that_fails_leaves_nothing(
    error: BaseException, records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = mlssl.data.packing._line
    left = [3]

    def failing(*arguments: Any) -> str:
        left[0] -= 1
        if not left[0]:
            raise error
        return line(*arguments)

    monkeypatch.setattr(mlssl.data.packing, "_line", failing)
    with pytest.raises(type(error), match="nothing new was kept" if isinstance(error, OSError) else None):
        pack_shards({"train": records}, tmp_path / "packed")
    assert names(tmp_path) == ["photos"]


def test_images_that_cannot_be_packed_are_refused_before_writing(records: Records, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    outside = Records([root / NAMES[0]])
    above = Records(["../photos/4.jpg"], root=root)
    for refused in (outside, above):
        with pytest.raises(ValueError, match=r"names the image '.*': expected a path inside the image folder"):
            pack_shards({"train": refused}, tmp_path / "packed")
    with pytest.raises(ValueError, match=r"'4\.jpg' is in Records.* twice: leave one of them out"):
        pack_shards({"train": Records(["4.jpg", "a/1.jpg", "./4.jpg"], root=root)}, tmp_path / "packed")
    with pytest.raises(FileNotFoundError, match=r"5\.jpg' is not a file: pack a data set whose images are files"):
        pack_shards({"train": records, "val": Records(["5.jpg"], root=root)}, tmp_path / "packed")
    with pytest.raises(FileNotFoundError, match=r"photos/a' is not a file"):
        pack_shards({"train": Records(["a"], root=root)}, tmp_path / "packed")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        pack_shards({"train": synthetic_scenes("train", count=2)}, tmp_path / "packed")
    pack_shards({"train": records}, tmp_path / "once")
    with pytest.raises(FileNotFoundError, match=r"once/train/000000\.tar/a/1\.jpg' is not a file"):
        pack_shards({"train": read_shards(tmp_path / "once")}, tmp_path / "packed")
    with pytest.raises(ValueError, match="megabytes=0 was given: pass the size of an archive, at least 1"):
        pack_shards({"train": records}, tmp_path / "packed", 0)
    assert names(tmp_path) == ["once", "photos"]


def test_pixels_are_those_of_the_files(records: Records, tmp_path: Path) -> None:
    pack_shards({"train": records}, tmp_path / "packed")
    found = read_shards(tmp_path / "packed")
    assert all(np.array_equal(found.image(row), records.image(row)) for row in range(4))
