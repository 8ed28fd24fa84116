"""Out of memory in an evaluation: it continues with fewer images at a time, with the same features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _toy import small
from torch import Tensor, nn

from mlssl.evaluation.features import extract_features
from mlssl.out_of_memory import InParts, is_out_of_memory

ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
ERRORS: list[Callable[[], Exception]] = [
    lambda: RuntimeError(ALLOCATOR),
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    lambda: MemoryError(),
    lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    lambda: RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB)"),
]


class Limited(nn.Module):
    """Means of the channels, for at most `most` images at a time."""

    def __init__(self, most: int, error: Callable[[], Exception] = ERRORS[0]) -> None:
        super().__init__()
        self.most, self.error = most, error
        self.tried: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.tried.append(len(images))
        if len(images) > self.most:
            raise self.error()
        return images.float().mean((2, 3))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error())[:24])
def test_a_batch_that_does_not_fit_is_processed_in_parts(error: Callable[[], Exception]) -> None:
    network, in_parts, images = Limited(3, error), InParts(), torch.rand(8, 3, 2, 2)
    with pytest.warns(UserWarning, match=r"suffice for 8 images of 3 × 2 × 2 at a time: continuing with 2, which"):
        first = in_parts(network, images)
    assert torch.equal(first, images.mean((2, 3)))
    assert network.tried == [8, 4, 2, 2, 2, 2]
    assert torch.equal(in_parts(network, images[:5]), images[:5].mean((2, 3)))
    assert network.tried[6:] == [2, 2, 1]


def test_an_image_that_does_not_fit_is_reported() -> None:
    with pytest.raises(ValueError, match="Memory does not suffice for a single image of 3 × 2 × 2: use a smaller size"):
        InParts()(Limited(0), torch.rand(2, 3, 2, 2))


def test_other_errors_are_not_changed() -> None:
    with pytest.raises(RuntimeError, match="something else"):
        InParts()(Limited(0, lambda: RuntimeError("something else")), torch.rand(2, 3, 2, 2))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_torch_uses_these_messages() -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(2**55, dtype=torch.float64)
    assert is_out_of_memory(caught.value)


def test_features_of_a_set_and_of_a_step_equal_those_of_whole_batches() -> None:
    batch: Any = {"image": torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8), "image_ids": torch.arange(6)}
    whole, limited = small(Limited(6)).eval(), small(Limited(2)).eval()
    expected = extract_features(whole, [batch]).features
    with pytest.warns(UserWarning, match="Memory does not suffice for 6 images"):
        assert torch.equal(extract_features(limited, [batch]).features, expected)
    with pytest.warns(UserWarning, match="Memory does not suffice for 6 images"):
        assert torch.equal(limited.predict_step(batch, 1), whole.predict_step(batch, 1))
