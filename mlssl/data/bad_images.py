"""Images that cannot be decoded: found before training, or recorded by the loader workers as they occur."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mlssl.data.decoding import BadImageError, DamagedImageWarning
from mlssl.data.records import Records
from mlssl.distributed import gather_objects, rank, world_size


class BadImages:
    """Images of a set that could not be decoded: one byte per image, in memory shared by the loader workers.

    Args:
        num_images: n, the size of the set.
    """

    def __init__(self, num_images: int) -> None:
        self._is_bad: torch.Tensor = torch.zeros(num_images, dtype=torch.bool)
        self._is_bad.share_memory_()  # type: ignore[no-untyped-call]

    def add(self, index: int) -> None:
        """Record an image by its index; all processes see it."""
        self._is_bad[index] = True

    def __contains__(self, index: int) -> bool:
        return bool(self._is_bad[index])

    def indices(self) -> list[int]:
        """Indices of the bad images found so far, ascending."""
        indices: list[int] = self._is_bad.nonzero().flatten().tolist()
        return indices


def find_bad_images(
    records: Records, indices: Sequence[int] | None = None, *, num_workers: int = 0, name: str = "images"
) -> dict[int, str]:
    """Decode every pixel of the images and return those that are damaged or cannot be decoded.

    A progress bar shows images/s and the time left.

    Args:
        records: The set.
        indices: Indices to check. None: all.
        num_workers: Decoding processes; 0 decodes in this process.
        name: Name of the images in the progress bar.

    Returns:
        Index → reason, for images that are missing, damaged or cannot be decoded.
    """
    checked = range(len(records)) if indices is None else indices
    dataset = _DecodeCheck(records, checked)
    loader = DataLoader(dataset, batch_size=16, num_workers=num_workers, collate_fn=_uncollated)
    bad: dict[int, str] = {}
    with tqdm(total=len(checked), desc=f"checking {name}", unit="image", disable=None) as bar:
        for batch in loader:
            bad |= {index: reason for index, reason in batch if reason}
            bar.update(len(batch))
    return bad


def check_all_images(sets: Mapping[str, Records], skipped: Mapping[str, BadImages], num_workers: int) -> None:
    """Decode every image, divided over the processes; every process gets all results.

    Args:
        sets: Name → records.
        skipped: Name → record of the images to skip; empty if bad images are an error.
        num_workers: See `find_bad_images`.

    Raises:
        BadImageError: Images cannot be decoded and are not skipped; the message names them all.
    """
    for name, records in sets.items():
        share = range(rank(), len(records), world_size())
        found = gather_objects(find_bad_images(records, share, num_workers=num_workers, name=name))
        reasons = {index: reason for part in found for index, reason in part.items()}
        if reasons and not skipped:
            listed = "; ".join(reasons[index] for index in sorted(reasons))
            raise BadImageError(
                f"{len(reasons)} of {len(records)} {name} images cannot be decoded: replace them, leave them out, "
                f"or pass on_bad_image='skip' (--data.on_bad_image skip): {listed}"
            )
        for index in reasons:
            skipped[name].add(index)


class _DecodeCheck(Dataset[tuple[int, str]]):
    """Index of an image and why it cannot be decoded intact; an empty string if it can."""

    def __init__(self, records: Records, indices: Sequence[int]) -> None:
        self.records = records
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, str]:
        index = self.indices[position]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", DamagedImageWarning)
                self.records.image(index)
        except DamagedImageWarning as damage:
            return index, str(damage)
        except (BadImageError, FileNotFoundError, PermissionError) as error:
            return index, str(error)
        return index, ""


def _uncollated(items: list[tuple[int, str]]) -> list[tuple[int, str]]:
    return items
