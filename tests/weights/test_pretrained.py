"""Names with published weights: loaded by timm's and torchvision's code, or refused, and never untrained."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import timm
import timm.models._hub
import torch
import torchvision
from safetensors.torch import save_file

from mlssl.weights.sources import open_backbone

TAGGED = "test_resnet.r160_in1k"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.nn.Module, list[str]]:
    """A network whose weights, classifier included, timm's download finds under its published name."""
    torch.manual_seed(5)
    network = timm.create_model("test_resnet", num_classes=1000).eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    asked: list[str] = []

    def download(repo_id: str, filename: str, **_: object) -> str:
        asked.append(f"{repo_id}/{filename}")
        if repo_id != f"timm/{TAGGED}" or filename != "model.safetensors":
            raise huggingface_hub.errors.LocalEntryNotFoundError("an error\nof the hub " + 300 * "x")
        return str(tmp_path / filename)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    return network, asked


@pytest.mark.parametrize("source", [TAGGED, "test_resnet:pretrained", f"{TAGGED}:pretrained"])
def test_a_timm_name_with_weights_loads_them(source: str, hub: tuple[torch.nn.Module, list[str]]) -> None:
    network, asked = hub
    opened = open_backbone(source)
    expected = network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in opened.backbone.state_dict().items())
    assert asked == [f"timm/{TAGGED}/model.safetensors"]
    assert not opened.untrained
    assert opened.mean == (0.5, 0.5, 0.5), "the statistics of these weights"


def test_a_plain_name_is_untrained_and_downloads_nothing(hub: tuple[torch.nn.Module, list[str]]) -> None:
    assert open_backbone("test_resnet").untrained
    assert hub[1] == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "test_vit.r160_in1k",
            r"published weights of 'test_vit.r160_in1k' cannot be loaded \(an error of the hub x+…\)",
        ),
        ("test_vit:pretrained", "pass their file, test_vit=FILE, or test_vit for an untrained network"),
        ("hf-hub:nobody/nothing", r"published weights of 'hf-hub:nobody/nothing' cannot be loaded"),
        ("resnet18.nonsense", "'resnet18' has no published weights with the tag 'nonsense', its tags are a1_in1k, "),
        (
            "resnet14t.c3_in1",
            "c3_in1k: pass one of these, resnet14t for an untrained network, or your own file: resnet14t=FILE$",
        ),
        ("resnet5O.a1_in1k", "did you mean"),
        ("resnet5O:pretrained", "did you mean 'resnet50'"),
    ],
)
def test_unavailable_weights_are_refused(source: str, message: str, hub: tuple[torch.nn.Module, list[str]]) -> None:
    with pytest.raises(ValueError, match=message):
        open_backbone(source)


def test_a_name_without_any_published_weights_is_refused() -> None:
    name = next(one for one in timm.list_models() if not timm.list_pretrained(f"{one}.*"))
    with pytest.raises(
        ValueError, match=f"'{name}' has no published weights with the tag 'x', nor any others: pass {name} for"
    ):
        open_backbone(f"{name}.x")


def test_torchvisions_default_weights_are_read_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(6)
    network = torchvision.models.resnet18()
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(network.state_dict(), tmp_path / "hub" / "checkpoints" / Path(weights.url).name)
    opened = open_backbone("torchvision/resnet18:pretrained")
    expected = network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in opened.backbone.state_dict().items())
    assert not opened.untrained
    assert open_backbone("torchvision/resnet18").untrained


def test_a_folder_with_a_checkpoint_of_a_run_is_opened_and_one_without_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*: the run has not saved any yet"):
        open_backbone(str(tmp_path / "run"))
