"""The online probe: what it learns, its messages, and its state in checkpoints."""

from __future__ import annotations

import logging
import math
import random
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mlssl.callbacks import OnlineLinearProbe
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.data.records import Records
from mlssl.evaluation.features import extract_features
from mlssl.evaluation.metrics import mean_average_precision

Make = Callable[..., Any]


def with_labels(records: Records, labels: np.ndarray | None) -> Records:
    classes = [] if labels is None else [f"class {i}" for i in range(labels.shape[1])]
    paths = [records.path(index) for index in range(len(records))]
    return Records(paths, labels, classes, image_ids=records.image_ids, decode=records.decode)


def some_scenes(split: str, count: int, seed: int = 0) -> Records:
    return synthetic_scenes(split, size=32, count=count, seed=seed)


# ---------------------------------------------------------------------- what it measures


def test_map_is_that_of_the_classifier_on_the_whole_validation_images(
    make_model: Make, make_data: Make, make_trainer: Make
) -> None:
    labels = np.array(some_scenes("test", 11).labels)
    labels[:, 3] = 0  # a class without a positive
    labels[2:5, 1] = -1
    labels[:, 7] = -1
    train = some_scenes("train", 18)
    data = make_data(train=with_labels(train, np.array(train.labels)), val=with_labels(some_scenes("test", 11), labels))
    model, probe = make_model(), OnlineLinearProbe()
    trainer = make_trainer(probe)
    trainer.fit(model, data)

    features = extract_features(model, data.val_dataloader())
    state = probe.state_dict()
    inputs = ((features.features - state["mean"]) / state["variance"].sqrt()).clamp(-10, 10)
    expected, classes = mean_average_precision(inputs @ state["weight"].T + state["bias"], torch.from_numpy(labels))
    assert trainer.callback_metrics["probe/mAP"].item() == pytest.approx(expected, abs=1e-6)
    assert trainer.callback_metrics["probe/classes"].item() == classes == (labels == 1).any(0).sum() < 11


def test_it_learns_classes_that_the_features_separate() -> None:
    generator = torch.Generator().manual_seed(0)
    probe = OnlineLinearProbe()
    directions = torch.randn(5, 64, generator=generator)
    first, last = math.nan, math.nan
    for step in range(300):
        features = torch.randn(32, 64, generator=generator)
        labels = (features @ directions.T > 0).long()
        # Scale and offset of each feature do not matter.
        last = probe._probe_for(features, labels, "images").step(1e-3 * features + 5, labels).item()
        first = last if step == 0 else first
    assert first == pytest.approx(math.log(2), abs=1e-6)
    assert last < 0.2


def test_unknown_labels_are_ignored(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    train, states = some_scenes("train", 18), []
    for labels in (np.array(train.labels), np.array(train.labels)):
        if states:
            labels[:, 4:] = -1
        probe = OnlineLinearProbe()
        make_trainer(probe).fit(make_model(), make_data(train=with_labels(train, labels), val=None))
        states.append(probe.state_dict())
    for name in ("weight", "bias"):
        torch.testing.assert_close(states[1][name][:4], states[0][name][:4])
        assert (states[1][name][4:] == 0).all()
        assert (states[0][name][4:] != 0).all()


def test_bool_labels_and_a_single_class_are_fine(make_model: Make, make_trainer: Make) -> None:
    trainer = make_trainer(OnlineLinearProbe())
    trainer.fit(
        make_model(views_per_step=16), OwnData(train_labels=torch.ones(8, 1) > 0, val_labels=torch.eye(6)[:, :1] > 0)
    )
    assert 0 < trainer.callback_metrics["probe/mAP"] <= 1
    assert trainer.callback_metrics["probe/classes"] == 1


def test_it_computes_in_float32_under_bf16(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    probe = OnlineLinearProbe()
    trainer = make_trainer(probe, precision="bf16-mixed")
    trainer.fit(make_model(), make_data())
    assert {tensor.dtype for tensor in probe.state_dict().values() if isinstance(tensor, Tensor)} == {torch.float32}
    assert 0 < trainer.callback_metrics["probe/mAP"] < 1


def test_a_feature_that_is_active_only_in_validation_cannot_dominate() -> None:
    probe = OnlineLinearProbe()
    features = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).relu()
    features[:, 2] = 0
    labels = (features[:, :1] > 0.5).long()
    for _ in range(50):
        learned = probe._probe_for(features, labels, "images")
        learned.step(features, labels)
    awake = features + torch.tensor([0, 0, 1e6])
    torch.testing.assert_close(learned.logits(awake), learned.logits(features))
    assert learned.logits(1e9 * features).abs().max() < 1e3


# ---------------------------------------------------------------------- when it has nothing to do


def test_without_labels_nothing_is_built_and_one_line_says_so(
    make_model: Make, make_data: Make, make_trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    probe = OnlineLinearProbe()
    unlabelled = with_labels(some_scenes("train", 18), None)
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(probe)
        trainer.fit(make_model(), make_data(train=unlabelled))
    assert probe.state_dict() == {}
    assert said(caplog) == [
        "OnlineLinearProbe: the training images have no labels, so there is no probe.",
        "OnlineLinearProbe: the probe was not trained before this validation, so there is no probe/mAP.",
    ]
    assert not any(name.startswith("probe") for name in trainer.callback_metrics)


def test_validation_images_without_labels_are_reported(
    make_model: Make, make_data: Make, make_trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(OnlineLinearProbe())
        trainer.fit(make_model(), make_data(val=with_labels(some_scenes("test", 11), None)))
    assert said(caplog) == ["OnlineLinearProbe: the validation images have no labels, so there is no probe/mAP."]
    assert "probe/loss" in trainer.callback_metrics


@pytest.mark.parametrize("value", [0, -1])
def test_validation_images_without_a_known_positive_are_reported(
    value: int, make_model: Make, make_data: Make, make_trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    train, val = some_scenes("train", 18), some_scenes("test", 11)
    data = make_data(train=with_labels(train, np.array(train.labels)), val=with_labels(val, np.array(val.labels)))
    data.setup()  # refuses such records, but does not check a loader
    data.val_records = with_labels(val, np.full((11, 12), value))
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(OnlineLinearProbe())
        trainer.fit(make_model(), data)
    (line,) = said(caplog)
    assert "no label is known to be present in a validation image" in line
    assert "probe/mAP" not in trainer.callback_metrics


def test_steps_that_return_no_features_are_reported(
    make_model: Make, make_data: Make, make_trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    step = model.training_step
    model.training_step = lambda batch, batch_idx: step(batch, batch_idx)["loss"]
    model.validation_step = lambda *_: None
    with caplog.at_level(logging.INFO):
        make_trainer(OnlineLinearProbe()).fit(model, make_data())
    assert said(caplog) == [
        "OnlineLinearProbe: the training step returns no features, so there is no probe.",
        "OnlineLinearProbe: the validation step returns no features, so there is no probe/mAP.",
    ]


def test_validating_before_training_is_reported_and_after_it_repeats_the_score(
    make_model: Make, make_data: Make, make_trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    model, data = make_model(), make_data()
    trainer = make_trainer(OnlineLinearProbe(), num_sanity_val_steps=2)
    with caplog.at_level(logging.INFO):
        assert trainer.validate(model, data, verbose=False) == [{}]
    assert "the probe was not trained before this validation" in said(caplog)[0]
    trainer.fit(model, data)
    logged = trainer.callback_metrics["probe/mAP"].item()
    assert trainer.validate(model, data, verbose=False)[0]["probe/mAP"] == logged


def test_a_part_of_the_validation_set_is_enough(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    trainer = make_trainer(OnlineLinearProbe(), limit_val_batches=1)
    trainer.fit(make_model(), make_data())
    assert 0 < trainer.callback_metrics["probe/classes"] < 12


# ---------------------------------------------------------------------- a separate labelled set


def test_it_learns_from_the_labelled_set_if_there_is_one(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    passes: list[Tensor] = []

    class Counted(OnlineLinearProbe):
        def _probe_for(self, features: Tensor, labels: Tensor, images: str) -> Any:
            if images == "images of probe_dataloader":
                passes.append(labels)
            return super()._probe_for(features, labels, images)

    labelled = some_scenes("train", 10, seed=5)
    unlabelled = with_labels(some_scenes("train", 18), None)
    probe = Counted()
    trainer = make_trainer(probe)
    trainer.fit(make_model(), make_data(train=unlabelled, val=some_scenes("test", 11), probe_train=labelled))
    assert [len(labels) for labels in passes] == [4, 4, 2] * 2
    assert torch.cat(passes[:3]).sum(0).tolist() == labelled.labels.sum(0).tolist()
    assert probe.state_dict()["num_steps"] == 6
    assert {"probe/mAP", "probe/loss"} <= set(trainer.callback_metrics)


def test_learning_from_the_labelled_set_changes_no_random_state_flag_or_buffer(
    make_model: Make, make_data: Make, make_trainer: Make
) -> None:
    seen = []

    class Watched(OnlineLinearProbe):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            before = state(pl_module)
            super().on_train_batch_end(trainer, pl_module, *args)
            assert state(pl_module) == before
            seen.append(self.state_dict())

    def state(model: L.LightningModule) -> Any:
        flags = [module.training for module in model.modules()]
        buffers = [buffer.tolist() for buffer in model.buffers()]
        generators = torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002
        return flags, buffers, generators

    model = make_model()
    frozen = model.backbone[1].eval()  # the user's choice, which must not change
    with pytest.warns(UserWarning, match="1 module.* in eval mode"):
        make_trainer(Watched()).fit(model, make_data(probe_train=some_scenes("train", 9, seed=5)))
    assert not frozen.training
    assert [bool(state) for state in seen] == [False] * 3 + [True] * 5


def test_a_labelled_set_without_labels_is_reported(
    make_model: Make, make_data: Make, make_trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    data = make_data()
    data.probe_dataloader = lambda: DataLoader(
        [{"image": torch.zeros(3, 16, 16, dtype=torch.uint8), "image_ids": i} for i in range(4)], batch_size=4
    )
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(OnlineLinearProbe())
        trainer.fit(make_model(), data)
    assert "the images of probe_dataloader have no labels" in said(caplog)[0]


def test_a_model_that_cannot_process_the_labelled_set_is_refused(make_data: Make, make_trainer: Make) -> None:
    class Own(L.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None: ...
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([torch.zeros(1, requires_grad=True)])

    with pytest.raises(TypeError, match=r"Own has no `backbone` and `normalize`.*leave probe_train out"):
        make_trainer(OnlineLinearProbe()).fit(Own(), make_data(probe_train=some_scenes("train", 9)))


# ---------------------------------------------------------------------- stop and resume


def checkpoint_of_one_epoch(make_model: Make, make_data: Make, make_trainer: Make, *callbacks: L.Callback) -> Path:
    trainer = make_trainer(*callbacks, max_epochs=2, limit_train_batches=4)
    path = Path(trainer.default_root_dir) / "half.ckpt"

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.save_checkpoint(path)
            trainer.should_stop = True

    trainer.callbacks.append(Stop())
    trainer.fit(make_model(), make_data())
    return path


@pytest.mark.parametrize("own_set", [False, True])
def test_stopping_and_resuming_equals_the_uninterrupted_run(
    own_set: bool, make_model: Make, make_data: Make, make_trainer: Make
) -> None:
    def data() -> MultiLabelDataModule:
        return make_data(probe_train=some_scenes("train", 9, seed=5) if own_set else None)

    def seeded_model() -> Any:
        return make_model(dropout=0.0)  # no checkpoint contains the state of its samples

    whole, resumed = OnlineLinearProbe(), OnlineLinearProbe()
    straight = make_trainer(whole)
    straight.fit(seeded_model(), data())
    path = checkpoint_of_one_epoch(seeded_model, data, make_trainer, OnlineLinearProbe())
    second = make_trainer(resumed)
    second.fit(seeded_model(), data(), ckpt_path=path)
    assert flat(resumed.state_dict()) == flat(whole.state_dict())
    assert second.callback_metrics["probe/mAP"] == straight.callback_metrics["probe/mAP"]


def test_its_state_is_part_of_the_checkpoint_and_loads_as_weights_only(
    make_model: Make, make_data: Make, make_trainer: Make
) -> None:
    path = checkpoint_of_one_epoch(make_model, make_data, make_trainer, OnlineLinearProbe())
    state = torch.load(path, weights_only=True)["callbacks"]["OnlineLinearProbe"]
    assert state["weight"].shape == (12, 12)
    assert state["num_steps"] == 4
    assert state["optimizer"]["state"][0]["momentum_buffer"].shape == (12, 12)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_validating_or_testing_a_checkpoint_repeats_its_score(
    command: str, make_model: Make, make_data: Make, make_trainer: Make
) -> None:
    probe = OnlineLinearProbe()
    trainer = make_trainer(probe)
    trainer.fit(make_model(), make_data())
    path = Path(trainer.default_root_dir) / "end.ckpt"
    trainer.save_checkpoint(path)
    call = getattr(make_trainer(OnlineLinearProbe()), command)
    again = call(make_model(), make_data(), ckpt_path=path, verbose=False)
    assert again[0]["probe/mAP"] == trainer.callback_metrics["probe/mAP"].item()


def test_the_probe_can_be_added_on_resume(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    path = checkpoint_of_one_epoch(make_model, make_data, make_trainer)
    probe = OnlineLinearProbe()
    trainer = make_trainer(probe)
    trainer.fit(make_model(), make_data(), ckpt_path=path)
    assert probe.state_dict()["num_steps"] == 4
    assert "probe/mAP" in trainer.callback_metrics


def test_the_probe_can_be_dropped_on_resume(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    path = checkpoint_of_one_epoch(make_model, make_data, make_trainer, OnlineLinearProbe())
    trainer = make_trainer()
    with pytest.warns(UserWarning, match="Please add the following callbacks: .'OnlineLinearProbe'"):
        trainer.fit(make_model(), make_data(), ckpt_path=path)
    assert trainer.current_epoch == 2
    assert not any(name.startswith("probe") for name in trainer.callback_metrics)


# ---------------------------------------------------------------------- what it refuses


def test_validation_labels_of_another_width_are_refused(make_model: Make, make_trainer: Make) -> None:
    data = OwnData(train_labels=torch.ones(8, 5, dtype=torch.int8), val_labels=torch.ones(6, 7, dtype=torch.int8))
    with pytest.raises(
        ValueError, match="trained on 5 labels, but the validation images have 7: give all sets the same"
    ):
        make_trainer(OnlineLinearProbe()).fit(make_model(views_per_step=16), data)


def test_a_checkpoint_of_other_labels_or_features_is_refused(
    make_model: Make, make_data: Make, make_trainer: Make
) -> None:
    path = checkpoint_of_one_epoch(make_model, make_data, make_trainer, OnlineLinearProbe())
    train, val = some_scenes("train", 18).with_classes(range(5)), some_scenes("test", 11).with_classes(range(5))
    with pytest.raises(ValueError, match="trained on 12 labels, but the training images have 5"):
        make_trainer(OnlineLinearProbe()).fit(make_model(), make_data(train=train, val=val), ckpt_path=path)

    probe = OnlineLinearProbe()
    probe.load_state_dict(torch.load(path, weights_only=True)["callbacks"]["OnlineLinearProbe"])
    with pytest.raises(ValueError, match="features of width 12, but those of the training images have width 512"):
        make_trainer(probe).fit(make_model(backbone="resnet18"), make_data())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0}, "lr=0 was given: pass a learning rate above 0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"weight_decay": -1e-9}, "weight_decay=-1e-09 was given: pass a number of at least 0"),
        ({"weight_decay": math.nan}, "weight_decay=nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OnlineLinearProbe(**settings)


# ---------------------------------------------------------------------- two processes

TWO_PROCESSES = """
import sys
from pathlib import Path
import lightning as L, torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from mlssl.callbacks import CollapseMonitor, OnlineLinearProbe, Throughput
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.module import MultiLabelSSLModule

torch.set_num_threads(1)
devices, folder = int(sys.argv[1]), sys.argv[2]
L.seed_everything(0, verbose=False)
norm_free = nn.Sequential(nn.Conv2d(3, 12, 5, stride=3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
model = MultiLabelSSLModule(norm_free, projection_dim=16, predictor_dim=8, base_lr=1e-30)
data = MultiLabelDataModule(
    train=synthetic_scenes("train", size=32, count=16), val=synthetic_scenes("test", size=32, count=11),
    batch_size=4 // devices, size=16, num_workers=0,
)
probe = OnlineLinearProbe()
trainer = L.Trainer(
    max_epochs=2, accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto",
    callbacks=[probe, CollapseMonitor(stop=True, min_std=0), Throughput()], log_every_n_steps=1, logger=False,
    default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
)
trainer.fit(model, data)
weight = probe.state_dict()["weight"]
if devices > 1:
    other = weight.clone()
    dist.broadcast(other, 0)
    assert torch.equal(weight, other), "the ranks differ"
if trainer.is_global_zero:
    Path(folder).mkdir(exist_ok=True)
    torch.save({"state": probe.state_dict(), "mAP": trainer.callback_metrics["probe/mAP"]}, folder + "/result.pt")
"""


@pytest.mark.slow
def test_two_processes_learn_and_score_as_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The validation set of 11 is padded to 12 over two processes: its duplicate must not count.
    script = tmp_path / "run.py"
    script.write_text(TWO_PROCESSES)
    monkeypatch.setattr(sys, "argv", ["run.py", "1", str(tmp_path / "one")])
    runpy.run_path(str(script))
    subprocess.run(
        [sys.executable, str(script), "2", str(tmp_path / "two")], check=True, timeout=200, capture_output=True
    )

    one, two = (torch.load(tmp_path / name / "result.pt", weights_only=True) for name in ("one", "two"))
    for name in ("weight", "bias", "mean", "variance"):
        torch.testing.assert_close(two["state"][name], one["state"][name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(two["mAP"], one["mAP"], rtol=1e-5, atol=0)


# ---------------------------------------------------------------------- helpers


class OwnData(L.LightningDataModule):
    """A custom datamodule with labels of any kind."""

    def __init__(self, train_labels: Tensor, val_labels: Tensor) -> None:
        super().__init__()
        self.train_labels, self.val_labels = train_labels, val_labels

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(_Items("views", (2, 4, 3, 16, 16), self.train_labels), batch_size=4)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(_Items("image", (3, 16, 24), self.val_labels), batch_size=3)


class _Items(Dataset[dict[str, Any]]):
    def __init__(self, key: str, shape: tuple[int, ...], labels: Tensor) -> None:
        self.key, self.shape, self.labels = key, shape, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        pixels = torch.randint(256, self.shape, dtype=torch.uint8, generator=generator)
        return {self.key: pixels, "image_ids": index, "labels": self.labels[index]}


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if message.startswith("OnlineLinearProbe")]


def flat(state: dict[str, Any]) -> list[Any]:
    return [value.tolist() if isinstance(value, Tensor) else value for value in torch.utils._pytree.tree_leaves(state)]
