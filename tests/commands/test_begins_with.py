"""What a run starts from: the last checkpoint of a run folder, or the published weights in a backbone's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mlssl.cli import main
from mlssl.commands.begins_with import resolve_run_folders, take_published_weights, weights_message
from mlssl.export import export_backbone
from mlssl.module import MultiLabelSSLModule
from mlssl.run_folder import last_checkpoint


@pytest.mark.parametrize("option", ["ckpt_path", "start_from"])
def test_a_run_folder_means_its_last_checkpoint(option: str, tmp_path: Path) -> None:
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    last.touch()
    settings: dict[str, Any] = {"ckpt_path": None, "start_from": None, option: str(tmp_path)}
    resolve_run_folders(settings)
    assert settings[option] == str(last)
    settings[option] = "best"  # a keyword of Lightning
    resolve_run_folders(settings)
    assert settings[option] == "best"


@pytest.mark.parametrize("there", ["checkpoints/", "config.yaml"])
def test_a_run_without_a_checkpoint_is_refused(there: str, tmp_path: Path) -> None:
    (tmp_path / there).mkdir() if there.endswith("/") else (tmp_path / there).touch()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*: the run has not saved any yet"):
        resolve_run_folders({"start_from": str(tmp_path)})


@pytest.mark.parametrize(
    ("given", "backbone", "kwargs"),
    [
        ({"backbone": "resnet18.a1_in1k", "backbone_kwargs": None}, "resnet18.a1_in1k", {"pretrained": True}),
        ({"backbone": "resnet18:pretrained", "backbone_kwargs": {"in_chans": 4}}, "resnet18", {"in_chans": 4}),
        ({"backbone": "resnet18.a1_in1k", "backbone_kwargs": {"pretrained": False}}, "resnet18.a1_in1k", {}),
    ],
)
def test_a_name_with_published_weights_loads_them(given: dict[str, Any], backbone: str, kwargs: dict[str, Any]) -> None:
    settings = {"model": dict(given), "ckpt_path": None, "start_from": None}
    assert take_published_weights(settings) == given["backbone"]
    assert settings["model"]["backbone"] == backbone
    assert settings["model"]["backbone_kwargs"] == {"pretrained": True, **(given["backbone_kwargs"] or {}), **kwargs}


@pytest.mark.parametrize("model", [{"backbone": "resnet18", "backbone_kwargs": None}, {"backbone": "a.b"}, {}, None])
def test_other_models_are_not_changed(model: dict[str, Any] | None) -> None:
    settings = {"model": None if model is None else dict(model)}
    assert take_published_weights(settings) is None
    assert settings == {"model": model}


def test_a_run_that_takes_all_weights_from_a_checkpoint_loads_no_others() -> None:
    settings = {"model": {"backbone": "resnet18:pretrained", "backbone_kwargs": None}, "start_from": "a.ckpt"}
    assert take_published_weights(settings) is None
    assert settings["model"] == {"backbone": "resnet18", "backbone_kwargs": None}


def test_an_unknown_tag_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(
        ValueError, match=r"'resnet18' has no published weights with the tag 'none', its tags are .*a1.* file: --model"
    ):
        take_published_weights({"model": {"backbone": "resnet18.none", "backbone_kwargs": None}})


def test_a_failed_download_is_reported_in_one_sentence() -> None:
    said = weights_message("resnet18.a1_in1k", OSError("no\nnetwork"))
    assert said is not None
    assert said.startswith(
        "the published weights of 'resnet18.a1_in1k' cannot be loaded (no network): let this machine"
    )
    assert "--model.backbone resnet18 --model.backbone_kwargs '{pretrained: true, pretrained_cfg_overlay" in said
    assert said.endswith("or resnet18 for an untrained network")
    assert weights_message(None, OSError("no network")) is None
    assert weights_message("resnet18.a1_in1k", ValueError("says what is wrong")) is None


def test_a_run_starts_from_the_weights_in_its_backbone_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MLSSL_RUN_FOLDER", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "")
    torch.manual_seed(5)
    published = MultiLabelSSLModule("test_resnet", projection_dim=16, predictor_dim=8)
    export_backbone(published, tmp_path / "published", format="timm-dir")
    words = ["--model.projection_dim", "16", "--model.predictor_dim", "8", "--model.base_lr", "1e-9"]
    words += ["--trainer.max_steps", "1", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    words += ["--data.batch_size", "8", "--data.size", "32", "--data.num_workers", "0"]
    words += ["--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--model.backbone", f"local-dir:{tmp_path / 'published'}", *words]) == 0
    (run,) = Path("runs").iterdir()
    weights = torch.load(last_checkpoint(run), weights_only=True)["state_dict"]
    expected = {name: value for name, value in published.state_dict().items() if name.endswith("conv1.weight")}
    assert expected
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6)
