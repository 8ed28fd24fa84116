"""The command on a terminal: help on one screen, errors in one line, completion, a clean end by Ctrl-C."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import yaml
from _terminal import Terminal

from mlssl.cli import main
from mlssl.commands.interrupts import Interrupts
from mlssl.commands.parsing import COMMANDS
from mlssl.commands.trainer_help import TRAINER_HELP
from mlssl.data.packing import ARCHIVE_MEGABYTES
from mlssl.evaluation.metrics import THRESHOLD
from mlssl.evaluation.neighbors import NUM_NEIGHBORS, TEMPERATURE
from mlssl.runs import steps_of

SCREEN = 45, 80
"""Lines and columns."""

SMALL = [
    *("--model.backbone", "test_resnet", "--model.projection_dim", "16", "--model.predictor_dim", "8"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.precision", "32-true"),
    *("--data.batch_size", "8", "--data.size", "32", "--data.eval_size", "32", "--data.num_workers", "0"),
]


@pytest.fixture(autouse=True)
def _work_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def _heed_interrupts_again():
    before = signal.getsignal(signal.SIGINT)  # Lightning ignores the signal after the first one
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("command", [*COMMANDS, *TRAINER_HELP])
def test_help_of_a_command_fits_a_screen_and_shows_an_example(command, capsys):
    if command in TRAINER_HELP:
        assert main([command, "--help"]) == 0
    else:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= SCREEN[0]
    assert max(map(len, lines)) <= SCREEN[1]
    assert lines[0].startswith(f"usage: mlssl {command}")
    assert any(line.startswith("Example: ") and f"mlssl {command}" in line for line in lines)


def test_every_argument_is_explained(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        lines = capsys.readouterr().out.splitlines()
        options = [index for index, line in enumerate(lines) if line.startswith("  ") and line.strip().startswith("-")]
        for index in options:
            own = lines[index].split("  ")
            following = lines[index + 1] if index + 1 < len(lines) else ""
            assert len([part for part in own if part.strip()]) > 1 or following.startswith(" " * 10), lines[index]


@pytest.mark.parametrize(
    ("command", "argument", "default"),
    [
        ("knn", "--k", NUM_NEIGHBORS),
        ("knn", "--temperature", TEMPERATURE),
        ("linear", "--threshold", THRESHOLD),
        ("pack", "--megabytes", ARCHIVE_MEGABYTES),
    ],
)
def test_help_names_the_default_of_the_library(command, argument, default, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.partition(f"{argument} …")[2].split())
    assert text.partition(" by default")[0].split()[-1] == f"{default}"


def test_every_command_is_in_the_list(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in [*COMMANDS, *TRAINER_HELP])
    assert "130 interrupted" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", "--data.sise", "3"], "data.sise"),
        (["fit", "--data.size", "many"], "data.size"),
        (["views"], "image"),
        (["views", "a.png", "--sise", "3"], "--sise"),
        (["completion", "powershell"], "powershell"),
    ],
)
def test_a_wrong_word_is_one_line_and_exit_code_2(words, message, capsys):
    assert main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("mlssl: error: ")
    assert message in lines[0]
    assert not list(Path().iterdir())


def test_print_config_prints_what_runs_and_starts_nothing(capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", *SMALL, "--data.overlap", "0.3", "--print_config"])
    assert end.value.code == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["data"]["overlap"] == 0.3
    assert settings["model"]["backbone"] == "test_resnet"
    assert not list(Path().iterdir())


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_a_script_that_the_shell_reads(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(f"{command}" in script for command in [*COMMANDS, *TRAINER_HELP])
    if shutil.which(shell):
        Path("script").write_text(script)
        subprocess.run([shell, "-n", "script"], check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_bash_completes_commands_and_options(capsys):
    assert main(["completion", "bash"]) == 0
    Path("script").write_text(capsys.readouterr().out)
    for words, expected in (
        (["mlssl", "ne"], {"neighbors"}),
        (["mlssl", "fit", "--data.over"], {"--data.overlap"}),
        (["mlssl", "linear", "--po"], {"--pooling", "--pos_weight"}),
        (["mlssl", "linear", "fi"], set()),  # a file, completed by the shell
    ):
        given = " ".join(f"'{word}'" for word in words)
        program = (
            f"mlssl() {{ '{sys.executable}' -m mlssl.cli \"$@\"; }}; source ./script; COMP_WORDS=({given}); "
            f'COMP_CWORD={len(words) - 1}; _mlssl; echo "${{COMPREPLY[@]}}"'
        )
        done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
        assert set(done.stdout.split()) == expected, (words, done.stdout, done.stderr)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="opens a pseudo-terminal, and sends a signal to a process group")
def test_the_screen_of_a_run_ended_by_ctrl_c(tmp_path):
    words = [*SMALL, "--data.num_workers", "1", "--trainer.max_epochs", "1000", "--trainer.limit_train_batches", "2"]
    limits = ["--trainer.limit_val_batches", "1", "--name", "stopped", "--trainer.enable_progress_bar", "true"]
    terminal = Terminal(80)
    process = subprocess.Popen(
        [sys.executable, "-m", "mlssl.cli", "fit", *words, *limits],
        stdout=terminal.inner,
        stderr=terminal.inner,
        start_new_session=True,  # a terminal's Ctrl-C reaches the whole group, workers too
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 240
        while not list(tmp_path.glob("runs/*/checkpoints/last.ckpt")):
            assert process.poll() is None, terminal.drawn
            assert time.monotonic() < deadline
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    terminal.close()
    drawn = terminal.drawn
    (checkpoint,) = Path("runs").glob("stopped-*/checkpoints/last.ckpt")
    assert process.returncode == 130
    bars = [index for index, line in enumerate(drawn) if line.startswith(("epoch", "val")) and " left" in line]
    names = ["train", "val", "step", "epoch", "run", "network", "devices", "folder"]
    block = [line for line in drawn[: bars[0] + 20] if line.partition(" ")[0] in names and " left" not in line]
    assert [line.partition(" ")[0] for line in block] == names
    assert [line for line in drawn[: bars[-1] + 1] if len(line) > 80] == []
    noise = ("GPU", "TPU", "Tip", "LeafSpec", "FLOPs", "Detected", "num_workers", "Traceback", "Seed")
    assert not [line for line in drawn if any(word in line for word in noise)]
    assert "loss " in drawn[bars[-1]]
    assert "images/s" in drawn[bars[-1]]
    last = "".join(drawn[bars[-1] + 1 :])
    assert last.startswith("mlssl: interrupted; the last checkpoint is ")
    assert last.endswith(f"mlssl fit --resume {checkpoint.parent.parent}")


class CtrlCInADestructor(L.Callback):
    """Sends the signal inside a destructor, where Python drops exceptions of a handler."""

    def on_train_batch_end(self, *_):
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            _Destroyed()


class _Destroyed:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0)  # by here Python has called the handler


@pytest.mark.usefixtures("_heed_interrupts_again")
def test_ctrl_c_ends_a_run_before_its_next_step_at_any_time(capfd):
    callbacks = ["--trainer.callbacks+=commands.test_screen.CtrlCInADestructor"]
    assert main(["fit", *SMALL, *callbacks, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "4"]) == 130
    said = capfd.readouterr().err.strip().splitlines()
    assert sum(line.startswith("mlssl: ") for line in said) == 1
    assert said[-1].startswith("mlssl: interrupted; the last checkpoint is ")
    (checkpoint,) = Path("runs").glob("*/checkpoints/last.ckpt")
    assert steps_of(checkpoint) == 1


def test_a_second_ctrl_c_ends_at_once_and_the_handler_is_restored():
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        interrupts.on_train_start()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("_heed_interrupts_again")
def test_an_interrupt_before_anything_is_written_says_so(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlssl.data.datamodule.MultiLabelDataModule.setup", interrupted)
    assert main(["fit", *SMALL, "--trainer.max_epochs", "1"]) == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("mlssl: interrupted; ")
    assert "no checkpoint yet" in last or "nothing was written" in last
