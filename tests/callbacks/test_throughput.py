"""The throughput: waiting and computing are measured separately, in wall-clock seconds."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from mlssl.callbacks import Throughput
from mlssl.data.decoding import ImageArray
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.data.records import Records

Make = Callable[..., Any]
WAIT = 0.03  # seconds per image, four images per step


class Slow:
    """Decodes like another function, after a wait."""

    def __init__(self, records: Records, seconds: float = WAIT) -> None:
        self.decode, self.seconds = records.decode, seconds

    def __call__(self, path: Path) -> ImageArray:
        time.sleep(self.seconds)
        return self.decode(path)


def slow(records: Records) -> Records:
    assert records.labels is not None
    paths = [records.path(index) for index in range(len(records))]
    return Records(paths, records.labels, records.classes, image_ids=records.image_ids, decode=Slow(records))


def logged(trainer: L.Trainer, name: str) -> list[float]:
    rows = csv.DictReader((Path(trainer.default_root_dir) / "metrics.csv").read_text().splitlines())
    return [float(row[name]) for row in rows if row.get(name)]


@pytest.mark.slow
def test_a_slow_loader_shows_as_time_for_data(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    trainer = make_trainer(Throughput(), log_every_n_steps=1)
    trainer.fit(make_model(), make_data(train=slow(synthetic_scenes("train", size=32, count=18)), val=None))
    data, step = logged(trainer, "time/data"), logged(trainer, "time/step")
    assert len(data) == 6  # of 8 steps without the first of each epoch
    assert min(data) >= 4 * WAIT
    assert max(step) < 4 * WAIT


def test_a_slow_step_shows_as_time_for_computing(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    model = make_model()
    step = model.training_step

    def slow_step(batch: Any, batch_idx: int) -> Any:
        time.sleep(0.1)
        return step(batch, batch_idx)

    model.training_step = slow_step
    trainer = make_trainer(Throughput(), log_every_n_steps=1)
    trainer.fit(model, make_data(val=None))
    assert min(logged(trainer, "time/step")) >= 0.1
    assert max(logged(trainer, "time/data")) < 0.1


def test_validation_counts_as_neither(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    trainer = make_trainer(Throughput(), log_every_n_steps=1, val_check_interval=2)
    trainer.fit(make_model(), make_data(val=slow(synthetic_scenes("test", size=32, count=11))))
    assert (
        len(set(logged(trainer, "time/data"))) == 4
    )  # half of the steps follow a validation and repeat the mean before
    assert max(logged(trainer, "time/data") + logged(trainer, "time/step")) < 11 * WAIT


def test_images_per_second_counts_images_of_all_devices_over_both_times(
    make_model: Make, make_data: Make, make_trainer: Make
) -> None:
    trainer = make_trainer(Throughput(), log_every_n_steps=1)
    trainer.fit(make_model(), make_data())
    rates = zip(*(logged(trainer, name) for name in ("throughput/images_per_s", "time/data", "time/step")), strict=True)
    for rate, data, step in rates:
        assert rate == pytest.approx(4 / (data + step), rel=1e-4)


def test_the_means_are_over_the_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty steps of 1 s after a wait of 2 s, then fifty of 3 s after 4 s: the mean contains only the latter."""
    clock, seen = [0.0], {}
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    class Model:
        def log(self, name: str, value: torch.Tensor, **_: Any) -> None:
            assert value.device.type == "cpu"  # nothing to wait for
            seen[name] = value.item()

    class FourDevices:
        world_size = 4

    throughput, batch = Throughput(), {"image_ids": torch.arange(8)}
    throughput.on_train_epoch_start(FourDevices(), Model())
    for wait, compute in [(2, 1)] * 60 + [(4, 3)] * 50:
        clock[0] += wait
        throughput.on_train_batch_start(FourDevices(), Model(), batch, 0)
        clock[0] += compute
        throughput.on_train_batch_end(FourDevices(), Model(), None, batch, 0)
    assert seen == {"time/data": 4, "time/step": 3, "throughput/images_per_s": pytest.approx(4 * 8 / 7)}


def test_the_progress_bar_shows_them(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    trainer = make_trainer(Throughput())
    trainer.fit(make_model(), make_data())
    assert {"time/data", "time/step", "throughput/images_per_s"} <= set(trainer.progress_bar_metrics)


def test_a_batch_of_another_kind_logs_only_the_times(make_data: Make, make_trainer: Make) -> None:
    class Own(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters())

    trainer = make_trainer(Throughput())
    trainer.fit(Own(), torch.utils.data.DataLoader(torch.ones(12, 3), batch_size=4))
    assert {"time/data", "time/step"} <= set(trainer.callback_metrics)
    assert "throughput/images_per_s" not in trainer.callback_metrics
