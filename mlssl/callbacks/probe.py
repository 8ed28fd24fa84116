"""Online linear probe: quality of the backbone's features during pre-training."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from mlssl.callbacks.networks import BACKBONE, evaluation_data
from mlssl.callbacks.scores import OnlineScores
from mlssl.data.batches import check_image_batch
from mlssl.distributed import sum_over_devices, world_size

MOMENTUM = 0.9

STATISTICS_MOMENTUM = 0.1
"""Weight of a step in the running mean and variance of the features, as in a batch norm."""

LARGEST_FEATURE = 10.0
"""Standardised features are clipped to ±10, so that a unit that is rarely active cannot dominate."""


class OnlineLinearProbe(OnlineScores):
    """Train a linear multi-label classifier on the features of every step and score it on the whole validation images.

    The features are detached and no random number is sampled, so the pre-trained weights are the same with and without
    the probe. It learns from the features of a step, averaged over the views of an image; if
    ``trainer.datamodule.probe_dataloader()`` gives a separate labelled set, it learns from the whole images of that
    set instead, in one pass at the end of each training epoch, on every device.

    Logs ``probe/loss``, mean binary cross-entropy over the known labels, and after each validation ``probe/mAP``, mean
    average precision in 0–1 over the classes with a positive in the validation images, and ``probe/classes``, their
    number. Images that a distributed sampler repeats are counted once. Labels of −1 are left out. Without
    labels nothing is built, and one line says so; of several validation loaders only the first is scored.

    Another `network` than the backbone costs one forward pass on the step's views, in eval mode and without gradient,
    and one on each validation batch. It logs ``probe/<network>/mAP`` and so on.

    Every device takes the step of the whole batch. Classifier and optimizer are part of the checkpoint, and a run may
    resume with the probe added or left out.

    Args:
        lr: Learning rate > 0 of SGD with momentum 0.9, for the loss summed over the labels, and divided by the number
            of features: these are standardised by running statistics, so one rate fits every backbone.
        weight_decay: Weight decay of SGD, at least 0 (published linear evaluation: 0).
        network: Name of the submodule whose features are classified, from normalised images to (n, D).

    Raises:
        ValueError: If a rate or a decay is out of range; before the run, if the module has no such network; during the
            run, if the width of labels or features changes.
        TypeError: If the probe has a labelled set or a network other than the backbone, and the model has no
            ``normalize`` for its images or is sharded by FSDP.
    """

    kind = "probe"

    def __init__(self, lr: float = 3.0, weight_decay: float = 0.0, network: str = BACKBONE) -> None:
        super().__init__(network)
        if not lr > 0:
            raise ValueError(f"lr={lr} was given: pass a learning rate above 0, such as 3.0.")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay={weight_decay} was given: pass a number of at least 0.")
        self.lr = lr
        self.weight_decay = weight_decay
        self._probe: _Probe | None = None
        self._restored: dict[str, Any] | None = None
        self._has_labelled_set = False

    # ------------------------------------------------------------------ training

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose the images that the probe is trained on."""
        data = evaluation_data(trainer)
        self._has_labelled_set = data is not None and data.probe_dataloader() is not None
        if self._has_labelled_set and self.network_of(pl_module) is None:
            raise TypeError(
                f"The probe has a separate labelled set, but {type(pl_module).__name__} has no `backbone` and "
                "`normalize` to compute its features: use MultiLabelSSLModule, or leave probe_train out."
            )
        if self._has_labelled_set:
            self.refuse_shards(trainer, pl_module, "The probe has a separate labelled set", "leave probe_train out")
        if not self.is_of_backbone:
            self.refuse_shards(trainer, pl_module, f"The probe is on {self.network!r}", "probe only the backbone")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Train on the features of the step, or at the end of an epoch on the labelled set."""
        if self._has_labelled_set:
            if trainer.is_last_batch:
                self._train_on_labelled_set(trainer, pl_module)
            return None
        # The step returns the backbone's features; those of another network need a forward pass on the views.
        source, needed = (outputs, "features") if self.is_of_backbone else (batch, "views")
        if not isinstance(source, Mapping) or needed not in source:
            return self.say("the training step returns no features, so there is no probe.")
        if "labels" not in source:
            return self.say("the training images have no labels, so there is no probe.")
        inputs = source[needed]
        features = (inputs if self.is_of_backbone else self.features_of_views(trainer, pl_module, inputs)).float()
        features = features.mean(dim=(1, 2))
        # Do not learn from images whose features are not finite.
        labels = source["labels"].where(features.isfinite().all(dim=1, keepdim=True), -1)
        features = features.nan_to_num(0, 0, 0)
        loss = self._probe_for(features, labels, "training images").step(features, labels)
        pl_module.log(self.metric("probe/loss"), loss, batch_size=len(features))
        return None

    def _train_on_labelled_set(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data, losses = evaluation_data(trainer), list[Tensor]()
        with isolate_rng():
            for batch in (data and data.probe_dataloader()) or ():
                if not losses:
                    check_image_batch(batch)
                if "labels" not in batch:
                    return self.say("the images of probe_dataloader have no labels, so there is no probe.")
                features = self.features_of_images(pl_module, batch["image"])
                labels = batch["labels"].to(features.device)
                losses.append(self._probe_for(features, labels, "images of probe_dataloader").step(features, labels))
        loss = torch.stack(losses).mean()
        pl_module.log(self.metric("probe/loss"), loss, on_step=False, on_epoch=True, batch_size=1)
        return None

    # ------------------------------------------------------------------ validation

    def probabilities(self, trainer: L.Trainer, features: Tensor, labels: Tensor, image_ids: Tensor) -> Tensor | None:
        """Classify a batch of whole images."""
        if self._probe is None and self._restored is None:
            self.say(f"the probe was not trained before this validation, so there is no {self.metric('probe/mAP')}.")
            return None
        return self._probe_for(features, labels, "validation images").logits(features).sigmoid()

    # A test set is scored like a validation set.
    on_test_epoch_start = OnlineScores.on_validation_epoch_start
    on_test_batch_end = OnlineScores.on_validation_batch_end
    on_test_epoch_end = OnlineScores.on_validation_epoch_end

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Classifier, feature statistics and optimizer, as tensors and plain numbers; empty before the first step."""
        if self._probe is None:
            return self._restored or {}
        return self._probe.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the first features determine the device."""
        self._probe, self._restored = None, state_dict

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Move the state to the CPU: the next run may use another device."""
        self._restored, self._probe = self.state_dict() or None, None

    # ------------------------------------------------------------------ helpers

    def _probe_for(self, features: Tensor, labels: Tensor, images: str) -> "_Probe":
        """The probe, built at the first features (B, D) and labels (B, L); ``images`` names them in the error."""
        if self._probe is None and self._restored is not None:
            self._probe = _Probe.restored(self._restored, self.lr, self.weight_decay, features.device)
        if self._probe is None:
            self._probe = _Probe(features.shape[1], labels.shape[1], self.lr, self.weight_decay, features.device)
        num_labels, width = self._probe.weight.shape
        if labels.shape[1] != num_labels:
            raise ValueError(
                f"The probe was trained on {num_labels} labels, but the {images} have {labels.shape[1]}: "
                "give all sets the same classes in the same order, or leave the labels out of this one."
            )
        if features.shape[1] != width:
            raise ValueError(
                f"The probe was trained on features of width {width}, but those of the {images} have width "
                f"{features.shape[1]}: give it the features of one backbone, or start without this checkpoint."
            )
        return self._probe


class _Probe:
    """Logistic regression of L labels on standardised features, and its optimizer.

    The objective is convex, so the weights start at 0 and no random number is sampled.
    """

    def __init__(self, width: int, num_labels: int, lr: float, weight_decay: float, device: torch.device) -> None:
        self.weight = torch.zeros(num_labels, width, device=device, requires_grad=True)
        self.bias = torch.zeros(num_labels, device=device, requires_grad=True)
        self.mean = torch.zeros(width, device=device)
        self.variance = torch.zeros(width, device=device)
        self.num_steps = 0
        self.optimizer = torch.optim.SGD([self.weight, self.bias], lr / width, MOMENTUM, weight_decay=weight_decay)

    def logits(self, features: Tensor) -> Tensor:
        """Logits (B, L) of features (B, D)."""
        deviation = self.variance.sqrt()
        # Ignore features that are constant in training.
        varies = deviation > 1e-6 * self.mean.abs() + 1e-12
        scale = torch.where(varies, 1 / deviation, torch.zeros_like(deviation))
        inputs = ((features - self.mean) * scale).clamp(-LARGEST_FEATURE, LARGEST_FEATURE)
        return F.linear(inputs, self.weight, self.bias)

    def step(self, features: Tensor, labels: Tensor) -> Tensor:
        """Train on features (B, D) and labels (B, L) of all devices; return the mean loss over known labels."""
        number = len(features) * world_size()
        self._track(features, number)
        known = (labels >= 0).float()
        targets = (labels == 1).float()
        loss = F.binary_cross_entropy_with_logits(self.logits(features), targets, weight=known, reduction="sum")
        gradients = torch.autograd.grad(loss / number, [self.weight, self.bias])
        self.weight.grad, self.bias.grad = (sum_over_devices(gradient) for gradient in gradients)
        self.optimizer.step()
        total = sum_over_devices(torch.stack([loss.detach(), known.sum()]))
        return total[0] / total[1].clamp(min=1)

    def _track(self, features: Tensor, number: int) -> None:
        mean = sum_over_devices(features.sum(0)) / number
        variance = sum_over_devices((features - mean).square().sum(0)) / number
        self.num_steps += 1
        momentum = max(STATISTICS_MOMENTUM, 1 / self.num_steps)
        self.mean = self.mean.lerp(mean, momentum)
        self.variance = self.variance.lerp(variance, momentum)

    def state_dict(self) -> dict[str, Any]:
        tensors = {name: getattr(self, name).detach() for name in ("weight", "bias", "mean", "variance")}
        return {**tensors, "num_steps": self.num_steps, "optimizer": self.optimizer.state_dict()}

    @classmethod
    def restored(cls, state: dict[str, Any], lr: float, weight_decay: float, device: torch.device) -> "_Probe":
        num_labels, width = state["weight"].shape
        probe = cls(width, num_labels, lr, weight_decay, device)
        with torch.no_grad():
            for name in ("weight", "bias", "mean", "variance"):
                getattr(probe, name).copy_(state[name])
        probe.num_steps = state["num_steps"]
        probe.optimizer.load_state_dict(state["optimizer"])
        return probe
