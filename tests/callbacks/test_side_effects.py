"""Pre-trained weights are bit for bit the same with and without each callback."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from mlssl.callbacks import (
    BackboneExport,
    CollapseMonitor,
    FiniteSteps,
    LearningRate,
    OnlineKNN,
    OnlineLinearProbe,
    RandomState,
    StepMemory,
    Throughput,
    ViewGridLogger,
)
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.data.records import Records

CALLBACKS: dict[str, Callable[[], list[L.Callback]]] = {
    "probe": lambda: [OnlineLinearProbe()],
    "knn": lambda: [OnlineKNN(k=3, every_n_epochs=1)],
    "collapse": lambda: [CollapseMonitor()],
    "views": lambda: [ViewGridLogger(2)],
    "export": lambda: [BackboneExport(every_n_epochs=1)],
    "throughput": lambda: [Throughput()],
    "finite": lambda: [FiniteSteps(max_skipped=1)],
    "random state": lambda: [RandomState()],
    "step memory": lambda: [StepMemory()],
    "rate": lambda: [LearningRate()],
}
CALLBACKS["all"] = lambda: [make()[0] for name, make in CALLBACKS.items() if name != "all"]


@pytest.fixture
def trained(make_model: Any, make_data: Any, make_trainer: Any) -> Callable[..., str]:
    """A function from callbacks to a hash of every tensor of the model after 8 steps and three validations."""

    def train(callbacks: list[L.Callback], **data: Any) -> str:
        L.seed_everything(7, verbose=False)
        model = make_model(base_lr=1.0)
        trainer = make_trainer(*callbacks, log_every_n_steps=1, num_sanity_val_steps=2)
        trainer.fit(model, make_data(**data))
        assert trainer.global_step == 8
        return _hash(model)

    return train


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLBACKS)
def test_the_weights_are_the_same_with_and_without(name: str, trained: Any) -> None:
    assert trained(CALLBACKS[name]()) == trained([])


def test_the_weights_are_the_same_with_a_probe_on_a_separate_labelled_set(trained: Any) -> None:
    own: dict[str, Records] = {"probe_train": synthetic_scenes("train", size=32, seed=1, count=9)}
    assert trained([OnlineLinearProbe()], **own) == trained([])


def test_a_callback_that_samples_one_random_number_is_detected(trained: Any) -> None:
    class Draws(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            torch.rand(1)

    assert trained([Draws()]) != trained([])


def test_the_callbacks_have_their_intended_effects(trained: Any, tmp_path: Path) -> None:
    trained(CALLBACKS["all"]())
    metrics = (tmp_path / "run0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"probe/mAP", "probe/loss", "knn/mAP", "collapse/std", "time/data", "throughput/images_per_s"} <= set(
        metrics
    )
    assert len(list((tmp_path / "run0" / "views").iterdir())) == 2
    assert len(list((tmp_path / "run0" / "exports").iterdir())) >= 2


def _hash(model: L.LightningModule) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
