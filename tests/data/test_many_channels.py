"""Images of 1 to 13 channels, from a custom reader to the exported backbone; and uninformative labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import tifffile
import timm
import torch
from PIL import Image

from mlssl.callbacks import BackboneExport, OnlineLinearProbe, ViewGridLogger
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.decoding import decode_rgb
from mlssl.data.readers.folder import read_folder
from mlssl.data.records import Records
from mlssl.drawing.views import draw_view_grid
from mlssl.module import MultiLabelSSLModule
from mlssl.views.grid import Box


def read_bands(path: Path) -> np.ndarray:
    """A custom reader: 16-bit reflectances with white level 10,000."""
    bands = tifffile.imread(path) if path.suffix == ".tif" else np.load(path)
    bands = np.atleast_3d(bands)  # as a TIFF of one band is read flat
    return (bands.clip(0, 10_000) * (255 / 10_000)).astype(np.uint8)


def records(folder: Path, channels: int, count: int = 8, suffix: str = ".npy") -> Records:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        bands = np.random.default_rng(index).integers(0, 12_000, (40, 48, channels)).astype(np.uint16)
        if suffix == ".tif":
            layout = {"planarconfig": "contig"} if channels > 1 else {}
            tifffile.imwrite(folder / f"{index}.tif", bands, photometric="minisblack", **layout)
        else:
            np.save(folder / f"{index}.npy", bands)
    found = read_folder(folder, [suffix], decode=read_bands, channels=channels)
    names = [found.path(index).name for index in range(count)]
    labels = [[index % 2, 1] for index in range(count)]
    return Records(names, labels, ["roof", "road"], root=folder, decode=read_bands, channels=channels)


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize(("channels", "suffix"), [(1, ".npy"), (2, ".npy"), (4, ".npy"), (13, ".npy"), (13, ".tif")])
def test_any_number_of_channels_trains_is_probed_drawn_and_exported(tmp_path: Path, channels: int, suffix: str) -> None:
    data = MultiLabelDataModule(
        train=records(tmp_path / "train", channels, suffix=suffix),
        val=records(tmp_path / "val", channels, suffix=suffix),
        batch_size=4,
        size=32,
        num_workers=0,
    )
    model = MultiLabelSSLModule(
        "test_resnet", projection_dim=16, predictor_dim=8, backbone_kwargs={"in_chans": channels}
    )
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_model_summary=False,
        callbacks=[OnlineLinearProbe(), ViewGridLogger(2), BackboneExport()],
        **quiet,
    )
    trainer.fit(model, data)
    assert "probe/mAP" in trainer.callback_metrics
    assert model.pixel_mean.shape == (1, channels, 1, 1)
    path = tmp_path / "exports" / "backbone.safetensors"
    loaded = timm.create_model("test_resnet", num_classes=0, checkpoint_path=str(path), in_chans=channels)
    assert loaded(torch.rand(1, channels, 64, 64)).shape[0] == 1
    pictures = [decode_rgb(one) for one in (tmp_path / "views").iterdir()]
    assert len(pictures) == 2


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_a_tiff_equals_an_array(tmp_path: Path, channels: int) -> None:
    one, other = (records(tmp_path / suffix, channels, 3, suffix) for suffix in (".npy", ".tif"))
    for index in range(3):
        assert one.image(index).shape == (40, 48, channels)
        np.testing.assert_array_equal(one.image(index), other.image(index))


def test_a_figure_of_views_shows_the_requested_channels() -> None:
    image = np.zeros((20, 20, 5), np.uint8)
    image[:, :, 3] = 200
    views = torch.from_numpy(image).permute(2, 0, 1).expand(2, 1, 5, 20, 20)
    red = draw_view_grid(image, views, [Box(0, 0, 20, 20)], channels=(3, 1, 0))
    blue = draw_view_grid(image, views, [Box(0, 0, 20, 20)], channels=(0, 1, 3))
    assert (red == (200, 0, 0)).all(2).sum() > 1000
    assert (blue == (0, 0, 200)).all(2).sum() > 1000
    with pytest.raises(ValueError, match=r"channels=\(0, 1, 5\) of 5 were given: choose three, from 0"):
        draw_view_grid(image, views, [Box(0, 0, 20, 20)], channels=(0, 1, 5))


def test_mismatched_channels_are_reported_before_training(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"records of 4 channels were given, and files are decoded to RGB: also pass decode="
    ):
        Records(["a.npy"], channels=4)
    four, five = records(tmp_path / "four", 4), records(tmp_path / "five", 5)
    with pytest.raises(ValueError, match=r"The sets have different numbers of channels, \{'train': 4, 'val': 5\}"):
        MultiLabelDataModule(train=four, val=five)
    wrong = Records(["0.npy"], root=tmp_path / "four", decode=read_bands, channels=5)
    with pytest.raises(TypeError, match=r"decode returned .*return numpy pixels of uint8 \(H, W, 5\)"):
        wrong.image(0)
    model = MultiLabelSSLModule("test_resnet", projection_dim=16, predictor_dim=8)
    with pytest.raises(
        ValueError, match=r"The images have 4 channels, but the backbone takes 3: pass backbone_kwargs="
    ):
        model(torch.zeros(1, 4, 32, 32))


# ---------------------------------------------------------------------- labels


def labelled(folder: Path, labels: list[list[int]]) -> Records:
    for index in range(len(labels)):
        Image.new("RGB", (20, 20)).save(folder / f"{index}.png")
    return Records([f"{index}.png" for index in range(len(labels))], labels, ["sky", "sea", "sun"], root=folder)


@pytest.mark.parametrize("labels", [[[0, 0, 0], [0, 0, 0]], [[0, -1, 0], [-1, 0, 0]]])
def test_labels_that_are_all_absent_are_refused(tmp_path: Path, labels: list[list[int]]) -> None:
    good, empty = labelled(tmp_path, [[1, 0, 1], [0, 1, 0]]), labelled(tmp_path, labels)
    for sets, name in (({"train": empty}, "train"), ({"train": good, "val": empty}, "val")):
        with pytest.raises(ValueError, match=f"No image of {name} shows any of its 3 classes, all labels are"):
            MultiLabelDataModule(**sets, batch_size=2, size=16).setup()


def test_a_class_that_no_image_has_is_named(tmp_path: Path) -> None:
    data = MultiLabelDataModule(train=labelled(tmp_path, [[1, 0, 0], [1, 0, -1]]), batch_size=2, size=16)
    assert (
        "",
        "2 of 3 classes are shown by no image of train and are left out of its mAP: sea, sun",
    ) in data.description()
