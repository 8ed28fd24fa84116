"""Check before the run that a training step fits into memory; if not, name the batch size that does."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from mlssl.callbacks.networks import workers_of
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.free_memory import free_memory_of_processor
from mlssl.out_of_memory import free_memory_of, is_out_of_memory
from mlssl.private import TensorMode

_SIZES = {"cpu": (2, 3), "cuda": (4, 8)}
"""Images of the two measured steps, by device; a step needs at least two images.

On a GPU only the peak is known, and it may occur at another moment in a step of few images than in one of many.
"""

_SCRATCH = 1.1
"""Ratio of the growth of the process's memory to that of its tensors: kernels use workspace."""

_BATCHES_PER_WORKER = 2
"""Batches that each of torch's loader workers keeps ready."""


class StepMemory(L.Callback):
    """Measure the memory of a training step before the run begins, and refuse a run whose steps do not fit.

    Forward and backward passes of two small random batches of the run's shape are measured, and the memory of a whole
    batch is extrapolated linearly in the number of images. It is compared with the free memory: on a GPU that of the
    device, on a CPU under Linux MemAvailable and the limits of the process's cgroups (of a container or a job), divided
    by the processes of the run. Weights, running statistics and random state do not change. `mlssl fit` adds it.

    Nothing is measured on other devices and systems, with a datamodule other than `MultiLabelDataModule` (its batches
    are not known), with manual optimization, and under strategies other than a single device and DDP.

    If a step still runs out of memory, smaller batches are tried, and `remedy` names the one that fits.

    Args:
        refuse: False warns instead.

    Raises:
        ValueError: Before the first step, with the memory needed, the free memory, and the batch size that fits.
    """

    def __init__(self, refuse: bool = True) -> None:
        self.refuse = refuse
        self.remedy: str | None = None
        """Advice after a step that ran out of memory; None if none did."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure, compare, refuse."""
        if not _is_measurable(trainer, pl_module):
            return
        device, images = pl_module.device, trainer.datamodule.hparams["batch_size"]  # type: ignore[attr-defined]
        free = _free_memory(device, processes=trainer.num_devices)
        needed = Memory([(0.0, 0.0)]) if free is None else _measure(trainer, pl_module)
        free = float("inf") if free is None else free
        if not trainer.strategy.reduce_boolean_decision(needed.of(images) > free, all=False):
            return
        most = needed.of(images)
        needs = f"needs about {_readable(most)}" if most < float("inf") else "needs more"
        message = (
            f"A step of {images} images {needs} of memory, but {_readable(free)} are free: "
            f"{_advice(needed.images_in(free), pl_module)}."
        )
        if self.refuse:
            raise ValueError(message)
        rank_zero_warn(message)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """After an out-of-memory error in training, halve the batch size until a step fits."""
        data = getattr(trainer, "datamodule", None)
        if not is_out_of_memory(exception) or not isinstance(data, MultiLabelDataModule):
            return
        images = data.hparams["batch_size"]
        self.remedy = f"Out of memory in a step of {images} images: pass a smaller --data.batch_size than {images}."
        if trainer.world_size > 1 or not _is_measurable(
            trainer, pl_module
        ):  # several processes would have to try together
            return
        free_memory_of(exception)
        pl_module.zero_grad(set_to_none=True)
        try:
            while images > 1:
                images //= 2
                if images < 2 or _fits(trainer, pl_module, images):
                    break
        except Exception:  # must not hide the original error
            return
        self.remedy = f"Out of memory in a step of {data.hparams['batch_size']} images: {_advice(images, pl_module)}."


class Memory:
    """Peak memory of a step in bytes, by its number of images.

    At each moment of the step it is ``fixed + per_image · n``; the moment of the peak depends on n.

    Args:
        moments: (fixed, per_image) of each moment.
    """

    def __init__(self, moments: Iterable[tuple[float, float]]) -> None:
        self.moments = set(moments)

    def of(self, images: int) -> float:
        """Bytes of a step of this many images.

        >>> Memory([(100, 2), (10, 5)]).of(10), Memory([(100, 2), (10, 5)]).of(100)
        (120, 510)
        """
        return max(fixed + per_image * images for fixed, per_image in self.moments)

    def images_in(self, free: float) -> int:
        """Largest number of images whose step fits into the given bytes.

        >>> Memory([(100, 2), (10, 5)]).images_in(130), Memory([(100, 2)]).images_in(50)
        (15, 0)
        """
        most = (int((free - fixed) // max(1.0, per_image)) if fixed < free else 0 for fixed, per_image in self.moments)
        return min(most)


def _is_measurable(trainer: L.Trainer, module: L.LightningModule) -> bool:
    data: Any = getattr(trainer, "datamodule", None)
    return (
        type(data) is MultiLabelDataModule
        and data.hparams["batch_size"] > 1
        and module.automatic_optimization
        and isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
        and module.device.type in _SIZES
    )


def _free_memory(device: torch.device, processes: int) -> float | None:
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    free = free_memory_of_processor()
    return None if free is None else free / processes


def _measure(trainer: L.Trainer, module: Any) -> Memory:
    """Memory of a step in addition to that in use; 0 if the step fails for a reason that the run will report."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    on_cpu = module.device.type == "cpu"
    few, more = _SIZES[module.device.type]
    # One block per image suffices if every moment is compared. Local views belong to the image, not to a block.
    blocks = data.views.num_blocks if on_cpu and data.views.local_views is None else 1
    try:
        with _restored_afterwards(module):
            for parameter in module.parameters():  # the previous step's gradients exist in the forward pass
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            step_bytes = [
                _step_bytes(trainer, module, _batch(data, images, one_block=blocks > 1)) for images in (few, more)
            ]
            gradients = sum(one.grad.nbytes for one in module.parameters() if one.grad is not None)
    except Exception as error:
        if is_out_of_memory(error):
            free_memory_of(error)
            return Memory([(float("inf"), 1.0)])
        return Memory([(0.0, 0.0)])
    if len(step_bytes[0]) != len(step_bytes[1]):  # the network took another path
        step_bytes = [[max(one)] for one in step_bytes]
    fixed = gradients * (1 + _states_per_weight(trainer))
    waiting = _waiting_bytes(data, workers_of(trainer), on_device=not on_cpu)
    views_at_a_time = getattr(module, "views_at_a_time", None)
    moments = []
    for less, most in zip(*step_bytes, strict=True):
        per_image = max(0.0, (most - less) / (more - few))
        first = fixed + _SCRATCH * (less - few * per_image)
        per_image *= _SCRATCH * blocks
        if views_at_a_time is not None:  # only so many views are in the network at once; the others are pixels
            first += per_image / (data.views.num_branches * data.views.num_blocks) * views_at_a_time
            per_image = 0.0
        moments.append((first, per_image + waiting))
    return Memory(moments)


def _waiting_bytes(data: Any, workers: int, on_device: bool) -> float:
    """Bytes per image of the batches that wait; on a CPU this includes those of the loader workers."""
    views = data.views
    pixels = views.num_branches * views.num_blocks * views.channels * views.size**2
    if views.local_views is not None:
        pixels += views.local_views.count * views.channels * views.local_views.size**2
    return float(pixels * (1 if on_device else 1 + _BATCHES_PER_WORKER * workers))


def _states_per_weight(trainer: L.Trainer) -> int:
    """State values per weight that the optimizer keeps (momenta)."""
    states = [
        len(one.defaults.get("betas", ())) or int(bool(one.defaults.get("momentum"))) for one in trainer.optimizers
    ]
    return max(states, default=0)


def _fits(trainer: L.Trainer, module: Any, images: int) -> bool:
    try:
        with _restored_afterwards(module):
            _step(trainer, module, _batch(trainer.datamodule, images))  # type: ignore[attr-defined]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        free_memory_of(error)
        return False
    return True


def _step_bytes(trainer: L.Trainer, module: Any, batch: dict[str, Tensor]) -> list[float]:
    """Additional bytes during a step of this batch: at each moment, on a GPU only the peak."""
    if module.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(module.device)
        before = torch.cuda.memory_allocated(module.device)
        _step(trainer, module, batch)
        return [float(torch.cuda.max_memory_allocated(module.device) - before)]
    existing = [*module.parameters(), *module.buffers(), *(one.grad for one in module.parameters()), *batch.values()]
    tensors = _LiveTensors([one for one in existing if one is not None])
    with TensorMode(tensors.add):
        _step(trainer, module, batch)
    return tensors.bytes


def _step(trainer: L.Trainer, module: Any, batch: dict[str, Tensor]) -> None:
    precision = trainer.precision_plugin
    batch = precision.convert_input(trainer.strategy.batch_to_device(batch))
    with precision.train_step_context():
        outputs = module.training_step(batch, 0)
    (outputs if isinstance(outputs, Tensor) else outputs["loss"]).backward()


def _batch(data: Any, images: int, one_block: bool = False) -> dict[str, Tensor]:
    """A batch of random pixels of the run's shape, or with only one block per image."""
    views = data.views
    shape = (images, views.num_branches, 1 if one_block else views.num_blocks)
    generator = torch.Generator().manual_seed(0)

    def pixels(*shape: int) -> Tensor:
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator)

    whole = torch.tensor([0.0, 0.0, 1.0, 1.0])
    batch = {
        "views": pixels(*shape, views.channels, views.size, views.size),
        "boxes": whole.repeat(*shape, 1),
        "image_ids": torch.arange(images),
    }
    local = views.local_views
    if local is not None:
        batch["local_views"] = pixels(images, local.count, views.channels, local.size, local.size)
        batch["local_boxes"] = whole.repeat(images, local.count, 1)
    if data.num_labels:
        batch["labels"] = torch.zeros(images, data.num_labels, dtype=torch.int8)
    return batch


@contextmanager
def _restored_afterwards(module: Any) -> Iterator[None]:
    """Restore buffers, gradients, random states and the log afterwards, and compile nothing for these shapes."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    views_at_a_time = getattr(module, "views_at_a_time", None)
    has_compiler = "torch._dynamo" in sys.modules  # importing it takes seconds
    set_stance: Any = torch.compiler.set_stance
    module.log = module.log_dict = lambda *_, **__: None
    if views_at_a_time is not None:
        module.views_at_a_time = None
    try:
        with isolate_rng(), set_stance("force_eager") if has_compiler else nullcontext():
            yield
    finally:
        del module.log, module.log_dict
        if views_at_a_time is not None:
            module.views_at_a_time = views_at_a_time
        module.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
        if module.device.type == "cuda":
            torch.cuda.empty_cache()


class _LiveTensors:
    """Counts the bytes of the live tensors made within it, at each new tensor.

    Args:
        existing: Tensors that exist already and are not counted.
    """

    def __init__(self, existing: list[Tensor]) -> None:
        self.bytes: list[float] = []
        self._now = 0
        self._existing = {tensor.untyped_storage().data_ptr() for tensor in existing}
        self._sizes: dict[int, int] = {}

    def add(self, tensor: Tensor) -> None:
        """Count its storage, unless another tensor shares it."""
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if size and address not in self._existing and address not in self._sizes:
            self._sizes[address] = size
            self._now += size
            weakref.finalize(storage, self._freed, address)
        self.bytes.append(float(self._now))

    def _freed(self, address: int) -> None:
        self._now -= self._sizes.pop(address)


def _advice(images: int, module: Any) -> str:
    """The options to pass so that a step fits with this number of images."""
    if getattr(module, "views_at_a_time", None) is not None:
        return f"pass a smaller --model.views_at_a_time than {module.views_at_a_time}"
    if images < 2:
        return "not even 2 images fit; pass a smaller --data.size or --model.backbone"
    return f"pass --data.batch_size {images}, or a smaller --data.size or --model.backbone"


def _readable(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
