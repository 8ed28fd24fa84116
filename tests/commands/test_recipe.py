"""`mlssl fit --recipe`: a config overrides it, and other words override both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from commands.test_run import DATA, MODEL, TRAINER
from mlssl.cli import main
from mlssl.runs import RUN_FOLDER_VARIABLE

SMALL = [*MODEL, *TRAINER, *DATA]
RECIPE = """
data: {overlap: 0.1, rows: 1}
model: {base_lr: 0.1, contrastive_weight: 2.0, temperature: 0.5}
callbacks:
- class_path: mlssl.callbacks.OnlineKNN
  init_args: {k: 5}
- class_path: mlssl.callbacks.CollapseMonitor
"""


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (RUN_FOLDER_VARIABLE, "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "")
    Path("mine.yaml").write_text(RECIPE)


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main(["fit", *words, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def test_a_config_overrides_a_recipe_and_words_override_both_in_any_order(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text("model: {contrastive_weight: 3.0, temperature: 0.6}\n")
    words = ["--model.temperature", "0.7", "--config", "run.yaml", "--recipe", "mine.yaml"]
    settings = printed(capsys, *words)
    model = settings["model"]
    assert (model["base_lr"], model["contrastive_weight"], model["temperature"]) == (0.1, 3.0, 0.7)
    assert (settings["data"]["overlap"], settings["data"]["rows"]) == (0.1, 1)
    assert settings["recipe"] == "mine.yaml"


def test_callbacks_of_a_recipe_are_added_except_those_of_a_given_class(
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = json.dumps([{"class_path": "mlssl.callbacks.OnlineKNN", "init_args": {"k": 7}}])
    for words in (["--trainer.callbacks", own], ["--config", "run.yaml"]):
        Path("run.yaml").write_text(f"trainer: {{callbacks: {own}}}\n")
        callbacks = printed(capsys, "--recipe", "mine.yaml", *words)["trainer"]["callbacks"]
        assert [one["class_path"].rpartition(".")[2] for one in callbacks] == ["OnlineKNN", "CollapseMonitor"]
        assert callbacks[0]["init_args"]["k"] == 7
    alone = printed(capsys, "--recipe", "mine.yaml")["trainer"]["callbacks"]
    assert [one["init_args"].get("k") for one in alone] == [5, None]


def test_a_run_records_its_recipe_and_resumes_without_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *SMALL, "--recipe", "mine.yaml", "--trainer.max_epochs", "1"]) == 0
    (folder,) = Path("runs").glob("*")
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["recipe"] == "mine.yaml"
    assert settings["model"]["base_lr"] == 0.1
    Path("mine.yaml").unlink()
    assert main(["fit", "--resume", str(folder), "--trainer.max_epochs", "2"]) == 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["recipe"] == "mine.yaml"
    assert main(["fit", "--resume", str(folder), "--recipe", "paper"]) == 2
    assert "--recipe is for a new run, --resume keeps the settings of its run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_mlssl_trains_resumes_and_exports_and_options_override_it(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--recipe", "mlssl", "--model.base_lr", "0.004", "--trainer.max_epochs", "1"]
    assert main(["fit", *SMALL, *given]) == 0
    (folder,) = Path("runs").glob("*")
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["recipe"] == "mlssl"
    assert (settings["model"]["optimizer"], settings["model"]["base_lr"]) == ("muon", 0.004)
    assert (settings["data"]["branches"], settings["data"]["overlap"]) == ("soft", 0.3)
    assert main(["fit", "--resume", str(folder), "--trainer.max_epochs", "2"]) == 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["base_lr"] == 0.004
    assert list(folder.glob("exports/*"))
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "mlssl" in page
    assert "0.004" in page

    words = [
        "--recipe",
        "mlssl",
        "--model.optimizer",
        "sgd",
        "--model.optimizer_kwargs",
        "{}",
        "--model.base_lr",
        "0.05",
    ]
    model = printed(capsys, *words)["model"]
    assert (model["optimizer"], model["optimizer_kwargs"], model["base_lr"]) == ("sgd", {}, 0.05)


def test_the_paper_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with_it, without = printed(capsys, "--recipe", "paper"), printed(capsys)
    assert with_it.pop("recipe") == "paper"
    assert without.pop("recipe") is None
    assert with_it == without


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "papre"], "recipe 'papre' is unknown: did you mean 'paper'"),
        (["--recipe", "nowhere.yaml"], "no file 'nowhere.yaml'"),
        (["--recipe"], "--recipe was given without a value: pass a recipe, --recipe paper, or a YAML file"),
        (["--recipe", "wrong.yaml"], "there is no setting 'model.base_lrr', did you mean 'model.base_lr'?"),
    ],
)
def test_a_wrong_recipe_is_reported_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("wrong.yaml").write_text("model: {base_lrr: 0.1}")
    assert main(["fit", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("mlssl: error: ")
    assert message in line
