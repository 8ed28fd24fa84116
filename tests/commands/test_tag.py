"""`mlssl linear --save` and `mlssl tag` on real images, and every impossible output."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from mlssl.backbones import build_backbone
from mlssl.cli import main
from mlssl.tagging.fit import tagger_of
from mlssl.tagging.tag_files import tag_writer
from mlssl.tagging.tagger import Tagger
from mlssl.weights.sources import Backbone

ROWS = (["a.jpg", 'né"w,.png'], [["sky", "sea"], []], [[0.9, 0.7], [0.125, 0.0]])


def test_every_format_contains_paths_labels_and_probabilities(tmp_path: Path) -> None:
    classes = ["sky", "sea"]
    for suffix in (".csv", ".jsonl", ".parquet"):
        with tag_writer(tmp_path / f"tags{suffix}", classes) as writer:
            writer.write(*[part[:1] for part in ROWS])
            writer.write(*[part[1:] for part in ROWS])
    with (tmp_path / "tags.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["path", "labels", *classes], ["a.jpg", "sky|sea", "0.9", "0.7"], ['né"w,.png', "", "0.125", "0"]]
    lines = [json.loads(line) for line in (tmp_path / "tags.jsonl").read_text().splitlines()]
    assert lines[0] == {"path": "a.jpg", "labels": ["sky", "sea"], "probabilities": {"sky": 0.9, "sea": 0.7}}
    table = pandas.read_parquet(tmp_path / "tags.parquet")
    assert table["path"].tolist() == ROWS[0]
    assert [list(one) for one in table["labels"]] == ROWS[1]
    assert table["probability: sea"].tolist() == pytest.approx([0.7, 0.0])


@pytest.mark.parametrize(
    ("name", "classes", "error", "message"),
    [
        ("tags.txt", ["sky"], ValueError, "has no known format: use a suffix of .csv, .jsonl, .parquet"),
        ("tags.csv", ["sky|sea"], ValueError, r"the class 'sky\|sea' contains the separator"),
        ("tags.parquet", ["sky"], ImportError, "Parquet needs pyarrow: pip install pyarrow"),
    ],
)
def test_an_impossible_output_is_refused_before_any_image_is_read(
    name, classes, error, message, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlssl.tagging.tag_files.find_spec", lambda name: None)
    with pytest.raises(error, match=message), tag_writer(tmp_path / name, classes):
        pass
    assert not list(tmp_path.iterdir())


def test_a_tagger_of_a_probe_tags_a_folder_with_pictures_and_counts_bad_images(
    coco256: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["linear", "test_resnet", "--dataset", "coco", "--root", str(coco256), "--eval_size", "32"]
    words += ["--num_workers", "0", "--pooling", "avg", "--save", "tagger.safetensors"]
    words += ["--min_images_per_class", "[12, 4]"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "tagger.safetensors: a tagger of" in said
    assert "training images; their 90 % intervals have" in said
    assert main(words) == 2
    assert "'tagger.safetensors' exists, and nothing in it was changed" in capsys.readouterr().err

    photographs = sorted((coco256 / "val2017").glob("*.jpg"))[:2]
    Path("photos/below").mkdir(parents=True)
    for photograph, name in zip(photographs, ("a.jpg", "below/b.jpg"), strict=True):
        Path("photos", name).write_bytes(photograph.read_bytes())
    Path("photos/bad.jpg").write_bytes(b"no image")
    assert main(["tag", "tagger.safetensors", "photos", "-o", "tags.jsonl", "--maps", "maps"]) == 0
    said = capsys.readouterr().out
    assert "labels of 2 images" in said
    assert "1 images cannot be decoded and are left out: bad.jpg" in said
    rows = [json.loads(line) for line in Path("tags.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == ["a.jpg", "below/b.jpg"]
    images = [np.array(Image.open(Path("photos", row["path"])).convert("RGB")) for row in rows]
    found = Tagger.load("tagger.safetensors")(images)
    assert [row["labels"] for row in rows] == found.labels
    written = torch.tensor([list(row["probabilities"].values()) for row in rows])
    torch.testing.assert_close(written, found.probabilities, rtol=1e-4, atol=1e-5)
    for picture in ("maps/a.jpg.png", "maps/below/b.jpg.png"):
        with Image.open(picture) as drawn:
            assert min(drawn.size) > 200

    assert main(["tag", "tagger.safetensors", "photos", "-o", "tags.jsonl"]) == 2
    assert "'tags.jsonl' exists" in capsys.readouterr().err
    assert main(["tag", "tagger.safetensors", "photos", "-o", "t.csv", "--devices", "[nowhere]"]) == 2
    assert "there is no device 'nowhere'" in capsys.readouterr().err
    assert not Path("t.csv").exists()
    Path("none").mkdir()
    Path("none/bad.jpg").write_bytes(b"no image")
    assert main(["tag", "tagger.safetensors", "none", "-o", "t.csv"]) == 2
    assert "none of the 1 images of none can be decoded, first bad.jpg" in capsys.readouterr().err
    assert not Path("t.csv").exists()


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three images, two of them listed in a manifest, and a tagger."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(f"{name}.png")
    Path("two.csv").write_text("file,names\nc.png,sky;sea\na.png,sea\n")
    labels = torch.tensor([[1], [0]])
    model = Backbone(build_backbone("test_resnet"))
    tagger_of(model, torch.nn.Linear(96, 1), labels.float(), labels, ["sky"], size=(32, 32)).save("t.safetensors")
    return tmp_path


MANIFEST = ["--dataset", "manifest", "--train_split", "two.csv", "--path_column", "file", "--label_columns", "names"]


def test_tag_and_predict_read_any_data_set(listed: Path) -> None:
    for words in (["--separator", ";"], ["--separator", ";", "--classes", "[sea]"]):
        assert main(["tag", "t.safetensors", ".", "-o", "tags.csv", "--overwrite", "true", *MANIFEST, *words]) == 0
        assert pandas.read_csv("tags.csv")["path"].tolist() == ["c.png", "a.png"]
    assert main(["predict", "test_resnet", ".", "-o", "e.npy", "--size", "32", *MANIFEST, "--separator", ";"]) == 0
    assert pandas.read_csv("e.names.csv")["path"].tolist() == ["c.png", "a.png"]
    assert main(["predict", "test_resnet", ".", "-o", "all.npy", "--size", "32"]) == 0
    assert len(np.load("all.npy")) == 3
    assert main(["predict", "test_resnet", ".", "-o", "o.npy", "--size", "32", "--annotations", "two.csv",
                 *MANIFEST[4:], "--separator", ";"]) == 0  # fmt: skip
    assert np.array_equal(np.load("o.npy"), np.load("e.npy"))


@pytest.mark.parametrize("command", [["tag", "t.safetensors"], ["predict", "test_resnet"]])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--separator", ";"], "separator=';' and dataset='folder' were given: separator is for manifest"),
        (["--dataset", "coco"], "annotations/instances_train2017.json"),
        (["--annotations", "two.csv", "--images", "."], "with annotations, pass one image folder as the first"),
    ],
)
def test_tag_and_predict_refuse_options_that_do_not_fit(command, words, message, listed: Path, capsys) -> None:
    assert main([*command, ".", "-o", "out.csv", *words]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out.csv").exists()
