"""Detect GPU errors without a GPU: fake tensors have a device and a shape, and no values.

A tensor on another device raises, and so does a shape that depends on values. Operations that wait for the device are
counted: `.item()`, a branch on a tensor, a copy to the host. Gradients need a context of CUDA, so that steps
with a backward pass run on fake tensors of the meta device, and everything else on fake tensors of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _toy import small
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mlssl.callbacks import CollapseMonitor, FiniteLoss, OnlineKNN, OnlineLinearProbe
from mlssl.evaluation.features import image_features
from mlssl.evaluation.neighbors import _nearest_in_piece
from mlssl.optim import build_optimizer
from mlssl.weights.sources import open_network

B, A, K, S, CLASSES = 4, 2, 4, 32, 5

STEPS: dict[str, dict[str, Any]] = {
    "paper": {},
    "together": {"branches_together": True, "stop_gradient": True},
    "mean_of_logs": {"form": "mean_of_logs", "positives": "gated(0.3)"},
    "by_overlap": {"positives": "by_overlap(1.0)"},
    "chunks": {"chunk_size": 3},
    "parts": {"views_at_a_time": 8},
}


class ToHost(TorchDispatchMode):
    """Count reads from the device that wait for it, and copies that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = self.late = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # .item() and bool()
            self.waiting += args[0].device.type != "cpu"
            return 1
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            if source.device.type != "cpu" and result.device.type == "cpu":
                late = kwargs.get("non_blocking", False) if kwargs else len(args) > 2 and args[2]
                self.late, self.waiting = self.late + bool(late), self.waiting + (not late)
        return result


def to_fake(module: nn.Module, device: str) -> Any:
    """The module with fake weights on the device; `Module.to` cannot swap real ones for these."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, real in tensors.items():
                if real is not None:
                    fake = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=device)
                    is_weight = isinstance(real, nn.Parameter)
                    tensors[name] = nn.Parameter(fake, real.requires_grad) if is_weight else fake
    return module


@contextmanager
def on_fake(device: str, **settings: Any) -> Iterator[tuple[Any, dict[str, Tensor], ToHost]]:
    """A module and a batch of views on the device, and the count of copies to the host."""
    module: Any = small(**settings)
    module.log = lambda *_, **__: None
    with FakeTensorMode(), ToHost() as to_host:
        to_fake(module, device)
        yield module, fake_views(device), to_host


def fake_views(device: str) -> dict[str, Tensor]:
    views = torch.empty(B, A, K, 3, S, S, dtype=torch.uint8, device=device)
    ids, boxes = torch.empty(B, dtype=torch.long, device=device), torch.empty(B, A, K, 4, device=device)
    return {"views": views, "image_ids": ids, "boxes": boxes, "labels": fake_labels(B, device)}


def fake_labels(number: int, device: str) -> Tensor:
    return torch.empty(number, CLASSES, dtype=torch.int8, device=device)


def fake_trainer() -> Any:
    """The parts of a Trainer that callbacks use in a logged step."""
    precision = SimpleNamespace(forward_context=lambda: torch.autocast("cuda", enabled=False), scaler=None)
    strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, **_: decision, model=None)
    return SimpleNamespace(
        log_every_n_steps=1, global_step=0, current_epoch=0, accumulate_grad_batches=1, checkpoint_callbacks=[],
        precision_plugin=precision, strategy=strategy, callbacks=[], datamodule=None, sanity_checking=False,
    )  # fmt: skip


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make autocast assume a GPU."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)


# ---------------------------------------------------------------------- steps


@pytest.mark.slow
@pytest.mark.parametrize("settings", STEPS.values(), ids=STEPS)
def test_a_step_with_its_gradients_does_not_synchronise(settings: dict[str, Any]) -> None:
    with on_fake("meta", **settings) as (module, batch, to_host):
        outputs = module.training_step(batch, 1)
        outputs["loss"].backward()
        assert {p.grad.device.type for p in module.parameters()} == {"meta"}
        assert {name: value.device.type for name, value in outputs.items()} == dict.fromkeys(outputs, "meta")
    assert (to_host.waiting, to_host.late) == (0, 0)


@pytest.mark.parametrize("settings", STEPS.values(), ids=STEPS)
def test_a_step_stays_on_the_gpu(settings: dict[str, Any]) -> None:
    with on_fake("cuda", **settings) as (module, batch, to_host), torch.no_grad():
        outputs = module.training_step(batch, 1)
        assert {name: value.device.type for name, value in outputs.items()} == dict.fromkeys(outputs, "cuda")
    assert (to_host.waiting, to_host.late) == (0, 0)


@pytest.mark.usefixtures("bfloat16")
def test_autocast_embeds_in_bfloat16_and_compares_in_float32() -> None:
    with on_fake("cuda") as (module, batch, to_host), torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        outputs = module.training_step(batch, 1)
        assert outputs["projections"].dtype == torch.bfloat16
        assert outputs["loss"].dtype == torch.float32
    assert (to_host.waiting, to_host.late) == (0, 0)


@pytest.mark.parametrize(
    "leave",
    [
        lambda module, batch: batch.update(image_ids=torch.arange(B)),
        lambda module, batch: setattr(module, "pixel_mean", torch.empty(1, 3, 1, 1)),
    ],
    ids=["ids", "statistics"],
)
def test_tensors_left_on_the_host_are_detected(leave: Callable[..., Any]) -> None:
    with on_fake("cuda") as (module, batch, _), torch.no_grad():
        leave(module, batch)
        with pytest.raises(RuntimeError, match=r"two different devices|same device"):
            module.training_step(batch, 1)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars", "muon"])
def test_an_optimizer_steps_without_reading_values(optimizer: str) -> None:
    with on_fake("cuda") as (module, _, to_host), torch.no_grad():
        steps = build_optimizer(optimizer, [{"params": list(module.parameters())}], 0.1)
        for parameter in module.parameters():
            parameter.grad = torch.empty_like(parameter)
        steps.step()
    assert (to_host.waiting, to_host.late) == (0, 0)


# ---------------------------------------------------------------------- callbacks


def test_the_late_read_of_the_loss_is_the_only_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr("torch.cuda.Event", lambda: event)
    with on_fake("cuda") as (module, batch, to_host):
        callback, trainer = FiniteLoss(), fake_trainer()
        callback.on_train_batch_start(trainer, module, batch, 1)
        callback.on_before_backward(trainer, module, torch.empty((), device="cuda"))
    assert (to_host.waiting, to_host.late) == (0, 1)


def test_the_probe_learns_on_the_device() -> None:
    with on_fake("meta") as (module, batch, to_host):
        outputs = module.training_step(batch, 1)
        probe = OnlineLinearProbe()
        for _ in range(2):
            probe.on_train_batch_end(fake_trainer(), module, outputs, batch, 1)
        assert {tensor.device.type for tensor in probe.state_dict().values() if isinstance(tensor, Tensor)} == {"meta"}
    assert (to_host.waiting, to_host.late) == (0, 0)


def test_the_probe_scores_on_the_gpu() -> None:
    with on_fake("cuda") as (module, _, to_host), torch.no_grad():
        batch = {"image": torch.empty(B, 3, S, S, dtype=torch.uint8, device="cuda")}
        batch |= {"image_ids": torch.empty(B, dtype=torch.long, device="cuda"), "labels": fake_labels(B, "cuda")}
        outputs = module.validation_step(batch, 1)
        probe = OnlineLinearProbe()
        width = outputs["features"].shape[1]
        state = {"weight": torch.empty(CLASSES, width), "bias": torch.empty(CLASSES)}
        state |= {"mean": torch.empty(width), "variance": torch.empty(width), "num_steps": 3}
        optimizer = torch.optim.SGD([nn.Parameter(state["weight"]), nn.Parameter(state["bias"])], 0.1, 0.9)
        probe.load_state_dict(state | {"optimizer": optimizer.state_dict()})  # saved on the host
        scores = probe.probabilities(fake_trainer(), outputs["features"], batch["labels"], batch["image_ids"])
        assert scores is not None
        assert scores.device.type == "cuda"
    assert (to_host.waiting, to_host.late) == (0, 0)


def test_the_collapse_monitor_reads_once_per_logged_step() -> None:
    with on_fake("cuda") as (module, batch, to_host), torch.no_grad():
        outputs = module.training_step(batch, 1)
        CollapseMonitor().on_train_batch_end(fake_trainer(), module, outputs, batch, 1)
    assert (to_host.waiting, to_host.late) == (1, 0)


def test_whole_images_of_the_host_are_embedded_on_the_gpu() -> None:
    with on_fake("cuda") as (module, _, to_host), torch.no_grad():
        images = torch.empty(B, 3, S, S, dtype=torch.uint8)
        assert image_features(module.backbone, module.normalize, images).device.type == "cuda"
        assert OnlineKNN().features_of_images(module, images).device.type == "cuda"
    assert (to_host.waiting, to_host.late) == (0, 0)


def test_neighbours_are_found_on_the_device_of_the_queries() -> None:
    with FakeTensorMode():
        queries, piece = torch.empty(3, 8, device="cuda"), torch.empty(40, 8, device="cuda")
        ids = torch.empty(3, dtype=torch.long, device="cuda")
        for tensor in _nearest_in_piece(queries, piece, 5, ids, torch.empty(40, dtype=torch.long)):
            assert tensor.device.type == "cuda"


# ---------------------------------------------------------------------- hand-over and export


def test_a_batch_moves_to_the_gpu_without_waiting() -> None:
    with on_fake("cuda") as (module, _, _), CopiesToDevice() as copies:
        moved = module.transfer_batch_to_device(fake_views("cpu"), torch.device("cuda"), 0)
        assert {value.device.type for value in moved.values()} == {"cuda"}
    assert copies.non_blocking == [True] * len(moved)


class CopiesToDevice(TorchDispatchMode):
    """Whether each copy from the host to the device is non-blocking."""

    def __init__(self) -> None:
        super().__init__()
        self.non_blocking: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
            self.non_blocking.append(bool(kwargs.get("non_blocking")))
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # by deepcopy
def test_an_export_uses_a_copy_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, raising=False)
    with on_fake("cuda") as (module, _, _):
        monkeypatch.setattr(nn.Module, "to", lambda part, *to, **_: to_fake(part, to[0]) if to else part)
        copy = open_network(module.backbone).plain_copy().backbone
        assert {value.device.type for value in copy.state_dict().values()} == {"cpu"}
        assert {value.device.type for value in module.state_dict().values()} == {"cuda"}
