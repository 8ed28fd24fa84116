"""`mlssl demo`: pre-train on drawn scenes, and see what comes out."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path


def demo(epochs: int | None = None, runs: str = "runs") -> None:
    """Pre-train on drawn scenes, probe the backbone against an untrained one, and say where everything lies.

    Example: mlssl demo --epochs 2

    Args:
        epochs: Passes over the scenes; by default as many as a few minutes on two cores allow.
        runs: Folder of all runs.
    """
    import lightning as L

    from mlssl.commands.run import RunCLI
    from mlssl.evaluation.frozen import frozen_sets
    from mlssl.evaluation.probe import linear_probe
    from mlssl.module import MultiLabelSSLModule

    longer = [] if epochs is None else ["--trainer.max_epochs", str(epochs)]
    with as_file(files("mlssl") / "demo.yaml") as config:
        cli = RunCLI(["fit", "--config", str(config), *longer, "--runs", runs, "--name", "demo"])
    L.seed_everything(0, verbose=False)
    data = cli.datamodule
    before, after = (
        linear_probe(*frozen_sets(model, data.image_dataloader("train"), data.image_dataloader("val")), num_resamples=0)
        for model in (MultiLabelSSLModule(**cli.model_settings), cli.model)
    )
    folder = Path(cli.trainer.default_root_dir)
    exports = ", ".join(file.name for file in sorted((folder / "exports").iterdir()))
    print(
        f"\nLinear probe on frozen features, mAP on {len(data.val_records)} scenes of {before.num_classes} "
        f"classes that were never trained on:\n"
        f"  untrained backbone    {before.mAP:.3f}\n"
        f"  pre-trained backbone  {after.mAP:.3f}   ({after.mAP - before.mAP:+.3f})\n\n"
        f"The run lies in {folder}:\n"
        f"  views/          what the network saw: each picture, its blocks and their views\n"
        f"  metrics.csv     losses, probe and collapse figures, images per second\n"
        f"  checkpoints/    last.ckpt, to go on from\n"
        f"  exports/        {exports}: the backbone alone\n"
        f"  config.yaml     the settings; to run them again: mlssl fit --config {folder / 'config.yaml'}"
    )
