"""Communication between processes: one process, and two or four that must equal one with the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _gloo import Processes
from PIL import Image
from torch import Tensor

from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.decoding import BadImageError
from mlssl.distributed import gather, gather_objects, gather_with_gradient, rank, sum_over_devices, world_size
from mlssl.losses import image_aware_contrastive_loss

FORMS: dict[str, dict[str, Any]] = {
    "log of sum": {"form": "log_of_sum"},
    "mean of logs": {"form": "mean_of_logs"},
    "gated": {"form": "mean_of_logs", "positives": "gated(0.3)"},
    "in chunks": {"form": "log_of_sum", "chunk_size": 2},
}
WIDTH, ROWS = 5, 12
IDS = torch.tensor([0, 1, 2, 3, 4, 5, 6, 6, 6, 0, 6, 7])  # the last half has nearly all positives, two anchors none


def features(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3


def own_part(rows: Tensor) -> Tensor:
    size = len(rows) // world_size()
    return rows[rank() * size : (rank() + 1) * size]


def test_one_process_changes_nothing() -> None:
    rows = torch.ones(3, 2, requires_grad=True)
    assert (rank(), world_size()) == (0, 1)
    assert gather_with_gradient(rows) is rows
    assert gather(rows) is rows
    assert sum_over_devices(rows) is rows
    assert gather_objects("word") == ["word"]


def gathered() -> dict[str, Any]:
    rows = own_part(features())
    own = rows.clone().requires_grad_()
    transposed = own_part(features().reshape(ROWS, WIDTH, 1).expand(ROWS, WIDTH, 2)).transpose(1, 2)
    value = torch.tensor(float(rank() + 1), requires_grad=True)
    total = sum_over_devices(value)
    with torch.no_grad():
        without = gather_with_gradient(own)
    return {
        "place": (rank(), world_size()),
        "rows": gather(own).detach(),
        "rows have a gradient": gather(own).requires_grad,
        "ids": gather(own_part(IDS)),
        "halves": gather(rows.bfloat16()),
        "transposed": gather(transposed),
        "with gradient": gather_with_gradient(own).detach(),
        "with gradient, where none is taken": without.requires_grad,
        "sum": total,
        "summed": value.detach(),
    }


@pytest.mark.parametrize("number", [2, 4])
def test_rows_of_all_processes_are_stacked_in_order_of_rank(number: int, processes: Processes) -> None:
    for index, result in enumerate(processes.run(gathered, processes=number)):
        assert result["place"] == (index, number)
        assert torch.equal(result["rows"], features())
        assert not result["rows have a gradient"]
        assert torch.equal(result["ids"], IDS)
        assert torch.equal(result["halves"], features().bfloat16())
        assert torch.equal(result["transposed"], features()[:, None].expand(ROWS, 2, WIDTH))
        assert torch.equal(result["with gradient"], features())
        assert not result["with gradient, where none is taken"]
        assert result["sum"] == number * (number + 1) / 2
        assert not result["sum"].requires_grad
        assert result["summed"] == index + 1


def gradient_of_weighted_sum(weights: Tensor) -> Tensor:
    """Each process weights every row differently: process r weights row i by (r + 1) · weights[i]."""
    own = own_part(features()).clone().requires_grad_()
    ((rank() + 1) * weights[:, None] * gather_with_gradient(own) ** 2).sum().backward()
    assert own.grad is not None
    return own.grad


@pytest.mark.parametrize("number", [2, 4])
def test_the_gradient_of_a_row_is_summed_over_processes(number: int, processes: Processes) -> None:
    weights = torch.arange(1.0, ROWS + 1, dtype=torch.float64)
    gradient = torch.cat(processes.run(gradient_of_weighted_sum, weights, processes=number))
    torch.testing.assert_close(gradient, number * (number + 1) / 2 * weights[:, None] * 2 * features())


def loss_and_gradient(settings: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """docs/method.md's mean over all anchors: sums and counts are added over devices, and no means are averaged."""
    own, ids = own_part(features()).clone().requires_grad_(), own_part(IDS)
    keys, key_ids = gather_with_gradient(own), gather(ids)
    self_index = rank() * len(own) + torch.arange(len(own))
    total, number = image_aware_contrastive_loss(
        own, ids, keys, key_ids, self_index=self_index, reduction="sum_and_count", **settings
    )
    share = total / sum_over_devices(number)
    share.backward()
    assert own.grad is not None
    return share.detach(), own.grad, number


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("settings", FORMS.values(), ids=FORMS)
def test_losses_and_gradients_of_processes_sum_to_those_of_one_process(
    settings: dict[str, Any], number: int, processes: Processes
) -> None:
    whole = features().requires_grad_()
    loss = image_aware_contrastive_loss(whole, IDS, **settings)
    loss.backward()
    shares, gradients, numbers = zip(*processes.run(loss_and_gradient, settings, processes=number), strict=True)
    assert len({int(count) for count in numbers}) > 1, "every process has as many positives: the test shows nothing"
    torch.testing.assert_close(sum(shares), loss.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(torch.cat(gradients), whole.grad, rtol=1e-9, atol=1e-12)


def fails_on(index: int) -> None:
    dist.barrier()  # so that no process still waits for the failing one
    if rank() == index:
        raise RuntimeError("one process alone fails")


def own_words() -> list[dict[str, int]]:
    return gather_objects({"rank": rank()})


def test_objects_of_all_processes_are_gathered_in_rank_order(processes: Processes) -> None:
    assert processes.run(own_words) == [[{"rank": 0}, {"rank": 1}]] * 2


def found_on_two_devices(folder: str, settings: dict[str, Any]) -> str | dict[str, list[str]]:
    data = MultiLabelDataModule("folder", folder, num_workers=0, check_images=True, **settings)
    try:
        data.setup()
    except BadImageError as error:
        return str(error)
    return {name: [path.name for path in paths] for name, paths in data.skipped_images.items()}


def test_each_process_checks_its_share_and_all_get_the_results(processes: Processes, tmp_path: Path) -> None:
    for index in range(5):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index}.png")
    (tmp_path / "1.png").write_text("no image")
    (tmp_path / "4.png").write_text("no image")
    first, second = processes.run(found_on_two_devices, str(tmp_path), {})
    assert first == second
    assert "2 of 5 train images cannot be decoded" in first
    skipped = processes.run(found_on_two_devices, str(tmp_path), {"on_bad_image": "skip"})
    assert skipped == [{"train": ["1.png", "4.png"]}] * 2


def test_failure_of_a_process_reaches_the_test(processes: Processes) -> None:
    with pytest.raises(RuntimeError, match="one process alone fails"):
        processes.run(fails_on, 1)
    assert len(processes.run(rank)) == 2
