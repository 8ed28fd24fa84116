"""The logged learning rate is that of the schedule."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from mlssl.callbacks import LearningRate
from mlssl.optim import cosine_with_warmup


def test_every_step_has_the_rate_of_the_cosine_schedule(
    make_model: Any, make_data: Any, make_trainer: Any, tmp_path: Path
):
    model = make_model(base_lr=0.8)
    trainer = make_trainer(LearningRate(), log_every_n_steps=1)
    trainer.fit(model, make_data())
    with (tmp_path / "run0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    factor = cosine_with_warmup(8)
    expected = [0.8 * 16 / 256 * factor(step) for step in range(8)]
    assert [float(row["train/lr"]) for row in rows] == pytest.approx(expected, rel=1e-5)
