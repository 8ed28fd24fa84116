"""The summary of a step is printed once, at the start of a run."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from _gloo import Processes
from _toy import OwnData, small, trainer, view_batch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from mlssl.callbacks.step_summary import StepSummary, block, count_unsynchronised, describe_step
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.described import describe
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.distributed import rank


def blocks(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [" ".join(record.message.split()) for record in caplog.records if "\nstep " in record.message]


def test_the_start_of_a_run_prints_its_data_and_devices(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2).fit(small(), OwnData())
    (said,) = blocks(caplog)
    # 4 images × 3 blocks × 2 branches: an anchor meets the other 5 of its image and the 18 of the other images
    assert said.startswith(
        "train 8 images step 4 images, 24 views of 32 × 32 pixels (2 × 3 per image); each anchor meets 5 positives and "
        "18 negatives, and gradient accumulation does not add any epoch 2 steps run 2 epochs, 4 steps network "
        "test_resnet and its heads, 0.4 million parameters devices 1 × CPU ("
    )
    assert said.endswith(f" cores), precision 32-true, loader processes 0 folder {tmp_path}")


def test_the_block_of_the_librarys_data_names_sets_classes_and_left_out_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sets = {"train": synthetic_scenes("train", size=32, count=18), "val": synthetic_scenes("test", size=32, count=11)}
    data = MultiLabelDataModule(batch_size=4, size=32, num_workers=0, **sets)
    fitting = trainer(tmp_path, max_steps=2)
    with caplog.at_level("INFO"):
        fitting.fit(small(), data)
    (said,) = blocks(caplog)
    assert said.startswith(f"train {describe(sets['train'])} 2 of 12 classes are shown by no image")
    assert " epoch 4 steps; 2 images are left out, different ones each time run 1 epoch, 2 steps network " in said
    with caplog.at_level("INFO"):
        trainer(tmp_path).validate(small(), data, verbose=False)
    said = " ".join(caplog.messages[-1].split())
    assert said.startswith("train 18 images, 12 classes")
    assert "devices 1 × CPU" in said
    assert " step " not in said


def test_a_block_is_wrapped_between_words_and_never_before_a_count() -> None:
    said = block([("train", "4500 images; most frequent: water 1004, sky 883, tree 854"), ("folder", "/a" * 30)], 40)
    assert said.splitlines() == [
        "",
        "train     4500 images; most frequent:",
        "          water 1004, sky 883, tree 854",
        "folder    " + "/a" * 30,  # a path is kept whole
    ]


def test_negatives_are_those_of_all_devices() -> None:
    said = describe_step(torch.zeros(4, 3, 2, 3, 8, 8), devices=5)
    assert said.startswith("4 images on each of 5 devices, 120 views of 8 × 8 pixels")
    assert "3 positives and 76 negatives" in said  # of a set of two branches: 2 · 4 · 2 · 5 anchors
    within = describe_step(torch.zeros(4, 3, 2, 3, 8, 8), devices=4, compared=2)
    assert "4 devices" in within
    assert "3 positives and 28 negatives" in within


def test_a_summary_that_the_user_gave_is_not_added_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trainer(tmp_path, callbacks=[StepSummary()]).fit(small(), OwnData())
    assert len(blocks(caplog)) == 1


def batch_norms() -> list[nn.Module]:
    return [nn.BatchNorm1d(2), nn.BatchNorm2d(2).eval(), nn.SyncBatchNorm(2), nn.LayerNorm(2)]


def test_batch_norms_with_statistics_of_one_device_are_counted() -> None:
    assert count_unsynchronised(batch_norms()) == 1  # one is in eval mode, one is synchronised


_TRAINER = SimpleNamespace(
    accumulate_grad_batches=1,
    current_epoch=0,
    datamodule=None,
    default_root_dir="",
    max_epochs=1,
    max_steps=-1,
    num_training_batches=1,
    precision="32-true",
    strategy=SimpleNamespace(root_device=torch.device("cpu")),
    train_dataloader=[],
    val_dataloaders=None,
    predict_dataloaders=None,
    world_size=2,
)


def warned_on_two_devices(is_frozen: bool) -> list[str]:
    rank_zero_only.rank = rank()  # type: ignore[attr-defined]  # as Lightning's strategies set it
    module, batch = small(), view_batch()
    module.train(not is_frozen)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        StepSummary().on_train_batch_start(_TRAINER, module, batch, 0)  # type: ignore[arg-type]
    return [str(warning.message) for warning in caught if "batch norms" in str(warning.message)]


def test_unsynchronised_batch_norms_are_reported_once(processes: Processes) -> None:
    (said,), other = processes.run(warned_on_two_devices, False)
    assert "batch norms use the statistics of one device only, so 2 devices do not" in said
    assert "sync_batchnorm" in said
    assert other == []
    assert processes.run(warned_on_two_devices, True) == [[], []]
    assert warned_on_two_devices(False) == []
