"""Milliseconds of a convolution onto a few positions, value and gradients, as matrix products and by torch.

python examples/benchmarks/small_maps.py

On one core, by turns; printed are medians and quartiles over the rounds. Shapes are those of a ResNet's last stage.
"""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor

from mlssl.callbacks import small_maps

SHAPES = [(512, 2, 1), (256, 4, 2), (512, 3, 1), (256, 6, 2)]
"""Channels, side of the map that is read, stride; all onto 512 channels by a kernel of 3 × 3."""


def main(views: int = 256, channels: int = 512, rounds: int = 7) -> None:
    """Print a line a shape and type.

    Args:
        views: In a batch.
        channels: Of the last stage, even.
        rounds: Of both.
    """
    torch.set_num_threads(1)
    for (width, side, stride), dtype in itertools.product(SHAPES, (torch.bfloat16, torch.float32)):
        images = drawn((views, width * channels // 512, side, side), dtype)
        weight = drawn((channels, width * channels // 512, 3, 3), dtype)
        seconds = np.zeros((2, rounds))
        for number in range(-1, rounds):
            for way, context in enumerate((nullcontext, products)):
                began = time.perf_counter()
                with context():
                    out = F.conv2d(images, weight, stride=stride, padding=1)
                torch.autograd.grad(out, (images, weight), out.detach())
                if number >= 0:
                    seconds[way, number] = time.perf_counter() - began
        torchs, ours = (
            "{1:6.1f} ms ({0:.1f}–{2:.1f})".format(*np.percentile(1000 * times, [25, 50, 75])) for times in seconds
        )
        name = f"{side} × {side} → {out.shape[2]} × {out.shape[3]}, {str(dtype).removeprefix('torch.')}"
        ratio = np.median(seconds[0]) / np.median(seconds[1])
        print(f"{name:25s} torch {torchs}, products {ours}, {ratio:.2f} times as fast")


@contextmanager
def products() -> Iterator[None]:
    """Products also where the library leaves a map to torch."""
    most = dict.fromkeys(small_maps.MAX_PIXELS, 9)
    with patch.dict(small_maps.MAX_PIXELS, most), small_maps.SmallMapProducts():
        yield


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
