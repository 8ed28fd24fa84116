"""The pictures of views before epoch 0: their files, the loggers, and when there are none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing import event_accumulator

from mlssl.callbacks import ViewGridLogger
from mlssl.data.decoding import decode_rgb
from mlssl.data.readers.corel5k import read_corel5k
from mlssl.drawing.views import draw_view_grid

Make = Callable[..., Any]


def pictures(trainer: L.Trainer) -> dict[str, np.ndarray]:
    folder = Path(trainer.default_root_dir) / "views"
    return {path.name: decode_rgb(path) for path in sorted(folder.iterdir())} if folder.exists() else {}


def test_pictures_of_images_across_the_training_set_are_drawn_before_epoch_0(
    make_model: Make, make_data: Make, make_trainer: Make
) -> None:
    seen = []

    class Look(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.append(set(pictures(trainer)))

    make_trainer(ViewGridLogger(3), Look()).fit(make_model(), make_data())
    assert seen == [{"image-0.png", "image-8.png", "image-17.png"}] * 2


def test_a_picture_shows_the_image_its_blocks_and_its_views(
    make_model: Make, make_data: Make, make_trainer: Make
) -> None:
    data = make_data(rows=2, cols=3)
    trainer = make_trainer(ViewGridLogger(1, seed=4))
    trainer.fit(make_model(), data)
    image = data.train_records.image(0)
    views = data.views(image, np.random.default_rng([4, 0]))
    expected = draw_view_grid(image, views, data.views.boxes(32, 32), title=data.train_records.path(0).name)
    np.testing.assert_array_equal(pictures(trainer)["image-0.png"], expected)


def test_a_picture_shows_custom_branches_and_local_views(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    data = make_data(branches="overhead", local_views={"count": 3, "size": 16})
    data.setup()
    trainer = make_trainer(ViewGridLogger(1, seed=4))
    trainer.datamodule = data
    trainer.callbacks[0].on_train_start(trainer, make_model())
    image = data.train_records.image(0)
    made = data.views.arrays(image, np.random.default_rng([4, 0]))
    title = data.train_records.path(0).name
    expected = draw_view_grid(
        image, made["views"], data.views.boxes(32, 32), title=title, local_views=made["local_views"]
    )
    np.testing.assert_array_equal(pictures(trainer)["image-0.png"], expected)


def test_there_are_at_most_as_many_pictures_as_images(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    trainer = make_trainer(ViewGridLogger(100), max_epochs=1)
    trainer.fit(make_model(), make_data())
    assert len(pictures(trainer)) == 18


def test_real_images_are_drawn(corel5k: Path, make_model: Make, make_data: Make, make_trainer: Make) -> None:
    photographs = read_corel5k(corel5k, "train").subset(range(8))
    trainer = make_trainer(ViewGridLogger(2), max_epochs=1)
    trainer.fit(make_model(), make_data(train=photographs, val=None))
    assert len(pictures(trainer)) == 2


def test_a_resumed_run_does_not_draw_again(make_model: Make, make_data: Make, make_trainer: Make) -> None:
    first = make_trainer(max_epochs=1)
    first.fit(make_model(), make_data())
    first.save_checkpoint(Path(first.default_root_dir) / "one.ckpt")
    second = make_trainer(ViewGridLogger())
    second.fit(make_model(), make_data(), ckpt_path=Path(first.default_root_dir) / "one.ckpt")
    assert second.current_epoch == 2
    assert pictures(second) == {}


def test_without_such_a_datamodule_one_line_says_so(
    make_model: Make, make_data: Make, make_trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(ViewGridLogger())
    with caplog.at_level(logging.INFO):
        trainer.fit(make_model(), make_data().train_dataloader())
    lines = [line for line in caplog.messages if line.startswith("ViewGridLogger")]
    assert lines == ["ViewGridLogger: nothing is drawn: the run has no datamodule with train_records and views."]
    assert pictures(trainer) == {}


def test_tensorboard_gets_the_pictures(make_model: Make, make_data: Make, make_trainer: Make, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer = make_trainer(ViewGridLogger(2), max_epochs=1, logger=[logger, CSVLogger(tmp_path / "csv")])
    trainer.fit(make_model(), make_data())
    logger.finalize("success")
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["images"] == ["views/image-0", "views/image-17"]
    (event,) = events.Images("views/image-17")
    assert event.step == 0
    assert (event.height, event.width) == pictures(trainer)["image-17.png"].shape[:2]


@pytest.mark.slow
def test_wandb_gets_the_pictures(
    make_model: Make, make_data: Make, make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    trainer = make_trainer(ViewGridLogger(2), max_epochs=1, logger=logger)
    trainer.fit(make_model(), make_data())
    logger.experiment.finish()
    (folder,) = tmp_path.glob("wandb/offline-run-*/files/media/images/views")
    sent = [decode_rgb(path) for path in sorted(folder.iterdir())]
    assert len(sent) == 2
    for one, other in zip(sent, pictures(trainer).values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_fewer_than_one_image_is_refused() -> None:
    assert ViewGridLogger(1).num_images == 1
    with pytest.raises(ValueError, match="num_images=0 was given: pass at least 1, or leave ViewGridLogger out"):
        ViewGridLogger(0)
