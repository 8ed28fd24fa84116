"""Save torch's random state in the checkpoint, so that dropout and stochastic depth resume exactly."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from mlssl.distributed import gather, rank

KEY = "random_state"
"""Name in the checkpoint: {"cpu": uint8 (devices, n), "device": uint8 (devices, m), only on GPUs}."""


class RandomState(L.Callback):
    """Save torch's random state, of every process and of its GPU, and restore it when a run is resumed.

    The library's views do not need it, because they depend only on (seed, epoch, index); a backbone with dropout or
    stochastic depth does. No random number is sampled. A process without a state in the checkpoint keeps its own.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Tensor] = {}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """All-gather the states; all processes save together."""
        device = pl_module.device
        states = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            states["device"] = torch.cuda.get_rng_state(device)
        checkpoint[KEY] = {name: gather(state.to(device)[None]).cpu() for name, state in states.items()}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the states for the start of training: evaluating a checkpoint changes no random state."""
        self._restored = checkpoint.get(KEY, {})

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore this process's state, when nothing else can sample before the first step."""
        # Copies, because torch reads a state from the start of its storage, and crashes on a row of a larger tensor.
        states = {name: rows[rank()].cpu().clone() for name, rows in self._restored.items() if rank() < len(rows)}
        self._restored = {}
        if "cpu" in states:
            torch.set_rng_state(states["cpu"])
        if "device" in states and pl_module.device.type == "cuda":
            torch.cuda.set_rng_state(states["device"], pl_module.device)
