"""Accepted sources of backbones, and refused files."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from test_export import in_shards

from mlssl.export import export_backbone
from mlssl.module import MultiLabelSSLModule
from mlssl.weights.sources import open_backbone

IMAGES = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[MultiLabelSSLModule, Path]:
    """A module with a custom mean, and its checkpoint."""
    torch.manual_seed(3)
    model = MultiLabelSSLModule("test_resnet", projection_dim=16, predictor_dim=8, mean=[0.4, 0.5, 0.6])
    for buffer in model.backbone.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return model.eval(), path


def features(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IMAGES)


def test_a_checkpoint_its_shards_and_its_exports_are_its_backbone(trained: Any, tmp_path: Path) -> None:
    model, path = trained
    exports = [
        export_backbone(path, tmp_path / "backbone.safetensors"),
        export_backbone(path, tmp_path / "a", "timm-dir"),
    ]
    by_lightning = shutil.copy(path, tmp_path / "epoch=9-step=700.ckpt")
    shards = in_shards(path, tmp_path / "last.ckpt")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(path, tmp_path / "run" / "checkpoints")
    for source in (path, by_lightning, *(report.path for report in exports), shards, tmp_path / "run"):
        opened = open_backbone(str(source))
        torch.testing.assert_close(features(opened), features(model), rtol=1e-4, atol=1e-5)
        assert not any(parameter.requires_grad for parameter in opened.parameters())
        assert not opened.backbone.training


def test_a_name_is_untrained_by_the_seed_and_leaves_the_random_state(trained: Any) -> None:
    before = torch.random.get_rng_state()
    first, again, other = (open_backbone("test_resnet", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(features(first), features(again))
    assert not torch.equal(features(first), features(other))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.backbone.", "nested"])
def test_a_name_with_a_file_of_weights(prefix: str, suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    network = timm.create_model("test_resnet", num_classes=7).eval()  # with its classifier, as published files are
    weights: Any = {f"{prefix.replace('nested', '')}{name}": value for name, value in network.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights, "epoch": 3} if prefix == "nested" else weights, path)
    opened = open_backbone(f"test_resnet={path}")
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(opened.normalize(IMAGES)), pre_logits=True)
    torch.testing.assert_close(features(opened), expected)


def test_a_torchvision_network_with_published_weights(tmp_path: Path) -> None:
    torch.manual_seed(5)
    network = torchvision.models.resnet18().eval()
    # As torchvision's older files: without the counters of batch norms.
    weights = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    torch.save(weights, tmp_path / "resnet18.pth")
    opened = open_backbone(f"torchvision/resnet18={tmp_path / 'resnet18.pth'}")
    network.fc = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(features(opened), network(opened.normalize(IMAGES)))


def of_moco(network: torch.nn.Module, encoder: str, momentum: str) -> dict[str, Any]:
    """A file as MoCo's `main_moco.py` writes it: DDP's prefix, both encoders with heads of their own, and the rest."""
    state: dict[str, Any] = {}
    for prefix, factor in ((encoder, 1.0), (momentum, 0.5)):
        own = {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}
        own |= {"fc.0.weight": torch.zeros(8, 8), "fc.2.bias": torch.zeros(4)}
        state |= {f"module.{prefix}.{name}": factor * value for name, value in own.items()}
    state |= {"module.queue": torch.zeros(4, 16), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}


@pytest.mark.parametrize(("encoder", "momentum"), [("encoder_q", "encoder_k"), ("base_encoder", "momentum_encoder")])
def test_mocos_published_files_are_its_trained_encoder(encoder: str, momentum: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    network = torchvision.models.resnet18().eval()  # whose names are timm's
    torch.save(of_moco(network, encoder, momentum), tmp_path / "moco.pth.tar")
    network.fc = torch.nn.Identity()
    opened = open_backbone(f"resnet18={tmp_path / 'moco.pth.tar'}")
    with torch.no_grad():
        torch.testing.assert_close(features(opened), network(opened.normalize(IMAGES)))


@pytest.mark.parametrize("nested", [False, True])
def test_dinos_published_transformer_keeps_its_norm_before_the_pooling(nested: bool, tmp_path: Path) -> None:
    torch.manual_seed(5)
    network = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True).eval()  # as DINO's, a class token
    torch.nn.init.uniform_(network.norm.weight)
    weights: Any = network.state_dict()
    if nested:  # with its head, as training saves it
        head = {"head.mlp.0.weight": torch.zeros(4, 4), "head.last_layer.weight_v": torch.zeros(4, 4)}
        weights = {"teacher": {f"backbone.{name}": value for name, value in weights.items()} | head}
    torch.save(weights, tmp_path / "dino.pth")
    opened = open_backbone(f"test_vit={tmp_path / 'dino.pth'}")
    with torch.no_grad():
        expected = network.forward_features(opened.normalize(IMAGES))[:, network.num_prefix_tokens :].mean(1)
    torch.testing.assert_close(features(opened), expected)


class Code:
    """Pickled, it would run code when opened."""

    def __reduce__(self) -> Any:
        return print, ("run",)


def test_files_without_a_backbone_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.ckpt"
    text.write_text("no checkpoint")
    plain = tmp_path / "plain.safetensors"
    save_file({"weight": torch.zeros(2)}, plain)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(plain.read_bytes()[:20])
    code, dangerous = tmp_path / "code.ckpt", tmp_path / "code.pth"
    for path in (code, dangerous):
        torch.save({"state_dict": {"backbone.weight": Code()}}, path)
    raw = tmp_path / "raw.pth"
    raw.write_bytes(pickle.dumps(Code()))
    numbers = tmp_path / "numbers.pth"
    torch.save({"epoch": 3}, numbers)

    (tmp_path / "folder.ckpt").mkdir()

    refused = {
        str(tmp_path): "is a folder without shards",
        str(tmp_path / "folder.ckpt"): "is a folder without shards",
        "nowhere.ckpt": "no file 'nowhere.ckpt'",
        "nowhere.safetensors": "no file",
        "resnet18=nowhere.pth": "no file",
        str(text): "is not a checkpoint or is damaged",
        str(code): "contains pickled Python objects, which could run any code",
        f"test_resnet={dangerous}": "contains pickled Python objects, which could run any code",
        f"test_resnet={raw}": "is not a file of weights or is damaged",
        f"test_resnet={text}": "is not a file of weights or is damaged",
        f"test_resnet={numbers}": "contains no weights: pass a dict",
        str(plain): "does not name its backbone: also pass the name, such as resnet50=",
        str(cut): "is not a safetensors file or is damaged",
        f"test_resnet={cut}": "is not a safetensors file or is damaged",
        "resnet5O": "did you mean 'resnet50'",
        f"resnet5O={plain}": "did you mean 'resnet50'",
        str(numbers): "has no weights of backbone",
    }
    for source, message in refused.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message.replace("(", r"\(")):
            open_backbone(source)
    assert "run" not in capsys.readouterr().out, "no code of a file was run"


def test_weights_of_another_architecture_are_named(trained: Any, tmp_path: Path) -> None:
    _, checkpoint = trained
    content = torch.load(checkpoint, weights_only=True)
    content["backbone"]["name"] = "resnet18"
    other = tmp_path / "other.ckpt"
    torch.save(content, other)
    with pytest.raises(
        ValueError, match=r"fit its backbone 'resnet18': \d+ missing, conv1\.weight, .*; \d+ unexpected, conv1\.0"
    ) as caught:
        open_backbone(str(other))
    assert len(str(caught.value)) < 500

    weights = timm.create_model("test_resnet", num_classes=0).state_dict()
    first = next(iter(weights))
    weights["extra.weight"] = weights.pop(first)
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(
        ValueError, match=rf"1 missing, {first}; 1 unexpected, extra\.weight\): pass the name of the network"
    ):
        open_backbone(f"test_resnet={tmp_path / 'weights.pth'}")
    weights[first] = weights.pop("extra.weight")[:1]
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=rf"1 with another shape, {first}\)"):
        open_backbone(f"test_resnet={tmp_path / 'weights.pth'}")
