"""What is logged to Weights & Biases, read from the files of an offline run."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger

from mlssl.callbacks import BackboneExport, RepresentationLogger
from mlssl.data.readers.synthetic import synthetic_scenes

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb.*")


@pytest.fixture
def offline(make_model: Any, make_data: Any, make_trainer: Any, tmp_path: Path, monkeypatch) -> Any:
    """A function that trains with the callbacks and returns the run's records and folder."""
    monkeypatch.setenv("WANDB_SILENT", "true")

    def train(*callbacks: Any, **data: Any) -> tuple[list[Any], Path, Any]:
        logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
        model = make_model()
        make_trainer(*callbacks, logger=logger, num_sanity_val_steps=1).fit(model, make_data(**data))
        logger.experiment.finish()
        wandb.teardown()  # waits until the service has written everything
        (folder,) = tmp_path.glob("wandb/offline-run-*")
        (file,) = folder.glob("*.wandb")
        return _records(file), folder, model

    return train


def _records(file: Path) -> list[Any]:
    """Records of a .wandb file: blocks of 32 KiB in LevelDB's log format after a header, protobuf inside."""
    from wandb.proto.wandb_internal_pb2 import Record

    block, content = 2**15, file.read_bytes()
    at, whole, records = 7, b"", []
    while at + 7 <= len(content):
        left = block - at % block
        if left < 7:  # too few bytes for a header fill the block
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(whole))
            whole = b""
    return records


def _history(records: list[Any]) -> dict[str, list[Any]]:
    """Name → what was logged under it, each picture, table or histogram as a mapping."""
    history: dict[str, list[Any]] = {}
    for record in records:
        if record.WhichOneof("record_type") != "history":
            continue
        logged: dict[str, Any] = {}
        for item in record.history.item:
            *outer, last = item.nested_key or [item.key]
            place = logged
            for key in outer:
                place = place.setdefault(key, {})
            place[last] = json.loads(item.value_json)
        for name, value in logged.items():
            history.setdefault(name, []).append(value)
    return history


def _table(folder: Path, value: dict[str, Any]) -> dict[str, Any]:
    return json.loads((folder / "files" / value["path"]).read_text())


def test_an_offline_run_contains_cosines_classes_neighbours_and_a_map(offline):
    records, folder, _ = offline(RepresentationLogger(max_images=9))
    history = _history(records)
    for kind in ("same_block", "same_image", "other_image"):
        values = history[f"similarity/{kind}"]
        assert len(values) == 3  # at the start and after two epochs
        assert all(value["_type"] == "histogram" and sum(value["values"]) > 0 for value in values)
    classes = _table(folder, history["representation/classes"][0])
    assert classes["columns"] == ["class", "images", "average precision"]
    assert all(0 < row[1] <= 9 and 0 <= row[2] <= 1 for row in classes["data"])
    neighbors = _table(folder, history["representation/neighbors"][0])
    assert neighbors["columns"] == ["image", "labels", *(f"nearest {n}" for n in range(1, 6))]
    assert len(neighbors["data"]) == 9
    table = _table(folder, history["representation/map"][0])
    assert len(table["data"]) == 9
    assert table["data"][0][0] == "000000"
    for name in ("similarity/figure", "representation/classes_figure", "representation/map_figure"):
        assert (folder / "files" / history[name][0]["path"]).is_file()
    assert history["representation/rank"][0] >= 1


def test_an_unlabelled_run_has_all_except_the_classes(offline):
    photos = synthetic_scenes("train", size=32, count=18)
    unlabelled = type(photos)([photos.path(line) for line in range(18)], decode=photos.decode)
    records, _, _ = offline(RepresentationLogger(), train=unlabelled, val=None)
    history = _history(records)
    assert "representation/classes" not in history
    assert {"similarity/same_block", "representation/neighbors", "representation/map"} <= history.keys()


def test_an_export_is_an_artifact_with_the_metrics(offline):
    from mlssl.callbacks import CollapseMonitor

    records, _, _ = offline(CollapseMonitor(), BackboneExport(format="safetensors"))
    (artifact,) = [one.request.log_artifact.artifact for one in records if one.request.HasField("log_artifact")] or [
        one.artifact for one in records if one.WhichOneof("record_type") == "artifact"
    ]
    assert artifact.type == "model"
    assert [entry.path for entry in artifact.manifest.contents] == ["backbone.safetensors"]
    metrics = json.loads(artifact.metadata)
    assert {"train/loss", "collapse/std", "train/pair_loss"} <= metrics.keys()
    assert all(isinstance(value, float) for value in metrics.values())


def test_weights_are_the_same_with_and_without(offline, make_model, make_data, make_trainer):
    _, _, watched = offline(RepresentationLogger(max_images=9))
    alone = make_model()
    make_trainer(num_sanity_val_steps=1).fit(alone, make_data())
    for (name, one), other in zip(watched.state_dict().items(), alone.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_without_a_datamodule_one_line_says_that_nothing_is_logged(
    make_model, make_data, make_trainer, tmp_path, caplog
):
    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    loader = make_data().train_dataloader()
    with caplog.at_level("INFO"):
        make_trainer(RepresentationLogger(), logger=logger).fit(make_model(views_per_step=16), loader)
    logger.experiment.finish()
    assert sum("RepresentationLogger: nothing is logged" in line for line in caplog.messages) == 1


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="max_images=1 was given"):
        RepresentationLogger(max_images=1)
