"""Monitor collapse: log spread, rank and cosines of the projections, and warn."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from mlssl.callbacks.networks import BACKBONE, NetworkCallback
from mlssl.evaluation.collapse import MAX_ROWS, MIN_RANK, MIN_STD, REMEDY, collapse_measures


class CollapseMonitor(NetworkCallback):
    """Log the spread of a batch's projections, and warn once if they collapse.

    Logs, at the steps that are logged and from at most 1024 views on this device: ``collapse/std``,
    ``collapse/rank``, and the mean cosines ``collapse/same_block`` (two branches of one block),
    ``collapse/same_image`` (two blocks of one image) and ``collapse/other_image``; see `collapse_measures`. For another
    `network` than the backbone its features are measured instead, as ``collapse/<network>/std`` and so on, which costs
    one forward pass on these views, in eval mode and without gradient.

    Args:
        min_std: Minimum healthy ``collapse/std``, 0 to 1; 0.2 corresponds to a mean cosine between views of about 0.96.
        min_rank: Minimum healthy ``collapse/rank``, at least 1. For small batches, a quarter of the number of
            projections if that is less.
        stop: Whether to stop the training too, on all devices.
        network: Name of the submodule to measure, from normalised images to features (n, D).

    Raises:
        ValueError: If a threshold is out of range; before the run, if the module has no such network.
        TypeError: If there is another network, and the model has no ``normalize`` for its images, or FSDP shards it.
    """

    def __init__(
        self,
        min_std: float = MIN_STD,
        min_rank: float = MIN_RANK,
        *,
        stop: bool = False,
        network: str = BACKBONE,
    ) -> None:
        super().__init__(network)
        if not 0 <= min_std <= 1:
            raise ValueError(f"min_std={min_std} was given: pass a number from 0 (never warn) to 1.")
        if not min_rank >= 1:
            raise ValueError(f"min_rank={min_rank} was given: pass at least 1 (never warn).")
        self.min_std = min_std
        self.min_rank = min_rank
        self.stop = stop
        self._has_warned = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a network that no device can call."""
        if not self.is_of_backbone:
            self.refuse_shards(trainer, pl_module, f"CollapseMonitor measures {self.network!r}", "measure the backbone")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure at logged steps."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every == 0 or trainer.global_step % every != 0:
            return
        z = self._to_measure(trainer, pl_module, outputs, batch)
        if z is None:
            self.say("the training step returns neither projections nor features to measure.")
            return
        measured = {"finite": z.isfinite().all().float()} | collapse_measures(z.nan_to_num(0, 0, 0))
        numbers: list[float] = (
            torch.stack(list(measured.values())).cpu().tolist()
        )  # one copy to the host, as each one synchronises
        measures = dict(zip(measured, numbers, strict=True))
        if not measures.pop("finite"):  # such a step is skipped or ends the run
            return
        for name, value in measures.items():
            pl_module.log(self.metric(f"collapse/{name}"), value, batch_size=len(z))

        min_rank = min(self.min_rank, len(z) / 4)
        collapsed = measures["std"] < self.min_std or measures["rank"] < min_rank
        if collapsed and not self._has_warned:
            self._has_warned = True
            what = "projections" if self.is_of_backbone else f"features of {self.network}"
            rank_zero_warn(
                f"The representation is collapsing at step {trainer.global_step}: the {what} of all images are nearly "
                f"equal (spread {measures['std']:.2f}, healthy from {self.min_std} to 1; effective rank "
                f"{measures['rank']:.1f}, healthy from {min_rank:g}). {REMEDY}"
            )
        if self.stop and trainer.strategy.reduce_boolean_decision(collapsed, all=False):
            trainer.should_stop = True

    def _to_measure(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any) -> Tensor | None:
        """Projections or features (B, A, K, ·) of the step's views; None if the step returns neither."""
        if self.is_of_backbone:
            names = [name for name in ("projections", "features") if isinstance(outputs, Mapping) and name in outputs]
            return outputs[names[0]] if names else None
        if not isinstance(batch, Mapping) or "views" not in batch:
            return None
        views: Tensor = batch["views"]
        branches, blocks = views.shape[1:3]
        return self.features_of_views(trainer, pl_module, views[: max(2, MAX_ROWS // (branches * blocks))])
