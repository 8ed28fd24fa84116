"""Comparing within groups of devices: exact within a group, the mean over groups."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from _gloo import Processes
from test_exactness import Frozen, K, S, Step
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mlssl.callbacks import CompareWithinGroups
from mlssl.distributed import rank

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")


def batch(images: slice) -> Any:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (4, 2, K, 3, S, S), generator=generator).byte()
    boxes = torch.rand(4, 2, K, 4, generator=generator) / 2
    return {"views": pixels[images], "boxes": boxes[images], "image_ids": torch.tensor([7, 1_000_003, -2, 5])[images]}


def module() -> Frozen:
    return Frozen("test_resnet", positives="by_overlap(1.0)").double().train()


def step_of_one_of_four() -> tuple[Tensor, dict[str, Tensor]]:
    model = module()
    CompareWithinGroups(devices=2).on_fit_start(None, model)  # type: ignore[arg-type]
    step = DistributedDataParallel(Step(model))  # averages gradients as long as it exists
    loss = step(batch(slice(rank(), rank() + 1)))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_groups_are_exact_and_their_gradients_are_averaged(processes: Processes) -> None:
    model = module()
    losses = [Step(model)(batch(images)) for images in (slice(2), slice(2, 4))]  # one device with a group's images
    torch.stack(losses).mean().backward()
    results = processes.run(step_of_one_of_four, processes=4)
    for group, pair in enumerate((results[:2], results[2:])):
        torch.testing.assert_close(torch.stack([loss for loss, _ in pair]).mean(), losses[group].detach())
    for name, parameter in model.named_parameters():
        for _, gradients in results:
            assert (gradients[name] - parameter.grad).norm() <= 1e-9 * parameter.grad.norm(), name
    whole = Step(module())(batch(slice(4)))
    assert abs(whole - torch.stack(losses).mean()) > 1e-3  # what all devices together would compute


def refused() -> None:
    with pytest.raises(ValueError, match="2 devices cannot be split into groups of 3: pass a divisor"):
        CompareWithinGroups(devices=3).on_fit_start(None, module())  # type: ignore[arg-type]


def test_groups_that_do_not_divide_the_devices_are_refused(processes: Processes) -> None:
    processes.run(refused)


def test_wrong_settings_and_models_are_refused() -> None:
    with pytest.raises(ValueError, match="devices=0 was given: pass the number of devices per group"):
        CompareWithinGroups(devices=0)
    with pytest.raises(TypeError, match="LightningModule has no `image_aware_loss`: use MultiLabelSSLModule"):
        CompareWithinGroups(devices=1).on_fit_start(None, L.LightningModule())  # type: ignore[arg-type]


def test_the_group_is_released() -> None:
    model = SimpleNamespace(image_aware_loss=SimpleNamespace(group="a group"))
    callback = CompareWithinGroups(devices=1)
    callback.on_fit_start(None, model)  # type: ignore[arg-type]
    assert model.image_aware_loss.group is None
    model.image_aware_loss.group = "a group"
    callback.on_fit_end(None, model)  # type: ignore[arg-type]
    assert model.image_aware_loss.group is None
    model.image_aware_loss.group = "a group"
    callback.on_exception(None, model, RuntimeError())  # type: ignore[arg-type]
    assert model.image_aware_loss.group is None
