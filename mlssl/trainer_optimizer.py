"""Optimizer and learning-rate schedule of a module under its Trainer, which knows the length of the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mlssl.distributed import is_sharded
from mlssl.layers import FrozenStages, depth_of_parameters, rate_scales
from mlssl.optim import build_optimizer, check_optimizer, cosine_with_warmup, parameter_groups, scaled_lr
from mlssl.weights.checkpoints import plain_name


class Trained(Protocol):
    """Settings and parameters of a module under a Trainer, as `MultiLabelSSLModule` has them."""

    optimizer_name: str
    optimizer_kwargs: dict[str, Any]
    base_lr: float
    weight_decay: float
    decay_norm_and_bias: bool
    warmup_epochs: float
    constant_predictor_lr: bool
    views_per_step: int | None
    layer_decay: float | None
    frozen_epochs: int
    backbone_lr_scale: float
    frozen: FrozenStages | None
    backbone: nn.Module

    @property
    def predictor(self) -> nn.Module: ...  # noqa: D102

    @property
    def trainer(self) -> L.Trainer: ...  # noqa: D102

    def parameters(self) -> Iterator[nn.Parameter]: ...  # noqa: D102


def optimizer_of_run(module: Trained) -> OptimizerLRScheduler:
    """Build the optimizer over every parameter that requires a gradient, and a cosine to 0 over the run's steps.

    Raises:
        ValueError: If the run has no end, the views per step are not known, the warm-up is as long as the run, or the
            optimizer needs whole matrices and FSDP shards them.
    """
    trainer = module.trainer
    trainer.fit_loop.setup_data()  # loads the train loader, which Lightning otherwise does later
    total_steps = _count_steps(trainer)
    check_optimizer(
        module.optimizer_name,
        module.optimizer_kwargs,
        is_sharded=trainer.strategy.model is not None and is_sharded(trainer.strategy.model),
        decay_norm_and_bias=module.decay_norm_and_bias,
    )
    lr = scaled_lr(module.base_lr, module.views_per_step or _count_views_per_step(trainer))
    cosine = cosine_with_warmup(total_steps, _count_steps_of(trainer, warmup_epochs=module.warmup_epochs))
    frozen_steps = _count_steps_of(trainer, frozen_epochs=module.frozen_epochs)
    groups: list[dict[str, Any]] = []
    of_groups: list[Callable[[int], float]] = []
    for part in _parts(module):
        factor = _constant if part.of_predictor and module.constant_predictor_lr else cosine
        if part.frozen_at_first:
            factor = _after(frozen_steps, cosine)
        for group in parameter_groups(
            part.parameters, module.weight_decay, decay_norm_and_bias=module.decay_norm_and_bias
        ):
            groups.append(group if part.scale == 1 else {**group, "lr": part.scale * lr})
            of_groups.append(factor)
    optimizer = build_optimizer(
        module.optimizer_name,
        groups,
        lr,
        module.optimizer_kwargs,
        fused=not trainer.gradient_clip_val,  # Lightning refuses to clip the gradients of fused optimizers
    )
    schedule = _Schedule(optimizer, of_groups, total_steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _Part(NamedTuple):
    """Parameters with one learning rate."""

    parameters: list[nn.Parameter]
    scale: float = 1.0
    frozen_at_first: bool = False
    of_predictor: bool = False


def _parts(module: Trained) -> list[_Part]:
    """The backbone, by layers if their rates differ, then the rest except the predictor, then the predictor."""
    of_predictor = set(module.predictor.parameters())
    backbone = {plain_name(name): parameter for name, parameter in module.backbone.named_parameters()}
    scales = dict.fromkeys(backbone, module.backbone_lr_scale)
    if module.layer_decay is not None:
        by_layer = rate_scales(depth_of_parameters(module.backbone), module.layer_decay)
        scales = {name: scale * by_layer[name] for name, scale in scales.items()}
    # Stages frozen for the whole run require no gradient and are in no group.
    frozen = module.frozen.names if module.frozen is not None and module.frozen_epochs else set()
    kinds: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in backbone.items():
        kinds.setdefault((scales[name], name in frozen), []).append(parameter)
    apart = [_Part(parameters, *kind) for kind, parameters in kinds.items() if kind != (1.0, False)]
    done = of_predictor.union(*(part.parameters for part in apart))
    rest = [parameter for parameter in module.parameters() if parameter not in done]
    return [*apart, _Part(rest), _Part(list(module.predictor.parameters()), of_predictor=True)]


class _Schedule(LambdaLR):
    """A LambdaLR that resumes with the run's current length: the optimizer's state has the former learning rate."""

    def __init__(self, optimizer: Optimizer, of_groups: list[Callable[[int], float]], total_steps: int) -> None:
        self.total_steps = total_steps
        super().__init__(optimizer, of_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step, and warn if the learning rates differ from a run that was as long from the start."""
        before = state_dict.get("total_steps", self.total_steps)
        super().load_state_dict({**state_dict, "total_steps": self.total_steps})
        if before == self.total_steps:
            return
        self._last_lr = [
            base * factor(self.last_epoch) for base, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)
        ]
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr
        rank_zero_info(
            f"The run was {before} steps long and is now {self.total_steps}: from step {self.last_epoch} its "
            f"learning rates are those of {self.total_steps} steps, before that those of {before} steps."
        )


def _constant(_step: int) -> float:
    return 1.0


def _count_steps(trainer: L.Trainer) -> int:
    total_steps = trainer.estimated_stepping_batches
    if total_steps < 0 or not math.isfinite(total_steps):  # Lightning represents "without end" in both ways
        raise ValueError(
            "The learning rate follows a cosine over the run, but this run has no end: "
            "pass max_epochs or max_steps to the Trainer, or override configure_optimizers."
        )
    return max(1, int(total_steps))


def _after(first: int, factor: Callable[[int], float]) -> Callable[[int], float]:
    """The factor, but 0 in the first steps."""
    return lambda step: 0.0 if step < first else factor(step)


def _count_steps_of(trainer: L.Trainer, **given: float) -> int:
    ((name, epochs),) = given.items()
    steps_per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
    if epochs and not math.isfinite(steps_per_epoch):
        raise ValueError(
            f"{name}={epochs} was given, but the train loader has no length: pass "
            f"limit_train_batches to the Trainer, or {name}=0."
        )
    return round(epochs * steps_per_epoch) if epochs else 0


def _count_views_per_step(trainer: L.Trainer) -> int:
    """Count the views of one branch per step: images × blocks of the train loader × devices."""
    loader = trainer.train_dataloader
    images = getattr(loader, "batch_size", None)
    blocks = getattr(getattr(loader, "dataset", None), "num_blocks", None)
    if not isinstance(images, int) or not isinstance(blocks, int):
        raise ValueError(
            f"The learning rate is base_lr × views / 256, but the train loader ({type(loader).__name__}) does not "
            "define how many views a step has (its batch_size, and num_blocks of its dataset): "
            "pass views_per_step = images × blocks over all devices to MultiLabelSSLModule."
        )
    return images * blocks * trainer.world_size
