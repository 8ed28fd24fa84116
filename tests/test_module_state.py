"""Checkpoints of the module: plain weights, architecture, resume; and its predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import timm
import torch
from _toy import (
    Images,
    OwnData,
    Views,
    learning_rates,
    own_network,
    small,
    trainer,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.module import MultiLabelSSLModule

# Outside a Trainer a step cannot log, and Lightning warns.
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")


def fitted(folder: Path, module: MultiLabelSSLModule, **settings: Any) -> Path:
    """Fit, save, and return the path."""
    fitting = trainer(folder, **settings)
    fitting.fit(module, OwnData())
    path = folder / "saved.ckpt"
    fitting.save_checkpoint(path)
    return path


def some_images(channels: int = 3) -> Tensor:
    return torch.stack([Images(channels=channels)[index]["image"] for index in range(3)])


def test_checkpoint_loads_as_plain_weights_and_gives_the_same_features(tmp_path: Path) -> None:
    module = small(temperature=0.25, mean=[0.4, 0.5, 0.6], backbone_kwargs={"drop_path_rate": 0.1})
    path = fitted(tmp_path, module)
    loaded = MultiLabelSSLModule.load_from_checkpoint(path, weights_only=True)
    assert dict(loaded.hparams) == dict(module.hparams)
    assert torch.equal(loaded.eval()(some_images()), module.eval()(some_images()))
    changed = MultiLabelSSLModule.load_from_checkpoint(path, weights_only=True, temperature=0.5)
    assert changed.image_aware_loss.temperature == 0.5


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_checkpoint_of_a_warm_start_does_not_read_the_pretrained_weights_again(backbone: str, tmp_path: Path) -> None:
    published = tmp_path / "published.safetensors"
    save_file(timm.create_model(backbone).state_dict(), published)
    weights = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(published)}}
    module = small(backbone, backbone_kwargs=weights)
    path = fitted(tmp_path, module)
    published.unlink()
    loaded = MultiLabelSSLModule.load_from_checkpoint(path, weights_only=True)
    assert torch.equal(loaded.eval()(some_images()), module.eval()(some_images()))


def test_a_backbone_given_as_a_network_must_be_passed_again(tmp_path: Path) -> None:
    module = small(own_network())
    assert "backbone" not in module.hparams
    path = fitted(tmp_path, module)
    with pytest.raises(ValueError, match=r"was passed as a network, .*load_from_checkpoint\(path, backbone=net\)"):
        MultiLabelSSLModule.load_from_checkpoint(path, weights_only=True)
    loaded = MultiLabelSSLModule.load_from_checkpoint(path, weights_only=True, backbone=own_network())
    assert torch.equal(loaded.eval()(some_images()), module.eval()(some_images()))


def test_run_resumes_where_it_stopped(tmp_path: Path) -> None:
    """Stop after half and resume: the same weights and learning rates as without the stop."""
    whole = small()
    rates = learning_rates(tmp_path, whole, max_epochs=4)

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.should_stop = True

    halved = small()
    saver = ModelCheckpoint(dirpath=tmp_path, filename="half")
    fitting = trainer(tmp_path, max_epochs=4, callbacks=[Stop(), saver], enable_checkpointing=True)
    fitting.fit(halved, DataLoader(Views(), batch_size=2))
    assert fitting.global_step == 8
    resumed = small()
    path = saver.best_model_path

    class Note(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            second_half.append([group["lr"] for group in optimizer.param_groups])

    second_half: list[list[float]] = []
    going_on = trainer(tmp_path, max_epochs=4, callbacks=[Note(), saver], enable_checkpointing=True)
    going_on.fit(resumed, DataLoader(Views(), batch_size=2), ckpt_path=path, weights_only=True)
    assert second_half == rates[8:]
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_the_prefix_of_compiled_networks_is_neither_saved_nor_required() -> None:

    class Compiled(nn.Module):
        """The names that torch.compile produces, without its slow import."""

        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self._orig_mod = network

    module = small()
    plain = module.state_dict()
    compiled = small()
    compiled.backbone, compiled.projector = Compiled(compiled.backbone), Compiled(compiled.projector)
    assert any("_orig_mod." in name for name in compiled.state_dict())

    checkpoint = {"state_dict": compiled.state_dict()}
    compiled.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == plain.keys()

    checkpoint = {"state_dict": dict(plain)}
    compiled.on_load_checkpoint(checkpoint)
    compiled.load_state_dict(checkpoint["state_dict"])
    torch.testing.assert_close(compiled.backbone._orig_mod.state_dict(), module.backbone.state_dict())

    checkpoint = {"state_dict": compiled.state_dict()}  # as from another program, with prefixes
    small().on_load_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == plain.keys()


def test_prediction_gives_the_features_of_whole_images(tmp_path: Path) -> None:
    module = small()
    predicted = trainer(tmp_path).predict(module, OwnData())
    assert predicted is not None
    assert [len(features) for features in predicted] == [4, 2]
    expected = module.eval()(torch.stack([Images()[index]["image"] for index in range(6)]))
    torch.testing.assert_close(torch.cat(predicted), expected, rtol=1e-4, atol=1e-5)
    images_alone = DataLoader([image / 255 for image in some_images()], batch_size=3)
    (features,) = trainer(tmp_path).predict(module, images_alone)
    torch.testing.assert_close(features, expected[:3], rtol=1e-4, atol=1e-5)


def test_evaluation_does_not_change_weights_or_statistics(tmp_path: Path) -> None:
    module = small()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for evaluate in (trainer(tmp_path).validate, trainer(tmp_path).test):
        evaluate(module, DataLoader(Images(), batch_size=3), verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on machines with fewer than three cores
def test_weights_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    def weights(workers: int) -> dict[str, Tensor]:
        module = small()
        records = synthetic_scenes(size=64, count=12)
        data = MultiLabelDataModule(train=records, batch_size=4, size=32, num_workers=workers)
        trainer(tmp_path, max_epochs=2).fit(module, data)
        return module.state_dict()

    alone, one, three = (weights(workers) for workers in (0, 1, 3))
    assert any(not torch.equal(alone[name], value) for name, value in small().state_dict().items())
    assert all(torch.equal(alone[name], one[name]) and torch.equal(alone[name], three[name]) for name in alone)
