"""run.json is written at the start, after each epoch and at the end, and a resumed run adds to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from mlssl.callbacks import RunRecord
from mlssl.run_record import read_record


class _Watch(L.Callback):
    """Reads the record in the middle of the first epoch and after it."""

    def __init__(self, folder: Path, error: BaseException | None = None) -> None:
        self.folder, self.error = folder, error
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.seen += read_record(self.folder)[-1:]
            if self.error is not None and trainer.current_epoch == 1:
                raise self.error


def test_a_run_records_itself_and_a_resumed_one_adds_a_session(make_model, make_data, make_trainer, tmp_path):
    folder = tmp_path / "run0"
    watch = _Watch(folder, KeyboardInterrupt())
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        make_trainer(RunRecord(["fit", "--api_key", "hunter2"]), watch).fit(make_model(), make_data())
    assert [one.outcome for one in watch.seen] == ["running", "running"]
    assert [one.last_step for one in watch.seen] == [0, 4], "written at the start, and after the first epoch"
    (first,) = read_record(folder)
    assert (first.outcome, first.last_step, first.first_step) == ("interrupted", 6, 0)
    assert first.command == "mlssl fit --api_key ***"
    assert first.directory == str(Path.cwd())
    assert {"python", "mlssl", "torch", "lightning", "timm", "torchvision"} == first.versions.keys()
    assert first.hardware["precision"] == "32-true"
    assert (first.hardware["device"], first.hardware["devices"], first.hardware["nodes"]) == ("cpu", 1, 1)
    assert first.data["train"]["images"] == 18
    assert first.data["val"]["images"] == 11
    assert first.data["train"].keys() == {"images", "classes", "labels_per_image"}
    assert first.started <= first.ended
    assert first.seconds > 0

    trainer = make_trainer(RunRecord(), default_root_dir=folder, max_epochs=1)
    trainer.fit(make_model(), make_data())
    before, last = read_record(folder)
    assert before == first
    assert (last.outcome, last.last_step) == ("done", 4)
    assert (folder / "run.json").read_text().endswith("}\n")


def test_a_failure_is_recorded(make_model, make_data, make_trainer, tmp_path):
    watch = _Watch(tmp_path / "run0", ZeroDivisionError("0"))
    with pytest.raises(ZeroDivisionError):
        make_trainer(RunRecord(), watch).fit(make_model(), make_data())
    assert read_record(tmp_path / "run0")[0].outcome == "failed: ZeroDivisionError"


def test_a_damaged_record_is_refused_before_training_and_kept(make_model, make_data, make_trainer, tmp_path):
    folder = tmp_path / "run0"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"sessions": 3}))
    with pytest.raises(ValueError, match="or remove it to continue without the record"):
        make_trainer(RunRecord(), logger=False).fit(make_model(), make_data())
    assert json.loads((folder / "run.json").read_text()) == {"sessions": 3}


def test_a_trial_run_records_nothing(make_model, make_data, make_trainer, tmp_path):
    make_trainer(RunRecord(), fast_dev_run=True).fit(make_model(), make_data())
    assert not (tmp_path / "run0" / "run.json").exists()
