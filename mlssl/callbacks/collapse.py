"""Is the representation collapsing? Spread, rank and cosines of the projections, and a warning in plain words."""

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from mlssl.evaluation.collapse import MIN_RANK, MIN_STD, REMEDY, collapse_measures


class CollapseMonitor(L.Callback):
    """Log how far the projections of a batch spread, and warn once where they fall together.

    Logs, at the steps that are logged and from at most 1024 views on this device: ``collapse/std``,
    ``collapse/rank``, and the mean cosines ``collapse/same_block`` (two branches of one block),
    ``collapse/same_image`` (two blocks of one image) and ``collapse/other_image``; see `collapse_measures`.

    Args:
        min_std: Least healthy ``collapse/std``, 0 to 1; 0.2 is a mean cosine between views of about 0.96.
        min_rank: Least healthy ``collapse/rank``, at least 1. Batches of few images, which span few directions, are
            held against a quarter of their number, if that is less.
        stop: Whether to stop the training as well, on all devices.

    Raises:
        ValueError: On a threshold out of range.
    """

    def __init__(self, min_std: float = MIN_STD, min_rank: float = MIN_RANK, *, stop: bool = False) -> None:
        if not 0 <= min_std <= 1:
            raise ValueError(f"min_std={min_std} was given: pass a number between 0 (never warn) and 1 (spread out).")
        if not min_rank >= 1:
            raise ValueError(f"min_rank={min_rank} was given: pass a number of at least 1, which never warns.")
        self.min_std = min_std
        self.min_rank = min_rank
        self.stop = stop
        self._said = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure, where the step is logged."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every == 0 or trainer.global_step % every != 0:
            return
        if not isinstance(outputs, Mapping) or not outputs.keys() & {"projections", "features"}:
            if not self._said:
                rank_zero_info("CollapseMonitor: the training step returns neither projections nor features to watch.")
                self._said = True
            return
        z = outputs["projections"] if "projections" in outputs else outputs["features"]
        if not z.isfinite().all():  # a step that is skipped for it
            return
        measures = {name: value.item() for name, value in collapse_measures(z).items()}
        for name, value in measures.items():
            pl_module.log(f"collapse/{name}", value, batch_size=len(z))

        least_rank = min(self.min_rank, len(z) / 4)
        collapsed = measures["std"] < self.min_std or measures["rank"] < least_rank
        if collapsed and not self._said:
            self._said = True
            rank_zero_warn(
                f"The representation is collapsing at step {trainer.global_step}: the projections of all images have "
                f"become alike (spread {measures['std']:.2f}, where 1 is healthy and below {self.min_std} is not; "
                f"effective rank {measures['rank']:.1f}, where below {least_rank:g} is not). {REMEDY}"
            )
        if self.stop and trainer.strategy.reduce_boolean_decision(collapsed, all=False):
            trainer.should_stop = True
