"""Several devices equal one: loss, every gradient, weights after twenty steps; and the data they send."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from _gloo import Processes
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.distributed import rank, world_size
from mlssl.module import MultiLabelSSLModule
from mlssl.recipes import recipe

# Outside a Trainer a step cannot log, and Lightning warns.
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")

IMAGES, K, P, S = 4, 3, 16, 32
"""Images of the whole batch, blocks, projection width and side of a view."""

BACKBONES = {"batch norm, statistics frozen": "test_resnet", "layer norm": "test_vit"}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Norm of the difference of two gradients by the norm of one."""

SETTINGS: list[dict[str, Any]] = [
    {},
    {"stop_gradient": True, "chunk_size": 5},
    {"form": "mean_of_logs"},
    {"form": "mean_of_logs", "positives": "gated(0.9)", "stop_gradient": True},
    {"positives": "by_overlap(1.0)"},
    {"branches_together": True},
]


class Frozen(MultiLabelSSLModule):
    """Batch norms of random scales with fixed statistics: SyncBatchNorm, which shares them, does not support CPUs."""

    def __init__(self, backbone: str, **settings: Any) -> None:
        torch.manual_seed(0)
        super().__init__(backbone, projection_dim=P, predictor_dim=8, **settings)
        for layer in self.modules():
            if isinstance(layer, _BatchNorm):
                for values in (layer.weight, layer.running_var):  # a scale of 0 would hide the gradients behind it
                    if values is not None:
                        nn.init.uniform_(values.data, 0.5, 1.5)
        self.train()

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        for layer in self.modules():
            if isinstance(layer, _BatchNorm):
                layer.eval()
        return self


class Step(nn.Module):
    """The step for DistributedDataParallel: a network whose forward pass returns the loss."""

    def __init__(self, module: MultiLabelSSLModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> Tensor:
        loss: Tensor = self.module.training_step(batch, 0)["loss"]
        return loss


def own_share() -> Any:
    """This process's part of the batch; its ids are unordered and have gaps."""
    share = slice(rank() * IMAGES // world_size(), (rank() + 1) * IMAGES // world_size())
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (IMAGES, 2, K, 3, S, S), generator=generator)
    boxes = torch.rand(IMAGES, 2, K, 4, generator=generator) / 2
    ids = torch.tensor([7, 1_000_003, -2, 5])
    return {"views": pixels.byte()[share], "boxes": boxes[share], "image_ids": ids[share]}


def steps(backbone: str, dtype: torch.dtype) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Loss and gradients for each setting, with DDP for several processes."""
    results = []
    for settings in SETTINGS:
        module = Frozen(backbone, **settings).to(dtype).train()
        step = Step(module)
        call = step if world_size() == 1 else DistributedDataParallel(step, find_unused_parameters=False)
        loss = call(own_share())
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}))
    return results


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
def test_loss_and_every_gradient_are_those_of_one_device(
    backbone: str, dtype: torch.dtype, number: int, processes: Processes
) -> None:
    expected, results = steps(backbone, dtype), processes.run(steps, backbone, dtype, processes=number)
    names = [name for name, _ in Frozen(backbone).named_parameters()]
    for index, (loss, gradients) in enumerate(expected):
        mean = torch.stack([result[index][0] for result in results]).mean()
        torch.testing.assert_close(mean, loss, rtol=TOLERANCE[dtype], atol=0)
        assert list(gradients) == names
        for name, gradient in gradients.items():
            assert gradient.norm() > 0, name
            for result in results:
                difference = (result[index][1][name] - gradient).norm() / gradient.norm()
                # timm resizes the position embedding in float32, for any dtype of the network.
                most = max(TOLERANCE[dtype], 2e-8 if name.endswith("pos_embed") else 0)
                assert difference <= most, f"{name} differs by {difference:.1e} under {SETTINGS[index]}"


def settings_of(name: str) -> dict[str, Any]:
    """Settings of a recipe's model except the widths of the heads."""
    settings = recipe(name)["model"]
    return {key: value for key, value in settings.items() if key not in ("projection_dim", "predictor_dim")}


def weights_after_20_steps(backbone: str, name: str, folder: Path) -> dict[str, Tensor]:
    """A run of the Trainer on this process's share of the images; the starting weights too."""
    module = Frozen(backbone, **settings_of(name))
    start = {f"start.{name}": value.clone() for name, value in module.state_dict().items()}
    data = MultiLabelDataModule(
        train=synthetic_scenes("train", size=S, count=2 * IMAGES),
        batch_size=IMAGES // world_size(),
        size=S,
        num_workers=0,
    )
    os.environ["LOCAL_RANK"] = str(rank())  # Lightning must not start the processes itself
    try:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=world_size(),
            strategy="ddp" if world_size() > 1 else "auto",
            precision="64-true",
            max_steps=20,
            logger=False,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data)
    finally:
        del os.environ["LOCAL_RANK"]
    assert trainer.global_step == 20
    return module.state_dict() | start


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training")
@pytest.mark.parametrize(
    ("backbone", "name", "number"),
    [("test_resnet", "paper", 2), ("test_vit", "paper", 4), ("test_resnet", "mlssl", 2)],
)
def test_weights_after_20_steps_are_those_of_one_device(
    backbone: str, name: str, number: int, tmp_path: Path, processes: Processes
) -> None:
    expected = weights_after_20_steps(backbone, name, tmp_path)
    for weights in processes.run(weights_after_20_steps, backbone, name, tmp_path, processes=number):
        for key, value in expected.items():
            if value.is_floating_point():
                difference = (weights[key] - value).norm() / value.norm().clamp(min=1e-12)
                assert difference <= 1e-9, f"{key} differs by {difference:.1e}"
    moved = [
        key
        for key, _ in Frozen(backbone).named_parameters()
        if not torch.equal(expected[key], expected[f"start.{key}"])
    ]
    assert len(moved) == len(list(Frozen(backbone).parameters())), "some weights never moved"


def bytes_sent() -> tuple[int, int]:
    """Bytes that this process sends in the forward pass of a step: embeddings, and everything else."""
    sizes: list[Tensor] = []
    gather, reduce = dist.all_gather, dist.all_reduce
    dist.all_gather = lambda parts, rows, **of: (sizes.append(rows), gather(parts, rows, **of))[1]
    dist.all_reduce = lambda value, **of: (sizes.append(value), reduce(value, **of))[1]
    try:
        with torch.no_grad():
            Frozen("test_resnet").training_step(own_share(), 0)
    finally:
        dist.all_gather, dist.all_reduce = gather, reduce
    embeddings = sum(value.nbytes for value in sizes if value.shape[-1:] == (P,))
    return embeddings, sum(value.nbytes for value in sizes) - embeddings


def test_only_embeddings_ids_and_boxes_are_sent(processes: Processes) -> None:
    """docs/reliability.md: 2·A·K·P numbers per image, 64 KB in bfloat16 and 128 KB in float32 at the paper's sizes."""
    for embeddings, others in processes.run(bytes_sent):
        images = IMAGES // 2
        assert embeddings == images * (2 * 2 * K * P * 4)
        anchors = images * 2 * 2 * K
        assert others == anchors * 8 + anchors * 4 * 4 + 2 * 8  # their ids and boxes, and two counts
    assert 2 * 2 * 4 * 2048 * 2 == 64 * 1024
