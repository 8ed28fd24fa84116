"""Feature extraction does not change the model, and returns each image once."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from mlssl.evaluation.features import extract_features, image_features
from mlssl.modes import eval_mode


class Network(nn.Module):
    """Convolution, batch norm, dropout and average pool: every way in which training differs from evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.drop(self.norm(self.conv(images))).mean((2, 3))


def normalize(images: Tensor) -> Tensor:
    return images.float() / 255 - 0.5


@pytest.fixture
def model() -> SimpleNamespace:
    torch.manual_seed(0)
    return SimpleNamespace(backbone=Network(), normalize=normalize)


def batch(ids: list[int], side: int = 8, **extra: Any) -> dict[str, Tensor]:
    """Images whose pixels depend only on their ids."""
    images = [torch.randint(0, 256, (3, side, side), generator=torch.Generator().manual_seed(i)) for i in ids]
    return {"image": torch.stack(images).to(torch.uint8), "image_ids": torch.tensor(ids), **extra}


def labels(ids: list[int]) -> Tensor:
    return torch.tensor([[i % 2, i % 3 - 1] for i in ids], dtype=torch.int8)


def test_features_equal_those_of_the_network_in_eval_mode(model: SimpleNamespace) -> None:
    ids = [[3, 1], [7, 4], [5]]
    result = extract_features(model, [batch(i, labels=labels(i)) for i in ids])
    model.backbone.eval()
    with torch.no_grad():
        expected = torch.cat([model.backbone(normalize(batch([i])["image"])) for group in ids for i in group])
    torch.testing.assert_close(result.features, expected)
    assert result.features.dtype == torch.float32
    assert not result.features.requires_grad
    assert result.image_ids.tolist() == [3, 1, 7, 4, 5]
    assert result.labels is not None
    assert torch.equal(result.labels, labels([3, 1, 7, 4, 5]))


def test_the_model_does_not_change(model: SimpleNamespace) -> None:
    model.backbone.train()
    model.backbone.norm.eval()  # as in a partly frozen network
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    extract_features(model, [batch([1, 2])])
    flags = {name: module.training for name, module in model.backbone.named_modules()}
    assert flags == {"": True, "conv": True, "norm": False, "drop": True}
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())


def test_flags_are_restored_after_an_error(model: SimpleNamespace) -> None:
    with pytest.raises(RuntimeError, match="to have 3 channels"), eval_mode(model.backbone):
        model.backbone(torch.zeros(1, 5, 8, 8))
    assert model.backbone.training
    assert model.backbone.drop.training
    assert torch.is_grad_enabled()


def test_a_repeated_image_is_kept_once(model: SimpleNamespace) -> None:
    groups = [[3, 1], [2, 3], [1, 9]]
    result = extract_features(model, [batch(ids, labels=labels(ids)) for ids in groups])
    once = extract_features(model, [batch([3, 1, 2, 9], labels=labels([3, 1, 2, 9]))])
    assert result.image_ids.tolist() == [3, 1, 2, 9]
    torch.testing.assert_close(result.features, once.features)
    assert torch.equal(result.labels, once.labels)


def test_unlabelled_and_differently_sized_images(model: SimpleNamespace) -> None:
    result = extract_features(model, iter([batch([1, 2]), batch([3], side=12)]))
    assert result.labels is None
    assert result.features.shape == (3, 4)


def test_bool_labels_become_int8(model: SimpleNamespace) -> None:
    result = extract_features(model, [batch([1, 2], labels=torch.tensor([[True], [False]]))])
    assert result.labels is not None
    assert result.labels.dtype == torch.int8


def test_an_outer_autocast_changes_nothing(model: SimpleNamespace) -> None:
    plain = extract_features(model, [batch([1, 2])])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = extract_features(model, [batch([1, 2])])
    assert torch.equal(plain.features, under_autocast.features)


def test_half_precision_weights_give_float32(model: SimpleNamespace) -> None:
    model.backbone.to(torch.bfloat16)
    with eval_mode(model.backbone):
        features = image_features(model.backbone, model.normalize, batch([1])["image"])
    assert features.dtype == torch.float32


@pytest.mark.parametrize("pooling", ["avg", "max", "avgmax"])
def test_pooling_of_the_last_map(pooling: Any) -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=0)
    images = batch([1, 2], side=64)
    features = extract_features(SimpleNamespace(backbone=network, normalize=normalize), [images], pooling=pooling)
    network.eval()
    with torch.no_grad():
        last_map = network.forward_features(normalize(images["image"]))
    average, maximum = last_map.mean((2, 3)), last_map.amax((2, 3))
    expected = {"avg": average, "max": maximum, "avgmax": (average + maximum) / 2}[pooling]
    torch.testing.assert_close(features.features, expected)


def test_progress_bar_counts_images(model: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    class Loader:
        dataset = range(3)

        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            yield batch([1, 2])
            yield batch([3])

    extract_features(model, Loader(), progress=True)
    assert "100%" in capsys.readouterr().err
    extract_features(model, Loader())
    assert capsys.readouterr().err == ""


class Restless(nn.Module):
    """A network that counts its calls in any mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return images.mean((2, 3))


def test_a_network_that_changes_in_eval_mode_is_refused() -> None:
    with pytest.raises(RuntimeError, match="buffer calls changed"):
        extract_features(SimpleNamespace(backbone=Restless(), normalize=normalize), [batch([1])])


def test_a_transformer_of_another_fixed_size_is_reported() -> None:
    network = timm.create_model("test_vit", num_classes=0)
    with pytest.raises(ValueError, match=r"takes no images of 8 × 8 pixels .*: choose a size that it takes"):
        extract_features(SimpleNamespace(backbone=network, normalize=normalize), [batch([1])], pooling="max")


def test_other_models_and_batches_are_refused(model: SimpleNamespace) -> None:
    with pytest.raises(TypeError, match="Network has no `backbone` network"):
        extract_features(Network(), [batch([1])])
    with pytest.raises(ValueError, match="returned no batch"):
        extract_features(model, [])
    with pytest.raises(ValueError, match='1 of the first 2 batches have "labels"'):
        extract_features(model, [batch([1], labels=labels([1])), batch([2])])
    with pytest.raises(ValueError, match="labels"):
        extract_features(model, [batch([1], labels=labels([1])), batch([2], labels=labels([2])[:, :1])])
    with pytest.raises(ValueError, match="views"):
        extract_features(model, [{"views": torch.zeros(2, 2, 4, 3, 8, 8), "image_ids": torch.arange(2)}])
    with pytest.raises(TypeError, match="labels"):
        extract_features(model, [batch([1], labels=labels([1]).float())])
    model.backbone.conv.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN or infinity"):
        extract_features(model, [batch([1])])
