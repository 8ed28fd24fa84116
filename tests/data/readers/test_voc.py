"""VOC's archives: images from the list, labels from the annotations, and difficult objects are unknown."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlssl.cli import main
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.readers.coco import read_coco
from mlssl.data.readers.voc import VOC_CLASSES, read_voc
from mlssl.runs import RUN_FOLDER_VARIABLE

OBJECTS: dict[str, list[tuple[str, int]]] = {
    "2008_000002": [("dog", 0), ("dog", 1), ("person", 1)],
    "2008_000008": [("person", 1), ("person", 0)],
    "2008_000015": [],
    "2008_000019": [("cat", 1)],
}


def annotation(objects: list[tuple[str, int]]) -> str:
    inside = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><part><name>head</name></part></object>"
        for name, difficult in objects
    )
    return f"<annotation><filename>x.jpg</filename>{inside}</annotation>"


def make(root: Path, year: str, split: str, objects: dict[str, list[tuple[str, int]]]) -> Path:
    folder = root / f"VOC{year}"
    for below in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (folder / below).mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in objects))
    for index, (name, inside) in enumerate(objects.items()):
        (folder / "Annotations" / f"{name}.xml").write_text(annotation(inside))
        Image.new("RGB", (20, 30), (index, 0, 0)).save(folder / "JPEGImages" / f"{name}.jpg")
    return folder


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    make(tmp_path, "2012", "trainval", OBJECTS)
    make(tmp_path, "2007", "test", {"000001": [("dog", 0)], "000002": [("train", 0)]})
    return tmp_path


def test_reads_presence_absence_and_the_difficult(devkit: Path) -> None:
    records = read_voc(devkit, "2012/trainval")
    assert records.classes == VOC_CLASSES
    assert len(VOC_CLASSES) == 20
    assert records.image_ids.tolist() == [2008000002, 2008000008, 2008000015, 2008000019]
    assert records.labels is not None
    shown = [{VOC_CLASSES[column]: int(row[column]) for column in np.flatnonzero(row)} for row in records.labels]
    # By VOC's own rule for its class files: 1 with one plain object, 0 (our -1) where all are difficult.
    assert shown == [{"dog": 1, "person": -1}, {"person": 1}, {}, {"cat": -1}]
    assert records.image(0).shape == (30, 20, 3)
    assert read_voc(devkit, "2007/test").image_ids.tolist() == [1, 2]


def test_is_a_format_of_the_data_module_with_its_published_splits(devkit: Path) -> None:
    data = MultiLabelDataModule("voc", devkit, batch_size=2, size=16, num_workers=0)
    data.setup()
    assert data.train_records is not None
    assert data.val_records is not None
    assert (len(data.train_records), len(data.val_records)) == (4, 2)
    assert next(iter(data.train_dataloader()))["labels"].shape == (2, 20)


def test_custom_classes_and_names_are_read(tmp_path: Path) -> None:
    make(tmp_path, "2024", "all", {"house": [("roof", 0)], "yard": [("tree", 0)]})
    records = read_voc(tmp_path, "2024/all", ["tree", "roof"])
    assert records.labels is not None
    assert records.labels.tolist() == [[0, 1], [1, 0]]
    assert records.image_ids.tolist() == [0, 1]


def test_missing_and_broken_files_are_reported_before_training(devkit: Path) -> None:
    folder = devkit / "VOC2012"
    with pytest.raises(ValueError, match="VOC has no split 'trainval': pass year and list, such as '2012/trainval'"):
        read_voc(devkit, "trainval")
    with pytest.raises(FileNotFoundError, match=r"no folder '.*VOC2009': pass as root the folder with VOC2007/"):
        read_voc(devkit, "2009/train")
    (folder / "ImageSets" / "Main" / "cat_trainval.txt").write_text("2008_000002 -1\n")
    with pytest.raises(FileNotFoundError, match=r"no list of images .*for split 'val': use an existing one, trainval$"):
        read_voc(devkit, "2012/val")
    annotation_file = folder / "Annotations" / "2008_000002.xml"
    annotation_file.write_text("<annotation><object>")
    with pytest.raises(ValueError, match=r"'.*2008_000002.xml' is not XML .*: fetch the annotation again"):
        read_voc(devkit)
    annotation_file.write_text(annotation([("dgo", 0)]))
    with pytest.raises(ValueError, match="has an object of the class 'dgo', expected one of aeroplane, "):
        read_voc(devkit)
    annotation_file.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 of 4 images listed in '.*trainval.txt' are not .*first 2008_000002.xml"
    ):
        read_voc(devkit)
    (folder / "ImageSets" / "Main" / "trainval.txt").write_text("../../secret\n")
    with pytest.raises(ValueError, match=r"names the image '../../secret': expected a path inside the image folder"):
        read_voc(devkit)
    (folder / "ImageSets" / "Main" / "trainval.txt").write_bytes(b"2008_00000\xff\n")
    with pytest.raises(ValueError, match=r"'.*trainval.txt' is not UTF-8 text .*: fetch the data set again"):
        read_voc(devkit)
    (folder / "ImageSets" / "Main" / "trainval.txt").write_text("\n")
    with pytest.raises(ValueError, match="lists no image: fetch the data set again"):
        read_voc(devkit)


def test_real_photographs_in_vocs_layout_have_the_labels_of_coco(coco256: Path, tmp_path: Path) -> None:
    coco = read_coco(coco256, "val2017")
    assert coco.labels is not None
    names = [coco.path(index).stem for index in range(32)]
    objects = {
        name: [(coco.classes[column], 0) for column in np.flatnonzero(coco.labels[index])]
        for index, name in enumerate(names)
    }
    folder = make(tmp_path, "2017", "val", objects)
    for index, name in enumerate(names):
        shutil.copy(coco.path(index), folder / "JPEGImages" / f"{name}.jpg")
    voc = read_voc(tmp_path, "2017/val", coco.classes)
    assert np.array_equal(voc.labels, coco.labels[:32])
    assert voc.image_ids.tolist() == coco.image_ids[:32].tolist()
    assert all(np.array_equal(voc.image(index), coco.image(index)) for index in (0, 31))


def test_the_config_trains(devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (RUN_FOLDER_VARIABLE, "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "")
    config = Path(__file__).resolve().parents[3] / "examples" / "configs" / "voc_resnet50.yaml"
    small = [
        *("--model.backbone", "test_resnet", "--model.projection_dim", "16", "--model.predictor_dim", "8"),
        *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.precision", "32-true"),
        *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
        *("--data.batch_size", "2", "--data.num_workers", "0"),
    ]
    assert main(["fit", "--config", str(config), "--data.root", str(devkit), *small]) == 0
    (folder,) = Path("runs").iterdir()
    assert "probe/mAP" in (folder / "metrics.csv").read_text()


# ---------------------------------------------------------------------- as annotation tools write it

DOG = "<object><name>dog</name><difficult>0</difficult></object>"


@pytest.mark.parametrize(
    "content",
    [
        f'<annotation xmlns="http://www.example.org/voc">{DOG}</annotation>'.encode(),
        f'<v:annotation xmlns:v="urn:voc">{DOG.replace("</", "</v:").replace("<", "<v:").replace("<v:/v:", "</v:")}'
        "</v:annotation>".encode(),
        f"<annotation><objects>{DOG}</objects></annotation>".encode(),
        f"<annotation><!-- a remark -->{DOG}</annotation>".encode(),
        f'<?xml version="1.0" encoding="gb2312"?>\n<annotation><folder>图</folder>{DOG}</annotation>'.encode("gb2312"),
        f'<?xml version="1.0" encoding="Shift_JIS"?><annotation><folder>図</folder>{DOG}</annotation>'.encode(
            "shift_jis"
        ),
        f"<?xml version='1.0' encoding='latin-1'?><annotation><folder>é</folder>{DOG}</annotation>".encode("latin-1"),
        f'<?xml version="1.0"?><annotation>{DOG}</annotation>'.encode("utf-8-sig"),
        f'<?xml version="1.0" encoding="utf-16"?><annotation>{DOG}</annotation>'.encode("utf-16"),
    ],
    ids=["namespace", "prefix", "list of objects", "comment", "gb2312", "shift_jis", "latin-1", "mark", "utf-16"],
)
def test_namespaces_lists_and_encodings_are_read(tmp_path: Path, content: bytes) -> None:
    folder = make(tmp_path, "2012", "all", {"1": []})
    (folder / "Annotations" / "1.xml").write_bytes(content)
    (folder / "ImageSets" / "Main" / "all.txt").write_bytes(b"\xef\xbb\xbf1\r\n")
    labels = read_voc(tmp_path, "2012/all").labels
    assert labels is not None
    assert [VOC_CLASSES[column] for column in np.flatnonzero(labels[0])] == ["dog"]


@pytest.mark.parametrize(
    "content",
    [
        f'<?xml version="1.0" encoding="x-nope"?><annotation>{DOG}</annotation>'.encode(),
        f'<?xml version="1.0" encoding="gb2312"?><annotation>\xff\xff{DOG}</annotation>'.encode("latin-1"),
        f'<?xml version="1.0" encoding="hex"?><annotation>{DOG}</annotation>'.encode(),
    ],
    ids=["an encoding that is none", "bytes of another", "a codec of bytes"],
)
def test_encodings_that_cannot_be_read_are_named_with_the_file(tmp_path: Path, content: bytes) -> None:
    folder = make(tmp_path, "2012", "all", {"1": []})
    (folder / "Annotations" / "1.xml").write_bytes(content)
    with pytest.raises(ValueError, match=r"'.*1\.xml' is not XML \(.*\): fetch the annotation again"):
        read_voc(tmp_path, "2012/all")


def test_a_repeated_image_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path, "2012", "all", {"1": [], "2": []})
    (folder / "ImageSets" / "Main" / "all.txt").write_text("1\n2\n1\n")
    with pytest.raises(ValueError, match=r"all\.txt' lists '1' twice: keep one of its lines"):
        read_voc(tmp_path, "2012/all")


def test_png_images_and_blanks_in_names_are_read(tmp_path: Path) -> None:
    folder = make(tmp_path, "2012", "all", {"a photo": [("dog", 0)], "photo 1": [], "cat": [("cat", 0)]})
    (folder / "JPEGImages" / "a photo.jpg").rename(folder / "JPEGImages" / "a photo.PNG")
    (folder / "ImageSets" / "Main" / "all.txt").write_text("a photo  -1\nphoto 1\ncat  1\n")
    records = read_voc(tmp_path, "2012/all", leave_out_others=True)
    assert [records.path(row).name for row in range(3)] == ["a photo.PNG", "photo 1.jpg", "cat.jpg"]
    (folder / "JPEGImages" / "cat.png").touch()
    with pytest.raises(ValueError, match=r"JPEGImages' contains cat\.jpg and cat\.png, which share one annotation"):
        read_voc(tmp_path, "2012/all")


def test_custom_classes_refuse_others_or_count_them(tmp_path: Path) -> None:
    make(tmp_path, "2024", "all", {"1": [("helmet", 0), ("head", 0)], "2": [("person", 0), ("person", 0)]})
    with pytest.raises(
        ValueError, match=r"the class 'helmet', expected one of .* pass the classes of this set, classes="
    ):
        read_voc(tmp_path, "2024/all")
    records = read_voc(tmp_path, "2024/all", ["head", "helmet"], leave_out_others=True)
    assert records.labels is not None
    assert (records.labels.tolist(), records.left_out) == ([[1, 1], [0, 0]], {"labels of other classes": 2})
