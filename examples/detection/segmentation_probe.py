"""What each position of a backbone's last feature map knows: a linear layer on it labels every pixel, scored by mIoU.

`python examples/detection/segmentation_probe.py --root FOLDER --sources '[resnet18, ours.safetensors]'`

FOLDER contains COCO (annotations/, train2017/, val2017/) or VOC (VOC2012/ with SegmentationClass/). A source is what
`mlssl linear` takes: a run, an exported file, NAME=FILE, published weights, or a NAME alone, which is untrained. The
backbone stays as it is. Needs `pip install 'mlssl[detection]'`.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from data import VOC_CLASSES, drawn
from jsonargparse import auto_cli
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision.transforms.v2.functional import InterpolationMode, resize

from mlssl.backbones import check_image_size, feature_width
from mlssl.commands.evaluation import open_backbones
from mlssl.data.decoding import decode_rgb
from mlssl.feature_maps import feature_map
from mlssl.optim import cosine_with_warmup
from mlssl.weights.sources import Backbone

VOID = 255
"""Of pixels that are not learned from and not scored: VOC's borders, COCO's crowds."""


class Masks(NamedTuple):
    """Images with the class (H, W) of each pixel, uint8; class 0 is the background.

    Attributes:
        paths: Of the images.
        mask: From an index and the image's height and width to its classes.
        classes: Names, background first.
    """

    paths: list[Path]
    mask: Callable[[int, int, int], np.ndarray]
    classes: list[str]


class Resized(Dataset):
    """Images uint8 (3, S, S) and their masks (S, S); half of them flipped in training."""

    def __init__(self, masks: Masks, size: int, training: bool) -> None:
        self.masks, self.size, self.training = masks, [size, size], training

    def __len__(self) -> int:
        return len(self.masks.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(decode_rgb(self.masks.paths[index])).permute(2, 0, 1)
        mask = torch.from_numpy(self.masks.mask(index, *pixels.shape[1:]))[None]
        pixels = resize(pixels, self.size, antialias=True)
        mask = resize(mask, self.size, InterpolationMode.NEAREST)[0]
        if self.training and torch.rand(()) < 0.5:
            pixels, mask = pixels.flip(2), mask.flip(1)
        return pixels, mask.long()


class SegmentationProbe(L.LightningModule):
    """A linear layer on the standardised last feature map, whose scores are resized to the image."""

    def __init__(self, model: Backbone, num_classes: int, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model.frozen().train(), lr  # Lightning warns of eval mode; `forward` sets it
        width = feature_width(model.backbone)
        self.head = nn.Sequential(nn.BatchNorm2d(width, affine=False), nn.Conv2d(width, num_classes, 1))
        self.iou = MulticlassJaccardIndex(num_classes, ignore_index=VOID)

    def forward(self, images: Tensor) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            places = feature_map(self.model.backbone, self.model.normalize(images))
        return F.interpolate(self.head(places), images.shape[-2:], mode="bilinear", align_corners=False)

    def training_step(self, batch, batch_idx):
        images, masks = batch
        loss = F.cross_entropy(self(images), masks, ignore_index=VOID, reduction="sum") / (masks != VOID).sum().clamp(1)
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch, batch_idx):
        images, masks = batch
        self.iou(self(images).argmax(1), masks)
        self.log("mIoU", self.iou, on_epoch=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.head.parameters(), self.lr)
        cosine = cosine_with_warmup(int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(
    root: str,
    sources: list[str],
    dataset: Literal["coco", "voc"] = "coco",
    train_split: str | None = None,
    test_split: str | None = None,
    size: int = 224,
    epochs: int = 20,
    batch_size: int = 16,
    lr: float = 0.001,
    num_workers: int = 4,
    seed: int = 0,
    boxes: bool = False,
) -> None:
    """Train a linear layer on each backbone, score the test split once, print a table.

    Args:
        root: Folder of the data set.
        sources: Runs, checkpoints, exported files, NAME=FILE, NAME.TAG, NAME:pretrained, or NAME (untrained).
        dataset: Its layout.
        train_split: train2017 by default, of VOC 2012/train.
        test_split: val2017 by default, of VOC 2012/val.
        size: Side of images and masks in pixels.
        epochs: Passes over the training images.
        batch_size: Images per step.
        lr: Peak learning rate of AdamW; features are standardised, so one fits all backbones.
        num_workers: Loader processes.
        seed: Of untrained weights, order and flips.
        boxes: Whether COCO's annotations without a mask are painted as their boxes, which scores coarse regions.
    """
    read, splits = {
        "coco": (partial(read_coco_masks, boxes=boxes), ("train2017", "val2017")),
        "voc": (read_voc_masks, ("2012/train", "2012/val")),
    }[dataset]
    train, test = (
        read(Path(root), given or default) for given, default in zip((train_split, test_split), splits, strict=True)
    )
    if train.classes != test.classes:
        raise ValueError(
            f"{len(train.classes)} and {len(test.classes)} classes in the two splits: give the same to both"
        )
    models = open_backbones(sources, seed)
    for model in models.values():
        check_image_size(model.backbone, size, size)
    settings = {"batch_size": batch_size, "num_workers": num_workers}
    rows = []
    for name, model in models.items():
        L.seed_everything(seed, verbose=False)
        probe = SegmentationProbe(model, len(train.classes), lr)
        trainer = L.Trainer(
            max_epochs=epochs, devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False
        )
        trainer.fit(probe, DataLoader(Resized(train, size, training=True), shuffle=True, **settings))
        (scores,) = trainer.test(probe, DataLoader(Resized(test, size, training=False), **settings), verbose=False)
        rows.append(f"| {name} | {100 * scores['mIoU']:.1f} |")
    print(
        f"{dataset}, {len(train.paths)} training and {len(test.paths)} test images of {size} × {size} pixels, "
        f"{len(train.classes)} classes with the background, {epochs} epochs\n"
    )
    print("| weights | mIoU |", "|---|---|", *rows, sep="\n")


def read_coco_masks(root: Path, split: str, boxes: bool = False) -> Masks:
    """root/annotations/instances_<split>.json: objects of all categories, small ones above large ones; crowds void."""
    path = root / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_bytes())
    bare = [one for one in content["annotations"] if not one.get("segmentation")]
    if bare and not boxes:
        raise ValueError(
            f"{len(bare)} of {len(content['annotations'])} annotations of {path} have no segmentation, first id "
            f"{bare[0]['id']}: use annotations with masks, or pass --boxes true to paint their boxes"
        )
    categories = sorted(content["categories"], key=lambda one: one["id"])
    number = {one["id"]: place for place, one in enumerate(categories, start=1)}
    objects = defaultdict(list)
    for one in content["annotations"]:
        objects[one["image_id"]].append(one)

    def mask(index: int, height: int, width: int) -> np.ndarray:
        classes = np.zeros((height, width), np.uint8)
        # Crowds are painted below all objects.
        order = sorted(objects[content["images"][index]["id"]], key=lambda one: (-one.get("iscrowd", 0), -area(one)))
        for one in order:
            inside = drawn(one.get("segmentation") or [corners(one["bbox"])], height, width).astype(bool)
            classes[inside] = VOID if one.get("iscrowd") else number[one["category_id"]]
        return classes

    paths = [root / split / image["file_name"] for image in content["images"]]
    return Masks(paths, mask, ["background", *(one["name"] for one in categories)])


def corners(box: list[float]) -> list[float]:
    """A box (left, top, width, height) as a polygon."""
    left, top, width, height = box
    return [left, top, left + width, top, left + width, top + height, left, top + height]


def area(annotation: dict) -> float:
    _, _, width, height = annotation["bbox"]
    return annotation.get("area", width * height)


def read_voc_masks(root: Path, split: str) -> Masks:
    """root/VOC<year>/{ImageSets/Segmentation,JPEGImages,SegmentationClass}, a split such as "2012/train"."""
    year, name = split.split("/")
    folder = root / f"VOC{year}"
    stems = (folder / "ImageSets" / "Segmentation" / f"{name}.txt").read_text().split()

    def mask(index: int, height: int, width: int) -> np.ndarray:
        path = folder / "SegmentationClass" / f"{stems[index]}.png"
        with Image.open(path) as image:
            classes = np.array(image)  # numbers of the palette
        if classes.shape != (height, width) or ((classes > len(VOC_CLASSES)) & (classes != VOID)).any():
            raise ValueError(
                f"{path} has shape {classes.shape} and values to {classes.max()}: give numbers of VOC's "
                f"{len(VOC_CLASSES)} classes, 0 or {VOID} in an image of {height} × {width} pixels"
            )
        return classes.astype(np.uint8)

    return Masks([folder / "JPEGImages" / f"{stem}.jpg" for stem in stems], mask, ["background", *VOC_CLASSES])


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
