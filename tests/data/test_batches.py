"""Batches that follow the contract are accepted; others are refused with its text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mlssl.data.batches import check_image_batch, check_view_batch


def view_batch(**changes: Any) -> dict[str, Any]:
    batch = {
        "views": torch.zeros(2, 2, 4, 3, 8, 8, dtype=torch.uint8),
        "image_ids": torch.tensor([4, 9]),
        "labels": torch.tensor([[1, 0, -1], [0, 0, 1]], dtype=torch.int8),
    }
    return {key: value for key, value in {**batch, **changes}.items() if value is not None}


def image_batch(**changes: Any) -> dict[str, Any]:
    batch = view_batch(**{"image": torch.zeros(2, 3, 6, 8, dtype=torch.uint8), **changes})
    del batch["views"]
    return batch


def boxes(*shape: int) -> torch.Tensor:
    """Each (0, 0.2, 0.5, 0.8)."""
    return torch.tensor([0.0, 0.2, 0.5, 0.8]).repeat(*(shape or (2, 2, 4)), 1)


def local(images: int = 2, count: int = 5) -> torch.Tensor:
    return torch.zeros(images, count, 3, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize("branches", [1, 2, 3, 7])
def test_accepts_any_number_of_branches_boxes_and_local_views(branches: int) -> None:
    views = torch.zeros(2, branches, 4, 3, 8, 8, dtype=torch.uint8)
    check_view_batch(view_batch(views=views))
    optional = {"boxes": boxes(2, branches, 4), "local_views": local(), "local_boxes": boxes(2, 5)}
    check_view_batch(view_batch(views=views, **optional))
    check_view_batch(view_batch(views=views, local_views=local()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_accepts_boxes_in_the_precision_of_the_run(dtype: torch.dtype) -> None:
    """Lightning casts a batch, and 0.2 + 0.8 is more than 1 after rounding to bfloat16."""
    check_view_batch(view_batch(boxes=boxes().to(dtype)))


@pytest.mark.parametrize("labels", [None, torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.int64)])
def test_accepts_batches_that_follow_the_contract(labels: torch.Tensor | None) -> None:
    check_view_batch(view_batch(labels=labels, path=["further", "keys"]))
    check_image_batch(image_batch(labels=labels), num_labels=3)


WRONG_IN_BOTH = [
    ({"image_ids": None}, ValueError, r"lacks \['image_ids'\]"),
    ({"image_ids": [4, 9]}, TypeError, "'image_ids' is of type list, not int64"),
    ({"image_ids": torch.zeros(2)}, TypeError, "'image_ids' is Tensor of torch.float32"),
    ({"image_ids": torch.arange(3)}, ValueError, r"'image_ids' has shape \(3,\) for 2 images"),
    ({"image_ids": torch.tensor([4, 4])}, ValueError, "'image_ids' repeats 1 of 2 ids"),
    ({"labels": torch.zeros(2, 3)}, TypeError, "'labels' is Tensor of torch.float32 .*neither bool nor integer"),
    ({"labels": [[1], [0]]}, TypeError, "'labels' is of type list"),
    ({"labels": torch.zeros(2, dtype=torch.int8)}, ValueError, r"'labels' has shape \(2,\) for 2 images"),
    ({"labels": torch.zeros(3, 3, dtype=torch.int8)}, ValueError, r"'labels' has shape \(3, 3\) for 2 images"),
    ({"labels": torch.zeros(2, 0, dtype=torch.int8)}, ValueError, r"'labels' has shape \(2, 0\)"),
    ({"labels": torch.zeros(2, 4, dtype=torch.int8)}, ValueError, "'labels' has 4 columns where L = 3 was expected"),
    ({"labels": torch.full((2, 3), 2)}, ValueError, r"'labels' contains 2\."),
    ({"labels": torch.tensor([[7, 0, 1], [5, -2, -1]])}, ValueError, r"'labels' contains -2 and others\."),
]


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        *WRONG_IN_BOTH,
        ({"views": None}, ValueError, r"has the keys \['image_ids', 'labels'\] and lacks \['views'\]"),
        ({"views": torch.zeros(2, 2, 4, 3, 8, 8)}, TypeError, "'views' is Tensor of torch.float32 .*not uint8"),
        ({"views": torch.zeros(2, 8, 3, 8, 8, dtype=torch.uint8)}, ValueError, r"'views' has shape \(2, 8, 3, 8, 8\)"),
        ({"views": torch.zeros(2, 2, 4, 3, 8, 9, dtype=torch.uint8)}, ValueError, r"shape \(2, 2, 4, 3, 8, 9\)"),
        ({"views": torch.zeros(2, 2, 0, 3, 8, 8, dtype=torch.uint8)}, ValueError, "which is empty"),
        ({"views": torch.zeros(2, 0, 4, 3, 8, 8, dtype=torch.uint8)}, ValueError, "which is empty"),
        ({"boxes": boxes().long()}, TypeError, "'boxes' is Tensor of torch.int64 .*not float32"),
        ({"boxes": [0]}, TypeError, "'boxes' is of type list, not float32"),
        ({"boxes": boxes(2, 3, 4)}, ValueError, r"'boxes' has shape \(2, 3, 4, 4\) where \(2, 2, 4, 4\) was expected"),
        ({"boxes": boxes() - 0.3}, ValueError, "'boxes' has boxes outside 0-1 or without area"),
        ({"boxes": boxes() + 0.3}, ValueError, "'boxes' has boxes outside 0-1"),
        ({"boxes": 0 * boxes()}, ValueError, "'boxes' has boxes outside 0-1 or without area"),
        ({"boxes": boxes() * float("nan")}, ValueError, "'boxes' has boxes outside 0-1"),
        ({"local_boxes": boxes(2, 5)}, ValueError, "'local_boxes' came without 'local_views'"),
        ({"local_views": local().float()}, TypeError, "'local_views' is Tensor of torch.float32 .*not uint8"),
        ({"local_views": [1]}, TypeError, "'local_views' is of type list, not uint8"),
        ({"local_views": local(3)}, ValueError, r"'local_views' has shape \(3, 5, 3, 4, 4\) where 'views' has"),
        ({"local_views": local()[:, :, :2]}, ValueError, r"'local_views' has shape \(2, 5, 2, 4, 4\)"),
        ({"local_views": local()[..., 1:]}, ValueError, r"'local_views' has shape \(2, 5, 3, 4, 3\)"),
        ({"local_views": local()[:, 0]}, ValueError, r"'local_views' has shape \(2, 3, 4, 4\)"),
        ({"local_views": local(2, 0)}, ValueError, r"'local_views' has shape \(2, 0, 3, 4, 4\), which is empty"),
        (
            {"local_views": local(), "local_boxes": boxes(2, 4)},
            ValueError,
            r"'local_boxes' has shape \(2, 4, 4\) where",
        ),
    ],
)
def test_a_wrong_training_batch_is_answered_with_the_contract(
    changes: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=rf"(?s){sentence}.*A training batch is a mapping with.*uint8 \(B, A, K, C, S, S\)"):
        check_view_batch(view_batch(**changes), num_labels=3)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        *WRONG_IN_BOTH,
        ({"image": None}, ValueError, r"lacks \['image'\]"),
        ({"image": torch.zeros(2, 3, 6, 8)}, TypeError, "'image' is Tensor of torch.float32 .*not uint8"),
        ({"image": torch.zeros(2, 6, 8, dtype=torch.uint8)}, ValueError, r"'image' has shape \(2, 6, 8\)"),
        ({"image": torch.zeros(2, 3, 0, 8, dtype=torch.uint8)}, ValueError, "which is empty"),
    ],
)
def test_a_wrong_evaluation_batch_is_answered_with_the_contract(
    changes: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=rf"(?s){sentence}.*An evaluation batch is a mapping with"):
        check_image_batch(image_batch(**changes), num_labels=3)


def test_a_batch_that_is_not_a_mapping_is_answered_with_the_contract() -> None:
    with pytest.raises(TypeError, match=r"a batch of type list was given\. A training batch is a mapping"):
        check_view_batch([torch.zeros(2)])
