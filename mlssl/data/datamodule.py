"""Data module: from records on disk to training and evaluation batches."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from mlssl.choices import DatasetName
from mlssl.data.bad_images import BadImages, check_all_images
from mlssl.data.datasets import EpochSampler, ImageDataset, ViewDataset, collated
from mlssl.data.described import describe
from mlssl.data.formats import read_sets
from mlssl.data.loader import PartialLoader, ResumableLoader
from mlssl.data.option_checks import check_numbers, check_options, height_width
from mlssl.data.records import Records
from mlssl.data.set_checks import check_classes, check_custom, check_presence, check_same_steps, check_steps, remarks_on
from mlssl.data.set_options import SplitOptions, plain_options
from mlssl.data.workers import default_workers, make_loader
from mlssl.distributed import gather_objects
from mlssl.views.blocks import BlockViews
from mlssl.views.branches import plain_branches
from mlssl.views.local_views import plain_local_views
from mlssl.views.regions import plain_regions

AnyLoader = TypeVar("AnyLoader", ResumableLoader, PartialLoader)


class MultiLabelDataModule(L.LightningDataModule):
    """Block-wise augmented view groups for training, whole images for evaluation.

    Views depend only on (seed, epoch, index). A run resumed in mid-epoch continues with the next unused batch.

    Args:
        dataset: Format of ``root``: ``synthetic`` (generated, no files), ``folder`` (unlabelled images), ``coco``,
            ``roboflow``, ``voc``, ``corel5k``, ``manifest`` (a table), or ``shards`` (written by ``mlssl pack``).
        root: Folder in that format, for ``shards`` also a URL; several folders are read as one set.
        batch_size: Images per step and device.
        size: S, side of a view in pixels ≥ 16 (paper: 224).
        rows: Rows ≥ 1 of the block grid (paper: 2).
        cols: Columns ≥ 1 of the block grid (paper: 2).
        overlap: γ in 0–0.5, overlap of blocks as a fraction of the image side (paper: 0.2; its COCO run: 0.3).
        branches: Augmentation: ``paper``, ``soft``, ``gray`` (X-ray), ``overhead`` (aerial), or a list of branches:
            {numbers of a Recipe}, {class_path, init_args}, a .yaml file of albumentations, or an import path.
        regions: Function (height, width) -> boxes of the blocks, or its import path; the grid by default.
        local_views: Additional small views of the whole image: {count, size: 96, area: [0.05, 0.3], branch}.
        eval_size: Height and width, or one side, of whole images for evaluation; ``size`` by default.
        num_workers: Loader processes; by default one less than the cores per device, at least 1 and at most 8.
        timeout: Seconds ≥ 0 to wait for a batch from the workers; 0 waits forever, even if a disk hangs.
        train_split: Split to train on; by default ``train2017`` of COCO, ``2012/trainval`` of VOC, ``train`` of
            Roboflow, Corel-5K, shards and synthetic scenes, the manifest ``train.csv``, all of a ``folder``, whose
            splits are its subfolders. For CVAT ``annotations`` a subset.
        val_split: Split to evaluate on, ``""`` for none; by default ``val2017`` of COCO, ``2007/test`` of VOC, ``test``
            of Corel-5K and synthetic scenes, the manifest ``val.csv``, ``valid`` of Roboflow and ``val`` of shards if
            they exist, none of a ``folder`` and of ``annotations``.
        val_fraction: Fraction in (0, 1) of the images to hold out for evaluation: the same in every run, by path.
        annotations: Instead of ``root``: one or more COCO, Label Studio or CVAT files or manifests.
        images: Folder of the images of ``annotations``; by default the folder of the file.
        val_annotations: Likewise, for the images to evaluate on.
        val_images: Folder of the images of ``val_annotations``; ``images`` by default.
        classes: Names of the classes to keep, in label order; labels of other classes are left out and counted.
        min_images_per_class: Keep only classes with at least this many train and val images, e.g. (40, 4).
        separator: Separator of the class names in a manifest field, such as ";", or " " for blanks; "|" by default.
        path_column: Column of a manifest, or key of Label Studio data, with the paths; ``path`` or similar by default.
        label_columns: Column of a manifest with class names, or one column of 1, 0 and −1 per class; by default
            ``labels``, or all columns if they contain only such values. For Label Studio the controls.
        absent: What else means absent in class columns: −1, ``blank``, or both. With 0, a blank list of names is
            unlabelled.
        white: White level > 0 of gray images of more than 8 bits, such as 4095 for 12 bits; 65535 by default.
        seed: Seed ≥ 0 of order and augmentation.
        on_bad_image: ``stop`` at the first image that cannot be decoded, or ``skip`` it: training batches use another
            image instead, evaluation leaves it out, and all skipped images are listed at the end.
        check_images: Whether to decode every image first, with a progress bar.
        probe: Options of a labelled set for the probe, which trains on its training set; evaluation uses its val set.
        train: Custom records to train on instead of ``dataset``; labels are optional.
        val: Custom records to evaluate on.
        probe_train: Labelled records that the probe trains on, if not the training set.

    Raises:
        ValueError: Invalid numbers, conflicting arguments or records; in ``setup``, unknown splits or sets that do not
            match.
        FileNotFoundError: A file is missing, in ``setup``.
        TypeError: ``train``, ``val`` or ``probe_train`` is not a ``Records``.
    """

    def __init__(
        self,
        dataset: DatasetName = "synthetic",
        root: str | Sequence[str | os.PathLike[str]] | os.PathLike[str] | None = None,
        *,
        batch_size: int = 64,
        size: int = 224,
        rows: int = 2,
        cols: int = 2,
        overlap: float = 0.2,
        branches: str | Sequence[str | dict[str, Any] | Any] = "paper",
        regions: str | dict[str, Any] | Callable[[int, int], Any] | None = None,
        local_views: dict[str, int | Sequence[float] | str | dict[str, Any] | Any] | None = None,
        eval_size: int | tuple[int, int] | None = None,
        num_workers: int | None = None,
        timeout: float = 600.0,
        train_split: str | None = None,
        val_split: str | None = None,
        val_fraction: float | None = None,
        annotations: str | Sequence[str | os.PathLike[str]] | os.PathLike[str] | None = None,
        images: str | os.PathLike[str] | None = None,
        val_annotations: str | Sequence[str | os.PathLike[str]] | os.PathLike[str] | None = None,
        val_images: str | os.PathLike[str] | None = None,
        classes: Sequence[str] | None = None,
        min_images_per_class: tuple[int, int] | None = None,
        separator: str | None = None,
        path_column: str | None = None,
        label_columns: str | Sequence[str] | None = None,
        absent: int | str | Sequence[int | str] | None = None,
        white: float | None = None,
        seed: int = 0,
        on_bad_image: Literal["stop", "skip"] = "stop",
        check_images: bool = False,
        probe: SplitOptions | Mapping[str, Any] | None = None,
        train: Records | None = None,
        val: Records | None = None,
        probe_train: Records | None = None,
    ) -> None:
        given = dict(locals())
        super().__init__()
        check_numbers(batch_size=(batch_size, 1), seed=(seed, 0), num_workers=(num_workers, 0), timeout=(timeout, 0))
        if on_bad_image not in ("stop", "skip"):
            raise ValueError(f"on_bad_image={on_bad_image!r} was given: pass 'stop' or 'skip'.")
        options = plain_options(**{name: given[name] for name in SplitOptions.__dataclass_fields__})
        of_probe = None if probe is None else plain_options(**(vars(probe) if is_dataclass(probe) else probe))
        if train is None:
            if val is not None or probe_train is not None:
                raise ValueError("val or probe_train was given without train: pass train=Records(…) too.")
            check_options(options, of_probe)
        else:
            of_read = {name: value for name, value in vars(options).items() if name != "dataset"}
            check_custom({"train": train, "val": val, "probe_train": probe_train}, {**of_read, "probe": of_probe})
        channels = 3 if train is None else train.channels
        self.views = BlockViews(size, rows, cols, overlap, branches, regions, local_views, channels)
        custom: dict[str, Any] = {
            "branches": plain_branches(branches),
            "regions": plain_regions(regions),
            "local_views": plain_local_views(local_views),
        }
        custom |= asdict(options)  # a Path in a checkpoint would not load with weights_only
        custom["probe"] = of_probe and {name: one for name, one in vars(of_probe).items() if one is not None}
        self.save_hyperparameters(ignore=["train", "val", "probe_train", *custom])
        self.save_hyperparameters(custom)
        self._options, self._probe_options = options, of_probe
        self.eval_size = height_width(size if eval_size is None else eval_size)
        self.train_records = train
        self.val_records = val
        self.probe_records = probe_train
        self._saved_by: dict[str, int] | None = None
        self._bad: dict[str, BadImages] = {}
        self._is_set_up = False
        self._num_reported = 0

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
        """Read the records once and check that the sets match; the loaders call it if needed.

        Raises:
            ValueError: The classes of the sets differ, are too rare or never shown; or with ``check_images`` an image
                is bad.
            FileNotFoundError: A folder or file is missing.
        """
        if self._is_set_up:
            return
        if self.train_records is None:
            train, val, probe = read_sets(self._options, self._probe_options)
            check_classes({"train": train, "val": val, "probe_train": probe})
            self.train_records, self.val_records, self.probe_records = train, val, probe
        else:  # readers have checked their files already
            for _, records in self._sets():
                records.check_files()
        for name, records in self._sets():
            check_presence(name, records)
        if self.hparams["on_bad_image"] == "skip":
            self._bad = {name: BadImages(len(records)) for name, records in self._sets()}
        if self.hparams["check_images"]:
            check_all_images(dict(self._sets()), self._bad, self._num_workers())
        self._is_set_up = True

    def description(self) -> list[tuple[str, str]]:
        """Rows printed at the start of a run: (name of a set, sentence about it), then remarks under an empty name."""
        rows = []
        self.setup()
        for name, records in self._sets():
            rows += [(name, describe(records)), *(("", sentence) for sentence in remarks_on(name, records))]
        return rows

    @property
    def skipped_images(self) -> dict[str, list[Path]]:
        """Paths per set that this machine's processes could not decode and have skipped so far."""
        sets = dict(self._sets())
        return {name: [sets[name].path(index) for index in bad.indices()] for name, bad in self._bad.items()}

    def teardown(self, stage: str | None = None) -> None:  # noqa: ARG002  Lightning names it
        """Report the skipped images at the end of a run."""
        if self._bad:
            self._report_skipped(gather_objects(self.skipped_images))

    def on_exception(self, exception: BaseException) -> None:  # noqa: ARG002
        """Report the skipped images of a run that fails."""
        self._report_skipped([self.skipped_images])

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of views, boxes, image ids, and optionally labels and local views: see ``ViewBatch``.

        Raises:
            ValueError: The training set is smaller than one step.
        """
        train, _ = self._records()
        devices = self.trainer.world_size if self.trainer else 1
        check_steps(len(train), self.hparams["batch_size"], devices)
        dataset = ViewDataset(train, self.views, self.hparams["seed"], self._bad.get("train"))
        sampler = EpochSampler(
            dataset,
            num_replicas=devices,
            rank=self.trainer.global_rank if self.trainer else 0,
            seed=self.hparams["seed"],
            drop_last=True,
        )
        loader = self._loader(dataset, kind=ResumableLoader, sampler=sampler, drop_last=True, keep_workers=True)
        if self.trainer:
            loader.steps_done = self._steps_done
        return loader

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Whole images of the val records, see ``ImageBatch``; empty without val records."""
        return [] if self._records()[1] is None else self.image_dataloader("val")

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> DataLoader[Any]:
        """Whole images of the val records, or else of the training records."""
        return self.image_dataloader("train" if self._records()[1] is None else "val")

    def image_dataloader(self, split: Literal["train", "val"]) -> DataLoader[Any]:
        """Whole images of a set in a fixed order without augmentation, as for linear evaluation.

        Raises:
            ValueError: The set does not exist.
        """
        train, val = self._records()
        records = {"train": train, "val": val}.get(split)
        if records is None:
            raise ValueError(f"There are no {split!r} images: pass 'train', or 'val' if there is a val set.")
        return self._image_loader(ImageDataset(records, self.eval_size, self._bad.get(split)))

    def probe_dataloader(self) -> DataLoader[Any] | None:
        """Whole images of ``probe_train``, all of them on every device; None without ``probe_train``.

        Their order depends on the seed and the current epoch.
        """
        self._records()  # set up
        if self.probe_records is None:
            return None
        dataset = ImageDataset(self.probe_records, self.eval_size, self._bad.get("probe_train"))
        sampler: DistributedSampler[Any] = DistributedSampler(
            dataset, num_replicas=1, rank=0, seed=self.hparams["seed"]
        )
        sampler.set_epoch(self.trainer.current_epoch if self.trainer else 0)
        return self._image_loader(dataset, sampler=sampler)

    def _records(self) -> tuple[Records, Records | None]:
        self.setup()
        assert self.train_records is not None
        return self.train_records, self.val_records

    def state_dict(self) -> dict[str, int]:
        """Images, and images per step over all devices: what a position in an epoch depends on."""
        return {"images": len(self._records()[0]), "images_per_step": self._images_per_step()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Keep the checkpoint's values until it is known whether it was saved in mid-epoch."""
        self._saved_by = state_dict

    def _images_per_step(self) -> int:
        batch_size: int = self.hparams["batch_size"]
        return batch_size * (self.trainer.world_size if self.trainer else 1)

    def _end(self) -> SIGTERMException | None:
        """Exception to raise after SIGTERM, received by the Trainer or, on several devices, by ``RunCheckpoint``."""
        assert self.trainer is not None
        savers = self.trainer.checkpoint_callbacks
        asked = self.trainer.received_sigterm or any(getattr(saver, "is_asked_to_end", False) for saver in savers)
        return SIGTERMException() if asked else None

    def _steps_done(self) -> int:
        """Steps of this epoch already done; above 0 after a resume in mid-epoch."""
        assert self.trainer is not None
        steps = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if steps and self._saved_by is not None:
            check_same_steps(steps, self._saved_by, self.state_dict())
        return steps

    def _sets(self) -> Iterator[tuple[str, Records]]:
        """The existing sets, by argument name."""
        for name, records in (
            ("train", self.train_records),
            ("val", self.val_records),
            ("probe_train", self.probe_records),
        ):
            if records is not None:
                yield name, records

    def _report_skipped(self, parts: Sequence[dict[str, list[Path]]]) -> None:
        paths = sorted({path for part in parts for of_set in part.values() for path in of_set})
        if len(paths) > self._num_reported:
            self._num_reported = len(paths)
            listed = "".join(f"\n  {path}" for path in paths)
            rank_zero_warn(f"{len(paths)} images could not be decoded and were skipped:{listed}")

    def _num_workers(self) -> int:
        given: int | None = self.hparams["num_workers"]
        return default_workers(self.trainer.num_devices if self.trainer else 1) if given is None else given

    def _image_loader(self, dataset: ImageDataset, **settings: Any) -> DataLoader[Any]:
        return self._loader(dataset, kind=PartialLoader, collate_fn=collated, **settings)

    def _loader(
        self,
        dataset: Dataset[Any],
        *,
        keep_workers: bool = False,
        kind: type[AnyLoader],
        **settings: Any,
    ) -> AnyLoader:
        settings |= {"timeout": self.hparams["timeout"], "keep_workers": keep_workers}
        loader = make_loader(kind, dataset, self.hparams["batch_size"], self._num_workers(), **settings)
        if self.trainer:
            loader.end = self._end
        return loader
