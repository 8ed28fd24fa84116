"""ONNX: the same features in onnxruntime, for any batch and any supported image size."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from test_export import OwnNetwork, file_names, trained, trained_module
from torch import nn

from mlssl.backbones import build_backbone
from mlssl.export import MAX_RELATIVE_DIFFERENCE, export_backbone


def features(path: Path, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path))
    return torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])


@pytest.mark.slow
@pytest.mark.xfail(torch.__version__.startswith("2.8."), reason="such a graph is refused, see docs/export.md")
def test_the_graph_takes_any_batch_and_any_size(tmp_path: Path) -> None:
    source = trained_module("test_vit", mean=[0.5, 0.5, 0.5])
    path = tmp_path / "backbone.onnx"
    report = export_backbone(source, path, "onnx", metadata={"licence": "CC0"})
    assert report.max_difference <= MAX_RELATIVE_DIFFERENCE
    for shape in ((1, 3, 64, 64), (5, 3, 96, 160), (2, 3, 224, 64)):
        images = torch.rand(shape)
        with torch.no_grad():
            expected = source.backbone(images)
        assert (features(path, images) - expected).abs().max() <= MAX_RELATIVE_DIFFERENCE * expected.abs().max()
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert [dim.dim_param for dim in model.graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        "",
        "height",
        "width",
    ]
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert (said["backbone"], said["mean"], said["licence"]) == ("test_vit", "[0.5, 0.5, 0.5]", "CC0")
    assert file_names(tmp_path) == ["backbone.onnx"]


@pytest.mark.slow
def test_a_graph_of_fixed_size_accepts_only_that_size(tmp_path: Path) -> None:
    export_backbone(OwnNetwork(), tmp_path / "own.onnx", "onnx", image_size=(32, 48), fixed_size=True)
    dims = onnx.load(tmp_path / "own.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 3, 32, 48]
    with pytest.raises(
        ValueError, match=r"fixed_size was given, and format 'safetensors' contains weights, which have no"
    ):
        export_backbone(OwnNetwork(), tmp_path / "own.safetensors", "safetensors", fixed_size=True)


@pytest.mark.slow
@pytest.mark.xfail(torch.__version__.startswith("2.8."), reason="such a graph is refused, see docs/export.md")
def test_a_program_of_torch_gives_the_features_of_any_batch_and_of_any_or_one_size(tmp_path: Path) -> None:
    source = trained(build_backbone("test_vit"))
    report = export_backbone(source, tmp_path / "any.pt2", None, metadata={"licence": "CC0"})
    assert (report.format, "torch.export.load" in report.check) == ("torch.export", True)
    extra = {"mlssl.json": ""}
    program = torch.export.load(report.path, extra_files=extra).module()
    said = json.loads(extra["mlssl.json"])
    assert (said["backbone"], said["licence"]) == ("test_vit", "CC0")
    one_size = export_backbone(source, tmp_path / "one.pt2", None, image_size=(64, 96), fixed_size=True)
    fixed = torch.export.load(one_size.path).module()
    for shape in ((1, 3, 64, 96), (5, 3, 64, 96), (2, 3, 224, 64)):
        images = torch.rand(shape)
        with torch.no_grad():
            expected = source(images)
            torch.testing.assert_close(program(images), expected, rtol=1e-4, atol=1e-4)
            if shape[2:] == (64, 96):
                torch.testing.assert_close(fixed(images), expected, rtol=1e-4, atol=1e-4)
            else:
                with pytest.raises((AssertionError, RuntimeError), match="64"):
                    fixed(images)


@pytest.mark.slow
def test_a_custom_network_of_fixed_size_keeps_its_size(tmp_path: Path) -> None:
    class Fixed(OwnNetwork):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if images.shape[2:] != (64, 64):
                raise ValueError("64 × 64 only")
            return super().forward(images)

    source, path = trained(Fixed()), tmp_path / "own.onnx"
    report = export_backbone(source, path, format=None)
    assert report.format == "onnx"
    dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 3, 64, 64]
    assert "onnxruntime.InferenceSession" in report.check
    assert str(path) in report.check


def test_a_graph_with_other_features_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = torch.onnx.export

    def of_another(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return write(nn.Sequential(network, nn.Softplus()).eval(), *args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", of_another)
    with pytest.raises(ValueError, match="The features of the 'onnx' export differ"):
        export_backbone(OwnNetwork(), tmp_path / "own.onnx", "onnx")
    assert file_names(tmp_path) == []


def test_missing_packages_are_named_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("mlssl.export.onnx.find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(ModuleNotFoundError, match=r"'onnx' needs onnxscript: pip install 'mlssl\[onnx\]'"):
        export_backbone(build_backbone("test_resnet"), tmp_path / "backbone.onnx", "onnx")
    assert file_names(tmp_path) == []
