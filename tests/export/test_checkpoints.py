"""Sources: precision, DDP and FSDP shards, and the training history in a checkpoint."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from test_export import (
    assert_same_features,
    file_names,
    header,
    in_shards,
    loaded_by,
    trained_module,
    written_checkpoint,
)

from mlssl.callbacks import BackboneExport
from mlssl.export import export_backbone
from mlssl.module import MultiLabelSSLModule


@pytest.fixture
def sharded(tmp_path: Path) -> tuple[Path, MultiLabelSSLModule]:
    module = trained_module()
    return in_shards(written_checkpoint(module, tmp_path / "whole.ckpt"), tmp_path / "last.ckpt"), module


def test_shards_are_merged(sharded: Any, tmp_path: Path) -> None:
    folder, module = sharded
    report = export_backbone(folder, tmp_path / "backbone.safetensors")
    assert report.format == "timm"
    assert_same_features(loaded_by(report.check), module.backbone)
    assert header(report.path)["steps"] == "0"


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_shards_that_name_code_are_refused_and_run_none(sharded: Any, tmp_path: Path) -> None:
    folder, _ = sharded
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(
        ValueError, match=r"is not a sharded checkpoint or is damaged: it names \w+\.mkdir, which does not belong"
    ):
        export_backbone(folder, tmp_path / "backbone.safetensors")
    assert not (tmp_path / "ran").exists()


def test_code_behind_a_name_of_the_metadata_is_refused(sharded: Any, tmp_path: Path) -> None:
    folder, _ = sharded
    module, name = b"torch.distributed.checkpoint.metadata", b"os.system"
    words = b"".join(b"\x8c" + bytes([len(word)]) + word for word in (module, name))
    (folder / ".metadata").write_bytes(b"\x80\x04" + words + b"\x93.")
    with pytest.raises(ValueError, match=r"it names torch\.distributed\.checkpoint\.metadata\.os\.system"):
        export_backbone(folder, tmp_path / "backbone.safetensors")


def test_shards_without_the_rest_of_the_checkpoint_are_refused(sharded: Any, tmp_path: Path) -> None:
    folder, _ = sharded
    (folder / "meta.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint at .*meta\.pt"):
        export_backbone(folder, tmp_path / "backbone.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_checkpoint_of_another_precision_is_exported_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    module = trained_module().to(dtype)
    path = written_checkpoint(module, tmp_path / "last.ckpt")
    report = export_backbone(path, tmp_path / "backbone.safetensors")
    loaded = loaded_by(report.check)
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    assert_same_features(loaded, module.backbone)


@pytest.mark.parametrize("wrapper", ["_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."])
def test_names_of_wrappers_inside_the_network_are_stripped(wrapper: str, tmp_path: Path) -> None:
    module = trained_module()
    path = written_checkpoint(module, tmp_path / "last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"] = {
        name.replace("layer1.", f"layer1.{wrapper}"): value for name, value in checkpoint["state_dict"].items()
    }
    torch.save(checkpoint, path)
    assert_same_features(loaded_by(export_backbone(path, tmp_path / "a.safetensors").check), module.backbone)


def test_a_module_under_ddp_is_exported_like_the_plain_module(tmp_path: Path) -> None:
    module = trained_module()

    class DistributedDataParallel(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.module = inner

    report = export_backbone(DistributedDataParallel(module), tmp_path / "a.safetensors")
    assert_same_features(loaded_by(report.check), module.backbone)


def test_steps_epoch_data_and_metrics_are_recorded(make_run: Any, tmp_path: Path) -> None:
    trainer = make_run()
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    said = header(export_backbone(path, tmp_path / "a.safetensors").path)
    assert said["steps"] == "2"
    data = json.loads(said["data"])
    assert (data["dataset"], data["size"], data["batch_size"]) == ("synthetic", 32, 8)
    assert "root" not in data
    assert json.loads(said["metrics"])["train/loss"] == pytest.approx(
        trainer.callback_metrics["train/loss"].item(), abs=1e-6
    )
    (exported,) = (tmp_path / "run" / "exports").iterdir()
    of_callback = header(exported)
    assert of_callback["steps"] == "2"
    assert of_callback["metrics"] == said["metrics"]
    assert of_callback["data"] == said["data"]


def test_settings_of_the_machine_and_the_command_are_not_recorded(tmp_path: Path) -> None:
    path = written_checkpoint(trained_module(), tmp_path / "last.ckpt")
    settings = {"root": "/home/me", "num_workers": 4, "_instantiator": "lightning", "size": 32}
    settings |= {"annotations": "/home/me/a.json", "images": "/home/me", "probe": {"root": "/home/me"}}
    torch.save(torch.load(path, weights_only=True) | {"datamodule_hyper_parameters": settings}, path)
    assert json.loads(header(export_backbone(path, tmp_path / "a.safetensors").path)["data"]) == {"size": 32}


@pytest.fixture
def make_run(tmp_path: Path) -> Any:
    def run() -> L.Trainer:
        from mlssl.data.datamodule import MultiLabelDataModule

        trainer = L.Trainer(
            max_epochs=2,
            accelerator="cpu",
            limit_train_batches=1,
            limit_val_batches=0,
            default_root_dir=tmp_path / "run",
            logger=False,
            callbacks=[BackboneExport()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = MultiLabelDataModule("synthetic", batch_size=8, size=32, num_workers=0)
        trainer.fit(MultiLabelSSLModule("test_resnet", projection_dim=16, predictor_dim=8), data)
        return trainer

    return run


def test_a_folder_without_shards_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder without shards .*: give .* checkpoints/last\.ckpt"):
        export_backbone(tmp_path, tmp_path / "a.safetensors")
    assert file_names(tmp_path) == []
