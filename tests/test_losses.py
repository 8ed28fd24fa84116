"""Both terms against slow loops written from docs/method.md, their degenerate cases and their refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mlssl.losses import (
    ImageAwareContrastiveLoss,
    NegativeCosineSimilarity,
    count_anchors_with_positives,
    image_aware_contrastive_loss,
    negative_cosine_similarity,
)

FORMS: dict[str, dict[str, Any]] = {
    "log of sum": {"positives": "log_of_sum"},
    "mean of logs": {"positives": "mean_of_logs"},
    "gated": {"positives": "mean_of_logs", "min_similarity": 0.3},
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
    positives: str = "log_of_sum",
    min_similarity: float | None = None,
) -> Tensor:
    """docs/method.md word for word: one anchor, one pair at a time."""
    if keys is None or key_image_ids is None:
        keys, key_image_ids = anchors, image_ids
        self_index = torch.arange(len(anchors)) if self_index is None else self_index
    losses = []
    for i, anchor in enumerate(anchors):
        own_place = None if self_index is None else int(self_index[i])
        s_all, s_positive = [], []
        for j, key in enumerate(keys):
            if j == own_place:
                continue
            similarity = cosine(anchor, key)
            s_all.append(similarity / temperature)
            if image_ids[i] == key_image_ids[j] and (min_similarity is None or similarity >= min_similarity):
                s_positive.append(similarity / temperature)
        if not s_positive:
            continue
        log_all = sum(s.exp() for s in s_all).log()
        if positives == "log_of_sum":
            per_anchor = log_all - sum(s.exp() for s in s_positive).log()
        else:
            per_anchor = sum(log_all - s for s in s_positive)
        losses.append(temperature / base_temperature * per_anchor / len(s_positive))
    return sum(losses) / len(losses) if losses else anchors.sum() * 0


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
    "anchors alone, places given": {"ids": [0, 1, 0, 1, 1, 2], "self_index": [0, 1, 2, 3, 4, 5]},
    "keys, the anchors among them": {"ids": [4, 4, 2, 2], "key_ids": [9, 4, 4, 2, 2, 4, 8], "self_index": [1, 2, 3, 4]},
    "keys, places in another order": {"ids": [4, 2, 4], "key_ids": [4, 4, 2, 2, 4], "self_index": [4, 2, 0]},
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
    own_places = torch.tensor(case["self_index"]) if "self_index" in case else None
    ids = torch.tensor(case["ids"])
    settings = {**settings, "self_index": own_places, "temperature": 0.2, "base_temperature": 0.05}
    reference = slow_loss(anchors, ids, *arguments, **settings)
    loss = image_aware_contrastive_loss(anchors, ids, *arguments, **settings, chunk_size=chunk_size)
    assert loss.dtype == torch.float64
    assert reference > 0
    assert_close(value_and_gradients(loss, *inputs), value_and_gradients(reference, *inputs), 1e-6)


@every_form
def test_keys_that_are_the_anchors_themselves_give_the_gradient_of_both_roles(settings: dict[str, Any]) -> None:
    features, ids = drawn(6), torch.tensor([0, 0, 1, 1, 1, 2])
    as_keys = image_aware_contrastive_loss(features, ids, features, ids, self_index=torch.arange(6), **settings)
    alone = image_aware_contrastive_loss(features, ids, **settings)
    assert_close(value_and_gradients(as_keys, features), value_and_gradients(alone, features), 1e-12)


def test_defaults_are_the_numbers_of_the_method() -> None:
    features, ids = drawn(8), torch.arange(4).repeat_interleave(2)
    given = image_aware_contrastive_loss(
        features, ids, temperature=0.3, base_temperature=0.07, positives="log_of_sum", min_similarity=None
    )
    torch.testing.assert_close(image_aware_contrastive_loss(features, ids), given, rtol=0, atol=0)
    torch.testing.assert_close(ImageAwareContrastiveLoss()(features, ids), given, rtol=0, atol=0)


def test_numbers_worked_out_by_hand() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    ids = torch.tensor([0, 0, 1])
    loss = image_aware_contrastive_loss(features, ids, temperature=0.5, base_temperature=0.25)
    assert float(loss) == pytest.approx(2 * (math.log(math.exp(2) + 1) - 2), rel=1e-12)


@every_form
def test_length_of_a_feature_changes_nothing(settings: dict[str, Any]) -> None:
    features, ids = drawn(8).detach(), torch.arange(4).repeat_interleave(2)
    scaled = features * torch.linspace(0.1, 9, 8, dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        image_aware_contrastive_loss(scaled, ids, **settings), image_aware_contrastive_loss(features, ids, **settings)
    )


@every_form
def test_order_of_anchors_and_names_of_images_change_nothing(settings: dict[str, Any]) -> None:
    features, ids = drawn(8).detach(), torch.tensor([0, 0, 1, 1, 1, 2, 2, 3])
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        image_aware_contrastive_loss(features[order], 1_000_000_007 * ids[order] - 5, **settings),
        image_aware_contrastive_loss(features, ids, **settings),
    )


def test_gate_counts_only_the_positives_that_pass() -> None:
    features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.28, 0.96], [0.0, 1.0]])
    ids = torch.zeros(4, dtype=torch.long)
    assert count_anchors_with_positives(features, ids, min_similarity=0.9) == 2  # 0.8, 0.28, 0.8 and 0.96, 0.96
    assert count_anchors_with_positives(features, ids, min_similarity=0.79) == 4
    assert count_anchors_with_positives(features, ids, min_similarity=-1.0) == 4
    ungated = image_aware_contrastive_loss(features, ids, positives="mean_of_logs")
    open_gate = image_aware_contrastive_loss(features, ids, positives="mean_of_logs", min_similarity=-1.0)
    torch.testing.assert_close(open_gate, ungated)


@pytest.mark.parametrize("min_similarity", [None, 0.3])
def test_anchors_are_counted_alike_in_chunks(min_similarity: float | None) -> None:
    features, ids = drawn(9), torch.tensor([0, 1, 2, 3, 3, 3, 4, 4, 2])
    counts = {
        int(count_anchors_with_positives(features, ids, min_similarity=min_similarity, chunk_size=chunk_size))
        for chunk_size in (None, 1, 4, 9, 50)
    }
    assert len(counts) == 1


@every_form
def test_no_similarities_are_kept_for_the_backward_pass(settings: dict[str, Any]) -> None:
    features, keys = drawn(64), drawn(80, seed=1)
    ids, key_ids = torch.arange(16).repeat_interleave(4), torch.arange(16).repeat_interleave(5)
    for arguments in ((), (keys, key_ids)):
        sizes = [0]

        def note(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            image_aware_contrastive_loss(features, ids, *arguments, **settings)
        assert max(sizes) <= keys.numel()


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
@pytest.mark.parametrize("temperature", [0.02, 0.024, 0.026, 1.0])
def test_low_and_high_temperatures_give_the_slow_loops_value(temperature: float, settings: dict[str, Any]) -> None:
    """In float32, sums of exponentials of shifted logits at first, logsumexp of whole lines below τ = 1/40."""
    features, ids = drawn(9), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3])
    reference = value_and_gradients(slow_loss(features, ids, temperature=temperature, **settings), features)
    single = features.detach().float().requires_grad_()
    loss = image_aware_contrastive_loss(single, ids, temperature=temperature, **settings)
    for one, other in zip(value_and_gradients(loss, single), reference, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-3 * float(other.abs().max()) + 2e-5)


def test_gate_at_one_lets_equal_features_through() -> None:
    features, ids = torch.tensor([[0.0, 2.0], [0.0, 5.0], [1.0, 0.0]]), torch.zeros(3, dtype=torch.long)
    assert count_anchors_with_positives(features, ids, min_similarity=1.0) == 2
    loss = image_aware_contrastive_loss(
        features, ids, temperature=1.0, base_temperature=1.0, positives="mean_of_logs", min_similarity=1.0
    )
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
def test_normalizer_divides_the_sum_over_anchors(settings: dict[str, Any]) -> None:
    features, ids = drawn(6), torch.tensor([0, 0, 1, 1, 1, 2])
    number = count_anchors_with_positives(features, ids, min_similarity=settings.get("min_similarity"))
    mean = image_aware_contrastive_loss(features, ids, **settings)
    for normalizer in (7.0, torch.tensor(7.0)):
        loss = image_aware_contrastive_loss(features, ids, **settings, normalizer=normalizer)
        torch.testing.assert_close(loss * 7, mean * number)


@every_form
def test_shards_with_a_common_normalizer_add_up_to_the_whole_however_uneven(settings: dict[str, Any]) -> None:
    """What the module does over devices: docs/method.md adds sums and counts, and does not average means."""
    features, ids = drawn(9), torch.tensor([0, 1, 2, 3, 3, 3, 4, 4, 2])  # the first shard has nearly no positive
    places = torch.arange(9)
    gate = {"min_similarity": settings.get("min_similarity")}
    numbers, shards = [], [slice(0, 3), slice(3, 9)]
    for shard in shards:
        numbers.append(
            count_anchors_with_positives(features[shard], ids[shard], features, ids, self_index=places[shard], **gate)
        )
    total = sum(
        image_aware_contrastive_loss(
            features[shard], ids[shard], features, ids, self_index=places[shard], normalizer=sum(numbers), **settings
        )
        for shard in shards
    )
    whole = slow_loss(features, ids, **settings)
    assert numbers[0] != numbers[1]
    assert_close(value_and_gradients(total, features), value_and_gradients(whole, features), 1e-6)


def test_gradient_stays_out_of_keys_and_anchors_that_are_detached() -> None:
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
    assert not count_anchors_with_positives(features, ids, keys, key_ids, min_similarity=0.1).requires_grad


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
    assert count_anchors_with_positives(features, image_ids) == 0


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
    loss = image_aware_contrastive_loss(
        features, ids, positives="mean_of_logs", min_similarity=0.3, chunk_size=chunk_size
    )
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
def test_one_image_alone_has_nothing_to_push_away(settings: dict[str, Any]) -> None:
    features, ids = drawn(4), torch.zeros(4, dtype=torch.long)
    reference = slow_loss(features, ids, **settings)
    loss = image_aware_contrastive_loss(features, ids, **settings)
    torch.testing.assert_close(loss, reference, rtol=1e-9, atol=1e-12)
    if settings["positives"] == "log_of_sum":
        torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)


@every_form
def test_equal_features_cost_the_share_of_negatives(settings: dict[str, Any]) -> None:
    """All cosines are 1: 7 others, of which 3 are positive, whatever the features."""
    features = torch.full((8, 5), 0.7, dtype=torch.float64).requires_grad_()
    ids = torch.arange(2).repeat_interleave(4)
    value, gradient = value_and_gradients(image_aware_contrastive_loss(features, ids, **settings), features)
    per_anchor = math.log(7 / 3) / 3 if settings["positives"] == "log_of_sum" else math.log(7)
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
def test_a_feature_of_zeros_has_cosine_zero_with_all_and_no_gradient(
    dtype: torch.dtype, settings: dict[str, Any]
) -> None:
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
def test_a_feature_that_is_no_number_is_not_hidden(settings: dict[str, Any]) -> None:
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


def test_pair_term_gives_no_gradient_to_a_stopped_side_and_to_a_feature_of_zeros() -> None:
    p, z = drawn(4).detach(), drawn(4, seed=1)
    p[2] = 0
    p.requires_grad_()
    loss = negative_cosine_similarity(p, z.detach())
    loss.backward()
    assert z.grad is None
    assert p.grad is not None
    assert (p.grad[2] == 0).all()
    assert (p.grad[[0, 1, 3]] != 0).any(dim=1).all()


def test_module_twin_is_the_function_with_its_settings() -> None:
    features, ids, keys = drawn(4), torch.tensor([0, 0, 1, 1]), drawn(6, seed=1)
    key_ids = torch.tensor([1, 0, 0, 1, 1, 3])
    settings: dict[str, Any] = {
        "temperature": 0.1,
        "base_temperature": 0.2,
        "positives": "mean_of_logs",
        "min_similarity": 0.1,
        "chunk_size": 3,
    }
    own: dict[str, Any] = {"self_index": torch.tensor([1, 2, 0, 3]), "normalizer": 3.0}
    torch.testing.assert_close(
        ImageAwareContrastiveLoss(**settings)(features, ids, keys, key_ids, **own),
        image_aware_contrastive_loss(features, ids, keys, key_ids, **own, **settings),
        rtol=0,
        atol=0,
    )


BAD_SETTINGS = [
    ({"temperature": 0.0}, "temperature=0.0 was given: pass a number above 0"),
    ({"temperature": -0.3}, "temperature=-0.3 was given"),
    ({"temperature": math.nan}, "temperature=nan was given"),
    ({"base_temperature": 0}, "base_temperature=0 was given"),
    ({"positives": "supcon"}, "positives='supcon' is unknown: pass 'log_of_sum' or 'mean_of_logs'"),
    ({"min_similarity": 0.3}, "min_similarity=0.3 gates single positives, and positives='log_of_sum' sums them first"),
    ({"positives": "mean_of_logs", "min_similarity": 1.1}, "min_similarity=1.1 is no cosine"),
    ({"positives": "mean_of_logs", "min_similarity": -1.1}, "min_similarity=-1.1 is no cosine"),
    ({"chunk_size": 0}, "chunk_size=0 was given: pass at least 1"),
    ({"chunk_size": -4}, "chunk_size=-4 was given: pass at least 1"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
def test_bad_settings_are_refused_by_the_function_and_where_the_module_is_built(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        image_aware_contrastive_loss(torch.eye(2), torch.tensor([0, 0]), **settings)
    with pytest.raises(ValueError, match=message):
        ImageAwareContrastiveLoss(**settings)


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
        ({"self_index": torch.arange(3)}, r"self_index has shape \(3,\): pass one place for each of the 2 anchors"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"anchors": torch.ones(2, 4), "image_ids": torch.zeros(2), **change}
    with pytest.raises(ValueError, match=message):
        image_aware_contrastive_loss(**arguments)
    with pytest.raises(ValueError, match=message):
        count_anchors_with_positives(**arguments)


@pytest.mark.parametrize(
    ("p", "z"),
    [((2, 3), (3, 3)), ((2, 3), (2, 4)), ((2, 3, 1), (2, 3, 1)), ((0, 3), (0, 3))],
)
def test_pair_term_refuses_shapes_that_do_not_pair(p: tuple[int, ...], z: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pass two matrices of one shape \(N, P\)"):
        negative_cosine_similarity(torch.ones(p), torch.ones(z))
