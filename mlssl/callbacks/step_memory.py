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
"""Images of the two steps that are measured, by device; a step needs two images at least.

On a GPU the peak alone is known, and in a step of few images another moment may have it than in one of many.
"""

_SCRATCH = 1.1
"""Share by which the memory of the process grows more than its tensors do, by what kernels take for themselves."""

_BATCHES_PER_WORKER = 2
"""Batches that each of torch's loader workers keeps ready."""


class StepMemory(L.Callback):
    """Measure the memory of a training step before the run begins, and refuse a run whose steps do not fit.

    A forward and a backward pass of two small random batches of the run's shape are measured, and the memory of the
    whole batch follows from both, as it grows with the number of images. It is compared with what is free: on a GPU
    with its free memory, on a processor under Linux with MemAvailable and the limits of the process's cgroups (of a
    container or a job), shared by the processes of the run. Weights, running statistics and random state stay as they
    are. `mlssl fit` adds it.

    Nothing is measured on other devices and systems, with another datamodule than `MultiLabelDataModule`, whose batches
    are not known, with manual optimization, and under strategies other than a single device and DDP.

    Where memory runs out in a step all the same, smaller batches are tried, and `remedy` says which of them fits.

    Args:
        refuse: False warns instead.

    Raises:
        ValueError: Before the first step, with what it needs, what is free, and the batch size that fits.
    """

    def __init__(self, refuse: bool = True) -> None:
        self.refuse = refuse
        self.remedy: str | None = None
        """Advice after a step that ran out of memory; None if none did."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure, compare, refuse."""
        if not _can_be_measured(trainer, pl_module):
            return
        device, images = pl_module.device, trainer.datamodule.hparams["batch_size"]  # type: ignore[attr-defined]
        free = _free_memory(device, processes=trainer.num_devices)
        needed = Memory([(0.0, 0.0)]) if free is None else _measured(trainer, pl_module)
        free = float("inf") if free is None else free
        if not trainer.strategy.reduce_boolean_decision(needed.of(images) > free, all=False):
            return
        most = needed.of(images)
        needs = f"needs about {_size(most)}" if most < float("inf") else "needs more"
        said = (
            f"A step of {images} images {needs} of memory, and {_size(free)} are free: "
            f"{_smaller(needed.images_in(free), pl_module)}."
        )
        if self.refuse:
            raise ValueError(said)
        rank_zero_warn(said)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """After an out-of-memory error in training, halve the batch size until a step fits."""
        data = getattr(trainer, "datamodule", None)
        if not is_out_of_memory(exception) or not isinstance(data, MultiLabelDataModule):
            return
        images = data.hparams["batch_size"]
        self.remedy = f"Memory ran out in a step of {images} images: pass a smaller --data.batch_size than {images}."
        if trainer.world_size > 1 or not _can_be_measured(trainer, pl_module):  # several would have to try together
            return
        free_memory_of(exception)
        pl_module.zero_grad(set_to_none=True)
        try:
            while images > 1:
                images //= 2
                if images < 2 or _fits(trainer, pl_module, images):
                    break
        except Exception:  # whatever it is, it must not hide the first
            return
        self.remedy = f"Memory ran out in a step of {data.hparams['batch_size']} images: {_smaller(images, pl_module)}."


class Memory:
    """Peak memory of a step in bytes, by its number of images.

    At each moment of the step these are ``fixed + per_image · n``; which moment takes most depends on n.

    Args:
        moments: (fixed, per_image) of each.
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


def _can_be_measured(trainer: L.Trainer, module: L.LightningModule) -> bool:
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


def _measured(trainer: L.Trainer, module: Any) -> Memory:
    """What a step takes beyond what is taken now; nothing where it fails for another reason, which it will say."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    on_processor = module.device.type == "cpu"
    few, more = _SIZES[module.device.type]
    # One block of each image is enough where each moment is compared. Local views belong to the image, not to a block.
    blocks = data.views.num_blocks if on_processor and data.views.local_views is None else 1
    try:
        with _left_as_it_was(module):
            for parameter in module.parameters():  # those of the step before are there in the forward pass
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            taken = [_taken(trainer, module, _batch(data, images, one_block=blocks > 1)) for images in (few, more)]
            gradients = sum(one.grad.nbytes for one in module.parameters() if one.grad is not None)
    except Exception as error:
        if is_out_of_memory(error):
            free_memory_of(error)
            return Memory([(float("inf"), 1.0)])
        return Memory([(0.0, 0.0)])
    if len(taken[0]) != len(taken[1]):  # another way through the network
        taken = [[max(one)] for one in taken]
    fixed = gradients * (1 + _states_per_weight(trainer))
    waiting = _waiting_bytes(data, workers_of(trainer), on_device=not on_processor)
    views_at_a_time = getattr(module, "views_at_a_time", None)
    moments = []
    for less, most in zip(*taken, strict=True):
        per_image = max(0.0, (most - less) / (more - few))
        first = fixed + _SCRATCH * (less - few * per_image)
        per_image *= _SCRATCH * blocks
        if views_at_a_time is not None:  # so many views are in the network, and the others wait as pixels
            first += per_image / (data.views.num_branches * data.views.num_blocks) * views_at_a_time
            per_image = 0.0
        moments.append((first, per_image + waiting))
    return Memory(moments)


def _waiting_bytes(data: Any, workers: int, on_device: bool) -> float:
    """Bytes of an image's views in batches that wait: on a processor those of the loader's workers as well."""
    views = data.views
    pixels = views.num_branches * views.num_blocks * views.channels * views.size**2
    if views.local_views is not None:
        pixels += views.local_views.count * views.channels * views.local_views.size**2
    return float(pixels * (1 if on_device else 1 + _BATCHES_PER_WORKER * workers))


def _states_per_weight(trainer: L.Trainer) -> int:
    """State values per weight that the optimizer keeps (momenta)."""
    kept = [len(one.defaults.get("betas", ())) or int(bool(one.defaults.get("momentum"))) for one in trainer.optimizers]
    return max(kept, default=0)


def _fits(trainer: L.Trainer, module: Any, images: int) -> bool:
    try:
        with _left_as_it_was(module):
            _step(trainer, module, _batch(trainer.datamodule, images))  # type: ignore[attr-defined]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        free_memory_of(error)
        return False
    return True


def _taken(trainer: L.Trainer, module: Any, batch: dict[str, Tensor]) -> list[float]:
    """Bytes that a step of this batch takes beyond what is taken before: at each moment, on a GPU at its most."""
    if module.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(module.device)
        before = torch.cuda.memory_allocated(module.device)
        _step(trainer, module, batch)
        return [float(torch.cuda.max_memory_allocated(module.device) - before)]
    there = [*module.parameters(), *module.buffers(), *(one.grad for one in module.parameters()), *batch.values()]
    tensors = _LiveTensors([one for one in there if one is not None])
    with TensorMode(tensors.made):
        _step(trainer, module, batch)
    return tensors.bytes


def _step(trainer: L.Trainer, module: Any, batch: dict[str, Tensor]) -> None:
    precision = trainer.precision_plugin
    batch = precision.convert_input(trainer.strategy.batch_to_device(batch))
    with precision.train_step_context():
        outputs = module.training_step(batch, 0)
    (outputs if isinstance(outputs, Tensor) else outputs["loss"]).backward()


def _batch(data: Any, images: int, one_block: bool = False) -> dict[str, Tensor]:
    """A batch of random pixels of the run's shape, or of the first block of each image alone."""
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
def _left_as_it_was(module: Any) -> Iterator[None]:
    """Keep buffers, gradients, random states and the log, and compile nothing for these shapes."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    views_at_a_time = getattr(module, "views_at_a_time", None)
    has_compiler = "torch._dynamo" in sys.modules  # whose import takes seconds
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
        there: Tensors that exist already and are not counted.
    """

    def __init__(self, there: list[Tensor]) -> None:
        self.bytes: list[float] = []
        self._now = 0
        self._there = {tensor.untyped_storage().data_ptr() for tensor in there}
        self._sizes: dict[int, int] = {}

    def made(self, tensor: Tensor) -> None:
        """Count its storage, unless it is that of another tensor."""
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if size and address not in self._there and address not in self._sizes:
            self._sizes[address] = size
            self._now += size
            weakref.finalize(storage, self._freed, address)
        self.bytes.append(float(self._now))

    def _freed(self, address: int) -> None:
        self._now -= self._sizes.pop(address)


def _smaller(images: int, module: Any) -> str:
    """The options to pass so that a step fits with this number of images."""
    if getattr(module, "views_at_a_time", None) is not None:
        return f"pass a smaller --model.views_at_a_time than {module.views_at_a_time}"
    if images < 2:
        return "not even 2 images fit, pass a smaller --data.size or --model.backbone"
    return f"pass --data.batch_size {images}, or a smaller --data.size or --model.backbone"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
