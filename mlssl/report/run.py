"""From the folder of a run to its page: curves from its log, and the network at its start and at its end."""

from __future__ import annotations

import csv
import io
import os
import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.utilities.seed import isolate_rng

from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.module import MultiLabelSSLModule
from mlssl.report.content import END, START, Log, Sets, build_page
from mlssl.report.measure import measure, some_images
from mlssl.report.page import write_page
from mlssl.weights.checkpoints import load_checkpoint


def write_report(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    max_images: int = 2000,
    num_workers: int | None = None,
    progress: bool = False,
) -> Path:
    """Write one HTML file about a run of `mlssl fit`.

    The network is looked at twice on the run's own data: as its last checkpoint has it, and as the run's seed and
    settings built it, which is exactly what the run started from.

    Args:
        run: Its folder, with config.yaml, metrics.csv and checkpoints/.
        output: File to write, replaced if it exists; by default ``report.html`` in the run's folder.
        max_images: At most so many training and so many val images are looked at, evenly chosen; at least 2.
        num_workers: Loader processes; those of the run by default.
        progress: Whether to show bars with images a second.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If the folder, a file of it or the images are missing.
        ValueError: If max_images is below 2, the config is not one of a run, or the checkpoint does not fit it.
    """
    if max_images < 2:
        raise ValueError(f"max_images={max_images} was given: pass at least 2, or leave it out for 2000.")
    folder = Path(run)
    config, checkpoint = read_config(folder), last_checkpoint(folder)
    log = read_log(folder / "metrics.csv")
    seed = int(config["seed_everything"])
    data = MultiLabelDataModule(**config["data"], seed=seed)
    data.setup()
    assert data.train_records is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train = some_images(data.train_records, max_images)
    val = None if data.val_records is None else some_images(data.val_records, max_images)
    settings: dict[str, Any] = {
        "batch_size": config["data"]["batch_size"],
        "num_workers": data.image_dataloader("train").num_workers if num_workers is None else num_workers,
        "seed": seed,
        "progress": progress,
    }
    snapshots = {}
    for moment, model in ((END, _loaded(checkpoint)), (START, _untrained(config["model"], seed))):
        snapshots[moment] = measure(model.to(device), train, val, data.views, data.eval_size, **settings)
    sets = Sets(data.train_records, data.val_records, train)
    page = build_page(folder, config, log, snapshots[START], snapshots[END], sets)
    path = Path(output) if output is not None else folder / "report.html"
    write_page(page, path)
    return path


def read_config(folder: Path) -> dict[str, Any]:
    """Settings of a run, from its config.yaml.

    Raises:
        FileNotFoundError: If there is no such folder or file.
        ValueError: If it is not the config of a run.
    """
    path = folder / "config.yaml"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {str(folder)!r}: pass the folder of a run, such as runs/fit-20250101-120000"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"no config.yaml in {str(folder)!r}: pass the folder of a run that mlssl fit has written"
        )
    config = yaml.safe_load(path.read_text())
    if not isinstance(config, dict) or not {"seed_everything", "model", "data", "trainer"} <= config.keys():
        raise ValueError(f"{str(path)!r} is not the config of a run: pass the folder of one that mlssl fit has written")
    for name in ("eval_size", "min_images_per_class"):
        if isinstance(config["data"].get(name), list):
            config["data"][name] = tuple(config["data"][name])
    return config


def last_checkpoint(folder: Path) -> Path:
    """``checkpoints/last.ckpt`` of a run, or the latest where there is none of that name.

    Raises:
        FileNotFoundError: If there is no checkpoint.
    """
    found = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    last = [path for path in found if path.name == "last.ckpt"]
    if not found:
        raise FileNotFoundError(f"no checkpoint in {str(folder / 'checkpoints')!r}: the run has not saved any yet")
    return (last or found)[-1]


def read_log(path: Path) -> dict[str, Log]:
    """Every quantity of metrics.csv.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    log: dict[str, Log] = defaultdict(lambda: Log([], [], []))
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    log[name].steps.append(float(row["step"] or 0))
                    log[name].epochs.append(float(row.get("epoch") or 0))
                    log[name].values.append(float(value))
    return dict(log)


def _loaded(checkpoint: Path) -> MultiLabelSSLModule:
    source: Any = checkpoint
    if checkpoint.is_dir():  # FSDP's shards, which Lightning opens under FSDP alone
        source = io.BytesIO()
        torch.save(load_checkpoint(checkpoint), source)
        source.seek(0)
    try:
        return MultiLabelSSLModule.load_from_checkpoint(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{checkpoint} does not load as a checkpoint of MultiLabelSSLModule: was it cut off?"
        ) from error


def _untrained(settings: dict[str, Any], seed: int) -> MultiLabelSSLModule:
    with isolate_rng():
        L.seed_everything(seed, verbose=False)
        return MultiLabelSSLModule(**settings)
