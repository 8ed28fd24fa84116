"""Convolutions with small output maps have the values and gradients of torch's, and nothing else changes."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mlssl import MultiLabelSSLModule
from mlssl.backbones import build_backbone
from mlssl.callbacks import small_maps as room
from mlssl.callbacks.small_maps import SmallMapProducts, SmallMaps

TAKEN = {
    "a ResNet's last stage": ((3, 8, 2, 2), (6, 8, 3, 3), {"padding": 1}),
    "its first block": ((3, 8, 4, 4), (6, 8, 3, 3), {"stride": 2, "padding": 1}),
    "one pixel": ((3, 8, 1, 1), (6, 8, 3, 3), {"padding": 1}),
    "an even kernel": ((3, 8, 4, 4), (6, 8, 2, 2), {"stride": 2}),
    "a line": ((3, 8, 1, 4), (6, 8, 1, 3), {"padding": (0, 1)}),
    "another stride and padding on each side": ((3, 4, 5, 7), (2, 4, 3, 5), {"stride": (2, 4), "padding": (0, 2)}),
    "rows that the stride leaves out": ((3, 4, 6, 6), (2, 4, 2, 2), {"stride": 4}),
    "patches": ((3, 3, 32, 32), (5, 3, 16, 16), {"stride": 16}),
    "a number each": ((3, 8, 2, 2), (6, 8, 3, 3), {"stride": (1,), "padding": (1,)}),
}
LEFT_ALONE = {
    "more pixels": ((3, 8, 5, 5), (6, 8, 3, 3), {"padding": 1}),
    "groups": ((3, 8, 2, 2), (8, 1, 3, 3), {"padding": 1, "groups": 8}),
    "dilation": ((3, 8, 4, 4), (6, 8, 2, 2), {"dilation": 2}),
    "padding by a word": ((3, 8, 2, 2), (6, 8, 3, 3), {"padding": "same"}),
    "a kernel of one pixel": ((3, 8, 2, 2), (6, 8, 1, 1), {}),
    "more padding than kernel": ((3, 8, 1, 1), (6, 8, 2, 2), {"padding": 2, "stride": 3}),
    "one image without a batch": ((8, 2, 2), (6, 8, 3, 3), {"padding": 1}),
}


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the weights of the convolutions computed as products."""
    taken: list[torch.Size] = []
    apply = room._ByPixels.apply

    def noted(images: Tensor, weight: Tensor, plan: Any) -> Any:
        taken.append(weight.shape)
        return apply(images, weight, plan)

    monkeypatch.setattr(room._ByPixels, "apply", noted)
    return taken


def tensors(shape: tuple[int, ...], of_weight: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(of_weight, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return (
        torch.randn(shape, dtype=dtype).requires_grad_(),
        weight.requires_grad_(),
        torch.randn(of_weight[0]).to(dtype),
    )


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("shape", "of_weight", "how"), TAKEN.values(), ids=TAKEN)
def test_values_and_gradients_equal_those_of_the_convolution(
    shape: tuple[int, ...],
    of_weight: tuple[int, ...],
    how: dict[str, Any],
    with_bias: bool,
    products: list[torch.Size],
) -> None:
    images, weight, bias = tensors(shape, of_weight, torch.float64)
    one = bias.requires_grad_() if with_bias else None
    inputs = [images, weight, *([bias] if with_bias else [])]
    plain = F.conv2d(images, weight, one, **how)
    toward = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, inputs, toward)
    with SmallMapProducts():
        out = F.conv2d(images, weight, one, **how)
    assert products == [weight.shape]
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(torch.autograd.grad(out, inputs, toward), expected)


def test_the_gradient_has_a_gradient() -> None:
    images, weight, bias = tensors((3, 8, 4, 4), (6, 8, 3, 3), torch.float64)

    def penalty() -> tuple[Tensor, ...]:
        out = F.conv2d(images, weight, bias, stride=2, padding=1)
        of_images, of_weight = torch.autograd.grad(out.pow(2).sum(), (images, weight), create_graph=True)
        return torch.autograd.grad(of_images.pow(2).sum() + of_weight.pow(2).sum(), (images, weight))

    expected = penalty()
    with SmallMapProducts():
        torch.testing.assert_close(penalty(), expected)


@pytest.mark.parametrize(("shape", "of_weight", "how"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_other_convolutions_are_not_changed(
    shape: tuple[int, ...], of_weight: tuple[int, ...], how: dict[str, Any], products: list[torch.Size]
) -> None:
    images, weight, bias = tensors(shape, of_weight, torch.float32)
    with SmallMapProducts():
        out = F.conv2d(input=images, weight=weight, bias=bias, **how)
    assert not products
    assert torch.equal(out, F.conv2d(images, weight, bias, **how))


def test_weights_in_torch_s_default_layout_are_not_changed(products: list[torch.Size]) -> None:
    images, weight, _ = tensors((3, 8, 2, 2), (6, 8, 3, 3), torch.float32)
    with SmallMapProducts():
        F.conv2d(images, weight.contiguous(), padding=1)
    assert not products


@pytest.mark.parametrize(
    ("images", "said"), [(torch.zeros(3, 7, 2, 2), "to have 8 channels"), (torch.zeros(3, 8, 2, 2).double(), "type")]
)
def test_a_wrong_input_raises_torch_s_error(images: Tensor, said: str) -> None:
    _, weight, _ = tensors((3, 8, 2, 2), (6, 8, 3, 3), torch.float32)
    with SmallMapProducts(), pytest.raises(RuntimeError, match=said):
        F.conv2d(images, weight, padding=1)


@pytest.mark.parametrize("frozen", ["images", "weight"])
def test_tensors_that_need_no_gradient_get_none(frozen: str) -> None:
    images, weight, _ = tensors((3, 8, 2, 2), (6, 8, 3, 3), torch.float32)
    both = {"images": images, "weight": weight}
    both[frozen].requires_grad_(False)
    with SmallMapProducts():
        F.conv2d(images, weight, padding=1).sum().backward()
    assert [name for name, tensor in both.items() if tensor.grad is None] == [frozen]


def test_autocast_computes_in_bfloat16_as_close_as_the_convolution_does() -> None:
    images, weight, _ = tensors((64, 32, 2, 2), (48, 32, 3, 3), torch.float32)
    toward = torch.randn(64, 48, 2, 2).bfloat16()

    def answers(products: bool, dtype: torch.dtype) -> list[Tensor]:
        with (
            torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16),
            SmallMapProducts() if products else nullcontext(),
        ):
            out = F.conv2d(images.to(dtype), weight if products else weight.to(dtype), padding=1)
        assert out.dtype == dtype
        return [out.detach(), *torch.autograd.grad(out, (images, weight), toward.to(dtype))]

    exact = answers(False, torch.float64)
    by_products, by_torch = (
        [float((value - truth).norm() / truth.norm()) for value, truth in zip(of_way, exact, strict=True)]
        for of_way in (answers(True, torch.bfloat16), answers(False, torch.bfloat16))
    )
    for ours, torchs in zip(by_products, by_torch, strict=True):
        # A rounding to bfloat16 errs by up to 2⁻⁹; torch's number of roundings depends on the CPU.
        assert 0 < ours < 1.5 * torchs < 1.5 * 2**-6


@pytest.mark.parametrize(
    ("side", "dtype", "number"),
    [(64, torch.float32, 4), (64, torch.bfloat16, 4), (96, torch.float32, 0), (96, torch.bfloat16, 4)],
)
def test_the_last_stage_of_a_resnet_uses_products(
    side: int, dtype: torch.dtype, number: int, products: list[torch.Size]
) -> None:
    network = build_backbone("resnet18").to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16), SmallMapProducts():
        network(torch.rand(2, 3, side, side))
    assert [shape[0] for shape in products] == [512] * number


def views_of_64(num: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    views = torch.randint(256, (num, 2, 2, 3, 64, 64), dtype=torch.uint8, generator=generator)
    return DataLoader([{"views": one, "image_ids": index} for index, one in enumerate(views)], batch_size=4)


def fitted(folder: Path, *callbacks: L.Callback, **settings: Any) -> MultiLabelSSLModule:
    L.seed_everything(0, verbose=False)
    module = MultiLabelSSLModule("resnet18", projection_dim=16, predictor_dim=8, views_per_step=8, **settings)
    trainer = L.Trainer(
        max_epochs=1,
        precision="64-true",
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, views_of_64())
    return module


def test_a_run_uses_products_and_trains_as_with_plain_convolutions(tmp_path: Path, products: list[torch.Size]) -> None:
    plain = fitted(tmp_path)
    assert not products
    module = fitted(tmp_path, SmallMaps())
    assert len(products) == 2 * 4  # of the last stage, for each branch
    torch.testing.assert_close(module.state_dict(), plain.state_dict())


def test_evaluation_and_a_module_after_its_run_use_convolutions(tmp_path: Path, products: list[torch.Size]) -> None:
    module = fitted(tmp_path, SmallMaps())
    products.clear()
    module.train()(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))  # the run is over
    assert not products
    callback = SmallMaps()
    callback.on_fit_start(None, module)  # type: ignore[arg-type]
    module.eval()(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    assert not products
    module.train()(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    assert products
    callback.teardown(None, module, "fit")  # type: ignore[arg-type]


def test_a_failed_forward_pass_restores_convolutions(tmp_path: Path, products: list[torch.Size]) -> None:
    module = fitted(tmp_path)
    callback = SmallMaps()
    callback.on_fit_start(None, module)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        module.train().backbone(torch.zeros(2, 5, 64, 64))
    images, weight, _ = tensors((3, 8, 2, 2), (6, 8, 3, 3), torch.float32)
    F.conv2d(images, weight, padding=1)
    assert not products


def test_a_network_compiled_by_the_user_still_runs() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 5, 3, 1, 1)).to(
        memory_format=torch.channels_last
    )
    images = torch.rand(2, 3, 4, 4)
    expected = network(images)
    with SmallMapProducts():
        out = torch.compile(network, backend="aot_eager")(images)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert network[0].weight.grad is not None
