"""Nearest neighbours in feature space: multi-label kNN scores, and the similarity of label sets."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_NEIGHBORS = 20
"""k of DINO's evaluation (arXiv 2104.14294, sec. 4.1)."""

TEMPERATURE = 0.07
"""τ of the votes, from Z. Wu et al., arXiv 1805.01978, sec. 3.4."""

BANK_CHUNK = 16384
"""Rows of the bank on the device at a time."""


class Neighbors(NamedTuple):
    """The k nearest rows of each query, nearest first.

    `indices` is (n, k) int64, rows of the bank; `similarities` (n, k) float32, cosines in −1–1.
    """

    indices: Tensor
    similarities: Tensor


def nearest_neighbors(
    queries: Tensor,
    bank: Tensor,
    k: int = NUM_NEIGHBORS,
    *,
    query_ids: Tensor | None = None,
    bank_ids: Tensor | None = None,
    chunk_size: int = 1024,
) -> Neighbors:
    """Find the k rows of the bank with the largest cosine to each query, in float32.

    The bank is read once, in pieces that are moved to the queries' device: it may be on the CPU in float16, or in a
    memory-mapped file; only one piece, its cosines and the (n, k) result are in memory.

    Args:
        queries: (n, D) of any floating type; need not be normalised. A zero row has cosine 0 to everything.
        bank: (M, D) of any floating type, on any device.
        k: 1 … M, or less if ids leave rows out.
        query_ids: (n,) image ids; with `bank_ids`, an image is not its own neighbour.
        bank_ids: (M,) image ids.
        chunk_size: Queries compared at a time.

    Raises:
        ValueError: If widths or ids do not match, a feature is not finite, the bank is empty, k < 1 or the bank has
            fewer than k other images.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> nearest_neighbors(torch.tensor([[3.0, 1.0]]), bank, k=2).indices.tolist()
        [[0, 2]]
    """
    _check(queries, bank, k, query_ids, bank_ids)
    best = queries.new_full((len(queries), 0), 0, dtype=torch.float32)
    indices = torch.zeros_like(best, dtype=torch.int64)
    for start in range(0, len(bank), BANK_CHUNK):
        piece = _normalized(bank[start : start + BANK_CHUNK].to(queries.device), "bank")
        per_piece = [
            _nearest_in_piece(
                _normalized(queries[rows], "query"),
                piece,
                k,
                None if query_ids is None else query_ids[rows],
                None if bank_ids is None else bank_ids[start : start + BANK_CHUNK],
            )
            for rows in (slice(first, first + chunk_size) for first in range(0, len(queries), chunk_size))
        ]
        if not per_piece:
            return Neighbors(indices.new_zeros(0, k), best.new_zeros(0, k))
        candidates = torch.cat([best, torch.cat([values for values, _ in per_piece])], dim=1)
        candidate_indices = torch.cat(
            [indices, torch.cat([piece_indices for _, piece_indices in per_piece]) + start], dim=1
        )
        best, order = candidates.topk(min(k, candidates.shape[1]), dim=1)
        indices = candidate_indices.gather(1, order)
    return Neighbors(indices, best)


def knn_scores(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    k: int = NUM_NEIGHBORS,
    *,
    temperature: float = TEMPERATURE,
    query_ids: Tensor | None = None,
    bank_ids: Tensor | None = None,
    chunk_size: int = 1024,
) -> Tensor:
    """Score each label of a query by the votes of its k nearest images, as Z. Wu et al., arXiv 1805.01978, sec. 3.4.

    A neighbour with cosine s votes with weight exp(s / τ). The paper has one class per image; here every label has its
    own vote: its score is the weight of the neighbours that have the label, divided by the weight of those whose label
    is known (−1 does not vote). If none of the k is known, the score is 0.

    Args:
        queries: (n, D), see `nearest_neighbors`.
        bank: (M, D).
        bank_labels: (M, L), bool or integer: 1 present, 0 absent, −1 unknown.
        k: Neighbours that vote.
        temperature: τ > 0; the smaller it is, the more the nearest one dominates.
        query_ids: (n,) image ids; with `bank_ids`, an image does not vote for itself.
        bank_ids: (M,) image ids.
        chunk_size: Queries at a time.

    Returns:
        (n, L) float32 in 0–1, on the queries' device.

    Raises:
        ValueError: If the labels do not match the bank, τ is not above 0, or as in `nearest_neighbors`.

    Example:
        >>> labels = torch.tensor([[1, 0], [0, 1], [1, 1]])
        >>> bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> knn_scores(torch.tensor([[1.0, 0.0]]), bank, labels, k=1)
        tensor([[1., 0.]])
    """
    if bank_labels.ndim != 2 or len(bank_labels) != len(bank):
        raise ValueError(
            f"labels of shape {tuple(bank_labels.shape)} do not match a bank of {len(bank)} images: pass (M, L)"
        )
    check_temperature(temperature)
    neighbors = nearest_neighbors(queries, bank, k, query_ids=query_ids, bank_ids=bank_ids, chunk_size=chunk_size)
    scores = torch.zeros(len(queries), bank_labels.shape[1], device=queries.device)
    for rows in (slice(first, first + chunk_size) for first in range(0, len(queries), chunk_size)):
        # Dividing all weights by the largest one does not change the scores, and exp cannot overflow.
        weights = ((neighbors.similarities[rows] - neighbors.similarities[rows, :1]) / temperature).exp()
        votes, total = torch.zeros_like(scores[rows]), torch.zeros_like(scores[rows])
        for rank in range(k):  # one neighbour at a time: all k at once may not fit into memory
            labels = bank_labels[neighbors.indices[rows, rank].to(bank_labels.device)].to(queries.device)
            votes.addcmul_(weights[:, rank, None], labels == 1)
            total.addcmul_(weights[:, rank, None], labels >= 0)
        scores[rows] = votes / total.clamp(min=torch.finfo(torch.float32).tiny)
    return scores


def label_jaccard(labels: Tensor, bank_labels: Tensor, indices: Tensor) -> Tensor:
    """Jaccard index of the label sets of each image and its neighbours: shared labels ÷ labels of either.

    Labels that are unknown for one of the two are left out. Two images without labels have no index.

    Args:
        labels: (n, L) of the queries, bool or integer: 1 present, 0 absent, −1 unknown.
        bank_labels: (M, L).
        indices: (n, k) from `nearest_neighbors`.

    Returns:
        (n, k) float32 in 0–1, NaN for 0/0. The mean over images is `.nanmean()`.

    Raises:
        ValueError: If the labels have different widths, or there is not one row of labels per row of indices.

    Example:
        >>> label_jaccard(torch.tensor([[1, 1, 0]]), torch.tensor([[1, 0, 0], [1, 1, 1]]), torch.tensor([[0, 1]]))
        tensor([[0.5000, 0.6667]])
    """
    if labels.shape[1:] != bank_labels.shape[1:] or len(labels) != len(indices):
        raise ValueError(
            f"labels {tuple(labels.shape)}, labels of the bank {tuple(bank_labels.shape)} and indices "
            f"{tuple(indices.shape)} do not match: pass (n, L), (M, L) and (n, k)"
        )
    result = torch.empty(indices.shape)
    for rank in range(indices.shape[1]):  # one neighbour at a time, so that memory is limited to (n, L)
        other = bank_labels[indices[:, rank].to(bank_labels.device)].to(labels.device)
        known = (labels >= 0) & (other >= 0)
        own, theirs = (labels == 1) & known, (other == 1) & known
        result[:, rank] = ((own & theirs).sum(1) / (own | theirs).sum(1)).cpu()
    return result


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not above 0.

    Raises:
        ValueError: If it is 0, negative or NaN.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} was given: pass a number above 0, such as {TEMPERATURE}")


def _nearest_in_piece(
    queries: Tensor, piece: Tensor, k: int, query_ids: Tensor | None, piece_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    cosines = queries @ piece.T
    if query_ids is not None and piece_ids is not None:
        own = query_ids.to(cosines.device)[:, None] == piece_ids.to(cosines.device)
        cosines.masked_fill_(own, -torch.inf)
    values, piece_indices = cosines.topk(min(k, len(piece)), dim=1)
    return values, piece_indices


def _normalized(features: Tensor, name: str) -> Tensor:
    if not features.isfinite().all():
        raise ValueError(f"{name} features contain NaN or infinity: check the backbone's weights and its input images")
    return F.normalize(features.float(), dim=1)


def _check(queries: Tensor, bank: Tensor, k: int, query_ids: Tensor | None, bank_ids: Tensor | None) -> None:
    if queries.ndim != 2 or bank.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise ValueError(
            f"queries of shape {tuple(queries.shape)} and a bank of shape {tuple(bank.shape)} do not match: "
            "pass (n, D) and (M, D), features of one backbone and one pooling"
        )
    for name, ids, features in (("query_ids", query_ids, queries), ("bank_ids", bank_ids, bank)):
        if ids is not None and ids.shape != features.shape[:1]:
            raise ValueError(
                f"{name} of shape {tuple(ids.shape)} were given for {len(features)} images: pass one id per image"
            )
    if (query_ids is None) != (bank_ids is None):
        raise ValueError(
            "only one of query_ids and bank_ids was given: pass both, to exclude an image from its own neighbours"
        )
    left_out = 0
    if query_ids is not None and bank_ids is not None:
        shared = bank_ids.cpu()[torch.isin(bank_ids.cpu(), query_ids.cpu())]
        left_out = int(shared.unique(return_counts=True)[1].max()) if len(shared) else 0  # type: ignore[no-untyped-call]
    most = len(bank) - left_out
    if most < 1:
        raise ValueError("the bank has no image other than the query: check its split")
    if not 1 <= k <= most:
        raise ValueError(
            f"k={k} was given, but the bank has {most} images in addition to the query: pass k from 1 to {most}"
        )
