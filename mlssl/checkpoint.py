"""Checkpoints: atomic, loadable without running code, and saved when a run is interrupted."""

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
from mlssl.requeue import Requeue
from mlssl.weights.checkpoints import load_plain


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write local checkpoints to a temporary name, flush them to disk, then rename them.

    If a run is killed or the disk fills up while saving, the previous checkpoint stays intact. Pass
    ``plugins=[AtomicCheckpointIO()]`` to your own Trainer; ``mlssl fit`` does. Lightning handles paths of other file
    systems (``s3://…``).
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` and replace ``path`` once it is complete.

        Raises:
            OSError: It cannot be written (disk full, no permission).
            TypeError: ``storage_options`` are given.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()  # written by Python, because torch does not report a full disk
        torch.save(checkpoint, buffer)
        with written_aside(path) as aside:
            aside.write_bytes(buffer.getbuffer())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint with ``weights_only=True``, so that no code in it runs, unless False is requested.

        Raises:
            FileNotFoundError: There is none at ``path``.
            ValueError: It is damaged, not a checkpoint, or contains pickled Python objects.
        """
        plain_tensors = True if weights_only is None else weights_only
        if plain_tensors and Path(path).is_file():
            whole: dict[str, Any] = load_plain(Path(path), map_location=map_location)
            return whole
        checkpoint: dict[str, Any] = super().load_checkpoint(path, map_location, plain_tensors)
        return checkpoint


class RunCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that also saves on SIGTERM and on errors.

    A run resumed from a checkpoint in this folder continues with its files, even if the folder was moved or copied:
    ``last.ckpt`` is replaced, without a ``last-v1.ckpt`` next to it. Other ModelCheckpoints with this folder also keep
    their best scores. A new run does not change files of another run.

    ``save_on_exception`` is True by default. Nothing is saved before the first step, after a non-finite loss (it is
    already in the running statistics), on a full disk, or if one of several processes fails: saving would wait for the
    others. If one of several processes gets SIGTERM, all end before the same step.

    In a SLURM job, the signal of ``SLURMEnvironment(auto_requeue=True)``, SIGUSR1 by default, also ends and saves the
    run, and SLURM then starts the job again.
    """

    def __init__(self, *args: Any, save_on_exception: bool = True, **settings: Any) -> None:
        super().__init__(*args, save_on_exception=save_on_exception, **settings)  # type: ignore[misc]
        self._began = False
        self._last = ""
        self._requeue: Requeue | None = None
        self.is_asked_to_end = False
        """Whether this process received SLURM's signal, or SIGTERM as one of several; the Trainer records SIGTERM to a
        single process."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Reset the state of the previous run."""
        super().setup(trainer, pl_module, stage)
        self._began = self.is_asked_to_end = False
        self._requeue = None
        if stage != "fit":
            return
        self._requeue = Requeue(trainer, self._ask_to_end)
        resume_max_steps_as_max_epochs(trainer.fit_loop)
        last, self._last = self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST), ""
        if _resumes_in(self.dirpath, trainer.ckpt_path):
            source = Path(str(trainer.ckpt_path))
            is_last = source.name.startswith(self.CHECKPOINT_NAME_LAST)
            self._last = str(Path(last).with_name(source.name)) if is_last else last
        else:
            self._last = "" if super().file_exists(last, trainer) else last

    def file_exists(self, filepath: str | Path, trainer: L.Trainer) -> bool:
        """Whether the file belongs to another run, so that Lightning adds a version number."""
        return str(filepath) != self._last and super().file_exists(filepath, trainer)

    def on_load_checkpoint(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,  # noqa: ARG002
        checkpoint: dict[str, Any],
    ) -> None:
        """Update the paths of a moved folder; Lightning would drop the scores with the old paths."""
        for saver in trainer.checkpoint_callbacks:
            state = checkpoint["callbacks"].get(saver.state_key)
            if not (isinstance(saver, ModelCheckpoint) and state and state.get("dirpath")):
                continue
            if _resumes_in(saver.dirpath, trainer.ckpt_path):
                checkpoint["callbacks"][saver.state_key] = _moved(state, str(saver.dirpath))

    def on_save_checkpoint(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,  # noqa: ARG002
        checkpoint: dict[str, Any],
    ) -> None:
        """Mark an epoch cut by ``max_steps`` or an early stop as unfinished; Lightning counts it as complete.

        Lightning would skip the rest of its images, and as many images of the next epoch as were used.
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
        """From here on all states are restored, so that checkpoints are complete."""
        super().on_train_start(trainer, pl_module)
        self._began = True
        if self._requeue is not None:
            self._requeue.begin()
        # Lightning's handler, restored at the end, communicates while other processes may be in another collective,
        # and stops each process on its own: they would deadlock.
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._ask_to_end)

    def _ask_to_end(self, *_: object) -> None:
        self.is_asked_to_end = True

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """End all processes before this step if one of them was asked to end."""
        is_asked = self.is_asked_to_end
        if trainer.world_size > 1:
            is_asked = trainer.strategy.reduce_boolean_decision(is_asked, all=False)
        if is_asked:
            raise SIGTERMException

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Defer saving at the last step to the end of the epoch: a resume from that step would skip the validation."""
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the deferred checkpoint of the last step, or the one due at the end of the epoch."""
        super().on_train_batch_end(trainer, pl_module, None, None, 0)
        super().on_train_epoch_end(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save, if the state is sound and all processes are alive."""
        together = trainer.world_size == 1 or isinstance(exception, SIGTERMException)
        if not (self._began and together) or isinstance(exception, (FloatingPointError, FullDiskError)):
            return
        loop = trainer.fit_loop.epoch_loop
        steps: Any = loop.batch_progress.total
        under_way = steps.processed < steps.ready
        add_to_stepped_batches(loop, -under_way)  # Lightning adds it on a resume, as if the step were done
        # Treat an epoch without steps as not begun: Lightning would count a step there on a resume.
        begun: Any = trainer.fit_loop.epoch_progress
        stepless = loop.batch_progress.current.ready == 0 < steps.ready
        for epochs in (begun.current, begun.total):
            epochs.ready -= stepless
            epochs.started -= stepless
        try:
            super().on_exception(trainer, pl_module, exception)
        except Exception as failure:  # any failure (full disk, dying worker) must not hide the first error
            rank_zero_warn(f"The last step could not be saved ({failure}): resume from the previous checkpoint.")
        else:
            if self._requeue is not None and isinstance(exception, SIGTERMException):
                self._requeue.finish()
        finally:
            add_to_stepped_batches(loop, under_way)
            for epochs in (begun.current, begun.total):
                epochs.ready += stepless
                epochs.started += stepless


def _resumes_in(folder: Any, source: Any) -> bool:
    """Whether the checkpoint `source` of a resumed run is in `folder`, however the path is written."""
    if not (folder and source) or "://" in f"{folder}{source}":
        return False
    return bool(os.path.realpath(folder) == os.path.realpath(Path(source).parent))


def _moved(state: dict[str, Any], folder: str) -> dict[str, Any]:
    """State of a ModelCheckpoint with its folder updated to `folder`."""

    def now(path: str) -> str:
        inside = os.path.relpath(path, state["dirpath"]) if path else ""
        return os.path.normpath(Path(folder) / inside) if inside and not inside.startswith("..") else path

    paths = {name: now(state.get(name, "")) for name in ("best_model_path", "kth_best_model_path", "last_model_path")}
    best = {now(path): score for path, score in state.get("best_k_models", {}).items()}
    return {**state, **paths, "best_k_models": best, "dirpath": folder}
