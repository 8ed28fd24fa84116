"""Optimizer and learning-rate schedule of a module under its Trainer, which knows the length of the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mlssl.distributed import is_sharded
from mlssl.optim import build_optimizer, check_optimizer, cosine_with_warmup, parameter_groups, scaled_lr


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

    @property
    def predictor(self) -> nn.Module: ...  # noqa: D102

    @property
    def trainer(self) -> L.Trainer: ...  # noqa: D102

    def parameters(self) -> Iterator[nn.Parameter]: ...  # noqa: D102


def optimizer_of_run(module: Trained) -> OptimizerLRScheduler:
    """Build the optimizer over every parameter that requires a gradient, and a cosine to 0 over the run's steps.

    Raises:
        ValueError: If the run has no end, the views per step are not known, the warm-up is as long as the run, or the
            optimizer looks at whole matrices and FSDP shards them.
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
    of_predictor = set(module.predictor.parameters())
    groups = [
        parameter_groups(parameters, module.weight_decay, decay_norm_and_bias=module.decay_norm_and_bias)
        for parameters in ([p for p in module.parameters() if p not in of_predictor], module.predictor.parameters())
    ]
    optimizer = build_optimizer(
        module.optimizer_name,
        groups[0] + groups[1],
        scaled_lr(module.base_lr, module.views_per_step or _count_views_per_step(trainer)),
        module.optimizer_kwargs,
        fused=not trainer.gradient_clip_val,  # Lightning refuses to clip the gradients of fused optimizers
    )
    cosine = cosine_with_warmup(total_steps, _count_warmup_steps(trainer, module.warmup_epochs))
    of_groups = [cosine] * len(groups[0])
    of_groups += [_constant if module.constant_predictor_lr else cosine] * len(groups[1])
    schedule = _Schedule(optimizer, of_groups, total_steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _Schedule(LambdaLR):
    """A LambdaLR that goes on as the run is long now: the optimizer brings the learning rate of what it was before."""

    def __init__(self, optimizer: Optimizer, of_groups: list[Callable[[int], float]], total_steps: int) -> None:
        self.total_steps = total_steps
        super().__init__(optimizer, of_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step, and say what differs from a run that was as long from the start."""
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
            f"The run was {before} steps long and is {self.total_steps} now: from step {self.last_epoch} on its "
            f"learning rates are those of {self.total_steps} steps; those before were those of {before}."
        )


def _constant(_step: int) -> float:
    return 1.0


def _count_steps(trainer: L.Trainer) -> int:
    total_steps = trainer.estimated_stepping_batches
    if total_steps < 0 or not math.isfinite(total_steps):  # Lightning has both ways to say "without end"
        raise ValueError(
            "The learning rate follows a cosine over the run, and this run has no end: "
            "pass max_epochs or max_steps to the Trainer, or override configure_optimizers."
        )
    return max(1, int(total_steps))


def _count_warmup_steps(trainer: L.Trainer, epochs: float) -> int:
    steps_per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
    if epochs and not math.isfinite(steps_per_epoch):
        raise ValueError(
            f"warmup_epochs={epochs} was given, and the train loader does not say how long an epoch is: pass "
            "limit_train_batches to the Trainer, or warmup_epochs=0."
        )
    return round(epochs * steps_per_epoch) if epochs else 0


def _count_views_per_step(trainer: L.Trainer) -> int:
    """Count the views of one branch per step: images × blocks of the train loader × devices."""
    loader = trainer.train_dataloader
    images = getattr(loader, "batch_size", None)
    blocks = getattr(getattr(loader, "dataset", None), "num_blocks", None)
    if not isinstance(images, int) or not isinstance(blocks, int):
        raise ValueError(
            f"The learning rate is base_lr × views / 256, and the train loader ({type(loader).__name__}) does not "
            "say how many views a step has (its batch_size, and num_blocks of its dataset): "
            "pass views_per_step = images × blocks over all devices to MultiLabelSSLModule."
        )
    return images * blocks * trainer.world_size
