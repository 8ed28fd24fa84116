"""Images a second of training on Corel-5K, ours against the author's way, end to end and fed from memory.

python examples/benchmarks/step.py FOLDER

FOLDER contains Corel-5K (or say --dataset coco). On a GPU if there is one, else on the processor. They run by turns,
some steps each and after some that do not count; printed are median and range over the rounds. Ours runs under the
Trainer as `mlssl fit` does, without callbacks that only look on. --profile shows where one step's time goes instead.
"""

import itertools
import time
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from authors_way import AuthorsNetwork, PilViews
from jsonargparse import auto_cli
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from mlssl import MultiLabelDataModule, MultiLabelSSLModule
from mlssl.callbacks import SmallMaps
from mlssl.choices import DatasetName
from mlssl.runs import default_precision

WARM = 2
"""Steps that do not count: the loader's workers start, memory is found, kernels are chosen."""


def main(
    folder: str,
    dataset: DatasetName = "corel5k",
    backbone: str = "resnet18",
    projection_dim: int = 512,
    predictor_dim: int = 128,
    size: int = 64,
    batch_size: int = 64,
    overlap: float = 0.3,
    workers: int = 1,
    steps: int = 6,
    rounds: int = 5,
    compile: bool = False,
    peak_tflops: float | None = None,
    profile: bool = False,
) -> None:
    """Print a line a way.

    Args:
        folder: Of the data set.
        dataset: Its format.
        backbone: Any name.
        projection_dim: P.
        predictor_dim: Width of the predictor's bottleneck.
        size: Side of a view.
        batch_size: Images a step.
        overlap: Of the blocks.
        workers: Loader processes of each way.
        steps: That count, a round.
        rounds: Of all ways.
        compile: Whether ours is compiled.
        peak_tflops: Of the device in bfloat16, to print the share that is reached.
        profile: Print the profile of ours instead.
    """
    L.seed_everything(0, verbose=False)
    network = {"backbone": backbone, "projection_dim": projection_dim, "predictor_dim": predictor_dim}
    data = MultiLabelDataModule(
        dataset, folder, batch_size=batch_size, size=size, overlap=overlap, num_workers=workers, val_split=""
    )
    module = MultiLabelSSLModule(**network, views_per_step=batch_size * 4, compile=compile)  # type: ignore[arg-type]
    batch = next(iter(MultiLabelDataModule.train_dataloader(data)))
    if profile:
        run_ours(module, repeated(batch, WARM), 0)
        with torch.profiler.profile() as profiler:
            run_ours(module, repeated(batch, 1), 0)
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    author = AuthorsNetwork(**network).to(device)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(author.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    pil_views = PilViews(data.train_dataloader().dataset.records, size, overlap=overlap)  # type: ignore[attr-defined]
    pil_loader = DataLoader(
        pil_views, batch_size, shuffle=True, drop_last=True, num_workers=workers, pin_memory=device.type == "cuda"
    )
    pil_batch = next(iter(pil_loader))

    def author_on(batches: Iterable[Any]) -> float:
        return run_author(author, optimizer, batches, device)

    count = WARM + steps
    ways = {
        "ours, from files": lambda: run_ours(module, data.train_dataloader(), steps),
        "ours, from memory": lambda: run_ours(module, repeated(batch, count), steps),
        "author's, from files": lambda: author_on(itertools.islice(pil_loader, count)),
        "author's, from memory": lambda: author_on(itertools.repeat(pil_batch, count)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(way() / steps)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} cores"
    print(f"{name}, torch {torch.__version__}; {backbone}, {batch_size} images, {size} × {size}, {workers} worker(s)")
    slowest = torch.tensor(seconds["author's, from files"]).median()
    for name, times in seconds.items():
        low, median, high = (batch_size / torch.tensor(times).quantile(torch.tensor([1.0, 0.5, 0.0]))).tolist()
        ratio = float(slowest) * median / batch_size
        print(f"{name:22s} {median:7.1f} images/s ({low:.1f}–{high:.1f}), {ratio:.2f} times the author's from files")
    with FlopCounterMode(display=False) as counter:
        author.cpu()(pil_batch[0][:2], pil_batch[1][:2]).backward()
    rate = counter.get_total_flops() / 2 * batch_size / torch.tensor(seconds["ours, from memory"]).median() / 1e12
    share = f", {rate / peak_tflops:.0%} of {peak_tflops:g}" if peak_tflops else ""
    print(f"ours, from memory: {rate:.3g} TFLOP/s{share}")


class Clock(L.Callback):
    """Seconds from the end of the steps that warm up to the end of the last one."""

    def __init__(self) -> None:
        self.began = self.seconds = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == WARM - 1:
            self.began = now()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = now() - self.began


def run_ours(module: MultiLabelSSLModule, loader: DataLoader[Any], steps: int) -> float:
    """Seconds of so many steps."""
    clock = Clock()
    trainer = L.Trainer(
        max_epochs=1,
        limit_train_batches=WARM + steps,
        precision=default_precision(),
        callbacks=[clock, SmallMaps()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return clock.seconds


def run_author(
    network: AuthorsNetwork, optimizer: torch.optim.Optimizer, batches: Iterable[Any], device: torch.device
) -> float:
    """Seconds of all batches but the first few."""
    network.to(device).train()
    began = 0.0
    for number, (views, ids) in enumerate(batches):
        loss = network(views.to(device, non_blocking=True), ids.to(device, non_blocking=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number == WARM - 1:
            began = now()
    return now() - began


def repeated(batch: dict[str, Tensor], count: int) -> DataLoader[Any]:
    """A loader that has one batch in memory."""
    return DataLoader([batch] * count, batch_size=None)  # type: ignore[arg-type]


def now() -> float:
    """Seconds, after the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
