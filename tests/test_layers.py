"""Layers of a backbone: rates by depth against timm's groups, and frozen stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import timm
import torch
from _toy import Views, learning_rates, own_network, small, trainer
from PIL import Image
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.utils.data import DataLoader

from mlssl.backbones import build_backbone
from mlssl.cli import main
from mlssl.layers import FrozenStages, depth_of_parameters, rate_scales
from mlssl.runs import RUN_FOLDER_VARIABLE

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_rates_rise_with_depth_as_in_timms_groups(name: str) -> None:
    with_head = timm.create_model(name, num_classes=3)
    expected = {
        id(parameter): group["lr_scale"]
        for group in param_groups_layer_decay(with_head, layer_decay=0.5)
        for parameter in group["params"]
    }
    names = {parameter_name: expected[id(value)] for parameter_name, value in with_head.named_parameters()}
    scales = rate_scales(depth_of_parameters(build_backbone(name)), 0.5)
    # timm puts the last norm in the head's layer or a separate one; each layer below has half the rate of the next.
    factors = {names[parameter] / scale for parameter, scale in scales.items() if parameter in names}
    assert len(factors) == 1
    assert max(scales.values()) == 0.5
    assert scales[min(scales, key=scales.get)] == 0.5 ** (max(depth_of_parameters(build_backbone(name)).values()) + 1)


@pytest.mark.parametrize(
    ("stages", "frozen", "free"),
    [(1, "conv1.0.weight", "layer1.0.conv1.weight"), (2, "layer1.0.conv1.weight", "layer2.0")],
)
def test_the_stem_is_the_first_stage(stages: int, frozen: str, free: str) -> None:
    names = FrozenStages(build_backbone("test_resnet"), stages).names
    assert frozen in names
    assert not any(name.startswith(free) for name in names)


def test_only_fully_frozen_parts_leave_training_mode() -> None:
    backbone = build_backbone("test_resnet").train()
    held = FrozenStages(backbone, 2, epochs=1)
    held.begin_epoch(0)
    assert not backbone.layer1.training
    assert not backbone.layer1[0].bn1.training
    assert backbone.layer2.training
    assert backbone.training
    held.begin_epoch(1)
    assert all(module.training for module in backbone.modules())


def first_rates(tmp_path: Path, **settings: Any) -> list[float]:
    module = small(base_lr=0.4, views_per_step=256, **settings)
    return learning_rates(tmp_path, module, max_steps=1)[0]


def test_each_layer_has_its_rate_and_the_heads_the_full_rate(tmp_path: Path) -> None:
    rates = first_rates(tmp_path, layer_decay=0.5, backbone_lr_scale=0.1)
    assert rates[-2:] == [0.4, 0.4]
    layers = max(depth_of_parameters(build_backbone("test_resnet")).values()) + 1
    assert sorted(rates[:-2]) == pytest.approx([0.04 * 0.5**number for number in range(layers, 0, -1)])
    assert first_rates(tmp_path, backbone_lr_scale=0.0) == [0.0, 0.4, 0.4]
    assert first_rates(tmp_path) == [0.4, 0.4], "groups as of checkpoints that know nothing of layers"


def stem_and_last(module: Any) -> tuple[torch.Tensor, ...]:
    backbone = module.backbone
    return tuple(
        value.detach().clone()
        for value in (backbone.conv1[0].weight, backbone.bn1.running_mean, backbone.layer4[0].conv1.weight)
    )


class Watch(L.Callback):
    """Whether weights and statistics of the stem, and weights of the last stage, changed in each epoch."""

    def __init__(self) -> None:
        self.changed: list[tuple[bool, ...]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.before = stem_and_last(pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        now = stem_and_last(pl_module)
        self.changed.append(tuple(not torch.equal(a, b) for a, b in zip(self.before, now, strict=True)))


def test_frozen_stages_do_not_change_for_the_first_epochs_or_the_whole_run(tmp_path: Path) -> None:
    for settings, expected in (
        ({"frozen_epochs": 1}, [(False, False, True), (True, True, True)]),
        ({}, [(False, False, True), (False, False, True)]),
    ):
        watch = Watch()
        module = small(base_lr=0.5, frozen_stages=2, weight_decay=0.1, **settings)
        loader = DataLoader(Views(6), batch_size=3)
        trainer(tmp_path, max_epochs=2, callbacks=[watch]).fit(module, loader)
        assert watch.changed == expected
        trained = {name for name, value in module.named_parameters() if value.requires_grad}
        assert ("backbone.conv1.0.weight" in trained) == bool(settings)


def test_in_a_plain_loop_stages_frozen_for_the_whole_run_keep_their_statistics() -> None:
    module = small(frozen_stages=1).train()
    assert not module.backbone.bn1.training
    assert module.backbone.layer1.training


@pytest.mark.parametrize(
    ("backbone", "settings", "message"),
    [
        ("test_resnet", {"layer_decay": 0.0}, "layer_decay=0.0 was given: pass a factor above 0 and at most 1"),
        ("test_resnet", {"layer_decay": 1.5}, "layer_decay=1.5 was given"),
        ("test_resnet", {"frozen_stages": -1}, "frozen_stages=-1 was given: pass a number of at least 0"),
        ("test_resnet", {"backbone_lr_scale": -0.1}, "backbone_lr_scale=-0.1 was given"),
        ("test_resnet", {"frozen_epochs": 2}, "frozen_epochs=2 was given, but no stage is frozen: pass frozen_stages"),
        ("test_resnet", {"frozen_stages": 9}, "frozen_stages=9 was given, but ResNet has 5: pass fewer"),
        ("torchvision/resnet18", {"layer_decay": 0.5}, "ResNet does not define its layers: pass a timm backbone"),
        (own_network(), {"frozen_stages": 1}, "Sequential does not define its layers"),
    ],
)
def test_invalid_layer_settings_are_refused(backbone: str | nn.Module, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(backbone, **settings)


def test_the_config_adapts_a_published_file_with_frozen_first_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(RUN_FOLDER_VARIABLE, "")
    published = timm.create_model("test_resnet").state_dict()  # with its classifier
    torch.save(published, "weights.pth")
    Path("photos").mkdir()
    for number in range(4):
        Image.new("RGB", (48, 40), (60 * number, 90, 30)).save(f"photos/{number}.png")
    words = ["fit", "--config", str(ROOT / "examples" / "configs" / "adapt_resnet50.yaml"), "--data.root", "photos"]
    words += ["--model.backbone", "test_resnet", "--model.projection_dim", "16", "--model.predictor_dim", "8"]
    words += ["--model.backbone_kwargs.pretrained_cfg_overlay", "{file: weights.pth}", "--model.warmup_epochs", "0"]
    words += ["--data.batch_size", "2", "--data.size", "32", "--data.num_workers", "0", "--trainer.max_epochs", "1"]
    words += [
        "--trainer.accelerator",
        "cpu",
        "--trainer.precision",
        "32-true",
        "--trainer.enable_progress_bar",
        "false",
    ]
    assert main(words) == 0
    (path,) = Path("runs").glob("adapt_resnet50-*/checkpoints/last.ckpt")
    found = torch.load(path, weights_only=True)["state_dict"]
    for name, held in (("conv1.0.weight", True), ("layer1.0.bn1.running_mean", True), ("layer4.0.conv1.weight", False)):
        assert torch.equal(found[f"backbone.{name}"], published[name]) == held, name
