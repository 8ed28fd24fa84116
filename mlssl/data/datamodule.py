"""From records on disk to the batches that the module trains on and the callbacks evaluate."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from mlssl.data.coco import read_coco
from mlssl.data.corel5k import frequent_labels, read_corel5k
from mlssl.data.datasets import EpochSampler, ImageDataset, ViewDataset
from mlssl.data.files import read_folder
from mlssl.data.loader import ResumableLoader
from mlssl.data.records import Records
from mlssl.data.synthetic import synthetic_scenes
from mlssl.views.blocks import BlockViews

DatasetName = Literal["synthetic", "coco", "corel5k", "folder"]

NUM_SCENES = {"train": 2000, "test": 500}
"""Synthetic scenes of a split: a few minutes of training, and a test set that is read in seconds."""

MAX_WORKERS = 8
"""Worker processes at most, where the user does not say, so that a run does not take all of a large machine."""


class MultiLabelDataModule(L.LightningDataModule):
    """Block-wise augmented view groups for training, whole images for evaluation.

    The views of an image depend on (seed, epoch, index) alone: number of workers, devices and a resume change nothing.
    A run that is resumed in the middle of an epoch goes on with the batch after the last one that was used.

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
        num_workers: Loader processes; by default one less than a device's share of the cores, at least 1 and at most 8.
        timeout: Seconds ≥ 0 that loader processes may take for a batch; 0 waits for ever, also for a disk that hangs.
        train_split: Split to train on; by default ``train2017`` of COCO, ``train`` of Corel-5K and drawn scenes, the
            whole of a ``folder``, whose splits are the folders in it.
        val_split: Split to evaluate on, ``""`` for none; by default ``val2017`` of COCO, ``test`` of Corel-5K and the
            drawn scenes, none of a ``folder``.
        min_images_per_class: Keep only classes with at least so many train and so many val images, e.g. (40, 4).
        seed: Of order and augmentation, at least 0.
        train: Records of one's own to train on, instead of ``dataset``; labels are optional.
        val: Records of one's own to evaluate on.
        probe_train: Labelled records that the probe learns from, where they are not the training set.

    Raises:
        ValueError: On numbers and formats that do not exist, and on arguments and records of one's own that do not fit
            together; on unknown splits and sets that do not fit together once they are read, in ``setup``.
        TypeError: If ``train``, ``val`` or ``probe_train`` are no ``Records``.
    """

    def __init__(
        self,
        dataset: DatasetName = "synthetic",
        root: str | os.PathLike[str] | None = None,
        *,
        batch_size: int = 64,
        size: int = 224,
        rows: int = 2,
        cols: int = 2,
        overlap: float = 0.2,
        eval_size: int | tuple[int, int] | None = None,
        num_workers: int | None = None,
        timeout: float = 600,
        train_split: str | None = None,
        val_split: str | None = None,
        min_images_per_class: tuple[int, int] | None = None,
        seed: int = 0,
        train: Records | None = None,
        val: Records | None = None,
        probe_train: Records | None = None,
    ) -> None:
        super().__init__()
        root = None if root is None else os.fspath(root)  # a Path in a checkpoint would not load with weights_only
        _check_numbers(batch_size=(batch_size, 1), seed=(seed, 0), num_workers=(num_workers, 0), timeout=(timeout, 0))
        if train is None:
            _check_source(dataset, root, val, probe_train)
        else:
            _check_own(
                {"train": train, "val": val, "probe_train": probe_train},
                root=root,
                train_split=train_split,
                val_split=val_split,
                min_images_per_class=min_images_per_class,
            )
        self.save_hyperparameters(ignore=["train", "val", "probe_train"])
        self.views = BlockViews(size, rows, cols, overlap)
        self.eval_size = _height_width(size if eval_size is None else eval_size)
        self.train_records = train
        self.val_records = val
        self.probe_records = probe_train
        self._saved_by: dict[str, int] | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the L labels; empty without labels or before ``setup``."""
        sets = (self.train_records, self.val_records, self.probe_records)
        return next((records.classes for records in sets if records is not None and records.classes), ())

    @property
    def num_labels(self) -> int:
        """L; 0 without labels or before ``setup``."""
        return len(self.classes)

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002  Lightning names it
        """Read the records, once, and check that they fit together; every loader asks for it where nobody did.

        Raises:
            ValueError: If the sets name different classes, or none is frequent enough.
            FileNotFoundError: If a folder or file is missing (by the reader).
        """
        if self.train_records is None:
            train, val = self._read()
            _check_classes({"train": train, "val": val})
            self.train_records, self.val_records = train, val

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of views (B, A, K, 3, S, S), image ids and, where there are, labels: see ``ViewBatch``.

        Raises:
            ValueError: If the training set fills no step.
        """
        train, _ = self._records()
        devices = self.trainer.world_size if self.trainer else 1
        _check_steps(len(train), self.hparams["batch_size"], devices)
        dataset = ViewDataset(train, self.views, self.hparams["seed"])
        sampler = EpochSampler(
            dataset,
            num_replicas=devices,
            rank=self.trainer.global_rank if self.trainer else 0,
            seed=self.hparams["seed"],
            drop_last=True,
        )
        loader = self._loader(dataset, kind=ResumableLoader, sampler=sampler, drop_last=True, keep_workers=True)
        assert isinstance(loader, ResumableLoader)
        if self.trainer:
            loader.steps_done = self._steps_done
        return loader

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Whole images of the val records, see ``ImageBatch``; nothing where there are none."""
        return [] if self._records()[1] is None else self.image_dataloader("val")

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> DataLoader[Any]:
        """Whole images of the val records, or of the training records where there are none."""
        return self.image_dataloader("train" if self._records()[1] is None else "val")

    def image_dataloader(self, split: Literal["train", "val"]) -> DataLoader[Any]:
        """Whole images of a set in a fixed order without augmentation, as linear evaluation takes them.

        Raises:
            ValueError: If there are no such records.
        """
        train, val = self._records()
        records = {"train": train, "val": val}.get(split)
        if records is None:
            raise ValueError(f"There are no {split!r} images: pass 'train', or 'val' where there is a val set.")
        return self._loader(ImageDataset(records, self.eval_size))

    def probe_dataloader(self) -> DataLoader[Any] | None:
        """Whole images of ``probe_train``, all of them on every device; None where it was not given.

        Their order depends on the seed and on the epoch in which the loader is asked for.
        """
        if self.probe_records is None:
            return None
        dataset = ImageDataset(self.probe_records, self.eval_size)
        sampler: DistributedSampler[Any] = DistributedSampler(
            dataset, num_replicas=1, rank=0, seed=self.hparams["seed"]
        )
        sampler.set_epoch(self.trainer.current_epoch if self.trainer else 0)
        return self._loader(dataset, sampler=sampler)

    def _read(self) -> tuple[Records, Records | None]:
        hparams = self.hparams
        source = _FORMATS[hparams["dataset"]]
        root = Path(hparams["root"] or ".")
        val_split = source.val if hparams["val_split"] is None else hparams["val_split"]
        train = source.read(root, source.train if hparams["train_split"] is None else hparams["train_split"])
        val = source.read(root, val_split) if val_split else None
        least = hparams["min_images_per_class"]
        if least is None:
            return train, val
        if val is None:
            raise ValueError(f"min_images_per_class={least} counts val images too, and there are none: leave it out.")
        kept = frequent_labels(train, val, *least)
        if not kept:
            raise ValueError(f"No class has {least[0]} train and {least[1]} val images: lower min_images_per_class.")
        return train.with_classes(kept), val.with_classes(kept)

    def _records(self) -> tuple[Records, Records | None]:
        if self.train_records is None:
            self.setup()
        assert self.train_records is not None
        return self.train_records, self.val_records

    def state_dict(self) -> dict[str, int]:
        """What the place in an epoch depends on, kept in checkpoints: images, and those of a step over all devices."""
        return {"images": len(self._records()[0]), "images_per_step": self._images_per_step()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Keep what the checkpoint counted by until it is known whether it ends in the middle of an epoch."""
        self._saved_by = state_dict

    def _images_per_step(self) -> int:
        batch_size: int = self.hparams["batch_size"]
        return batch_size * (self.trainer.world_size if self.trainer else 1)

    def _steps_done(self) -> int:
        """Steps of this epoch that the Trainer has behind it, more than 0 where it goes on from a checkpoint."""
        assert self.trainer is not None
        steps = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        now = {"images": len(self._records()[0]), "images_per_step": self._images_per_step()}
        saved = self._saved_by
        if steps and saved is not None and saved != now:
            raise ValueError(
                f"The checkpoint was saved after {steps} steps of an epoch, with {saved['images_per_step']} of "
                f"{saved['images']} images a step, and now a step takes {now['images_per_step']} of {now['images']}: "
                "keep batch_size × devices and the images, or go on from a checkpoint at the end of an epoch."
            )
        return steps

    def _loader(
        self,
        dataset: Dataset[Any],
        *,
        keep_workers: bool = False,
        kind: type[DataLoader[Any]] = DataLoader,
        **settings: Any,
    ) -> DataLoader[Any]:
        workers = self.hparams["num_workers"]
        if workers is None:
            workers = _default_workers(self.trainer.num_devices if self.trainer else 1)
        return kind(
            dataset,
            batch_size=self.hparams["batch_size"],
            num_workers=workers,
            persistent_workers=keep_workers and workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_one_thread,
            timeout=self.hparams["timeout"] if workers else 0,
            generator=torch.Generator(),  # else every pass over a loader would draw from the model's random state
            **settings,
        )


class _Format(NamedTuple):
    read: Callable[[Path, str], Records]
    train: str
    val: str


_FORMATS = {
    "synthetic": _Format(lambda _root, split: synthetic_scenes(split, count=NUM_SCENES.get(split, 1)), "train", "test"),
    "coco": _Format(read_coco, "train2017", "val2017"),
    "corel5k": _Format(read_corel5k, "train", "test"),
    "folder": _Format(lambda root, split: read_folder(root / split), "", ""),
}


def _height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    both = (size, size) if isinstance(size, int) else tuple(size)
    if len(both) != 2 or min(both) < 1:
        raise ValueError(f"eval_size={size} was given: pass height and width in pixels, at least 1 each.")
    return both


def _default_workers(devices: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, cores // devices - 1))


def _one_thread(_worker: int) -> None:
    """Workers are parallel already: OpenCV's own threads would fight over the same cores."""
    import cv2

    cv2.setNumThreads(0)


def _check_numbers(**numbers: tuple[float | None, int]) -> None:
    for name, (value, least) in numbers.items():
        if value is not None and value < least:
            raise ValueError(f"{name}={value} was given: pass a number of at least {least}.")


def _check_source(dataset: str, root: str | None, val: Records | None, probe_train: Records | None) -> None:
    if val is not None or probe_train is not None:
        raise ValueError("val or probe_train was given without train: pass train=Records(…) too.")
    if dataset not in _FORMATS:
        raise ValueError(f"dataset={dataset!r} is unknown: pass one of {', '.join(_FORMATS)}, or train=Records(…).")
    if root is None and dataset != "synthetic":
        raise ValueError(f"dataset={dataset!r} needs the folder that holds it: pass root (--data.root FOLDER).")
    if root is not None and dataset == "synthetic":
        others = ", ".join(name for name in _FORMATS if name != "synthetic")
        raise ValueError(f"root={root!r} was given, and drawn scenes have no files: say which dataset it is, {others}.")


def _check_own(sets: dict[str, Records | None], **of_files: object) -> None:
    for name, records in sets.items():
        if records is not None and not isinstance(records, Records):
            raise TypeError(
                f"{name} is of type {type(records).__name__}: pass mlssl.Records(paths, labels, classes), "
                "or train the module on a loader of your own."
            )
    given = [name for name, value in of_files.items() if value is not None]
    if given:
        raise ValueError(f"{given[0]} and train were given: {given[0]} is for a dataset that is read, leave out one.")
    probe_train = sets["probe_train"]
    if probe_train is not None and probe_train.labels is None:
        raise ValueError(f"probe_train is {probe_train!r}: pass labelled records, or leave it out.")
    _check_classes(sets)


def _check_steps(num_images: int, batch_size: int, devices: int) -> None:
    step = batch_size * devices
    if num_images < step:
        raise ValueError(
            f"The training set has {num_images} images, and a step takes {step} "
            f"(batch_size {batch_size} on {devices} device(s)): pass a smaller batch_size."
        )
    if num_images % step:
        rank_zero_info(
            f"{num_images} images fill {num_images // step} steps of {step}: the other {num_images % step} sit out "
            "an epoch, different ones each time."
        )


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
