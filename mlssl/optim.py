"""Optimizers and the learning-rate schedule of the recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

OptimizerName = Literal["sgd", "adamw", "lars"]

REFERENCE_VIEWS = 256
"""Views a step for which the base learning rate is meant (SimSiam, arXiv 2011.10566, sec. 4)."""


def scaled_lr(base_lr: float, views_per_step: int) -> float:
    """Linear scaling: base_lr × views / 256, views = images × blocks of one branch over all devices.

    >>> scaled_lr(0.05, 512)
    0.1
    """
    return base_lr * views_per_step / REFERENCE_VIEWS


def cosine_with_warmup(total_steps: int, warmup_steps: int = 0) -> Callable[[int], float]:
    """Learning-rate factor of a step: a line from 0 to 1 over the warm-up, then half a cosine from 1 to 0.

    Args:
        total_steps: Optimizer steps of the whole run ≥ 1; later steps keep 0.
        warmup_steps: First steps that rise linearly; less than ``total_steps``.

    Raises:
        ValueError: If the warm-up leaves nothing of the run.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warm-up of {warmup_steps} steps in a run of {total_steps}: pass a warm-up that is shorter than the run."
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
        return 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


def parameter_groups(
    modules: Iterable[nn.Module], weight_decay: float, *, decay_norm_and_bias: bool = True
) -> list[dict[str, Any]]:
    """Trainable parameters of the modules, those that are not decayed in a group of their own.

    Args:
        modules: Networks trained together.
        weight_decay: ≥ 0, of the decayed group.
        decay_norm_and_bias: False leaves out every vector (norm scales, biases): parameters with one dimension or none.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    if decay_norm_and_bias:
        return [{"params": parameters, "weight_decay": weight_decay}]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    name: OptimizerName, groups: list[dict[str, Any]], lr: float, momentum: float = 0.9, *, fused: bool = False
) -> torch.optim.Optimizer:
    """SGD as in the paper's recipe, torch's AdamW, or timm's LARS for very large batches.

    Args:
        name: ``sgd``, ``adamw`` or ``lars`` (arXiv 1708.03888).
        groups: Of :func:`parameter_groups`.
        lr: Peak learning rate.
        momentum: Of SGD and LARS; AdamW keeps torch's betas.
        fused: Whether SGD and AdamW take one pass over all parameters, where their devices have such a one.

    Raises:
        ValueError: On any other name.
    """
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = fused and devices <= {"cpu", "cuda"}
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=fused or None)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=fused or None)
    if name == "lars":
        from timm.optim import Lars

        optimizer: torch.optim.Optimizer = Lars(groups, lr=lr, momentum=momentum)
        return optimizer
    raise ValueError(
        f"optimizer={name!r} is unknown: pass 'sgd', 'adamw' or 'lars', or override configure_optimizers for another."
    )
