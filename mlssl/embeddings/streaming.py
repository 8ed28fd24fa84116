"""Stream any number of images through a network on one or several devices, with constant memory."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mlssl.bars import progress_bar
from mlssl.data.bad_images import BadImages
from mlssl.data.datasets import ImageDataset, collated
from mlssl.data.decoding import BadImageError
from mlssl.data.loader import PartialLoader
from mlssl.data.records import Records

DEVICES_HELP = "devices=('cpu',), ('cuda:0', 'cuda:1') or ('mps',)"


class Images:
    """Whole images of a set in batches, with their indices; bad images are left out and recorded.

    Args:
        records: The set.
        size: Height and width that images are resized to.
        batch_size: Images per step, at least 1.
        num_workers: Loader processes.

    Raises:
        ValueError: `batch_size` is below 1.
    """

    def __init__(self, records: Records, size: tuple[int, int], batch_size: int = 64, num_workers: int = 0) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} was given: pass at least 1")
        self.records = records
        self._bad = BadImages(len(records))
        self._loader: DataLoader[Mapping[str, Tensor]] = PartialLoader(
            ImageDataset(records, size, self._bad), batch_size, num_workers=num_workers, collate_fn=collated
        )
        self._index_of = {image_id: index for index, image_id in enumerate(records.image_ids.tolist())}

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[tuple[list[int], Tensor]]:
        """Indices in the records, and images uint8 (n, C, H, W)."""
        for batch in self._loader:
            yield [self._index_of[image_id] for image_id in batch["image_ids"].tolist()], batch["image"]

    def name(self, index: int) -> str:
        """Path of an image relative to the root of the set; the full path without a root."""
        path, root = self.records.path(index), self.records.root
        return (path.relative_to(root) if root is not None and path.is_relative_to(root) else path).as_posix()

    def bad(self) -> list[str]:
        """Names of the images that could not be decoded so far.

        Raises:
            BadImageError: No image of the set can be decoded.
        """
        bad = [self.name(index) for index in self._bad.indices()]
        if len(bad) == len(self):
            raise BadImageError(f"none of the {len(bad)} images of {self.records.root} can be decoded, first {bad[0]}")
        return bad


def left_out(bad: Sequence[str]) -> str:
    """Sentence with the number of images that could not be decoded, and the first of them.

    >>> left_out(["a.jpg", "b.jpg"])
    '2 images cannot be decoded and are left out: a.jpg, b.jpg'
    """
    return f"{len(bad)} images cannot be decoded and are left out: {', '.join(bad[:5])}{', …' if len(bad) > 5 else ''}"


def streamed(
    network: nn.Module,
    images: Iterable[tuple[list[int], Tensor]],
    devices: Sequence[str] | None = None,
    *,
    total: int | None = None,
    progress: bool = False,
) -> Iterator[tuple[list[int], Tensor]]:
    """Indices and network outputs of the images, in order, on the CPU in float32.

    Each of n devices has a copy of the network in eval mode and processes every n-th batch; n batches are in flight.

    Args:
        network: Network from images uint8 (n, C, H, W) to (n, …).
        images: Indices and images.
        devices: Torch device names; None: the first GPU if available, else the CPU.
        total: Number of images, for the bar.
        progress: Whether to show a bar with images per second.

    Raises:
        ValueError: A device is unknown or missing, or an output is not finite.
    """
    names = devices or ("cuda" if torch.cuda.is_available() else "cpu",)
    copies = [(device, copy.deepcopy(network).to(device).eval()) for device in map(_checked_device, names)]
    waiting: deque[tuple[list[int], Tensor]] = deque()
    with progress_bar(total=total, disable=not progress, unit=" images") as bar:

        def first() -> tuple[list[int], Tensor]:
            indices, rows = waiting.popleft()
            rows = rows.to("cpu", torch.float32)
            wrong = ~rows.flatten(1).isfinite().all(1)
            if wrong.any():
                raise ValueError(
                    f"the network returns NaN or infinity for image {indices[int(wrong.nonzero()[0])]}: check its "
                    "weights"
                )
            bar.update(len(indices))
            return indices, rows

        for (indices, pixels), (device, one) in zip(images, cycle(copies), strict=False):
            with torch.no_grad():
                waiting.append((indices, one(pixels.to(device, non_blocking=True))))
            if len(waiting) >= len(copies):
                yield first()
        while waiting:
            yield first()
        bar.update((total or bar.n) - bar.n)  # images that cannot be decoded are done, too


def _checked_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # In torch's order: a name or device that does not exist, a build without CUDA, a backend that this build lacks.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"there is no device {name!r} ({reason}): pass {DEVICES_HELP}") from None
    return device
