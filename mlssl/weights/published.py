"""Published files of weights: which of their tensors are the network itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

NESTED = ("state_dict", "model", "teacher")
"""Entries under which files keep their weights; DINO is evaluated by its teacher."""

_ENCODERS = ("encoder_q.", "base_encoder.")
"""Before the names of the network, in files that also hold its momentum copy, a queue or heads: MoCo 1, 2 and 3."""


def of_encoder(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of MoCo's trained encoder under their own names; those of any other file as they are.

    >>> of_encoder({"encoder_q.conv1.weight": 1, "encoder_k.conv1.weight": 2, "queue": 3})
    {'conv1.weight': 1}
    """
    for prefix in _ENCODERS:
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if own:
            return own
    return dict(weights)


def has_norm_before_pooling(weights: Collection[str], network: Collection[str]) -> bool:
    """Whether a transformer's file has its norm before the pooling, as DINO's, where timm puts one after an average."""
    return "norm.weight" in weights and "fc_norm.weight" not in weights and "fc_norm.weight" in network
