"""Projector and predictor: the two small networks between backbone and loss, dropped after pre-training."""

from __future__ import annotations

from torch import nn


def projector(in_features: int, out_features: int = 2048) -> nn.Sequential:
    """Map backbone features (N, D) to projections z (N, P).

    SimSiam's projection MLP (arXiv 2011.10566, sec. 3): "has BN applied to each fully-connected layer, including its
    output fc", "its output fc has no ReLU", "has 3 layers"; the hidden layers are as wide as the output, the last batch
    norm has no affine parameters, and no layer before a batch norm has a bias.

    Args:
        in_features: D ≥ 1.
        out_features: P ≥ 1 (2048 in the paper).
    """
    return nn.Sequential(
        *_linear_norm_relu(in_features, out_features),
        *_linear_norm_relu(out_features, out_features),
        nn.Linear(out_features, out_features, bias=False),
        nn.BatchNorm1d(out_features, affine=False),
    )


def predictor(features: int = 2048, hidden_features: int = 512) -> nn.Sequential:
    """Map projections z (N, P) to predictions p (N, P).

    SimSiam's prediction MLP (arXiv 2011.10566, sec. 3): "has BN applied to its hidden fc layers", "its output fc does
    not have BN or ReLU", "has 2 layers", "a bottleneck structure" of 2048 → 512 → 2048.

    Args:
        features: P ≥ 1.
        hidden_features: Width of the bottleneck ≥ 1 (512 in the paper, a quarter of P).
    """
    return nn.Sequential(*_linear_norm_relu(features, hidden_features), nn.Linear(hidden_features, features))


def _linear_norm_relu(in_features: int, out_features: int) -> tuple[nn.Module, ...]:
    return nn.Linear(in_features, out_features, bias=False), nn.BatchNorm1d(out_features), nn.ReLU(inplace=True)
