"""The size of the views changes between epochs, also in a resumed run and with persistent workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from mlssl.callbacks import ViewSize

Make = Callable[..., Any]


class Sizes(L.Callback):
    """Record the side of the views of each epoch."""

    def __init__(self) -> None:
        self.seen: dict[int, set[int]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.setdefault(trainer.current_epoch, set()).add(batch["views"].shape[-1])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on fewer than three cores
@pytest.mark.parametrize("workers", [0, 2])
def test_each_epoch_has_its_size(workers: int, make_model: Make, make_data: Make, make_trainer: Make) -> None:
    sizes = Sizes()
    data = make_data(num_workers=workers)
    make_trainer(ViewSize({1: 24, 3: 32}), sizes, max_epochs=4).fit(make_model(), data)
    assert sizes.seen == {0: {16}, 1: {24}, 2: {24}, 3: {32}}


def test_a_resumed_run_continues_with_the_size_of_its_epoch(
    make_model: Make, make_data: Make, make_trainer: Make, tmp_path: Path
) -> None:
    whole = make_model()
    make_trainer(ViewSize({1: 24}), max_epochs=2).fit(whole, make_data())

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 6:  # in the middle of epoch 1
                trainer.save_checkpoint(tmp_path / "middle.ckpt")
                trainer.should_stop = True

    make_trainer(ViewSize({1: 24}), Stop(), max_epochs=2).fit(make_model(), make_data())
    resumed, sizes = make_model(dropout=0.0), Sizes()
    make_trainer(ViewSize({1: 24}), sizes, max_epochs=2).fit(
        resumed, make_data(), ckpt_path=tmp_path / "middle.ckpt", weights_only=True
    )
    assert sizes.seen == {1: {24}}


@pytest.mark.parametrize("sizes", [{}, None, [24], {-1: 24}])
def test_sizes_that_are_not_a_schedule_are_refused(sizes: Any) -> None:
    with pytest.raises(ValueError, match="was given: pass a mapping from epochs, counted from 0, to sides in pixels"):
        ViewSize(sizes)


def test_a_branch_that_is_not_a_recipe_is_refused_before_the_first_step(
    make_model: Make, make_data: Make, make_trainer: Make
) -> None:
    def corner(block: Any, generator: Any) -> Any:
        return block[:8, :8].repeat(2, 0).repeat(2, 1).transpose(2, 0, 1)

    with pytest.raises(ValueError, match="Recipe"):
        make_trainer(ViewSize({0: 24})).fit(make_model(), make_data(branches=[corner, corner]))


def test_a_size_not_supported_by_views_or_backbone_is_refused(
    make_model: Make, make_data: Make, make_trainer: Make
) -> None:
    with pytest.raises(ValueError, match="size=4"):
        make_trainer(ViewSize({1: 4})).fit(make_model(), make_data())
    with pytest.raises(ValueError, match="takes no images of 24 × 24 pixels"):
        make_trainer(ViewSize({1: 24})).fit(make_model(backbone="vit_tiny_patch16_224"), make_data())


def test_a_loader_of_another_kind_is_refused(make_model: Make, make_trainer: Make) -> None:
    items = [{"views": torch.zeros(2, 2, 3, 16, 16, dtype=torch.uint8), "image_ids": index} for index in range(8)]
    with pytest.raises(ValueError, match=r"needs the train loader of a MultiLabelDataModule, but it is a DataLoader"):
        make_trainer(ViewSize({1: 24})).fit(make_model(views_per_step=8), DataLoader(items, batch_size=4))
