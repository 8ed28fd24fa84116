"""Seconds and peak memory of the image-aware term, value and gradient, ours against the plain R × R formulation.

python examples/benchmarks/loss.py

On a GPU if there is one, else on one core, in CPU seconds. Ours and the plain form run in turns; printed are medians
and quartiles over the rounds, and the median of ours / plain round by round. Peak memory is what is above the
features, their gradient and one normalised copy of them: of the CUDA allocator on a GPU, elsewhere of fresh processes
that compute the term once (their largest resident set, less that of a process which holds just these three).

The targets at the default size: at most 1.1 of the plain form's time, and at most a fifth of its memory, which grows
linearly with the anchors (see --anchors 16384 --ways ours).
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from authors_way import plain_image_aware_loss
from jsonargparse import auto_cli
from torch import Tensor

from mlssl.losses import image_aware_contrastive_loss

Way = Literal["ours", "plain", "nothing"]

WAYS: dict[Way, Callable[[Tensor, Tensor], Tensor]] = {
    "ours": image_aware_contrastive_loss,
    "plain": plain_image_aware_loss,
}


def main(
    anchors: int = 8192,
    width: int = 2048,
    views: int = 8,
    rounds: int = 5,
    ways: Literal["both", "ours"] = "both",
    only: Way | None = None,
) -> None:
    """Print a line for each way, and the ratios.

    Args:
        anchors: R.
        width: P.
        views: Anchors per image.
        rounds: Of each.
        ways: Which run; ours alone where the plain form does not fit in memory.
        only: One of them computes the term once, and the largest resident set in MB is printed.
    """
    torch.set_num_threads(1)
    if only is not None:
        measure_once(only, anchors, width, views)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = time.perf_counter if device.type == "cuda" else time.process_time  # other processes do not count
    name = torch.cuda.get_device_name() if device.type == "cuda" else "one core"
    features, ids = drawn(anchors, width, views, device)
    seconds: dict[Way, list[float]] = {way: [] for way in WAYS if ways in ("both", way)}
    for number in range(-1, rounds):
        for way in seconds:
            began = clock()
            value = WAYS[way](features, ids)
            (gradient,) = torch.autograd.grad(value, features)
            gradient[0, 0].item()  # waits for the device
            if number >= 0:
                seconds[way].append(clock() - began)
    print(f"{name}, torch {torch.__version__}; R = {anchors}, P = {width}, float32")
    megabytes: dict[Way, float] = {}
    for way, times in seconds.items():
        low, median, high = torch.tensor(times).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        on_gpu = device.type == "cuda"
        memory = peak_on_gpu(WAYS[way], features, ids) if on_gpu else peak_of_process(way, features, views)
        megabytes[way] = memory
        print(f"{way:6s} {median:8.3f} s ({low:.3f}–{high:.3f}), {memory:8.0f} MB above features, gradient and copy")
    if ways == "both":
        by_round = [ours / plain for ours, plain in zip(seconds["ours"], seconds["plain"], strict=True)]
        of_memory = megabytes["ours"] / megabytes["plain"]
        print(f"ours / plain: {statistics.median(by_round):.2f} of the time, {of_memory:.2f} of the memory")


def drawn(anchors: int, width: int, views: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features (R, P) and image ids (R,)."""
    torch.manual_seed(0)
    ids = torch.arange(anchors // views, device=device).repeat_interleave(views)
    return torch.randn(len(ids), width, device=device, requires_grad=True), ids


def peak_on_gpu(loss: Callable[[Tensor, Tensor], Tensor], features: Tensor, ids: Tensor) -> float:
    """MB."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(loss(features, ids), features)
    return (torch.cuda.max_memory_allocated() - before - 2 * features.nbytes) / 1e6


def peak_of_process(way: Way, features: Tensor, views: int) -> float:
    """MB."""
    return largest_resident_set(way, *features.shape, views) - largest_resident_set("nothing", *features.shape, views)


@cache
def largest_resident_set(way: Way, anchors: int, width: int, views: int) -> float:
    """MB, of a process of its own."""
    words = ["--anchors", str(anchors), "--width", str(width), "--views", str(views), "--only", way]
    return float(subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True).stdout)


def measure_once(way: Way, anchors: int, width: int, views: int) -> None:
    """Print the largest resident set in MB."""
    features, ids = drawn(anchors, width, views, torch.device("cpu"))
    few, few_ids = drawn(64, 32, views, torch.device("cpu"))
    for loss in WAYS.values():  # loads what the libraries load at their first call
        loss(few, few_ids).backward()
    if way == "nothing":
        kept = [torch.ones_like(features), torch.ones_like(features)]
        del kept
    else:
        torch.autograd.grad(WAYS[way](features, ids), features)
    status = Path("/proc/self/status").read_text()  # Linux's; ru_maxrss would begin with the parent's
    print(int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
