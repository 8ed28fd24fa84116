"""Published protocols: their settings and crops, and runs from end to end on files in the COCO and VOC layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.svm import LinearSVC
from torch import nn

from mlssl.data.readers.coco import read_coco
from mlssl.data.records import Records
from mlssl.evaluation.crops import Crops
from mlssl.evaluation.features import Features, extract_features
from mlssl.evaluation.metrics import average_precision
from mlssl.evaluation.protocols import (
    PROTOCOLS,
    CropData,
    LinearEvaluation,
    describe,
    evaluate_sgd,
    evaluate_svm,
    find_protocol,
)
from mlssl.weights.sources import Backbone


@pytest.fixture
def model() -> Backbone:
    import timm

    torch.manual_seed(0)
    return Backbone(timm.create_model("test_resnet", num_classes=0), [0.5] * 3, [0.25] * 3)


def voc_like(folder: Path, count: int, seed: int) -> Records:
    """Images of several sizes whose colour is their class, some with a difficult (unknown) object."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, (count, 3)).astype(np.int8)
    folder.mkdir()
    for index, row in enumerate(labels):
        height, width = generator.integers(40, 90, 2)
        pixels = generator.integers(0, 60, (height, width, 3)) + 190 * row.astype(int)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:06}.jpg", quality=95)
    labels[::7, 1] = -1
    names = [f"{index:06}.jpg" for index in range(count)]
    return Records(names, labels, ["red", "green", "blue"], root=folder)


def quiet_trainer(epochs: int, **settings: Any) -> L.Trainer:
    silent = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return L.Trainer(max_epochs=epochs, accelerator="cpu", enable_progress_bar=False, **silent, **settings)


def test_the_settings_are_those_of_the_table() -> None:
    coco, voc, svm, corel = (PROTOCOLS[name] for name in ("coco-448", "voc12-to-voc07", "voc07-svm", "corel5k"))
    assert (coco.train_split, coco.test_split, coco.crop, coco.test_resize, coco.lr) == (
        "train2017",
        "val2017",
        448,
        None,
        10,
    )
    assert (voc.train_split, voc.test_split, voc.crop, voc.test_resize, voc.lr) == (
        "2012/trainval",
        "2007/test",
        224,
        256,
        1,
    )
    assert (svm.train_split, svm.test_split) == ("2007/trainval", "2007/test")
    assert (corel.train_split, corel.test_split) == ("train", "test")
    assert all((one.epochs, one.batch_size, one.threshold) == (100, 64, 0.5) for one in (coco, voc))
    with pytest.raises(ValueError, match="there is no protocol 'coco': pass one of coco-448, voc12-to-voc07"):
        find_protocol("coco")


def test_the_layer_is_initialised_and_trained_as_published(model: Backbone) -> None:
    module = LinearEvaluation(model, 500, lr=10.0)
    assert module.lr == 2.5
    assert module.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert (module.classifier.bias == 0).all()
    again = LinearEvaluation(model, 500, lr=10.0)
    assert torch.equal(again.classifier.weight, module.classifier.weight)
    module.train()
    assert not any(part.training for part in model.backbone.modules())
    assert {name for name, _ in module.named_parameters()} == {"classifier.weight", "classifier.bias"}


def test_a_protocol_runs_from_end_to_end_and_does_not_change_the_backbone(model: Backbone, tmp_path: Path) -> None:
    train, test = voc_like(tmp_path / "train", 70, 0), voc_like(tmp_path / "test", 30, 1)
    protocol = replace(PROTOCOLS["voc12-to-voc07"], crop=32, test_resize=36)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = quiet_trainer(12)
    result = evaluate_sgd(protocol, model, CropData(protocol, train, test), trainer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert trainer.global_step == 12 * 2, "no image is left out"
    assert result.scores["mAP"] > 0.8
    assert result.scores["classes"] == 3
    assert np.array_equal(result.targets.numpy(), test.labels)
    torch.testing.assert_close(result.average_precision, average_precision(result.logits, result.targets))
    (group,) = trainer.optimizers[0].param_groups
    assert (group["momentum"], group["weight_decay"], group["initial_lr"]) == (0.9, 0, 0.25)
    assert group["lr"] == pytest.approx(0, abs=1e-12)


def test_unknown_labels_are_ignored(model: Backbone) -> None:
    module = LinearEvaluation(model, 3, lr=1.0)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    images = torch.randint(0, 256, (4, 3, 32, 32)).to(torch.uint8)
    labels = torch.tensor([[1, 0, -1], [0, 1, -1], [1, 1, -1], [-1, 0, -1]], dtype=torch.int8)
    loss = module.training_step({"image": images, "labels": labels}, 0)
    logits, known = module(images), labels >= 0
    expected = nn.functional.binary_cross_entropy_with_logits(logits[known], (labels[known] == 1).float())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert (module.classifier.weight.grad[2] == 0).all()  # type: ignore[index]


def test_coco_448_runs_on_files_in_the_coco_layout(model: Backbone, coco256: Path) -> None:
    protocol = PROTOCOLS["coco-448"]
    train, test = (read_coco(coco256, split).subset(range(8)) for split in (protocol.train_split, protocol.test_split))
    result = evaluate_sgd(protocol, model, CropData(protocol, train, test), quiet_trainer(1))
    assert result.logits.shape == (8, 80)
    assert 0 < result.scores["mAP"] <= 1
    assert result.scores["classes"] == (test.labels == 1).any(0).sum()  # type: ignore[union-attr]


def test_the_first_line_contains_all_settings(tmp_path: Path) -> None:
    train, test = voc_like(tmp_path / "train", 5, 0), voc_like(tmp_path / "test", 4, 1)
    line = describe(PROTOCOLS["voc12-to-voc07"], train, test)
    for part in ("voc12-to-voc07", "5 training", "4 test", "3 classes", "threshold 0.5", "last of 100 epochs"):
        assert part in line
    assert "last of 3 epochs is reported; the protocol has 100" in describe(PROTOCOLS["coco-448"], train, test, 3)
    assert "C by 3-fold AP" in describe(PROTOCOLS["voc07-svm"], train, test)


# ---------------------------------------------------------------------- the SVM


def made(count: int, seed: int) -> Features:
    causes = torch.randn(10, 4, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    features = 5 * torch.randn(count, 10, generator=generator)
    noise = 5 * torch.randn(count, 4, generator=generator)
    labels = (features @ causes + noise > 3).to(torch.int8)
    labels[::9, 1] = -1
    return Features(features, labels, torch.arange(count))


def test_an_svm_with_one_cost_is_that_of_scikit_learn() -> None:
    train, test = made(150, 0), made(80, 1)
    result = evaluate_svm(train, test, costs=[0.3])
    for label in range(4):
        known = train.labels[:, label] >= 0  # type: ignore[index]
        inputs, others = (nn.functional.normalize(one.features).double().numpy() for one in (train, test))
        svm = LinearSVC(C=0.3, class_weight={1: 2, 0: 1}, dual=True, max_iter=100_000, tol=1e-6)
        svm.fit(inputs[known], train.labels[known, label].numpy())  # type: ignore[index]
        assert np.abs(svm.decision_function(others) - result.logits[:, label].numpy()).max() < 1e-2
    assert result.scores["classes"] == 4
    assert result.scores["mAP"] == pytest.approx(average_precision(result.logits, test.labels).mean().item())  # type: ignore[arg-type]


def test_svm_chooses_without_the_test_set() -> None:
    train, test = made(150, 0), made(80, 1)
    first = evaluate_svm(train, test)
    other = evaluate_svm(train, test._replace(labels=test.labels.flip(0)))  # type: ignore[union-attr]
    assert torch.equal(first.logits, other.logits)
    assert first.scores["mAP"] > 0.6


def test_voc07_svm_runs_from_images(model: Backbone, tmp_path: Path) -> None:
    protocol = replace(PROTOCOLS["voc07-svm"], crop=32, test_resize=36)
    sets = [
        extract_features(
            model,
            torch.utils.data.DataLoader(
                Crops(voc_like(tmp_path / str(seed), 40, seed), protocol.crop, protocol.test_resize), 16
            ),
            pooling="avgmax",
        )
        for seed in (0, 1)
    ]
    assert evaluate_svm(*sets, costs=[0.1, 1.0]).scores["mAP"] > 0.8


# ---------------------------------------------------------------------- what is refused


def test_invalid_protocol_runs_are_refused(model: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = voc_like(tmp_path / "train", 12, 0)
    protocol = replace(PROTOCOLS["voc12-to-voc07"], crop=32, test_resize=36)
    with pytest.raises(ValueError, match="do not share their classes"):
        CropData(protocol, train, train.with_classes([0, 1]))
    with pytest.raises(ValueError, match="num_labels=0 was given"):
        LinearEvaluation(model, 0, 1.0)
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="needs the last feature map"):
        LinearEvaluation(SimpleNamespace(backbone=own, normalize=lambda images: images), 2, 1.0)
    with pytest.raises(ValueError, match="nothing was tested yet"):
        LinearEvaluation(model, 2, 1.0).scores()
    with pytest.raises(ValueError, match="2 devices were given"):
        evaluate_sgd(protocol, model, CropData(protocol, train, train), SimpleNamespace(world_size=2))  # type: ignore[arg-type]
    features = made(20, 0)
    with pytest.raises(ValueError, match="needs labelled features of both sets"):
        evaluate_svm(features._replace(labels=None), features)
    with pytest.raises(ValueError, match="no class has three positive and three negative"):
        evaluate_svm(features._replace(labels=torch.zeros(20, 4, dtype=torch.int8)), features)
    monkeypatch.setitem(__import__("sys").modules, "sklearn.svm", None)
    with pytest.raises(ImportError, match=r"voc07-svm needs scikit-learn: pip install 'mlssl\[svm\]'"):
        evaluate_svm(features, features)
