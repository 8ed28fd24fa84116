"""Published evaluations by name, with all settings fixed; those that train use the Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mlssl.backbones import image_shape
from mlssl.contracts import FeatureNetwork
from mlssl.data.datasets import EpochSampler
from mlssl.data.records import Records
from mlssl.evaluation.crops import Crops
from mlssl.evaluation.features import Features, image_features
from mlssl.evaluation.metrics import THRESHOLD, average_precision, multilabel_scores
from mlssl.feature_maps import pooled_features
from mlssl.optim import cosine_with_warmup

SVM_COSTS = tuple(10 ** (k / 2) for k in range(-6, 3))
"""C from 0.001 to 10 in steps of √10. The range is our choice: the protocol only says that 3-fold AP chooses C."""


@dataclass(frozen=True)
class Protocol:
    """A published evaluation.

    Attributes:
        name: Name by which it is cited.
        dataset: Format of the images.
        train_split: Split to train on.
        test_split: Split to test on; nothing is chosen on it.
        classifier: ``sgd``: one linear layer on augmented crops (frozen, average and maximum pooled features,
            weights N(0, 0.01), BCE, SGD with momentum 0.9 and without decay, cosine); ``svm``: LinearSVC on
            L2-normalised features; ``logistic``: `mlssl.linear_probe`.
        crop: Side of a crop in pixels, for ``sgd`` and ``svm``.
        test_resize: Size of the shorter side before the centre crop; None resizes the whole image to the crop.
        eval_size: Height and width of whole images, for ``logistic``.
        min_images_per_class: As in `MultiLabelDataModule`, for ``logistic``.
        lr: Learning rate for 256 images per step, for ``sgd``.
        epochs: Epochs of ``sgd``. The last one is reported.
        batch_size: Images per step over all devices.
        threshold: Minimum probability of a predicted label.
    """

    name: str
    dataset: str
    train_split: str
    test_split: str
    classifier: Literal["sgd", "svm", "logistic"]
    crop: int = 224
    test_resize: int | None = None
    eval_size: tuple[int, int] | None = None
    min_images_per_class: tuple[int, int] | None = None
    lr: float = 0.0
    epochs: int = 100
    batch_size: int = 64
    threshold: float = THRESHOLD


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("coco-448", "coco", "train2017", "val2017", "sgd", crop=448, lr=10.0),
        Protocol("voc12-to-voc07", "voc", "2012/trainval", "2007/test", "sgd", crop=224, test_resize=256, lr=1.0),
        Protocol("voc07-svm", "voc", "2007/trainval", "2007/test", "svm", crop=224, test_resize=256),
        Protocol("corel5k", "corel5k", "train", "test", "logistic", eval_size=(128, 192), min_images_per_class=(40, 4)),
    )
}
"""Name → protocol."""


def find_protocol(name: str) -> Protocol:
    """The protocol with the given name.

    Raises:
        ValueError: If it does not exist; names the existing ones.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"there is no protocol {name!r}: pass one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def describe(protocol: Protocol, train: Records, test: Records, epochs: int | None = None) -> str:
    """All settings that affect the results, in one line."""
    reported = {"sgd": f"the last of {protocol.epochs} epochs is reported", "svm": "C by 3-fold AP on the training set"}
    chosen = "no epochs: the regularisation strength is chosen on a fifth of the training images"
    how = reported.get(protocol.classifier, chosen)
    if epochs is not None and epochs != protocol.epochs:
        how = f"the last of {epochs} epochs is reported; the protocol has {protocol.epochs}"
    return (
        f"{protocol.name}: {len(train)} training images of {protocol.train_split!r}, {len(test)} test images of "
        f"{protocol.test_split!r}, {len(train.classes)} classes, threshold {protocol.threshold}, {how}"
    )


class LinearEvaluation(L.LightningModule):
    """One linear layer on the frozen, average and maximum pooled features of augmented crops, as published.

    The backbone stays in eval mode even if the Trainer sets training mode, and has no gradients. `scores()` after
    ``trainer.test`` returns logits, targets and ids of the test set.

    Args:
        model: Any object with ``backbone``, a network that `pooled_features` can pool, and ``normalize``.
        num_labels: L.
        lr: For 256 images per step; the rate is lr × images per step / 256.
        batch_size: Images per step over all devices.
        generator: Samples the initial weights; None: seed 0.

    Raises:
        ValueError: If there is no label, or the backbone's last feature map is not accessible.
    """

    def __init__(
        self,
        model: FeatureNetwork,
        num_labels: int,
        lr: float,
        batch_size: int = 64,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if num_labels < 1:
            raise ValueError(f"num_labels={num_labels} was given: a linear evaluation needs labelled images")
        # In a tuple, so that the Trainer neither saves it nor sets it to training.
        self._model = (model,)
        self.lr = lr * batch_size / 256
        for parameter in model.backbone.parameters():
            parameter.requires_grad_(False)
        model.backbone.eval()
        with torch.no_grad():
            width = pooled_features(model.backbone, torch.zeros(1, *image_shape(model.backbone)), "avgmax").shape[1]
        self.classifier = nn.Linear(width, num_labels)
        generator = generator or torch.Generator().manual_seed(0)
        nn.init.normal_(self.classifier.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.classifier.bias)
        self._tested: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def model(self) -> FeatureNetwork:
        """The module with the frozen backbone."""
        return self._model[0]

    def setup(self, stage: str) -> None:  # noqa: ARG002  Lightning names it
        """Move the backbone to the device."""
        module = self.model if isinstance(self.model, nn.Module) else self.model.backbone
        module.to(self.trainer.strategy.root_device)

    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 (n, 3, H, W) to logits (n, L)."""
        with torch.no_grad():
            features = image_features(self.model.backbone, self.model.normalize, images, "avgmax")
        logits: Tensor = self.classifier(features)
        return logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002  Lightning names it
        """Binary cross-entropy, mean over the known labels of the batch."""
        known = (batch["labels"] >= 0).float()
        targets = (batch["labels"] == 1).float()
        loss = F.binary_cross_entropy_with_logits(self(batch["image"]), targets, known, reduction="sum")
        loss = loss / known.sum().clamp(min=1)
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(known))
        return loss

    def on_test_epoch_start(self) -> None:
        """Discard an earlier test."""
        self._tested = []

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # noqa: ARG002  Lightning names it
        """Store logits, targets and ids."""
        self._tested.append((self(batch["image"]).cpu(), batch["labels"].cpu(), batch["image_ids"].cpu()))

    def scores(self) -> Features:
        """Logits (n, L), labels and ids of the last test, in the order of the images."""
        if not self._tested:
            raise ValueError("nothing was tested yet: call trainer.test first")
        logits, labels, ids = (torch.cat(part) for part in zip(*self._tested, strict=True))
        return Features(logits, labels.to(torch.int8), ids)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD with momentum 0.9 and without weight decay; a cosine to 0 over the steps of the run."""
        optimizer = torch.optim.SGD(self.classifier.parameters(), self.lr, momentum=0.9)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_with_warmup(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


class CropData(L.LightningDataModule):
    """Augmented crops to train on and fixed ones to test on, as defined by a protocol.

    Args:
        protocol: A protocol with ``sgd``.
        train: Labelled records.
        test: Labelled records of the same classes.
        num_workers: Loader processes.
        seed: Seed of order and crops, which depend only on (seed, epoch, index).

    Raises:
        ValueError: If a set has no labels, or the two have different classes.
    """

    def __init__(self, protocol: Protocol, train: Records, test: Records, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        if train.labels is None or test.labels is None or train.classes != test.classes:
            raise ValueError(
                f"{train!r} and {test!r} do not share their classes: pass labelled sets with the same classes"
            )
        self.protocol, self.train, self.test = protocol, train, test
        self.num_workers, self.seed = num_workers, seed

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of crops, in a different order each epoch."""
        devices = self.trainer.world_size if self.trainer else 1
        images = Crops(self.train, self.protocol.crop, augment=True, seed=self.seed)
        rank = self.trainer.global_rank if self.trainer else 0
        sampler = EpochSampler(images, num_replicas=devices, rank=rank, seed=self.seed)
        return self._loader(images, sampler=sampler, batch_size=max(1, self.protocol.batch_size // devices))

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test images."""
        return self._loader(
            Crops(self.test, self.protocol.crop, self.protocol.test_resize), batch_size=self.protocol.batch_size
        )

    def _loader(self, images: Crops, **settings: Any) -> DataLoader[Any]:
        generator = torch.Generator()  # otherwise every pass over a loader samples from the global random state
        return DataLoader(images, num_workers=self.num_workers, generator=generator, **settings)


@dataclass(frozen=True)
class ProtocolResult:
    """Result of a protocol on its test set.

    Attributes:
        scores: Of `multilabel_scores`; for ``svm``, whose scores are not probabilities, only mAP and classes.
        average_precision: (L,), NaN for a class without a positive.
        logits: (n, L) of the test set.
        targets: (n, L).
    """

    scores: dict[str, float]
    average_precision: Tensor
    logits: Tensor
    targets: Tensor


def evaluate_sgd(protocol: Protocol, model: FeatureNetwork, data: CropData, trainer: L.Trainer) -> ProtocolResult:
    """Train the classifier for the Trainer's epochs and test it once, at the end.

    Raises:
        ValueError: As `LinearEvaluation`; on several devices, each of which would test only a part of the test set.
    """
    if trainer.world_size > 1:
        raise ValueError(f"{trainer.world_size} devices were given, but the test set is not split: pass devices=1")
    module = LinearEvaluation(model, len(data.train.classes), protocol.lr, protocol.batch_size)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    tested = module.scores()
    assert tested.labels is not None
    scores = multilabel_scores(tested.features.sigmoid(), tested.labels, threshold=protocol.threshold)
    return ProtocolResult(scores, average_precision(tested.features, tested.labels), tested.features, tested.labels)


def evaluate_svm(train: Features, test: Features, costs: Sequence[float] = SVM_COSTS) -> ProtocolResult:
    """Linear SVMs per class on L2-normalised features, as P. Goyal et al., arXiv 1905.01235, evaluate on VOC07.

    Squared hinge loss, class weight 2 for positives and 1 for negatives, C chosen per class by the mean AP over three
    folds of the training set. Unknown labels (VOC's difficult ones) are left out of training and test of their class.

    Args:
        train: Labelled features.
        test: Labelled features of the same widths.
        costs: Values of C to choose from.

    Raises:
        ImportError: Without scikit-learn.
        ValueError: If labels are missing, or no class can be learned.
    """
    try:
        from sklearn.model_selection import StratifiedKFold
        from sklearn.svm import LinearSVC
    except ImportError as error:
        raise ImportError("voc07-svm needs scikit-learn: pip install 'mlssl[svm]'") from error
    if train.labels is None or test.labels is None:
        raise ValueError("voc07-svm needs labelled features of both sets")
    inputs, test_inputs = (F.normalize(one.features.float(), dim=1).numpy() for one in (train, test))
    logits = torch.zeros(test.labels.shape)

    def fitted(cost: float, rows: Any, label: Tensor) -> Any:
        # Primal form: VOC07 has more images than features, and both forms have the same solution.
        svm = LinearSVC(C=cost, class_weight={1: 2, 0: 1}, loss="squared_hinge", dual=False, max_iter=2000)
        return svm.fit(inputs[rows], label[rows].numpy())

    learned = 0
    for column in range(train.labels.shape[1]):
        label = train.labels[:, column]
        known = torch.where(label >= 0)[0].numpy()
        if min((label == 1).sum(), (label == 0).sum()) < 3:  # too few for three folds
            continue
        learned += 1
        folds = list(StratifiedKFold(3).split(known, label[known].numpy()))
        precision = [
            np.mean(
                [
                    average_precision(
                        torch.from_numpy(fitted(cost, known[fit], label).decision_function(inputs[known[held_out]])),
                        label[known[held_out]],
                    ).item()
                    for fit, held_out in folds
                ]
            )
            for cost in costs
        ]
        best = fitted(costs[int(np.argmax(precision))], known, label)
        logits[:, column] = torch.from_numpy(best.decision_function(test_inputs)).float()
    if not learned:
        raise ValueError(
            "no class has three positive and three negative training images, so 3-fold cross-validation is impossible"
        )
    by_class = average_precision(logits, test.labels)
    scores = {"mAP": by_class.nanmean().item(), "classes": int(by_class.isfinite().sum())}
    return ProtocolResult(scores, by_class, logits, test.labels)
