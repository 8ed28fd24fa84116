"""The LightningModule: the method's step, the recipe, and life inside somebody's own Lightning project."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import timm
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.losses import image_aware_contrastive_loss, negative_cosine_similarity
from mlssl.module import MultiLabelSSLModule

# A step outside a Trainer has nobody to log to, and Lightning says so.
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")

B, A, K, P, S, LABELS = 4, 2, 3, 16, 32, 5
"""Images, branches, blocks, projection width, side of a view and labels of these tests."""


class Views(Dataset[dict[str, Any]]):
    """What somebody's own data set may be: views, ids and labels of `num` images, drawn by index."""

    num_blocks = K

    def __init__(self, num: int = 2 * B, channels: int = 3, labelled: bool = True) -> None:
        self.num, self.channels, self.labelled = num, channels, labelled

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        shape = (A, K, self.channels, S, S)
        item: dict[str, Any] = {"views": torch.randint(256, shape, dtype=torch.uint8, generator=generator)}
        item["image_ids"] = 10 * index
        if self.labelled:
            item["labels"] = torch.randint(-1, 2, (LABELS,), dtype=torch.int8, generator=generator)
        return item


class Images(Dataset[dict[str, Any]]):
    """Whole images of the same kind, which need not be square."""

    def __init__(self, num: int = 6, channels: int = 3) -> None:
        self.num, self.channels = num, channels

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1000 + index)
        pixels = torch.randint(256, (self.channels, S, S + 16), dtype=torch.uint8, generator=generator)
        return {"image": pixels, "image_ids": index, "labels": torch.ones(LABELS, dtype=torch.int8)}


class OwnData(L.LightningDataModule):
    """Somebody's own datamodule: all that the module asks of it is the batch."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Views(), batch_size=B)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Images(), batch_size=3)

    def predict_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Images(), batch_size=4)


class Endless(IterableDataset[dict[str, Any]]):
    """A stream of views, of which nobody knows the length."""

    num_blocks = K

    def __iter__(self) -> Iterator[dict[str, Any]]:
        source = Views()
        index = 0
        while True:
            yield source[index]
            index += 1


def small(backbone: Any = "test_resnet", **settings: Any) -> MultiLabelSSLModule:
    torch.manual_seed(0)
    return MultiLabelSSLModule(backbone, **{"projection_dim": P, "predictor_dim": 4, **settings})


def view_batch(num: int = B, **changes: Any) -> Any:
    batch = next(iter(DataLoader(Views(num), batch_size=num)))
    return {name: value for name, value in {**batch, **changes}.items() if value is not None}


def trainer(folder: Path, **settings: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    return L.Trainer(**{**quiet, **settings})


def own_network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def mean_weight(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


# ---------------------------------------------------------------------- settings


def test_defaults_are_the_numbers_of_the_method() -> None:
    defaults = {name: p.default for name, p in inspect.signature(MultiLabelSSLModule).parameters.items()}
    of_the_paper = {
        "backbone": "resnet50",
        "projection_dim": 2048,
        "predictor_dim": 512,
        "temperature": 0.3,
        "base_temperature": 0.07,
        "contrastive_weight": 4.0,
        "stop_gradient": False,
        "positives": "log_of_sum",
        "min_similarity": None,
        "optimizer": "sgd",
        "base_lr": 0.05,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "warmup_epochs": 0.0,
        "constant_predictor_lr": False,
    }
    assert {name: defaults[name] for name in of_the_paper} == of_the_paper


def test_settings_reach_the_parts_that_they_are_meant_for() -> None:
    module = small(
        temperature=0.2, base_temperature=0.1, positives="mean_of_logs", min_similarity=0.4, chunk_size=8, std=[1.0] * 3
    )
    loss = module.image_aware_loss
    assert (loss.temperature, loss.base_temperature, loss.positives) == (0.2, 0.1, "mean_of_logs")
    assert (loss.min_similarity, loss.chunk_size) == (0.4, 8)
    width = module.projector[0].in_features
    assert module(torch.zeros(2, 3, S, S)).shape == (2, width)
    assert [layer.out_features for layer in module.projector if isinstance(layer, nn.Linear)] == [P, P, P]
    assert [layer.out_features for layer in module.predictor if isinstance(layer, nn.Linear)] == [4, P]
    assert module.pixel_std.flatten().tolist() == [1, 1, 1]
    assert module.hparams["chunk_size"] == 8
    assert not {name for name in module.state_dict() if name.startswith("pixel")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "resnet5O"}, "Unknown backbone 'resnet5O': did you mean .*resnet50"),
        ({"projection_dim": 0}, "projection_dim=0 was given: pass a number of at least 1"),
        ({"predictor_dim": -1}, "predictor_dim=-1 was given: pass a number of at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 was given: pass a number above 0"),
        ({"base_temperature": -1.0}, "base_temperature=-1.0 was given: pass a number above 0"),
        ({"contrastive_weight": -0.1}, "contrastive_weight=-0.1 was given: pass a number of at least 0"),
        ({"base_lr": -0.1}, "base_lr=-0.1 was given: pass a number of at least 0"),
        ({"base_lr": float("nan")}, "base_lr=nan was given: pass a number of at least 0"),
        ({"momentum": -0.1}, "momentum=-0.1 was given"),
        ({"weight_decay": -1e-4}, "weight_decay=-0.0001 was given"),
        ({"warmup_epochs": -1}, "warmup_epochs=-1 was given"),
        ({"views_per_step": 0}, "views_per_step=0 was given: pass a number of at least 1"),
        ({"positives": "all"}, "positives='all' is unknown"),
        ({"min_similarity": 0.3}, "min_similarity=0.3 gates single positives"),
        ({"positives": "mean_of_logs", "min_similarity": 2.0}, "min_similarity=2.0 is no cosine"),
        ({"chunk_size": 0}, "chunk_size=0 was given"),
        ({"mean": [0.5, 0.5]}, r"mean=\[0.5, 0.5\] and std=.* do not fit: pass one number a channel in each"),
        ({"std": [0.0, 0.2, 0.2]}, "do not fit: pass one number a channel in each, std above 0"),
    ],
)
def test_bad_settings_are_refused_when_the_module_is_built(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**settings)


# ---------------------------------------------------------------------- the step


@pytest.mark.parametrize("labelled", [True, False])
def test_step_returns_what_callbacks_read(labelled: bool) -> None:
    module = small()
    batch = view_batch() if labelled else view_batch(labels=None)
    outputs = module.training_step(batch, 0)
    width = module.projector[0].in_features
    assert outputs["loss"].shape == ()
    assert outputs["loss"].requires_grad
    assert outputs["features"].shape == (B, A, K, width)
    assert outputs["projections"].shape == (B, A, K, P)
    assert not outputs["features"].requires_grad
    assert not outputs["projections"].requires_grad
    assert outputs["image_ids"] is batch["image_ids"]
    assert ("labels" in outputs) is labelled
    if labelled:
        assert outputs["labels"] is batch["labels"]


def test_features_lie_where_their_views_lay() -> None:
    module = small().eval()
    batch = view_batch()
    outputs = module.training_step(batch, 0)
    for b, a, k in [(0, 0, 0), (1, 0, 2), (3, 1, 1), (2, 1, 0)]:
        features = module(batch["views"][b, a, k][None])
        torch.testing.assert_close(outputs["features"][b, a, k], features[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs["projections"][b, a, k], module.projector(features)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_loss_and_gradients_are_those_of_the_method(stop_gradient: bool) -> None:
    batch = view_batch()
    module = small(stop_gradient=stop_gradient, contrastive_weight=2.5, temperature=0.2)
    module.training_step(batch, 0)["loss"].backward()
    gradients = [p.grad for p in module.parameters()]

    plain = small(stop_gradient=stop_gradient)
    ids = batch["image_ids"].repeat_interleave(K)
    z, p = [], []
    for branch in range(A):
        images = (batch["views"][:, branch].reshape(B * K, 3, S, S) / 255 - plain.pixel_mean) / plain.pixel_std
        z.append(plain.projector(plain.backbone(images)))
        p.append(plain.predictor(z[branch]))
    target = [one.detach() if stop_gradient else one for one in z]
    pair = (negative_cosine_similarity(p[0], target[1]) + negative_cosine_similarity(p[1], target[0])) / 2
    sets = [torch.cat([p[0], z[1]]), torch.cat([p[1], z[0]])]
    aware = sum(image_aware_contrastive_loss(one, torch.cat([ids, ids]), temperature=0.2) for one in sets) / 2
    (pair + 2.5 * aware).backward()
    for ours, parameter in zip(gradients, plain.parameters(), strict=True):
        assert ours is not None  # no parameter is unused, so that DDP need not look for any
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-5)


def test_each_branch_has_batch_statistics_of_its_own() -> None:
    batch = view_batch()
    changed = dict(batch, views=batch["views"].clone())
    changed["views"][:, 1] = 255 - changed["views"][:, 1]
    one, other = small().training_step(batch, 0), small().training_step(changed, 0)
    assert torch.equal(one["features"][:, 0], other["features"][:, 0])
    assert not torch.equal(one["features"][:, 1], other["features"][:, 1])


def test_stopped_gradient_changes_the_gradient_and_not_the_loss() -> None:
    modules = [small(stop_gradient=stop, contrastive_weight=0.0) for stop in (False, True)]
    losses = [module.training_step(view_batch(), 0)["loss"] for module in modules]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert not torch.allclose(*[module.backbone.conv1[0].weight.grad for module in modules])  # type: ignore[union-attr,index]


def test_frozen_parts_get_no_gradient() -> None:
    module = small()
    module.backbone.requires_grad_(False)
    module.training_step(view_batch(), 0)["loss"].backward()
    assert all(p.grad is None for p in module.backbone.parameters())
    assert all(p.grad is not None for p in module.projector.parameters())


def test_step_in_bfloat16_computes_its_loss_in_float32() -> None:
    exact = small().training_step(view_batch(), 0)["loss"]
    module = small()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = module.training_step(view_batch(), 0)
    assert outputs["features"].dtype == outputs["projections"].dtype == torch.bfloat16
    assert outputs["loss"].dtype == torch.float32
    assert outputs["loss"].item() == pytest.approx(exact.item(), rel=0.05)
    outputs["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("labels", [torch.bool, torch.int64])
def test_labels_may_be_of_any_integer_kind(labels: torch.dtype) -> None:
    small().training_step(view_batch(labels=torch.ones(B, LABELS, dtype=labels)), 0)


def test_one_block_an_image_still_has_the_other_branch_as_positive() -> None:
    batch = view_batch()
    loss = small().training_step(dict(batch, views=batch["views"][:, :, :1]), 0)["loss"]
    assert torch.isfinite(loss)


def test_blank_images_leave_the_weights_finite(tmp_path: Path) -> None:
    module = small()
    loader = DataLoader([{**Views()[i], "views": torch.zeros(A, K, 3, S, S, dtype=torch.uint8)} for i in range(8)], B)
    module.views_per_step = B * K
    trainer(tmp_path, max_epochs=3).fit(module, loader)
    assert torch.isfinite(mean_weight(module)).all()


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_are_normalised_from_bytes_and_from_fractions_alike(channels_last: bool) -> None:
    module = small(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7], channels_last=channels_last).eval()
    pixels = Views()[0]["views"][0]
    normalised = module.normalize(pixels)
    expected = (pixels / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.6, 0.7])[
        :, None, None
    ]
    torch.testing.assert_close(normalised, expected)
    torch.testing.assert_close(module.normalize(pixels / 255), normalised)
    assert normalised.is_contiguous(memory_format=torch.channels_last) is channels_last
    torch.testing.assert_close(module(pixels), module.backbone(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 5])
def test_images_of_other_channels_run_a_step(channels: int) -> None:
    module = small(backbone_kwargs={"in_chans": channels})
    batch = next(iter(DataLoader(Views(B, channels), batch_size=B)))
    outputs = module.training_step(batch, 0)
    outputs["loss"].backward()
    assert module.pixel_mean.shape == (1, channels, 1, 1)


@pytest.mark.parametrize(
    "backbone",
    ["test_resnet", "test_convnext", "test_vit", "convnext_atto", "vit_tiny_patch16_224", "torchvision/resnet18"],
)
def test_backbones_of_each_family_run_a_step_and_take_images_of_another_size(backbone: str) -> None:
    module = small(backbone)
    module.training_step(view_batch(2), 0)["loss"].backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
    assert module.eval()(torch.zeros(2, 3, 64, 48, dtype=torch.uint8)).ndim == 2


# ---------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"views": torch.zeros(B, A, 3, S, S, dtype=torch.uint8)},
            ValueError,
            r"'views' has shape \(4, 2, 3, 32, 32\)",
        ),
        ({"views": torch.zeros(B, 1, K, 3, S, S, dtype=torch.uint8)}, ValueError, r"'views' has shape \(4, 1, 3"),
        ({"views": torch.zeros(B, A, K, 3, S, S)}, TypeError, "'views' is Tensor of torch.float32"),
        ({"views": None}, ValueError, r"lacks \['views'\]"),
        ({"image_ids": torch.arange(B + 1)}, ValueError, r"'image_ids' has shape \(5,\) for 4 images"),
        ({"image_ids": torch.zeros(B, dtype=torch.long)}, ValueError, "'image_ids' repeats 3 of 4 ids"),
        ({"labels": torch.zeros(B, LABELS)}, TypeError, "'labels' is Tensor of torch.float32"),
        ({"labels": torch.zeros(B + 1, LABELS, dtype=torch.int8)}, ValueError, r"'labels' has shape \(5, 5\) for 4"),
        ({"labels": torch.full((B, LABELS), 2, dtype=torch.int8)}, ValueError, "'labels' holds"),
    ],
)
def test_first_batch_that_breaks_the_contract_is_refused_with_the_contract(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=rf"(?s){message}.*A training batch is a mapping with.*uint8 \(B, A, K, C, S, S\)"):
        small().training_step(view_batch(**changes), 0)


def test_whole_images_that_break_the_contract_are_refused_with_the_contract() -> None:
    module = small().eval()
    for step in (module.validation_step, module.test_step, module.predict_step):
        with pytest.raises(ValueError, match=r"(?s)'image' has shape \(4, 32, 32\).*uint8 \(B, C, H, W\)"):
            step({"image": torch.zeros(4, S, S, dtype=torch.uint8), "image_ids": torch.arange(4)}, 0)  # type: ignore[operator]
        with pytest.raises(TypeError, match=r"a batch of type list was given\. An evaluation batch is a mapping"):
            step([torch.zeros(4, 3, S, S)], 0)  # type: ignore[operator]


def test_step_of_one_image_is_refused() -> None:
    with pytest.raises(ValueError, match="A step has 1 image over all devices, and nothing to push it away from"):
        small().training_step(view_batch(1), 0)


def test_first_step_of_a_run_says_what_it_compares(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trainer(tmp_path, max_epochs=2).fit(small(), OwnData())
    said = [record.message for record in caplog.records if record.message.startswith("A step:")]
    # 4 images × 3 blocks × 2 branches: an anchor meets the other 5 of its image and the 18 of the other images
    assert said == [
        "A step: 4 images on each of 1 device(s), 24 views; each anchor meets 5 positives and 18 negatives. "
        "Gradient accumulation adds none."
    ]


# ---------------------------------------------------------------------- runs


def test_run_in_a_project_of_ones_own_logs_learns_and_checkpoints(tmp_path: Path) -> None:
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


def learning_rates(folder: Path, module: MultiLabelSSLModule, loader: Any = None, **settings: Any) -> list[list[float]]:
    """Learning rate of each parameter group at each optimizer step."""

    class Note(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            rates.append([group["lr"] for group in optimizer.param_groups])

    rates: list[list[float]] = []
    loader = DataLoader(Views(), batch_size=2) if loader is None else loader
    trainer(folder, callbacks=[Note()], **settings).fit(module, loader)
    return rates


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


def test_predictor_keeps_its_learning_rate_where_asked(tmp_path: Path) -> None:
    rates = learning_rates(tmp_path, small(constant_predictor_lr=True, decay_norm_and_bias=False))
    assert len(rates[0]) == 4  # weights and vectors of backbone with projector, and of the predictor
    peak = 0.05 * 2 * K / 256
    assert [group[0] for group in rates] == sorted({group[0] for group in rates}, reverse=True)
    assert all(group[2:] == pytest.approx([peak, peak]) for group in rates)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
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


def test_views_a_step_are_asked_for_where_the_loader_does_not_tell(tmp_path: Path) -> None:
    loader = DataLoader([Views()[index] for index in range(4)], batch_size=2)
    with pytest.raises(ValueError, match=r"train loader \(DataLoader\) does not say how many views a step has"):
        trainer(tmp_path).fit(small(), loader)
    rates = learning_rates(tmp_path, small(views_per_step=512), loader)
    assert rates[0][0] == pytest.approx(0.1)


def test_stream_without_end_needs_steps(tmp_path: Path) -> None:
    loader = DataLoader(Endless(), batch_size=2)
    with pytest.raises(ValueError, match="this run has no end: pass max_epochs or max_steps to the Trainer"):
        trainer(tmp_path).fit(small(), loader)
    with pytest.raises(
        ValueError, match=r"warmup_epochs=1 was given, and the train loader does not say how long an epo"
    ):
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


def test_unknown_optimizer_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optimizer='adam' is unknown: pass 'sgd', 'adamw' or 'lars'"):
        trainer(tmp_path).fit(small(optimizer="adam"), OwnData())


def test_run_of_no_epochs_ends_at_once(tmp_path: Path) -> None:
    trainer(tmp_path, max_epochs=0).fit(small(), OwnData())


class Poisoned(Views):
    """The images of a run that goes wrong at its fourth step: the weights are spoilt there."""

    def __init__(self, module: MultiLabelSSLModule) -> None:
        super().__init__(4 * 2)
        self.module = module

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 6:
            next(self.module.projector.parameters()).data.fill_(torch.nan)
        return super().__getitem__(index)


@pytest.mark.parametrize("saving", [True, False])
def test_loss_that_is_no_number_stops_the_run_with_step_and_last_checkpoint(saving: bool, tmp_path: Path) -> None:
    module = small()
    callbacks = [ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)]
    fitting = trainer(tmp_path, callbacks=callbacks if saving else None, enable_checkpointing=saving)
    last = r"\S*step=2.ckpt" if saving else "none yet"
    with pytest.raises(
        FloatingPointError,
        match=r"The loss is nan at step 3 \(epoch 0\) on rank 0, whose images are \[60, 70\]"
        rf".*last good checkpoint is {last}\. Lower base_lr",
    ):
        fitting.fit(module, DataLoader(Poisoned(module), batch_size=2))
    assert [path.name for path in tmp_path.glob("*.ckpt")] == (["step=2.ckpt"] if saving else [])


class Reads(TorchDispatchMode):
    """Counts where a value, or a shape that depends on values, goes from the device to the program."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "is_nonzero", "equal"):
            self.read.append(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings", [{}, {"positives": "mean_of_logs", "min_similarity": 0.3}], ids=["default", "gated"]
)
def test_a_step_reads_nothing_from_the_device_but_the_loss_of_the_step_before(settings: dict[str, Any]) -> None:
    module = small(**settings)
    batch = view_batch()
    first = module.training_step(batch, 1)["loss"]
    with Reads() as reads:
        second = module.training_step(batch, 2)["loss"]
        second.backward()
    (read,) = reads.read
    assert read.item() == first.item()
    assert read is not second


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


def test_subclass_may_rename_and_change_what_it_passes_on(tmp_path: Path) -> None:
    """Lightning takes the hyper-parameters from the subclass, the settings must come from what it passed on."""

    class Mine(MultiLabelSSLModule):
        def __init__(self, width: int = P, base_lr: float = 0.1) -> None:
            super().__init__("test_resnet", projection_dim=width, predictor_dim=4, base_lr=2 * base_lr)

    rates = learning_rates(tmp_path, Mine(base_lr=0.4))
    assert rates[0][0] == pytest.approx(0.8 * 2 * K / 256)


def test_own_average_of_weights_by_lightning_is_trained_saved_and_loaded(tmp_path: Path) -> None:
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


# ---------------------------------------------------------------------- checkpoints and prediction


def fitted(folder: Path, module: MultiLabelSSLModule, **settings: Any) -> Path:
    """Fit, save, and say where."""
    fitting = trainer(folder, **settings)
    fitting.fit(module, OwnData())
    path = folder / "saved.ckpt"
    fitting.save_checkpoint(path)
    return path


def some_images(channels: int = 3) -> Tensor:
    return torch.stack([Images(channels=channels)[index]["image"] for index in range(3)])


def test_checkpoint_loads_as_plain_weights_and_gives_the_same_features(tmp_path: Path) -> None:
    module = small(temperature=0.25, mean=[0.4, 0.5, 0.6], backbone_kwargs={"drop_path_rate": 0.1})
    path = fitted(tmp_path, module)
    loaded = MultiLabelSSLModule.load_from_checkpoint(path, weights_only=True)
    assert dict(loaded.hparams) == dict(module.hparams)
    assert torch.equal(loaded.eval()(some_images()), module.eval()(some_images()))
    changed = MultiLabelSSLModule.load_from_checkpoint(path, weights_only=True, temperature=0.5)
    assert changed.image_aware_loss.temperature == 0.5


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_checkpoint_of_a_warm_start_does_not_read_the_pretrained_weights_again(backbone: str, tmp_path: Path) -> None:
    published = tmp_path / "published.safetensors"
    save_file(timm.create_model(backbone).state_dict(), published)
    weights = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(published)}}
    module = small(backbone, backbone_kwargs=weights)
    path = fitted(tmp_path, module)
    published.unlink()
    loaded = MultiLabelSSLModule.load_from_checkpoint(path, weights_only=True)
    assert torch.equal(loaded.eval()(some_images()), module.eval()(some_images()))


def test_backbone_given_as_a_network_is_asked_for_again(tmp_path: Path) -> None:
    module = small(own_network())
    assert "backbone" not in module.hparams
    path = fitted(tmp_path, module)
    with pytest.raises(ValueError, match=r"was given as a network, .*load_from_checkpoint\(path, backbone=net\)"):
        MultiLabelSSLModule.load_from_checkpoint(path, weights_only=True)
    loaded = MultiLabelSSLModule.load_from_checkpoint(path, weights_only=True, backbone=own_network())
    assert torch.equal(loaded.eval()(some_images()), module.eval()(some_images()))


def test_run_resumes_where_it_stopped(tmp_path: Path) -> None:
    """Stop after half and go on: the same weights and learning rates as without the stop."""
    whole = small()
    rates = learning_rates(tmp_path, whole, max_epochs=4)

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.should_stop = True

    halved = small()
    saver = ModelCheckpoint(dirpath=tmp_path, filename="half")
    fitting = trainer(tmp_path, max_epochs=4, callbacks=[Stop(), saver], enable_checkpointing=True)
    fitting.fit(halved, DataLoader(Views(), batch_size=2))
    assert fitting.global_step == 8
    resumed = small()
    path = saver.best_model_path

    class Note(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            second_half.append([group["lr"] for group in optimizer.param_groups])

    second_half: list[list[float]] = []
    going_on = trainer(tmp_path, max_epochs=4, callbacks=[Note(), saver], enable_checkpointing=True)
    going_on.fit(resumed, DataLoader(Views(), batch_size=2), ckpt_path=path, weights_only=True)
    assert second_half == rates[8:]
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_prefix_of_compiled_networks_is_neither_saved_nor_missed() -> None:

    class Compiled(nn.Module):
        """The names that torch.compile gives, without the seconds that importing it takes."""

        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self._orig_mod = network

    module = small()
    plain = module.state_dict()
    compiled = small()
    compiled.backbone, compiled.projector = Compiled(compiled.backbone), Compiled(compiled.projector)
    assert any("_orig_mod." in name for name in compiled.state_dict())

    checkpoint = {"state_dict": compiled.state_dict()}
    compiled.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == plain.keys()

    checkpoint = {"state_dict": dict(plain)}
    compiled.on_load_checkpoint(checkpoint)
    compiled.load_state_dict(checkpoint["state_dict"])
    torch.testing.assert_close(compiled.backbone._orig_mod.state_dict(), module.backbone.state_dict())

    checkpoint = {"state_dict": compiled.state_dict()}  # as written by somebody else, prefixes and all
    small().on_load_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == plain.keys()


def test_prediction_gives_the_features_of_whole_images(tmp_path: Path) -> None:
    module = small()
    predicted = trainer(tmp_path).predict(module, OwnData())
    assert predicted is not None
    assert [len(features) for features in predicted] == [4, 2]
    expected = module.eval()(torch.stack([Images()[index]["image"] for index in range(6)]))
    torch.testing.assert_close(torch.cat(predicted), expected, rtol=1e-4, atol=1e-5)
    images_alone = DataLoader([image / 255 for image in some_images()], batch_size=3)
    (features,) = trainer(tmp_path).predict(module, images_alone)
    torch.testing.assert_close(features, expected[:3], rtol=1e-4, atol=1e-5)


def test_evaluation_changes_no_weight_and_no_statistic(tmp_path: Path) -> None:
    module = small()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for evaluate in (trainer(tmp_path).validate, trainer(tmp_path).test):
        evaluate(module, DataLoader(Images(), batch_size=3), verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where there are fewer than three cores
def test_weights_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    def weights(workers: int) -> dict[str, Tensor]:
        module = small()
        records = synthetic_scenes(size=64, count=12)
        data = MultiLabelDataModule(train=records, batch_size=4, size=32, num_workers=workers)
        trainer(tmp_path, max_epochs=2).fit(module, data)
        return module.state_dict()

    alone, one, three = (weights(workers) for workers in (0, 1, 3))
    assert any(not torch.equal(alone[name], value) for name, value in small().state_dict().items())
    assert all(torch.equal(alone[name], one[name]) and torch.equal(alone[name], three[name]) for name in alone)
