"""Exports: the same features in the target library, complete files or none, safe sources."""

from __future__ import annotations

import errno
import json
import os
import random
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.distributed.checkpoint as shards
import torchvision
from safetensors import safe_open
from torch import Tensor, nn

from mlssl.backbones import build_backbone
from mlssl.export import EXPORT_SUFFIXES, MAX_RELATIVE_DIFFERENCE, export_backbone, fitting_format
from mlssl.module import MultiLabelSSLModule


class OwnNetwork(nn.Module):
    """Two convolutions with one tied, non-contiguous weight, and features (n, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.second = nn.Conv2d(3, 3, 1)
        self.second.weight = self.first.weight
        self.last = nn.Linear(3, 4)
        self.last.weight = nn.Parameter(torch.rand(3, 4).T)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.second(self.first(images).relu()).mean((2, 3)))


def images(side: int = 64, channels: int = 3) -> Tensor:
    return torch.rand(3, channels, side, side, generator=torch.Generator().manual_seed(1))


def trained(network: nn.Module) -> nn.Module:
    """The network in eval mode with every weight and statistic off its first value, as after training."""
    rng = torch.Generator().manual_seed(0)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.add_(0.1 * torch.rand(value.shape, generator=rng))
    return network.eval()


def trained_module(backbone: str | nn.Module = "test_resnet", **kwargs: Any) -> MultiLabelSSLModule:
    module = MultiLabelSSLModule(backbone, projection_dim=16, predictor_dim=8, **kwargs)
    trained(module.backbone)
    return module


def written_checkpoint(module: L.LightningModule, path: Path) -> Path:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_model_summary=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return path


def in_shards(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint as Lightning's FSDP strategy writes it in shards: weights by torch, and meta.pt with the rest."""
    whole = torch.load(checkpoint, weights_only=True)
    state = {"model": whole.pop("state_dict"), "optimizer_0": {"state": {"a": {"step": torch.tensor(1.0)}}}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # by torch 2.8's own saving
        shards.save(state, checkpoint_id=folder, no_dist=True)
    torch.save(whole, folder / "meta.pt")
    return folder


def assert_same_features(network: nn.Module, source: nn.Module, side: int = 64, channels: int = 3) -> None:
    """In float64, to avoid rounding."""
    with torch.no_grad():
        found, expected = (one.eval().double()(images(side, channels).double()) for one in (network, source))
    assert expected.abs().max() > 0
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


def loaded_by(check: str, network: nn.Module | None = None) -> nn.Module:
    scope = {"timm": timm, "torch": torch, "torchvision": torchvision, "safetensors": safetensors, "network": network}
    exec(check, scope)
    return scope["network"]


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def what(path: Path) -> dict[str, str]:
    """The header without the training history of a checkpoint or Trainer."""
    return {name: value for name, value in header(path).items() if name not in ("steps", "model", "data", "metrics")}


def file_names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# ---------------------------------------------------------------------- the same features, in the library itself


@pytest.mark.parametrize("name", ["test_resnet", "resnet18", "test_convnext", "torchvision/resnet18"])
def test_a_timm_export_loads_with_timms_call(name: str, tmp_path: Path) -> None:
    source = trained(build_backbone(name))
    path = tmp_path / "backbone.safetensors"
    export_backbone(source, path)
    loaded = timm.create_model(name.removeprefix("torchvision/"), num_classes=0, checkpoint_path=path)
    assert_same_features(loaded, source)


def test_a_timm_export_of_a_transformer_loads_with_timms_call_and_its_pooling(tmp_path: Path) -> None:
    source = trained(build_backbone("test_vit"))
    path = tmp_path / "backbone.safetensors"
    export_backbone(source, path)
    loaded = timm.create_model("test_vit", num_classes=0, checkpoint_path=path, global_pool="avg")
    assert_same_features(loaded, source, side=160)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "torchvision/resnet18", "resnet18.a1_in1k"])
def test_a_torchvision_export_loads_strictly_once_fc_is_the_identity(name: str, tmp_path: Path) -> None:
    source = trained(build_backbone(name))
    path = tmp_path / "backbone.pth"
    export_backbone(source, path, "torchvision")
    loaded = torchvision.models.resnet18()
    loaded.fc = nn.Identity()
    loaded.load_state_dict(torch.load(path, weights_only=True), strict=True)
    assert_same_features(loaded, source)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kwargs", "format"),
    [
        ("resnet18", {}, "timm"),
        ("test_resnet", {"in_chans": 1}, "timm"),
        ("test_convnext", {}, "timm"),
        ("test_vit", {}, "timm"),
        ("test_vit", {"global_pool": "token", "dynamic_img_size": False}, "timm"),
        ("torchvision/resnet18", {"width_per_group": 64}, "torchvision"),
        ("torchvision/shufflenet_v2_x0_5", {}, "torchvision"),
        ("torchvision/mobilenet_v3_small", {}, "torchvision"),
        ("torchvision/shufflenet_v2_x0_5", {"in_chans": 2}, "safetensors"),
        ("test_vit", {}, "safetensors"),
    ],
)
def test_the_reported_lines_load_the_same_network(
    name: str, kwargs: dict[str, Any], format: str, tmp_path: Path
) -> None:
    source = trained(build_backbone(name, **kwargs))
    report = export_backbone(source, tmp_path / f"backbone{EXPORT_SUFFIXES[format][0]}", format)
    assert report.format == format
    assert report.max_difference <= MAX_RELATIVE_DIFFERENCE
    side = 160 if kwargs.get("dynamic_img_size") is False else 64
    assert_same_features(
        loaded_by(report.check, build_backbone(name, **kwargs)), source, side, kwargs.get("in_chans", 3)
    )


def test_a_custom_network_is_exported_under_its_names(tmp_path: Path) -> None:
    source = trained(OwnNetwork())
    report = export_backbone(source, tmp_path / "own.safetensors", format=None)
    assert report.format == "safetensors"
    assert_same_features(loaded_by(report.check, OwnNetwork()), source)


def test_a_bare_timm_network_knows_its_name(tmp_path: Path) -> None:
    source = trained(timm.create_model("test_vit", num_classes=0))
    export_backbone(source, tmp_path / "backbone.safetensors", "timm")
    loaded = timm.create_model("test_vit", num_classes=0, checkpoint_path=tmp_path / "backbone.safetensors")
    assert_same_features(loaded, source, side=160)


def test_a_report_is_path_like(tmp_path: Path) -> None:
    report = export_backbone(trained(OwnNetwork()), tmp_path / "new" / "own.safetensors", "safetensors")
    assert Path(report) == report.path == tmp_path / "new" / "own.safetensors"
    with open(report, "rb") as file:  # noqa: PTH123
        assert file.read(1)


# ---------------------------------------------------------------------- sources


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet", "torchvision/shufflenet_v2_x0_5", "test_vit"])
def test_checkpoint_and_module_and_backbone_give_one_file(name: str, tmp_path: Path) -> None:
    module = trained_module(name)
    checkpoint = written_checkpoint(module, tmp_path / "last.ckpt")
    for number, source in enumerate([checkpoint, str(checkpoint), module, module.backbone]):
        report = export_backbone(source, tmp_path / f"{number}.safetensors", "safetensors")
        assert what(report.path) == what(tmp_path / "0.safetensors")
        assert_same_features(loaded_by(report.check, build_backbone(name)), module.backbone)


@pytest.mark.parametrize(
    ("old", "new"),
    [("backbone.", "backbone._orig_mod."), ("", "_orig_mod."), ("", "module."), ("", "module._orig_mod.")],
)
def test_prefixes_of_compile_and_ddp_are_stripped(old: str, new: str, tmp_path: Path) -> None:
    module = trained_module()
    path = written_checkpoint(module, tmp_path / "last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {
        new + name.removeprefix(old): value for name, value in state.items() if "backbone" in name
    }
    torch.save(checkpoint, path)
    report = export_backbone(path, tmp_path / "backbone.safetensors")
    assert_same_features(loaded_by(report.check), module.backbone)


def test_a_compiled_backbone_is_exported_like_the_plain_one(tmp_path: Path) -> None:
    module = trained_module()
    plain = module.backbone
    module.backbone = torch.compile(plain)
    for number, source in enumerate([module, module.backbone, written_checkpoint(module, tmp_path / "last.ckpt")]):
        report = export_backbone(source, tmp_path / f"{number}.safetensors")
        assert report.format == "timm"
        assert_same_features(loaded_by(report.check), plain)


def test_the_source_and_all_random_states_do_not_change(tmp_path: Path) -> None:
    module = trained_module().to(torch.bfloat16).train()
    module.backbone.bn1.eval()
    module.backbone.conv1[0].weight.requires_grad_(False)
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    flags = [one.training for one in module.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    export_backbone(module, tmp_path / "backbone.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert {value.dtype for value in module.parameters()} == {torch.bfloat16}
    assert module.backbone.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert [one.training for one in module.modules()] == flags
    assert not module.backbone.conv1[0].weight.requires_grad
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # noqa: NPY002


def test_exports_contain_contiguous_float32(tmp_path: Path) -> None:
    module = trained_module().to(torch.bfloat16)
    export_backbone(module, tmp_path / "backbone.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "backbone.safetensors")
    assert set(tensors) == set(module.backbone.state_dict())
    assert {value.dtype for value in tensors.values()} == {torch.float32, torch.int64}
    export_backbone(trained_module("resnet18"), tmp_path / "backbone.pth", "torchvision")
    assert all(value.is_contiguous() for value in torch.load(tmp_path / "backbone.pth", weights_only=True).values())


def test_the_header_describes_how_to_use_the_backbone(tmp_path: Path) -> None:
    module = trained_module("test_resnet", backbone_kwargs={"in_chans": 1}, mean=[0.3], std=[0.1])
    checkpoint = written_checkpoint(module, tmp_path / "last.ckpt")
    headers = []
    for number, source in enumerate([module, checkpoint]):
        export_backbone(source, tmp_path / f"{number}.safetensors", metadata={"licence": "CC0"})
        headers.append(what(tmp_path / f"{number}.safetensors"))
    assert headers[0] == headers[1]
    assert headers[0].pop("library").startswith("mlssl ")
    assert len(headers[0].pop("sha256")) == 64
    assert {name: headers[0].pop(name) for name in ("backbone", "licence", "features")} == {
        "backbone": "test_resnet",
        "licence": "CC0",
        "features": "96",
    }
    assert {name: json.loads(value) for name, value in headers[0].items()} == {
        "arguments": {"in_chans": 1},
        "mean": [0.3],
        "std": [0.1],
    }


class Subclass(MultiLabelSSLModule):
    """A module whose hyper-parameters are not those of the library's."""

    def __init__(self) -> None:
        super().__init__("test_resnet", projection_dim=16, predictor_dim=8, std=[0.1, 0.2, 0.3])


def test_a_subclass_is_exported_with_the_statistics_it_set(tmp_path: Path) -> None:
    report = export_backbone(Subclass(), tmp_path / "backbone.safetensors")
    assert report.format == "timm"
    assert json.loads(header(report.path)["std"]) == [0.1, 0.2, 0.3]


# ---------------------------------------------------------------------- formats


def test_an_unknown_format_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="Unknown export format 'onyx': choose 'timm', 'torchvision', 'safetensors', 'timm-dir'"
    ):
        export_backbone(OwnNetwork(), tmp_path / "own.safetensors", "onyx")
    with pytest.raises(ValueError, match="Unknown export format 'onyx'"):
        fitting_format(OwnNetwork(), "onyx")


@pytest.mark.parametrize(
    ("name", "kwargs", "format"),
    [
        ("test_resnet", {}, "timm"),
        ("resnet18", {}, "timm"),
        ("torchvision/resnet18", {}, "torchvision"),
        ("torchvision/shufflenet_v2_x0_5", {"in_chans": 1}, "safetensors"),
        ("torchvision/resnet18", {"in_chans": 1}, "timm"),
    ],
)
def test_the_best_fitting_format_is_found(name: str, kwargs: dict[str, Any], format: str) -> None:
    assert fitting_format(build_backbone(name, **kwargs)) == format


@pytest.mark.slow
def test_without_a_format_the_suffix_decides(tmp_path: Path) -> None:
    timm_resnet, torchvision_resnet = build_backbone("resnet18"), build_backbone("torchvision/resnet18")
    assert export_backbone(timm_resnet, tmp_path / "a.pth", None).format == "torchvision"
    assert export_backbone(timm_resnet, tmp_path / "a.safetensors", None).format == "timm"
    assert export_backbone(torchvision_resnet, tmp_path / "b.pt", None).format == "torchvision"
    assert export_backbone(torchvision_resnet, tmp_path / "b.safetensors", None).format == "timm"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "format", "message"),
    [
        (
            OwnNetwork(),
            "timm",
            "This network cannot be exported, format 'timm' does not support it: it was not built by name",
        ),
        (
            "test_vit",
            "torchvision",
            "torchvision does not build it .*Formats that support it: 'timm', 'safetensors', 'timm-dir', 'onnx', "
            "'torch",
        ),
        ("torchvision/shufflenet_v2_x0_5", "timm", "timm does not build it"),
        ("mobilenetv3_small_100", "torchvision", "torchvision does not build it"),
        ("torchvision/convnext_tiny", "timm", "timm builds it with other weight names or shapes"),
    ],
)
def test_an_unsupported_architecture_is_reported(
    network: str | nn.Module, format: str, message: str, tmp_path: Path
) -> None:
    backbone = build_backbone(network)
    with pytest.raises(ValueError, match=message):
        export_backbone(backbone, tmp_path / f"backbone{EXPORT_SUFFIXES[format][0]}", format)
    with pytest.raises(ValueError, match=message):
        fitting_format(backbone, format)
    assert file_names(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "format", "suffixes"),
    [
        ("backbone.pth", "timm", r"\.safetensors"),
        ("backbone.safetensors", "torchvision", r"\.pth or \.pt"),
        ("backbone", None, r"\.safetensors or \.pth or \.pt or \.pkl or \.onnx or \.pt2"),
    ],
)
def test_a_suffix_of_another_format_is_refused(name: str, format: str | None, suffixes: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} does not end in {suffixes}, which selects the format"):
        export_backbone(build_backbone("test_resnet"), tmp_path / name, format)


def test_metadata_needs_a_file_with_a_header(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"backbone\.pth can only contain tensors: leave metadata out"):
        export_backbone(build_backbone("resnet18"), tmp_path / "backbone.pth", None, metadata={"licence": "CC0"})


# ---------------------------------------------------------------------- whole and right, or not there


def test_a_network_changed_after_construction_is_detected(tmp_path: Path) -> None:
    network = trained(build_backbone("test_resnet"))
    network.act1 = nn.Sigmoid()
    with pytest.raises(ValueError, match=r"The features of the 'timm' export differ by .* and the file was not kept"):
        export_backbone(network, tmp_path / "backbone.safetensors")
    assert file_names(tmp_path) == []
    assert export_backbone(network, tmp_path / "backbone.safetensors", "safetensors").max_difference == 0


def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path) -> None:
    network = OwnNetwork()
    network.last.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"differ by nan of the largest one.*check the weights for NaN"):
        export_backbone(network, tmp_path / "own.safetensors", "safetensors")
    assert file_names(tmp_path) == []


def test_features_that_are_all_zero_are_equal(tmp_path: Path) -> None:
    network = OwnNetwork()
    nn.init.zeros_(network.last.weight)
    nn.init.zeros_(network.last.bias)
    assert export_backbone(network, tmp_path / "own.safetensors", "safetensors").max_difference == 0


def test_an_existing_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"own\.safetensors exists: .* pass overwrite=True "):
        export_backbone(OwnNetwork(), path, "safetensors")
    assert path.read_text() == "mine"
    export_backbone(OwnNetwork(), path, "safetensors", overwrite=True)
    assert safetensors.torch.load_file(path)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["timm", "torchvision", "detectron2"])
def test_a_full_disk_leaves_the_previous_file_intact(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = build_backbone("resnet18")
    path = tmp_path / f"backbone{EXPORT_SUFFIXES[format][0]}"
    export_backbone(trained(network), path, format)
    before, names = path.read_bytes(), file_names(tmp_path)

    def fill_the_disk(file: Path, data: Any) -> int:
        with file.open("wb") as opened:
            opened.write(bytes(data)[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        export_backbone(trained(network), path, format, overwrite=True)
    assert path.read_bytes() == before
    assert file_names(tmp_path) == names


# ---------------------------------------------------------------------- sources that are refused


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_with_pickled_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    path = tmp_path / "evil.ckpt"
    state = {f"backbone.{name}": value for name, value in OwnNetwork().state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"backbone": Payload(tmp_path / "ran")}}, path)
    with pytest.raises(ValueError, match=r"evil\.ckpt contains pickled Python objects, which could run any code"):
        export_backbone(path, tmp_path / "backbone.safetensors")
    assert file_names(tmp_path) == ["evil.ckpt"]


@pytest.mark.parametrize("content", ["text", "empty", "cut off", "picture"])
def test_a_file_that_is_not_a_checkpoint_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"backbone.weight": torch.zeros(100)}}, path)
    whole = path.read_bytes()
    path.write_bytes({"text": b"hello", "empty": b"", "cut off": whole[:700], "picture": b"\xff\xd8\xff" * 99}[content])
    with pytest.raises(ValueError, match=r"last\.ckpt is not a checkpoint or is damaged: give a \.ckpt"):
        export_backbone(path, tmp_path / "backbone.safetensors")


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"There is no checkpoint at {tmp_path / 'missing.ckpt'}"):
        export_backbone(tmp_path / "missing.ckpt", tmp_path / "backbone.safetensors")


@pytest.mark.parametrize(
    "content", [{"state_dict": {"net.weight": torch.zeros(1)}}, {"weight": torch.zeros(1)}, torch.zeros(1)]
)
def test_a_checkpoint_without_a_backbone_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"has no weights of backbone, its state_dict has no 'backbone\.…' entries"):
        export_backbone(tmp_path / "last.ckpt", tmp_path / "backbone.safetensors")


def test_a_checkpoint_whose_backbone_was_a_network_explains_how_to_load_it(tmp_path: Path) -> None:
    module = trained_module(OwnNetwork())
    path = written_checkpoint(module, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"does not name its backbone.*_from_checkpoint\(path, backbone=net\), and"):
        export_backbone(path, tmp_path / "own.safetensors", "safetensors")
    again = MultiLabelSSLModule.load_from_checkpoint(path, backbone=OwnNetwork(), map_location="cpu")
    report = export_backbone(again, tmp_path / "own.safetensors", "safetensors")
    assert_same_features(loaded_by(report.check, OwnNetwork()), module.backbone)


def test_weights_that_do_not_fit_their_hyper_parameters_are_refused(tmp_path: Path) -> None:
    path = written_checkpoint(trained_module(), tmp_path / "last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["backbone"]["name"] = "test_convnext"
    torch.save(checkpoint, path)
    with pytest.raises(
        ValueError, match=r"The weights of .backbone. in .*last\.ckpt do not fit its backbone 'test_convnext'"
    ):
        export_backbone(path, tmp_path / "backbone.safetensors")
