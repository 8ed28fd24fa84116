"""The online kNN: what it votes with, when, and what it refuses."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from _gloo import Processes
from torch import nn

from mlssl.callbacks import OnlineKNN
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.data.records import Records
from mlssl.distributed import rank, world_size
from mlssl.evaluation.features import extract_features
from mlssl.evaluation.metrics import mean_average_precision
from mlssl.evaluation.neighbors import knn_scores
from mlssl.module import MultiLabelSSLModule

Make = Callable[..., Any]


def some_scenes(split: str, count: int, seed: int = 0) -> Records:
    return synthetic_scenes(split, size=32, count=count, seed=seed)


def unlabelled(records: Records) -> Records:
    paths = [records.path(index) for index in range(len(records))]
    return Records(paths, image_ids=records.image_ids, decode=records.decode)


def test_map_is_that_of_the_votes_of_the_training_images(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    model, data = make_model(), make_data()
    trainer = make_trainer(OnlineKNN(k=5, every_n_epochs=2))
    trainer.fit(model, data)
    bank = extract_features(model, data.image_dataloader("train"))
    val = extract_features(model, data.image_dataloader("val"))
    scores = knn_scores(val.features, torch.nn.functional.normalize(bank.features).half(), bank.labels, 5)
    expected, _ = mean_average_precision(scores, val.labels)
    assert trainer.callback_metrics["knn/mAP"].item() == pytest.approx(expected, abs=1e-5)


def test_the_labelled_set_of_the_probe_is_preferred(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    model, own = make_model(), some_scenes("train", 10, seed=5)
    data = make_data(train=unlabelled(some_scenes("train", 18)), val=some_scenes("test", 11), probe_train=own)
    trainer = make_trainer(OnlineKNN(k=5, every_n_epochs=1))
    trainer.fit(model, data)
    assert 0 < trainer.callback_metrics["knn/mAP"] <= 1


def test_it_scores_every_n_epochs_and_always_outside_a_fit(
    make_model: Make, make_data: Make, make_trainer: Make
) -> None:
    passes: list[int] = []

    class Counted(OnlineKNN):
        def _features(self, loader: Any, pl_module: Any) -> Any:
            passes.append(pl_module.current_epoch)
            return super()._features(loader, pl_module)

    model, data = make_model(), make_data()
    trainer = make_trainer(Counted(k=3, every_n_epochs=2), max_epochs=5, num_sanity_val_steps=2)
    trainer.fit(model, data)
    assert passes == [1, 3]
    logged = trainer.validate(model, data, verbose=False)[0]
    assert "knn/mAP" in logged
    assert len(passes) == 3


def test_a_large_bank_is_subsampled_evenly(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    banks: list[Any] = []

    class Kept(OnlineKNN):
        def _features(self, loader: Any, pl_module: Any) -> Any:
            banks.append(super()._features(loader, pl_module))
            return banks[-1]

    data = make_data()
    make_trainer(Kept(k=3, every_n_epochs=2, max_images=7)).fit(make_model(), data)
    features, labels, ids = banks[0]
    assert features.dtype == torch.float16
    assert features.device.type == "cpu"
    assert ids.tolist() == data.train_records.image_ids[::3].tolist()
    assert np.array_equal(labels.numpy(), data.train_records.labels[::3])


@pytest.mark.parametrize("kind", ["no labels in the bank", "no labels in the val set", "nothing present"])
def test_without_a_bank_one_line_says_so(
    kind: str, make_model: Make, make_data: Make, make_trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    train, val = some_scenes("train", 18), some_scenes("test", 11)
    if kind == "no labels in the bank":
        train = unlabelled(train)
    elif kind == "no labels in the val set":
        val = unlabelled(val)
    data = make_data(train=train, val=val)
    if kind == "nothing present":
        data.setup()  # refuses such records, but does not check a loader
        paths, none = [val.path(index) for index in range(len(val))], np.zeros_like(val.labels)
        data.val_records = Records(paths, none, val.classes, image_ids=val.image_ids, decode=val.decode)
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(OnlineKNN(k=3, every_n_epochs=1))
        trainer.fit(make_model(), data)
    said = [message for message in caplog.messages if message.startswith("OnlineKNN")]
    sentence = {
        "no labels in the bank": "the images of the bank have no labels",
        "no labels in the val set": "the validation images have no labels",
        "nothing present": "no label is known to be present",
    }[kind]
    assert len(said) == 1
    assert sentence in said[0]
    assert "knn/mAP" not in trainer.callback_metrics


def test_a_run_without_whole_images_says_so(
    make_model: Make, make_data: Make, make_trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    data = make_data()
    with caplog.at_level(logging.INFO):
        make_trainer(OnlineKNN(every_n_epochs=1)).fit(
            make_model(views_per_step=16), data.train_dataloader(), data.val_dataloader()
        )
    assert any("no datamodule with whole images" in message for message in caplog.messages)


def test_a_bank_that_is_too_small_or_has_other_labels_is_refused(
    make_model: Make, make_data: Make, make_trainer: Make
) -> None:
    with pytest.raises(ValueError, match="k=19 was given, but the bank has 18 images"):
        make_trainer(OnlineKNN(k=19, every_n_epochs=1)).fit(make_model(), make_data())
    data, blank = make_data(), {"image": torch.zeros(3, 16, 16, dtype=torch.uint8)}
    data.probe_dataloader = lambda: torch.utils.data.DataLoader(
        [{**blank, "image_ids": number, "labels": torch.ones(5).int()} for number in range(4)], batch_size=4
    )
    with pytest.raises(ValueError, match="The bank has 5 labels, but the validation images have 12"):
        make_trainer(OnlineKNN(k=3, every_n_epochs=1)).fit(make_model(), data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k=0 was given: pass at least 1"),
        ({"every_n_epochs": 0}, "every_n_epochs=0 was given"),
        ({"temperature": 0}, "temperature=0 was given: pass a number above 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"k": 20, "max_images": 19}, "max_images=19 was given: pass at least k=20"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OnlineKNN(**settings)


# ---------------------------------------------------------------------- two processes


def knn_of_this_process(folder: Path, own_bank: bool) -> dict[str, Any]:
    """A run of two epochs on this process's share of the images, with nearly constant weights."""
    banks: list[Any] = []
    queries: list[int] = []

    class Watched(OnlineKNN):
        def _features(self, loader: Any, pl_module: Any) -> Any:
            banks.append(super()._features(loader, pl_module))
            return banks[-1]

        def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
            queries.append(len(outputs["features"]))
            super().on_validation_batch_end(trainer, pl_module, outputs, *args)

    torch.manual_seed(0)
    norm_free = nn.Sequential(nn.Conv2d(3, 12, 5, stride=3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = MultiLabelSSLModule(norm_free, projection_dim=16, predictor_dim=8, base_lr=1e-30)
    train, devices = some_scenes("train", 16), world_size()
    data = MultiLabelDataModule(
        train=unlabelled(train) if own_bank else train,
        val=some_scenes("test", 11),  # padded to 12 over two processes: the duplicate must not count
        probe_train=some_scenes("train", 13, seed=5) if own_bank else None,
        batch_size=4 // devices,
        size=16,
        num_workers=0,
    )
    if devices > 1:
        os.environ["LOCAL_RANK"] = str(rank())  # tells Lightning that the processes are already running
    try:
        trainer = L.Trainer(
            max_epochs=2,
            accelerator="cpu",
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            callbacks=[Watched(k=5, every_n_epochs=1)],
            logger=False,
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(model, data)
    finally:
        os.environ.pop("LOCAL_RANK", None)
    return {"mAP": trainer.callback_metrics["knn/mAP"], "bank": banks[-1], "queries": sum(queries)}


@pytest.mark.slow
@pytest.mark.parametrize("own_bank", [False, True])
def test_two_processes_score_as_one_does(own_bank: bool, tmp_path: Path, processes: Processes) -> None:
    one = knn_of_this_process(tmp_path, own_bank)
    both = processes.run(knn_of_this_process, tmp_path, own_bank)
    assert one["queries"] == 2 * 11
    for result in both:
        assert result["queries"] == 2 * 6
        torch.testing.assert_close(result["mAP"], one["mAP"], rtol=1e-5, atol=0)
        for found, expected in zip(result["bank"], one["bank"], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
