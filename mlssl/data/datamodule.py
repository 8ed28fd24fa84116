"""From records on disk to the batches that the module trains on and the callbacks evaluate."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from mlssl.data.coco import read_coco
from mlssl.data.corel5k import frequent_labels, read_corel5k
from mlssl.data.files import read_folder
from mlssl.data.records import Records
from mlssl.data.synthetic import synthetic_scenes
from mlssl.views.blocks import BlockViews

MAX_WORKERS = 8
"""Worker processes at most, where the user does not say: eight feed a large GPU (8 views cost about 5 ms an image)."""


class MultiLabelDataModule(L.LightningDataModule):
    """Block-wise augmented view groups for training, whole images for evaluation.

    The views of an image depend on (seed, epoch, index) alone: number of workers, devices and a resume change nothing.

    Args:
        dataset: Format of ``root``: ``synthetic`` (drawn, needs no files), ``coco``, ``corel5k``, or ``folder`` (any
            photographs, without labels).
        root: Folder that the reader of the format describes; not for ``synthetic``.
        batch_size: Images a step on one device.
        size: S, side of a view in pixels ≥ 16 (paper: 224).
        rows: Rows ≥ 1 of the block grid (paper: 2).
        cols: Columns ≥ 1 of the block grid (paper: 2).
        overlap: γ in 0–0.5, share of the image side by which blocks overlap (paper: 0.2; its COCO run: 0.3).
        eval_size: Height and width, or one side, that whole images are resized to for evaluation; ``size`` by default.
        num_workers: Loader processes; by default one less than the cores at hand, at least 1 and at most 8.
        train_split: Split to train on; by default ``train2017`` of COCO, else ``train``.
        val_split: Split to evaluate on; by default ``val2017`` of COCO, else ``test``.
        min_images_per_class: Keep only classes with at least so many train and so many val images, e.g. (40, 4).
        seed: Of order and augmentation.
        train: Records of one's own to train on, instead of ``dataset``; labels are optional.
        val: Records of one's own to evaluate on, labelled.
        probe_train: Labelled records that the probe learns from, where they are not the training set.

    Raises:
        ValueError: On sizes, splits or formats that do not exist, before anything is read; on records that do not fit
            together, when the Trainer sets the data up.
    """

    def __init__(
        self,
        dataset: Literal["synthetic", "coco", "corel5k", "folder"] = "synthetic",
        root: str | os.PathLike[str] | None = None,
        *,
        batch_size: int = 64,
        size: int = 224,
        rows: int = 2,
        cols: int = 2,
        overlap: float = 0.2,
        eval_size: int | tuple[int, int] | None = None,
        num_workers: int | None = None,
        train_split: str | None = None,
        val_split: str | None = None,
        min_images_per_class: tuple[int, int] | None = None,
        seed: int = 0,
        train: Records | None = None,
        val: Records | None = None,
        probe_train: Records | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} was given: pass the images a step on one device, at least 1.")
        if num_workers is not None and num_workers < 0:
            raise ValueError(f"num_workers={num_workers} was given: pass 0 to load in the main process, or more.")
        if train is None and dataset not in _FORMATS:
            raise ValueError(f"dataset={dataset!r} is unknown: pass one of {', '.join(_FORMATS)}, or train=Records(…).")
        if train is None and root is None and dataset != "synthetic":
            raise ValueError(f"dataset={dataset!r} needs the folder that holds it: pass root (--data.root FOLDER).")
        if train is None and (val is not None or probe_train is not None):
            raise ValueError("val or probe_train was given without train: pass train=Records(…) too.")
        self.save_hyperparameters(ignore=["train", "val", "probe_train"])
        self.views = BlockViews(size, rows, cols, overlap)
        self.eval_size = _height_width(size if eval_size is None else eval_size)
        self.train_records = train
        self.val_records = val
        self.probe_records = probe_train
        self.num_workers = _default_workers() if num_workers is None else num_workers

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the L labels; empty without labels or before ``setup``."""
        labelled = self.val_records or self.probe_records or self.train_records
        return labelled.classes if labelled else ()

    @property
    def num_labels(self) -> int:
        """L; 0 without labels or before ``setup``."""
        return len(self.classes)

    def setup(self, stage: str | None = None) -> None:
        """Read the records, once, and check that they fit together.

        Raises:
            ValueError: If the sets name different classes, or the training set fills no batch.
            FileNotFoundError: If a folder or file is missing (by the reader).
        """
        if self.train_records is None:
            read = _FORMATS[self.hparams["dataset"]]
            splits = {name: self.hparams[f"{name}_split"] or read.splits[name] for name in ("train", "val")}
            root = Path(self.hparams["root"] or ".")
            train = read.records(root, splits["train"])
            val = read.records(root, splits["val"]) if splits["val"] else None
            if self.hparams["min_images_per_class"] is not None and val is not None:
                kept = frequent_labels(train, val, *self.hparams["min_images_per_class"])
                train, val = train.with_classes(kept), val.with_classes(kept)
            self.train_records, self.val_records = train, val
        _check_classes({"train": self.train_records, "val": self.val_records, "probe_train": self.probe_records})
        devices = self.trainer.world_size if self.trainer else 1
        needed = self.hparams["batch_size"] * devices
        if stage == "fit":
            total = len(self.train_records)
            if total < needed:
                raise ValueError(
                    f"The training set has {total} images, and a step takes {needed} "
                    f"(batch_size {self.hparams['batch_size']} on {devices} device(s)): pass a smaller batch_size."
                )
            if total % needed:
                rank_zero_info(
                    f"{total} images fill {total // needed} steps of {needed}: "
                    f"{total % needed} images, others every epoch, sit out an epoch."
                )

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of views (B, A, K, 3, S, S), image ids and, where there are, labels: see ``ViewBatch``."""
        records = self._records("train_records")
        dataset = ViewDataset(records, self.views, self.hparams["seed"])
        sampler = EpochSampler(
            dataset,
            num_replicas=self.trainer.world_size if self.trainer else 1,
            rank=self.trainer.global_rank if self.trainer else 0,
            seed=self.hparams["seed"],
            drop_last=True,
        )
        return self._loader(dataset, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Whole images of the val records, see ``ImageBatch``; nothing where there are none."""
        if self.val_records is None:
            return []
        return self._loader(ImageDataset(self.val_records, self.eval_size))

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> DataLoader[Any]:
        """Whole images of the val records, or of the training records where there are none."""
        return self._loader(ImageDataset(self.val_records or self._records("train_records"), self.eval_size))

    def probe_dataloader(self) -> DataLoader[Any] | None:
        """Shuffled whole images of ``probe_train``; None where it was not given."""
        if self.probe_records is None:
            return None
        generator = torch.Generator().manual_seed(self.hparams["seed"])
        return self._loader(ImageDataset(self.probe_records, self.eval_size), shuffle=True, generator=generator)

    def _records(self, name: str) -> Records:
        if getattr(self, name) is None:
            self.setup()
        records: Records = getattr(self, name)
        return records

    def _loader(self, dataset: Dataset[Any], **settings: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self.hparams["batch_size"],
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_one_thread,
            **settings,
        )


class ViewDataset(Dataset[dict[str, Any]]):
    """Views of an image under a key (epoch, index), which with the seed determines every draw.

    Args:
        records: Images, ids and perhaps labels.
        views: The cutting and augmenting.
        seed: Of the draws.
    """

    def __init__(self, records: Records, views: BlockViews, seed: int = 0) -> None:
        self.records = records
        self.views = views
        self.seed = seed

    @property
    def num_blocks(self) -> int:
        """K, which the module's learning-rate scaling reads."""
        return self.views.num_blocks

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Views uint8 (A, K, 3, S, S), image id and, where there are, labels (L,)."""
        epoch, index = key
        generator = np.random.default_rng([self.seed, epoch, index])
        return {"views": self.views(self.records.image(index), generator), **_identity(self.records, index)}


class ImageDataset(Dataset[dict[str, Any]]):
    """Whole images resized to one size, without augmentation.

    Args:
        records: Images, ids and perhaps labels.
        size: Height and width in pixels.
    """

    def __init__(self, records: Records, size: tuple[int, int]) -> None:
        self.records = records
        self.size = size

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Image uint8 (3, H, W), image id and, where there are, labels (L,)."""
        pixels = torch.from_numpy(self.records.image(index)).permute(2, 0, 1)
        return {"image": _resized(pixels, self.size), **_identity(self.records, index)}


class EpochSampler(DistributedSampler[Any]):
    """A DistributedSampler that hands out (epoch, index), so that a worker knows the epoch it draws for.

    As a DistributedSampler it is left in place by the Trainer, which also tells it the epoch.
    """

    def __iter__(self) -> Iterator[Any]:
        epoch = self.epoch
        return ((epoch, index) for index in super().__iter__())


class _Format(NamedTuple):
    records: Callable[[Path, str], Records]
    splits: dict[str, str]


_FORMATS = {
    "synthetic": _Format(lambda root, split: synthetic_scenes(split), {"train": "train", "val": "test"}),
    "coco": _Format(read_coco, {"train": "train2017", "val": "val2017"}),
    "corel5k": _Format(read_corel5k, {"train": "train", "val": "test"}),
    "folder": _Format(lambda root, split: read_folder(root), {"train": "", "val": ""}),
}


def _identity(records: Records, index: int) -> dict[str, Any]:
    identity: dict[str, Any] = {"image_ids": int(records.image_ids[index])}
    if records.labels is not None:
        identity["labels"] = torch.from_numpy(np.array(records.labels[index]))
    return identity


def _resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    if pixels.shape[1:] == size:
        return pixels.contiguous()
    from torchvision.transforms.v2.functional import resize

    resized: Tensor = resize(pixels, list(size), antialias=True)
    return resized


def _height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"eval_size={size} was given: pass height and width in pixels, at least 1 each.")
    return height, width


def _default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, cores - 1))


def _one_thread(_worker: int) -> None:
    """Workers are parallel already: OpenCV's own threads would fight over the same cores."""
    import cv2

    cv2.setNumThreads(0)


def _check_classes(sets: dict[str, Records | None]) -> None:
    labelled = {name: records for name, records in sets.items() if records is not None and records.labels is not None}
    for name, records in labelled.items():
        first_name, first = next(iter(labelled.items()))
        if records.classes != first.classes:
            differing = sorted(set(records.classes) ^ set(first.classes))
            raise ValueError(
                f"{first_name} has {len(first.classes)} classes and {name} has {len(records.classes)}"
                + (f" (only in one of them: {', '.join(differing[:5])})" if differing else " in another order")
                + ": give both the same list of classes."
            )
