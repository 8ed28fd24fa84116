"""Nearest neighbours: a slow loop, chunks, float16, self-exclusion, unknown labels, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mlssl.evaluation import neighbors as module
from mlssl.evaluation.neighbors import knn_scores, label_jaccard, nearest_neighbors


@pytest.fixture
def data() -> tuple[Tensor, Tensor, Tensor]:
    """Queries (13, 6), bank (50, 6) and its labels (50, 4) with unknown ones."""
    generator = torch.Generator().manual_seed(0)
    queries, bank = torch.randn(13, 6, generator=generator), 3 * torch.randn(50, 6, generator=generator)
    return queries, bank, torch.randint(-1, 2, (50, 4), generator=generator, dtype=torch.int8)


def cosine(left: Tensor, right: Tensor) -> float:
    return (left @ right / left.norm() / right.norm()).item()


def slow_neighbors(queries: Tensor, bank: Tensor, k: int) -> list[list[int]]:
    return [sorted(range(len(bank)), key=lambda line: -cosine(query, bank[line]))[:k] for query in queries]


def test_neighbours_equal_those_of_a_slow_loop(data: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, bank, _ = data
    found = nearest_neighbors(queries, bank, 7)
    assert found.indices.tolist() == slow_neighbors(queries, bank, 7)
    for row, query in enumerate(queries):
        expected = [cosine(query, bank[line]) for line in found.indices[row]]
        assert found.similarities[row].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("bank_chunk", [1, 3, 50, 1000])
@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_size_of_the_pieces_does_not_matter(
    bank_chunk: int, chunk_size: int, data: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, bank, labels = data
    whole = nearest_neighbors(queries, bank, 7)
    scores = knn_scores(queries, bank, labels, 7)
    monkeypatch.setattr(module, "BANK_CHUNK", bank_chunk)
    pieces = nearest_neighbors(queries, bank, 7, chunk_size=chunk_size)
    assert torch.equal(pieces.indices, whole.indices)
    torch.testing.assert_close(pieces.similarities, whole.similarities)
    torch.testing.assert_close(knn_scores(queries, bank, labels, 7, chunk_size=chunk_size), scores)


def test_scale_of_features_does_not_matter_and_a_half_bank_is_close(data: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, bank, labels = data
    scores = knn_scores(queries, bank, labels, 5)
    torch.testing.assert_close(knn_scores(9 * queries, bank / 7, labels, 5), scores)
    halved = knn_scores(queries, bank.half(), labels, 5)
    assert halved.dtype == torch.float32
    torch.testing.assert_close(halved, scores, rtol=0, atol=0.02)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_votes_equal_those_of_a_slow_loop(temperature: float, data: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, bank, labels = data
    scores = knn_scores(queries, bank, labels, 7, temperature=temperature)
    for row, lines in enumerate(slow_neighbors(queries, bank, 7)):
        for label in range(4):
            voters = [line for line in lines if labels[line, label] >= 0]
            weights = [math.exp(cosine(queries[row], bank[line]) / temperature) for line in voters]
            yes = sum(w for w, line in zip(weights, voters, strict=True) if labels[line, label] == 1)
            assert scores[row, label].item() == pytest.approx(yes / sum(weights) if voters else 0, abs=1e-5)


def test_a_label_unknown_to_all_neighbours_has_score_0(data: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, bank, labels = data
    labels[:, 2] = -1
    assert (knn_scores(queries, bank, labels, 5)[:, 2] == 0).all()


def test_bool_labels_vote_like_integers(data: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, bank, labels = data
    present = labels == 1
    assert torch.equal(knn_scores(queries, bank, present, 5), knn_scores(queries, bank, present.long(), 5))


def test_at_a_tiny_temperature_the_nearest_decides_without_overflow(data: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, bank, labels = data
    known = labels.clamp(min=0)
    nearest = nearest_neighbors(queries, bank, 1).indices[:, 0]
    assert torch.equal(knn_scores(queries, bank, known, 5, temperature=1e-6), known[nearest].float())


def test_an_image_is_not_its_own_neighbour(data: tuple[Tensor, Tensor, Tensor]) -> None:
    _, bank, labels = data
    ids = torch.arange(50) + 100
    with_itself = nearest_neighbors(bank, bank, 4)
    without = nearest_neighbors(bank, bank, 3, query_ids=ids, bank_ids=ids)
    assert with_itself.indices[:, 0].tolist() == list(range(50))
    assert torch.equal(without.indices, with_itself.indices[:, 1:])
    ids_of_others = ids + 1000
    same = knn_scores(bank, bank, labels, 4, query_ids=ids_of_others, bank_ids=ids)
    assert torch.equal(same, knn_scores(bank, bank, labels, 4))


def test_no_query_and_a_zero_feature_are_handled() -> None:
    bank = torch.eye(3)
    assert nearest_neighbors(torch.zeros(0, 3), bank, 2).indices.shape == (0, 2)
    assert knn_scores(torch.zeros(0, 3), bank, torch.eye(3).int(), 2).shape == (0, 3)
    assert nearest_neighbors(torch.zeros(1, 3), bank, 2).similarities.tolist() == [[0, 0]]


def test_jaccard_equals_that_of_a_slow_loop(data: tuple[Tensor, Tensor, Tensor]) -> None:
    generator = torch.Generator().manual_seed(2)
    bank_labels = data[2]
    labels = torch.randint(-1, 2, (13, 4), generator=generator)
    indices = torch.randint(0, 50, (13, 5), generator=generator)
    result = label_jaccard(labels, bank_labels, indices)
    undefined = 0
    for row in range(13):
        for neighbour in range(5):
            other = bank_labels[indices[row, neighbour]]
            known = [label for label in range(4) if labels[row, label] >= 0 and other[label] >= 0]
            own = {label for label in known if labels[row, label] == 1}
            theirs = {label for label in known if other[label] == 1}
            expected = len(own & theirs) / len(own | theirs) if own | theirs else math.nan
            undefined += math.isnan(expected)
            assert result[row, neighbour].item() == pytest.approx(expected, nan_ok=True)
    assert 0 < undefined < 65


def test_invalid_arguments_of_neighbours_are_refused(data: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, bank, labels = data
    ids = torch.arange(50)
    with pytest.raises(ValueError, match="k=51 was given, but the bank has 50 images"):
        nearest_neighbors(queries, bank, 51)
    with pytest.raises(ValueError, match=r"k=50 .* has 49 images in addition to the query: pass k from 1 to 49"):
        nearest_neighbors(bank, bank, 50, query_ids=ids, bank_ids=ids)
    with pytest.raises(ValueError, match="k=0 was given, but the bank has"):
        nearest_neighbors(queries, bank, 0)
    with pytest.raises(ValueError, match="the bank has no image other than the query"):
        nearest_neighbors(queries, bank[:0], 1)
    with pytest.raises(ValueError, match=r"queries of shape \(13, 6\) and a bank of shape \(50, 5\) do not match"):
        nearest_neighbors(queries, bank[:, :5])
    with pytest.raises(ValueError, match=r"bank_ids of shape \(49,\) were given for 50 images"):
        nearest_neighbors(queries, bank, 3, query_ids=torch.arange(13), bank_ids=ids[:49])
    with pytest.raises(ValueError, match="only one of query_ids and bank_ids"):
        nearest_neighbors(queries, bank, 3, bank_ids=ids)
    with pytest.raises(ValueError, match="query features contain NaN"):
        nearest_neighbors(queries / 0, bank, 3)
    with pytest.raises(ValueError, match="bank features contain NaN"):
        nearest_neighbors(queries, bank * torch.inf, 3)
    with pytest.raises(ValueError, match=r"labels of shape \(49, 4\) do not match a bank of 50 images"):
        knn_scores(queries, bank, labels[:49], 3)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"temperature={temperature} was given"):
            knn_scores(queries, bank, labels, 3, temperature=temperature)
    with pytest.raises(ValueError, match="do not match: pass"):
        label_jaccard(labels[:, :3], labels, torch.zeros(50, 2, dtype=torch.int64))
