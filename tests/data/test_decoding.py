"""Decoding: every image mode becomes correct RGB, or is refused with a reason."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pillow_heif
import pytest
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mlssl.data.bad_images import find_bad_images
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.decoder_messages import decoder_messages
from mlssl.data.decoding import (
    BadImageError,
    DamagedImageWarning,
    FewBitsWarning,
    decode_rgb,
    readable_extensions,
    rgb_pixels,
)
from mlssl.data.readers.folder import read_folder
from mlssl.views.blocks import BlockViews

COLOUR = (200, 60, 10)
GRAY = (77, 77, 77)
DEEP = np.array([[0, 255, 256, 40_000, 65_535]], np.uint16)
SHALLOW = [0, 0, 1, 156, 255]


def plain(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (5, 4), colour)  # type: ignore[arg-type]


def palette(alpha: bool) -> Image.Image:
    image = plain("P", 1)
    image.putpalette([9, 9, 9, *COLOUR])
    if alpha:
        image.info["transparency"] = bytes([255, 10])
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (plain("RGB", COLOUR), COLOUR),
        (plain("L", 77), GRAY),
        (plain("LA", (77, 5)), GRAY),
        (plain("RGBA", (*COLOUR, 3)), COLOUR),
        (plain("1", 1), (255, 255, 255)),
        (palette(alpha=False), COLOUR),
        (palette(alpha=True), COLOUR),
        (plain("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
        (plain("CMYK", (0, 0, 0, 255)), (0, 0, 0)),
        (plain("HSV", (0, 255, 255)), (255, 0, 0)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_a_mode_becomes_rgb_of_the_same_colour(image: Image.Image, expected: tuple[int, ...]) -> None:
    pixels = rgb_pixels(image)
    assert pixels.shape == (4, 5, 3)
    assert np.unique(pixels.reshape(-1, 3), axis=0).tolist() == [list(expected)]


def test_a_cmyk_photograph_keeps_its_colours(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), COLOUR).convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    assert np.abs(decode_rgb(tmp_path / "print.jpg").astype(int) - COLOUR).max() <= 6


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_scaled_and_not_saturated(tmp_path: Path, name: str) -> None:
    Image.fromarray(DEEP).save(tmp_path / name)
    assert decode_rgb(tmp_path / name)[0, :, 0].tolist() == SHALLOW


@pytest.mark.parametrize("dtype", [">u2", "<i4"])
def test_sixteen_bits_in_other_types_are_scaled_too(dtype: str) -> None:
    assert rgb_pixels(Image.fromarray(DEEP.astype(dtype)))[0, :, 1].tolist() == SHALLOW


def test_sixteen_bits_of_each_colour_are_scaled(tmp_path: Path) -> None:
    colours = np.stack([DEEP, DEEP[:, ::-1], DEEP], axis=2)
    cv2.imwrite(str(tmp_path / "a.png"), colours[:, :, ::-1])
    decoded = decode_rgb(tmp_path / "a.png")
    assert np.abs(decoded.astype(int) - (colours >> 8)).max() <= 1  # Pillow may round where others cut
    assert decoded[0, 3].tolist() != [255, 255, 255]


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.array([[0.0, 0.5]], np.float32), "floating-point numbers of unknown range"),
        (np.array([[0, 70_000]], np.int32), "outside 0-65535"),
        (np.array([[-1, 0]], np.int32), "outside 0-65535"),
    ],
)
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, pixels: np.ndarray, reason: str) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(BadImageError, match=rf"cannot decode '.*a.tif' .*{reason}"):
        decode_rgb(tmp_path / "a.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_orientations_are_decoded_upright(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((6, 10, 3), np.uint8)
    upright[:2, :3] = COLOUR  # top left
    turn = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }
    image = Image.fromarray(np.ascontiguousarray(turn[orientation]))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(decode_rgb(tmp_path / "a.png"), upright)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (20_000, 20), (20, 20_000)])
def test_extreme_shapes_are_read_and_give_views(tmp_path: Path, width: int, height: int) -> None:
    Image.new("RGB", (width, height), COLOUR).save(tmp_path / "a.png")
    pixels = decode_rgb(tmp_path / "a.png")
    assert pixels.shape == (height, width, 3)
    assert BlockViews(size=32)(pixels, np.random.default_rng(0)).shape == (2, 4, 3, 32, 32)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (60_000, 60_000)])
def test_refuses_a_file_that_would_unpack_to_a_huge_image_with_its_size(
    width: int, height: int, tmp_path: Path
) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(bytes(1000)), b"IEND"]
    packed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    size = rf"{width} × {height} pixels|{width * height} pixels"
    with pytest.raises(BadImageError, match=rf"cannot decode '.*bomb\.png' as an image .*({size})"):
        decode_rgb(path)


def test_the_error_can_be_pickled_out_of_a_worker() -> None:
    error = pickle.loads(pickle.dumps(BadImageError("cannot decode 'a.jpg'")))
    assert (type(error), str(error)) == (BadImageError, "cannot decode 'a.jpg'")


# ---------------------------------------------------------------------- pixels that are not all there


def photograph(path: Path, **settings: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    Image.fromarray(pixels).resize((128, 96)).save(path, "JPEG", quality=90, **settings)
    return path.read_bytes()


@pytest.mark.parametrize(
    "settings", [{}, {"progressive": True}, {"subsampling": 0}, {"orientation": 6}, {"mode": "CMYK"}]
)
@pytest.mark.parametrize("damage", ["cut and closed", "a hole", "a block of zeros"])
def test_a_damaged_jpeg_is_named(tmp_path: Path, settings: dict[str, object], damage: str) -> None:
    path, settings = tmp_path / "torn.jpg", dict(settings)
    if "orientation" in settings:
        exif = Image.Exif()
        exif[0x0112] = settings.pop("orientation")
        settings["exif"] = exif
    if settings.pop("mode", None):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 4), np.uint8), "CMYK").save(path)
        whole = path.read_bytes()
    else:
        whole = photograph(path, **settings)
    decode_rgb(path)  # without a warning
    third = len(whole) // 3
    path.write_bytes(
        {
            "cut and closed": whole[: 2 * third] + b"\xff\xd9",
            "a hole": whole[: 2 * third] + whole[2 * third + 400 :],
            "a block of zeros": whole[: 2 * third] + bytes(len(whole) - 2 * third - 2) + b"\xff\xd9",
        }[damage]
    )
    with pytest.warns(
        DamagedImageWarning, match=r"'.*torn.jpg' is damaged \(.* JPEG .*\), and some of its pixels are wrong"
    ):
        pixels = decode_rgb(path)
    assert pixels.shape in ((96, 128, 3), (128, 96, 3))
    (tmp_path / "1.jpg").write_bytes(whole)
    ((index, reason),) = find_bad_images(read_folder(tmp_path)).items()
    assert index == 1
    assert "torn.jpg' is damaged" in reason


def test_a_check_of_the_images_refuses_them_or_skips_them(tmp_path: Path) -> None:
    for number in range(3):
        whole = photograph(tmp_path / f"{number}.jpg")
    (tmp_path / "3.jpg").write_bytes(whole[:3000] + b"\xff\xd9")
    settings: dict[str, Any] = {"batch_size": 2, "size": 16, "num_workers": 0, "check_images": True}
    with pytest.raises(BadImageError, match=r"1 of 4 train images cannot be decoded: .*'.*3\.jpg' is damaged"):
        MultiLabelDataModule("folder", tmp_path, **settings).setup()
    data = MultiLabelDataModule("folder", tmp_path, on_bad_image="skip", **settings)
    data.setup()
    assert [path.name for path in data.skipped_images["train"]] == ["3.jpg"]


def test_rotated_jpegs_equal_pillows_pixels(tmp_path: Path) -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        photograph(tmp_path / "a.jpg", exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")))
        assert np.array_equal(decode_rgb(tmp_path / "a.jpg"), expected)


def test_decoder_messages_name_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with decoder_messages("a.tif", kept=("Corrupt",)) as lines:
        os.write(2, b"TIFFReadDirectory: Warning\nCorrupt JPEG data\n")
    assert lines == ["TIFFReadDirectory: Warning", "Corrupt JPEG data"]
    assert capfd.readouterr().err == "a.tif: TIFFReadDirectory: Warning\n"
    with contextlib.suppress(KeyError), decoder_messages("b.tif", kept=()):
        os.write(2, b"before the error\n")
        raise KeyError
    assert capfd.readouterr().err == "b.tif: before the error\n"
    with ThreadPoolExecutor(1) as pool:
        photograph(tmp_path / "a.jpg")
        assert pool.submit(decode_rgb, tmp_path / "a.jpg").result().shape == (96, 128, 3)


# ---------------------------------------------------------------------- more than 8 bits


@pytest.fixture
def x_rays(tmp_path: Path) -> Path:
    for number in range(5):
        values = np.random.default_rng(number).integers(0, 4096, (48, 64)).astype(np.uint16)
        values[0, 0] = 4095
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    return tmp_path


def test_12_bits_in_16_are_named_three_times_and_scaled_by_an_option(
    x_rays: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlssl.data.decoding._warned_about", set())
    with pytest.warns(FewBitsWarning) as caught:
        few = [decode_rgb(path) for path in sorted(x_rays.iterdir())]
    assert len(caught) == 3
    assert re.search(
        r"'.*0\.png' has no value above 4095 of 65535, which leaves 16 of 256 grays: if the images have 12 bits, "
        r"pass white=4095 \(--data.white 4095\)",
        str(caught[0].message),
    )
    assert few[0].max() == 15
    data = MultiLabelDataModule("folder", x_rays, batch_size=2, size=16, white=4095, num_workers=0)
    data.setup()
    assert data.train_records is not None
    assert len(np.unique(data.train_records.image(0))) == 256
    assert pickle.loads(pickle.dumps(data.train_records)).image(0).max() == 255


@pytest.mark.parametrize(
    ("pixels", "white", "expected"),
    [
        (np.array([[0, 2048, 4095]], np.uint16), 4095, [0, 128, 255]),
        (np.array([[0, 50_000, 100_000]], np.int32), 100_000, [0, 128, 255]),
        (np.array([[0, 0.5, 1]], np.float32), 1, [0, 128, 255]),
        (np.array([[0, 255]], np.uint16), 255, [0, 255]),
    ],
)
def test_white_scales_images_of_more_than_8_bits(
    tmp_path: Path, pixels: np.ndarray, white: float, expected: list[int]
) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    assert decode_rgb(tmp_path / "a.tif", white=white)[0, :, 0].tolist() == expected
    with pytest.raises(BadImageError, match=rf"pixels lie between 0 and .* and white={white / 2:g}, pass the highest"):
        decode_rgb(tmp_path / "a.tif", white=white / 2)


def test_invalid_white_levels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"white=4095 and dataset='corel5k' were given: white is for coco, roboflow, voc, manifest, folder",
    ):
        MultiLabelDataModule("corel5k", tmp_path, white=4095)
    for white in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"white={white} was given: pass a white level above 0"):
            MultiLabelDataModule("folder", tmp_path, white=white)


# ---------------------------------------------------------------------- AVIF, JFIF and HEIC


def test_avif_and_jfif_are_read_and_left_out_files_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    image = Image.new("RGB", (64, 48), COLOUR)
    for name, kind in (("0.jpg", "JPEG"), ("1.jfif", "JPEG"), ("2.JPG", "JPEG"), ("3.jpe", "JPEG"), ("4.avif", "AVIF")):
        if kind == "JPEG" or ".avif" in readable_extensions():
            image.save(tmp_path / name, kind)
    for name in ("7.heic", "8.HEIC", "notes.txt", "README"):
        (tmp_path / name).write_bytes(bytes(4) + b"ftypheic" + bytes(20))
    records = read_folder(tmp_path)
    assert len(records) == 4 + (".avif" in readable_extensions())
    assert all(np.abs(records.image(index)[0, 0].astype(int) - COLOUR).max() < 8 for index in range(len(records)))
    assert records.left_out == {".heic": 2, ".txt": 1, "": 1}
    with pytest.raises(BadImageError, match="it is HEIC, which needs the package pillow-heif"):
        decode_rgb(tmp_path / "7.heic")


def test_without_avif_in_pillow_the_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlssl.data.decoding._reads_avif", lambda: False)
    assert ".avif" not in readable_extensions()
    (tmp_path / "a.avif").write_bytes(bytes(3) + b" ftypavif" + bytes(20))
    monkeypatch.setattr(Image, "open", not_identified)
    with pytest.raises(BadImageError, match=r"it is AVIF, which needs Pillow 11.3"):
        decode_rgb(tmp_path / "a.avif")


def not_identified(*_: object) -> None:
    raise UnidentifiedImageError


@pytest.mark.parametrize("bits", [8, 10])
def test_heic_is_read_upright_where_pillow_heif_is_installed(tmp_path: Path, bits: int) -> None:
    pixels = np.zeros((40, 64, 3), np.uint8)
    pixels[:, 32:] = COLOUR
    depth = {"mode": "RGB;16", "data": (pixels.astype(np.uint16) * 257).tobytes()} if bits == 10 else {"mode": "RGB"}
    image = pillow_heif.from_bytes(**{"size": (64, 40), "data": pixels.tobytes(), **depth})
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turned by a quarter: the right half was photographed at the bottom
    image.save(tmp_path / "a.HEIC", quality=95, exif=exif.tobytes(), save_all=False)
    (records, shown) = (read_folder(tmp_path), read_folder(tmp_path).image(0))
    assert (records.left_out, shown.shape) == ({}, (64, 40, 3))
    assert shown[5, 5].max() < 8
    assert np.abs(shown[60, 5].astype(int) - COLOUR).max() < 8
    content = (tmp_path / "a.HEIC").read_bytes()
    for broken in (content[: len(content) // 2], content[:12] + bytes(40)):
        (tmp_path / "b.heic").write_bytes(broken)
        with pytest.raises(BadImageError, match=r"cannot decode '.*b\.heic' as an image \(.+\): replace") as caught:
            decode_rgb(tmp_path / "b.heic")
        assert "needs the package" not in str(caught.value)
