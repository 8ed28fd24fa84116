"""Seconds until a linear probe on Corel-5K reaches a mAP, ours against the author's way, both with one recipe.

python examples/benchmarks/time_to_quality.py FOLDER

FOLDER contains Corel-5K. The two train by turns, an epoch each, in one process and on one device, so that both meet the
same machine; each has a clock of its own for its training alone, of the wall and of the processor. After every epoch a
linear probe is fitted to the features of whole images. With --ways ours or --ways author only one of them runs.
"""

import itertools
import json
import time
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from authors_way import MEAN, STD, AuthorsNetwork, PilViews
from jsonargparse import auto_cli
from torch import Tensor
from torch.utils.data import DataLoader

from mlssl import MultiLabelDataModule, MultiLabelSSLModule
from mlssl.callbacks import SmallMaps
from mlssl.evaluation.features import extract_features
from mlssl.evaluation.probe import linear_probe
from mlssl.optim import cosine_with_warmup, scaled_lr
from mlssl.runs import default_precision

NETWORK: dict[str, Any] = {"backbone": "resnet18", "projection_dim": 512, "predictor_dim": 128}
GRID: dict[str, Any] = {"rows": 2, "cols": 2, "overlap": 0.3}


class Clock:
    """Seconds of the wall and of this process between `start` and `stop`, added up."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0

    def start(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.wall += time.perf_counter() - self.began[0]
        self.processor += time.process_time() - self.began[1]


class AuthorsRun:
    """The author's way, an epoch at a time."""

    def __init__(
        self, data: MultiLabelDataModule, size: int, epochs: int, batch_size: int, workers: int, limit: int | None
    ) -> None:
        self.limit = limit
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = AuthorsNetwork(**NETWORK).to(self.device)
        self.backbone = self.network.backbone
        views = PilViews(data.image_dataloader("train").dataset.records, size, **GRID)
        self.loader = DataLoader(
            views,
            batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
        lr = scaled_lr(0.05, batch_size * GRID["rows"] * GRID["cols"])
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr, momentum=0.9, weight_decay=1e-4)
        factor = cosine_with_warmup(epochs * len(self.loader))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def normalize(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (MEAN, STD))
        return (images / 255 - mean) / std

    def epoch(self) -> None:
        self.network.train()
        for views, ids in itertools.islice(self.loader, self.limit):
            loss = self.network(views.to(self.device, non_blocking=True), ids.to(self.device, non_blocking=True))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()


class Turns(L.Callback):
    """Run the author's epoch before each of ours, and probe both after it."""

    def __init__(
        self,
        data: MultiLabelDataModule,
        author: AuthorsRun | None,
        target: float,
        until_reached: bool,
        probe_from: int,
        result: Path,
    ) -> None:
        self.data, self.author, self.probe_from, self.result = data, author, probe_from, result
        self.target, self.until_reached = target, until_reached
        self.clocks = {"ours": Clock(), "author": Clock()}
        self.rows: list[dict[str, Any]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.author is not None:
            self.author_epoch(trainer.current_epoch)
        self.clocks["ours"].start()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.clocks["ours"].stop()
        self.note("ours", trainer.current_epoch, pl_module)
        reached = self.first_above_target().values()
        trainer.should_stop = self.until_reached and bool(reached) and all(reached)

    def author_epoch(self, epoch: int) -> None:
        self.clocks["author"].start()
        self.author.epoch()
        self.clocks["author"].stop()
        self.note("author", epoch, self.author)

    def note(self, way: str, epoch: int, model: Any) -> None:
        if epoch + 1 < self.probe_from:
            return
        train, test = (extract_features(model, self.data.image_dataloader(split)) for split in ("train", "val"))
        clock = self.clocks[way]
        row = {"way": way, "epoch": epoch + 1, "wall_s": round(clock.wall, 1), "processor_s": round(clock.processor, 1)}
        row["mAP"] = round(linear_probe(train, test).mAP, 4)
        self.rows.append(row)
        print(f"{way:>6}, epoch {epoch + 1}: {clock.wall:.0f} s, of the processor {clock.processor:.0f} s, "
              f"mAP {row['mAP']:.4f}", flush=True)  # fmt: skip
        self.result.write_text(json.dumps(self.rows, indent=1))

    def first_above_target(self) -> dict[str, dict[str, Any] | None]:
        """Each way's first row that reaches the target."""
        ways = {row["way"]: None for row in self.rows}
        return {
            way: next((row for row in self.rows if row["way"] == way and row["mAP"] >= self.target), None)
            for way in ways
        }

    def summary(self) -> None:
        for way, reached in self.first_above_target().items():
            print(f"{way}: {f'mAP {self.target} {reached}' if reached else f'mAP {self.target} not reached'}")


def main(
    folder: Path,
    ways: Literal["both", "ours", "author"] = "both",
    target: float = 0.38,
    until_reached: bool = False,
    epochs: int = 10,
    probe_from: int = 1,
    batch_size: int = 64,
    size: int = 64,
    workers: int = 0,
    seed: int = 0,
    limit: int | None = None,
    result: Path = Path("time_to_quality.json"),
) -> None:
    """Train both by turns and print when each reached the target.

    Args:
        folder: Corel-5K.
        ways: Which of the two run.
        target: mAP to reach.
        until_reached: End once all ways have reached it, rather than after the whole schedule.
        epochs: Of the schedule, which is the same for both.
        probe_from: First epoch that is probed.
        batch_size: Images a step.
        size: Side of a view.
        workers: Loader processes of each; 0 loads between the steps, and then the processor's clock counts everything.
        seed: Of weights and draws.
        limit: Steps an epoch, to try the script.
        result: File for the numbers after each epoch.
    """
    L.seed_everything(seed)
    data = MultiLabelDataModule(
        "corel5k", folder, batch_size=batch_size, size=size, eval_size=(128, 192), num_workers=workers, seed=seed,
        min_images_per_class=(40, 4), **GRID,
    )  # fmt: skip
    data.setup()
    author = AuthorsRun(data, size, epochs, batch_size, workers, limit) if ways != "ours" else None
    turns = Turns(data, author, target, until_reached, probe_from, result)
    if ways == "author":
        for epoch in range(epochs):
            turns.author_epoch(epoch)
            if until_reached and turns.first_above_target().get("author"):
                break
    else:
        L.seed_everything(seed)
        trainer = L.Trainer(
            max_epochs=epochs,
            precision=default_precision(),
            callbacks=[turns, SmallMaps()],
            limit_train_batches=limit,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(MultiLabelSSLModule(**NETWORK), data)
    turns.summary()


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
