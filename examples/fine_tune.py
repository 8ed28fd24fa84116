"""Fine-tune networks on any labelled set, with few and with all labels, next to a linear probe of the same weights.

`python examples/fine_tune.py resnet18 ours.safetensors --dataset corel5k --root FOLDER --fractions '[0.1, 1.0]'`

A source is what `mlssl linear` takes: a run, a checkpoint, an exported file, NAME=FILE, NAME.TAG or NAME:pretrained for
published weights, or a NAME alone, which trains from scratch. Sets of images have the options of `mlssl linear` too.
The best epoch, and with the first seed the learning rate, are those of the highest mAP on a fifth of the training
images; the choice never uses the test images. The network of the best run is saved as a tagger for `mlssl tag`, and
as a folder that `timm.create_model` opens with its head and class names.
"""

import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from mlssl.backbones import feature_width
from mlssl.callbacks import SmallMaps
from mlssl.commands.evaluation import features_of, labelled_sets, open_backbones, set_name, with_defaults
from mlssl.commands.evaluation_options import EvaluationOptions
from mlssl.commands.parsing import call_function
from mlssl.data.datasets import ImageDataset
from mlssl.data.joined import held_out
from mlssl.data.records import Records
from mlssl.data.set_options import given_options
from mlssl.evaluation.features import Features
from mlssl.evaluation.few_labels import check_fractions
from mlssl.evaluation.metrics import mean_average_precision
from mlssl.evaluation.probe import linear_probe
from mlssl.layers import FrozenStages, depth_of_parameters, rate_scales
from mlssl.optim import cosine_with_warmup, parameter_groups
from mlssl.runs import default_precision
from mlssl.tagging.fit import tagger_of
from mlssl.tagging.timm_folder import export_timm_classifier
from mlssl.weights.sources import Backbone, open_backbone

WEIGHT_DECAY = 0.05
HELD_OUT = 0.2


class FineTuner(L.LightningModule):
    """A backbone with a linear layer on its features, all of it trained."""

    def __init__(
        self, model: Backbone, num_classes: int, lr: float, layer_decay: float, frozen_stages: int, loss: str
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(True).train()
        self.classifier = nn.Linear(feature_width(model.backbone), num_classes)
        self.lr, self.layer_decay = lr, layer_decay
        self.loss = asymmetric_loss if loss == "asymmetric" else bce_loss
        self.frozen = FrozenStages(model.backbone, frozen_stages) if frozen_stages else None
        self.scored = []

    @property
    def backbone(self) -> nn.Module:
        return self.model.backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.model(images)).float()

    def training_step(self, batch, batch_idx):
        loss = self.loss(self(batch["image"]), batch["labels"])
        self.log("loss", loss, prog_bar=True)
        return loss

    def predict_step(self, batch, batch_idx):
        return self(batch["image"]), batch["labels"]

    def validation_step(self, batch, batch_idx):
        self.scored.append(self.predict_step(batch, batch_idx))

    def on_validation_epoch_end(self):
        self.log("val_mAP", mean_average_precision(*joined(self.scored))[0], prog_bar=True)
        self.scored.clear()

    def configure_optimizers(self):
        backbone = self.backbone
        scales = dict.fromkeys(dict(backbone.named_parameters()), 1.0)
        if self.layer_decay < 1:
            scales = rate_scales(depth_of_parameters(backbone), self.layer_decay)
        by_rate = {1.0: list(self.classifier.parameters())}
        for name, parameter in backbone.named_parameters():
            by_rate.setdefault(scales[name], []).append(parameter)
        groups = [
            {**group, "lr": self.lr * scale}
            for scale, parameters in by_rate.items()
            for group in parameter_groups(parameters, WEIGHT_DECAY, decay_norm_and_bias=False)
        ]
        total = int(self.trainer.estimated_stepping_batches)
        optimizer = torch.optim.AdamW(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_with_warmup(total, total // 10))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def bce_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy, summed over the known labels (L) and averaged over the images (n)."""
    losses = F.binary_cross_entropy_with_logits(logits, (labels == 1).float(), reduction="none")
    return losses[labels >= 0].sum() / len(labels)


def asymmetric_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Asymmetric loss (arXiv 2009.14119, eq. 7), in which easy absent labels count less: γ₊ = 1, γ₋ = 4, m = 0.05."""
    present = logits.sigmoid()
    absent = (1 - present + 0.05).clamp(max=1)
    of_present = (1 - present) * present.clamp(min=1e-8).log()
    of_absent = (1 - absent) ** 4 * absent.clamp(min=1e-8).log()
    return -torch.where(labels == 1, of_present, of_absent)[labels >= 0].sum() / len(labels)


class RandomCrops(Dataset):
    """Crops of a quarter to all of an image, of the same shape on average, half of them flipped."""

    def __init__(self, records: Records, size: tuple[int, int]) -> None:
        self.records = records
        shape = size[1] / size[0]
        crop = v2.RandomResizedCrop(size, scale=(0.25, 1), ratio=(3 / 4 * shape, 4 / 3 * shape))
        self.transform = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pixels = torch.from_numpy(self.records.image(index)).permute(2, 0, 1)
        return {"image": self.transform(pixels), "labels": torch.from_numpy(self.records.labels[index])}


def fine_tune(
    sources: list[str],
    options: EvaluationOptions,
    fractions: list[float] = [1.0],  # noqa: B006  a parser reads it, nobody writes to it
    epochs: list[int] = [30],  # noqa: B006
    seeds: int = 3,
    lrs: list[float] = [0.001, 0.003, 0.01],  # noqa: B006
    layer_decay: float = 0.7,
    frozen_stages: int = 0,
    loss: Literal["bce", "asymmetric"] = "bce",
    ema: float = 0.99,
    out: Path = Path("fine_tuned"),
) -> None:
    """Fine-tune backbones with shares of the labels, and print them in one table with their linear probes.

    Example: python examples/fine_tune.py resnet18 ours.safetensors --dataset corel5k --root FOLDER

    Args:
        sources: Runs, checkpoints, exported files, NAME=FILE, NAME.TAG, NAME:pretrained, or NAME (from scratch).
        options: Of images; pooling and cache are the probe's, seed is the first of the runs'.
        fractions: Of the labels to learn from.
        epochs: Of each fraction.
        seeds: Runs of each row; a seed draws the share of the images, their order and fresh weights.
        lrs: Learning rates to choose from; a choice at the edge is marked.
        layer_decay: Factor of a layer's learning rate to the next one's; 1 from scratch.
        frozen_stages: First stages of a trained backbone that are held as they are, the stem being the first.
        loss: Binary cross-entropy, or the asymmetric loss.
        ema: Decay of the averaged weights, which are the ones that are scored and saved.
        out: Folder of networks and of runs.jsonl; a run that is in it already is not repeated.
    """
    data, train, test = labelled_sets(options)
    check_fractions(fractions, len(train))
    if len(epochs) != len(fractions):
        raise ValueError(
            f"{len(fractions)} fractions and {len(epochs)} epochs were given: give epochs for each of them"
        )
    models = open_backbones(sources, options.seed)
    every_seed = range(options.seed, options.seed + seeds)
    parts = {key: drawn(train, *key) for key in itertools.product(fractions, every_seed)}
    settings = {"batch_size": data.hparams["batch_size"], "num_workers": data.image_dataloader("train").num_workers}
    tuned = {"layer_decay": layer_decay, "frozen_stages": frozen_stages, "loss": loss, "ema": ema}
    runs = Runs(out / "runs.jsonl", given_options(options) | {"size": data.eval_size} | settings | tuned)

    def run(name: str, source: str, part: Part, max_epochs: int, seed: int, lr: float, best: float) -> dict:
        L.seed_everything(seed, verbose=False)
        untrained = models[name].untrained
        model = FineTuner(
            open_backbone(source, seed=seed),
            len(train.classes),
            lr,
            1.0 if untrained else layer_decay,
            0 if untrained else frozen_stages,
            loss,
        )
        kept = ModelCheckpoint(out / "checkpoints", monitor="val_mAP", mode="max", enable_version_counter=False)
        trainer = L.Trainer(
            max_epochs=max_epochs,
            devices=1,
            precision=default_precision(),
            callbacks=[kept, EMAWeightAveraging(decay=ema), SmallMaps()],
            logger=False,
            enable_model_summary=False,
            enable_progress_bar=sys.stderr.isatty(),
        )
        validation = DataLoader(ImageDataset(part.held, data.eval_size), **settings)
        crops = DataLoader(RandomCrops(part.fitted, data.eval_size), shuffle=True, drop_last=True, **settings)
        trainer.fit(model, crops, validation)
        checkpoint = torch.load(kept.best_model_path, weights_only=True)
        Path(kept.best_model_path).unlink()
        model.load_state_dict(checkpoint["state_dict"])
        found = {"best_epoch": checkpoint["epoch"] + 1, "val_mAP": kept.best_model_score.item()}
        scores = joined(trainer.predict(model, DataLoader(ImageDataset(test, data.eval_size), **settings)))
        found["test_mAP"] = mean_average_precision(*scores)[0]
        if found["val_mAP"] > best:
            logits, labels = joined(trainer.predict(model, validation))
            about = {"images": len(labels), "thresholds": "best F1", "seed": seed, "lr": lr, **tuned}
            tagger = tagger_of(
                model.model, model.classifier, logits, labels, train.classes, size=data.eval_size, about=about
            )
            stem = f"{re.sub('[^A-Za-z0-9.=-]+', '_', source)}-{len(part.rows)}"
            tagger.save(out / f"{stem}.safetensors", overwrite=True)
            export_timm_classifier(tagger, out / stem, overwrite=True)
        return found

    rows = []
    for (name, model), source in zip(models.items(), sources, strict=True):
        features = features_of(name, model, data, options)
        for fraction, max_epochs in zip(fractions, epochs, strict=True):
            mine = {seed: parts[fraction, seed] for seed in every_seed}
            probed = [
                linear_probe(rows_of(features.train, one.rows), features.test, num_resamples=0).mAP
                for one in mine.values()
            ]
            rows.append([name, "linear probe", f"{fraction:.0%}", "", "", *spread(probed)])
            lr, test_maps, best = None, [], 0.0
            for seed, part in mine.items():
                found = {}
                for one in lrs if lr is None else [lr]:
                    key = {"source": source, "fraction": fraction, "epochs": max_epochs, "seed": seed, "lr": one}
                    if key not in runs:
                        runs.add(key, run(name, source, part, max_epochs, seed, one, best))
                    found[one] = runs[key]
                    best = max(best, found[one]["val_mAP"])
                lr = max(found, key=lambda one: found[one]["val_mAP"])
                test_maps.append(found[lr]["test_mAP"])
            chosen = f"{lr:g} (edge)" if len(lrs) > 1 and lr in (min(lrs), max(lrs)) else f"{lr:g}"
            rows.append([name, "fine-tuned", f"{fraction:.0%}", str(max_epochs), chosen, *spread(test_maps)])
    height, width = data.eval_size
    print(
        f"{set_name(options)}: {len(test)} test images, {len(train.classes)} classes, {height} × {width} pixels, "
        f"{loss}, probe on {with_defaults(options).pooling} features\n"
    )
    print("| weights | trained | labels | epochs | lr | test mAP, mean ± std | by seed |", "|---" * 7 + "|", sep="\n")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


class Runs:
    """What runs found, in a file that every run is added to, so that none is lost or repeated."""

    def __init__(self, path: Path, settings: dict) -> None:
        self.path, self.settings = path, settings
        lines = path.read_text().splitlines() if path.is_file() else []
        self.found = {json.dumps(one["run"]): one["found"] for one in map(json.loads, lines)}

    def __contains__(self, key: dict) -> bool:
        return json.dumps({**key, **self.settings}) in self.found

    def __getitem__(self, key: dict) -> dict:
        return self.found[json.dumps({**key, **self.settings})]

    def add(self, key: dict, found: dict) -> None:
        run = {**key, **self.settings}
        self.found[json.dumps(run)] = found
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"run": run, "found": found}) + "\n")


class Part(NamedTuple):
    """A share of the training images: to fit and to choose on."""

    rows: list[int]
    fitted: Records
    held: Records


def drawn(records: Records, fraction: float, seed: int) -> Part:
    """A share of the images, drawn by the seed, of which a fifth is held out."""
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))
    rows = order[: round(fraction * len(records))].sort().values.tolist()
    fitted, held = held_out(records.subset(rows), HELD_OUT)
    if not ((held.labels == 1).any(0) & (held.labels == 0).any(0)).any():
        raise ValueError(f"{len(held)} of {len(rows)} images are held out, and no label tells them apart: use more")
    return Part(rows, fitted, held)


def rows_of(features: Features, rows: list[int]) -> Features:
    return Features(features.features[rows], features.labels[rows], features.image_ids[rows])


def joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    scores, labels = zip(*parts, strict=True)
    return torch.cat(scores), torch.cat(labels)


def spread(values: Sequence[float]) -> tuple[str, str]:
    """Mean and standard deviation, and the values."""
    numbers = torch.tensor(values)
    deviation = numbers.std().item() if len(values) > 1 else float("nan")
    return f"{numbers.mean():.3f} ± {deviation:.3f}", ", ".join(f"{value:.3f}" for value in values)


if __name__ == "__main__":
    call_function(fine_tune, sys.argv[1:], "fine_tune.py")
