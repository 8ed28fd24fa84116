"""Batch-norm statistics of whole images, at the end of a run."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import safetensors.torch
import torch
from _gloo import Processes
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn

from mlssl.callbacks import BackboneExport, BatchNormStatistics
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.data.records import Records
from mlssl.distributed import rank, world_size
from mlssl.module import MultiLabelSSLModule

Make = Callable[..., Any]


def expected(model: Any, data: Any, indices: list[int], size: int) -> tuple[Tensor, Tensor]:
    """Mean over batches of mean and unbiased variance of the input of the batch norm in conftest's backbone."""
    images = [data.image_dataloader("train").dataset[index]["image"] for index in indices]
    with torch.no_grad():
        maps = [
            model.backbone[0](model.normalize(torch.stack(images[first : first + size]))).transpose(0, 1).flatten(1)
            for first in range(0, len(images) - size + 1, size)
        ]
    return torch.stack([one.mean(1) for one in maps]).mean(0), torch.stack([one.var(1) for one in maps]).mean(0)


@pytest.mark.parametrize(("num_images", "indices"), [(1000, range(18)), (9, range(0, 18, 2)), (2, [0, 17])])
def test_statistics_are_those_of_whole_images(
    num_images: int, indices: Any, make_model: Make, make_data: Make, make_trainer: Make
) -> None:
    model, data = make_model(base_lr=1.0), make_data()
    state: list[Any] = []

    class Watched(BatchNormStatistics):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            before = torch.get_rng_state(), [module.training for module in pl_module.modules()]
            weights = [parameter.clone() for parameter in pl_module.parameters()]
            momentum = pl_module.backbone[1].momentum
            super().on_train_end(trainer, pl_module)
            assert torch.equal(before[0], torch.get_rng_state())
            assert before[1] == [module.training for module in pl_module.modules()]
            assert all(torch.equal(*pair) for pair in zip(weights, pl_module.parameters(), strict=True))
            assert pl_module.backbone[1].momentum == momentum == 0.1
            state.append(pl_module.backbone[1].running_mean.clone())

    make_trainer(Watched(num_images)).fit(model, data)
    chosen = [round(index) for index in torch.linspace(0, 17, min(num_images, 18)).tolist()]
    if num_images != 9:
        assert chosen == list(indices)
    mean, variance = expected(model, data, chosen, min(4, len(chosen)))
    torch.testing.assert_close(state[0], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.backbone[1].running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.backbone[1].running_var, variance, rtol=1e-4, atol=1e-5)
    assert (model.projector[1].running_mean != 0).any()


def test_export_and_last_checkpoint_contain_them_and_the_run_can_resume(
    make_model: Make, make_data: Make, make_trainer: Make
) -> None:
    folders = []
    for callbacks in ([], [BatchNormStatistics()]):
        saver = ModelCheckpoint(save_last=True, filename="{epoch}")
        trainer = make_trainer(BackboneExport(), *callbacks, saver, enable_checkpointing=True)
        trainer.fit(make_model(dropout=0.0), make_data())
        folders.append((Path(trainer.default_root_dir), Path(saver.last_model_path)))
    exported = [safetensors.torch.load_file(folder / "exports" / "backbone.safetensors") for folder, _ in folders]
    saved = [torch.load(path, weights_only=True) for _, path in folders]
    changed = {name for name in exported[0] if not torch.equal(exported[0][name], exported[1][name])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert all(torch.equal(value, saved[1]["state_dict"][f"backbone.{name}"]) for name, value in exported[1].items())
    assert saved[0]["global_step"] == saved[1]["global_step"] == 8

    weights = []
    for _, path in folders:
        model, trainer = (
            make_model(dropout=0.0),
            make_trainer(ModelCheckpoint(), enable_checkpointing=True, max_epochs=3),
        )
        trainer.fit(model, make_data(), ckpt_path=path)
        assert (trainer.current_epoch, trainer.global_step) == (3, 12)
        weights.append([parameter.detach() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


def test_averaged_weights_get_their_own_statistics(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    model, data = make_model(base_lr=1.0), make_data()
    make_trainer(EMAWeightAveraging(decay=0.5), BatchNormStatistics()).fit(model, data)
    mean, _ = expected(model, data, list(range(18)), 4)
    torch.testing.assert_close(model.backbone[1].running_mean, mean, rtol=1e-4, atol=1e-5)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if message.startswith("BatchNormStatistics")]


def test_if_nothing_can_be_done_one_line_says_so(
    make_model: Make, make_data: Make, make_trainer: Make, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    data = make_data()
    with caplog.at_level(logging.INFO):
        make_trainer(BatchNormStatistics()).fit(
            make_model(views_per_step=16), data.train_dataloader(), data.val_dataloader()
        )
        assert "no datamodule with whole images" in said(caplog)[-1]
        norm_free = nn.Sequential(nn.Conv2d(3, 12, 5, stride=3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        make_trainer(BatchNormStatistics()).fit(make_model(backbone=norm_free), make_data())
        assert "no batch norm with running statistics" in said(caplog)[-1]
        monkeypatch.setattr("mlssl.callbacks.batch_norm.is_sharded", lambda _network: True)
        make_trainer(BatchNormStatistics()).fit(make_model(), make_data())
        assert "FSDP shards the network" in said(caplog)[-1]
    assert len(said(caplog)) == 3


def test_nothing_is_done_under_fast_dev_run(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    model = make_model()
    make_trainer(BatchNormStatistics(), fast_dev_run=1).fit(model, make_data())
    assert model.backbone[1].num_batches_tracked == 2  # once per branch


def test_unlabelled_images_are_enough(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    scenes = synthetic_scenes("train", size=32, count=18)
    unlabelled = Records([scenes.path(i) for i in range(18)], image_ids=scenes.image_ids, decode=scenes.decode)
    model, data = make_model(), make_data(train=unlabelled, val=None)
    make_trainer(BatchNormStatistics()).fit(model, data)
    mean, _ = expected(model, data, list(range(18)), 4)
    torch.testing.assert_close(model.backbone[1].running_mean, mean, rtol=1e-4, atol=1e-5)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="num_images=1 was given: pass at least 2, or leave BatchNormStatistics out"):
        BatchNormStatistics(1)


def statistics_of_this_process(folder: Path) -> list[Tensor]:
    """Running mean and variance after an epoch on this process's share of images, with nearly constant weights."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 12, 5, stride=3), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = MultiLabelSSLModule(nn.Sequential(*layers), projection_dim=16, predictor_dim=8, base_lr=1e-30)
    train = synthetic_scenes("train", size=32, count=16)
    data = MultiLabelDataModule(train=train, batch_size=4, size=16, num_workers=0)
    if world_size() > 1:
        os.environ["LOCAL_RANK"] = str(rank())  # tells Lightning that the processes are already running
    try:
        trainer = L.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=world_size(),
            strategy="ddp" if world_size() > 1 else "auto",
            callbacks=[BatchNormStatistics()],
            logger=False,
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*batch norms use the statistics")
            trainer.fit(model, data)
    finally:
        os.environ.pop("LOCAL_RANK", None)
    return [layers[1].running_mean.clone(), layers[1].running_var.clone()]


def test_all_devices_get_the_statistics_of_one(tmp_path: Path, processes: Processes) -> None:
    alone = statistics_of_this_process(tmp_path)
    for found in processes.run(statistics_of_this_process, tmp_path):
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)
