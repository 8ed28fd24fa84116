"""Embedding a batch in parts: the gradient of the whole batch, in the memory of a part."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from test_exactness import Frozen, own_share
from torch import Tensor, nn

from mlssl.module import Embedding, MultiLabelSSLModule
from mlssl.recompute import in_parts

# Outside a Trainer a step cannot log, and Lightning warns.
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")


class InParts(MultiLabelSSLModule):
    """Reference: each part of the views through the network separately, with all activations stored."""

    parts = 3

    def embed(self, views: Tensor) -> Any:
        embedded = [super(InParts, self).embed(part) for part in views.tensor_split(self.parts)]
        return Embedding(*(torch.cat(column) for column in zip(*embedded, strict=True)))


def after_a_step(kind: type[MultiLabelSSLModule], **settings: Any) -> dict[str, Tensor]:
    """Loss, gradients and running statistics of a step in float64."""
    torch.manual_seed(0)
    module = kind("test_vit", projection_dim=16, predictor_dim=8, backbone_kwargs={"proj_drop_rate": 0.2}, **settings)
    module.double()
    torch.manual_seed(1)
    loss = module.training_step(own_share(), 0)["loss"]
    loss.backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | gradients | {f"now {name}": value for name, value in module.named_buffers()}


def test_a_step_in_parts_equals_that_of_the_parts_kept_in_memory() -> None:
    """12 views of a branch, at most 5 at a time: separate statistics of 3 parts, and the same dropout twice."""
    expected, found = after_a_step(InParts), after_a_step(MultiLabelSSLModule, views_at_a_time=5)
    assert len(found) > 50
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_step_in_parts_equals_that_of_the_large_batch_with_frozen_statistics() -> None:
    results = []
    for at_a_time in (None, 5):
        module = Frozen("test_resnet", views_at_a_time=at_a_time).double().train()
        loss = module.training_step(own_share(), 0)["loss"]
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in module.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)


def test_only_embeddings_are_stored_until_the_backward_pass() -> None:
    kept = []
    network = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 2))

    class Rows(NamedTuple):
        outputs: Tensor

    def embed(views: Tensor) -> Rows:
        return Rows(network(views))

    for most in (3, 11):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda saved, s=sizes: (s.append(saved.numel()), saved)[1], lambda saved: saved
        ):
            in_parts(network, embed, torch.ones(12, 4), most)[0].sum()
        kept.append(sum(sizes))
    with_everything: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: (with_everything.append(saved.numel()), saved)[1], lambda saved: saved
    ):
        embed(torch.ones(12, 4))[0].sum()
    assert max(kept) < sum(with_everything) / 10


def test_fewer_than_two_views_at_a_time_are_refused() -> None:
    with pytest.raises(ValueError, match="views_at_a_time=1 was given: pass a number of at least 2"):
        MultiLabelSSLModule("test_resnet", views_at_a_time=1)
