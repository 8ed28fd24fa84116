"""Learning rate, its schedule, parameter groups and optimizers against docs/method.md."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mlssl.optim import build_optimizer, check_optimizer, cosine_with_warmup, parameter_groups, scaled_lr


@pytest.mark.parametrize(
    ("images", "expected"),
    [(64, 0.05), (124, 0.096875), (128, 0.1)],
    ids=["256 views", "COCO train2017", "VOC2012 trainval"],
)
def test_learning_rate_scales_with_images_times_blocks(images: int, expected: float) -> None:
    assert scaled_lr(0.05, images * 4) == pytest.approx(expected, rel=1e-12)


def test_cosine_starts_at_one_and_ends_at_zero() -> None:
    factor = cosine_with_warmup(100)
    assert factor(0) == 1
    assert factor(50) == pytest.approx(0.5)
    assert factor(25) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert factor(100) == pytest.approx(0, abs=1e-15)
    assert 0 < factor(99) < 1e-3
    assert factor(101) == factor(10_000) == factor(100)


def test_cosine_never_rises() -> None:
    factor = cosine_with_warmup(37)
    values = [factor(step) for step in range(40)]
    assert values == sorted(values, reverse=True)


def test_warm_up_rises_in_equal_steps_to_the_peak_and_is_never_zero() -> None:
    factor = cosine_with_warmup(20, warmup_steps=4)
    assert [factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factor(12) == pytest.approx(0.5)  # half of the way between 4 and 20
    assert factor(20) == pytest.approx(0, abs=1e-15)


def test_run_of_one_step_trains_at_the_peak() -> None:
    assert cosine_with_warmup(1)(0) == 1


@pytest.mark.parametrize(("total", "warm_up"), [(10, 10), (10, 11), (10, -1), (0, 0)])
def test_warm_up_as_long_as_the_run_is_refused(total: int, warm_up: int) -> None:
    with pytest.raises(ValueError, match=f"warm-up of {warm_up} steps in a run of {total}: pass a warm-up"):
        cosine_with_warmup(total, warm_up)


@pytest.fixture
def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2, bias=False))


def test_all_parameters_decay_by_default(network: nn.Module) -> None:
    (group,) = parameter_groups(network.parameters(), 1e-4)
    assert group["weight_decay"] == 1e-4
    assert [id(p) for p in group["params"]] == [id(p) for p in network.parameters()]


def test_norms_and_biases_do_not_decay_on_request(network: nn.Sequential) -> None:
    decayed, spared = parameter_groups(
        [*network.parameters(), *nn.PReLU().parameters()], 1e-4, decay_norm_and_bias=False
    )
    assert decayed["weight_decay"] == 1e-4
    assert spared["weight_decay"] == 0
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3, 1, 1), (2, 4)]
    assert [tuple(p.shape) for p in spared["params"]] == [(4,), (4,), (4,), (1,)]  # bias, scale, shift, PReLU


def test_frozen_parameters_and_empty_groups_are_left_out(network: nn.Sequential) -> None:
    network[0].requires_grad_(False)
    network[1].requires_grad_(False)
    groups = parameter_groups(network.parameters(), 1e-4, decay_norm_and_bias=False)
    assert [[tuple(p.shape) for p in group["params"]] for group in groups] == [[(2, 4)]]


@pytest.mark.parametrize(
    ("name", "kind", "has_momentum"),
    [("sgd", "SGD", True), ("adamw", "AdamW", False), ("lars", "Lars", True), ("muon", "Muon", True)],
)
def test_each_optimizer_takes_the_groups_and_makes_a_step(
    name: str, kind: str, has_momentum: bool, network: nn.Sequential
) -> None:
    groups = parameter_groups(network.parameters(), 1e-4, decay_norm_and_bias=False)
    optimizer = build_optimizer(name, groups, lr=0.1, arguments={"momentum": 0.8})
    assert type(optimizer).__name__ == kind
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0.0]
    assert all(group["lr"] == 0.1 for group in optimizer.param_groups)
    assert optimizer.param_groups[0].get("momentum") == (0.8 if has_momentum else None)

    before = [p.detach().clone() for p in network.parameters()]
    images = torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    (network(images) ** 2).sum().backward()
    optimizer.step()
    after = list(network.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(torch.isfinite(p).all() for p in after)


@pytest.mark.parametrize("has_bfloat16", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_muon_is_not_emulated_in_bfloat16(
    has_bfloat16: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU without bfloat16 one step of a ResNet-18 would take minutes."""
    from timm.optim import muon

    monkeypatch.setattr("mlssl.optim.processor_has_bfloat16", lambda: has_bfloat16)
    used, given = [], muon.zeropower_via_newtonschulz
    monkeypatch.setattr(
        muon,
        "zeropower_via_newtonschulz",
        lambda *args, **settings: used.append(settings.get("dtype")) or given(*args, **settings),
    )
    layer = nn.Linear(8, 8, dtype=dtype)
    optimizer = build_optimizer("muon", parameter_groups(layer.parameters(), 1e-4), 1e-3, {"nesterov": True})
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # wraps the optimizer's step

    def closure() -> float:
        optimizer.zero_grad()
        loss = layer(torch.ones(2, 8, dtype=dtype)).square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) > 0
    full = dtype if dtype == torch.float64 or not has_bfloat16 else None
    assert used == [full]
    assert type(optimizer).__name__ == "Muon"
    assert optimizer.state[layer.bias]["use_muon"] is False  # of AdamW


def test_momentum_of_the_recipe_is_the_default(network: nn.Sequential) -> None:
    assert (
        build_optimizer("sgd", parameter_groups(network.parameters(), 0.0), lr=0.1).param_groups[0]["momentum"] == 0.9
    )


def test_sgd_is_torch_s_without_nesterov(network: nn.Sequential) -> None:
    """timm's optimizer of that name has Nesterov momentum, the paper's does not."""
    (group,) = build_optimizer("sgd", parameter_groups(network.parameters(), 0.0), lr=0.1).param_groups
    assert not group["nesterov"]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("adamm", {}, r"optimizer='adamm' is unknown: did you mean 'adam\w*'\? Or pass 'sgd', a name of timm"),
        ("", {}, "optimizer='' is unknown: pass 'sgd', a name of timm"),
        ("adahessian", {}, "needs second derivatives, but the image-aware loss has none"),
        ("sgd", {"beta": 1}, r"'sgd' does not take optimizer_kwargs=\{'beta': 1\} .*pass arguments of its constructor"),
        ("muon", {"momentum": 3.0}, r"'muon' does not take optimizer_kwargs=\{'momentum': 3.0\}"),
        ("adamw", {"lr": 1.0}, r"'adamw' does not take optimizer_kwargs=\{'lr': 1.0\}.*other than lr and weight_decay"),
    ],
)
def test_an_optimizer_that_cannot_be_built_is_refused(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_optimizer(name, arguments)


@pytest.mark.parametrize(("name", "decays_all"), [("lars", True), ("muon", True), ("sgd", False)])
def test_optimizers_that_need_whole_weights_are_refused_on_shards(name: str, decays_all: bool) -> None:
    check_optimizer(name, {}, decay_norm_and_bias=decays_all)
    with pytest.raises(ValueError, match=f"'{name}' with decay_norm_and_bias={decays_all} needs whole weights"):
        check_optimizer(name, {}, is_sharded=True, decay_norm_and_bias=decays_all)
    check_optimizer("adamw", {}, is_sharded=True)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_fused_optimizers_take_the_same_step(name: str) -> None:
    weights = []
    for fused in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(5, 3)
        optimizer = build_optimizer(name, parameter_groups(layer.parameters(), 0.1), 0.2, fused=fused)
        assert bool(optimizer.defaults["fused"]) is fused
        for _ in range(3):
            layer(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
        weights.append(layer.weight)
    torch.testing.assert_close(*weights)


def test_devices_without_fused_optimizers_get_the_plain_one() -> None:
    layer = nn.Linear(5, 3, device="meta")
    assert not build_optimizer("sgd", parameter_groups(layer.parameters(), 0.1), 0.2, fused=True).defaults["fused"]
