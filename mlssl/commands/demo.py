"""`mlssl demo`: pre-train on drawn scenes, and see what comes out."""

from __future__ import annotations

from importlib.resources import as_file, files


def demo(epochs: int | None = None, runs: str = "runs") -> None:
    """Pre-train on drawn scenes, compare the backbone with an untrained one, and say where everything lies.

    Example: mlssl demo --epochs 2

    Args:
        epochs: Passes over the scenes; by default as many as a few minutes on two cores allow.
        runs: Folder of all runs.
    """
    from mlssl.commands.run import RunCLI

    longer = [] if epochs is None else ["--trainer.max_epochs", str(epochs)]
    with as_file(files("mlssl") / "demo.yaml") as config:
        cli = RunCLI(["fit", "--config", str(config), *longer, "--runs", runs, "--name", "demo"])
    folder = cli.folder
    print(
        f"\nIn {folder}:\n"
        f"  views/          what the network saw: each picture, its blocks and their views\n"
        f"  metrics.csv     losses, probe and collapse figures, images per second\n"
        f"  checkpoints/    last.ckpt, to go on from\n"
        f"  exports/        the backbone alone\n"
        f"  config.yaml     the settings; to run them again: mlssl fit --config {folder}/config.yaml"
    )
