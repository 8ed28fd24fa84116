"""Out of memory: recognise torch's errors, and continue an evaluation with smaller batches."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

_TORCH_MESSAGES = (
    *("can't allocate memory", "not enough memory: you tried to allocate"),  # raised by torch on a CPU
    *("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error is an out-of-memory error, on any device.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."))
    True
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(one in str(error) for one in _TORCH_MESSAGES)


def free_memory_of(error: BaseException) -> None:
    """Free the tensors of the failed calls, and torch's cached memory."""
    traceback.clear_frames(error.__traceback__)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class InParts:
    """Call a function with a batch; if memory does not suffice, with halves, quarters and so on.

    For functions that process each image independently, such as a network in eval mode: the result is the same. The
    number of images that fits is used for the following batches.
    """

    def __init__(self) -> None:
        self._most: int | None = None

    def __call__(self, function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """`function` of images (n, …), as one tensor (n, …).

        Raises:
            ValueError: If memory does not suffice for one image.
        """
        size = " × ".join(map(str, images.shape[1:]))
        requested = most = min(len(images), self._most or len(images))
        while True:
            try:
                parts = [function(part) for part in torch.split(images, max(most, 1))]
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if most < 2:
                    raise ValueError(
                        f"Memory does not suffice for a single image of {size}: use a smaller size of images or a "
                        "smaller network."
                    ) from error
                free_memory_of(error)
                most //= 2
        if most < requested:
            self._most = most
            warnings.warn(
                f"Memory does not suffice for {requested} images of {size} at a time: continuing with {most}, which "
                "gives the same features.",
                stacklevel=2,
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)
