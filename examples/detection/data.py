"""COCO's and VOC's boxes, one image at a time, as torchvision's detectors take them."""

import json
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as coco_masks
from torch.utils.data import Dataset

from mlssl.data.records import decode_rgb


class Boxes(Dataset):
    """Images (3, H, W) in 0–1 with boxes (n, 4) left, top, right, bottom in pixels and labels from 1; 0 is background.

    Args:
        entries: Path of an image → its objects, dicts of box, label, ignore and, for masks, COCO's segmentation.
        classes: Names, in the order of the labels.
        training: Flip half of the images, and leave out ignored objects and images without any other.
        with_masks: Whether targets have masks (n, H, W).
    """

    def __init__(self, entries: dict[Path, list[dict]], classes: list[str], training: bool, with_masks: bool) -> None:
        if training:
            kept = {path: [one for one in objects if not one["ignore"]] for path, objects in entries.items()}
            entries = {path: objects for path, objects in kept.items() if objects}
        self.entries = list(entries.items())
        self.classes = classes
        self.training = training
        self.with_masks = with_masks

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        path, objects = self.entries[index]
        image = torch.from_numpy(decode_rgb(path)).permute(2, 0, 1) / 255
        height, width = image.shape[1:]
        target = {
            "boxes": torch.tensor([one["box"] for one in objects], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([one["label"] for one in objects], dtype=torch.int64),
            "iscrowd": torch.tensor([one["ignore"] for one in objects], dtype=torch.int64),
        }
        if self.with_masks:
            masks = [drawn(one["segmentation"], height, width) for one in objects]
            target["masks"] = torch.from_numpy(np.array(masks, np.uint8).reshape(-1, height, width))
        if self.training and torch.rand(()) < 0.5:
            image = image.flip(2)
            target["boxes"][:, [0, 2]] = width - target["boxes"][:, [2, 0]]
            if self.with_masks:
                target["masks"] = target["masks"].flip(2)
        return image, target


def drawn(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """A mask (H, W) of COCO's polygons or run lengths."""
    if isinstance(segmentation, list):
        coded = coco_masks.merge(coco_masks.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        coded = coco_masks.frPyObjects(segmentation, height, width)
    else:
        coded = segmentation
    return coco_masks.decode(coded)


def read_coco(root: str, split: str, training: bool, with_masks: bool = False) -> Boxes:
    """root/annotations/instances_<split>.json and root/<split>/<file_name>; crowds are ignored."""
    content = json.loads((Path(root) / "annotations" / f"instances_{split}.json").read_bytes())
    categories = sorted(content["categories"], key=lambda one: one["id"])
    labels = {one["id"]: label for label, one in enumerate(categories, start=1)}
    objects = defaultdict(list)
    for one in content["annotations"]:
        left, top, width, height = one["bbox"]
        if width >= 1 and height >= 1:
            box = [left, top, left + width, top + height]
            entry = {"box": box, "label": labels[one["category_id"]], "ignore": one.get("iscrowd", 0)}
            objects[one["image_id"]].append(entry | {"segmentation": one.get("segmentation")})
    entries = {Path(root) / split / image["file_name"]: objects[image["id"]] for image in content["images"]}
    return Boxes(entries, [one["name"] for one in categories], training, with_masks)


def read_voc(root: str, splits: list[str], training: bool) -> Boxes:
    """root/VOC<year>/{Annotations,ImageSets/Main,JPEGImages}, splits such as "2007/trainval"; ignores the difficult."""
    entries = {}
    for split in splits:
        year, name = split.split("/")
        folder = Path(root) / f"VOC{year}"
        for stem in (folder / "ImageSets" / "Main" / f"{name}.txt").read_text().split():
            tree = ElementTree.parse(folder / "Annotations" / f"{stem}.xml")
            entries[folder / "JPEGImages" / f"{stem}.jpg"] = [voc_object(one) for one in tree.iter("object")]
    return Boxes(entries, VOC_CLASSES, training, with_masks=False)


def voc_object(element: ElementTree.Element) -> dict:
    left, top, right, bottom = (float(element.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
    return {
        "box": [left - 1, top - 1, right, bottom],  # VOC counts pixels from 1, and the last is inside
        "label": 1 + VOC_CLASSES.index(element.findtext("name")),
        "ignore": int(element.findtext("difficult", "0")),
    }


# fmt: off
VOC_CLASSES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]
