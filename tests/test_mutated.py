"""Randomly changed annotation files and images: read, or refused with a message of the library, and never a crash."""

from __future__ import annotations

import json
import random
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mlssl
from mlssl.data.decoding import decode_rgb
from mlssl.data.packing import pack_shards
from mlssl.data.readers.coco import read_coco
from mlssl.data.readers.corel5k import read_corel5k
from mlssl.data.readers.cvat import read_cvat
from mlssl.data.readers.label_studio import read_label_studio
from mlssl.data.readers.manifest import read_manifest
from mlssl.data.readers.python_sets import read_dataset
from mlssl.data.readers.shards import read_shards
from mlssl.data.readers.voc import read_voc
from mlssl.data.records import Records

INPUTS = [200, pytest.param(2000, marks=pytest.mark.thorough)]
"""Of each of nine kinds: 1,800 in every run, 18,000 by `pytest -m thorough tests/test_mutated.py`."""

JUNK = [None, True, -1, 0, 2**70, 1e308, float("nan"), "", "..", "../x", "/etc/passwd", "\0", "ä" * 300, [], {}, [[]]]
FORMATS = ["jpeg", "png", "gif", "bmp", "tiff", "webp"]


def with_other_bytes(content: bytes, dice: random.Random) -> bytes:
    """Change, remove, repeat or add a few bytes."""
    changed = bytearray(content)
    for _ in range(dice.randint(1, 6)):
        start = dice.randrange(len(changed) + 1)
        end = min(len(changed), start + dice.choice([1, 1, 2, 30]))
        changed[start:end] = dice.choice(
            [b"", bytes(changed[start:end]) * 2, dice.randbytes(end - start), b"\xff", b"-", b"9" * 30, b"{", b"\n\n"]
        )
    return bytes(changed)


def with_other_values(content: Any, dice: random.Random) -> Any:
    """Replace one value in nested lists and mappings with junk, or remove it."""
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    if not keys:
        return dice.choice(JUNK)
    key = dice.choice(keys)
    if isinstance(content[key], (dict, list)) and dice.random() < 0.9:
        content[key] = with_other_values(content[key], dice)
    elif dice.random() < 0.3:
        del content[key]
    else:
        content[key] = dice.choice(JUNK)
    return content


def check(read: Callable[[], Any], mention: Path) -> bool:
    """Whether it was read; an error must be a documented one, in a sentence that names the location."""
    try:
        read()
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
    else:
        return True
    assert str(mention) in message
    return False


@pytest.mark.parametrize("number", INPUTS)
def test_mutated_coco_annotations(number: int, tmp_path: Path) -> None:
    for name in ("annotations", "val2017"):
        (tmp_path / name).mkdir()
    images = [{"id": 7 * index, "file_name": f"{index}.jpg", "width": 9, "height": 9} for index in range(5)]
    for image in images:
        (tmp_path / "val2017" / str(image["file_name"])).touch()
    boxes = [
        {"id": one, "image_id": 7 * (one % 5), "category_id": 1 + one % 3, "bbox": [0, 0, 1, 1]} for one in range(9)
    ]
    categories = [{"id": one, "name": f"class {one}"} for one in (3, 1, 2)]
    path = tmp_path / "annotations" / "instances_val2017.json"
    whole = json.dumps({"images": images, "annotations": boxes, "categories": categories})
    read = 0
    for seed in range(number):
        dice = random.Random(seed)
        if seed % 2:
            path.write_bytes(with_other_bytes(whole.encode(), dice))
        else:
            path.write_text(json.dumps(with_other_values(json.loads(whole), dice)))
        read += check(lambda: read_coco(tmp_path, "val2017"), tmp_path)
    assert 0 < read < number, "all were read, or none: the changes test nothing"


@pytest.mark.parametrize("number", INPUTS)
def test_mutated_corel5k_labels(number: int, tmp_path: Path) -> None:
    for name in ("labels", "train_jpeg"):
        (tmp_path / name).mkdir()
    for image in range(1, 10):
        (tmp_path / "train_jpeg" / f"{image}.jpeg").touch()
    whole = {"words": b"sky\nsea\nsun\n", "training_label": b"1 1 2\n2 3\n3\n4 1\n5 2 3\n6 1\n"}
    read = 0
    for seed in range(number):
        dice = random.Random(seed)
        changed = dice.choice(list(whole))
        for name, content in whole.items():
            (tmp_path / "labels" / name).write_bytes(with_other_bytes(content, dice) if name == changed else content)
        read += check(lambda: read_corel5k(tmp_path), tmp_path)
    assert 0 < read < number, "all were read, or none: the changes test nothing"


@pytest.mark.parametrize("number", INPUTS)
def test_mutated_voc_lists_and_annotations(number: int, tmp_path: Path) -> None:
    folder = tmp_path / "VOC2012"
    for below in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (folder / below).mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "folder.txt").mkdir()
    stems = [f"2008_{number:06}" for number in range(4)]
    whole = {"ImageSets/Main/trainval.txt": "".join(f"{stem}\n" for stem in stems).encode()}
    objects = "<object><name>dog</name><difficult>1</difficult></object><object><name>cat</name></object>"
    for stem in stems:
        (folder / "JPEGImages" / f"{stem}.jpg").touch()
        whole[f"Annotations/{stem}.xml"] = f"<?xml version='1.0'?><annotation>{objects}</annotation>".encode()
    read = 0
    for seed in range(number):
        dice = random.Random(seed)
        changed = dice.choice(list(whole))
        for name, content in whole.items():
            (folder / name).write_bytes(with_other_bytes(content, dice) if name == changed else content)
        read += check(lambda: read_voc(tmp_path), tmp_path)
    assert 0 < read < number, "all were read, or none: the changes test nothing"


@pytest.mark.parametrize("number", INPUTS)
def test_mutated_manifests(number: int, tmp_path: Path) -> None:
    for index in range(4):
        (tmp_path / f"{index}.jpg").touch()
    lines = [{"path": f"{index}.jpg", "labels": ["sky"] * (index % 2), "unknown": ["sea"]} for index in range(4)]
    table = "path,labels,unknown\n" + "".join(f"{index}.jpg,{'sky|sun' * (index % 2)},sea\n" for index in range(4))
    read = 0
    for seed in range(number):
        dice = random.Random(seed)
        path = tmp_path / ("train.csv" if seed % 2 else "train.jsonl")
        if seed % 2:
            path.write_bytes(with_other_bytes(table.encode(), dice))
        elif seed % 4:
            path.write_bytes(with_other_bytes("\n".join(map(json.dumps, lines)).encode(), dice))
        else:
            changed = with_other_values(json.loads(json.dumps(lines)), dice)
            path.write_text("\n".join(map(json.dumps, changed)) if isinstance(changed, list) else json.dumps(changed))
        read += check(lambda path=path: read_manifest(path), tmp_path)  # type: ignore[misc]
    assert 0 < read < number, "all were read, or none: the changes test nothing"


@pytest.mark.parametrize("number", INPUTS)
def test_mutated_tasks_of_label_studio(number: int, tmp_path: Path) -> None:
    for index in range(4):
        (tmp_path / f"{index}.jpg").touch()
    results = [{"from_name": "a", "type": "choices", "value": {"choices": ["sky", "sea"]}}]
    tasks = [
        {"id": index, "data": {"image": f"/data/upload/1/{index}.jpg"}, "annotations": [{"result": results}] * index}
        for index in range(4)
    ]
    least = [
        {"id": index, "image": f"{index}.jpg", "a": {"choices": ["sky"]}, "annotation_id": 1} for index in range(4)
    ]
    path, read = tmp_path / "tasks.json", 0
    for seed in range(number):
        dice = random.Random(seed)
        whole = json.dumps(tasks if seed % 4 < 2 else least)
        if seed % 2:
            path.write_bytes(with_other_bytes(whole.encode(), dice))
        else:
            path.write_text(json.dumps(with_other_values(json.loads(whole), dice)))
        read += check(lambda: read_label_studio(path), tmp_path)
    assert 0 < read < number, "all were read, or none: the changes test nothing"


@pytest.mark.parametrize("number", INPUTS)
def test_mutated_xml_of_cvat(number: int, tmp_path: Path) -> None:
    for index in range(4):
        (tmp_path / f"{index}.jpg").touch()
    label = "<meta><task><labels><label><name>sky</name></label></labels></task></meta>"
    images = "".join(f'<image id="{index}" name="{index}.jpg"><box label="sky"/></image>' for index in range(4))
    whole = f'<?xml version="1.0" encoding="utf-8"?><annotations>{label}{images}</annotations>'.encode()
    path, read = tmp_path / "annotations.xml", 0
    for seed in range(number):
        path.write_bytes(with_other_bytes(whole, random.Random(seed)))
        read += check(lambda: read_cvat(path), tmp_path)
    assert 0 < read < number, "all were read, or none: the changes test nothing"


@pytest.mark.parametrize("number", INPUTS)
def test_mutated_items_of_a_data_set(number: int) -> None:
    """Items may be any objects: invalid ones are refused with a reason, at once or when the image is read."""
    read = 0
    for seed in range(number):
        dice = random.Random(seed)
        items: Any = [{"image": np.full((6, 8, 3), index, np.uint8), "target": [index % 3]} for index in range(4)]
        for item in dice.sample(items, dice.randint(0, 2)):
            key = dice.choice(["image", "target"])
            item[key] = dice.choice([*JUNK, np.zeros(3), np.zeros((2, 2, 3)), [7], [0, 0], [[0]], (1, 2), "sky"])
            if dice.random() < 0.2:
                del item[key]
        try:
            records = read_dataset(items, ["sky", "sea", "sun"], target="target")
            for index in range(len(records)):
                pixels = records.image(index)
                assert (pixels.dtype, pixels.shape[2:]) == (np.uint8, (3,))
        except (ValueError, TypeError, KeyError) as error:
            raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        else:
            read, raised_in = read + 1, Path(mlssl.__file__)
        assert raised_in.is_relative_to(Path(mlssl.__file__).parent), seed
    assert 0 < read < number, "all were read, or none: the changes test nothing"


@pytest.mark.filterwarnings("ignore")  # Pillow's remarks on what it can still read
@pytest.mark.parametrize("number", INPUTS)
def test_mutated_images(number: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(24, 30, 3), dtype=np.uint8)
    path, whole = tmp_path / "image", {}
    for kind in FORMATS:
        Image.fromarray(pixels).save(path, format=kind)
        whole[kind] = path.read_bytes()

    def decode() -> None:
        decoded = decode_rgb(path)
        assert decoded.dtype == np.uint8
        assert decoded.shape[2:] == (3,)

    read = 0
    for seed in range(number):
        dice = random.Random(seed)
        path.write_bytes(with_other_bytes(whole[FORMATS[seed % len(FORMATS)]], dice))
        read += check(decode, path)
    assert 0 < read < number, "all were read, or none: the changes test nothing"


@pytest.mark.filterwarnings("ignore")  # Pillow's remarks on what it can still read
@pytest.mark.parametrize("number", INPUTS)
def test_mutated_shards(number: int, tmp_path: Path) -> None:
    for index in range(4):
        pixels = np.random.default_rng(index).integers(256, size=(24, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.{('jpg', 'png')[index % 2]}")
    names = sorted(path.name for path in tmp_path.iterdir())
    records = Records(names, [[1, 0], [0, -1], [0, 0], [1, 1]], ["sky", "sea"], root=tmp_path)
    pack_shards({"train": records}, tmp_path / "packed")
    listing, archive = (tmp_path / "packed" / "train" / name for name in ("index.jsonl", "000000.tar"))
    lines, tar = listing.read_bytes().splitlines(), archive.read_bytes()

    def decode() -> None:
        found = read_shards(tmp_path / "packed")
        for index in range(len(found)):
            assert found.image(index).shape[2:] == (3,)

    read = 0
    for seed in range(number):
        dice = random.Random(seed)
        changed, index = list(lines), dice.randrange(len(lines))
        if seed % 3 == 0:
            changed[index] = json.dumps(with_other_values(json.loads(lines[index]), dice)).encode()
        elif seed % 3 == 1:
            changed = with_other_bytes(b"\n".join(lines), dice).splitlines()
        listing.write_bytes(b"\n".join(changed))
        archive.write_bytes(with_other_bytes(tar, dice) if seed % 3 == 2 else tar)
        read += check(decode, tmp_path)
    assert 0 < read < number, "all were read, or none: the changes test nothing"
