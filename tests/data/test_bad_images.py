"""Images that cannot be decoded stop a run, or are skipped, counted and named; other images do not change."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from mlssl.cli import main
from mlssl.data.bad_images import BadImages, find_bad_images
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.datasets import ViewDataset
from mlssl.data.decoding import BadImageError
from mlssl.data.readers.folder import read_folder
from mlssl.data.records import Records
from mlssl.runs import RUN_FOLDER_VARIABLE
from mlssl.views.blocks import BlockViews

BROKEN = {"03.jpg": "cut off", "07.jpg": "no image"}
NUM = 12


def fill(folder: Path, broken: bool) -> Path:
    folder.mkdir()
    for index in range(NUM):
        path = folder / f"{index:02d}.jpg"
        pixels = np.random.default_rng(index).integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((64, 48)).save(path)
        if broken and path.name in BROKEN:
            path.write_bytes(path.read_bytes()[:400] if BROKEN[path.name] == "cut off" else b"no image")
    return folder


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return fill(tmp_path / "whole", broken=False)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    return fill(tmp_path / "broken", broken=True)


def epochs(data: MultiLabelDataModule) -> list[list[dict[int, bytes]]]:
    """{image id: views} of each batch of two epochs."""
    loader = data.train_dataloader()
    seen = []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        seen.append(
            [
                {
                    int(one): views.numpy().tobytes()
                    for one, views in zip(batch["image_ids"], batch["views"], strict=True)
                }
                for batch in loader
            ]
        )
    return seen


def data_of(folder: Path, **settings: Any) -> MultiLabelDataModule:
    return MultiLabelDataModule(
        "folder", folder, **{"batch_size": 4, "size": 16, "num_workers": 0, "val_split": "", **settings}
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_by_default_the_first_one_stops_the_run_and_is_named(broken: Path, workers: int) -> None:
    with pytest.raises(BadImageError, match=r"cannot decode '.*0[37]\.jpg' as an image .*: replace the file"):
        list(data_of(broken, num_workers=workers).train_dataloader())


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_skipped_ones_change_nothing_for_the_others(whole: Path, broken: Path, workers: int) -> None:
    expected = epochs(data_of(whole))
    data = data_of(broken, num_workers=workers, on_bad_image="skip")
    seen = epochs(data)
    for batches, without in zip(seen, expected, strict=True):
        for batch, full in zip(batches, without, strict=True):
            assert len(batch) == 4  # a step keeps its size, and no image is in it twice
            assert not {3, 7} & batch.keys()
            kept = full.keys() - {3, 7}
            assert all(batch[one] == full[one] for one in kept)
            assert len(batch.keys() - full.keys()) == len(full.keys() & {3, 7})
    assert {path.name for path in data.skipped_images["train"]} == BROKEN.keys()
    assert seen == epochs(data_of(broken, on_bad_image="skip"))


def test_a_substitute_has_its_own_random_stream(broken: Path) -> None:
    dataset = ViewDataset(read_folder(broken), BlockViews(size=16), bad=BadImages(NUM))
    (substitute,) = dataset.__getitems__([(0, 3)])
    assert substitute["image_ids"] == 4
    assert not torch.equal(substitute["views"], dataset[0, 4]["views"])
    same = dataset.__getitems__([(0, 3)])[0]
    assert torch.equal(substitute["views"], same["views"])


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_them_out(broken: Path, workers: int) -> None:
    data = data_of(broken, on_bad_image="skip", num_workers=workers, batch_size=2)
    loader = data.image_dataloader("train")
    ids = torch.cat([batch["image_ids"] for batch in loader]).tolist()
    assert ids == [one for one in range(NUM) if one not in (3, 7)]
    assert loader.dataset.image_ids() == ids  # type: ignore[attr-defined]


def test_a_batch_that_lacks_all_its_images_is_left_out(broken: Path) -> None:
    data = data_of(broken, on_bad_image="skip", batch_size=1)
    assert len([*data.image_dataloader("train")]) == NUM - 2


def test_on_several_devices_the_number_of_batches_stays(
    broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlssl.data.loader.world_size", lambda: 2)
    data = data_of(broken, on_bad_image="skip", batch_size=1)
    ids = [batch["image_ids"].item() for batch in data.image_dataloader("train")]
    assert ids == [{3: 2, 7: 6}.get(one, one) for one in range(NUM)]
    (tmp_path / "none").mkdir()
    for index in range(3):
        (tmp_path / "none" / f"{index}.jpg").write_text("no image")
    with pytest.raises(BadImageError, match=r"None of the 2 batches of whole images of rank 0 .* use fewer devices"):
        list(data_of(tmp_path / "none", on_bad_image="skip", batch_size=2).image_dataloader("train"))


def test_the_run_stops_if_no_image_can_be_decoded(tmp_path: Path) -> None:
    for index in range(5):
        (tmp_path / f"{index}.jpg").write_text("no image")
    with pytest.raises(BadImageError, match=r"0.jpg cannot be decoded, and none of 4 other images can replace it"):
        list(ViewDataset(read_folder(tmp_path), BlockViews(size=16), bad=BadImages(5)).__getitems__([0]))
    with pytest.raises(BadImageError, match="cannot be decoded, and none of 3 other images can replace it"):
        list(data_of(tmp_path, on_bad_image="skip", batch_size=2).train_dataloader())


class Looker(L.LightningModule):
    """Takes batches and learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer() -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(max_epochs=2, accelerator="cpu", enable_model_summary=False, **quiet)


@pytest.mark.parametrize("workers", [0, 2])
def test_they_are_counted_and_named_at_the_end(broken: Path, workers: int) -> None:
    data = data_of(broken, on_bad_image="skip", num_workers=workers)
    with pytest.warns(UserWarning, match=r"(?s)2 images could not be decoded and were skipped:.*03.jpg.*07.jpg"):
        trainer().fit(Looker(), data)


def test_they_are_named_at_an_early_end_too(broken: Path) -> None:
    class Failing(Looker):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx == 2:
                raise RuntimeError("enough")
            return self.weight.sum()

    with (
        pytest.warns(UserWarning, match="2 images could not be decoded and were skipped"),
        pytest.raises(RuntimeError, match="enough"),
    ):
        trainer().fit(Failing(), data_of(broken, on_bad_image="skip"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_check_before_training_finds_all_and_shows_progress(
    broken: Path, workers: int, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    found = find_bad_images(read_folder(broken), num_workers=workers, name="train")
    assert list(found) == [3, 7]
    assert all("cannot decode" in reason for reason in found.values())
    shown = capsys.readouterr().err
    assert "checking train: 100%" in shown
    assert "image/s" in shown
    assert list(find_bad_images(read_folder(broken), [1, 3])) == [3]


def test_a_check_before_training_stops_or_skips(broken: Path) -> None:
    with pytest.raises(BadImageError, match=r"2 of 12 train images cannot be decoded: replace them.*03.jpg.*07.jpg"):
        data_of(broken, check_images=True).setup()
    data = data_of(broken, check_images=True, on_bad_image="skip")
    data.setup()
    assert [path.name for path in data.skipped_images["train"]] == ["03.jpg", "07.jpg"]


def test_files_of_custom_records_are_checked_before_training(whole: Path) -> None:
    records = Records(["00.jpg", "none.jpg"], root=whole)
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images do not exist, first .*none.jpg: correct the paths"):
        MultiLabelDataModule(train=records, batch_size=2, size=16).setup()


def test_values_other_than_stop_and_skip_are_refused() -> None:
    with pytest.raises(ValueError, match="on_bad_image='drop' was given: pass 'stop' or 'skip'"):
        MultiLabelDataModule(on_bad_image="drop")  # type: ignore[arg-type]


def test_the_command_checks_first_and_lists_all(broken: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (RUN_FOLDER_VARIABLE, "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    words = ["fit", "--data.dataset", "folder", "--data.root", str(broken), "--check-images", "--data.batch_size", "4"]
    small = ["--model.backbone", "test_resnet", "--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    small += ["--trainer.max_epochs", "1"]
    assert main([*words, *small]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("mlssl: error: 2 of 12 train images cannot be decoded")
    assert all(name in line for name in BROKEN)
    assert not list(Path("runs").glob("*"))
