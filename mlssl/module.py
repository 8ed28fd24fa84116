"""The method as a LightningModule: backbone, projector and predictor, trained with pair and image-aware terms."""

from collections.abc import Sequence
from itertools import permutations
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from mlssl.all_devices import compare_with_all_devices
from mlssl.backbones import build_backbone, feature_width, pixel_statistics
from mlssl.callbacks.finite import FiniteLoss
from mlssl.callbacks.step_summary import StepSummary
from mlssl.data.batches import ImageBatch, ViewBatch
from mlssl.forms import Form, Positives, plain_setting
from mlssl.heads import predictor, projector
from mlssl.layers import FrozenStages
from mlssl.losses import ImageAwareContrastiveLoss, negative_cosine_similarity
from mlssl.module_checks import check_at_least, check_channels, check_images, check_layers, check_pixels, check_step
from mlssl.module_state import repair_loaded_state, repair_saved_state
from mlssl.optim import check_optimizer
from mlssl.out_of_memory import InParts
from mlssl.recompute import in_parts
from mlssl.safe_loading import SafeLoading
from mlssl.trainer_optimizer import optimizer_of_run


class Embedding(NamedTuple):
    """Outputs of the network for N views: backbone features (N, D), projections z and predictions p, both (N, P)."""

    features: Tensor
    projections: Tensor
    predictions: Tensor


class MultiLabelSSLModule(SafeLoading):
    """Pre-train a backbone on multi-label images (arXiv 2506.23156).

    Takes batches of block-wise augmented views, see :class:`mlssl.data.batches.ViewBatch`, and compares every anchor
    with the keys of all devices. ``.backbone`` is the result of pre-training. A custom method overrides ``embed``,
    ``targets`` or ``terms`` independently (docs/own_recipe.md).

    Args:
        backbone: Any timm name, ``torchvision/<name>``, or a network from normalised images (n, C, H, W) to features
            (n, D). A network stays out of the hyper-parameters: ``load_from_checkpoint(path, backbone=net)``.
        projection_dim: P ≥ 1, width of projections and predictions (paper: 2048).
        predictor_dim: Width ≥ 1 of the predictor's bottleneck (paper: 512).
        temperature: τ > 0 of the image-aware term (paper's code: 0.3).
        base_temperature: τ_b > 0, which scales that term by τ/τ_b (SupCon: 0.07).
        contrastive_weight: Weight ≥ 0 of the image-aware term; the pair term has weight 1 (paper's code: 4).
        stop_gradient: Whether the pair term stops the gradient into z, as SimSiam does and the paper's code does not.
        branches_together: Whether all branches pass the network together, with shared batch-norm statistics.
        form: ``log_of_sum`` (paper), ``mean_of_logs`` (SupCon), or a function, see `image_aware_contrastive_loss`.
        positives: ``same_image``, ``gated(0.3)``, ``by_overlap(1.0)``, or a function that returns weights.
        chunk_size: Anchors compared at a time, which bounds memory; None: chunks of 2²¹ cosines.
        optimizer: ``sgd`` (paper), or any name of ``timm.optim.list_optimizers()``: ``adamw``, ``lars``, ``muon``, …
        optimizer_kwargs: Further arguments of the optimizer, such as ``{"momentum": 0.95}``.
        base_lr: Learning rate ≥ 0 for 256 views of one branch per step over all devices, scaled linearly (paper: 0.05).
        weight_decay: ≥ 0 (paper: 1e-4).
        layer_decay: Factor in 0–1 of the learning rate per layer towards the input (BEiT: 0.65–0.9); None: one rate.
        frozen_stages: Number of frozen first stages of the backbone; the stem is the first.
        frozen_epochs: Number of epochs to freeze them; 0: the whole run.
        backbone_lr_scale: Factor ≥ 0 of the backbone's learning rate.
        decay_norm_and_bias: False leaves norms and biases out of weight decay.
        warmup_epochs: Epochs ≥ 0, fractions allowed, of linearly rising learning rate (paper: none).
        constant_predictor_lr: Keep the predictor at the peak learning rate, as SimSiam does (its sec. 4).
        views_at_a_time: Views ≥ 2 of one branch per forward pass, for less memory and one more forward pass: the
            gradient is that of the whole batch, batch norms use each part's statistics. None: all at once.
        views_per_step: Views of one branch per step over all devices, if the train loader does not define it.
        mean: Pixel mean, one number per channel in 0–1; the backbone's default if None.
        std: Pixel standard deviation, likewise, above 0.
        channels_last: Use channels-last memory for images and weights, which is faster for convolutions.
        compile: Whether to train with ``torch.compile`` for the backbone; weight names do not change.
        backbone_kwargs: Passed to ``timm.create_model`` or the torchvision builder: ``pretrained``, ``in_chans``, …

    Raises:
        ValueError: A backbone, form or optimizer is unknown (suggests the nearest), or a number is out of range.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        backbone: str | nn.Module = "resnet50",
        *,
        projection_dim: int = 2048,
        predictor_dim: int = 512,
        temperature: float = 0.3,
        base_temperature: float = 0.07,
        contrastive_weight: float = 4.0,
        stop_gradient: bool = False,
        branches_together: bool = False,
        form: str | Form = "log_of_sum",
        positives: str | Positives = "same_image",
        chunk_size: int | None = None,
        optimizer: str = "sgd",
        optimizer_kwargs: dict[str, Any] | None = None,
        base_lr: float = 0.05,
        weight_decay: float = 1e-4,
        layer_decay: float | None = None,
        frozen_stages: int = 0,
        frozen_epochs: int = 0,
        backbone_lr_scale: float = 1.0,
        decay_norm_and_bias: bool = True,
        warmup_epochs: float = 0.0,
        constant_predictor_lr: bool = False,
        views_at_a_time: int | None = None,
        views_per_step: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        channels_last: bool = True,
        compile: bool = False,
        backbone_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"] if isinstance(backbone, nn.Module) else [])
        plain = {"form": plain_setting(form), "positives": plain_setting(positives)}  # weights_only loads no functions
        self.save_hyperparameters({name: text for name, text in plain.items() if name in self.hparams})
        check_at_least(1, projection_dim=projection_dim, predictor_dim=predictor_dim, views_per_step=views_per_step)
        check_at_least(0, contrastive_weight=contrastive_weight, base_lr=base_lr, weight_decay=weight_decay)
        check_at_least(0, warmup_epochs=warmup_epochs)
        check_at_least(2, views_at_a_time=views_at_a_time)
        check_optimizer(optimizer, optimizer_kwargs or {})
        # Also stored here, because a subclass's hyper-parameters are its own constructor's arguments.
        self.contrastive_weight, self.stop_gradient = contrastive_weight, stop_gradient
        self.branches_together, self.frozen_epochs = branches_together, frozen_epochs
        self.optimizer_name, self.optimizer_kwargs = optimizer, optimizer_kwargs or {}
        self.base_lr, self.weight_decay = base_lr, weight_decay
        self.layer_decay, self.backbone_lr_scale = layer_decay, backbone_lr_scale
        self.decay_norm_and_bias = decay_norm_and_bias
        self.warmup_epochs, self.constant_predictor_lr = warmup_epochs, constant_predictor_lr
        self.views_at_a_time, self.views_per_step = views_at_a_time, views_per_step
        self.channels_last, self.compiles = channels_last, compile
        self._in_parts = InParts()

        # In this order, so that the seed determines the initial weights.
        self.backbone = build_backbone(backbone, **(backbone_kwargs or {}))
        check_layers(self.backbone, layer_decay, frozen_stages, frozen_epochs, backbone_lr_scale)
        self.frozen = FrozenStages(self.backbone, frozen_stages, frozen_epochs) if frozen_stages else None
        self.projector = projector(feature_width(self.backbone), projection_dim)
        self.predictor = predictor(projection_dim, predictor_dim)
        self.image_aware_loss = ImageAwareContrastiveLoss(temperature, base_temperature, form, positives, chunk_size)
        mean, std = (list(a or b) for a, b in zip((mean, std), pixel_statistics(self.backbone), strict=True))
        check_pixels(mean, std)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        if channels_last:
            self.backbone.to(memory_format=torch.channels_last)

    # ------------------------------------------------------------------ the method

    def training_step(self, batch: ViewBatch, batch_idx: int) -> dict[str, Any]:
        """Run one step on views (B, A, K, C, S, S): embed each branch and sum the weighted terms."""
        own, base = type(self), MultiLabelSSLModule
        if batch_idx == 0:
            changed = own.terms is not base.terms or own.training_step is not base.training_step
            check_step(self.backbone, batch, takes_local_views=changed, is_first=self.global_step == 0)
        self.image_aware_loss.checks_values = batch_idx == 0
        num_images, _, num_blocks = batch["views"].shape[:3]
        embeddings = self._embed_branches(batch["views"])
        terms = self.terms(embeddings, batch)
        loss = torch.stack([weight * value for weight, value in terms.values()]).sum()

        logged = {"loss": loss} | {f"{name}_loss": value for name, (_, value) in terms.items()}
        for name, value in logged.items():
            self.log(f"train/{name}", value.detach(), batch_size=num_images)
        outputs = {"loss": loss, "image_ids": batch["image_ids"]}
        for name in ("features", "projections"):  # (B, A, K, D) and (B, A, K, P)
            rows = [getattr(one, name).detach().view(num_images, num_blocks, -1) for one in embeddings]
            outputs[name] = torch.stack(rows, dim=1)
        return outputs | ({"labels": batch["labels"]} if "labels" in batch else {})

    def embed(self, views: Tensor) -> Embedding:
        """Embed views (N, C, S, S) of one branch, uint8; rows are image by image, block by block."""
        features = self.backbone(self.normalize(views))
        projections = self.projector(features)
        return Embedding(features, projections, self.predictor(projections))

    def targets(self, embeddings: Sequence[Embedding], batch: ViewBatch) -> list[Tensor]:  # noqa: ARG002
        """Return the targets of the pair term, one tensor (N, P) per branch: the projections."""
        return [one.projections.detach() if self.stop_gradient else one.projections for one in embeddings]

    def terms(self, embeddings: Sequence[Embedding], batch: ViewBatch) -> dict[str, tuple[float, Tensor]]:
        """Return each term of the loss as (weight, value); the loss is their weighted sum, and each is logged.

        Both terms are means over all ordered pairs of branches a ≠ b: the pair term of −cos(p_a, target_b), the
        image-aware term of the loss on the set {p_a, z_b}. For two branches this is the paper's loss.
        Custom terms can use other entries of the batch, such as boxes and local views.

        Raises:
            ValueError: There is only one branch.
        """
        if len(embeddings) < 2:
            raise ValueError(
                f"The batch has {len(embeddings)} branch, but the pair term compares one branch with another: pass at "
                "least two branches (--data.branches), or override terms."
            )
        num_blocks = batch["views"].shape[2]
        view_ids = batch["image_ids"].repeat_interleave(num_blocks)
        boxes = batch["boxes"].unbind(1) if "boxes" in batch else None  # (B, K, 4) per branch
        targets = self.targets(embeddings, batch)
        pair, image_aware = [], []
        for a, b in permutations(range(len(embeddings)), 2):
            pair.append(negative_cosine_similarity(embeddings[a].predictions, targets[b]))
            anchors = torch.cat([embeddings[a].predictions, embeddings[b].projections])
            shown = None if boxes is None else torch.cat([boxes[a], boxes[b]]).flatten(0, 1)
            image_aware.append(self.image_aware(anchors, view_ids.repeat(2), boxes=shown))
        return {
            "pair": (1.0, torch.stack(pair).mean()),
            "image_aware": (self.contrastive_weight, torch.stack(image_aware).mean()),
        }

    def image_aware(
        self,
        anchors: Tensor,
        image_ids: Tensor,
        keys: Tensor | None = None,
        key_image_ids: Tensor | None = None,
        *,
        boxes: Tensor | None = None,
        key_boxes: Tensor | None = None,
    ) -> Tensor:
        """Compare anchors (R, P) with the keys of all devices, see `mlssl.all_devices.compare_with_all_devices`."""
        of_keys = {"keys": keys, "key_image_ids": key_image_ids, "boxes": boxes, "key_boxes": key_boxes}
        return compare_with_all_devices(self.image_aware_loss, anchors, image_ids, **of_keys)

    def _embed_branches(self, views: Tensor) -> list[Embedding]:
        """Embed views (B, A, K, C, S, S) a branch at a time, or all branches in one pass."""
        branches = [branch.flatten(0, 1) for branch in views.unbind(1)]
        if not self.branches_together:
            return [in_parts(self, self.embed, branch, self.views_at_a_time) for branch in branches]
        joint = in_parts(self, self.embed, torch.cat(branches), self.views_at_a_time)
        return [type(joint)(*rows) for rows in zip(*(one.chunk(len(branches)) for one in joint), strict=True)]

    # ------------------------------------------------------------------ features

    def normalize(self, images: Tensor) -> Tensor:
        """Images (n, C, H, W), uint8 or float in 0–1, to floats normalised by the backbone's mean and std.

        Raises:
            ValueError: The number of channels does not match the backbone.
        """
        check_channels(images, self.pixel_mean.shape[1])
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        pixels = images.to(self.pixel_mean.dtype, memory_format=layout)
        if images.dtype == torch.uint8:
            pixels.div_(255)
        return (pixels - self.pixel_mean).div_(self.pixel_std)

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, C, H, W), uint8 or float in 0–1, to average-pooled features (n, D)."""
        features: Tensor = self.backbone(self.normalize(images))
        return features

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Any]:
        """Features (B, D) of whole images, for the callbacks that evaluate them."""
        outputs = {"features": self.predict_step(batch, batch_idx), "image_ids": batch["image_ids"]}
        return outputs | ({"labels": batch["labels"]} if "labels" in batch else {})

    test_step = validation_step

    def predict_step(self, batch: ImageBatch | Tensor, batch_idx: int) -> Tensor:
        """Features (B, D) of a batch of whole images, an ``ImageBatch`` or only its images."""
        if not isinstance(batch, Tensor):
            check_images(self.backbone, batch, batch_idx, is_first=self.global_step == 0)
            batch = batch["image"]
        return self._in_parts(self, batch)

    # ------------------------------------------------------------------ life under a Trainer

    def configure_callbacks(self) -> list[L.Callback]:
        """Check the loss of every step, and print a summary at the first one."""
        there = [type(callback) for callback in self.trainer.callbacks]  # type: ignore[attr-defined]
        return [callback for callback in (FiniteLoss(), StepSummary()) if type(callback) not in there]

    def on_fit_start(self) -> None:
        """Compile the backbone if requested."""
        if self.compiles:
            self.backbone.compile()

    def on_train_epoch_start(self) -> None:
        """Freeze stages, and unfreeze them after ``frozen_epochs``."""
        if self.frozen is not None:
            self.frozen.begin_epoch(self.current_epoch)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer for all parameters that require a gradient, with a cosine schedule to 0."""
        return optimizer_of_run(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save plain weight names, and the arguments that rebuild the backbone."""
        repair_saved_state(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Match weight names of compiled and plain networks, and refuse another architecture."""
        repair_loaded_state(self, checkpoint)
