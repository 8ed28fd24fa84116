"""Quickstart: pre-train on a folder of photographs (or on drawn scenes) and take the backbone away.

`python examples/quickstart.py --folder photos/`, or without a folder for drawn scenes, which need no files.
"""

from pathlib import Path

import lightning as L
import timm
import torch
from jsonargparse import auto_cli

from mlssl import MultiLabelDataModule, MultiLabelSSLModule, export_backbone
from mlssl.callbacks import CollapseMonitor, OnlineLinearProbe, ViewGridLogger


def main(folder: str | None = None, epochs: int = 5, size: int = 64, batch_size: int = 64, out: Path = Path()):
    """Pre-train, export, load.

    Args:
        folder: Photographs, searched recursively; scenes are drawn where it is not given.
        epochs: Passes over the images.
        size: Side of a view in pixels.
        batch_size: Images a step.
        out: Everything is written to `lightning_logs` in this folder.
    """
    L.seed_everything(0)
    data = MultiLabelDataModule("folder" if folder else "synthetic", folder, batch_size=batch_size, size=size)
    model = MultiLabelSSLModule("resnet18", projection_dim=512, predictor_dim=128)
    trainer = L.Trainer(
        max_epochs=epochs,
        default_root_dir=out,
        log_every_n_steps=1,
        callbacks=[ViewGridLogger(), CollapseMonitor(), OnlineLinearProbe()],
    )
    trainer.fit(model, data)

    report = export_backbone(model, Path(trainer.log_dir) / "backbone.safetensors")
    backbone = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(report.path)).eval()
    with torch.no_grad():
        features = backbone(torch.rand(1, 3, 224, 224))
    print(f"{report.path} loads into timm and gives features {tuple(features.shape)}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
