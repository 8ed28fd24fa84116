"""Published weight files: select the tensors of the network."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

NESTED = ("state_dict", "model", "teacher")
"""Entries that contain the weights of a file; for DINO the teacher is evaluated."""

_ENCODERS = ("encoder_q.", "base_encoder.")
"""Prefixes of the network in files that also contain its momentum copy, a queue or heads: MoCo 1, 2 and 3."""


def of_encoder(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of MoCo's trained encoder under plain names; weights of other files unchanged.

    >>> of_encoder({"encoder_q.conv1.weight": 1, "encoder_k.conv1.weight": 2, "queue": 3})
    {'conv1.weight': 1}
    """
    for prefix in _ENCODERS:
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if own:
            return own
    return dict(weights)


def has_norm_before_pooling(weights: Collection[str], network: Collection[str]) -> bool:
    """Whether a transformer's file has its norm before the pooling, like DINO, and the network after it."""
    return "norm.weight" in weights and "fc_norm.weight" not in weights and "fc_norm.weight" in network
