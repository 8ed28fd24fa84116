"""Warm starts: pre-training from a file of weights, and from another run on new data, in Python and by the command."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from mlssl import MultiLabelDataModule, MultiLabelSSLModule
from mlssl.backbones import build_backbone
from mlssl.cli import main

SMALL = [
    "--trainer.max_steps", "1",
    "--data.val_split", "",
    "--trainer.precision", "32-true",
    "--trainer.callbacks", "mlssl.callbacks.Throughput",
    "--model.projection_dim", "16",
    "--model.predictor_dim", "8",
    "--model.base_lr", "0",
    "--model.weight_decay", "0",
    "--data.batch_size", "4",
    "--data.size", "32",
    "--data.num_workers", "0",
]  # fmt: skip


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    (path,) = run.glob("*/checkpoints/last.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    return {name: value for name, value in state.items() if "running" not in name and "num_batches" not in name}


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize("with_classifier", [True, False])
def test_a_torchvision_file_starts_a_torchvision_backbone(kind: str, with_classifier: bool, tmp_path: Path) -> None:
    published = torchvision.models.shufflenet_v2_x0_5().state_dict()
    if not with_classifier:
        published = {name: value for name, value in published.items() if not name.startswith("fc.")}
    path = tmp_path / f"weights.{kind}"
    (torch.save if kind == "pth" else save_file)(published, path)
    network = build_backbone("torchvision/shufflenet_v2_x0_5", checkpoint_path=str(path))
    assert all(torch.equal(value, published[name]) for name, value in network.state_dict().items())
    one_channel = build_backbone("torchvision/shufflenet_v2_x0_5", checkpoint_path=str(path), in_chans=1)
    total = published["conv1.0.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(one_channel.conv1[0].weight, total)


@pytest.mark.parametrize("name", ["torchvision/shufflenet_v2_x0_5", "test_resnet"])
def test_a_missing_file_or_one_of_another_network_is_reported(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"There are no weights at .*gone\.pth: pass a \.safetensors or \.pth file"
    ):
        build_backbone(name, checkpoint_path=str(tmp_path / "gone.pth"))
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "other.safetensors").write_text("no weights")
    for kind in ("pth", "safetensors"):
        with pytest.raises(ValueError, match=rf"The weights in .*other\.{kind} do not fit backbone '{name}'"):
            build_backbone(name, checkpoint_path=str(tmp_path / f"other.{kind}"))


def test_a_file_with_a_classifier_explains_how_timm_reads_it(tmp_path: Path) -> None:
    import timm

    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "published.pth")
    with pytest.raises(ValueError, match=r"one with a classifier is read by pretrained=True, pretrained_cfg_overlay="):
        build_backbone("test_resnet", checkpoint_path=str(tmp_path / "published.pth"))


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_the_command_pre_trains_from_a_published_file(library: str, tmp_path: Path, monkeypatch) -> None:
    import timm

    monkeypatch.chdir(tmp_path)
    if library == "timm":
        published, name = timm.create_model("test_resnet"), "test_resnet"
        words = ["--model.backbone_kwargs.pretrained", "true"]
        words += ["--model.backbone_kwargs.pretrained_cfg_overlay", "{file: weights.pth}"]
    else:
        published, name = torchvision.models.shufflenet_v2_x0_5(), "torchvision/shufflenet_v2_x0_5"
        words = ["--model.backbone_kwargs.checkpoint_path", "weights.pth"]
    torch.save(published.state_dict(), "weights.pth")
    assert main(["fit", *SMALL, "--model.backbone", name, *words]) == 0
    first = next(iter(published.state_dict()))
    assert torch.equal(weights_of(tmp_path / "runs")[f"backbone.{first}"], published.state_dict()[first])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    L.seed_everything(5, verbose=False)
    module = MultiLabelSSLModule("test_resnet", projection_dim=16, predictor_dim=8)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_model_summary=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    return tmp_path / "first.ckpt"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_the_command_starts_from_a_run_on_new_data_with_a_new_schedule(checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["fit", *SMALL, "--model.backbone", "test_resnet", "--start_from", str(checkpoint)]
    assert main([*words, "--data.rows", "1"]) == 0
    first = torch.load(checkpoint, weights_only=True)["state_dict"]
    found = weights_of(tmp_path / "runs")
    assert {"projector", "predictor", "backbone"} == {name.partition(".")[0] for name in found}
    assert all(torch.equal(value, first[name]) for name, value in found.items())
    (path,) = (tmp_path / "runs").glob("*/checkpoints/last.ckpt")
    whole = torch.load(path, weights_only=True)
    assert (whole["epoch"], whole["global_step"]) == (0, 1)
    checkpoint.unlink()  # a resumed run reads its own
    assert main(["fit", "--resume", str(path.parents[1]), "--trainer.max_steps", "2"]) == 0
    assert torch.load(path, weights_only=True)["global_step"] == 2


def test_wrong_checkpoints_to_start_from_end_in_one_line(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["fit", *SMALL, "--start_from"]
    assert main([*words, "gone.ckpt", "--model.backbone", "test_resnet"]) == 2
    assert "There is no checkpoint at gone.ckpt" in capsys.readouterr().err
    assert main([*words, str(checkpoint), "--model.backbone", "test_vit", "--data.size", "32"]) == 2
    assert "first.ckpt does not fit the model, give the --model.backbone and widths" in capsys.readouterr().err
    both = [*words, str(checkpoint), "--model.backbone", "test_resnet", "--ckpt_path", str(checkpoint)]
    assert main(both) == 2
    assert "--ckpt_path resumes its run: pass one of them" in capsys.readouterr().err
    assert main(["fit", "--resume", "runs/first", "--start_from", str(checkpoint)]) == 2
    assert "--start_from starts a new run, --resume continues one" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*"))


def test_in_python_a_checkpoint_is_loaded_and_fitted_to_new_data(checkpoint, tmp_path) -> None:
    module = MultiLabelSSLModule.load_from_checkpoint(checkpoint, map_location="cpu", base_lr=0.01, weights_only=True)
    trainer = L.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, MultiLabelDataModule("synthetic", batch_size=4, size=32, num_workers=0, val_split=""))
    assert trainer.global_step == 2
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert rates[0] == pytest.approx(0, abs=1e-9)  # the new cosine has reached its end


@pytest.mark.parametrize("others", [[], ["--data.val_split", "test"]], ids=["views", "whole images"])
def test_an_image_size_not_supported_by_a_transformer_is_reported_before_the_first_step(
    others, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["fit", *SMALL, "--model.backbone", "test_vit", "--model.backbone_kwargs.dynamic_img_size", "false"]
    assert main([*words, *others]) == 2
    assert "takes no images of 32 × 32 pixels" in capsys.readouterr().err
