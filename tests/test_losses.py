"""Both terms against slow loops from docs/method.md, their degenerate cases and errors."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlssl.losses import (
    ImageAwareContrastiveLoss,
    NegativeCosineSimilarity,
    by_overlap,
    gated,
    image_aware_contrastive_loss,
    log_of_sum,
    mean_of_logs,
    negative_cosine_similarity,
    same_image,
)

FORMS: dict[str, dict[str, Any]] = {
    "log of sum": {"form": "log_of_sum"},
    "mean of logs": {"form": "mean_of_logs"},
    "gated": {"form": "mean_of_logs", "positives": "gated(0.3)"},
    "log of sum, gated": {"form": "log_of_sum", "positives": "gated(0.3)"},
}
every_form = pytest.mark.parametrize("settings", FORMS.values(), ids=FORMS)


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum() / ((one**2).sum().sqrt() * (other**2).sum().sqrt())


def slow_loss(
    anchors: Tensor,
    image_ids: Tensor,
    keys: Tensor | None = None,
    key_image_ids: Tensor | None = None,
    *,
    self_index: Tensor | None = None,
    temperature: float = 0.3,
    base_temperature: float = 0.07,
    form: str = "log_of_sum",
    positives: str = "same_image",
    weight: Callable[[int, int], float] = lambda i, j: 1.0,
) -> Tensor:
    """docs/method.md literally: one anchor, one pair at a time; `weight` is that of pairs of one image."""
    if keys is None or key_image_ids is None:
        keys, key_image_ids = anchors, image_ids
        self_index = torch.arange(len(anchors)) if self_index is None else self_index
    gate = float(positives[6:-1]) if positives.startswith("gated(") else -2.0
    losses = []
    for i, anchor in enumerate(anchors):
        own_index = None if self_index is None else int(self_index[i])
        s_all, weighted = [], []
        for j, key in enumerate(keys):
            if j == own_index:
                continue
            similarity = cosine(anchor, key)
            s_all.append(similarity / temperature)
            if image_ids[i] == key_image_ids[j] and similarity >= gate and weight(i, j) > 0:
                weighted.append((weight(i, j), similarity / temperature))
        if not weighted:
            continue
        log_all = sum(s.exp() for s in s_all).log()
        if form == "log_of_sum":
            per_anchor = (log_all - sum(w * s.exp() for w, s in weighted).log()) / len(weighted)
        else:
            per_anchor = sum(w * (log_all - s) for w, s in weighted) / sum(w for w, _ in weighted)
        losses.append(temperature / base_temperature * per_anchor)
    return sum(losses) / len(losses) if losses else anchors.sum() * 0


def count_of(features: Tensor, *arguments: Tensor, **settings: Any) -> int:
    """Anchors that have a positive."""
    _, count = image_aware_contrastive_loss(features, *arguments, **settings, reduction="sum_and_count")
    assert count.dtype == torch.long
    assert not count.requires_grad
    return int(count)


def drawn(num: int, width: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Features (num, width) of very different lengths; about half of their cosines pass the gate."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num, width, generator=generator, dtype=torch.float64) + 0.4
    lengths = 10 ** torch.linspace(-2, 2, num, dtype=torch.float64)[:, None]
    return (features * lengths).to(dtype).requires_grad_()


def value_and_gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def assert_close(ours: list[Tensor], reference: list[Tensor], tolerance: float) -> None:
    """Largest difference within `tolerance` of the largest entry."""
    for one, other in zip(ours, reference, strict=True):
        assert float((one - other).abs().max()) <= tolerance * float(other.abs().max())


CASES: dict[str, dict[str, Any]] = {
    "anchors alone, even ids": {"ids": [0, 0, 0, 1, 1, 1, 2, 2, 2]},
    "anchors alone, uneven ids": {"ids": [7, 3, 7, 7, -5, 3, 7, 11, 11]},  # -5 has no positive
    "anchors alone, own index given": {"ids": [0, 1, 0, 1, 1, 2], "self_index": [0, 1, 2, 3, 4, 5]},
    "keys, the anchors among them": {"ids": [4, 4, 2, 2], "key_ids": [9, 4, 4, 2, 2, 4, 8], "self_index": [1, 2, 3, 4]},
    "keys, own index in another order": {"ids": [4, 2, 4], "key_ids": [4, 4, 2, 2, 4], "self_index": [4, 2, 0]},
    "keys, none of them the anchor": {"ids": [4, 4, 2], "key_ids": [9, 4, 2, 2, 4, 8]},
    "keys, an image that they lack": {"ids": [4, 5, 2], "key_ids": [4, 2, 2, 4, 4]},
}


@every_form
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 4, 100])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_and_gradients_are_those_of_the_slow_loop(
    case: dict[str, Any], chunk_size: int | None, settings: dict[str, Any]
) -> None:
    anchors, inputs, arguments = drawn(len(case["ids"])), [], []
    inputs.append(anchors)
    if "key_ids" in case:
        inputs.append(drawn(len(case["key_ids"]), seed=1))
        arguments = [inputs[1], torch.tensor(case["key_ids"])]
    own_index = torch.tensor(case["self_index"]) if "self_index" in case else None
    ids = torch.tensor(case["ids"])
    settings = {**settings, "self_index": own_index, "temperature": 0.2, "base_temperature": 0.05}
    reference = slow_loss(anchors, ids, *arguments, **settings)
    loss = image_aware_contrastive_loss(anchors, ids, *arguments, **settings, chunk_size=chunk_size)
    assert loss.dtype == torch.float64
    assert reference > 0
    assert_close(value_and_gradients(loss, *inputs), value_and_gradients(reference, *inputs), 1e-9)


@every_form
def test_keys_that_are_the_anchors_get_the_gradient_of_both_roles(settings: dict[str, Any]) -> None:
    features, ids = drawn(6), torch.tensor([0, 0, 1, 1, 1, 2])
    as_keys = image_aware_contrastive_loss(features, ids, features, ids, self_index=torch.arange(6), **settings)
    alone = image_aware_contrastive_loss(features, ids, **settings)
    assert_close(value_and_gradients(as_keys, features), value_and_gradients(alone, features), 1e-12)


def test_defaults_are_the_numbers_of_the_method() -> None:
    features, ids = drawn(8), torch.arange(4).repeat_interleave(2)
    given = image_aware_contrastive_loss(
        features, ids, temperature=0.3, base_temperature=0.07, form="log_of_sum", positives="same_image"
    )
    torch.testing.assert_close(image_aware_contrastive_loss(features, ids), given, rtol=0, atol=0)
    torch.testing.assert_close(ImageAwareContrastiveLoss()(features, ids), given, rtol=0, atol=0)


def test_values_computed_by_hand() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    ids = torch.tensor([0, 0, 1])
    loss = image_aware_contrastive_loss(features, ids, temperature=0.5, base_temperature=0.25)
    assert float(loss) == pytest.approx(2 * (math.log(math.exp(2) + 1) - 2), rel=1e-12)


@every_form
def test_the_norm_of_a_feature_does_not_matter(settings: dict[str, Any]) -> None:
    features, ids = drawn(8).detach(), torch.arange(4).repeat_interleave(2)
    scaled = features * torch.linspace(0.1, 9, 8, dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        image_aware_contrastive_loss(scaled, ids, **settings), image_aware_contrastive_loss(features, ids, **settings)
    )


@every_form
def test_the_order_of_anchors_and_the_values_of_ids_do_not_matter(settings: dict[str, Any]) -> None:
    features, ids = drawn(8).detach(), torch.tensor([0, 0, 1, 1, 1, 2, 2, 3])
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        image_aware_contrastive_loss(features[order], 1_000_000_007 * ids[order] - 5, **settings),
        image_aware_contrastive_loss(features, ids, **settings),
    )


def test_gate_counts_only_the_positives_that_pass() -> None:
    features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.28, 0.96], [0.0, 1.0]])
    ids = torch.zeros(4, dtype=torch.long)
    assert count_of(features, ids, positives=gated(0.9)) == 2  # 0.8, 0.28, 0.8 and 0.96, 0.96
    assert count_of(features, ids, positives=gated(0.79)) == 4
    assert count_of(features, ids, positives=gated(-1)) == 4
    ungated = image_aware_contrastive_loss(features, ids, form="mean_of_logs")
    open_gate = image_aware_contrastive_loss(features, ids, form="mean_of_logs", positives=gated(-1))
    torch.testing.assert_close(open_gate, ungated)


@pytest.mark.parametrize("positives", ["same_image", "gated(0.3)"])
def test_chunks_have_the_same_count_of_anchors(positives: str) -> None:
    features, ids = drawn(9), torch.tensor([0, 1, 2, 3, 3, 3, 4, 4, 2])
    sizes = (None, 1, 4, 9, 50)
    assert len({count_of(features, ids, positives=positives, chunk_size=size) for size in sizes}) == 1


BOXES = torch.tensor(
    [[0, 0, 0.5, 0.5], [0, 0.25, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5],
     [0, 0, 1, 1], [0.2, 0.1, 0.3, 0.8], [0.1, 0, 0.9, 0.4]], dtype=torch.float64,
)  # fmt: skip
"""Of six views: top, left, height, width; the first and the third share nothing."""


def slow_iou(one: Tensor, other: Tensor) -> float:
    tops, lefts, heights, widths = torch.stack([one, other], dim=1).tolist()
    height = min(tops[0] + heights[0], tops[1] + heights[1]) - max(tops)
    width = min(lefts[0] + widths[0], lefts[1] + widths[1]) - max(lefts)
    shared = max(height, 0.0) * max(width, 0.0)
    return shared / (heights[0] * widths[0] + heights[1] * widths[1] - shared)


@pytest.mark.parametrize("form", ["log_of_sum", "mean_of_logs"])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_overlap_of_boxes_weighs_the_positives_of_the_slow_loop(
    form: str, power: float, chunk_size: int | None
) -> None:
    features, ids = drawn(6), torch.tensor([0, 0, 0, 0, 1, 1])
    reference = slow_loss(features, ids, form=form, weight=lambda i, j: slow_iou(BOXES[i], BOXES[j]) ** power)
    settings: dict[str, Any] = {"form": form, "chunk_size": chunk_size}
    loss = image_aware_contrastive_loss(features, ids, boxes=BOXES, positives=by_overlap(power), **settings)
    assert_close(value_and_gradients(loss, features), value_and_gradients(reference, features), 1e-9)
    keys, key_boxes = drawn(4, seed=1), BOXES[[0, 1, 3, 4]]
    compared = drawn(2), torch.tensor([0, 1]), keys, torch.tensor([0, 0, 0, 1])
    by_keys = slow_loss(*compared, form=form, weight=lambda i, j: slow_iou(BOXES[[2, 5]][i], key_boxes[j]) ** power)
    loss = image_aware_contrastive_loss(
        *compared, boxes=BOXES[[2, 5]], key_boxes=key_boxes, positives=f"by_overlap({power})", **settings
    )
    assert_close(value_and_gradients(loss, keys), value_and_gradients(by_keys, keys), 1e-9)


def test_disjoint_views_are_not_positives_unless_the_power_is_zero() -> None:
    features, ids, boxes = drawn(2), torch.tensor([3, 3]), BOXES[[0, 2]]
    assert count_of(features, ids, boxes=boxes, positives=by_overlap(1)) == 0
    assert count_of(features, ids, boxes=boxes, positives=by_overlap(0)) == 2
    other = torch.tensor([3, 4])
    assert count_of(features, other, boxes=BOXES[[0, 0]], positives=by_overlap(0)) == 0
    empty = torch.zeros(2, 4)
    assert count_of(features, ids, boxes=empty, positives=by_overlap(1)) == 0


def test_power_zero_is_same_image() -> None:
    features, ids = drawn(6), torch.tensor([0, 0, 0, 1, 1, 1])
    torch.testing.assert_close(
        image_aware_contrastive_loss(features, ids, boxes=BOXES, positives=by_overlap(0)),
        image_aware_contrastive_loss(features, ids),
        rtol=0,
        atol=0,
    )


def of_negatives_alone(logits: Tensor, weights: Tensor) -> Tensor:
    """The decoupled form: positives are left out of the denominator (arXiv 2110.06848)."""
    negatives = logits.masked_fill(weights > 0, -math.inf).logsumexp(dim=1)
    return negatives - (weights * logits.masked_fill(weights == 0, 0)).sum(dim=1) / weights.sum(dim=1)


def all_but_the_third_key(cosines: Tensor, same_image: Tensor, *boxes: Tensor | None) -> Tensor:
    """Booleans, which are True for the anchor itself too."""
    return (torch.arange(cosines.shape[1]) != 2).expand_as(cosines)


def test_form_and_positives_are_any_functions() -> None:
    features, ids = drawn(5), torch.tensor([0, 0, 1, 1, 2])
    unit = torch.nn.functional.normalize(features, dim=1)
    losses = []
    for i in range(5):
        s = unit @ unit[i] / 0.3
        mates = [j for j in range(5) if j not in (i, 2)]
        losses.append(0.3 / 0.07 * (s[2] if i != 2 else torch.tensor(-math.inf)) - 0.3 / 0.07 * s[mates].mean())
    finite = [losses[i] for i in (0, 1, 3, 4)]

    def not_for_the_third(cosines: Tensor, same_image: Tensor, *boxes: Tensor | None) -> Tensor:
        weights = all_but_the_third_key(cosines, same_image).clone()
        weights[2] = False
        return weights

    loss = image_aware_contrastive_loss(features, ids, form=of_negatives_alone, positives=not_for_the_third)
    reference = sum(finite) / 4
    assert_close(value_and_gradients(loss, features), value_and_gradients(reference, features), 1e-9)


def test_named_functions_of_the_library_match_their_names() -> None:
    features, ids = drawn(6), torch.tensor([0, 0, 1, 1, 1, 2])
    for form, name in ((log_of_sum, "log_of_sum"), (mean_of_logs, "mean_of_logs")):
        torch.testing.assert_close(
            image_aware_contrastive_loss(features, ids, form=form, positives=same_image),
            image_aware_contrastive_loss(features, ids, form=name, positives="same_image"),
            rtol=0,
            atol=0,
        )


def test_own_weight_is_zero_and_own_logit_is_minus_infinity_for_any_positives() -> None:
    seen = []

    def everything(cosines: Tensor, same_image: Tensor, boxes: Tensor | None, key_boxes: Tensor | None) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not same_image.diagonal().any()
        return torch.full_like(cosines, 2.0)

    def form(logits: Tensor, weights: Tensor) -> Tensor:
        seen.append((logits.detach().clone(), weights))
        return mean_of_logs(logits, weights)

    image_aware_contrastive_loss(drawn(3), torch.tensor([0, 1, 2]), form=form, positives=everything)
    ((logits, weights),) = seen
    assert torch.equal(weights, 2 * (1 - torch.eye(3, dtype=torch.float64)))
    assert torch.equal(logits == -math.inf, torch.eye(3, dtype=torch.bool))


def test_boxes_reach_positives_chunk_by_chunk() -> None:
    seen = []

    def note(cosines: Tensor, same_image: Tensor, boxes: Tensor | None, key_boxes: Tensor | None) -> Tensor:
        seen.append((boxes, key_boxes))
        return same_image

    image_aware_contrastive_loss(drawn(6), torch.zeros(6), boxes=BOXES, positives=note, chunk_size=4)
    assert all(torch.equal(key_boxes, BOXES) for _, key_boxes in seen)
    assert torch.equal(torch.cat([boxes for boxes, _ in seen]), BOXES)


def test_a_form_with_a_nan_gradient_without_a_positive_gives_no_nan() -> None:
    """An excluded anchor gets finite logits and valid weights in the form."""
    features, ids = drawn(5), torch.tensor([0, 0, 1, 1, 2])
    with torch.autograd.set_detect_anomaly(True):
        for form in (of_negatives_alone, log_of_sum, mean_of_logs):
            loss = image_aware_contrastive_loss(features, ids, form=form)
            _, gradient = value_and_gradients(loss, features)
            assert gradient.isfinite().all()


class Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@every_form
def test_no_cosines_are_stored_for_the_backward_pass(settings: dict[str, Any]) -> None:
    features, keys = drawn(64), drawn(80, seed=1)
    ids, key_ids = torch.arange(16).repeat_interleave(4), torch.arange(16).repeat_interleave(5)
    for arguments in ((), (keys, key_ids)):
        kept: weakref.WeakSet[Kept] = weakref.WeakSet()

        def note(tensor: Tensor, kept: weakref.WeakSet[Kept] = kept) -> Kept:
            one = Kept(tensor)
            kept.add(one)
            return one

        with torch.autograd.graph.saved_tensors_hooks(note, lambda one: one.tensor):
            loss = image_aware_contrastive_loss(features, ids, *arguments, **settings)
        assert loss.requires_grad
        assert max(one.tensor.numel() for one in kept) == (keys if arguments else features).numel()


@every_form
def test_no_tensor_contains_the_cosines_of_more_than_one_chunk(settings: dict[str, Any]) -> None:
    """Memory grows with R and M, not with R × M."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            sizes = [one.numel() for one in tree_leaves(result) if isinstance(one, Tensor)]
            self.numel = max([self.numel, *sizes])
            return result

    for num in (64, 128):
        features, ids = drawn(num), torch.arange(num // 4).repeat_interleave(4)
        with Largest() as largest:
            image_aware_contrastive_loss(features, ids, **settings, chunk_size=8).backward()
        assert largest.numel == 8 * num


def test_gradient_cannot_be_differentiated_again() -> None:
    features = drawn(4)
    loss = image_aware_contrastive_loss(features, torch.tensor([0, 0, 1, 1]))
    (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


def test_backward_pass_may_run_twice() -> None:
    features = drawn(4)
    loss = image_aware_contrastive_loss(features, torch.tensor([0, 0, 1, 1]))
    first, second = (torch.autograd.grad(loss, features, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(second, first, rtol=0, atol=0)


@every_form
@pytest.mark.parametrize("temperature", [0.01, 0.02, 1.0])
def test_low_and_high_temperatures_give_the_slow_loops_value(temperature: float, settings: dict[str, Any]) -> None:
    """In float32, where exponentials overflow below τ = 1/88."""
    features, ids = drawn(9), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3])
    reference = value_and_gradients(slow_loss(features, ids, temperature=temperature, **settings), features)
    single = features.detach().float().requires_grad_()
    loss = image_aware_contrastive_loss(single, ids, temperature=temperature, **settings)
    for one, other in zip(value_and_gradients(loss, single), reference, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-3 * float(other.abs().max()) + 2e-5)


def test_gate_at_one_lets_equal_features_through() -> None:
    features, ids = torch.tensor([[0.0, 2.0], [0.0, 5.0], [1.0, 0.0]]), torch.zeros(3, dtype=torch.long)
    settings: dict[str, Any] = {"form": "mean_of_logs", "positives": "gated(1)"}
    assert count_of(features, ids, **settings) == 2
    loss = image_aware_contrastive_loss(features, ids, temperature=1.0, base_temperature=1.0, **settings)
    assert loss.item() == pytest.approx(math.log(math.e + 1) - 1)


@every_form
def test_half_precision_input_is_computed_in_float32(settings: dict[str, Any]) -> None:
    halves = drawn(12, width=32, dtype=torch.bfloat16)
    ids = torch.arange(4).repeat_interleave(3)
    loss = image_aware_contrastive_loss(halves, ids, **settings)
    assert loss.dtype == torch.float32
    exact = halves.detach().double().requires_grad_()
    value, gradient = value_and_gradients(loss, halves)
    exact_value, exact_gradient = value_and_gradients(slow_loss(exact, ids, **settings), exact)
    assert float(value) == pytest.approx(float(exact_value), rel=1e-5)
    assert gradient.dtype == torch.bfloat16
    assert_close([gradient.double()], [exact_gradient], 2**-7)  # bfloat16 keeps 8 bits


def test_autocast_does_not_round_the_similarities() -> None:
    features, ids = drawn(12, width=32, dtype=torch.float32), torch.arange(4).repeat_interleave(3)
    for chunk_size in (None, 5):
        plain = value_and_gradients(image_aware_contrastive_loss(features, ids, chunk_size=chunk_size), features)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = image_aware_contrastive_loss(features, ids, chunk_size=chunk_size)
        assert_close(value_and_gradients(loss, features), plain, 1e-6)


@every_form
def test_the_mean_is_sum_divided_by_count(settings: dict[str, Any]) -> None:
    features, ids = drawn(6), torch.tensor([0, 0, 1, 1, 1, 2])
    mean = image_aware_contrastive_loss(features, ids, **settings)
    total, count = image_aware_contrastive_loss(features, ids, **settings, reduction="sum_and_count")
    assert_close(value_and_gradients(total / count, features), value_and_gradients(mean, features), 1e-12)


@every_form
def test_sums_and_counts_of_uneven_shards_add_up_to_the_whole(settings: dict[str, Any]) -> None:
    """The reduction over devices: docs/method.md adds sums and counts, and does not average means."""
    features, ids = drawn(9), torch.tensor([0, 1, 2, 3, 3, 3, 4, 4, 2])  # the first shard has nearly no positive
    own_index = torch.arange(9)
    arguments = {**settings, "reduction": "sum_and_count"}
    parts = [
        image_aware_contrastive_loss(features[part], ids[part], features, ids, self_index=own_index[part], **arguments)
        for part in (slice(0, 3), slice(3, 9))
    ]
    sums, counts = zip(*parts, strict=True)
    whole = slow_loss(features, ids, **settings)
    assert counts[0] != counts[1]
    assert_close(value_and_gradients(sum(sums) / sum(counts), features), value_and_gradients(whole, features), 1e-9)


def test_detached_keys_and_anchors_get_no_gradient() -> None:
    features, ids = drawn(4), torch.tensor([0, 0, 1, 1])
    keys = drawn(6, seed=1)
    key_ids = torch.tensor([0, 1, 1, 0, 2, 2])
    image_aware_contrastive_loss(features, ids, keys.detach(), key_ids).backward()
    assert features.grad is not None
    assert features.grad.abs().sum() > 0
    assert keys.grad is None
    features.grad = None
    image_aware_contrastive_loss(features.detach(), ids, keys, key_ids).backward()
    assert features.grad is None
    assert keys.grad is not None
    assert not image_aware_contrastive_loss(features.detach(), ids, keys.detach(), key_ids).requires_grad
    with torch.no_grad():
        assert not image_aware_contrastive_loss(features, ids, keys, key_ids).requires_grad
    with torch.inference_mode():
        image_aware_contrastive_loss(features, ids, keys, key_ids)


@every_form
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize(
    ("num", "ids"),
    [(5, [0, 1, 2, 3, 4]), (1, [0]), (0, [])],
    ids=["one view an image", "one anchor", "no anchor"],
)
def test_without_a_positive_the_loss_is_zero_and_so_are_the_gradients(
    num: int, ids: list[int], chunk_size: int | None, settings: dict[str, Any]
) -> None:
    features = drawn(num)
    image_ids = torch.tensor(ids, dtype=torch.long)
    loss = image_aware_contrastive_loss(features, image_ids, **settings, chunk_size=chunk_size)
    value, gradient = value_and_gradients(loss, features)
    assert value == 0
    assert gradient.shape == features.shape
    assert (gradient == 0).all()
    assert count_of(features, image_ids) == 0


@every_form
def test_without_a_key_the_loss_is_zero_and_so_are_the_gradients(settings: dict[str, Any]) -> None:
    features, nothing = drawn(3), torch.empty(0, dtype=torch.long)
    loss = image_aware_contrastive_loss(features, torch.tensor([0, 0, 1]), drawn(0), nothing, **settings)
    value, gradient = value_and_gradients(loss, features)
    assert value == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_without_a_positive_that_passes_the_gate_the_loss_is_zero(chunk_size: int | None) -> None:
    features = torch.eye(4, dtype=torch.float64).requires_grad_()
    ids = torch.zeros(4, dtype=torch.long)
    loss = image_aware_contrastive_loss(features, ids, form="mean_of_logs", positives=gated(0.3), chunk_size=chunk_size)
    value, gradient = value_and_gradients(loss, features)
    assert value == 0
    assert (gradient == 0).all()


@every_form
def test_anchor_without_a_positive_is_left_out_but_stays_a_negative_of_the_others(settings: dict[str, Any]) -> None:
    features = torch.tensor([[1.0, 0.1], [1.0, 0.2], [0.9, 0.3]], dtype=torch.float64).requires_grad_()
    value, gradient = value_and_gradients(
        image_aware_contrastive_loss(features, torch.tensor([0, 0, 1]), **settings), features
    )
    two_alone = image_aware_contrastive_loss(features[:2], torch.tensor([0, 0]), **settings)
    assert value > two_alone
    assert gradient[2].abs().sum() > 0


@every_form
def test_a_single_image_has_no_negatives(settings: dict[str, Any]) -> None:
    features, ids = drawn(4), torch.zeros(4, dtype=torch.long)
    reference = slow_loss(features, ids, **settings)
    loss = image_aware_contrastive_loss(features, ids, **settings)
    torch.testing.assert_close(loss, reference, rtol=1e-9, atol=1e-12)
    if settings["form"] == "log_of_sum":
        ungated = image_aware_contrastive_loss(features, ids)
        torch.testing.assert_close(ungated, torch.zeros_like(loss), rtol=0, atol=1e-12)


@every_form
def test_equal_features_give_the_log_of_the_ratio_of_keys(settings: dict[str, Any]) -> None:
    """All cosines are 1: 7 other keys, 3 of them positive, for any features."""
    features = torch.full((8, 5), 0.7, dtype=torch.float64).requires_grad_()
    ids = torch.arange(2).repeat_interleave(4)
    value, gradient = value_and_gradients(image_aware_contrastive_loss(features, ids, **settings), features)
    per_anchor = math.log(7 / 3) / 3 if settings["form"] == "log_of_sum" else math.log(7)
    assert float(value) == pytest.approx(0.3 / 0.07 * per_anchor, rel=1e-9)
    assert gradient.abs().max() < 1e-9


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cosines_of_plus_and_minus_one_stay_finite_at_a_low_temperature(
    dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    direction = torch.tensor([[0.6, 0.8]], dtype=dtype)
    features = torch.cat([direction, direction, -direction, -direction]).requires_grad_()
    for ids in ([0, 0, 1, 1], [0, 1, 0, 1]):  # positives at +1 and negatives at −1, and the other way round
        loss = image_aware_contrastive_loss(features, torch.tensor(ids), **settings, temperature=1e-3)
        value, gradient = value_and_gradients(loss, features)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_zero_feature_has_cosine_zero_with_all_and_no_gradient(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    features = drawn(6, dtype=dtype).detach().abs()
    features[1] = 0
    features.requires_grad_()
    loss = image_aware_contrastive_loss(features, torch.tensor([0, 0, 0, 1, 1, 1]), **settings)
    value, gradient = value_and_gradients(loss, features)
    assert torch.isfinite(value)
    assert (gradient[1] == 0).all()
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0


@every_form
def test_a_nan_feature_is_not_hidden(settings: dict[str, Any]) -> None:
    features = drawn(4).detach()
    features[:] = torch.nan
    assert image_aware_contrastive_loss(features, torch.tensor([0, 0, 1, 1]), **settings).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pair_term_is_the_slow_loop_in_value_and_gradient(dtype: torch.dtype) -> None:
    p, z = drawn(7, dtype=dtype), drawn(7, seed=1, dtype=dtype)
    reference = -sum(cosine(one, other) for one, other in zip(p, z, strict=True)) / 7
    tolerance = 1e-6 if dtype == torch.float64 else 1e-5
    assert_close(
        value_and_gradients(negative_cosine_similarity(p, z), p, z), value_and_gradients(reference, p, z), tolerance
    )
    torch.testing.assert_close(NegativeCosineSimilarity()(p, z), negative_cosine_similarity(p, z), rtol=0, atol=0)


def test_pair_term_reaches_both_ends_of_its_range() -> None:
    features = drawn(5).detach()
    torch.testing.assert_close(negative_cosine_similarity(features, 3 * features).item(), -1.0)
    torch.testing.assert_close(negative_cosine_similarity(features, -features).item(), 1.0)


def test_pair_term_of_half_precision_input_is_computed_in_float32() -> None:
    p, z = drawn(7, width=64, dtype=torch.bfloat16), drawn(7, width=64, seed=1, dtype=torch.bfloat16)
    loss = negative_cosine_similarity(p, z)
    assert loss.dtype == torch.float32
    exact = torch.nn.functional.cosine_similarity(p.double(), z.double()).mean()
    assert loss.item() == pytest.approx(-exact.item(), rel=1e-5)


def test_pair_term_gives_no_gradient_to_a_stopped_side_and_to_a_zero_feature() -> None:
    p, z = drawn(4).detach(), drawn(4, seed=1)
    p[2] = 0
    p.requires_grad_()
    loss = negative_cosine_similarity(p, z.detach())
    loss.backward()
    assert z.grad is None
    assert p.grad is not None
    assert (p.grad[2] == 0).all()
    assert (p.grad[[0, 1, 3]] != 0).any(dim=1).all()


def test_the_module_equals_the_function_with_its_settings() -> None:
    features, ids, keys = drawn(4), torch.tensor([0, 0, 1, 1]), drawn(6, seed=1)
    key_ids = torch.tensor([1, 0, 0, 1, 1, 3])
    settings: dict[str, Any] = {
        "temperature": 0.1,
        "base_temperature": 0.2,
        "form": "mean_of_logs",
        "positives": "by_overlap(2)",
        "chunk_size": 3,
    }
    given: dict[str, Any] = {"self_index": torch.tensor([1, 2, 0, 3]), "boxes": BOXES[:4], "key_boxes": BOXES}
    for reduction in ("mean", "sum_and_count"):
        torch.testing.assert_close(
            ImageAwareContrastiveLoss(**settings)(features, ids, keys, key_ids, **given, reduction=reduction),
            image_aware_contrastive_loss(features, ids, keys, key_ids, **given, **settings, reduction=reduction),
            rtol=0,
            atol=0,
        )


BAD_SETTINGS = [
    ({"temperature": 0.0}, "temperature=0.0 was given: pass a number above 0"),
    ({"temperature": -0.3}, "temperature=-0.3 was given"),
    ({"temperature": math.nan}, "temperature=nan was given"),
    ({"base_temperature": 0}, "base_temperature=0 was given"),
    ({"form": "supcon"}, "form='supcon' is unknown: Pass 'log_of_sum', 'mean_of_logs'"),
    ({"positives": "gated(1.1)"}, r"gated\(1.1\) was given: pass a cosine in -1–1"),
    ({"chunk_size": 0}, "chunk_size=0 was given: pass at least 1"),
    ({"chunk_size": -4}, "chunk_size=-4 was given: pass at least 1"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
def test_bad_settings_are_refused_by_the_function_and_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_aware_contrastive_loss(torch.eye(2), torch.tensor([0, 0]), **settings)
    with pytest.raises(ValueError, match=message):
        ImageAwareContrastiveLoss(**settings)


KEYS = {"keys": torch.ones(5, 4), "key_image_ids": torch.zeros(5)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"anchors": torch.ones(2, 3, 4)},
            r"anchors have shape \(2, 3, 4\) and image_ids \(2,\): pass \(R, P\) and \(R,\)",
        ),
        ({"image_ids": torch.zeros(3)}, r"anchors have shape \(2, 4\) and image_ids \(3,\)"),
        ({"image_ids": torch.zeros(2, 1)}, r"image_ids \(2, 1\)"),
        ({"keys": torch.ones(5, 4)}, "keys and key_image_ids belong together"),
        ({"key_image_ids": torch.zeros(5)}, "keys and key_image_ids belong together"),
        (
            {"keys": torch.ones(5, 3), "key_image_ids": torch.zeros(5)},
            r"keys have shape \(5, 3\).*pass \(M, 4\) and \(M,\)",
        ),
        ({"keys": torch.ones(4), "key_image_ids": torch.zeros(4)}, r"keys have shape \(4,\)"),
        ({"keys": torch.ones(5, 4), "key_image_ids": torch.zeros(6)}, r"key_image_ids \(6,\)"),
        ({"self_index": torch.arange(3)}, r"self_index has shape \(3,\): pass one index for each of the 2 anchors"),
        ({"boxes": torch.ones(3, 4)}, r"boxes have shape \(3, 4\) and are torch.float32: pass \(2, 4\) floats"),
        ({"boxes": torch.zeros(2, 4, dtype=torch.long)}, "boxes have shape .* and are torch.int64"),
        ({**KEYS, "boxes": torch.zeros(2, 4), "key_boxes": torch.zeros(2, 4)}, r"key_boxes have shape \(2, 4\)"),
        ({**KEYS, "boxes": torch.zeros(2, 4)}, "with keys, boxes and key_boxes belong together"),
        ({**KEYS, "key_boxes": torch.zeros(5, 4)}, "with keys, boxes and key_boxes belong together"),
        ({"key_boxes": torch.zeros(2, 4)}, "key_boxes belong to keys, which are not given"),
        ({"reduction": "sum"}, "reduction='sum' is unknown: pass 'mean' or 'sum_and_count'"),
        (
            {"positives": by_overlap(1)},
            r"by_overlap\(1.0\) compares the boxes of two views, but no boxes were given: pass ",
        ),
        (
            {"form": lambda logits, weights: logits},
            r"form returned shape \(2, 2\): return \(2,\), one value per anchor",
        ),
        (
            {"positives": lambda cosines, *_: cosines[:, :1]},
            r"positives returned shape \(2, 1\): return \(2, 2\), one weight per cosine",
        ),
    ],
)
def test_mismatched_shapes_are_refused_on_every_device(change: dict[str, Any], message: str) -> None:
    arguments = {"anchors": torch.ones(2, 4), "image_ids": torch.zeros(2), **change}
    with pytest.raises(ValueError, match=message):
        image_aware_contrastive_loss(**arguments)
    elsewhere = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        image_aware_contrastive_loss(**elsewhere)


def boxes_with(*box: float) -> Tensor:
    return torch.tensor([[0.0, 0.0, 1.0, 1.0], box])


BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"positives": lambda cosines, *_: cosines - 2}, "positives returned weights from .* to .*: return finite numbers"),
    ({"positives": lambda cosines, *_: cosines * math.inf}, "positives returned weights from"),
    ({"positives": lambda cosines, *_: cosines * math.nan}, "positives returned weights from nan to nan"),
    ({"form": lambda logits, weights: logits.sum(dim=1)}, "form returned a value that is not finite"),
    ({"boxes": boxes_with(-0.1, 0, 1, 1)}, r"boxes\[1\] is \[-0.1, 0.0, 1.0, 1.0\]: pass top, left, height and width"),
    ({"boxes": boxes_with(0, 0.5, 1, 0.6)}, r"boxes\[1\] is \[0.0, 0.5, 1.0, 0.6\]"),
    ({"boxes": boxes_with(0, 0, 300, 200)}, r"boxes\[1\] is \[0.0, 0.0, 300.0, 200.0\]"),
    ({"boxes": boxes_with(0, 0, math.nan, 1)}, r"boxes\[1\] is \[0.0, 0.0, nan, 1.0\]"),
    ({"boxes": boxes_with(0.5, 0.5, -0.1, 0.2)}, r"boxes\[1\] is \[0.5, 0.5, -0.1, 0.2\]"),
]


@pytest.mark.parametrize(("given", "message"), BAD_VALUES)
def test_bad_values_are_refused_on_the_cpu_and_on_request_elsewhere(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_aware_contrastive_loss(torch.ones(2, 4), torch.zeros(2), **given)
    settings = {name: value for name, value in given.items() if name != "boxes"}
    boxes = {"boxes": given["boxes"].to("meta")} if "boxes" in given else {}
    term = ImageAwareContrastiveLoss(**settings)
    compared = torch.ones(2, 4, device="meta"), torch.zeros(2, device="meta")
    term(*compared, **boxes)  # reads no value, and so do other devices
    term.checks_values = True
    with pytest.raises((NotImplementedError, RuntimeError)):  # meta tensors have no values to read
        term(*compared, **boxes)


def test_key_boxes_are_checked_too() -> None:
    keys = {"keys": torch.ones(2, 4), "key_image_ids": torch.zeros(2)}
    boxes = {"boxes": boxes_with(0, 0, 1, 1), "key_boxes": boxes_with(0, 0, 1.1, 1)}
    with pytest.raises(ValueError, match=r"key_boxes\[1\] is \[0.0, 0.0, 1.1, 1.0\]"):
        image_aware_contrastive_loss(torch.ones(2, 4), torch.zeros(2), **keys, **boxes)


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (1, 1, 0, 0), (0.3, 0.7, 0.7, 0.3 + 1e-6)])
def test_boxes_up_to_the_edges_are_accepted(box: tuple[float, ...]) -> None:
    assert image_aware_contrastive_loss(torch.ones(2, 4), torch.zeros(2), boxes=boxes_with(*box)) == 0


@every_form
def test_shapes_suffice_on_the_meta_device(settings: dict[str, Any]) -> None:
    features = torch.ones(6, 4, device="meta", requires_grad=True)
    loss = image_aware_contrastive_loss(features, torch.zeros(6, device="meta"), **settings, chunk_size=4)
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss.shape == ()
    assert gradient.shape == (6, 4)


@pytest.mark.parametrize(
    ("p", "z"),
    [((2, 3), (3, 3)), ((2, 3), (2, 4)), ((2, 3, 1), (2, 3, 1)), ((0, 3), (0, 3))],
)
def test_pair_term_refuses_mismatched_shapes(p: tuple[int, ...], z: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pass two matrices of one shape \(N, P\)"):
        negative_cosine_similarity(torch.ones(p), torch.ones(z))
