"""Untrusted files: nothing is imported, run or downloaded, and errors are one sentence."""

from __future__ import annotations

import io
import os
import socket
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from _toy import small
from commands.test_run import DATA, MODEL, TRAINER
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mlssl.cli import main
from mlssl.export import export_backbone
from mlssl.module import MultiLabelSSLModule
from mlssl.received import check_downloads_nothing, check_names_no_code, check_statistics
from mlssl.report.run import write_report
from mlssl.runs import RUN_FOLDER_VARIABLE
from mlssl.weights.checkpoints import check_content, check_resumable
from mlssl.weights.sources import open_backbone

INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
CODE = {
    "class_path": "torch.fx.graph_module.reduce_graph_module",
    "init_args": {
        "body": {"_code": "def forward(self):return 1\n"},
        "import_block": "import pathlib; pathlib.Path('PWNED').touch()\n",
    },
}
"""Plain values by which jsonargparse runs Python."""

CONFIG = """seed_everything: 0
model: {backbone: test_resnet, projection_dim: 16, predictor_dim: 4}
trainer: {}
data: {dataset: synthetic, batch_size: 8, size: 32, eval_size: 32, num_workers: 0}
"""


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working folder, without network access."""

    before = set(threading.enumerate())  # an earlier test's threads may still be running

    def refused(*_: object) -> None:
        if threading.current_thread() not in before - {threading.main_thread()}:
            Path("FETCHED").touch()
        raise OSError("no network in this test")

    monkeypatch.chdir(tmp_path)
    for name in (RUN_FOLDER_VARIABLE, "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "")
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    yield
    assert not Path("PWNED").exists()
    assert not Path("FETCHED").exists()


def received(changes: dict[str, Any] | None = None, **entries: Any) -> Path:
    """A run's folder with other hyper-parameters and other entries in its checkpoint."""
    module = small()
    run = Path("theirs")
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    content = {
        "state_dict": module.state_dict(),
        "hyper_parameters": {**module.hparams, **(changes or {})},
        "pytorch-lightning_version": L.__version__,
        **entries,
    }
    torch.save(content, run / "checkpoints" / "last.ckpt")
    (run / "config.yaml").write_text(CONFIG)
    (run / "metrics.csv").write_text("epoch,step,train/loss\n0,1,2.5\n")
    return run


COMMANDS = [
    ["fit", "--ckpt_path", "theirs/checkpoints/last.ckpt"],
    ["fit", "--resume", "theirs"],
    ["validate", "--ckpt_path", "theirs/checkpoints/last.ckpt"],
    ["test", "--ckpt_path", "theirs/checkpoints/last.ckpt"],
    ["predict", "theirs/checkpoints/last.ckpt", "."],
    ["export", "theirs/checkpoints/last.ckpt", "-o", "out.safetensors"],
    ["linear", "theirs/checkpoints/last.ckpt"],
    ["knn", "theirs/checkpoints/last.ckpt"],
    ["views", "a.png", "--backbone", "theirs/checkpoints/last.ckpt"],
]


def error_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error line of a command that ends with exit code 2."""
    given = [*TRAINER, *DATA] if words[0] in ("fit", "validate", "test") else []
    assert main([*words, *given]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("mlssl: error:")]
    return line


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("changes", [{"backbone": CODE}, {"backbone_kwargs": {"norm_layer": [CODE]}}], ids=["", "deep"])
def test_a_checkpoint_that_names_code_runs_none(
    words: list[str], changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    received({"_instantiator": INSTANTIATOR, **changes})
    if words[0] == "views":
        from PIL import Image

        Image.new("RGB", (64, 64)).save("a.png")
    if words[1] == "--resume" or (words[0] == "fit" and "--ckpt_path" in words):
        assert "has no loops" in error_of(words, capsys)
    elif words[0] in ("validate", "test") or "norm_layer" in str(changes):
        assert "name code to import (" in error_of(words, capsys)
    else:
        assert "does not name its backbone" in error_of(words, capsys)


def test_the_report_of_a_received_run_runs_no_code() -> None:
    for changes in ({"backbone": CODE}, {"backbone_kwargs": {"block": CODE}}):
        text = write_report(received({"_instantiator": INSTANTIATOR, **changes})).read_text()
        assert "Only the log is shown, because the network cannot be rebuilt" in text


def test_start_from_accepts_weights_only() -> None:
    received({"_instantiator": INSTANTIATOR, "backbone": CODE})
    words = [*MODEL, *TRAINER, *DATA, "--model.predictor_dim", "4", "--trainer.max_epochs", "1"]
    assert main(["fit", *words, "--start_from", "theirs/checkpoints/last.ckpt"]) == 0


class Layered(MultiLabelSSLModule):
    """Takes a layer, which a parser would build from its import path."""

    def __init__(self, layer: nn.Module | None = None, **settings: Any) -> None:
        super().__init__("test_resnet", projection_dim=16, predictor_dim=4)
        self.layer_name = layer


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["hyper_parameters", "hparams", "module_arguments"])
def test_load_from_checkpoint_imports_nothing(entry: str) -> None:
    path = received() / "checkpoints" / "last.ckpt"
    for values in ({"_instantiator": INSTANTIATOR, "backbone": CODE}, {"_instantiator": "os.system"}):
        received(**{entry: values})
        for source in (path, str(path), io.BytesIO(path.read_bytes())):
            with pytest.raises(ValueError, match=r"The hyper-parameters of .* name code to import \('.*'\)"):
                MultiLabelSSLModule.load_from_checkpoint(source)
    # LightningCLI's own mark is passed over, and text stays text.
    received(**{entry: {"_instantiator": INSTANTIATOR, "layer": "torch.nn.Identity"}})
    if entry == "hyper_parameters":
        assert Layered.load_from_checkpoint(path).layer_name == "torch.nn.Identity"
    received({"backbone": CODE})
    assert MultiLabelSSLModule.load_from_checkpoint(path, backbone="test_resnet").hparams["backbone"] == "test_resnet"
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        small().load_from_checkpoint(path)


def test_load_from_checkpoint_checks_a_hyper_parameter_file_too() -> None:
    path = received() / "checkpoints" / "last.ckpt"
    Path("hparams.yaml").write_text(f"_instantiator: {INSTANTIATOR}\n")
    with pytest.raises(ValueError, match="name code to import"):
        MultiLabelSSLModule.load_from_checkpoint(path, hparams_file="hparams.yaml")


REMOTE = [
    {"backbone": "hf-hub:timm/resnet18.a1_in1k"},
    {"backbone": "hf_hub:timm/resnet18.a1_in1k"},
    {"backbone_kwargs": {"pretrained": True}},
    {"backbone_kwargs": {"checkpoint_path": "theirs/more.pth"}},
    {"backbone_kwargs": {"weights": "DEFAULT"}},
    {"backbone_kwargs": {"pretrained_cfg_overlay": {"url": "https://host/weights.pth"}}},
    {"backbone_kwargs": {"pretrained_cfg": {"file": "theirs/more.pth"}}},
    {"backbone_kwargs": {"block": ["http://host/x"]}},
]


@pytest.mark.parametrize("changes", REMOTE, ids=str)
def test_a_received_checkpoint_downloads_nothing(changes: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    path = received(changes) / "checkpoints" / "last.ckpt"
    for words in COMMANDS[2:3] + COMMANDS[5:7]:
        line = error_of(words, capsys)
        assert "which may cause a download, so nothing was downloaded: if you trust it, pass backbone" in line
    with pytest.raises(ValueError, match=r"last\.ckpt asks for backbone.* which may cause a download"):
        MultiLabelSSLModule.load_from_checkpoint(path)
    assert "Only the log is shown, because" in write_report(Path("theirs")).read_text()


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18", "https://host/a"])
def test_a_received_export_downloads_nothing_and_names_no_code(name: str) -> None:
    export_backbone(small(), "out.safetensors")
    with safe_open("out.safetensors", framework="pt") as file:
        header = file.metadata()
    tensors = load_file("out.safetensors")
    wrong = {
        "which may cause a download": {"backbone": name},
        "name code to import": {"arguments": '{"norm_layer": {"class_path": "os.system"}}'},
        "asks for backbone_kwargs with 'pretrained'": {"arguments": '{"pretrained": true}'},
        "has std=\\[0, 1, 1\\], where one finite number per channel": {"std": "[0, 1, 1]"},
        "has std=\\[-1": {"std": "[-1, 1, 1]"},
        "has mean=\\[nan": {"mean": "[NaN, 1, 1]"},
        "has mean='text'": {"mean": '"text"'},
        "has 2 numbers as mean, and its backbone takes 3 channels": {"mean": "[0.5, 0.5]"},
        "The entry 'std' in the header of .* is missing or not JSON: export it again": {"std": "["},
        "are 3, not a mapping from names": {"arguments": "3"},
        "cannot be built: Backbone 'test_resnet' does not take 'x'": {"arguments": '{"x": 1}'},
        "cannot be built: Unknown backbone 'none'": {"backbone": "none"},
    }
    for message, changes in wrong.items():
        save_file(tensors, "changed.safetensors", {**header, **changes})
        with pytest.raises(ValueError, match=message):
            open_backbone("changed.safetensors")


@pytest.mark.slow
def test_the_report_downloads_only_with_trust() -> None:
    run = received()
    text = write_report(run, max_images=8).read_text()
    assert "only the log is shown" not in text
    (run / "config.yaml").write_text(CONFIG.replace("synthetic", "shards, root: 'https://host/photos'"))
    text = write_report(run, max_images=8).read_text()
    assert "the report does not fetch unless you pass --trust true" in text
    (run / "config.yaml").write_text(CONFIG.replace("dim: 4}", "dim: 4, backbone_kwargs: {pretrained: true}}"))
    text = write_report(run, max_images=8).read_text()
    assert "the report reads only if you pass --trust true" in text


def test_values_without_a_bound_are_refused() -> None:
    deep: list[Any] = []
    for _ in range(101):
        deep = [deep]
    wide: list[Any] = [0]
    for _ in range(40):
        wide = [wide, wide]
    endless: list[Any] = []
    endless.append(endless)
    for values in (deep, wide, endless):
        with pytest.raises(ValueError, match=r"of a\.ckpt are nested more than 100 deep or have more than 1,000,000"):
            check_names_no_code({"sizes": values}, "a.ckpt")
    check_downloads_nothing({"backbone": "resnet18.a1_in1k", "pretrained": True, "k": {"pretrained": False}}, "a.ckpt")
    check_statistics(None, (0.1, 1), "a.ckpt")


# ---------------------------------------------------------------------- damaged files


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in (RUN_FOLDER_VARIABLE, "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(name, "")
        words = [*MODEL, *TRAINER, *DATA, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]
        assert main(["fit", *words]) == 0
    (run,) = (folder / "runs").iterdir()
    return run


@pytest.fixture
def run(whole_run: Path) -> Path:
    """A copy of that run."""
    import shutil

    return Path(shutil.copytree(whole_run, "run"))


ALL = [
    ["fit", "--resume", "run"],
    ["fit", "--ckpt_path", "run/checkpoints/last.ckpt"],
    ["fit", "--start_from", "run/checkpoints/last.ckpt"],
    ["validate", "--ckpt_path", "run/checkpoints/last.ckpt"],
    ["report", "run"],
    ["export", "run/checkpoints/last.ckpt", "-o", "out.safetensors"],
    ["linear", "run/checkpoints/last.ckpt"],
]


class Code:
    """Pickled, it would run code when opened."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("PWNED",)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_reported_by_every_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoints" / "last.ckpt"
    good = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda one: one.file_size)
    flipped = bytearray(good)
    flipped[good.index(entry.filename.encode()) + len(entry.filename) + 200] ^= 1
    torch.save({"a": Code()}, "code.ckpt")
    torch.save({"a": 1}, "other.ckpt")
    contents = {
        "last.ckpt is not a checkpoint or is damaged: give a .ckpt": (good[: len(good) // 2], b""),
        "last.ckpt is damaged, the checksum of": (bytes(flipped),),
        "contains pickled Python objects, which could run any code when opened, and was refused (it names ": (
            Path("code.ckpt").read_bytes(),
        ),
        "last.ckpt has no state_dict, so it is not a Trainer checkpoint": (Path("other.ckpt").read_bytes(),),
    }
    for message, files in contents.items():
        for content in files:
            path.write_bytes(content)
            for words in ALL:
                line = error_of(words, capsys)
                lacks = "has no weights of backbone" in line and "no state_dict" in message
                assert message in line or lacks, (words, line)
                assert "weights_only" not in line


def test_weights_alone_point_to_start_from(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    for name in ("callbacks", "optimizer_states", "lr_schedulers"):
        del content[name]
    torch.save(content, path)
    for words in ALL[:2]:
        assert (
            "has no callbacks, optimizer_states, lr_schedulers, so no run can resume from it: start a new run from "
            in (error_of(words, capsys))
        )
    assert "--start_from run/checkpoints/last.ckpt" in error_of(ALL[0], capsys)


def test_a_state_that_does_not_fit_is_reported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "loops": {}}, path)
    assert "run/checkpoints/last.ckpt does not give the number of steps of its run" in error_of(ALL[0], capsys)
    torch.save({**content, "optimizer_states": [{}]}, path)
    assert "run/checkpoints/last.ckpt cannot be resumed (" in error_of(ALL[0], capsys)


def test_entries_of_a_wrong_type_are_reported() -> None:
    with pytest.raises(ValueError, match=r"The entry 'metrics' of a\.ckpt does not have the Trainer's format"):
        check_content({"state_dict": {}, "metrics": {"a": "b"}}, Path("a.ckpt"))
    for name, value in (("hyper_parameters", 3), ("backbone", [1]), ("loops", []), ("global_step", "1")):
        with pytest.raises(ValueError, match=f"The entry '{name}' of a"):
            check_content({"state_dict": {}, name: value}, Path("a.ckpt"))
    for state in ({1: torch.zeros(1)}, {"a": 1}):
        with pytest.raises(ValueError, match="The entry 'state_dict' of a"):
            check_content({"state_dict": state}, Path("a.ckpt"))
    with pytest.raises(
        ValueError, match="has no loops, callbacks, optimizer_states, lr_schedulers, so no run can resume"
    ):
        check_resumable({"state_dict": {"x_extra_state": None}}, Path("a.ckpt"))


def test_a_truncated_config_is_reported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (run / "config.yaml").read_text()
    changed = {
        "config.yaml": [
            text[:900],
            text[: text.index("model:")],
            "",
            text.replace("seed_everything: 0", "seed_everything: x"),
        ],
    }
    for part in ("model", "data", "trainer"):
        changed["config.yaml"].append(f"{CONFIG}\n{part}: 3\n")
    for content in changed["config.yaml"]:
        (run / "config.yaml").write_text(content)
        for words in (ALL[0], ALL[4]):
            assert "config.yaml" in error_of(words, capsys)
    (run / "config.yaml").write_text(CONFIG.replace("size: 32", "size: [x]", 1))
    assert "config.yaml are not those of a run (" in error_of(ALL[4], capsys)


def test_a_flipped_bit_of_an_export_is_detected() -> None:
    export_backbone(small(), "out.safetensors")
    content = bytearray(Path("out.safetensors").read_bytes())
    content[-5] ^= 1
    Path("out.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"out\.safetensors is damaged, the checksum in its header does not match its"):
        open_backbone("out.safetensors")
