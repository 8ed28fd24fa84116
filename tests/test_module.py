"""The LightningModule: settings, the method's step, and each part overridden independently."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from _toy import (
    LABELS,
    A,
    B,
    K,
    P,
    S,
    Views,
    mean_weight,
    small,
    trainer,
    view_batch,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mlssl.losses import gated, image_aware_contrastive_loss, mean_of_logs, negative_cosine_similarity
from mlssl.module import MultiLabelSSLModule

# Outside a Trainer a step cannot log, and Lightning warns.
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")


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
        "branches_together": False,
        "form": "log_of_sum",
        "positives": "same_image",
        "optimizer": "sgd",
        "optimizer_kwargs": None,
        "base_lr": 0.05,
        "weight_decay": 1e-4,
        "warmup_epochs": 0.0,
        "constant_predictor_lr": False,
    }
    assert {name: defaults[name] for name in of_the_paper} == of_the_paper


def test_settings_reach_their_parts() -> None:
    module = small(
        temperature=0.2, base_temperature=0.1, form="mean_of_logs", positives="gated(0.4)", chunk_size=8, std=[1.0] * 3
    )
    loss = module.image_aware_loss
    assert (loss.temperature, loss.base_temperature, loss.chunk_size) == (0.2, 0.1, 8)
    assert (loss.form, loss.positives) == (mean_of_logs, gated(0.4))
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
        ({"weight_decay": -1e-4}, "weight_decay=-0.0001 was given"),
        ({"warmup_epochs": -1}, "warmup_epochs=-1 was given"),
        ({"views_per_step": 0}, "views_per_step=0 was given: pass a number of at least 1"),
        ({"positives": "all"}, "positives='all' is unknown"),
        ({"form": "log_of_sums"}, "form='log_of_sums' is unknown: did you mean 'log_of_sum'"),
        (
            {"form": "custom mine.decoupled"},
            "never imported: pass the function again, load_from_ch",
        ),
        ({"positives": "gated(2.0)"}, r"gated\(2.0\) was given: pass a cosine in -1–1"),
        ({"optimizer": "adamm"}, "optimizer='adamm' is unknown: did you mean 'adam"),
        (
            {"optimizer_kwargs": {"momentun": 0.9}},
            r"optimizer='sgd' does not take optimizer_kwargs=\{'momentun': 0.9\}",
        ),
        ({"optimizer_kwargs": {"momentum": -0.1}}, "does not take optimizer_kwargs=.*Invalid momentum value: -0.1"),
        ({"optimizer": "adahessian"}, "optimizer='adahessian' needs second derivatives"),
        ({"views_at_a_time": 1}, "views_at_a_time=1 was given: pass a number of at least 2"),
        ({"chunk_size": 0}, "chunk_size=0 was given"),
        ({"mean": [0.5, 0.5]}, r"mean=\[0.5, 0.5\] and std=.* do not match: pass one number per channel in each"),
        ({"std": [0.0, 0.2, 0.2]}, "do not match: pass one number per channel in each, std above 0"),
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


def test_features_are_in_the_order_of_their_views() -> None:
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


def test_each_branch_has_its_own_batch_statistics() -> None:
    batch = view_batch()
    changed = dict(batch, views=batch["views"].clone())
    changed["views"][:, 1] = 255 - changed["views"][:, 1]
    one, other = small().training_step(batch, 0), small().training_step(changed, 0)
    assert torch.equal(one["features"][:, 0], other["features"][:, 0])
    assert not torch.equal(one["features"][:, 1], other["features"][:, 1])


def test_branches_together_share_their_batch_statistics() -> None:
    batch = view_batch()
    changed = dict(batch, views=batch["views"].clone())
    changed["views"][:, 1] = 255 - changed["views"][:, 1]
    one, other = (small(branches_together=True).training_step(each, 0) for each in (batch, changed))
    assert not torch.equal(one["features"][:, 0], other["features"][:, 0])


def test_branches_together_give_the_step_of_one_pass() -> None:
    """With fixed statistics, one pass over both branches equals two passes."""
    batch = view_batch()
    outputs = []
    for together in (False, True):
        module = small(branches_together=together, views_at_a_time=5 if together else None).double()
        module.eval()
        outputs.append(module.training_step(batch, 0))
    torch.testing.assert_close(outputs[0], outputs[1])


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


def test_with_one_block_per_image_the_other_branch_is_the_positive() -> None:
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
def test_images_are_normalised_equally_from_bytes_and_fractions(channels_last: bool) -> None:
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
        ({"views": torch.zeros(B, 0, K, 3, S, S, dtype=torch.uint8)}, ValueError, r"'views' has shape \(4, 0, 3"),
        ({"views": torch.zeros(B, A, K, 3, S, S)}, TypeError, "'views' is Tensor of torch.float32"),
        ({"views": None}, ValueError, r"lacks \['views'\]"),
        ({"image_ids": torch.arange(B + 1)}, ValueError, r"'image_ids' has shape \(5,\) for 4 images"),
        ({"image_ids": torch.zeros(B, dtype=torch.long)}, ValueError, "'image_ids' repeats 3 of 4 ids"),
        ({"labels": torch.zeros(B, LABELS)}, TypeError, "'labels' is Tensor of torch.float32"),
        ({"labels": torch.zeros(B + 1, LABELS, dtype=torch.int8)}, ValueError, r"'labels' has shape \(5, 5\) for 4"),
        ({"labels": torch.full((B, LABELS), 2, dtype=torch.int8)}, ValueError, "'labels' contains"),
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
    with pytest.raises(ValueError, match="A step has 1 image over all devices, but no other image to compare it with"):
        small().training_step(view_batch(1), 0)


def test_one_branch_has_no_pair_and_needs_custom_terms() -> None:
    batch = view_batch()
    batch["views"] = batch["views"][:, :1]
    with pytest.raises(ValueError, match="The batch has 1 branch, but the pair term compares one branch with another"):
        small().training_step(batch, 0)

    class Alone(MultiLabelSSLModule):
        def terms(self, embeddings: Any, batch: Any) -> Any:
            (one,) = embeddings
            return {"image_aware": (2.0, self.image_aware(one.projections, batch["image_ids"].repeat_interleave(K)))}

    outputs = small(kind=Alone).training_step(batch, 0)
    assert outputs["features"].shape[:3] == (B, 1, K)
    assert outputs["loss"].item() > 0


def test_local_views_that_no_term_uses_are_refused() -> None:
    batch = view_batch(local_views=torch.zeros(B, 2, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="The batch has local views, but the loss of MultiLabelSSLModule uses none"):
        small().training_step(batch, 0)

    class WithLocalViews(MultiLabelSSLModule):
        def terms(self, embeddings: Any, batch: Any) -> Any:
            local = self.embed(batch["local_views"].flatten(0, 1))
            return super().terms(embeddings, batch) | {"spread": (0.1, local.projections.square().mean())}

    module = small(kind=WithLocalViews)
    module.training_step(batch, 0)["loss"].backward()


# ---------------------------------------------------------------------- parts that a class overrides


def branches_of(num: int) -> Any:
    """A batch of `num` branches, the first two of which are those of `view_batch`."""
    batch = view_batch()
    generator = torch.Generator().manual_seed(5)
    more = torch.randint(256, (B, num - 2, K, 3, S, S), dtype=torch.uint8, generator=generator)
    return {**batch, "views": torch.cat([batch["views"], more], dim=1)}


def test_terms_of_three_branches_are_means_over_all_ordered_pairs() -> None:
    module, batch = small(contrastive_weight=2.0).eval(), branches_of(3)
    outputs = module.training_step(batch, 0)
    ids = batch["image_ids"].repeat_interleave(K)
    e = [module.embed(batch["views"][:, a].flatten(0, 1)) for a in range(3)]
    pairs = [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    pair = sum(negative_cosine_similarity(e[a].predictions, e[b].projections) for a, b in pairs) / 6
    aware = sum(
        image_aware_contrastive_loss(torch.cat([e[a].predictions, e[b].projections]), torch.cat([ids, ids]))
        for a, b in pairs
    )
    torch.testing.assert_close(outputs["loss"], pair + 2 * aware / 6)
    assert outputs["features"].shape[:3] == (B, 3, K)


def test_targets_alone_can_be_overridden() -> None:
    class Constant(MultiLabelSSLModule):
        def targets(self, embeddings: Any, batch: Any) -> Any:
            return [torch.ones_like(one.projections) for one in embeddings]

    module = small(kind=Constant, contrastive_weight=0.0).eval()
    batch = view_batch()
    loss = module.training_step(batch, 0)["loss"]
    p = [module.embed(batch["views"][:, a].flatten(0, 1)).predictions for a in range(A)]
    expected = sum(negative_cosine_similarity(one, torch.ones_like(one)) for one in p) / 2
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("settings", [{}, {"views_at_a_time": 5}, {"branches_together": True, "views_at_a_time": 7}])
def test_embed_alone_can_be_overridden_and_may_give_more(settings: dict[str, Any]) -> None:
    class Wide(NamedTuple):
        features: Tensor
        projections: Tensor
        predictions: Tensor
        brightness: Tensor

    class Mine(MultiLabelSSLModule):
        def embed(self, views: Tensor) -> Any:
            return Wide(*super().embed(views), views.float().mean(dim=(1, 2, 3)))

        def terms(self, embeddings: Any, batch: Any) -> Any:
            for a, one in enumerate(embeddings):
                expected = batch["views"][:, a].flatten(0, 1).float().mean(dim=(1, 2, 3))
                torch.testing.assert_close(one.brightness, expected)
            return super().terms(embeddings, batch)

    small(kind=Mine, **settings).training_step(view_batch(), 0)["loss"].backward()


def test_form_and_positives_may_be_functions() -> None:
    def uniform(logits: Tensor, weights: Tensor) -> Tensor:
        return logits.masked_fill(weights == 0, 0).sum(dim=1)

    def half(cosines: Tensor, same_image: Tensor, boxes: Any, key_boxes: Any) -> Tensor:
        assert boxes.shape == (len(cosines), 4)
        assert key_boxes.shape == (cosines.shape[1], 4)
        return 0.5 * same_image

    module = small(form=uniform, positives=half)
    assert module.hparams["form"].startswith("custom test_module.")
    assert module.hparams["positives"].endswith("half")
    batch = view_batch(boxes=torch.rand(B, A, K, 4) / 2)
    loss = module.training_step(batch, 0)["loss"]
    assert torch.isfinite(loss)


def test_overlap_of_boxes_weighs_the_positives() -> None:
    """Disjoint boxes leave each anchor one positive: the other branch's view of the same block."""
    corners = torch.tensor([[0.0, 0.0], [0.0, 0.5], [0.5, 0.0]])
    boxes = torch.cat([corners, torch.full((K, 2), 0.4)], dim=1).expand(B, A, K, 4)
    module, batch = small(positives="by_overlap(1.0)").eval(), view_batch(boxes=boxes)
    loss = module.training_step(batch, 0)["loss"]
    p0, p1 = (module.embed(batch["views"][:, a].flatten(0, 1)) for a in range(A))
    view_ids = torch.arange(B * K).repeat(2)  # as if every block were a separate image
    sets = [torch.cat([p0.predictions, p1.projections]), torch.cat([p1.predictions, p0.projections])]
    aware = sum(image_aware_contrastive_loss(one, view_ids) for one in sets) / 2
    pair = negative_cosine_similarity(p0.predictions, p1.projections)
    pair = (pair + negative_cosine_similarity(p1.predictions, p0.projections)) / 2
    torch.testing.assert_close(loss, pair + 4 * aware)
    with pytest.raises(ValueError, match="no boxes were given"):
        module.training_step(view_batch(), 0)
