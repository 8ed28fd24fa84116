"""The loaders of a run: their batches, what random samples depend on, and refused arguments."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonargparse
import lightning as L
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from PIL import Image
from torch import Tensor

from mlssl.data.batches import check_image_batch, check_view_batch
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.described import describe
from mlssl.data.readers.corel5k import read_corel5k
from mlssl.data.readers.folder import read_folder
from mlssl.data.records import Records
from mlssl.data.workers import MAX_WORKERS
from mlssl.views.recipe import PRESETS, Recipe

Draws = dict[int, str]

NUM_PHOTOS = 10
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Recorder(L.LightningModule):
    """Records its batches: {epoch: {image id: digest of its views}}."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[int, Draws] = {}
        self.evaluated: list[int] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.setdefault(self.current_epoch, {}).update(digests(batch))
        return self.weight.sum()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.evaluated += batch["image_ids"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class FileRecorder(Recorder):
    """Leaves a process's notes where the test finds them."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self) -> None:
        (self.folder / f"{self.global_rank}.json").write_text(json.dumps(self.seen))


def digests(batch: dict[str, Tensor]) -> Draws:
    pixels = batch["views"] if "views" in batch else batch["image"]
    return {
        int(image_id): hashlib.sha1(image.numpy().tobytes()).hexdigest()
        for image_id, image in zip(batch["image_ids"], pixels, strict=True)
    }


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten JPEGs of different sizes."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(NUM_PHOTOS):
        generator = np.random.default_rng(index)
        pixels = generator.integers(0, 256, (8, 12 - index, 3), np.uint8)
        Image.fromarray(pixels).resize((60 + index, 40), Image.Resampling.BICUBIC).save(folder / f"{index}.jpg")
    return folder


@pytest.fixture(scope="module")
def labelled(photos: Path) -> Records:
    labels = np.random.default_rng(0).integers(-1, 2, (NUM_PHOTOS, 3))
    names = [f"{index}.jpg" for index in range(NUM_PHOTOS)]
    return Records(names, labels, ["sky", "sea", "sun"], image_ids=100 + np.arange(NUM_PHOTOS), root=photos)


def module(train: Records, **settings: Any) -> MultiLabelDataModule:
    return MultiLabelDataModule(train=train, **{"batch_size": 3, "size": 16, "num_workers": 0, **settings})


def draws(data: MultiLabelDataModule, epoch: int = 0, rank: int = 0, devices: int = 1) -> list[Draws]:
    """One {image id: digest of its views} a step, as a Trainer of so many devices would ask for them."""
    data.trainer = SimpleNamespace(world_size=devices, global_rank=rank, num_devices=devices)  # type: ignore[assignment]
    loader = data.train_dataloader()
    loader.steps_done = None  # type: ignore[attr-defined]  # the Trainer's count
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return [digests(batch) for batch in loader]


def two_epochs(data: MultiLabelDataModule) -> list[list[Draws]]:
    """Of one loader, whose workers persist."""
    loader = data.train_dataloader()
    steps = []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        steps.append([digests(batch) for batch in loader])
    return steps


def merged(steps: list[Draws]) -> Draws:
    return {image_id: digest for step in steps for image_id, digest in step.items()}


# ---------------------------------------------------------------------- batches of the loaders


@pytest.mark.parametrize(("rows", "cols"), [(2, 2), (1, 1), (3, 2)])
def test_training_batches_follow_the_contract(labelled: Records, rows: int, cols: int) -> None:
    batches = list(module(labelled, rows=rows, cols=cols).train_dataloader())
    assert len(batches) == 3
    for batch in batches:
        check_view_batch(batch, num_labels=3)
        assert batch["views"].shape == (3, 2, rows * cols, 3, 16, 16)
        assert batch["labels"].dtype == torch.int8
        rows_of = batch["image_ids"].numpy() - 100
        assert labelled.labels is not None
        assert np.array_equal(batch["labels"].numpy(), labelled.labels[rows_of])


def test_learning_rate_scaling_reads_images_and_blocks_per_step(labelled: Records) -> None:
    loader = module(labelled, rows=3, cols=2).train_dataloader()
    assert (loader.batch_size, loader.dataset.num_blocks) == (3, 6)  # type: ignore[attr-defined]


@pytest.mark.parametrize("eval_size", [24, (24, 40), None])
def test_whole_images_come_in_order_in_one_size_without_augmentation(labelled: Records, eval_size: Any) -> None:
    data = module(labelled, val=labelled, eval_size=eval_size)
    side = (16, 16) if eval_size is None else (24, 24) if eval_size == 24 else (24, 40)
    for loader in (
        data.val_dataloader(),
        data.test_dataloader(),
        data.image_dataloader("train"),
        data.predict_dataloader(),
    ):
        batches = list(loader)
        assert [i for batch in batches for i in batch["image_ids"].tolist()] == labelled.image_ids.tolist()
        for batch in batches:
            check_image_batch(batch, num_labels=3)
            assert batch["image"].shape[1:] == (3, *side)


def test_images_without_labels_give_batches_without_labels(photos: Path) -> None:
    data = MultiLabelDataModule("folder", photos, batch_size=3, size=16, num_workers=0)
    assert "labels" not in next(iter(data.train_dataloader()))
    assert "labels" not in next(iter(data.predict_dataloader()))
    assert data.val_dataloader() == []
    assert (data.classes, data.num_labels) == ((), 0)


def test_classes_are_those_of_whichever_set_has_labels(photos: Path, labelled: Records) -> None:
    unlabelled = read_folder(photos)
    for sets in ({"train": labelled}, {"train": unlabelled, "val": labelled}, {"train": labelled, "val": unlabelled}):
        assert module(**sets).classes == ("sky", "sea", "sun")
    assert module(unlabelled, probe_train=labelled).num_labels == 3


def test_probe_images_are_a_separate_set_shuffled_per_epoch(photos: Path, labelled: Records) -> None:
    assert module(labelled).probe_dataloader() is None
    data = module(read_folder(photos), val=labelled, probe_train=labelled)
    orders = []
    for epoch in (0, 1, 0):
        data.trainer = SimpleNamespace(current_epoch=epoch, world_size=2, num_devices=2)  # type: ignore[assignment]
        loader = data.probe_dataloader()
        assert loader is not None
        batches = list(loader)
        check_image_batch(batches[0], num_labels=3)
        orders.append([i for batch in batches for i in batch["image_ids"].tolist()])
    assert orders[0] == orders[2] != orders[1]
    assert all(sorted(order) == labelled.image_ids.tolist() for order in orders)


def test_loaders_do_not_change_global_random_states(labelled: Records) -> None:
    data = module(labelled, val=labelled, probe_train=labelled)
    before = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())  # noqa: NPY002
    for loader in (data.train_dataloader(), data.val_dataloader(), data.probe_dataloader()):
        assert loader is not None
        assert len(list(loader)) > 2
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), pickle.dumps(np.random.get_state()))  # noqa: NPY002


# ---------------------------------------------------------------------- draws


def test_every_image_is_used_at_most_once_per_epoch_and_the_leftovers_vary(labelled: Records) -> None:
    data = module(labelled)
    epochs = [[i for step in draws(data, epoch) for i in step] for epoch in range(6)]
    for ids in epochs:
        assert len(ids) == len(set(ids)) == 9
    assert len({frozenset(ids) for ids in epochs}) > 1
    assert epochs[0] != epochs[1]
    whole = module(labelled, batch_size=5)
    assert sorted(merged(draws(whole))) == labelled.image_ids.tolist()


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_views_are_the_same_with_0_1_and_3_workers(labelled: Records) -> None:
    expected, one, three = (two_epochs(module(labelled, num_workers=workers)) for workers in (0, 1, 3))
    assert expected == one == three
    assert expected == [draws(module(labelled), epoch) for epoch in (0, 1)]


@pytest.mark.parametrize("epoch", [0, 3])
def test_two_ranks_share_the_steps_of_one(labelled: Records, epoch: int) -> None:
    one = draws(module(labelled, batch_size=4), epoch)
    two = [draws(module(labelled, batch_size=2), epoch, rank, devices=2) for rank in (0, 1)]
    assert len(one) == len(two[0]) == len(two[1]) == 2
    for whole, *shares in zip(one, *two, strict=True):
        assert merged(shares) == whole
        assert len(whole) == 4


def test_two_real_processes_share_the_steps_of_one(labelled: Records, tmp_path: Path) -> None:
    recorder = FileRecorder(tmp_path)
    trainer = L.Trainer(max_epochs=2, devices=2, strategy="ddp_fork", default_root_dir=tmp_path, **QUIET)
    trainer.fit(recorder, module(labelled, batch_size=2))
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for epoch in (0, 1):
        seen = merged([rank[str(epoch)] for rank in ranks])
        expected = merged(draws(module(labelled, batch_size=4), epoch))
        assert {int(image_id): digest for image_id, digest in seen.items()} == expected


def test_views_depend_on_epoch_seed_and_index(labelled: Records) -> None:
    first, second = (merged(draws(module(labelled, batch_size=10), epoch)) for epoch in (0, 1))
    other = merged(draws(module(labelled, batch_size=10, seed=1)))
    assert first.keys() == second.keys() == other.keys()
    assert len({*first.values(), *second.values(), *other.values()}) == 3 * NUM_PHOTOS
    same = Records(["0.jpg"] * 4, root=labelled.root)
    assert len(set(merged(draws(module(same, batch_size=4))).values())) == 4


def test_a_resumed_run_has_the_batches_of_an_uninterrupted_run(labelled: Records, tmp_path: Path) -> None:
    whole, half, rest = Recorder(), Recorder(), Recorder()
    L.Trainer(max_epochs=3, default_root_dir=tmp_path, **QUIET).fit(whole, module(labelled))
    first = L.Trainer(max_epochs=1, default_root_dir=tmp_path, **QUIET)
    first.fit(half, module(labelled, val=labelled))
    first.save_checkpoint(tmp_path / "half.ckpt")
    L.Trainer(max_epochs=3, default_root_dir=tmp_path, **QUIET).fit(
        rest, module(labelled, val=labelled), ckpt_path=tmp_path / "half.ckpt"
    )
    assert whole.seen.keys() == {0, 1, 2}
    assert half.seen == {0: whole.seen[0]}
    assert rest.seen == {epoch: whole.seen[epoch] for epoch in (1, 2)}
    assert sorted(half.evaluated[-NUM_PHOTOS:]) == labelled.image_ids.tolist()


class Stops(L.Callback):
    """Saves after some steps of an epoch and ends the run there."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.mark.parametrize(("step", "workers"), [(1, 0), (4, 2), (6, 0), (6, 2)])
def test_a_run_resumed_in_mid_epoch_continues_with_the_rest_of_it(
    step: int, workers: int, labelled: Records, tmp_path: Path
) -> None:
    whole, rest = Recorder(), Recorder()
    settings: dict[str, Any] = {"max_epochs": 3, "default_root_dir": tmp_path, **QUIET}
    L.Trainer(**settings).fit(whole, module(labelled))
    path = tmp_path / "part.ckpt"
    first = module(labelled, num_workers=workers)
    L.Trainer(callbacks=[Stops(step, path)], **settings).fit(Recorder(), first)
    resumed = L.Trainer(**settings)
    resumed.fit(rest, module(labelled, num_workers=workers), ckpt_path=path, weights_only=True)
    assert resumed.global_step == 9
    epoch, done = divmod(step, 3)
    assert [len(rest.seen[later]) for later in range(epoch, 3)] == [9 - 3 * done] + [9] * (2 - epoch)
    for later in range(epoch, 3):
        assert rest.seen[later].items() <= whole.seen[later].items()


def test_another_step_size_is_refused_in_mid_epoch(labelled: Records, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_epochs": 3, "default_root_dir": tmp_path, **QUIET}
    L.Trainer(callbacks=[Stops(2, tmp_path / "2.ckpt")], **settings).fit(Recorder(), module(labelled))
    with pytest.raises(ValueError, match=r"after 2 steps of an epoch, with 3 of 10 .* has 2 of 10: keep batch_size"):
        L.Trainer(**settings).fit(Recorder(), module(labelled, batch_size=2), ckpt_path=tmp_path / "2.ckpt")


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_lightnings_overfit_batches_works(labelled: Records, tmp_path: Path) -> None:
    recorder = Recorder()
    L.Trainer(max_epochs=2, overfit_batches=1, default_root_dir=tmp_path, **QUIET).fit(recorder, module(labelled))
    assert recorder.seen[0] == recorder.seen[1]
    assert recorder.seen[0].keys() == {100, 101, 102}


# ---------------------------------------------------------------------- formats and settings


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Six images a split; a person on every one, a dog on the first of each."""
    (tmp_path / "annotations").mkdir()
    for split, first in (("train2017", 0), ("val2017", 50)):
        (tmp_path / split).mkdir()
        ids = range(first, first + 6)
        for i in ids:
            Image.effect_noise((30, 20), 60).save(tmp_path / split / f"{i}.jpg")
        content = {
            "images": [{"id": i, "file_name": f"{i}.jpg"} for i in ids],
            "annotations": [{"image_id": i, "category_id": 1} for i in ids] + [{"image_id": first, "category_id": 2}],
            "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "cat"}],
        }
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return tmp_path


def from_disk(dataset: Any, root: Path | None, **settings: Any) -> MultiLabelDataModule:
    return MultiLabelDataModule(dataset, root, **{"batch_size": 3, "size": 16, "num_workers": 0, **settings})


def test_cocos_splits_are_its_years_by_default(coco: Path) -> None:
    data = from_disk("coco", coco)
    check_view_batch(next(iter(data.train_dataloader())), num_labels=3)
    assert [i for batch in data.val_dataloader() for i in batch["image_ids"].tolist()] == list(range(50, 56))
    assert data.classes == ("person", "dog", "cat")
    swapped = from_disk("coco", coco, train_split="val2017", val_split="")
    swapped.setup("fit")
    assert swapped.train_records is not None
    assert swapped.train_records.image_ids.tolist() == list(range(50, 56))
    assert swapped.val_dataloader() == []


def test_rare_classes_can_be_left_out(coco: Path) -> None:
    for least, classes in (((1, 1), ("person", "dog")), ((2, 1), ("person",)), ((1, 2), ("person",))):
        data = from_disk("coco", coco, min_images_per_class=least)
        data.setup()
        data.setup("validate")  # a second time changes nothing
        assert data.classes == classes
        assert next(iter(data.val_dataloader()))["labels"].shape == (3, len(classes))


def test_real_corel5k_gives_81_labels(corel5k: Path) -> None:
    data = from_disk("corel5k", corel5k, min_images_per_class=(40, 4), eval_size=(128, 192))
    check_view_batch(next(iter(data.train_dataloader())), num_labels=81)
    assert next(iter(data.image_dataloader("val")))["image"].shape == (3, 3, 128, 192)
    assert len(data.image_dataloader("train").dataset) == 4500  # type: ignore[arg-type]


def test_splits_of_a_folder_are_its_subfolders(photos: Path) -> None:
    data = from_disk("folder", photos.parent, train_split=photos.name, val_split=photos.name)
    data.setup()
    assert data.train_records is not None
    assert len(data.train_records) == len(data.val_dataloader().dataset) == NUM_PHOTOS  # type: ignore[union-attr, arg-type]


def test_synthetic_scenes_need_no_files() -> None:
    data = MultiLabelDataModule(batch_size=4, size=16, num_workers=0)
    check_view_batch(next(iter(data.train_dataloader())), num_labels=12)
    check_image_batch(next(iter(data.val_dataloader())), num_labels=12)


def test_the_default_number_of_workers_is_the_cores_per_device(
    labelled: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cores, devices, expected in ((1, 1, 1), (2, 1, 1), (6, 1, 5), (64, 1, MAX_WORKERS), (16, 4, 3), (2, 4, 1)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _process, n=cores: set(range(n)), raising=False)
        data = module(labelled, num_workers=None, batch_size=1)
        data.trainer = SimpleNamespace(world_size=devices, global_rank=0, num_devices=devices)  # type: ignore[assignment]
        assert data.train_dataloader().num_workers == expected
    assert module(labelled, num_workers=0).train_dataloader().num_workers == 0


def test_lists_of_yaml_and_of_the_command_line_become_tuples(photos: Path) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(MultiLabelDataModule, "data")
    yaml = f"data: {{dataset: corel5k, root: {photos}, eval_size: [128, 192], min_images_per_class: [40, 4]}}"
    words = ["--data.dataset=coco", f"--data.root={photos}", "--data.eval_size=[128, 192]", "--data.val_split="]
    for config in (parser.parse_string(yaml), parser.parse_args(words)):
        data = MultiLabelDataModule(**config["data"].as_dict())
        assert data.eval_size == (128, 192)
        assert data.hparams["root"] == str(photos)
        assert data.hparams["min_images_per_class"] in ((40, 4), None)
    assert MultiLabelDataModule(**parser.parse_args(["--data.eval_size=64"])["data"].as_dict()).eval_size == (64, 64)
    for wrong in ("--data.eval_size=[1, 2, 3]", "--data.dataset=imagenet", "--data.min_images_per_class=40"):
        with pytest.raises(jsonargparse.ArgumentError, match=wrong[2:].partition("=")[0]):
            parser.parse_args([wrong])


CUSTOM = """
import numpy as np

class Shade:
    def __init__(self, value: int = 3):
        self.value = value

    def __call__(self, block, generator):
        return np.full((3, 16, 16), self.value, np.uint8)

def branch(block, generator):
    return np.full((3, 16, 16), generator.integers(256), np.uint8)

def halves(height, width):
    return [(0, 0, height, width // 2), (0, width - width // 2, height, width // 2)]
"""


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A custom module on the Python path; returns its name."""
    (tmp_path / "their_views.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "their_views", raising=False)
    return "their_views"


BRANCHES = (
    "[{hue: 0.05, crop_area: [0.3, 1.0]}, {class_path: their_views.Shade, init_args: {value: 9}}, their_views.branch]"
)
LOCAL = "{count: 4, size: 16, area: [0.1, 0.2], branch: {class_path: their_views.Shade}}"


def test_views_are_set_in_yaml_and_on_the_command_line_and_saved_in_the_config(custom: str) -> None:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(MultiLabelDataModule, "data")
    words = [f"--data.branches={BRANCHES}", f"--data.local_views={LOCAL}", f"--data.regions={custom}.halves"]
    config = parser.parse_args(["--data.size=16", *words])
    text = parser.dump(config)
    kept = yaml.safe_load(text)["data"]
    given = [yaml.safe_load(one) for one in (BRANCHES, LOCAL)]
    assert (kept["branches"], kept["local_views"], kept["regions"]) == (*given, f"{custom}.halves")
    assert parser.parse_string(text) == config
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    for one in (config, parser.parse_string(text)):
        views = instantiate(one)["data"].views
        assert (views.num_branches, views.num_blocks) == (3, 2)
        assert views.branches[0] == Recipe(hue=0.05, crop_area=(0.3, 1.0))
        made = views.arrays(np.zeros((30, 40, 3), np.uint8))
        assert made["views"][1].min() == 9
        assert made["local_views"].shape == (4, 3, 16, 16)
        assert made["local_views"].min() == 3
    for words, preset in ((["--data.branches", "soft"], "soft"), ([], "paper")):
        assert instantiate(parser.parse_args(words))["data"].views.branches == PRESETS[preset]
    small = instantiate(parser.parse_args(["--data.local_views", "{count: 4, size: 32}"]))["data"].views
    assert (small.local_views.count, small.local_views.size) == (4, 32)


def test_hyper_parameters_store_numbers_and_names_of_custom_branches(
    custom: str, labelled: Records, tmp_path: Path
) -> None:
    import their_views

    settings: dict[str, Any] = {
        "branches": [Recipe(hue=0.05), their_views.Shade(4), f"{custom}.branch"],
        "regions": their_views.halves,
        "local_views": {"count": 2, "size": 16, "branch": their_views.branch},
    }
    trainer = L.Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0, default_root_dir=tmp_path, **QUIET)
    trainer.fit(Recorder(), module(labelled, **settings))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    assert kept["branches"][0] == {**kept["branches"][0], "hue": 0.05, "crop_area": [0.2, 1.0]}
    assert kept["branches"][1:] == [f"custom {custom}.Shade", f"custom {custom}.branch"]
    assert kept["regions"] == f"custom {custom}.halves"
    assert kept["local_views"] == {"count": 2, "size": 16, "branch": f"custom {custom}.branch"}
    del sys.modules[custom]
    load = partial(MultiLabelDataModule.load_from_checkpoint, tmp_path / "a.ckpt", weights_only=True, train=labelled)
    for left_out, name in (
        ("branches", "branch 1"),
        ("regions", "regions"),
        ("local_views", "the branch of local_views"),
    ):
        rest = {key: value for key, value in settings.items() if key != left_out and key != "branches"}
        rest.update({} if left_out == "branches" else {"branches": [Recipe()]})
        with pytest.raises(
            ValueError, match=f"{name} is 'custom {custom}.*', the name of .* pass the function or object"
        ):
            load(**rest)
    assert custom not in sys.modules
    assert load(**{**settings, "branches": "soft"}).views.branches == PRESETS["soft"]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_worker_batches_of_custom_branches_with_local_views_follow_the_contract(custom: str, corel5k: Path) -> None:
    photographs = read_corel5k(corel5k, "train").subset(range(6))
    settings = {
        "branches": ["their_views.branch", {}, {"noise_probability": 1}],
        "local_views": {"count": 2, "size": 16},
    }
    settings["local_views"]["branch"] = {"erase_probability": 1}  # type: ignore[index]
    epochs = []
    for workers in (0, 2):
        batches = list(module(photographs, num_workers=workers, **settings).train_dataloader())
        for batch in batches:
            check_view_batch(batch)
            assert batch["views"].shape == (3, 3, 4, 3, 16, 16)
            assert batch["local_boxes"].shape == (3, 2, 4)
        epochs.append({name: torch.cat([batch[name] for batch in batches]) for name in batches[0]})
    for name, values in epochs[0].items():
        assert torch.equal(values, epochs[1][name]), name


def test_settings_in_a_checkpoint_load_with_weights_only(coco: Path, tmp_path: Path) -> None:
    trainer = L.Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0, default_root_dir=tmp_path, **QUIET)
    trainer.fit(Recorder(), from_disk("coco", coco, eval_size=(20, 30)))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = MultiLabelDataModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.hparams["root"] == str(coco)
    assert loaded.eval_size == (20, 30)
    assert len(loaded.train_dataloader()) == 2


# ---------------------------------------------------------------------- errors before training


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"dataset": "imagenet"},
            "dataset='imagenet' is unknown: pass one of synthetic, coco, roboflow, voc, corel5k, manifest, folder, sh",
        ),
        ({"dataset": "coco"}, r"dataset='coco' needs its folder: pass root \(--data.root FOLDER\)"),
        (
            {"root": "photos"},
            "root='photos' was given, and synthetic scenes have no files: pass its dataset, one of coco",
        ),
        ({"batch_size": 0}, "batch_size=0 was given: pass a number of at least 1"),
        ({"num_workers": -1}, "num_workers=-1 was given: pass a number of at least 0"),
        ({"seed": -1}, "seed=-1 was given: pass a number of at least 0"),
        ({"rows": 0}, "got a grid of rows=0 and cols=2, expected at least 1 of each"),
        ({"cols": 0}, "got a grid of rows=2 and cols=0"),
        ({"overlap": -0.01}, "got overlap=-0.01, expected a fraction of the image's side between 0 and 0.5"),
        ({"overlap": 0.51}, "got overlap=0.51"),
        ({"overlap": float("nan")}, "got overlap=nan"),
        ({"size": 15}, "got size=15, expected views of at least 16 × 16 pixels"),
        ({"eval_size": 0}, "eval_size=0 was given: pass height and width in pixels, at least 1 each"),
        ({"eval_size": (64, 0)}, r"eval_size=\(64, 0\) was given"),
        ({"eval_size": (64,)}, r"eval_size=\(64,\) was given"),
        ({"branches": "papr"}, "there is no preset of branches 'papr', did you mean 'paper'"),
        ({"regions": "nowhere.f"}, "regions is 'nowhere.f', which cannot be imported"),
        ({"local_views": {"cont": 3}}, "local_views has no 'cont', did you mean 'count'"),
    ],
)
def test_refuses_settings_at_construction(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        MultiLabelDataModule(**settings)


@pytest.mark.parametrize(
    "settings", [{"size": 16}, {"overlap": 0.0}, {"overlap": 0.5}, {"rows": 1, "cols": 1}, {"batch_size": 1}]
)
def test_accepts_the_ends_of_every_range(labelled: Records, settings: dict[str, Any]) -> None:
    assert len(next(iter(module(labelled, **settings).train_dataloader()))["views"]) >= 1


def test_refuses_conflicting_arguments(photos: Path, labelled: Records) -> None:
    unlabelled = read_folder(photos)
    with pytest.raises(ValueError, match=r"val or probe_train was given without train: pass train=Records"):
        MultiLabelDataModule(val=labelled)
    for name, value in {
        "root": photos,
        "train_split": "train",
        "val_split": "",
        "min_images_per_class": (4, 4),
    }.items():
        with pytest.raises(ValueError, match=rf"{name} and train were given: {name} is for a data set read from disk"):
            module(labelled, **{name: value})
    with pytest.raises(ValueError, match=r"probe_train is Records\(10 images, unlabelled, .*: pass labelled records"):
        module(labelled, probe_train=unlabelled)
    with pytest.raises(
        TypeError, match=r"val is of type list: pass mlssl\.Records\(paths, labels, classes\), or train"
    ):
        module(labelled, val=[photos])


def test_refuses_sets_whose_labels_differ(labelled: Records, photos: Path) -> None:
    paths = ["0.jpg", "1.jpg"]
    narrow = Records(paths, [[1, 0], [0, 1]], ["sky", "sea"], root=photos)
    other = Records(paths, [[1, 0, 1], [0, 1, 0]], ["sky", "moon", "sun"], root=photos)
    swapped = labelled.with_classes([1, 0, 2])
    for sets, sentence in (
        ({"val": narrow}, r"train has 3 classes and val has 2 \(only in one of them: sun\): use the same list"),
        ({"val": other}, r"train has 3 classes and val has 3 \(only in one of them: moon, sea\)"),
        ({"val": swapped}, "train has 3 classes and val has 3 in another order: use the same list of classes"),
        ({"val": labelled, "probe_train": narrow}, "train has 3 classes and probe_train has 2"),
    ):
        with pytest.raises(ValueError, match=sentence):
            module(labelled, **sets)
    with pytest.raises(ValueError, match="val has 2 classes and probe_train has 3"):
        module(read_folder(photos), val=narrow, probe_train=labelled)


def test_refuses_splits_with_different_classes(coco: Path) -> None:
    path = coco / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"categories": content["categories"][:2]}))
    data = from_disk("coco", coco)
    for _ in range(2):  # a failure leaves nothing half set up
        with pytest.raises(ValueError, match=r"train has 3 classes and val has 2 \(only in one of them: cat\)"):
            data.setup("fit")


def test_refuses_batches_larger_than_the_training_set(labelled: Records) -> None:
    sentence = r"The training set has 10 images, and a step needs 11 \(batch_size 11 on 1 device\(s\)\): pass a smaller"
    with pytest.raises(ValueError, match=sentence):
        module(labelled, batch_size=11).train_dataloader()
    with pytest.raises(ValueError, match=r"a step needs 12 \(batch_size 6 on 2 device\(s\)\)"):
        draws(module(labelled, batch_size=6), devices=2)
    assert len(draws(module(labelled, batch_size=10))) == len(draws(module(labelled, batch_size=5), devices=2)) == 1


def test_refuses_missing_sets(labelled: Records, coco: Path) -> None:
    with pytest.raises(ValueError, match=r"There are no 'val' images: pass 'train', or 'val' if there is a val set"):
        module(labelled).image_dataloader("val")
    with pytest.raises(ValueError, match=r"There are no 'test' images"):
        module(labelled).image_dataloader("test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"min_images_per_class=\(1, 1\) needs val images, and there are none"):
        from_disk("coco", coco, val_split="", min_images_per_class=(1, 1)).setup()
    with pytest.raises(ValueError, match=r"No class has 7 train and 1 val images: lower min_images_per_class"):
        from_disk("coco", coco, min_images_per_class=(7, 1)).setup()


def test_a_run_on_wrong_data_ends_before_training(tmp_path: Path, coco: Path) -> None:
    gone, empty = tmp_path / "gone", tmp_path / "empty"
    empty.mkdir()
    cases: list[tuple[MultiLabelDataModule, type[Exception], str]] = [
        (from_disk("coco", gone), FileNotFoundError, "no folder '.*gone': pass as root"),
        (from_disk("corel5k", gone), FileNotFoundError, "no folder '.*gone': pass as root"),
        (from_disk("folder", gone), FileNotFoundError, "no folder '.*gone': pass a folder"),
        (from_disk("folder", empty), FileNotFoundError, "no image below '.*empty'"),
        (from_disk("coco", coco, train_split="train2014"), FileNotFoundError, "an existing split: train2017, val2017"),
        (from_disk("synthetic", None, val_split="val"), ValueError, "no synthetic scenes of split 'val'"),
        (from_disk("coco", coco, batch_size=7), ValueError, "a step needs 7"),
    ]
    for data, error, sentence in cases:
        recorder = Recorder()
        with pytest.raises(error, match=sentence):
            L.Trainer(max_epochs=1, default_root_dir=tmp_path, num_sanity_val_steps=0, **QUIET).fit(recorder, data)
        assert recorder.seen == {}


@pytest.mark.parametrize("dataset", ["coco", "manifest", "voc"])
def test_without_a_validation_set_the_advice_is_to_train_without_one(coco: Path, dataset: Any) -> None:
    (coco / "annotations" / "instances_val2017.json").unlink()
    (coco / "train.csv").write_text("path,labels\ntrain2017/0.jpg,a\ntrain2017/1.jpg,b\n")
    voc = coco / "VOC2012"
    for folder, name, text in (
        ("ImageSets/Main", "trainval.txt", "1\n"),
        ("Annotations", "1.xml", "<annotation><object><name>dog</name></object></annotation>"),
        ("JPEGImages", "1.jpg", ""),
    ):
        (voc / folder).mkdir(parents=True)
        (voc / folder / name).write_text(text)
    with pytest.raises(FileNotFoundError, match=r"there is no validation set .*: pass val_split=\"\" \(") as caught:
        from_disk(dataset, coco).setup()
    assert "train2017" not in str(caught.value)
    data = from_disk(dataset, coco, val_split="")
    data.setup()
    assert data.val_records is None
    with pytest.raises(FileNotFoundError) as named:
        from_disk(dataset, coco, val_split="2007/nowhere" if dataset == "voc" else "nowhere").setup()
    assert "there is no validation set" not in str(named.value)


def test_the_start_prints_images_classes_and_frequencies(coco: Path) -> None:
    (coco / "train2017" / "extra.HEIC").touch()
    assert from_disk("coco", coco).description()[:3] == [
        (
            "train",
            "6 images (6 .jpg), left out 1 .heic; 3 classes, 1.2 labels per image; "
            "most frequent: person 6, dog 1, cat 0",
        ),
        ("", "1 of 3 classes are absent from no image of train and are left out of its mAP: person"),
        ("", "1 of 3 classes are shown by no image of train and are left out of its mAP: cat"),
    ]
    many = Records(["a"] * 4, np.tri(4, 12, dtype=int), [f"c{column}" for column in range(12)])
    assert describe(many).endswith(
        "most frequent: c0 4, c1 3, c2 2, c3 1, c4 0; least frequent: c7 0, c8 0, c9 0, c10 0, c11 0"
    )
    assert describe(Records(["a.jpg"])) == "1 images (1 .jpg), unlabelled"
