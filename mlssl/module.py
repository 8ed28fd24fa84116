"""The method as a LightningModule: backbone, projector and predictor under the pair and the image-aware term."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mlssl.backbones import build_backbone, built_as, check_image_size, feature_width, pixel_statistics
from mlssl.data.batches import ImageBatch, ViewBatch, check_image_batch, check_view_batch
from mlssl.distributed import gather, gather_with_gradient, is_sharded, rank, sum_over_devices, world_size
from mlssl.forms import Form, Positives, plain_setting
from mlssl.heads import predictor, projector
from mlssl.losses import ImageAwareContrastiveLoss, negative_cosine_similarity
from mlssl.optim import OptimizerName, build_optimizer, cosine_with_warmup, parameter_groups, scaled_lr
from mlssl.recompute import in_parts
from mlssl.small_maps import small_maps


class MultiLabelSSLModule(L.LightningModule):
    """Pre-train a backbone on multi-label images (arXiv 2506.23156).

    Takes batches of block-wise augmented views, see :class:`mlssl.data.batches.ViewBatch`, and under several devices
    compares every anchor with the keys of all of them. ``.backbone`` is the part to take away.

    Args:
        backbone: Any timm name, ``torchvision/<name>``, or a network that maps normalised images (n, C, H, W) to
            features (n, D). A network given as an object is left out of the hyper-parameters:
            ``load_from_checkpoint(path, backbone=net)``.
        projection_dim: P, width of projections and predictions (paper: 2048).
        predictor_dim: Width of the predictor's bottleneck (paper: 512).
        temperature: τ > 0 of the image-aware term (paper's code: 0.3).
        base_temperature: τ_b > 0, which scales that term by τ/τ_b (SupCon: 0.07).
        contrastive_weight: Weight ≥ 0 of the image-aware term beside the pair term (paper's code: 4).
        stop_gradient: Whether the pair term stops the gradient into z, as SimSiam does and the paper's code does not.
        form: ``log_of_sum`` (what the paper's author trained with), ``mean_of_logs`` (SupCon), or a function, see
            :data:`mlssl.forms.Form`.
        positives: ``same_image``, ``gated(0.3)``, ``by_overlap(1.0)``, or a function, see
            :data:`mlssl.forms.Positives`.
        chunk_size: Anchors compared at a time, to bound memory; None: all.
        optimizer: ``sgd`` (paper), ``adamw`` or ``lars``.
        base_lr: Learning rate for 256 views a step; the rate is base_lr × views / 256, views = images × blocks over all
            devices (paper: 0.05). Gradient accumulation does not count.
        momentum: Of SGD and LARS.
        weight_decay: ≥ 0 (paper: 1e-4).
        decay_norm_and_bias: False leaves norms and biases out of weight decay.
        warmup_epochs: Epochs ≥ 0, fractions allowed, of linearly rising learning rate (paper: none).
        constant_predictor_lr: Keep the predictor at the peak learning rate, as SimSiam does (its sec. 4).
        views_at_a_time: Views ≥ 2 of one branch that go through the network at a time, where a device has too little
            memory for the batch: the gradient is that of the whole batch, for one more forward pass; batch norms take
            the statistics of such a part. None: all at once.
        views_per_step: Views of one branch a step over all devices, where the train loader does not tell.
        mean: Of the backbone's input, one number a channel in 0–1; the backbone's own by default.
        std: Likewise, above 0.
        channels_last: Keep images and weights channels-last in memory, which convolutions run faster on.
        compile: Whether training compiles the backbone by ``torch.compile``, which needs a C++ compiler, and minutes at
            the first step. Names of weights stay.
        backbone_kwargs: Passed to ``timm.create_model`` or the torchvision builder: ``pretrained``, ``in_chans``, …

    Raises:
        ValueError: On an unknown backbone (names the nearest), a width < 1, a temperature ≤ 0 and the like.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    stops_at_loss_that_is_no_number = True
    """Turned off by who takes care of such a step, as ``FiniteSteps`` does where it skips some."""

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
        form: Form | str = "log_of_sum",
        positives: Positives | str = "same_image",
        chunk_size: int | None = None,
        optimizer: OptimizerName = "sgd",
        base_lr: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
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
        plain = {"form": plain_setting(form), "positives": plain_setting(positives)}
        self.hparams.update({name: text for name, text in plain.items() if name in self.hparams})
        self._hparams_initial = copy.deepcopy(self._hparams)
        _check_at_least(1, projection_dim=projection_dim, predictor_dim=predictor_dim)
        _check_at_least(0, contrastive_weight=contrastive_weight, base_lr=base_lr, momentum=momentum)
        _check_at_least(0, weight_decay=weight_decay, warmup_epochs=warmup_epochs)
        if views_per_step is not None:
            _check_at_least(1, views_per_step=views_per_step)
        if views_at_a_time is not None:
            _check_at_least(2, views_at_a_time=views_at_a_time)
        # Kept here too, because the hyper-parameters of a subclass are the arguments of its own constructor.
        self.contrastive_weight = contrastive_weight
        self.stop_gradient = stop_gradient
        self.optimizer_name = optimizer
        self.base_lr = base_lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.decay_norm_and_bias = decay_norm_and_bias
        self.warmup_epochs = warmup_epochs
        self.constant_predictor_lr = constant_predictor_lr
        self.views_at_a_time = views_at_a_time
        self.views_per_step = views_per_step
        self.channels_last = channels_last

        self.backbone = build_backbone(backbone, **(backbone_kwargs or {}))
        width = feature_width(self.backbone)
        self.projector = projector(width, projection_dim)
        self.predictor = predictor(projection_dim, predictor_dim)
        self.image_aware_loss = ImageAwareContrastiveLoss(temperature, base_temperature, form, positives, chunk_size)
        own_mean, own_std = pixel_statistics(self.backbone)
        mean, std = list(mean or own_mean), list(std or own_std)
        if len(mean) != len(std) or not min(std) > 0:
            raise ValueError(f"mean={mean} and std={std} do not fit: pass one number a channel in each, std above 0.")
        self.register_buffer("pixel_mean", _per_channel(mean), persistent=False)
        self.register_buffer("pixel_std", _per_channel(std), persistent=False)
        if channels_last:
            self.backbone.to(memory_format=torch.channels_last)
        self.compiles = compile
        self._late_loss: _LateLoss | None = None  # of the step before
        self._last_checkpoint = ""

    # ------------------------------------------------------------------ the method

    def training_step(self, batch: ViewBatch, batch_idx: int) -> dict[str, Any]:
        """One step on views (B, A, K, C, S, S); each branch is a batch with its own batch-norm statistics."""
        self._check_batch(batch, batch_idx)
        views, image_ids = batch["views"], batch["image_ids"]
        num_images, _, num_blocks = views.shape[:3]
        f0, z0, p0 = self._embed(views[:, 0].flatten(0, 1))
        f1, z1, p1 = self._embed(views[:, 1].flatten(0, 1))
        view_ids = image_ids.repeat_interleave(num_blocks)

        t0, t1 = (z0.detach(), z1.detach()) if self.stop_gradient else (z0, z1)
        pair = 0.5 * (negative_cosine_similarity(p0, t1) + negative_cosine_similarity(p1, t0))
        image_aware = self._image_aware(torch.cat([p0, z1]), torch.cat([p1, z0]), torch.cat([view_ids, view_ids]))
        loss = pair + self.contrastive_weight * image_aware

        for name, value in {"loss": loss, "pair_loss": pair, "image_aware_loss": image_aware}.items():
            self.log(f"train/{name}", value.detach(), batch_size=num_images)
        before = self._check_finite()
        if before is not None:
            self.log("loss", torch.tensor(before), prog_bar=True, logger=False)
        self._late_loss = _LateLoss(loss, self.global_step, self.current_epoch, image_ids)
        by_image = (num_images, num_blocks, -1)
        outputs = {
            "loss": loss,
            "features": torch.stack([f0.detach().view(by_image), f1.detach().view(by_image)], dim=1),
            "projections": torch.stack([z0.detach().view(by_image), z1.detach().view(by_image)], dim=1),
            "image_ids": image_ids,
        }
        return outputs | ({"labels": batch["labels"]} if "labels" in batch else {})

    def _embed(self, views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views (N, C, S, S) of one branch → backbone features (N, D), projections and predictions (N, P)."""
        if self.views_at_a_time is not None and len(views) > self.views_at_a_time:
            f, z, p = in_parts(self, self._embed_at_once, views, self.views_at_a_time)
            return f, z, p
        return self._embed_at_once(views)

    def _embed_at_once(self, views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with small_maps(views.device):
            f = self.backbone(self.normalize(views))
        z = self.projector(f)
        return f, z, self.predictor(z)

    def _image_aware(self, one: Tensor, other: Tensor, ids: Tensor) -> Tensor:
        """Mean of the term on two sets (R, P), every anchor of this device against the keys of all devices.

        The sum over this device's anchors is divided by the number of anchors over all devices and multiplied by the
        number of devices, so that the mean of gradients that DDP takes is the gradient of the global mean.
        """
        term = self.image_aware_loss
        if world_size() == 1:
            terms: list[Tensor] = [term(one, ids), term(other, ids)]
            return 0.5 * (terms[0] + terms[1])
        keys = gather_with_gradient(torch.cat([one, other], dim=1)).chunk(2, dim=1)
        key_ids = gather(ids)
        own = rank() * len(ids) + torch.arange(len(ids), device=ids.device)
        sums, counts = zip(
            *(
                term(anchors, ids, of_set, key_ids, self_index=own, reduction="sum_and_count")
                for anchors, of_set in zip((one, other), keys, strict=True)
            ),
            strict=True,
        )
        divisors = sum_over_devices(torch.stack(counts)).clamp(min=1) / world_size()
        terms = [total / divisor for total, divisor in zip(sums, divisors, strict=True)]
        return 0.5 * (terms[0] + terms[1])

    # ------------------------------------------------------------------ features

    def normalize(self, images: Tensor) -> Tensor:
        """Images (n, C, H, W), uint8 or float in 0–1, to floats normalised by the backbone's mean and std.

        Raises:
            ValueError: If they have another number of channels than the backbone takes.
        """
        if images.shape[1] != self.pixel_mean.shape[1]:
            raise ValueError(
                f"The images have {images.shape[1]} channels, and the backbone takes {self.pixel_mean.shape[1]}: pass "
                f"backbone_kwargs={{'in_chans': {images.shape[1]}}} (--model.backbone_kwargs.in_chans), with mean and "
                "std of as many numbers where they are given, or decode the images to as many channels."
            )
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
        if batch_idx == 0:
            self._check_images(batch)
        outputs = {"features": self(batch["image"]), "image_ids": batch["image_ids"]}
        return outputs | ({"labels": batch["labels"]} if "labels" in batch else {})

    test_step = validation_step

    def predict_step(self, batch: ImageBatch | Tensor, batch_idx: int) -> Tensor:
        """Features (B, D) of a batch of whole images, given as ``ImageBatch`` or as the images alone."""
        if not isinstance(batch, Tensor):
            if batch_idx == 0:
                self._check_images(batch)
            batch = batch["image"]
        features: Tensor = self(batch)
        return features

    # ------------------------------------------------------------------ optimisation

    def on_fit_start(self) -> None:
        """Forget the last loss of another run, and compile the backbone where asked for."""
        self._late_loss = None
        if self.compiles:
            self.backbone.compile()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The recipe's optimizer, and a cosine to 0 over the optimizer steps of the run."""
        self.trainer.fit_loop.setup_data()  # loads the train loader, which Lightning otherwise does later
        total_steps = self.trainer.estimated_stepping_batches
        if total_steps < 0 or not math.isfinite(total_steps):  # Lightning has both ways to say "without end"
            raise ValueError(
                "The learning rate follows a cosine over the run, and this run has no end: "
                "pass max_epochs or max_steps to the Trainer, or override configure_optimizers."
            )
        if is_sharded(self.trainer.strategy.model or self) and (
            self.optimizer_name == "lars" or not self.decay_norm_and_bias
        ):
            raise ValueError(
                f"optimizer={self.optimizer_name!r} with decay_norm_and_bias={self.decay_norm_and_bias} looks at whole "
                "weights, and FSDP gives a device parts of them without their shape: use 'sgd' or 'adamw' with "
                "decay_norm_and_bias=True, or train under DDP."
            )
        groups_of = [
            parameter_groups(part, self.weight_decay, decay_norm_and_bias=self.decay_norm_and_bias)
            for part in ([self.backbone, self.projector], [self.predictor])
        ]
        lr = scaled_lr(self.base_lr, self._count_views_per_step())
        # Lightning refuses to clip the gradients of fused optimizers.
        fused = not self.trainer.gradient_clip_val
        optimizer = build_optimizer(self.optimizer_name, groups_of[0] + groups_of[1], lr, self.momentum, fused=fused)
        cosine = cosine_with_warmup(max(1, int(total_steps)), self._warmup_steps())
        of_predictor = _constant if self.constant_predictor_lr else cosine
        factors = [cosine] * len(groups_of[0]) + [of_predictor] * len(groups_of[1])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _warmup_steps(self) -> int:
        steps_per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        if self.warmup_epochs and not math.isfinite(steps_per_epoch):
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs} was given, and the train loader does not say how long an epoch "
                "is: pass limit_train_batches to the Trainer, or warmup_epochs=0."
            )
        return round(self.warmup_epochs * steps_per_epoch) if self.warmup_epochs else 0

    def _count_views_per_step(self) -> int:
        """Views of one branch a step over all devices: given, or images × blocks of the train loader × devices."""
        if self.views_per_step is not None:
            return self.views_per_step
        loader = self.trainer.train_dataloader
        images = getattr(loader, "batch_size", None)
        blocks = getattr(getattr(loader, "dataset", None), "num_blocks", None)
        if not isinstance(images, int) or not isinstance(blocks, int):
            raise ValueError(
                f"The learning rate is base_lr × views / 256, and the train loader ({type(loader).__name__}) does not "
                "say how many views a step has (its batch_size, and num_blocks of its dataset): "
                "pass views_per_step = images × blocks over all devices to MultiLabelSSLModule."
            )
        return images * blocks * self.trainer.world_size

    # ------------------------------------------------------------------ checks

    def _check_batch(self, batch: ViewBatch, batch_idx: int) -> None:
        """The whole contract on the first batch of an epoch; announce what a step compares on the first of a run."""
        if batch_idx > 0:
            return
        check_view_batch(batch)
        images, branches, blocks = batch["views"].shape[:3]
        devices = world_size()
        if images * devices < 2:
            raise ValueError(
                f"A step has {images * devices} image over all devices, and nothing to push it away from: "
                "use a batch_size of at least 2."
            )
        alone = sum(type(layer) is not nn.SyncBatchNorm and layer.training for layer in self._batch_norms())
        if alone and devices > 1:
            rank_zero_warn(
                f"{alone} batch norms take their statistics from one device alone, so {devices} devices do not compute "
                "what one would: pass sync_batchnorm=True to the Trainer (--trainer.sync_batchnorm true), on GPUs."
            )
        if self.global_step == 0:
            check_image_size(self.backbone, *batch["views"].shape[-2:])
            anchors = branches * images * blocks
            positives = branches * blocks - 1
            rank_zero_info(
                f"A step: {images} images on each of {devices} device(s), {anchors * devices} views; "
                f"each anchor meets {positives} positives and {anchors * devices - 1 - positives} negatives. "
                "Gradient accumulation adds none."
            )

    def _batch_norms(self) -> Iterator[nn.Module]:
        return (layer for layer in self.modules() if isinstance(layer, _BatchNorm))

    def _check_images(self, batch: ImageBatch) -> None:
        """The whole contract, and at the start of a run that the backbone takes the size."""
        check_image_batch(batch)
        if self.global_step == 0:
            check_image_size(self.backbone, *batch["image"].shape[-2:])

    def _check_finite(self) -> float | None:
        """Look at the loss of the last step that was made, which by now has arrived without anything waiting for it."""
        late = self._late_loss
        if late is None:
            return None
        loss = late.value()
        if math.isfinite(loss) or not self.stops_at_loss_that_is_no_number:
            return loss
        raise FloatingPointError(
            f"The loss is {loss} at step {late.step} (epoch {late.epoch}) on rank {rank()}, whose images are "
            f"{late.image_ids.tolist()}, and nothing of this step was kept; the last good checkpoint is "
            f"{self._last_checkpoint or 'none yet'}. Lower base_lr, add warmup_epochs, or use precision 32-true."
        )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # noqa: ARG002 - Lightning names them
        """Note the last checkpoint, as its callback names the next one before that is saved."""
        saver = self.trainer.checkpoint_callback
        self._last_checkpoint = getattr(saver, "last_model_path", "") or getattr(saver, "best_model_path", "")

    def on_train_epoch_end(self) -> None:
        """Look at the loss of the epoch's last step too."""
        self._check_finite()

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save no step whose loss is no number, no prefix of torch.compile, no word to read weights; add metrics."""
        self._check_finite()
        checkpoint["state_dict"] = {_plain_name(name): value for name, value in checkpoint["state_dict"].items()}
        hparams, origin = checkpoint.get("hyper_parameters", {}), built_as(self.backbone)
        if origin is not None and hparams.get("backbone_kwargs"):
            hparams["backbone_kwargs"] = origin[1]
        if self._trainer is not None:  # for whoever exports the backbone
            checkpoint["metrics"] = {name: value.item() for name, value in self._trainer.callback_metrics.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Find compiled and plain networks under one name, and ask for the backbone that no checkpoint holds."""
        own_names = {_plain_name(name): name for name in self.state_dict()}
        state = {own_names.get(_plain_name(name), name): value for name, value in checkpoint["state_dict"].items()}
        checkpoint["state_dict"] = state
        fits = {name for name in own_names.values() if name.startswith("backbone.")} == {
            name for name in state if name.startswith("backbone.")
        }
        if not fits and "backbone" not in checkpoint.get("hyper_parameters", {"backbone": None}):
            raise ValueError(
                "The backbone of this checkpoint was given as a network, which no checkpoint holds: pass the same one, "
                "MultiLabelSSLModule.load_from_checkpoint(path, backbone=net)."
            )
        own = self.state_dict()
        if not fits or any(name in own and own[name].shape != value.shape for name, value in state.items()):
            raise ValueError(_other_architecture(checkpoint.get("hyper_parameters", {}), dict(self.hparams)))


def _other_architecture(there: dict[str, Any], here: dict[str, Any]) -> str:
    names = ("backbone", "backbone_kwargs", "projection_dim", "predictor_dim")
    differing = [
        f"{name}={there[name]!r} there, {here.get(name)!r} here"
        for name in names
        if name in there and there[name] != here.get(name)
    ]
    return (
        f"The checkpoint does not fit this module: {'; '.join(differing) or 'its weights have other names or shapes'}. "
        "Build the module as it was, or leave the checkpoint out."
    )


class _LateLoss:
    """A loss on its way from the device to the host, which nobody waits for until it is asked for."""

    def __init__(self, loss: Tensor, step: int, epoch: int, image_ids: Tensor) -> None:
        self.step = step
        self.epoch = epoch
        self.image_ids = image_ids
        self._loss = loss.detach().to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if loss.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_LateLoss":
        return self  # an event of the device cannot be copied

    def value(self) -> float:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._loss.item()


def _check_at_least(least: int, **settings: float) -> None:
    for name, value in settings.items():
        if not value >= least:
            raise ValueError(f"{name}={value} was given: pass a number of at least {least}.")


def _per_channel(values: list[float]) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)


def _plain_name(name: str) -> str:
    return name.replace("_orig_mod.", "")


def _constant(_step: int) -> float:
    return 1.0
