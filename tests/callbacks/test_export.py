"""BackboneExport: when it writes, what it writes, and that training does not change."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import safetensors.torch
import timm
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from safetensors import safe_open

from mlssl.callbacks import BackboneExport
from mlssl.callbacks import export as module
from mlssl.module import MultiLabelSSLModule


@pytest.fixture
def fit(make_model: Any, make_data: Any, make_trainer: Any) -> Callable[..., MultiLabelSSLModule]:
    """A function from callbacks and a model, by default a tiny ResNet, to the model after a fit in tmp_path/run<i>."""

    def fitted(*callbacks: L.Callback, model: Any = None, **settings: Any) -> MultiLabelSSLModule:
        L.seed_everything(0, verbose=False)
        model = model or make_model(backbone="test_resnet")
        trainer = make_trainer(*callbacks, limit_train_batches=2, limit_val_batches=0, **{"max_epochs": 1, **settings})
        trainer.fit(model, make_data())
        return model

    return fitted


def file_names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_the_backbone_is_exported_at_the_end(fit: Any, tmp_path: Path) -> None:
    model = fit(BackboneExport())
    assert file_names(tmp_path / "run0" / "exports") == ["backbone.safetensors"]
    path = tmp_path / "run0" / "exports" / "backbone.safetensors"
    loaded = timm.create_model("test_resnet", num_classes=0, checkpoint_path=path).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model.backbone.eval()(images), rtol=1e-5, atol=1e-5)


def test_the_backbone_is_exported_every_n_epochs_and_at_the_end(fit: Any, tmp_path: Path) -> None:
    model = fit(BackboneExport(every_n_epochs=2, directory=tmp_path / "mine"), max_epochs=5)
    names = ["backbone-epoch=01.safetensors", "backbone-epoch=03.safetensors", "backbone.safetensors"]
    assert file_names(tmp_path / "mine") == names
    weights = [safetensors.torch.load_file(tmp_path / "mine" / name)["layer1.0.conv2.weight"] for name in names]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert torch.equal(weights[2], model.backbone.layer1[0].conv2.weight)
    assert not (tmp_path / "run0" / "exports").exists()


@pytest.mark.parametrize(
    ("backbone", "format", "name"),
    [
        ("test_vit", None, "backbone.safetensors"),
        ("torchvision/shufflenet_v2_x0_5", None, "backbone.pth"),
        ("torchvision/shufflenet_v2_x0_5", "safetensors", "backbone.safetensors"),
    ],
)
def test_the_format_is_the_best_supported_one_or_the_given_one(
    backbone: str, format: str | None, name: str, fit: Any, make_model: Any, tmp_path: Path
) -> None:
    fit(BackboneExport(format), model=make_model(backbone=backbone), max_steps=1)
    assert file_names(tmp_path / "run0" / "exports") == [name]


def test_mean_and_std_are_in_the_header(fit: Any, make_model: Any, tmp_path: Path) -> None:
    fit(BackboneExport(), model=make_model(mean=[0.1, 0.2, 0.3]))  # of a custom network
    with safe_open(tmp_path / "run0" / "exports" / "backbone.safetensors", "pt") as file:
        header = file.metadata()
    assert (header["backbone"], header["features"]) == ("Sequential", "12")
    assert json.loads(header["mean"]) == [0.1, 0.2, 0.3]
    assert json.loads(header["std"]) == [0.229, 0.224, 0.225]


def test_weights_flags_and_random_state_are_the_same_as_without(fit: Any, tmp_path: Path) -> None:
    found = []
    for callbacks in ([], [BackboneExport(every_n_epochs=1)]):
        model = fit(*callbacks, max_epochs=3)
        found.append((model.state_dict(), torch.get_rng_state(), [one.training for one in model.modules()]))
    (weights, state, flags), (weights_too, state_too, flags_too) = found
    assert weights.keys() == weights_too.keys()
    assert all(torch.equal(value, weights_too[name]) for name, value in weights.items())
    assert torch.equal(state, state_too)
    assert flags == flags_too
    assert len(file_names(tmp_path / "run1" / "exports")) == 4


def test_an_existing_export_is_kept(fit: Any, tmp_path: Path) -> None:
    for _ in range(3):
        fit(BackboneExport(directory=tmp_path / "exports"))
    names = ["backbone-v1.safetensors", "backbone-v2.safetensors", "backbone.safetensors"]
    assert file_names(tmp_path / "exports") == names


def test_averaged_weights_are_exported_if_a_callback_averages(fit: Any, tmp_path: Path) -> None:
    export, average = BackboneExport(directory=tmp_path), EMAWeightAveraging(decay=0.5)
    for order, name in (((export, average), "backbone"), ((average, export), "backbone-v1")):
        model = fit(*order, max_epochs=2)
        exported = safetensors.torch.load_file(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(value, exported[key]) for key, value in model.backbone.state_dict().items())
        average = EMAWeightAveraging(decay=0.5)
    plain = fit(max_epochs=2)
    assert not torch.equal(plain.backbone.layer1[0].conv2.weight, exported["layer1.0.conv2.weight"])


def test_only_the_first_process_writes(fit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(L.Trainer, "is_global_zero", property(lambda _trainer: False))
    fit(BackboneExport(every_n_epochs=1))
    assert not (tmp_path / "run0" / "exports").exists()


def test_nothing_is_written_under_fast_dev_run(fit: Any, tmp_path: Path) -> None:
    fit(BackboneExport(every_n_epochs=1), fast_dev_run=1)
    assert not (tmp_path / "run0" / "exports").exists()


def test_a_failing_export_leaves_no_file(fit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_the_disk(file: Path, data: bytes) -> int:
        file.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(OSError, match=r"No space left on device: '.*backbone\.safetensors'"):
        fit(BackboneExport())
    assert not (tmp_path / "run0" / "exports").exists()


# ---------------------------------------------------------------------- before training


def test_bad_arguments_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="Unknown export format 'onyx': choose 'timm', 'torchvision', 'safetensors'"):
        BackboneExport("onyx")
    with pytest.raises(ValueError, match="every_n_epochs=0 was given: pass at least 1, or None to export at the end"):
        BackboneExport(every_n_epochs=0)


def train(*_: Any) -> None:
    pytest.fail("training has begun")


def test_a_format_that_does_not_support_the_backbone_is_reported_before_training(
    fit: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(backbone="test_resnet")
    monkeypatch.setattr(MultiLabelSSLModule, "training_step", train)
    with pytest.raises(ValueError, match="'test_resnet' cannot be exported, format 'torchvision' does not support it"):
        fit(BackboneExport("torchvision"), model=model)


def test_a_module_without_a_backbone_is_reported_before_training(
    make_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BoringModel, "training_step", train)
    with pytest.raises(ValueError, match=r"needs a module with its network as \.backbone, but BoringModel has none"):
        make_trainer(BackboneExport()).fit(BoringModel())


def test_an_export_of_another_process_with_the_same_name_is_kept_and_the_new_one_gets_the_next_name(
    fit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export, calls = module.export_backbone, []

    def meanwhile(model: Any, path: Path, *words: Any) -> Any:
        calls.append(path.name)
        if len(calls) == 1:
            path.parent.mkdir()
            path.write_text("of another process")
        return export(model, path, *words)

    monkeypatch.setattr(module, "export_backbone", meanwhile)
    fit(BackboneExport(directory=tmp_path / "mine"))
    assert calls == ["backbone.safetensors", "backbone-v1.safetensors"]
    assert (tmp_path / "mine" / "backbone.safetensors").read_text() == "of another process"
    assert file_names(tmp_path / "mine") == ["backbone-v1.safetensors", "backbone.safetensors"]
