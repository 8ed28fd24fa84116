"""The end of a fit: the results, and two commands that work as printed."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import wandb

from mlssl.cli import main
from mlssl.commands.end_of_fit import Comparison, compare, end_block, next_commands
from mlssl.commands.parsing import command_parser
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.data.records import Records
from mlssl.module import MultiLabelSSLModule

SMALL = [
    *("--model.backbone", "test_resnet", "--model.projection_dim", "16", "--model.predictor_dim", "8"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.precision", "32-true"),
    *("--data.batch_size", "8", "--data.size", "32", "--data.eval_size", "32", "--data.num_workers", "0"),
    *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"),
]


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sets(labelled: bool = True) -> dict[str, Any]:
    train, val = synthetic_scenes("train", size=32, count=40), synthetic_scenes("test", size=32, count=40)
    if labelled:
        return {"train": train, "val": val}
    return {"train": Records([train.path(index) for index in range(40)], decode=train.decode)}


def test_the_end_prints_scores_time_folder_and_next_commands(tmp_path: Path) -> None:
    log = "step,epoch,probe/mAP\n10,0,0.2\n20,1,0.4\n30,2,0.3\n"
    (tmp_path / "metrics.csv").write_text(log)
    (tmp_path / "exports").mkdir()
    said = end_block(tmp_path, 605.0, 30, Comparison(0.2, 0.35, 400, 300), "untrained network", ["mlssl report x"])
    text = " ".join(said.split())
    assert text.startswith("probe best mAP 0.400 in epoch 2, 0.300 at the end compared linear probe on frozen")
    assert "400 training images, mAP on 300 val images: untrained network 0.200, trained network 0.350" in text
    assert "(+0.150) time 10 min for 30 steps folder" in text
    assert text.endswith("with metrics.csv, exports/ next: mlssl report x")
    (tmp_path / "metrics.csv").unlink()
    assert end_block(tmp_path, 5.0, 3, None, "", []).split()[:2] == ["time", "5"]


def test_both_networks_are_scored_on_the_same_images() -> None:
    data = MultiLabelDataModule(**sets(), batch_size=8, size=32, num_workers=0)
    network = MultiLabelSSLModule("test_resnet", projection_dim=16, predictor_dim=8)
    comparison = compare(network, network, data, 30)
    assert comparison is not None
    assert comparison.start == comparison.end
    assert (comparison.train_images, comparison.val_images) == (30, 30)
    assert compare(network, network, data, 1) is None  # no held-out part
    assert compare(network, network, MultiLabelDataModule(**sets(labelled=False), batch_size=8, size=32), 30) is None


def test_the_next_commands_work_as_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *SMALL, "--name", "a b"]) == 0
    said = capsys.readouterr().out
    (folder,) = Path("runs").glob("a b-*")
    assert "time      " in said
    assert "for 2 steps" in said
    assert "compared" not in said  # sixteen images are too few
    report, linear = [line for line in said.splitlines() if line.startswith("  mlssl ")]
    assert shlex.split(report) == ["mlssl", "report", str(folder)]
    assert command_parser("report").parse_args(shlex.split(report)[2:]).folders == [folder]
    table = command_parser("linear").parse_args(shlex.split(linear)[2:])
    assert table.sources == [str(folder / "checkpoints" / "last.ckpt")]
    assert (table.dataset, table.eval_size) == ("synthetic", 32)

    unlabelled = MultiLabelDataModule(**sets(labelled=False))
    unlabelled.setup()
    export = next_commands(folder, unlabelled)[1]
    assert main(shlex.split(export)[1:]) == 0
    shutil.rmtree(folder / "checkpoints")
    assert len(next_commands(folder, unlabelled)) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.dataset", "folder", "--data.root", "nowhere"], "nowhere"),
        (["--data.batch_size", "100000"], "a step needs 100000"),
        (["--start_from", "none.ckpt"], "none.ckpt"),
    ],
)
def test_a_failed_start_leaves_no_folder_and_no_run_in_weights_and_biases(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise AssertionError("a run was begun")

    monkeypatch.setattr(wandb, "init", refuses)
    assert main(["fit", *SMALL, "--trainer.logger", "WandbLogger", "--trainer.logger.offline", "true", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(Path("runs").iterdir())


def test_a_run_that_fails_in_its_first_step_removes_its_folder_and_a_later_failure_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = MultiLabelSSLModule.training_step
    for failing, left in ((0, 0), (1, 1)):

        def fails(self: Any, batch: Any, batch_idx: int, failing: int = failing) -> Any:
            if batch_idx == failing:
                raise ValueError("the step fails")
            return step(self, batch, batch_idx)

        monkeypatch.setattr(MultiLabelSSLModule, "training_step", fails)
        assert main(["fit", *SMALL]) == 2
        assert "the step fails" in capsys.readouterr().err
        assert len(list(Path("runs").iterdir())) == left
