r"""Object detection from a pre-trained backbone: train torchvision's R-CNN from each of several weights, and compare.

    python examples/detection/train.py --config examples/detection/coco_1x.yaml --root FOLDER \
        --weights '[scratch, ours.safetensors, others.safetensors]'

FOLDER has COCO (annotations/, train2017/, val2017/) or VOC (VOC2007/, VOC2012/). A weights file is one of timm's for
the backbone: `mlssl export last.ckpt -o ours.safetensors` writes one, any other makes a further row of the table.
Needs `pip install 'mlssl[detection]'`.
"""

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from data import Boxes, read_coco, read_voc
from detectors import SCRATCH, build_detector
from jsonargparse import auto_cli
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from torchmetrics.detection import MeanAveragePrecision

from mlssl.optim import parameter_groups

AVERAGED = 10
"""Steps at the start and at the end whose mean losses are in the table."""

COLUMNS = {"AP": "map", "AP50": "map_50", "AP75": "map_75"}


class DetectorTraining(L.LightningModule):
    """A detector under SGD with warm-up and steps, scored as COCO scores."""

    def __init__(self, detector, lr: float, warmup: int, milestones: list[int], with_masks: bool) -> None:
        super().__init__()
        self.detector = detector
        self.lr = lr
        self.warmup = warmup
        self.milestones = milestones
        kinds = ("bbox", "segm") if with_masks else ("bbox",)
        self.precision = MeanAveragePrecision(iou_type=kinds, backend="pycocotools")
        self.first_losses: list[torch.Tensor] = []
        self.last_losses: deque[torch.Tensor] = deque(maxlen=AVERAGED)

    def training_step(self, batch, batch_idx):
        losses = self.detector(*batch)
        loss = sum(losses.values())
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {self.global_step}: lower lr, or warm up longer."
            )
        if len(self.first_losses) < AVERAGED:
            self.first_losses.append(loss.detach())
        self.last_losses.append(loss.detach())
        self.log("loss", loss, prog_bar=True, batch_size=len(batch[0]))
        self.log_dict({name: value.detach() for name, value in losses.items()}, batch_size=len(batch[0]))
        return loss

    def test_step(self, batch, batch_idx):
        images, targets = batch
        found = self.detector(images)
        for one in found:
            if "masks" in one:
                one["masks"] = one["masks"][:, 0] > 0.5
        self.precision.update(found, targets)

    def on_test_epoch_end(self):
        scores = self.precision.compute()
        self.log_dict({name: value for name, value in scores.items() if name.split("_")[-1] in ("map", "50", "75")})
        self.precision.reset()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(parameter_groups(self.detector.parameters(), 1e-4), self.lr, momentum=0.9)

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / (self.warmup + 1))
            return warm * 0.1 ** sum(step >= milestone for milestone in self.milestones)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(
    root: str,
    dataset: Literal["coco", "voc"] = "coco",
    train_splits: list[str] = ["train2017"],  # noqa: B006  auto_cli reads it, nobody writes to it
    test_splits: list[str] = ["val2017"],  # noqa: B006
    weights: list[str] = [SCRATCH],  # noqa: B006
    backbone: str = "resnet50",
    head: Literal["fpn", "c4"] = "fpn",
    masks: bool = False,
    steps: int = 90000,
    milestones: list[int] = [60000, 80000],  # noqa: B006
    warmup: int = 1000,
    batch_size: int = 16,
    lr: float = 0.02,
    min_sizes: list[int] = [640, 672, 704, 736, 768, 800],  # noqa: B006
    max_size: int = 1333,
    regions: int = 512,
    num_workers: int = 4,
    devices: int = 1,
    precision: str = "32-true",
    seed: int = 0,
    out: Path = Path("detection"),
) -> None:
    """Train from each of the weights, score the test split once, print a table.

    Args:
        root: Folder of the data set.
        dataset: Its layout.
        train_splits: Such as train2017, or 2007/trainval and 2012/trainval.
        test_splits: Such as val2017, or 2007/test.
        weights: "scratch", or weights files of timm; a row for each.
        backbone: Any timm name with stages; a ResNet for c4.
        head: FPN, or C4, whose last stage processes each region.
        masks: Train and score masks too, which VOC's boxes lack.
        steps: Optimizer steps.
        milestones: Steps at which the learning rate falls to a tenth.
        warmup: Steps of linearly rising learning rate.
        batch_size: Images a step over all devices.
        lr: Learning rate at its peak, for this batch_size.
        min_sizes: Shorter side of the images, drawn for each in training; the last is that of the test.
        max_size: Longer side at most.
        regions: Of each image, that the head learns from in a step.
        num_workers: Loader processes.
        devices: Processors or GPUs; batch norms are those of all of them.
        precision: Of the Trainer, such as 16-mixed or bf16-mixed.
        seed: Of fresh weights, order and flips, the same for all rows.
        out: Losses of every tenth step go to a folder here.
    """
    for file in weights:
        if file != SCRATCH and not Path(file).is_file():
            raise FileNotFoundError(f"No weights stand at {file}: give a file, or {SCRATCH!r}.")
    train = read(dataset, root, train_splits, training=True, with_masks=masks)
    test = read(dataset, root, test_splits, training=False, with_masks=masks)
    sizes = {"min_size": tuple(min_sizes), "max_size": max_size, "box_batch_size_per_image": regions}
    for file in weights:
        build_detector(backbone, file, len(train.classes), head, masks, **sizes)  # refused before a row is trained
    columns = COLUMNS | ({"mask AP": "segm_map"} if masks else {})
    rows = []
    for file in weights:
        name = file if file == SCRATCH else Path(file).stem
        L.seed_everything(seed, verbose=False)
        detector = build_detector(backbone, file, len(train.classes), head, masks, **sizes)
        trainer = L.Trainer(
            max_steps=steps,
            max_epochs=-1,
            devices=devices,
            precision=precision,
            sync_batchnorm=devices > 1,
            logger=CSVLogger(out, name=name),
            log_every_n_steps=min(10, steps),
            enable_checkpointing=False,
        )
        model = DetectorTraining(detector, lr, warmup, milestones, masks)
        loader = {"collate_fn": as_lists, "num_workers": num_workers, "batch_size": max(1, batch_size // devices)}
        trainer.fit(model, DataLoader(train, shuffle=True, drop_last=True, **loader))
        scores = trainer.test(model, DataLoader(test, **loader), verbose=False)[0]
        # torchmetrics names the scores by their kind where there are two.
        found = [scores[column if column in scores else f"bbox_{column}"] for column in columns.values()]
        cells = [f"{mean(losses):.2f}" for losses in (model.first_losses, model.last_losses)]
        rows.append(f"| {' | '.join([name, *cells, *(f'{100 * score:.1f}' for score in found)])} |")
    if trainer.is_global_zero:
        print(f"{dataset}, {backbone} {head}, {steps} steps of {batch_size} images, scored on {len(test)} images\n")
        head_line = ["weights", f"loss, first {AVERAGED} steps", f"last {AVERAGED}", *columns]
        print(f"| {' | '.join(head_line)} |", "|---" * len(head_line) + "|", *rows, sep="\n")


def mean(losses: Sequence[torch.Tensor]) -> float:
    return torch.stack(list(losses)).mean().item()


def read(dataset: str, root: str, splits: list[str], training: bool, with_masks: bool) -> Boxes:
    if dataset == "voc":
        if with_masks:
            raise ValueError("VOC's boxes come without masks: leave masks out, or train on COCO.")
        return read_voc(root, splits, training)
    if len(splits) != 1:
        raise ValueError(f"COCO has one split at a time, and {splits} were given: name one.")
    return read_coco(root, splits[0], training, with_masks)


def as_lists(batch: list) -> tuple[list, list]:
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
