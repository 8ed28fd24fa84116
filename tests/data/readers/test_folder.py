"""Folders of unlabelled images: files found and skipped, and errors for empty folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mlssl.data.readers.folder import read_folder


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((20, 12), 60).convert("RGB").save(path)


def found(root: Path) -> list[str]:
    records = read_folder(root)
    return [records.path(index).relative_to(root).as_posix() for index in range(len(records))]


def test_finds_images_recursively_ordered_by_path(tmp_path: Path) -> None:
    names = ["z.jpg", "a/b/c/deep.png", "a/x.JPEG", "b.tif", "ä/ö.webp"]
    for name in names:
        picture(tmp_path / name)
    assert found(tmp_path) == sorted(names)
    records = read_folder(str(tmp_path))
    assert records.labels is None
    assert records.classes == ()
    assert records.image_ids.tolist() == [0, 1, 2, 3, 4]
    assert all(records.image(index).shape == (12, 20, 3) for index in range(5))


def test_skips_hidden_files_hidden_folders_and_other_files(tmp_path: Path) -> None:
    picture(tmp_path / "seen.jpg")
    for hidden in ("._seen.jpg", ".cache/a.jpg", "sub/.b.png"):
        picture(tmp_path / hidden)
    for other in ("notes.txt", "sub/jpg", "archive.jpg.zip"):
        (tmp_path / other).touch()
    (tmp_path / "folder.jpg").mkdir()
    assert found(tmp_path) == ["seen.jpg"]


def test_other_extensions_can_be_requested(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.jpg")
    for extensions in (["png"], [".PNG"]):
        records = read_folder(tmp_path, extensions)
        assert [records.path(index).name for index in range(len(records))] == ["a.png"]


def test_follows_links_to_files_and_folders_but_visits_none_twice(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    picture(root / "own" / "a.jpg")
    picture(elsewhere / "b.jpg")
    (root / "linked").symlink_to(elsewhere)
    (root / "again").symlink_to(root / "own")
    (root / "own" / "circle").symlink_to(root)
    (root / "c.jpg").symlink_to(elsewhere / "b.jpg")
    (root / "broken.jpg").symlink_to(tmp_path / "nothing")
    assert found(root) == ["c.jpg", "linked/b.jpg", "own/a.jpg"]


def test_reports_a_missing_folder_or_one_without_images(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder '.*gone': pass a folder of images"):
        read_folder(tmp_path / "gone")
    for name in ("a.txt", "sub/b.csv", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(
        FileNotFoundError, match=r"no image below '.*', which contains 2 other files: the extensions are .*\.bmp, "
    ):
        read_folder(tmp_path)
    with pytest.raises(NotADirectoryError, match=r"a\.txt' is a file: pass the folder of the images"):
        read_folder(tmp_path / "a.txt")
    with pytest.raises(TypeError, match=r"extensions='png' is one string: pass a list"):
        read_folder(tmp_path, "png")
