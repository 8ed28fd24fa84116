"""Callbacks that evaluate another submodule than the backbone, such as a momentum teacher."""

from __future__ import annotations

import copy
import csv
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from mlssl.callbacks import BackboneExport, BatchNormStatistics, CollapseMonitor, OnlineKNN, OnlineLinearProbe
from mlssl.callbacks.networks import NetworkCallback
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.evaluation.collapse import collapse_measures
from mlssl.evaluation.features import extract_features
from mlssl.evaluation.metrics import mean_average_precision
from mlssl.module import MultiLabelSSLModule
from mlssl.runs import run_settings

Make = Callable[..., Any]


class WithTeacher(MultiLabelSSLModule):
    """A frozen copy of the backbone that moves a little towards it at every step."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.teacher = nn.Sequential(copy.deepcopy(self.backbone)).requires_grad_(False)

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.backbone.parameters(), strict=True):
                slow.lerp_(fast, 0.5)


@pytest.fixture
def make_pair() -> Make:
    """A function from settings to a module with a backbone and a teacher, D = 12."""

    def make(dropout: float = 0.1, **settings: Any) -> WithTeacher:
        torch.manual_seed(0)
        convolution = [nn.Conv2d(3, 12, 5, stride=3), nn.BatchNorm2d(12), nn.ReLU()]
        backbone = nn.Sequential(*convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout))
        return WithTeacher(**{"backbone": backbone, "projection_dim": 16, "predictor_dim": 8, **settings})

    return make


class Named:
    """`normalize` of a module with one of its networks as the backbone."""

    def __init__(self, module: Any, network: str) -> None:
        self.backbone, self.normalize = module.get_submodule(network), module.normalize


def test_a_probe_of_the_teacher_runs_next_to_that_of_the_backbone(
    make_pair: Make, make_data: Make, make_trainer: Make
) -> None:
    model, data, probe = make_pair(base_lr=1.0), make_data(), OnlineLinearProbe(network="teacher.0")
    trainer = make_trainer(OnlineLinearProbe(), probe)
    trainer.fit(model, data)
    logged = trainer.callback_metrics
    names = {"probe/mAP", "probe/teacher.0/mAP", "probe/loss", "probe/teacher.0/loss", "probe/teacher.0/classes"}
    assert names <= logged.keys()
    features, state = extract_features(Named(model, "teacher.0"), data.val_dataloader()), probe.state_dict()
    inputs = ((features.features - state["mean"]) / state["variance"].sqrt()).clamp(-10, 10)
    expected, _ = mean_average_precision(inputs @ state["weight"].T + state["bias"], features.labels)
    assert logged["probe/teacher.0/mAP"].item() == pytest.approx(expected, abs=1e-6)
    assert not torch.equal(state["weight"], trainer.callbacks[0].state_dict()["weight"])


def test_the_probe_of_a_network_learns_from_its_features_of_the_views(
    make_pair: Make, make_data: Make, make_trainer: Make
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Watched(OnlineLinearProbe):
        def _probe_for(self, features: Tensor, labels: Tensor, images: str) -> Any:
            if images == "training images":
                seen.append((features, labels))
            return super()._probe_for(features, labels, images)

    class Expect(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            network = copy.deepcopy(pl_module.teacher).eval()
            rows = network(pl_module.normalize(batch["views"].flatten(0, 2))).view(4, -1, 12).mean(dim=1)
            torch.testing.assert_close(seen[-1][0], rows)
            assert torch.equal(seen[-1][1], batch["labels"])

    make_trainer(Watched(network="teacher"), Expect()).fit(make_pair(), make_data())
    assert len(seen) == 8


@pytest.mark.parametrize("own_set", [False, True])
def test_stopping_and_resuming_two_probes_equals_the_uninterrupted_run(
    own_set: bool, make_pair: Make, make_data: Make, make_trainer: Make
) -> None:
    def data() -> Any:
        return make_data(probe_train=synthetic_scenes("train", size=32, count=9, seed=5) if own_set else None)

    def probes() -> list[OnlineLinearProbe]:
        return [OnlineLinearProbe(), OnlineLinearProbe(network="teacher")]

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "half.ckpt")
            trainer.should_stop = True

    whole, resumed = probes(), probes()
    straight = make_trainer(*whole)
    straight.fit(make_pair(dropout=0.0), data())
    half = make_trainer(*probes(), Stop())
    half.fit(make_pair(dropout=0.0), data())
    path = Path(half.default_root_dir) / "half.ckpt"
    saved = torch.load(path, weights_only=True)["callbacks"]
    assert {"OnlineLinearProbe", "OnlineLinearProbe(teacher)"} <= saved.keys()
    second = make_trainer(*resumed)
    second.fit(make_pair(dropout=0.0), data(), ckpt_path=path)
    for name in ("probe/mAP", "probe/teacher/mAP"):
        assert second.callback_metrics[name] == straight.callback_metrics[name]
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(one.state_dict()["weight"], other.state_dict()["weight"])


def test_knn_of_the_teacher_uses_its_features(make_pair: Make, make_data: Make, make_trainer: Make) -> None:
    model = make_pair(base_lr=1.0)
    trainer = make_trainer(OnlineKNN(k=3, every_n_epochs=2, network="teacher"), OnlineKNN(k=3, every_n_epochs=2))
    trainer.fit(model, make_data())
    swapped = make_pair()
    swapped.backbone = model.teacher
    again = make_trainer(OnlineKNN(k=3)).validate(swapped, make_data(), verbose=False)
    assert trainer.callback_metrics["knn/teacher/mAP"].item() == pytest.approx(again[0]["knn/mAP"], abs=1e-5)
    assert {"knn/mAP", "knn/classes", "knn/teacher/classes"} <= trainer.callback_metrics.keys()


def test_the_collapse_of_a_network_is_measured_on_its_features(
    make_pair: Make, make_data: Make, make_trainer: Make
) -> None:
    batches: list[tuple[Any, Any]] = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            batches.append((batch["views"], copy.deepcopy(pl_module).eval()))

    trainer = make_trainer(
        CollapseMonitor(), CollapseMonitor(network="teacher", min_std=0), Keep(), log_every_n_steps=3
    )
    trainer.fit(make_pair(), make_data())
    rows = csv.DictReader((Path(trainer.default_root_dir) / "metrics.csv").read_text().splitlines())
    logged = [row for row in rows if row["collapse/teacher/std"]]
    assert [row["step"] for row in logged] == ["2", "5"]
    for row in logged:
        views, model = batches[int(row["step"])]
        with torch.no_grad():
            features = model.teacher(model.normalize(views.flatten(0, 2))).view(*views.shape[:3], -1)
        for name, value in collapse_measures(features).items():
            assert float(row[f"collapse/teacher/{name}"]) == pytest.approx(value.item(), rel=1e-4, abs=1e-5)
            assert float(row[f"collapse/{name}"]) != float(row[f"collapse/teacher/{name}"])


def test_a_collapsed_network_is_named(make_pair: Make, make_data: Make, make_trainer: Make) -> None:
    model = make_pair()
    model.teacher[0][0].weight.data.zero_()
    model.on_train_batch_end = lambda *_: None
    with pytest.warns(UserWarning, match="collapsing at step 2: the features of teacher of all images"):
        make_trainer(CollapseMonitor(network="teacher")).fit(model, make_data())


def test_the_teacher_is_exported_under_its_name(make_pair: Make, make_data: Make, make_trainer: Make) -> None:
    model = make_pair(backbone="test_resnet", base_lr=1.0)
    trainer = make_trainer(
        BackboneExport(), BackboneExport(every_n_epochs=1, network="teacher.0"), max_epochs=1, limit_val_batches=0
    )
    trainer.fit(model, make_data())
    folder = Path(trainer.default_root_dir) / "exports"
    names = ["backbone.safetensors", "teacher.0-epoch=00.safetensors", "teacher.0.safetensors"]
    assert sorted(file.name for file in folder.iterdir()) == names
    for name, network in (("backbone", model.backbone), ("teacher.0", model.teacher[0])):
        written = safetensors.torch.load_file(folder / f"{name}.safetensors")
        assert all(torch.equal(value, written[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("callback", [OnlineLinearProbe, CollapseMonitor], ids=lambda one: one.__name__)
def test_flags_buffers_and_random_state_of_the_network_do_not_change(
    callback: Any, make_pair: Make, make_data: Make, make_trainer: Make
) -> None:
    def state(model: L.LightningModule) -> Any:
        flags = [module.training for module in model.modules()]
        return flags, [buffer.tolist() for buffer in model.buffers()], torch.get_rng_state().tolist()

    class Watched(callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            before = state(pl_module)
            super().on_train_batch_end(trainer, pl_module, *args)
            assert state(pl_module) == before

    make_trainer(Watched(network="teacher"), log_every_n_steps=1).fit(make_pair(), make_data())


@pytest.mark.parametrize(
    "make",
    [OnlineLinearProbe, OnlineKNN, CollapseMonitor, BackboneExport, BatchNormStatistics],
    ids=lambda one: one.__name__,
)
def test_an_unknown_submodule_is_refused_before_training_and_the_nearest_suggested(
    make: Any, make_pair: Make, make_data: Make, make_trainer: Make
) -> None:
    model = make_pair()
    model.training_step = lambda *_: pytest.fail("training has begun")
    message = rf"{make.__name__}\(network='techer'\): WithTeacher has no such submodule: pass the name of .* 'teacher'"
    with pytest.raises(ValueError, match=message):
        make_trainer(make(network="techer")).fit(model, make_data())
    with pytest.raises(ValueError, match="network='' was given: pass the name of a submodule"):
        make(network="")


def test_a_module_that_cannot_normalise_is_refused(make_data: Make, make_trainer: Make) -> None:
    class Own(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Linear(1, 1)

        def training_step(self, batch: Any, batch_idx: int) -> None: ...
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters())

    with pytest.raises(TypeError, match=r"OnlineLinearProbe\(network='teacher'\): Own has no `normalize`"):
        make_trainer(OnlineLinearProbe(network="teacher")).fit(Own(), make_data(val=None))


def test_a_submodule_that_returns_no_features_is_refused(make_pair: Make, make_data: Make, make_trainer: Make) -> None:
    with pytest.raises(ValueError, match=r"returns \(16, 12, 4, 4\): pass the name of one that maps images"):
        make_trainer(OnlineLinearProbe(network="teacher.0.0")).fit(make_pair(), make_data())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (OnlineLinearProbe, "The probe is on 'teacher', but FSDP shards the network.*probe only the backbone"),
        (CollapseMonitor, "CollapseMonitor measures 'teacher', but FSDP shards the network.*measure the backbone"),
    ],
)
def test_a_sharded_network_is_refused(
    make: Any, message: str, make_pair: Make, make_data: Make, make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlssl.callbacks.networks.is_sharded", lambda _network: True)
    with pytest.raises(TypeError, match=message):
        make_trainer(make(network="teacher")).fit(make_pair(), make_data())


def test_a_line_is_printed_once_and_names_the_network(caplog: pytest.LogCaptureFixture) -> None:
    callback = NetworkCallback("teacher")
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            callback.say("nothing is done.")
    assert caplog.messages == ["NetworkCallback of teacher: nothing is done."]


def test_a_run_keeps_its_callbacks_of_the_backbone_next_to_those_of_a_teacher(tmp_path: Path) -> None:
    given = [OnlineLinearProbe(network="teacher"), BackboneExport(network="teacher")]
    callbacks = run_settings(tmp_path, {"callbacks": given, "accelerator": "cpu"})["callbacks"]
    networks = [(type(one).__name__, one.network) for one in callbacks if isinstance(one, NetworkCallback)]
    for name in ("OnlineLinearProbe", "BackboneExport"):
        assert [network for of, network in networks if of == name] == ["teacher", "backbone"]
