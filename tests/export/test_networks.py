"""timm's folder: its loader reads it, other files in it stay, and nothing is overwritten without request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from test_export import assert_same_features, file_names, loaded_by, trained, trained_module

from mlssl.backbones import build_backbone
from mlssl.export import export_backbone
from mlssl.export.card import model_card


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("test_resnet", {}), ("resnet18.a1_in1k", {}), ("test_vit", {}), ("test_convnext", {"in_chans": 1})],
)
def test_a_folder_loads_by_timms_own_call_without_further_arguments(name: str, kwargs: dict, tmp_path: Path) -> None:
    source = trained(build_backbone(name, **kwargs))
    report = export_backbone(source, tmp_path / "backbone", "timm-dir")
    assert file_names(report.path) == ["README.md", "config.json", "model.safetensors"]
    loaded = timm.create_model(f"local-dir:{tmp_path / 'backbone'}", pretrained=True, num_classes=0)
    assert_same_features(loaded, source, channels=kwargs.get("in_chans", 3))
    assert_same_features(loaded_by(report.check), source, channels=kwargs.get("in_chans", 3))


@pytest.mark.parametrize("name", ["resnet18", "torchvision/resnet18", "test_vit", "test_convnext"])
def test_a_folder_takes_a_new_head_and_keeps_every_other_weight(name: str, tmp_path: Path) -> None:
    source = trained(build_backbone(name))
    export_backbone(source, tmp_path / "backbone", "timm-dir")
    network = timm.create_model(f"local-dir:{tmp_path / 'backbone'}", pretrained=True, num_classes=5).eval()
    assert network(torch.zeros(1, *network.pretrained_cfg["input_size"])).shape == (1, 5)
    network.reset_classifier(0)
    assert_same_features(network, source, side=160)


@pytest.mark.parametrize("name", ["resnet18", "test_vit"])
def test_a_bare_file_gets_a_new_head_as_the_documentation_shows(name: str, tmp_path: Path) -> None:
    source = trained(build_backbone(name))
    path = tmp_path / "backbone.safetensors"
    arguments = {"global_pool": "avg"} if name == "test_vit" else {}
    export_backbone(source, path)
    network = timm.create_model(name, num_classes=0, checkpoint_path=path, **arguments)
    network.reset_classifier(5)
    assert network.eval()(torch.zeros(1, 3, 160, 160)).shape == (1, 5)
    network.reset_classifier(0)
    assert_same_features(network, source, side=160)
    page = (Path(__file__).resolve().parents[2] / "docs" / "export.md").read_text()
    assert "network.reset_classifier(5)" in page


def test_the_card_states_what_is_known_as_the_hub_reads_it(tmp_path: Path) -> None:
    header = {
        "backbone": "resnet18",
        "features": "512",
        "library": "mlssl 1.2",
        "steps": "700",
        "model": json.dumps({"base_lr": 0.05, "positives": "by | overlap", "chunk_size": None}),
        "data": json.dumps({"dataset": "coco", "size": 224}),
        "metrics": json.dumps({"probe/mAP": 0.4312}),
        "license": "cc0-1.0",
    }
    (tmp_path / "README.md").write_text(model_card(header))
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.library_name) == ("cc0-1.0", "timm")
    for line in ("700 optimizer steps.", "| base_lr | 0.05 |", "| positives | by \\| overlap |", "| dataset | coco |"):
        assert line in card.text
    assert "| probe/mAP | 0.4312 |" in card.text
    assert "chunk_size" not in card.text


@pytest.mark.parametrize(
    ("stated", "license", "name", "words"),
    [
        (None, "unknown", None, "Not stated: add it here"),
        ("mit", "mit", None, "\nmit\n"),
        ("For our lab: only", "other", "For our lab: only", "For our lab: only"),
    ],
)
def test_a_licence_is_never_invented(stated: str | None, license: str, name: str | None, words: str) -> None:
    header = {"backbone": "resnet18", "features": "512", "library": "mlssl 1.2"}
    card = ModelCard(model_card(header if stated is None else header | {"license": stated}))
    assert (card.data.license, card.data.license_name) == (license, name)
    assert words in card.text
    assert "names no run" in card.text


def test_without_pretrained_timm_keeps_random_weights_which_the_documentation_warns_of(tmp_path: Path) -> None:
    source = trained(build_backbone("test_resnet"))
    export_backbone(source, tmp_path / "backbone", "timm-dir")
    silent = timm.create_model(f"local-dir:{tmp_path / 'backbone'}", num_classes=0)
    assert not torch.equal(silent.conv1[0].weight, source.conv1[0].weight)
    page = (Path(__file__).resolve().parents[2] / "docs" / "export.md").read_text()
    assert "without `pretrained=True` timm silently keeps random weights" in page


def test_pixel_statistics_are_those_that_timm_gives_to_its_transforms(tmp_path: Path) -> None:
    module = trained_module(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    export_backbone(module, tmp_path / "backbone", "timm-dir", metadata={"licence": "CC0"})
    loaded = timm.create_model(f"local-dir:{tmp_path / 'backbone'}", pretrained=True, num_classes=0)
    config = timm.data.resolve_model_data_config(loaded)
    assert [*config["mean"], *config["std"]] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert json.loads((tmp_path / "backbone" / "config.json").read_text())["mlssl"]["licence"] == "CC0"


def test_a_folder_with_other_files_keeps_them_and_an_export_in_it_is_replaced_only_when_asked(tmp_path: Path) -> None:
    source = trained(build_backbone("test_resnet"))
    (tmp_path / "notes.txt").write_text("mine")
    export_backbone(source, tmp_path, "timm-dir")
    with pytest.raises(FileExistsError, match=r"config\.json exists: .* pass overwrite=True "):
        export_backbone(source, tmp_path, "timm-dir")
    export_backbone(source, tmp_path, "timm-dir", overwrite=True)
    assert file_names(tmp_path) == ["README.md", "config.json", "model.safetensors", "notes.txt"]


def test_a_folder_that_is_a_file_or_is_named_like_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.safetensors has a file suffix, and format 'timm-dir' is a folder"):
        export_backbone(build_backbone("test_resnet"), tmp_path / "a.safetensors", "timm-dir")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file exists: choose another name"):
        export_backbone(build_backbone("test_resnet"), tmp_path / "file", "timm-dir")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(FileExistsError, match=r"folder\.safetensors exists: choose another name"):
        export_backbone(build_backbone("test_resnet"), tmp_path / "folder.safetensors", overwrite=True)


def test_a_folder_that_fails_its_check_is_not_kept(tmp_path: Path) -> None:
    network = trained(build_backbone("test_resnet"))
    network.act1 = torch.nn.Sigmoid()
    with pytest.raises(ValueError, match="The features of the 'timm-dir' export differ"):
        export_backbone(network, tmp_path / "backbone", "timm-dir")
    assert file_names(tmp_path) == []


def test_an_image_size_that_the_network_does_not_take_is_refused(tmp_path: Path) -> None:
    fixed = build_backbone("test_vit", dynamic_img_size=False)
    with pytest.raises(ValueError, match=r"takes no images of 64 × 64 pixels \(.*160.*\): choose a size that it takes"):
        export_backbone(fixed, tmp_path / "a.safetensors", image_size=64)
    with pytest.raises(ValueError, match=r"takes no images of 100 × 96 pixels .* multiples of its patch size"):
        export_backbone(build_backbone("test_vit"), tmp_path / "a.safetensors", image_size=(100, 96))
    assert file_names(tmp_path) == []
    assert export_backbone(fixed, tmp_path / "a.safetensors", image_size=160).format == "timm"
