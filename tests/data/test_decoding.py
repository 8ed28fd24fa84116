"""Pictures as they come: every mode becomes RGB of the right values, or is refused with a reason."""

from __future__ import annotations

import pickle
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from mlssl.data.decoding import BadImageError, decode_rgb, rgb_pixels
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
        (np.array([[0.0, 0.5]], np.float32), "floating-point numbers of no known range"),
        (np.array([[0, 70_000]], np.int32), "outside 0-65535"),
        (np.array([[-1, 0]], np.int32), "outside 0-65535"),
    ],
)
def test_pixels_of_no_known_range_are_refused(tmp_path: Path, pixels: np.ndarray, reason: str) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(BadImageError, match=rf"cannot decode '.*a.tif' .*{reason}"):
        decode_rgb(tmp_path / "a.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_orientations_are_put_upright(tmp_path: Path, orientation: int) -> None:
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


def test_the_error_survives_the_way_out_of_a_worker() -> None:
    error = pickle.loads(pickle.dumps(BadImageError("cannot decode 'a.jpg'")))
    assert (type(error), str(error)) == (BadImageError, "cannot decode 'a.jpg'")
