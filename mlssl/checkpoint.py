"""Checkpoints that are whole or not there, and that open without running code."""

from __future__ import annotations

import io
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH

from mlssl.atomic import written_aside


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints on the local disk are written aside, flushed to the disk, then renamed.

    A run that is killed, or meets a full disk, while it saves leaves the previous checkpoint whole. Pass
    ``plugins=[AtomicCheckpointIO()]`` to a Trainer of your own; ``mlssl fit`` does. Paths of other file systems
    (``s3://…``) are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write ``checkpoint``, replacing what stands at ``path`` once it is whole.

        Raises:
            OSError: If it cannot be written (disk full, no permission).
            TypeError: If ``storage_options`` are given.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()  # written by Python, because torch does not say that a disk is full
        torch.save(checkpoint, buffer)
        with written_aside(path) as aside:
            aside.write_bytes(buffer.getbuffer())

    def load_checkpoint(
        self, path: _PATH, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint with ``weights_only=True``, by which no code in it can run, unless False is asked for.

        Raises:
            FileNotFoundError: If there is none at ``path``.
            pickle.UnpicklingError: If it holds pickled Python objects.
        """
        plain_tensors = True if weights_only is None else weights_only
        checkpoint: dict[str, Any] = super().load_checkpoint(path, map_location, plain_tensors)
        return checkpoint
