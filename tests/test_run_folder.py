"""The content of a run folder, and folders that are not runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlssl.run_folder import Log, last_checkpoint, read_config, read_log, read_rows, resumable_run


def test_each_quantity_of_the_log_has_the_steps_and_epochs_of_its_rows(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,loss,mAP,step\n0,1.0,,0\n0,,0.5,0\n1,2.0,,4\n")
    assert read_log(tmp_path) == {"loss": Log([0, 4], [0, 1], [1, 2]), "mAP": Log([0], [0], [0.5])}
    assert [row["mAP"] for row in read_rows(tmp_path / "metrics.csv")] == ["", "0.5", ""]
    assert read_log(tmp_path / "none") == {}


def test_the_last_checkpoint_is_last_or_the_latest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*: the run has not saved any yet"):
        last_checkpoint(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for number, name in enumerate(("last", "b", "a")):
        (tmp_path / "checkpoints" / f"{name}.ckpt").touch()
        os.utime(tmp_path / "checkpoints" / f"{name}.ckpt", (number, number))
    assert last_checkpoint(tmp_path).name == "last.ckpt"
    (tmp_path / "checkpoints" / "last.ckpt").unlink()
    assert last_checkpoint(tmp_path).name == "a.ckpt"


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*: pass the folder of a run"):
        read_config(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"no config\.yaml in .*: pass a run folder written by mlssl fit"):
        read_config(tmp_path)
    (tmp_path / "config.yaml").write_text("model: {}")
    with pytest.raises(ValueError, match=r"config\.yaml' is not the config of a run"):
        read_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"There is no run at .*: pass the folder of one"):
        resumable_run(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"cannot be resumed, it has no checkpoints/last\.ckpt"):
        resumable_run(tmp_path)


def test_a_truncated_last_row_is_dropped_and_reported(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"epoch,loss,step\r\n0,1.0,0\r\n0,2.0,1\r\n0,3.")
    with pytest.warns(UserWarning, match=r"metrics\.csv, line 4: the last row is truncated, and is left out"):
        assert [row["step"] for row in read_rows(path)] == ["0", "1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"epoch,loss,step\n0,1.0\n0,1.0,1\n", "is not the log of a run or is damaged .*: restore the file"),
        (b"epoch,loss,step\n0,\xff,1\n", "is not the log of a run or is damaged"),
        (b'epoch,loss,step\n0,"1,1\n', "is not the log of a run or is damaged"),
        (b"epoch,loss\n0,1\n", "is not the log of a run, its columns are epoch, loss"),
        (b"step,loss,loss\n0,1,1\n", "is not the log of a run, its columns are step, loss, loss"),
        (b"step,loss\n0,1\nx,1\n", "row 2: step is 'x', which is not a number"),
        (b"step,loss\n0,x\n", "row 1: loss is 'x', which is not a number"),
        (b"step,epoch,loss\n0,inf,1\n", "row 1: epoch is 'inf', which is not a number"),
    ],
)
def test_a_damaged_log_is_reported(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(text)
    with pytest.raises(ValueError, match=f"metrics\\.csv.*{message}"):
        read_log(tmp_path)
