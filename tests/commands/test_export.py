"""`mlssl export`: every format by name, and one line for every wrong input."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from test_export import file_names, trained_module, written_checkpoint

from mlssl.cli import main

IN_DETECTRON2 = (
    "mlssl.export.detectron2.torchvision_resnet('{path}')"
    if find_spec("detectron2") is None
    else "Detectron2's build_resnet_backbone and load_state_dict"
)


@pytest.mark.parametrize(
    ("backbone", "format", "name", "check"),
    [
        (
            "test_resnet",
            "timm",
            "a.safetensors",
            "create_model('test_resnet', num_classes=0, checkpoint_path='{path}'",
        ),
        ("test_resnet", "timm-dir", "a", "timm.create_model('local-dir:{path}', pretrained=True, num_classes=0)"),
        ("resnet18", "torchvision", "a.pth", "torchvision.models.get_model('resnet18'"),
        ("resnet18", "detectron2", "a.pkl", IN_DETECTRON2),
        ("test_resnet", "safetensors", "a.safetensors", "safetensors.torch.load_file('{path}')"),
        pytest.param(
            *("test_resnet", "onnx", "a.onnx", "onnxruntime.InferenceSession('{path}')"), marks=pytest.mark.slow
        ),
    ],
)
def test_a_format_is_written_and_its_check_and_difference_printed(
    backbone, format, name, check, tmp_path, capsys
) -> None:
    checkpoint = written_checkpoint(trained_module(backbone), tmp_path / "last.ckpt")
    path = tmp_path / "out" / name
    assert main(["export", str(checkpoint), "-o", str(path), "--format", format]) == 0
    printed = capsys.readouterr().out
    assert f"{path}: format {format}, checked by" in printed
    assert check.format(path=path) in printed
    assert "largest difference in a feature: " in printed
    if format != "onnx":  # its exporter takes seconds
        assert main(["export", str(checkpoint), "-o", str(path), "--format", format, "--overwrite", "true"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "a.safetensors", "--format", "onyx"], "Unknown export format 'onyx': choose 'timm', 'torchvision'"),
        (
            ["-o", "a.pth", "--format", "torchvision"],
            "Formats that support it: 'timm', 'safetensors', 'timm-dir', 'onnx', 'torch.export'.",
        ),
        (["-o", "there.safetensors"], "there.safetensors exists: choose another name"),
        (["-o", "a.safetensors", "--image_size", "100"], "takes no images of 100 × 100 pixels"),
    ],
)
def test_wrong_input_ends_in_one_line_and_no_file(words, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.safetensors").write_text("mine")
    written_checkpoint(trained_module("test_vit"), tmp_path / "last.ckpt")
    assert main(["export", "last.ckpt", *words]) == 2
    assert message in capsys.readouterr().err
    assert file_names(tmp_path) == ["last.ckpt", "there.safetensors"]
    assert Path("there.safetensors").read_text() == "mine"


def test_a_checkpoint_without_a_backbone_ends_in_one_line(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"other.weight": torch.zeros(1)}}, "other.ckpt")
    assert main(["export", "other.ckpt"]) == 2
    assert "other.ckpt has no weights of backbone" in capsys.readouterr().err
    assert file_names(tmp_path) == ["other.ckpt"]
