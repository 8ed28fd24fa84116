"""Images that cannot be decoded: found beforehand, or remembered by all loader workers as they meet them."""

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
    """Which images of a set could not be decoded: a byte an image, in memory that loader workers share.

    Args:
        num_images: n, the size of the set.
    """

    def __init__(self, num_images: int) -> None:
        self._is_bad: torch.Tensor = torch.zeros(num_images, dtype=torch.bool)
        self._is_bad.share_memory_()  # type: ignore[no-untyped-call]

    def add(self, index: int) -> None:
        """Remember an image by its place in the set; all processes see it."""
        self._is_bad[index] = True

    def __contains__(self, index: int) -> bool:
        return bool(self._is_bad[index])

    def indices(self) -> list[int]:
        """Places of all that are known so far, ascending."""
        places: list[int] = self._is_bad.nonzero().flatten().tolist()
        return places


def find_bad_images(
    records: Records, indices: Sequence[int] | None = None, *, num_workers: int = 0, name: str = "images"
) -> dict[int, str]:
    """Decode images, every pixel of them, and tell which cannot be decoded, or are damaged.

    A bar shows images/s and the time left.

    Args:
        records: The set.
        indices: Places in it to look at; None: all.
        num_workers: Processes that decode, 0 for none beside this one.
        name: What the bar calls them.

    Returns:
        Place in the set → why, for those that cannot be decoded, have damaged pixels or are not there.
    """
    places = range(len(records)) if indices is None else indices
    dataset = _Trials(records, places)
    loader = DataLoader(dataset, batch_size=16, num_workers=num_workers, collate_fn=_as_they_are)
    bad: dict[int, str] = {}
    with tqdm(total=len(places), desc=f"checking {name}", unit="image", disable=None) as bar:
        for batch in loader:
            bad |= {index: reason for index, reason in batch if reason}
            bar.update(len(batch))
    return bad


def check_all_images(sets: Mapping[str, Records], skipped: Mapping[str, BadImages], num_workers: int) -> None:
    """Decode every image, each process its share, and know everywhere what was found.

    Args:
        sets: Name → records.
        skipped: Name → where to remember images that are skipped; empty where none may be.
        num_workers: As for `find_bad_images`.

    Raises:
        BadImageError: Naming all of a set that cannot be decoded, unless they are skipped.
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


class _Trials(Dataset[tuple[int, str]]):
    """Place of an image, and why it cannot be decoded as it was stored; nothing for one that can."""

    def __init__(self, records: Records, places: Sequence[int]) -> None:
        self.records = records
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, position: int) -> tuple[int, str]:
        index = self.places[position]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", DamagedImageWarning)
                self.records.image(index)
        except DamagedImageWarning as damage:
            return index, str(damage)
        except (BadImageError, FileNotFoundError, PermissionError) as error:
            return index, str(error)
        return index, ""


def _as_they_are(items: list[tuple[int, str]]) -> list[tuple[int, str]]:
    return items
