"""Custom modules, data modules and functions in the command, from fit to export."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from commands.test_run import DATA, MODEL, TRAINER
from mlssl.cli import main
from mlssl.commands.custom_code import import_object, import_path, is_import_path, make_importable
from mlssl.runs import RUN_FOLDER_VARIABLE

PACKAGE = '''
"""A method of a user's own."""

from lightning import LightningDataModule
from torch import nn

from mlssl import MultiLabelDataModule, MultiLabelSSLModule


class MyModule(MultiLabelSSLModule):
    """With one argument and one submodule more."""

    def __init__(self, *args, my_argument: int = 1, **settings):
        super().__init__(*args, **settings)
        self.my_argument = my_argument
        self.extra = nn.Linear(my_argument, 2)

    def training_step(self, batch, batch_idx):
        outputs = super().training_step(batch, batch_idx)
        outputs["loss"] = outputs["loss"] + 0.1 * self.extra(self.extra.weight.new_ones(1, self.my_argument)).sum()
        return outputs


class MyData(MultiLabelDataModule):
    """Nothing else."""


class WithoutSeed(LightningDataModule):
    """Draws nothing."""


class NoModule:
    """Nothing of Lightning's."""


def my_regions(height, width):
    return [(0, 0, height, width)]
'''
SMALL = [*MODEL, *TRAINER, *DATA]


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (RUN_FOLDER_VARIABLE, "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a package in the current directory, which no other test has imported."""
    name = f"my_package_{tmp_path.name.replace('-', '_')}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(PACKAGE)
    return name


def only_run() -> Path:
    (folder,) = Path("runs").glob("*")
    return folder


def config_of(folder: Path) -> dict:
    return yaml.safe_load((folder / "config.yaml").read_text())


@pytest.mark.slow
def test_a_class_given_by_import_path_is_trained_resumed_reported_exported_and_validated(
    package: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["--model", f"{package}.MyModule", "--data", f"{package}.MyData"]
    words = ["fit", *SMALL, *chosen, "--model.my_argument", "3", "--trainer.max_epochs", "1"]
    assert main(words) == 0
    folder = only_run()
    settings = config_of(folder)
    assert (settings["model_class"], settings["data_class"]) == (f"{package}.MyModule", f"{package}.MyData")
    assert settings["model"]["my_argument"] == 3
    last = folder / "checkpoints" / "last.ckpt"
    first = torch.load(last, weights_only=True)
    assert first["state_dict"]["extra.weight"].shape == (2, 3)
    assert first["hyper_parameters"]["my_argument"] == 3
    assert "_instantiator" not in first["hyper_parameters"]

    assert main(["fit", "--resume", str(folder), "--trainer.max_epochs", "2"]) == 0
    second = torch.load(last, weights_only=True)
    assert second["global_step"] == 2 * first["global_step"]
    assert not torch.equal(second["state_dict"]["extra.bias"], first["state_dict"]["extra.bias"])
    assert config_of(folder)["model_class"] == f"{package}.MyModule"

    assert main(["report", str(folder), "--max_images", "16", "--num_workers", "0"]) == 0
    assert main(["export", str(last), "-o", "out.safetensors"]) == 0
    few = ["--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu", *DATA]
    assert main(["validate", "--ckpt_path", str(last), *chosen, *few]) == 0
    capsys.readouterr()


@pytest.mark.slow
def test_a_config_names_the_class_and_another_one_is_refused(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", *SMALL, "--trainer.max_epochs", "1"]
    assert main([*words, "--model", f"{package}.MyModule"]) == 0
    folder = only_run()
    config = str(folder / "config.yaml")
    assert main(["fit", "--config", config, "--name", "again"]) == 0
    (again,) = Path("runs").glob("again-*")
    assert config_of(again)["model_class"] == f"{package}.MyModule"
    for refused in (["--config", config], ["--resume", str(folder)]):
        assert main(["fit", *refused, "--model", "mlssl.MultiLabelSSLModule"]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert (
            f"--model is for the class mlssl.MultiLabelSSLModule, but {config} is for {package}.MyModule: pass" in line
        )
    assert main(["fit", "--config", config, "--name", "same", "--model", f"{package}.MyModule"]) == 0


def test_a_command_for_a_class_builds_it_and_refuses_another(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    make_importable()
    own = import_object(f"{package}.MyModule", "a test")
    assert main(["fit", *SMALL, "--trainer.max_epochs", "1", "--model.my_argument", "2"], model=own) == 0
    assert config_of(only_run())["model_class"] == f"{package}.MyModule"
    assert main(["fit", *SMALL, "--model", "mlssl.MultiLabelSSLModule"], model=own) == 2
    assert f"this command is for the class {package}.MyModule, but --model is for mlssl" in capsys.readouterr().err


def test_a_datamodule_does_not_need_a_seed_argument(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--data", f"{package}.WithoutSeed", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["data_class"] == f"{package}.WithoutSeed"


@pytest.mark.slow
def test_a_separate_process_finds_a_class_in_the_current_directory_and_a_script_is_three_lines(package: str) -> None:
    words = ["fit", *SMALL, "--trainer.max_epochs", "1", "--model.my_argument", "3"]
    # Like the console script: the first entry of sys.path is not the current directory.
    start = "import sys; sys.path.remove(''); from mlssl.cli import main; sys.exit(main())"
    chosen = ["--model", f"{package}.MyModule", "--name", "chosen"]
    subprocess.run([sys.executable, "-c", start, *words, *chosen], check=True, capture_output=True)
    script = f"import sys\nfrom {package} import MyModule\nfrom mlssl.cli import main\nsys.exit(main(model=MyModule))\n"
    Path("train.py").write_text(script)
    subprocess.run([sys.executable, "train.py", *words, "--name", "script"], check=True, capture_output=True)
    for name in ("chosen", "script"):
        (folder,) = Path("runs").glob(f"{name}-*")
        assert config_of(folder)["model_class"] == f"{package}.MyModule"
        assert config_of(folder)["model"]["my_argument"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--model", "nowhere.MyModule"],
            "--model names 'nowhere.MyModule', which cannot be imported (No module",
        ),
        (["--model", "mlssl.module.Nothing"], "--model names 'mlssl.module.Nothing', which cannot be imported"),
        (["--model", "MyModule"], "--model names 'MyModule': pass an import path, such as my_package.MyName"),
        (["--model", "{package}.NoModule"], "NoModule, which is not a LightningModule: pass a subclass of it"),
        (["--data", "{package}.MyModule"], "MyModule, which is not a LightningDataModule: pass a subclass of it"),
        (["--model"], "--model was given without a value: pass a class, --model my_package.MyModule"),
        (["--data"], "--data was given without a value: pass a class, --data my_package.MyData"),
        (["--config"], "--config was given without a value: pass a YAML file, --config run.yaml"),
    ],
)
def test_a_path_that_is_not_a_class_is_reported_in_one_line(
    words: list[str], message: str, package: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *[word.replace("{package}", package) for word in words]]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("mlssl: error: ")
    assert message in line


class OfAScript:
    """Stands for a class that a script defines."""


def test_an_import_path_is_the_shortest_path_to_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlssl.module import MultiLabelSSLModule

    assert import_path(MultiLabelSSLModule) == "mlssl.MultiLabelSSLModule"
    assert import_object(import_path(MultiLabelSSLModule), "a test") is MultiLabelSSLModule
    monkeypatch.setattr(OfAScript, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/somewhere/train.py", raising=False)
    assert import_path(OfAScript) == "train.OfAScript"


def test_import_paths_are_distinguished_from_other_text() -> None:
    assert is_import_path("my_package.my_form")
    assert not any(map(is_import_path, ("log_of_sum", "gated(0.3)", "custom my.form", ".a", "a.", "0.3", 0.3, None)))
