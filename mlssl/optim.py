"""Optimizers and the learning-rate schedule of the recipe."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from mlssl.private import muon_in_full_precision, processor_has_bfloat16

ELEMENTWISE = frozenset({"sgd", "adam", "adamw"})
"""Elementwise optimizers, which do not depend on a weight's shape, as FSDP's shards require."""

MOMENTUM = 0.9
"""Momentum of every optimizer that has one (paper); ``optimizer_kwargs`` sets another."""

REFERENCE_VIEWS = 256
"""Views per step to which the base learning rate refers (SimSiam, arXiv 2011.10566, sec. 4)."""


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
        ValueError: If the warm-up is not shorter than the run.
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
    parameters: Iterable[nn.Parameter], weight_decay: float, *, decay_norm_and_bias: bool = True
) -> list[dict[str, Any]]:
    """Group the parameters that require a gradient; those without weight decay form a separate group.

    Args:
        parameters: Parameters of the trained networks.
        weight_decay: ≥ 0, for the decayed group.
        decay_norm_and_bias: False leaves out every vector (norm scales, biases): parameters with one dimension or none.
    """
    trained = [p for p in parameters if p.requires_grad]
    if decay_norm_and_bias:
        return [{"params": trained, "weight_decay": weight_decay}]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    lr: float,
    arguments: Mapping[str, Any] | None = None,
    *,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """Build torch's SGD as in the paper's recipe, or any optimizer of timm's factory.

    ``muon`` (Jordan et al. 2024) makes the update of every convolution and linear layer orthogonal; timm gives vectors
    such as norms and biases to AdamW, with ``nesterov`` to NAdamW. It orthogonalises in bfloat16, on a CPU without
    bfloat16 in float32, and float64 weights in float64.

    Args:
        name: ``sgd``, or a name of ``timm.optim.list_optimizers()``; ``sgd`` has no Nesterov momentum, unlike timm's
            optimizer of that name (``nesterov``).
        groups: Result of :func:`parameter_groups`.
        lr: Peak learning rate.
        arguments: Further arguments of the optimizer; momentum is 0.9 by default, if it has one.
        fused: Whether SGD and AdamW use a fused implementation, if the device has one.

    Raises:
        TypeError: If the optimizer does not take an argument.
        ValueError: If a value is out of range.
    """
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = fused and devices <= {"cpu", "cuda"}
    settings: dict[str, Any] = {"momentum": MOMENTUM, **(arguments or {})}
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, **{"fused": fused or None, **settings})
    from timm.optim import create_optimizer_v2

    if name == "adamw":
        settings = {"fused": fused or None, **settings}
    optimizer: torch.optim.Optimizer = create_optimizer_v2(groups, name, lr=lr, **settings)
    in_float64 = any(parameter.dtype == torch.float64 for group in groups for parameter in group["params"])
    if in_float64 or ("cpu" in devices and not processor_has_bfloat16()):
        _orthogonalize_in_full_precision(optimizer)
    return optimizer


def _orthogonalize_in_full_precision(optimizer: torch.optim.Optimizer) -> None:
    """Make each step of a Muon compute in float32 or float64; other optimizers do not change."""
    from timm.optim import Muon

    if not isinstance(optimizer, Muon):
        return
    kind: Any = type(optimizer)

    def step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        with muon_in_full_precision():
            kind.step(self)
        return loss

    optimizer.__class__ = type(kind.__name__, (kind,), {"step": step})


def check_optimizer(
    name: str, arguments: Mapping[str, Any], *, is_sharded: bool = False, decay_norm_and_bias: bool = True
) -> None:
    """Refuse an optimizer that does not exist, takes other arguments, or cannot work on shards of weights.

    Args:
        name: As for :func:`build_optimizer`.
        arguments: Likewise.
        is_sharded: Whether FSDP gives each device parts of the weights, without their shape.
        decay_norm_and_bias: As for :func:`parameter_groups`, for which False selects by shape.

    Raises:
        ValueError: Names the nearest optimizer, or quotes the error about its arguments.
    """
    if name != "sgd":
        from timm.optim import get_optimizer_info, list_optimizers

        known = list_optimizers()
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            meant = f"did you mean {near[0]!r}? Or " if near else ""
            raise ValueError(
                f"optimizer={name!r} is unknown: {meant}pass 'sgd', a name of timm.optim.list_optimizers() such as "
                "'adamw', 'lars' or 'muon', or override configure_optimizers."
            )
        if get_optimizer_info(name).second_order:
            raise ValueError(
                f"optimizer={name!r} needs second derivatives, but the image-aware loss has none: pass 'sgd', 'adamw', "
                "'lars' or 'muon'."
            )
    try:
        build_optimizer(name, [{"params": [nn.Parameter(torch.zeros(2, 2))]}], 1e-3, arguments)
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        raise ValueError(
            f"optimizer={name!r} does not take optimizer_kwargs={dict(arguments)} ({error}): pass arguments of its "
            "constructor other than lr and weight_decay."
        ) from None
    if is_sharded and (name not in ELEMENTWISE or not decay_norm_and_bias):
        raise ValueError(
            f"optimizer={name!r} with decay_norm_and_bias={decay_norm_and_bias} needs whole weights, but FSDP gives "
            f"each device parts of them without their shape: use {', '.join(map(repr, sorted(ELEMENTWISE)))} with "
            "decay_norm_and_bias=True, or train under DDP."
        )
