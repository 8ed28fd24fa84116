"""What `gpu.py` measures: a function each, from the folder and sizes of a run to numbers by name.

Every function runs in a process of its own. On a machine without a GPU, as `--tiny` uses, they compute on the
processor; what needs a GPU raises `NeedsGPUError`.
"""

import gc
import itertools
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from authors_way import AuthorsNetwork, PilViews, plain_image_aware_loss
from lightning.pytorch.callbacks import ModelCheckpoint
from loader import images_per_second
from loss import drawn, peak_on_gpu
from step import WARM, now, repeated, run_author, run_ours
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from mlssl import MultiLabelDataModule, MultiLabelSSLModule, image_aware_contrastive_loss
from mlssl.callbacks import RandomState
from mlssl.data.datasets import ViewDataset
from mlssl.data.readers.folder import read_folder
from mlssl.evaluation.features import Features
from mlssl.evaluation.neighbors import knn_scores
from mlssl.evaluation.probe import linear_probe
from mlssl.optim import build_optimizer
from mlssl.runs import default_precision
from mlssl.views.blocks import BlockViews

PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165, "V100": 125}
"""Dense bfloat16 (V100: float16) by part of the device's name, from the data sheets."""


class NeedsGPUError(RuntimeError):
    """There is none."""


@dataclass(frozen=True)
class Setup:
    """Folder of photographs, and whether all sizes are tiny, so that the functions run in seconds on a processor."""

    folder: Path
    tiny: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def size(self) -> int:
        return 32 if self.tiny else 224

    @property
    def batch_size(self) -> int:
        return 2 if self.tiny else 64

    @property
    def steps(self) -> int:
        return 1 if self.tiny else 10

    @property
    def workers(self) -> int:
        return 0 if self.tiny else min(16, os.cpu_count() or 1)

    def network(self, backbone: str = "resnet50") -> dict[str, Any]:
        if self.tiny:
            return {
                "backbone": "test_vit" if "vit" in backbone else "test_resnet",
                "projection_dim": 16,
                "predictor_dim": 8,
            }
        return {"backbone": backbone, "projection_dim": 2048, "predictor_dim": 512}

    def module(self, backbone: str = "resnet50", **settings: Any) -> MultiLabelSSLModule:
        return MultiLabelSSLModule(**self.network(backbone), views_per_step=4 * self.batch_size, **settings)

    def data(self) -> MultiLabelDataModule:
        return MultiLabelDataModule(
            "folder", self.folder, batch_size=self.batch_size, size=self.size, num_workers=self.workers, val_split=""
        )

    def batch(self, batch_size: int | None = None) -> dict[str, Tensor]:
        """Views of noise on the device, which cost the network what views of photographs cost."""
        number = batch_size or self.batch_size
        views = torch.randint(256, (number, 2, 4, 3, self.size, self.size), dtype=torch.uint8, device=self.device)
        return {"views": views, "image_ids": torch.arange(number, device=self.device)}


# ---------------------------------------------------------------------- a step


def step(setup: Setup) -> dict[str, Any]:
    """Images per second of ResNet-50, ours and the author's way, from files and from memory."""
    data, count, device = setup.data(), WARM + setup.steps, setup.device
    batch = next(iter(data.train_dataloader()))
    module, author = setup.module(), AuthorsNetwork(**setup.network()).to(device)
    optimizer = torch.optim.SGD(author.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    pil_views = PilViews(data.train_dataloader().dataset.records, setup.size)
    pil_loader = DataLoader(
        pil_views, setup.batch_size, shuffle=True, drop_last=True, num_workers=setup.workers,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    pil_batch = next(iter(pil_loader))
    cycle = itertools.chain.from_iterable(itertools.repeat(pil_loader))
    seconds = {
        "ours_files": run_ours(module, _endless(data, count), setup.steps),
        "ours_memory": run_ours(module, repeated(batch, count), setup.steps),
        "author_files": run_author(author, optimizer, itertools.islice(cycle, count), device),
        "author_memory": run_author(author, optimizer, itertools.repeat(pil_batch, count), device),
    }
    found: dict[str, Any] = {name: setup.batch_size * setup.steps / value for name, value in seconds.items()}
    return found | _flops(setup, "resnet50", found["ours_memory"])


def compiled(setup: Setup) -> dict[str, Any]:
    """The same from memory with the backbone compiled."""
    if setup.device.type != "cuda":
        raise NeedsGPUError("compiling for a processor takes minutes")
    batch = {name: value.cpu() for name, value in setup.batch().items()}
    seconds = run_ours(setup.module(compile=True), repeated(batch, WARM + setup.steps), setup.steps)
    return {"ours_memory": setup.batch_size * setup.steps / seconds}


def transformer(setup: Setup) -> dict[str, Any]:
    """Images per second of ViT-S/16 from memory."""
    batch = {name: value.cpu() for name, value in setup.batch().items()}
    module = setup.module("vit_small_patch16_224")
    seconds = run_ours(module, repeated(batch, WARM + setup.steps), setup.steps)
    rate = setup.batch_size * setup.steps / seconds
    return {"ours_memory": rate} | _flops(setup, "vit_small_patch16_224", rate)


def optimizers(setup: Setup) -> dict[str, Any]:
    """Share of a step of ResNet-50 that each optimizer takes."""
    module, batch = setup.module().to(setup.device).train(), setup.batch()
    pass_of = _seconds(lambda: _backward(module, batch), setup.steps)
    found: dict[str, Any] = {"pass_s": pass_of}
    for name in ("sgd", "adamw", "muon"):
        optimizer = build_optimizer(name, [{"params": list(module.parameters())}], 1e-3)
        of_step = _seconds(lambda optimizer=optimizer: optimizer.step(), setup.steps)
        found[name] = of_step / (of_step + pass_of)
    return found


def memory(setup: Setup) -> dict[str, Any]:
    """Peak memory in GB of a step of ResNet-50 by images per step."""
    if setup.device.type != "cuda":
        raise NeedsGPUError("a processor does not tell its peak")
    module = setup.module().to(setup.device).train()
    found = {}
    for number in (16, 32, 64, 128):
        torch.cuda.reset_peak_memory_stats()
        _backward(module, setup.batch(number))
        found[str(number)] = torch.cuda.max_memory_allocated() / 1e9
    return found


# ---------------------------------------------------------------------- the loss


def loss(setup: Setup) -> dict[str, Any]:
    """Seconds, and on a GPU MB above the features, of the image-aware term, ours and the plain form."""
    ways = {"ours": image_aware_contrastive_loss, "plain": plain_image_aware_loss}
    found: dict[str, Any] = {}
    for anchors in (64,) if setup.tiny else (8192, 32768):
        for name, way in ways.items():
            features, ids = drawn(anchors, 16 if setup.tiny else 2048, 8, setup.device)
            try:
                once = _seconds(lambda way=way, f=features, i=ids: torch.autograd.grad(way(f, i), f), setup.steps)
                of_memory = peak_on_gpu(way, features, ids) if setup.device.type == "cuda" else None
            except torch.OutOfMemoryError:
                once, of_memory = None, None
            found[f"{name}_{anchors}_s"], found[f"{name}_{anchors}_MB"] = once, of_memory
            del features, ids
            gc.collect()
    return found


# ---------------------------------------------------------------------- several processes


def exact(setup: Setup) -> dict[str, Any]:
    """Largest relative difference of a gradient between two processes on one GPU and one process, in float64.

    With SyncBatchNorm; on a processor, which it refuses, batch norms keep their statistics.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_half, (folder, setup), nprocs=2)
        halves = torch.load(Path(folder) / "gradients.pt", weights_only=True)
    module = _exact_module(setup)
    module.training_step(_exact_batch(setup), 1)["loss"].backward()
    whole = {name: p.grad.cpu() for name, p in module.named_parameters()}
    return {
        "gradient": max(
            float((halves[name] - whole[name]).norm() / whole[name].norm().clamp(min=1e-12)) for name in whole
        )
    }


def _exact_module(setup: Setup) -> MultiLabelSSLModule:
    torch.manual_seed(0)
    module = MultiLabelSSLModule("test_resnet" if setup.tiny else "resnet18", projection_dim=128, predictor_dim=32)
    return module.double().to(setup.device).train(setup.device.type == "cuda")


def _exact_batch(setup: Setup) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    views = torch.randint(256, (4, 2, 4, 3, 64, 64), dtype=torch.uint8, generator=generator)
    return {"views": views.to(setup.device), "image_ids": torch.arange(4, device=setup.device)}


def _half(rank: int, folder: str, setup: Setup) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    module = nn.SyncBatchNorm.convert_sync_batchnorm(_exact_module(setup))
    half = {name: value[2 * rank : 2 * rank + 2] for name, value in _exact_batch(setup).items()}
    module.training_step(half, 1)["loss"].backward()
    gradients = {}
    for name, parameter in module.named_parameters():
        dist.all_reduce(parameter.grad)
        gradients[name] = (parameter.grad / 2).cpu()
    if rank == 0:
        torch.save(gradients, Path(folder) / "gradients.pt")
    dist.barrier()
    dist.destroy_process_group()


def fsdp(setup: Setup) -> dict[str, Any]:
    """Seconds of a short run of ViT-S/16, with its start, that FSDP shards by its blocks on one device."""
    if setup.device.type != "cuda":
        raise NeedsGPUError("FSDP refuses the processor")
    from lightning.pytorch.strategies import FSDPStrategy
    from timm.models.vision_transformer import Block

    module = setup.module("vit_small_patch16_224", optimizer="adamw", channels_last=False)
    batch = {name: value.cpu() for name, value in setup.batch().items()}
    trainer = _trainer(setup.steps, strategy=FSDPStrategy(auto_wrap_policy={Block}), precision="bf16-true")
    began = now()
    trainer.fit(module, repeated(batch, setup.steps))
    return {"seconds": now() - began, "steps": setup.steps, "loss": float(trainer.callback_metrics["train/loss"])}


# ---------------------------------------------------------------------- loader, evaluation, resume


def loader(setup: Setup) -> dict[str, Any]:
    """Images per second of the loader by its number of processes."""
    records = read_folder(setup.folder)
    records = records.subset(range(min(4 if setup.tiny else 256, len(records))))
    views = ViewDataset(records, BlockViews(setup.size))
    numbers = (1,) if setup.tiny else (1, 4, 8, 16)
    return {str(number): images_per_second(views, setup.batch_size // 2, number) for number in numbers}


def evaluation(setup: Setup) -> dict[str, Any]:
    """Seconds of the linear probe and of kNN on random features, on each device."""
    n, width, labels = (40, 8, 3) if setup.tiny else (10_000, 2048, 80)
    torch.manual_seed(0)
    features = torch.randn(n, width)
    targets = (features @ torch.randn(width, labels) + torch.randn(n, labels) > 0).to(torch.int8)
    half = n // 2
    train, test = (
        Features(features[rows], targets[rows], torch.arange(n)[rows]) for rows in (slice(half), slice(half, n))
    )
    found: dict[str, Any] = {}
    for device in dict.fromkeys((setup.device.type, "cpu")):
        bank, queries = train.features, test.features.to(device)
        found[f"probe_{device}_s"] = _seconds(
            lambda d=device: linear_probe(train, test, device=d, num_resamples=0), 1, 0
        )
        found[f"knn_{device}_s"] = _seconds(
            lambda q=queries, b=bank: knn_scores(q, b, train.labels, min(20, half - 1)), 1
        )
    return found


def resume(setup: Setup) -> dict[str, Any]:
    """Whether a resumed run ends with the weights of one that was never stopped, under deterministic algorithms."""
    steps, weights = 4, []
    with tempfile.TemporaryDirectory() as folder:
        saver = ModelCheckpoint(folder, filename="half", every_n_train_steps=steps - 1)  # saves once
        for callbacks in ([RandomState(), saver], [RandomState()]):
            L.seed_everything(0, verbose=False)
            trainer = _trainer(
                steps, deterministic=True, precision=default_precision(), callbacks=callbacks,
                enable_checkpointing=saver in callbacks,
            )  # fmt: skip
            module = setup.module("resnet18")
            path = saver.best_model_path or None
            trainer.fit(module, setup.data(), ckpt_path=path, weights_only=None if path is None else True)
            weights.append({name: value.cpu() for name, value in module.state_dict().items()})
        saved = torch.load(saver.best_model_path, weights_only=True)["global_step"]
    return {
        "identical": all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]),
        "from_step": saved,
    }


# ---------------------------------------------------------------------- helpers


def _trainer(steps: int, **settings: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(max_steps=steps, devices=1, **{**quiet, **settings})


def _endless(data: MultiLabelDataModule, count: int) -> DataLoader[Any]:
    """The train loader over its images again and again, where a folder has fewer than the steps need."""
    loader = data.train_dataloader()
    dataset = torch.utils.data.ConcatDataset([loader.dataset] * -(-count // max(1, len(loader))))
    return DataLoader(
        dataset,
        loader.batch_size,
        drop_last=True,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
    )


def _backward(module: MultiLabelSSLModule, batch: dict[str, Tensor]) -> None:
    with torch.autocast(module.device.type, torch.bfloat16, enabled=default_precision() == "bf16-mixed"):
        loss = module.training_step(batch, 1)["loss"]
    loss.backward()


def _seconds(call: Callable[[], Any], repeats: int, warm: int = 1) -> float:
    for _ in range(warm):
        call()
    began = now()
    for _ in range(repeats):
        call()
    return (now() - began) / repeats


def _flops(setup: Setup, backbone: str, images_per_s: float) -> dict[str, Any]:
    """TFLOP/s of the network and the losses, and their share of the device's peak where that is known."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = AuthorsNetwork(**setup.network(backbone))
        network(torch.empty(2, 2, 4, 3, setup.size, setup.size), torch.arange(2)).backward()
    rate = counter.get_total_flops() / 2 * images_per_s / 1e12
    name = torch.cuda.get_device_name() if setup.device.type == "cuda" else ""
    peak = next((value for part, value in PEAK_TFLOPS.items() if part in name), None)
    return {"tflops": rate, "share_of_peak": None if peak is None else rate / peak}
