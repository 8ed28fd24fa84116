"""Projector and predictor: the layers of docs/method.md."""

from __future__ import annotations

import torch
from torch import nn

from mlssl.heads import predictor, projector


def layers(network: nn.Sequential) -> list[tuple[type[nn.Module], tuple[int, ...], bool]]:
    """Kind, widths and bias of each layer."""
    described = []
    for layer in network:
        if isinstance(layer, nn.Linear):
            described.append((nn.Linear, (layer.in_features, layer.out_features), layer.bias is not None))
        elif isinstance(layer, nn.BatchNorm1d):
            described.append((nn.BatchNorm1d, (layer.num_features,), layer.affine))
        else:
            described.append((type(layer), (), False))
    return described


def test_projector_has_the_layers_of_the_method() -> None:
    assert layers(projector(64)) == [
        (nn.Linear, (64, 2048), False),
        (nn.BatchNorm1d, (2048,), True),
        (nn.ReLU, (), False),
        (nn.Linear, (2048, 2048), False),
        (nn.BatchNorm1d, (2048,), True),
        (nn.ReLU, (), False),
        (nn.Linear, (2048, 2048), False),
        (nn.BatchNorm1d, (2048,), False),  # no affine
    ]


def test_predictor_has_the_layers_of_the_method() -> None:
    assert layers(predictor()) == [
        (nn.Linear, (2048, 512), False),
        (nn.BatchNorm1d, (512,), True),
        (nn.ReLU, (), False),
        (nn.Linear, (512, 2048), True),  # no norm follows, so it has a bias
    ]


def test_heads_map_features_to_the_requested_widths() -> None:
    f = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    z = projector(7, 11)(f)
    p = predictor(11, 3)(z)
    assert z.shape == p.shape == (5, 11)
    p.sum().backward()
    assert f.grad is not None


def test_projections_of_a_batch_have_mean_zero_and_variance_one() -> None:
    f = torch.randn(64, 7, generator=torch.Generator().manual_seed(0))
    z = projector(7, 11)(f)
    torch.testing.assert_close(z.mean(0), torch.zeros(11), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(0, correction=0), torch.ones(11), atol=1e-2, rtol=0)


def test_bottleneck_as_narrow_as_one_runs() -> None:
    assert predictor(1, 1)(torch.randn(3, 1)).shape == (3, 1)
    assert projector(1, 1)(torch.randn(3, 1)).shape == (3, 1)
