"""What a step compares is said once, at the start of a run."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from _gloo import Processes
from _toy import OwnData, small, trainer, view_batch
from torch import nn

from mlssl.callbacks.step_summary import StepSummary, count_unsynchronised, describe_step


def test_first_step_of_a_run_says_what_it_compares(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trainer(tmp_path, max_epochs=2).fit(small(), OwnData())
    said = [record.message for record in caplog.records if record.message.startswith("A step:")]
    # 4 images × 3 blocks × 2 branches: an anchor meets the other 5 of its image and the 18 of the other images
    assert said == [
        "A step: 4 images on each of 1 device(s), 24 views; each anchor meets 5 positives and 18 negatives. "
        "Gradient accumulation adds none."
    ]


def test_negatives_are_those_of_all_devices() -> None:
    said = describe_step(torch.zeros(4, 3, 2, 3, 8, 8), devices=5)
    assert "4 images on each of 5 device(s), 120 views" in said
    assert "3 positives and 76 negatives" in said  # of a set of two branches: 2 · 4 · 2 · 5 anchors


def test_a_summary_that_the_user_gave_is_not_added_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trainer(tmp_path, callbacks=[StepSummary()]).fit(small(), OwnData())
    assert sum(record.message.startswith("A step:") for record in caplog.records) == 1


def batch_norms() -> list[nn.Module]:
    return [nn.BatchNorm1d(2), nn.BatchNorm2d(2).eval(), nn.SyncBatchNorm(2), nn.LayerNorm(2)]


def test_batch_norms_of_one_device_alone_are_counted() -> None:
    assert count_unsynchronised(batch_norms()) == 1  # one is in eval mode, one is synchronised


def warned_on_two_devices(is_frozen: bool) -> list[str]:
    module, batch = small(), view_batch()
    module.train(not is_frozen)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        StepSummary().on_train_batch_start(SimpleNamespace(global_step=0), module, batch, 0)  # type: ignore[arg-type]
    return [str(warning.message) for warning in caught if "batch norms" in str(warning.message)]


def test_batch_norms_that_are_not_synchronised_are_named_once(processes: Processes) -> None:
    (said,), other = processes.run(warned_on_two_devices, False)
    assert "batch norms take their statistics from one device alone, so 2 devices do not" in said
    assert "sync_batchnorm" in said
    assert other == []
    assert processes.run(warned_on_two_devices, True) == [[], []]
    assert warned_on_two_devices(False) == []
