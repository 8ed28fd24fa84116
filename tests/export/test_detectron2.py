"""Detectron2: names, shapes, layout and values of the weights, the configs, and the head on a stand-in."""

from __future__ import annotations

import pickle
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import _detectron2_stand_in
import numpy as np
import pytest
import torch
import yaml
from test_export import assert_same_features, file_names
from torch import nn

from mlssl.backbones import build_backbone
from mlssl.export import MAX_RELATIVE_DIFFERENCE, export_backbone
from mlssl.export.detectron2 import torchvision_resnet


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders c4 and fpn, each with a bundle `r.pkl`; only read."""
    folder = tmp_path_factory.mktemp("bundles")
    for kind, name in (("c4", "resnet50"), ("fpn", "resnet18")):
        export_backbone(build_backbone(name), folder / kind / "r.pkl", "detectron2")
    return folder


BESIDE = ["r_README.md", "r_coco.yaml", "r_voc.yaml", "res5_extra_norm.py", "train_detectron2.py"]


def trained(network: nn.Module) -> nn.Module:
    """In eval mode with norms off their first values, mildly, as a hundred layers make much of little."""
    rng = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for value in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
                value.copy_(0.5 + 0.5 * torch.rand(value.shape, generator=rng))
    return network.eval()


def content(path: Path) -> dict:
    return pickle.loads(path.read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "torchvision/resnet18", "torchvision/resnet50", "resnext50_32x4d"])
def test_weights_are_rebuilt_by_torchvision_from_their_names(name: str, tmp_path: Path) -> None:
    source = trained(build_backbone(name))
    report = export_backbone(source, tmp_path / "r.pkl", "detectron2")
    assert report.max_difference <= MAX_RELATIVE_DIFFERENCE
    assert_same_features(torchvision_resnet(report.path), source)
    assert file_names(tmp_path) == sorted(["r.pkl", *BESIDE])


def test_names_layout_and_values_are_those_that_detectron2_documents(tmp_path: Path) -> None:
    source = trained(build_backbone("resnet50"))
    export_backbone(source, tmp_path / "r.pkl", "detectron2")
    file = content(tmp_path / "r.pkl")
    assert file["matching_heuristics"] is True
    assert file["__author__"].startswith("mlssl ")
    weights, own = file["model"], source.state_dict()
    blocks = {"res2": 3, "res3": 4, "res4": 6, "res5": 3}
    layers = [
        f"{stage}.{block}.conv{number}" for stage, n in blocks.items() for block in range(n) for number in (1, 2, 3)
    ]
    layers += ["stem.conv1", *(f"{stage}.0.shortcut" for stage in blocks)]
    statistics = ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
    assert set(weights) == {f"{layer}.{part}" for layer in layers for part in ("weight", *statistics)}
    assert all(isinstance(value, np.ndarray) and value.dtype == np.float32 for value in weights.values())
    pairs = {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_var": "bn1.running_var",
        "res2.0.shortcut.weight": "layer1.0.downsample.0.weight",
        "res4.5.conv3.norm.bias": "layer3.5.bn3.bias",
        "res5.0.shortcut.norm.running_mean": "layer4.0.downsample.1.running_mean",
    }
    for there, here in pairs.items():
        assert np.array_equal(weights[there], own[here].numpy()), there


@pytest.mark.parametrize(("kind", "head"), [("c4", "Res5ROIHeadsExtraNorm"), ("fpn", "StandardROIHeads")])
def test_configs_name_the_network_its_pixels_and_the_schedules(kind: str, head: str, bundles: Path) -> None:
    voc, coco = (yaml.safe_load((bundles / kind / f"r_{schedule}.yaml").read_text()) for schedule in ("voc", "coco"))
    for config in (voc, coco):
        model = config["MODEL"]
        assert (model["WEIGHTS"], model["ROI_HEADS"]["NAME"], config["INPUT"]["FORMAT"]) == ("r.pkl", head, "RGB")
        assert model["PIXEL_MEAN"] == pytest.approx([123.675, 116.28, 103.53])
        assert model["PIXEL_STD"] == pytest.approx([58.395, 57.12, 57.375])
        assert model["RESNETS"]["STRIDE_IN_1X1"] is False
        assert model["RESNETS"]["NORM"] == "naiveSyncBN"
        assert (model["RESNETS"]["DEPTH"], model["RESNETS"]["RES2_OUT_CHANNELS"]) == (
            (50, 256) if kind == "c4" else (18, 64)
        )
    assert (voc["SOLVER"]["MAX_ITER"], coco["SOLVER"]["MAX_ITER"]) == (24000, 90000)
    assert (voc["MODEL"]["MASK_ON"], coco["MODEL"]["MASK_ON"]) == (False, True)
    assert (voc["MODEL"]["ROI_HEADS"]["NUM_CLASSES"], coco["MODEL"]["ROI_HEADS"]["NUM_CLASSES"]) == (20, 80)
    assert "voc_2007_test" in voc["DATASETS"]["TEST"]
    readme = (bundles / kind / "r_README.md").read_text()
    assert "python train_detectron2.py --config-file r_voc.yaml --num-gpus 8" in readme
    assert "$" not in readme.replace("$DETECTRON2_DATASETS", "")


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "resnet50d", "resnet18d", "regnety_002", "resnet10t"])
def test_an_unsupported_architecture_is_refused_with_the_supported_ones(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"detectron2.*supports ResNet-18, 34, 50, 101 and 152.*Formats that support it: 'timm'"
    ):
        export_backbone(build_backbone(name), tmp_path / "r.pkl", "detectron2")
    assert file_names(tmp_path) == []


def test_files_next_to_the_weights_are_only_overwritten_on_request(tmp_path: Path) -> None:
    (tmp_path / "r_voc.yaml").write_text("mine")
    with pytest.raises(FileExistsError, match=r"r_voc\.yaml exists: choose another folder or name, or pass overwrite"):
        export_backbone(build_backbone("resnet18"), tmp_path / "r.pkl", "detectron2")
    assert file_names(tmp_path) == ["r_voc.yaml"]
    assert (tmp_path / "r_voc.yaml").read_text() == "mine"
    export_backbone(build_backbone("resnet18"), tmp_path / "r.pkl", "detectron2", overwrite=True)
    export_backbone(build_backbone("resnet18"), tmp_path / "s.pkl", "detectron2")  # shares head and script
    assert {"r.pkl", "s.pkl"} < set(file_names(tmp_path))


def test_a_pickle_with_a_wrong_value_fails_the_comparison(tmp_path: Path) -> None:
    source = trained(build_backbone("resnet18"))
    export_backbone(source, tmp_path / "r.pkl", "detectron2")
    file = content(tmp_path / "r.pkl")
    file["model"]["res3.0.conv1.weight"][:] *= 1.1
    (tmp_path / "r.pkl").write_bytes(pickle.dumps(file))
    with pytest.raises(AssertionError):
        assert_same_features(torchvision_resnet(tmp_path / "r.pkl"), source)
    del file["model"]["res3.0.conv1.weight"]
    (tmp_path / "r.pkl").write_bytes(pickle.dumps(file))
    with pytest.raises(RuntimeError, match="Missing key"):
        torchvision_resnet(tmp_path / "r.pkl")
    (tmp_path / "r.pkl").write_bytes(pickle.dumps({"model": {}}))
    with pytest.raises(ValueError, match="Detectron2 supports ResNet-18, 34"):
        torchvision_resnet(tmp_path / "r.pkl")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A package of that name before all others, even where the real one is installed."""
    folder = tmp_path_factory.mktemp("site")
    _detectron2_stand_in.write(folder)
    monkeypatch.syspath_prepend(folder)
    with monkeypatch.context() as modules:
        own = ("detectron2", "res5_extra_norm")
        for name in [name for name in sys.modules if name.partition(".")[0] in own]:
            modules.delitem(sys.modules, name)
        yield
        for name in [name for name in sys.modules if name.partition(".")[0] in own]:
            del sys.modules[name]


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
@pytest.mark.usefixtures("stand_in")
def test_if_detectron2_is_installed_its_network_loads_the_file_strictly(name: str, tmp_path: Path) -> None:
    report = export_backbone(trained(build_backbone(name)), tmp_path / "r.pkl", "detectron2")
    assert report.check == "Detectron2's build_resnet_backbone and load_state_dict"
    assert report.max_difference <= MAX_RELATIVE_DIFFERENCE


@pytest.mark.parametrize(
    ("kind", "head", "built"),
    [("c4", "Res5ROIHeadsExtraNorm", "Res5ROIHeadsExtraNorm"), ("fpn", "StandardROIHeads", None)],
)
@pytest.mark.filterwarnings("ignore:.*amp.autocast:FutureWarning")
@pytest.mark.usefixtures("stand_in")
def test_the_training_script_imports_the_head_only_for_a_config_that_names_it(
    kind: str, head: str, built: str | None, bundles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(bundles / kind)
    scope = runpy.run_path(str(bundles / kind / "train_detectron2.py"), run_name="train_detectron2")
    cfg = SimpleNamespace(MODEL=SimpleNamespace(ROI_HEADS=SimpleNamespace(NAME=head), WEIGHTS="r.pkl"), OUTPUT_DIR=".")
    cfg.merge_from_file = cfg.merge_from_list = lambda given: None
    cfg.freeze = lambda: None
    monkeypatch.setitem(scope["main"].__globals__, "get_cfg", lambda: cfg)
    args = SimpleNamespace(config_file="r_voc.yaml", opts=[], eval_only=False, resume=False)
    assert scope["main"](args) == built
    assert ("res5_extra_norm" in sys.modules) == (head == "Res5ROIHeadsExtraNorm")


@pytest.mark.filterwarnings("ignore:.*amp.autocast:FutureWarning")
@pytest.mark.usefixtures("stand_in")
def test_the_head_puts_a_norm_after_res5(bundles: Path) -> None:
    runpy.run_path(str(bundles / "c4" / "res5_extra_norm.py"))
    from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY

    resnets = SimpleNamespace(RES2_OUT_CHANNELS=64, NORM="BN")
    head = ROI_HEADS_REGISTRY["Res5ROIHeadsExtraNorm"](SimpleNamespace(MODEL=SimpleNamespace(RESNETS=resnets)), {})
    given = head._shared_roi_transform([100 + 50 * torch.rand(8, 4, 3, 3)], None)
    assert given.shape == (8, 512, 3, 3)
    assert given.mean().abs() < 1e-4
    assert (given.std() - 1).abs() < 0.01


@pytest.mark.parametrize(
    ("name", "steps"), [("r_voc", (24000, [18000, 22000], 100)), ("r_coco", (90000, [60000, 80000], 1000))]
)
def test_the_commands_for_two_gpus_scale_every_number_of_steps(name: str, steps: tuple, bundles: Path) -> None:
    solver = yaml.safe_load((bundles / "c4" / f"{name}.yaml").read_text())["SOLVER"]
    whole, parts, warmup = steps
    assert (solver["MAX_ITER"], solver["STEPS"], solver["WARMUP_ITERS"]) == (whole, str(tuple(parts)), warmup)
    scaled = (
        f"SOLVER.IMS_PER_BATCH {solver['IMS_PER_BATCH'] // 4} SOLVER.BASE_LR {solver['BASE_LR'] / 4} "
        f'SOLVER.WARMUP_ITERS {4 * warmup} SOLVER.STEPS "{tuple(4 * part for part in parts)}" '
        f"SOLVER.MAX_ITER {4 * whole}"
    )
    assert scaled in (bundles / "c4" / "r_README.md").read_text()


def test_the_readme_lists_the_weights_expected_to_be_missing(bundles: Path) -> None:
    readme = (bundles / "fpn" / "r_README.md").read_text()
    for words in ("proposal_generator.", "roi_heads.", "backbone.fpn_", "0.4 or newer"):
        assert words in readme
