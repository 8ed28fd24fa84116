"""Checkpoints that are whole or not there, that open without running code, and that are there when a run is ended."""

from __future__ import annotations

import io
import os
import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mlssl.atomic import FullDiskError, written_aside
from mlssl.private import add_to_stepped_batches, resume_max_steps_as_max_epochs
from mlssl.weights.checkpoints import load_plain


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints on the local disk are written aside, flushed to the disk, then renamed.

    A run that is killed, or meets a full disk, while it saves leaves the previous checkpoint whole. Pass
    ``plugins=[AtomicCheckpointIO()]`` to a Trainer of your own; ``mlssl fit`` does. Paths of other file systems
    (``s3://…``) are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
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
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint with ``weights_only=True``, by which no code in it can run, unless False is asked for.

        Raises:
            FileNotFoundError: If there is none at ``path``.
            ValueError: If it is damaged, no checkpoint, or holds pickled Python objects.
        """
        plain_tensors = True if weights_only is None else weights_only
        if plain_tensors and Path(path).is_file():
            whole: dict[str, Any] = load_plain(Path(path), map_location=map_location)
            return whole
        checkpoint: dict[str, Any] = super().load_checkpoint(path, map_location, plain_tensors)
        return checkpoint


class RunCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that also saves a run which is ended from outside (SIGTERM) or by an error.

    A run that goes on from a checkpoint in this folder goes on with its files too, wherever the folder was moved or
    copied: ``last.ckpt`` is replaced, and no ``last-v1.ckpt`` appears beside it. The best scores of the other
    ModelCheckpoints with this folder are found again as well. A new run leaves the files of another as they are.

    With ``save_on_exception=True``, the default here. Nothing is saved before the first step, nor after a number that
    is not finite, which is in the running statistics already, nor on a full disk, nor where one of several
    processes fails: the others would be waited for. Where one of several gets SIGTERM, all end before the same step.
    """

    def __init__(self, *args: Any, save_on_exception: bool = True, **settings: Any) -> None:
        super().__init__(*args, save_on_exception=save_on_exception, **settings)  # type: ignore[misc]
        self._began = False
        self._last = ""
        self.is_asked_to_end = False
        """Whether SIGTERM came to this process, one of several; on a single one it is the Trainer that knows."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Each run has to begin anew."""
        super().setup(trainer, pl_module, stage)
        self._began = False
        if stage != "fit":
            return
        resume_max_steps_as_max_epochs(trainer.fit_loop)
        last, self._last = self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST), ""
        if _goes_on_in(self.dirpath, trainer.ckpt_path):
            source = Path(str(trainer.ckpt_path))
            is_last = source.name.startswith(self.CHECKPOINT_NAME_LAST)
            self._last = str(Path(last).with_name(source.name)) if is_last else last
        else:
            self._last = "" if super().file_exists(last, trainer) else last

    def file_exists(self, filepath: str | Path, trainer: L.Trainer) -> bool:
        """Whether there is a file of others, which Lightning leaves and numbers its own: of this run's last one not."""
        return str(filepath) != self._last and super().file_exists(filepath, trainer)

    def on_load_checkpoint(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,  # noqa: ARG002
        checkpoint: dict[str, Any],
    ) -> None:
        """Find the files of a folder that was moved: Lightning keeps their paths, and forgets the scores with them."""
        for saver in trainer.checkpoint_callbacks:
            state = checkpoint["callbacks"].get(saver.state_key)
            if not (isinstance(saver, ModelCheckpoint) and state and state.get("dirpath")):
                continue
            if _goes_on_in(saver.dirpath, trainer.ckpt_path):
                checkpoint["callbacks"][saver.state_key] = _moved(state, str(saver.dirpath))

    def on_save_checkpoint(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,  # noqa: ARG002
        checkpoint: dict[str, Any],
    ) -> None:
        """Keep an epoch that ``max_steps`` or an early stop cut as one to go on in: Lightning takes it for a whole one.

        It would skip the rest of its images, and as many of the next epoch as were used.
        """
        fit_loop = checkpoint["loops"]["fit_loop"]
        batches, epochs = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_progress"]
        used = batches["current"]["completed"]
        if batches["is_last_batch"] or not 0 < used < trainer.num_training_batches:
            return
        for count in (epochs["current"], epochs["total"]):
            if count["processed"] == count["started"]:
                count["processed"] -= 1
                count["completed"] = min(count["completed"], count["processed"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on all states are restored, and what is saved is whole."""
        super().on_train_start(trainer, pl_module)
        self._began, self.is_asked_to_end = True, False
        # Lightning's own handler, which it puts back at the end, talks to the other processes while these may be in
        # another talk, and has each of them stop by itself: they would wait for each other.
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, *_: object) -> None:
        self.is_asked_to_end = True

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """End before this step on all of several processes, where one of them was asked to."""
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(self.is_asked_to_end, all=False):
            raise SIGTERMException

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave the last step of an epoch to the epoch's end: Lightning would go on from it without the validation."""
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what was due at the last step, or is due at the end of the epoch."""
        super().on_train_batch_end(trainer, pl_module, None, None, 0)
        super().on_train_epoch_end(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save, where what would be saved is sound and all processes are there."""
        together = trainer.world_size == 1 or isinstance(exception, SIGTERMException)
        if not (self._began and together) or isinstance(exception, (FloatingPointError, FullDiskError)):
            return
        loop = trainer.fit_loop.epoch_loop
        steps: Any = loop.batch_progress.total
        under_way = steps.processed < steps.ready
        add_to_stepped_batches(loop, -under_way)  # Lightning adds it on a resume, as if the step had been made
        # An epoch that has begun without a step has not begun: Lightning would count a step there on a resume.
        begun: Any = trainer.fit_loop.epoch_progress
        stepless = loop.batch_progress.current.ready == 0 < steps.ready
        for epochs in (begun.current, begun.total):
            epochs.ready -= stepless
            epochs.started -= stepless
        try:
            super().on_exception(trainer, pl_module, exception)
        except Exception as failure:  # whatever it is (a full disk, a worker that ends too), it must not hide the first
            rank_zero_warn(f"The last step could not be saved ({failure}): go on from the checkpoint before it.")
        finally:
            add_to_stepped_batches(loop, under_way)
            for epochs in (begun.current, begun.total):
                epochs.ready += stepless
                epochs.started += stepless


def _goes_on_in(folder: Any, source: Any) -> bool:
    """Whether the checkpoint `source` that a run goes on from lies in `folder`, by whatever path."""
    if not (folder and source) or "://" in f"{folder}{source}":
        return False
    return bool(os.path.realpath(folder) == os.path.realpath(Path(source).parent))


def _moved(state: dict[str, Any], folder: str) -> dict[str, Any]:
    """State of a ModelCheckpoint whose folder lies at `folder` now."""

    def now(path: str) -> str:
        inside = os.path.relpath(path, state["dirpath"]) if path else ""
        return os.path.normpath(Path(folder) / inside) if inside and not inside.startswith("..") else path

    paths = {name: now(state.get(name, "")) for name in ("best_model_path", "kth_best_model_path", "last_model_path")}
    best = {now(path): score for path, score in state.get("best_k_models", {}).items()}
    return {**state, **paths, "best_k_models": best, "dirpath": folder}
