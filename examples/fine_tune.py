"""Fine-tune whole networks on Corel-5K's words, with few and with all labels: from scratch against pre-trained.

`python examples/fine_tune.py --root FOLDER --weights '[scratch, backbone.safetensors]'`

FOLDER holds Corel-5K as `read_corel5k` describes it; a weights file is one of timm's, with its classifier or
without, such as `mlssl export last.ckpt -o backbone.safetensors` writes. Each row of the table has its own learning
rate and layer decay, chosen on a fifth of its training images; the test images are scored once, after the last step.
"""

import csv
import itertools
from pathlib import Path
from typing import Literal

import lightning as L
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from mlssl.backbones import build_backbone, pixel_statistics
from mlssl.data.readers.corel5k import frequent_labels, read_corel5k
from mlssl.data.records import Records
from mlssl.evaluation.metrics import mean_average_precision
from mlssl.optim import cosine_with_warmup
from mlssl.runs import default_precision
from mlssl.weights.sources import open_backbone

SCRATCH = "scratch"
WEIGHT_DECAY = 0.05


class Photographs(Dataset):
    """Normalised images and their words."""

    def __init__(self, records: Records, transform: v2.Transform) -> None:
        self.records = records
        self.transform = transform

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = torch.from_numpy(self.records.image(index)).permute(2, 0, 1)
        return self.transform(pixels), torch.from_numpy(self.records.labels[index])


class FineTuner(L.LightningModule):
    """A timm network with a linear layer on top, all of it trained; deeper layers learn faster than early ones."""

    def __init__(self, network: nn.Module, lr: float, layer_decay: float, loss: str) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        self.lr = lr
        self.layer_decay = layer_decay
        self.loss = asymmetric_loss if loss == "asymmetric" else bce_loss
        self.found = []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = self.loss(self.network(images.contiguous(memory_format=torch.channels_last)), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch, batch_idx):
        images, labels = batch
        self.found.append((self.network(images).float(), labels))

    def on_test_epoch_end(self):
        scores, labels = (torch.cat(parts) for parts in zip(*self.found, strict=True))
        self.log("mAP", mean_average_precision(scores, labels)[0])
        self.found.clear()

    def configure_optimizers(self):
        groups = param_groups_layer_decay(self.network, WEIGHT_DECAY, layer_decay=self.layer_decay)
        for group in groups:
            group["lr"] = self.lr * group.pop("lr_scale")
        total = int(self.trainer.estimated_stepping_batches)
        optimizer = torch.optim.AdamW(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_with_warmup(total, total // 10))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def bce_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy, summed over the words (L) and averaged over the images (n)."""
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="sum") / len(labels)


def asymmetric_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Asymmetric loss (arXiv 2009.14119, eq. 7), by which easy absent words count less: γ₊ = 1, γ₋ = 4, margin 0.05."""
    present = logits.float().sigmoid()
    absent = (1 - present + 0.05).clamp(max=1)
    of_present = (1 - present) * present.clamp(min=1e-8).log()
    of_absent = (1 - absent) ** 4 * absent.clamp(min=1e-8).log()
    return -torch.where(labels == 1, of_present, of_absent).sum() / len(labels)


def build(backbone: str, weights: str, num_classes: int) -> nn.Module:
    """The timm network with weights of a file, but for those of a classifier, or fresh ones, and a fresh classifier."""
    if weights == SCRATCH:
        network = build_backbone(backbone)
    else:
        network = open_backbone(f"{backbone}={weights}").backbone.requires_grad_(True).train()
    network.reset_classifier(num_classes)
    return network


def main(
    root: str,
    weights: list[str] = [SCRATCH],  # noqa: B006  auto_cli reads it, nobody writes to it
    backbone: str = "resnet18",
    fractions: list[float] = [0.1, 1.0],  # noqa: B006
    seeds: int = 3,
    steps: list[int] = [300, 900],  # noqa: B006
    batch_size: int = 32,
    size: tuple[int, int] = (64, 96),
    loss: Literal["bce", "asymmetric"] = "bce",
    lrs: list[float] = [0.001, 0.003, 0.01],  # noqa: B006
    layer_decays: list[float] = [1.0, 0.7],  # noqa: B006
    min_images_per_class: tuple[int, int] = (40, 4),
    out: Path = Path("fine_tune.csv"),
) -> None:
    """Choose learning rates on held-out training images, train, score the test images, print a table.

    Args:
        root: Folder of Corel-5K.
        weights: "scratch", or timm weights files of the backbone; a row for each.
        backbone: Any timm name.
        fractions: Shares of the training images whose labels are used.
        seeds: Runs of each row; a seed draws the images of a share, the order and the fresh weights.
        steps: Optimizer steps of a run, one number for each share.
        batch_size: Images a step.
        size: Height and width of the images.
        loss: Binary cross-entropy, or the asymmetric loss (arXiv 2009.14119).
        lrs: Learning rates to choose from; the table marks a choice at their edge, beyond which may lie a better one.
        layer_decays: Factors to choose from, by which a layer's learning rate is that of the next one; 1 for scratch.
        min_images_per_class: Words with at least so many train and so many test images are learned.
        out: Every run is added to this file as soon as it is done.
    """
    for file in weights:
        if file != SCRATCH and not Path(file).is_file():
            raise FileNotFoundError(f"No weights stand at {file}: give a file, or {SCRATCH!r}.")
    if len(steps) != len(fractions):
        raise ValueError(
            f"{len(fractions)} fractions and {len(steps)} steps were given: give a number of steps for each."
        )
    train, test = read_corel5k(root, "train"), read_corel5k(root, "test")
    words = frequent_labels(train, test, *min_images_per_class)
    train, test = train.with_classes(words), test.with_classes(words)

    for file in weights:
        build(backbone, file, len(words))  # weights that do not fit are refused before the first row is trained

    def run(file: str, learn: Records, score: Records, max_steps: int, seed: int, lr: float, decay: float) -> float:
        L.seed_everything(seed, verbose=False)
        network = build(backbone, file, len(words))
        mean, std = pixel_statistics(network)
        normalised = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
        shape = size[1] / size[0]  # of the test images, which crops have on average too
        crop = v2.RandomResizedCrop(size, scale=(0.25, 1), ratio=(3 / 4 * shape, 4 / 3 * shape))
        augmented = v2.Compose([crop, v2.RandomHorizontalFlip(), *normalised])
        whole = v2.Compose([v2.Resize(size), *normalised])
        trainer = L.Trainer(
            max_steps=max_steps,
            max_epochs=-1,
            precision=default_precision(),
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        model = FineTuner(network, lr, decay, loss)
        trainer.fit(model, DataLoader(Photographs(learn, augmented), batch_size, shuffle=True, drop_last=True))
        return trainer.test(model, DataLoader(Photographs(score, whole), 100), verbose=False)[0]["mAP"]

    rows = []
    for file, (fraction, max_steps) in itertools.product(weights, zip(fractions, steps, strict=True)):
        name = file if file == SCRATCH else Path(file).stem

        learn, held_out = held_out_fifth(drawn(train, fraction, seed=0))
        choices = dict.fromkeys(itertools.product(lrs, [1.0] if file == SCRATCH else layer_decays), 0.0)
        for lr, layer_decay in choices if len(choices) > 1 else ():
            choices[lr, layer_decay] = run(file, learn, held_out, max_steps, 0, lr, layer_decay)
            note(out, name, fraction, loss, max_steps, "choice", 0, lr, layer_decay, round(choices[lr, layer_decay], 4))
        lr, layer_decay = max(choices, key=choices.get)
        chosen = f"{lr:g} (edge)" if len(lrs) > 1 and lr in (min(lrs), max(lrs)) else f"{lr:g}"
        scores = torch.zeros(seeds)
        for seed in range(seeds):
            scores[seed] = run(file, drawn(train, fraction, seed), test, max_steps, seed, lr, layer_decay)
            note(out, name, fraction, loss, max_steps, "test", seed, lr, layer_decay, round(scores[seed].item(), 4))
        spread = scores.std().item() if seeds > 1 else float("nan")
        by_seed = ", ".join(f"{score:.3f}" for score in scores)
        cells = (name, f"{fraction:.0%}", max_steps, chosen, f"{layer_decay:g}", f"{scores.mean():.3f} ± {spread:.3f}")
        rows.append(f"| {' | '.join(map(str, cells))} | {by_seed} |")

    print(f"Corel-5K, {len(words)} words, {len(test)} test images, {loss}, steps of {batch_size} images\n")
    print(
        "| weights | labels | steps | lr | layer decay | test mAP, mean ± std | by seed |", "|---" * 7 + "|", sep="\n"
    )
    print("\n".join(rows))


COLUMNS = ("weights", "labels", "loss", "steps", "purpose", "seed", "lr", "layer_decay", "mAP")


def note(file: Path, *row: object) -> None:
    """Add a run to the file, so that none is lost."""
    new = not file.exists()
    with file.open("a", newline="") as opened:
        csv.writer(opened).writerows([COLUMNS, row] if new else [row])


def drawn(records: Records, fraction: float, seed: int) -> Records:
    """A share of the images, at least five, drawn by the seed."""
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))
    return records.subset(order[: max(5, round(fraction * len(records)))].tolist())


def held_out_fifth(records: Records) -> tuple[Records, Records]:
    """Four fifths to learn from, and one to choose on."""
    cut = len(records) // 5
    return records.subset(list(range(cut, len(records)))), records.subset(list(range(cut)))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
