"""Networks other than the backbone: a momentum teacher is exported from a module and from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_export import assert_same_features, file_names, header, loaded_by, trained, written_checkpoint
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mlssl.cli import main
from mlssl.export import export_backbone, fitting_format
from mlssl.module import MultiLabelSSLModule


class WithTeacher(MultiLabelSSLModule):
    """A module whose teacher averages backbone and projector."""

    def __init__(self) -> None:
        super().__init__("test_resnet", projection_dim=16, predictor_dim=8, mean=[0.4, 0.5, 0.6])
        self.teacher = AveragedModel(nn.Sequential(self.backbone, self.projector)).requires_grad_(False)


@pytest.fixture
def module() -> WithTeacher:
    made = WithTeacher()
    trained(made.teacher)
    return made


def test_the_teacher_of_a_module_and_of_its_checkpoint_is_exported(module: WithTeacher, tmp_path: Path) -> None:
    checkpoint = written_checkpoint(module, tmp_path / "last.ckpt")
    assert fitting_format(module, network="teacher.module.0") == "timm"
    for number, source in enumerate((module, checkpoint)):
        report = export_backbone(source, tmp_path / f"{number}.safetensors", network="teacher.module.0")
        assert_same_features(loaded_by(report.check), module.teacher.module[0])
        assert header(report.path)["mean"] == "[0.4, 0.5, 0.6]"
        assert (loaded_by(report.check).state_dict()["conv1.0.weight"] != module.backbone.conv1[0].weight).any()


def test_the_command_exports_the_teacher(module: WithTeacher, tmp_path: Path) -> None:
    checkpoint = written_checkpoint(module, tmp_path / "last.ckpt")
    output = tmp_path / "teacher.safetensors"
    assert main(["export", str(checkpoint), "--network", "teacher.module.0", "-o", str(output)]) == 0
    loaded = loaded_by(f"network = timm.create_model('test_resnet', num_classes=0, checkpoint_path={str(output)!r})")
    assert_same_features(loaded, module.teacher.module[0])


@pytest.mark.parametrize("of_checkpoint", [False, True])
def test_an_unknown_network_suggests_the_nearest(of_checkpoint: bool, module: WithTeacher, tmp_path: Path) -> None:
    source = written_checkpoint(module, tmp_path / "last.ckpt") if of_checkpoint else module
    before = file_names(tmp_path)
    message = (
        r"has no weights of techer, .*such as 'teacher'"
        if of_checkpoint
        else r"has no network 'techer': .*such as 'teacher'"
    )
    with pytest.raises(ValueError, match=message):
        export_backbone(source, tmp_path / "a.safetensors", network="techer")
    assert file_names(tmp_path) == before


def test_weights_of_another_architecture_than_the_backbone_are_refused(module: WithTeacher, tmp_path: Path) -> None:
    checkpoint = written_checkpoint(module, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"weights of .projector. in .* do not fit its backbone 'test_resnet': \d+"):
        export_backbone(checkpoint, tmp_path / "a.safetensors", network="projector")


def test_a_checkpoint_with_a_backbone_entry_is_read_by_it(module: WithTeacher, tmp_path: Path) -> None:
    path = written_checkpoint(module, tmp_path / "last.ckpt")
    content = torch.load(path, weights_only=True)
    content["backbone"] = {"name": "test_resnet", "arguments": {}, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}
    content["hyper_parameters"] = {}
    torch.save(content, path)
    report = export_backbone(path, tmp_path / "a.safetensors")
    assert header(report.path)["mean"] == "[0.1, 0.2, 0.3]"
    assert_same_features(loaded_by(report.check), module.backbone)
