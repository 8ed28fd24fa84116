"""`mlssl demo`: pre-train a small network on drawn scenes."""

from __future__ import annotations

from importlib.resources import as_file, files


def demo(epochs: int | None = None, runs: str = "runs") -> None:
    """Pre-train on drawn scenes, compare the backbone with an untrained one, and print where the results are.

    Example: mlssl demo --epochs 2

    Args:
        epochs: Passes over the scenes; by default as many as a few minutes on two cores allow.
        runs: Folder of all runs.
    """
    from mlssl.commands.run import RunCLI

    epoch_words = [] if epochs is None else ["--trainer.max_epochs", str(epochs)]
    with as_file(files("mlssl") / "demo.yaml") as config:
        cli = RunCLI(["fit", "--config", str(config), *epoch_words, "--runs", runs, "--name", "demo"])
    folder = cli.folder
    print(
        f"\nIn {folder}:\n"
        f"  views/          what the network sees: each image, its blocks and their views\n"
        f"  metrics.csv     losses, probe and collapse metrics, images per second\n"
        f"  checkpoints/    last.ckpt, to resume from\n"
        f"  exports/        the exported backbone\n"
        f"  config.yaml     the settings; to run again: mlssl fit --config {folder}/config.yaml"
    )
