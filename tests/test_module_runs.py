"""The module under a Trainer: logs, learning rate, optimizer, and use in a custom Lightning project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from _toy import (
    A,
    B,
    Endless,
    K,
    OwnData,
    P,
    Views,
    learning_rates,
    mean_weight,
    small,
    trainer,
    view_batch,
)
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from mlssl.module import MultiLabelSSLModule

# Outside a Trainer a step cannot log, and Lightning warns.
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")


def test_a_run_in_a_custom_project_logs_learns_and_checkpoints(tmp_path: Path) -> None:
    class OutputsOfSteps(L.Callback):
        shapes: dict[str, set[tuple[int, ...]]]

        def __init__(self) -> None:
            self.shapes = {"train": set(), "val": set()}

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.shapes["train"].add(tuple(outputs["projections"].shape))
            assert set(outputs) == {"loss", "features", "projections", "image_ids", "labels"}

        def on_validation_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            self.shapes["val"].add(tuple(outputs["image_ids"].shape))
            assert set(outputs) == {"features", "image_ids", "labels"}
            assert outputs["features"].shape == (3, pl_module.projector[0].in_features)

    seen, module = OutputsOfSteps(), small()
    before = mean_weight(module)
    callbacks = [seen, ModelCheckpoint(dirpath=tmp_path, monitor="train/loss"), LearningRateMonitor("step")]
    fitting = trainer(
        tmp_path,
        max_epochs=2,
        logger=CSVLogger(tmp_path, "", ""),
        callbacks=callbacks,
        enable_checkpointing=True,
        log_every_n_steps=1,
    )
    fitting.fit(module, datamodule=OwnData())
    assert seen.shapes == {"train": {(B, A, K, P)}, "val": {(3,)}}
    assert fitting.callback_metrics.keys() >= {"train/loss", "train/pair_loss", "train/image_aware_loss"}
    assert not torch.equal(mean_weight(module), before)
    metrics = fitting.callback_metrics
    total = metrics["train/pair_loss"] + 4 * metrics["train/image_aware_loss"]
    torch.testing.assert_close(metrics["train/loss"], total)
    assert "train/image_aware_loss" in (tmp_path / "metrics.csv").read_text().splitlines()[0]


def test_learning_rate_reads_the_loader_and_follows_a_cosine_to_zero(tmp_path: Path) -> None:
    rates = learning_rates(tmp_path, small(base_lr=0.1), max_epochs=2)  # 2 epochs of 4 steps of 2 images of 3 blocks
    peak = 0.1 * 2 * K / 256
    cosine = [0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * step / 8))) for step in range(8)]
    assert [backbone for backbone, _ in rates] == pytest.approx([peak * factor for factor in cosine], rel=1e-5)
    assert all(backbone == predictor for backbone, predictor in rates)


def test_warm_up_counts_epochs_and_accumulation_does_not_scale_the_rate(tmp_path: Path) -> None:
    module = small(base_lr=0.1, warmup_epochs=1.5)
    rates = learning_rates(tmp_path, module, max_epochs=3, accumulate_grad_batches=2)  # 6 optimizer steps, 3 of warm-up
    peak = 0.1 * 2 * K / 256
    expected = [0.25, 0.5, 0.75, 1.0, 0.75, 0.25]  # half a cosine over the last 3 steps
    assert [backbone for backbone, _ in rates] == pytest.approx([peak * factor for factor in expected])


def test_predictor_keeps_its_learning_rate_on_request(tmp_path: Path) -> None:
    rates = learning_rates(tmp_path, small(constant_predictor_lr=True, decay_norm_and_bias=False))
    assert len(rates[0]) == 4  # weights and vectors of backbone with projector, and of the predictor
    peak = 0.05 * 2 * K / 256
    assert [group[0] for group in rates] == sorted({group[0] for group in rates}, reverse=True)
    assert all(group[2:] == pytest.approx([peak, peak]) for group in rates)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars", "muon"])
def test_every_parameter_is_in_the_optimizer_once_and_learns(optimizer: str, tmp_path: Path) -> None:
    module = small(optimizer=optimizer, decay_norm_and_bias=False)
    before = [p.detach().clone() for p in module.parameters()]
    fitting = trainer(tmp_path)
    fitting.fit(module, DataLoader(Views(), batch_size=B))
    groups = fitting.optimizers[0].param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters())
    assert {group["weight_decay"] for group in groups} == {1e-4, 0.0}
    assert sum(not torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True)) > 10


def test_views_per_step_are_required_if_the_loader_does_not_define_them(tmp_path: Path) -> None:
    loader = DataLoader([Views()[index] for index in range(4)], batch_size=2)
    with pytest.raises(ValueError, match=r"train loader \(DataLoader\) does not define how many views a step has"):
        trainer(tmp_path).fit(small(), loader)
    rates = learning_rates(tmp_path, small(views_per_step=512), loader)
    assert rates[0][0] == pytest.approx(0.1)


def test_an_endless_stream_needs_max_steps(tmp_path: Path) -> None:
    loader = DataLoader(Endless(), batch_size=2)
    with pytest.raises(ValueError, match="this run has no end: pass max_epochs or max_steps to the Trainer"):
        trainer(tmp_path).fit(small(), loader)
    with pytest.raises(ValueError, match=r"warmup_epochs=1 was given, but the train loader has no len"):
        trainer(tmp_path, max_steps=2).fit(small(warmup_epochs=1), loader)
    assert len(learning_rates(tmp_path, small(), loader, max_steps=3)) == 3


@pytest.mark.parametrize("limits", [{"max_steps": 3, "max_epochs": None}, {"max_steps": 3, "max_epochs": -1}])
def test_run_limited_by_steps_alone_reads_the_loader_too(limits: dict[str, Any], tmp_path: Path) -> None:
    rates = learning_rates(tmp_path, small(warmup_epochs=0.25), **limits)
    peak = 0.05 * 2 * K / 256
    assert [backbone for backbone, _ in rates] == pytest.approx([peak / 2, peak, peak / 2])


def test_run_without_any_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this run has no end: pass max_epochs or max_steps to the Trainer"):
        trainer(tmp_path, max_epochs=-1).fit(small(), OwnData())


def test_warm_up_longer_than_the_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="warm-up of 4 steps in a run of 2: pass a warm-up that is shorter"):
        trainer(tmp_path).fit(small(warmup_epochs=2), OwnData())


def test_parameters_that_a_subclass_adds_are_trained(tmp_path: Path) -> None:
    class Mine(MultiLabelSSLModule):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            self.scale = nn.Linear(P, P)
            self.fixed = nn.Linear(P, P).requires_grad_(False)

        def targets(self, embeddings: Any, batch: Any) -> Any:
            return [self.scale(target) for target in super().targets(embeddings, batch)]

    module = small(kind=Mine)
    before = module.scale.weight.detach().clone(), module.fixed.weight.detach().clone()
    trainer(tmp_path).fit(module, OwnData())
    assert not torch.equal(module.scale.weight, before[0])
    assert torch.equal(module.fixed.weight, before[1])


@pytest.mark.parametrize(("settings", "momentum"), [({}, 0.9), ({"optimizer_kwargs": {"momentum": 0.5}}, 0.5)])
def test_arguments_reach_the_optimizer(settings: dict[str, Any], momentum: float, tmp_path: Path) -> None:
    fitting = trainer(tmp_path)
    fitting.fit(small(**settings), OwnData())
    assert type(fitting.optimizers[0]) is torch.optim.SGD
    assert {(group["momentum"], group["nesterov"]) for group in fitting.optimizers[0].param_groups} == {
        (momentum, False)
    }


def test_run_of_no_epochs_ends_at_once(tmp_path: Path) -> None:
    trainer(tmp_path, max_epochs=0).fit(small(), OwnData())


class Poisoned(Views):
    """The images of a run that fails at its fourth step, where the weights become NaN."""

    def __init__(self, module: MultiLabelSSLModule) -> None:
        super().__init__(4 * 2)
        self.module = module

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 6:
            next(self.module.projector.parameters()).data.fill_(torch.nan)
        return super().__getitem__(index)


@pytest.mark.parametrize("saving", [True, False])
def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_last_checkpoint(saving: bool, tmp_path: Path) -> None:
    module = small()
    callbacks = [ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)]
    fitting = trainer(tmp_path, callbacks=callbacks if saving else None, enable_checkpointing=saving)
    last = r"\S*step=2.ckpt" if saving else "none yet"
    with pytest.raises(
        FloatingPointError,
        match=r"The loss is nan at step 3 \(epoch 0\) on rank 0, with the images \[60, 70\]"
        rf".*last good checkpoint is {last}\. Lower base_lr",
    ):
        fitting.fit(module, DataLoader(Poisoned(module), batch_size=2))
    assert [path.name for path in tmp_path.glob("*.ckpt")] == (["step=2.ckpt"] if saving else [])


@pytest.mark.parametrize(
    "settings", [{}, {"form": "mean_of_logs", "positives": "gated(0.3)"}], ids=["default", "gated"]
)
def test_a_step_does_not_synchronise_with_the_device(settings: dict[str, Any]) -> None:
    """A tensor on the meta device has no values: reading one, or a shape that depends on one, raises."""
    module = small(**settings).to("meta")
    batch = {name: value.to("meta") for name, value in view_batch().items()}
    module.training_step(batch, 2)["loss"].backward()  # not the first step of an epoch, which checks its batch
    assert all(p.grad is not None for p in module.parameters())
    with pytest.raises(RuntimeError, match="meta"):
        module.training_step(batch, 2)["loss"].item()


def test_progress_bar_shows_the_loss_a_step_late(tmp_path: Path) -> None:
    class Bar(L.Callback):
        shown: list[float | None] = []  # noqa: RUF012
        losses: list[float] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.shown.append(trainer.progress_bar_metrics.get("loss"))
            self.losses.append(float(trainer.callback_metrics["train/loss"]))

    bar = Bar()
    trainer(tmp_path, callbacks=[bar]).fit(small(), DataLoader(Views(4 * 2), batch_size=2))
    assert bar.shown == pytest.approx([None, *bar.losses[:-1]])


@pytest.mark.slow
def test_compiled_step_is_the_plain_one(tmp_path: Path) -> None:
    weights = []
    for compiled in (False, True):
        module = small(compile=compiled, base_lr=0.01)
        trainer(tmp_path, max_epochs=1).fit(module, DataLoader(Views(2 * 4), batch_size=4))
        assert (module.backbone._compiled_call_impl is not None) is compiled
        assert not any("_orig_mod" in name for name in module.state_dict())
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-2, atol=1e-4)


def test_gradients_can_be_clipped(tmp_path: Path) -> None:
    for clip, fused in ((None, True), (0.5, False)):
        fitting = trainer(tmp_path, gradient_clip_val=clip, precision="bf16-mixed")
        fitting.fit(small(), DataLoader(Views(2 * 2), batch_size=2))
        assert bool(fitting.optimizers[0].defaults["fused"]) is fused


def test_subclass_may_bring_its_own_optimizer(tmp_path: Path) -> None:
    class Mine(MultiLabelSSLModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    torch.manual_seed(0)
    module = Mine("test_resnet", projection_dim=P, predictor_dim=4)
    fitting = trainer(tmp_path)
    fitting.fit(module, DataLoader([Views()[index] for index in range(4)], batch_size=2))
    assert type(fitting.optimizers[0]) is torch.optim.Adam
    assert fitting.global_step == 2


def test_a_subclass_may_rename_and_change_its_arguments(tmp_path: Path) -> None:
    """Lightning reads hyper-parameters from the subclass; the settings must come from the arguments it passes on."""

    class Mine(MultiLabelSSLModule):
        def __init__(self, width: int = P, base_lr: float = 0.1) -> None:
            super().__init__("test_resnet", projection_dim=width, predictor_dim=4, base_lr=2 * base_lr)

    rates = learning_rates(tmp_path, Mine(base_lr=0.4))
    assert rates[0][0] == pytest.approx(0.8 * 2 * K / 256)


def test_lightnings_weight_averaging_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    module = small()
    callbacks = [EMAWeightAveraging(decay=0.5), ModelCheckpoint(dirpath=tmp_path, filename="ema")]
    fitting = trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True)
    fitting.fit(module, OwnData())
    saved = torch.load(tmp_path / "ema.ckpt", weights_only=True)
    own, average = saved["current_model_state"], saved["state_dict"]
    assert own.keys() == average.keys()
    assert not torch.equal(own["projector.0.weight"], average["projector.0.weight"])
    torch.testing.assert_close(module.state_dict(), average)  # Lightning leaves the average in the module
    loaded = MultiLabelSSLModule.load_from_checkpoint(tmp_path / "ema.ckpt", weights_only=True)
    torch.testing.assert_close(loaded.state_dict(), average)
    again = trainer(tmp_path, max_epochs=2, callbacks=callbacks, enable_checkpointing=True)
    again.fit(small(), OwnData(), ckpt_path=tmp_path / "ema.ckpt", weights_only=True)
    assert again.global_step == 4
