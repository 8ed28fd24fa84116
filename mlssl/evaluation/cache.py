"""Feature files that are written image by image, resumed after a stop, and memory-mapped when complete."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlssl.atomic import FullDiskError, errors_named, remove_leftovers, written_aside
from mlssl.locks import locked

SECONDS_BETWEEN_UPDATES = 10.0
"""Interval between updates of the progress file: a killed pass loses at most this."""

_ARRAYS = {"features": "features.npy", "image_ids": "image_ids.npy", "labels": "labels.npy"}
_PROGRESS = "progress.json"


@contextmanager
def cache_lock(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Lock the cache in a folder, which is created if missing: a second process waits for the first.

    Raises:
        OSError: If the folder cannot be created.
    """
    folder = Path(folder)
    with errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".cache.lock", folder, wait=True) as is_alone:
        if is_alone:
            remove_leftovers(folder)
        yield


class FeatureCache:
    """Features (n, D), ids (n,) and labels (n, L) of one set of images and one backbone, in a folder.

    ``features.npy``, ``image_ids.npy`` and ``labels.npy`` are files for `numpy.load`, and ``progress.json`` contains
    the number of finished images and the settings. Features are written to disk before they are counted there, so that
    a killed pass resumes at the last count.

    Args:
        folder: Created if missing.
        num_images: n.
        made_with: Settings that the features depend on, as text and numbers; other settings need another cache.

    Raises:
        ValueError: If the folder contains other features, or files that are not a cache or are damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], num_images: int, made_with: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.num_images = num_images
        self.done = 0
        self._about = {"num_images": num_images, **made_with}
        self._row_bytes: dict[str, int] = {}
        self._last_update = time.monotonic()
        if (self.folder / _PROGRESS).is_file():
            self._resume()
        elif self.folder.is_dir() and any(self.folder.glob("*.npy")):
            raise ValueError(f"{self.folder} contains files that are not a feature cache: pass another folder")

    def append(self, features: Tensor, image_ids: Tensor, labels: Tensor | None) -> None:
        """Add the next images, on the CPU.

        Raises:
            ValueError: If labels are missing, added, or of another width than before.
            FullDiskError: If the disk is full; finished images are kept, and a later pass resumes.
            OSError: If they cannot be written for another reason (no permission).
        """
        try:
            with errors_named(self.folder):
                self._append(features, image_ids, labels)
        except FullDiskError as error:
            error.kept = f"{self.done} of {self.num_images} images are done, and the same command resumes from there"
            raise

    def _append(self, features: Tensor, image_ids: Tensor, labels: Tensor | None) -> None:
        arrays = {"features": features, "image_ids": image_ids} | ({} if labels is None else {"labels": labels})
        if not self._row_bytes:
            self._create(arrays)
        row_bytes = {name: tensor[:1].numpy().nbytes for name, tensor in arrays.items()}
        if row_bytes != self._row_bytes:
            raise ValueError(
                f"an image takes {row_bytes} bytes, but {self._row_bytes} in {self.folder}: the labels have changed, "
                "pass another folder or remove that one"
            )
        for name, tensor in arrays.items():
            with (self.folder / _ARRAYS[name]).open("ab") as file:
                file.write(tensor.contiguous().numpy().tobytes())
        self.done += len(features)
        if time.monotonic() - self._last_update > SECONDS_BETWEEN_UPDATES or self.done == self.num_images:
            self._update_progress()

    def read(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features, ids and labels of a complete cache, memory-mapped.

        Changes to the tensors stay in memory and do not change the files.
        """
        mapped = {
            name: torch.from_numpy(np.load(self.folder / file, mmap_mode="c"))
            for name, file in _ARRAYS.items()
            if name in self._row_bytes
        }
        return mapped["features"], mapped["image_ids"], mapped.get("labels")

    def row(self, index: int) -> Tensor:
        """Features (D,) of one finished image; the others are not read."""
        mapped = np.memmap(
            self.folder / _ARRAYS["features"], np.dtype(self._about["dtype"]), "r", self._data_start("features")
        )
        width = self._row_bytes["features"] // mapped.itemsize
        return torch.from_numpy(np.array(mapped[index * width : (index + 1) * width]))

    def _create(self, arrays: dict[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._row_bytes = {name: tensor[:1].numpy().nbytes for name, tensor in arrays.items()}
        self._write_progress()  # first: without it the arrays could be from another program
        for name, tensor in arrays.items():
            rows = tensor.numpy()
            shape = (self.num_images, *rows.shape[1:])
            header = {"descr": np.lib.format.dtype_to_descr(rows.dtype), "fortran_order": False, "shape": shape}
            with (self.folder / _ARRAYS[name]).open("wb") as file:
                np.lib.format.write_array_header_2_0(file, header)

    def _update_progress(self) -> None:
        for name in self._row_bytes:
            with (self.folder / _ARRAYS[name]).open("rb+") as file:
                os.fsync(file.fileno())
        self._write_progress()
        self._last_update = time.monotonic()

    def _write_progress(self) -> None:
        content = {**self._about, "row_bytes": self._row_bytes, "done": self.done}
        with written_aside(self.folder / _PROGRESS) as aside:
            aside.write_text(json.dumps(content, indent=1))

    def _resume(self) -> None:
        try:
            saved = json.loads((self.folder / _PROGRESS).read_text())
            self.done, self._row_bytes = saved.pop("done"), saved.pop("row_bytes")
            if not self.done:  # the headers may be missing: start anew
                self._row_bytes = {}
            starts = {name: self._data_start(name) for name in self._row_bytes}
        except (ValueError, KeyError, AttributeError, OSError) as error:
            raise ValueError(f"the features in {self.folder} are damaged ({error}): remove that folder") from error
        different = [name for name in self._about if saved.get(name) != self._about[name]]
        if different:
            name = different[0]
            raise ValueError(
                f"the features in {self.folder} were extracted with {name} {saved.get(name)!r}, but now it is "
                f"{self._about[name]!r}: pass another folder, or remove that one"
            )
        for name, start in starts.items():
            path, expected = self.folder / _ARRAYS[name], start + self.done * self._row_bytes[name]
            size = path.stat().st_size
            if size < expected:
                raise ValueError(
                    f"{path} contains {size} of the {expected} bytes written: it is truncated, remove its folder"
                )
            if size > expected:
                os.truncate(path, expected)  # data after the last progress update are written again

    def _data_start(self, name: str) -> int:
        with (self.folder / _ARRAYS[name]).open("rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_2_0(file)
            return file.tell()
