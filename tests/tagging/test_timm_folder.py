"""A tagger as a classifier of timm: the same probabilities, with head and class names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from test_tagger import CLASSES, SIZE, made, photographs

from mlssl.backbones import build_backbone
from mlssl.cli import main
from mlssl.data.datasets import ImageDataset
from mlssl.data.records import Records
from mlssl.tagging.fit import tagger_of
from mlssl.tagging.timm_folder import export_timm_classifier
from mlssl.weights.sources import Backbone


def test_timm_opens_a_tagger_with_head_and_class_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tagger = made()
    tagger.save(tmp_path / "tagger.safetensors")
    folder = tmp_path / "classifier"
    words = ["export", str(tmp_path / "tagger.safetensors"), "-o", str(folder), "--format"]
    assert main([*words, "timm-dir"]) == 0
    assert "classifier: the whole tagger, largest difference in a probability" in capsys.readouterr().out
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert network.pretrained_cfg["label_names"] == list(CLASSES)
    images, _ = photographs(3, seed=5)
    dataset = ImageDataset(Records(["0", "1", "2"], decode=lambda path: images[int(path.name)]), SIZE)
    pixels = torch.stack([dataset[index]["image"] for index in range(3)])
    with torch.no_grad():
        found = network(tagger.network.model.normalize(pixels)).sigmoid()
    torch.testing.assert_close(found, tagger(images).probabilities, rtol=0, atol=1e-4)
    config = json.loads((folder / "config.json").read_text())
    assert json.loads(config["mlssl"]["size"]) == list(SIZE)
    assert json.loads(config["mlssl"]["thresholds"]) == pytest.approx(tagger.thresholds.values.tolist(), abs=1e-5)
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert "# test_resnet for 4 labels" in card
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=5).num_classes == 5

    assert main([*words, "timm-dir"]) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*words, "torchvision"]) == 2
    assert "a tagger is exported as onnx or timm-dir: pass one of them" in capsys.readouterr().err


def test_a_tagger_not_supported_by_timm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="pools by 'avgmax', but timm's classifier by the average: save with"):
        export_timm_classifier(made(pooling="avgmax"), tmp_path / "a")
    model = Backbone(build_backbone("torchvision/resnet18"))
    labels = torch.tensor([[1], [0]])
    other = tagger_of(model, torch.nn.Linear(512, 1), labels.float(), labels, ["a"], size=SIZE)
    with pytest.raises(ValueError, match=r"ResNet takes no linear classifier in timm: export an \.onnx file"):
        export_timm_classifier(other, tmp_path / "a")
    tagger = made()
    monkeypatch.setattr("mlssl.tagging.timm_folder.MAX_DIFFERENCE", -1.0)
    with pytest.raises(ValueError, match="the probabilities of timm's network differ by"):
        export_timm_classifier(tagger, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_label_without_held_out_positives_and_negatives_is_never_predicted() -> None:
    labels = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 1, 0]])
    logits = torch.tensor([[2.0, 1.0, 1.0], [-2.0, 1.0, 1.0], [2.0, 1.0, 1.0]])
    classifier = torch.nn.Linear(96, 3)
    tagger = tagger_of(Backbone(build_backbone("test_resnet")), classifier, logits, labels, "abc", size=SIZE)
    assert tagger.thresholds.values[1:].tolist() == [1.0, 1.0]
    assert tagger.labels(tagger.network.calibration(logits)) == [["a"], [], ["a"]]
