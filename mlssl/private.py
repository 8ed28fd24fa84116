"""Private internals of torch, Lightning and timm that the library needs, in one place, to check with each release."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _remove_worker_pids
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

BatchNorm = _BatchNorm
"""Base class of all batch norms of torch."""


def workers_of(batches: Any) -> list[BaseProcess]:
    """Worker processes of a DataLoader's iterator; empty if it loads in this process."""
    return list(getattr(batches, "_workers", []))


def leave_out_of_torchs_sigchld_handler(batches: Any) -> None:
    """Deregister the workers of a DataLoader's iterator from torch's SIGCHLD handler.

    torch would raise at any point of the main thread. In the middle of an optimizer step that leaves half of the
    weights updated, which a checkpoint on the exception would save; in a destructor Python drops the exception.
    """
    if getattr(batches, "_worker_pids_set", False):
        _remove_worker_pids(id(batches))
        batches._worker_pids_set = False


def uncompiled(network: nn.Module) -> nn.Module:
    """The network inside torch.compile's wrapper, or the network itself if it is not compiled."""
    inner: nn.Module = getattr(network, "_orig_mod", network)
    return inner


def processor_has_bfloat16() -> bool:
    """Whether the CPU has bfloat16 instructions; emulation is twenty times slower."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


@contextmanager
def muon_in_full_precision() -> Iterator[None]:
    """Make timm's Muon orthogonalise in float32 within this context, and in float64 for float64 weights.

    By default it computes in bfloat16, and its optimizer has no argument for that.
    """
    from timm.optim import muon

    given = muon.zeropower_via_newtonschulz

    def orthogonalized(update: Tensor, *args: Any, **settings: Any) -> Tensor:
        dtype = torch.promote_types(update.dtype, torch.float32)
        result: Tensor = given(update, *args, **{**settings, "dtype": dtype})
        return result

    muon.zeropower_via_newtonschulz = orthogonalized
    try:
        yield
    finally:
        muon.zeropower_via_newtonschulz = given


def trainer_of(module: Any) -> Any:
    """The Trainer of a module; None without one, unlike `module.trainer`, which raises."""
    return getattr(module, "_trainer", None)


def requeue_signal_of(trainer: Any) -> int | None:
    """Number of the signal at which Lightning would requeue this SLURM job; None outside SLURM and if turned off."""
    environment = trainer._accelerator_connector.cluster_environment
    number: int | None = getattr(environment, "requeue_signal", None)
    return number if getattr(environment, "auto_requeue", False) else None


def restore_after_training(trainer: Any, number: int, handler: Any) -> None:
    """Have Lightning set this handler of a signal at the end of the run, when it restores those it replaced."""
    trainer._signal_connector._original_handlers[number] = handler


def add_to_stepped_batches(epoch_loop: Any, number: int) -> None:
    """Change Lightning's count of completed batches, which it uses to log and resume."""
    epoch_loop._batches_that_stepped += number


def resume_max_steps_as_max_epochs(fit_loop: Any) -> None:
    """Make a run with ``max_steps`` resume after a whole epoch like one with ``max_epochs``.

    Lightning treats every such run as stopped in mid-epoch, and counts an epoch without a step.
    """
    fit_loop._iteration_based_training = _no


def _no() -> bool:
    return False


def stepped_batches(checkpoint: Mapping[str, Any]) -> int:
    """The same count in a checkpoint of the Trainer."""
    return int(checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"])


class TensorMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, call `on_tensor` with every tensor that an operation returns, including gradients."""

    def __init__(self, on_tensor: Callable[[Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.on_tensor = on_tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        for one in given if isinstance(given, (tuple, list)) else (given,):
            if isinstance(one, Tensor):
                self.on_tensor(one)
        return given
