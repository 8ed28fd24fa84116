"""The examples of each engine, as far as possible on a CPU, and checkpoints of a network sharded by FSDP."""

from __future__ import annotations

import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed.checkpoint as shards
import yaml
from _gloo import Processes
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import FSDPStrategy
from test_export import assert_same_features, loaded_by, trained_module, written_checkpoint
from test_processes_of_a_run import SMALL, SRUN, assert_whole, ended_well, filled, free_port, started
from timm.models.vision_transformer import Block
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from mlssl.callbacks import BackboneExport, OnlineKNN, OnlineLinearProbe, RepresentationLogger
from mlssl.commands.run import RunCLI
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.distributed import is_sharded, rank
from mlssl.export import export_backbone
from mlssl.module import MultiLabelSSLModule

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ROOT / "examples" / "engines"
CONFIG = ROOT / "examples" / "configs" / "coco_resnet50.yaml"
ON_CPU = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.sync_batchnorm", "false"]


def test_every_example_is_tried_here() -> None:
    assert {path.name for path in ENGINES.iterdir()} == {"ddp.yaml", "fsdp.yaml", "torchrun.sh", "slurm.sbatch"}


@pytest.mark.parametrize("path", sorted(ENGINES.iterdir()), ids=lambda path: path.name)
def test_an_example_opens_with_its_command_and_says_what_was_not_measured(path: Path) -> None:
    opening = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"examples/engines/{path.name}" in line for line in opening)
    assert path.suffix != ".yaml" or any("not yet measured" in line or "not been run" in line for line in opening)
    documented = (ROOT / "docs" / "devices.md").read_text()
    assert f"`examples/engines/{path.name}`" in documented


# ---------------------------------------------------------------------- DDP, torchrun, SLURM


@pytest.mark.thorough
def test_ddp_runs_on_two_processes_that_the_trainer_starts(tmp_path: Path) -> None:
    words = ["fit", "--config", str(ENGINES / "ddp.yaml"), *SMALL, *ON_CPU]
    ended_well(started(["-m", "mlssl.cli", *words], tmp_path))
    (folder,) = (tmp_path / "runs").iterdir()
    assert_whole(folder)
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["strategy"] == "ddp"


@pytest.mark.thorough
def test_torchrun_sh_runs_two_nodes(tmp_path: Path) -> None:
    port, running = str(free_port()), []
    variables = {
        "NODES": "2",
        "DEVICES": "1",
        "PORT": port,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    for node in ("0", "1"):
        where = tmp_path / f"node {node}"
        where.mkdir()
        words = [str(ENGINES / "torchrun.sh"), node, "127.0.0.1", *SMALL]
        running.append(started(words, where, program="bash", **variables))
    ended_well(*running)
    (folder,) = (tmp_path / "node 0" / "runs").iterdir()
    assert_whole(folder)
    assert not list((tmp_path / "node 1").rglob("*"))


def fake_srun(folder: Path) -> str:
    """A PATH with `srun` and `mlssl`; `srun` starts two tasks on two nodes, as SLURM does."""
    folder.mkdir()
    tasks = "\n".join(
        f"env {' '.join(f'{name}={value}' for name, value in filled(SRUN, task, 0).items() if name != 'MASTER_PORT')} "
        f'"$@" & pids="$pids $!"'
        for task in (0, 1)
    )
    (folder / "srun").write_text(f"#!/bin/bash\n{tasks}\nfor pid in $pids; do wait $pid || exit 1; done\n")
    (folder / "mlssl").write_text(f'#!/bin/bash\nexec {sys.executable} -m mlssl.cli "$@"\n')
    for program in folder.iterdir():
        program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.thorough
def test_slurm_sbatch_runs_two_nodes(tmp_path: Path) -> None:
    job = {
        "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_JOB_ID": "4242",
        "PATH": fake_srun(tmp_path / "bin"),
    }
    where = tmp_path / "work"
    ended_well(
        started([str(ENGINES / "slurm.sbatch"), *SMALL], where, program="bash", MASTER_PORT=str(free_port()), **job)
    )
    (folder,) = (where / "runs").iterdir()
    assert_whole(folder)


def script_of(heading: str) -> str:
    """The shell script below a heading of docs/elsewhere.md."""
    section = (ROOT / "docs" / "elsewhere.md").read_text().split(f"## {heading}")[1]
    return section.split("```text\n")[1].split("```")[0]


def test_the_shell_examples_pass_on_their_arguments(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("torchrun", "srun"):
        (programs / name).write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
        (programs / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}

    def said(*words: str, cwd: Path | None = None, **variables: str) -> list[str]:
        env = {**environment, **variables}
        return subprocess.check_output(
            ["bash", *words], cwd=cwd, env=env, text=True, stderr=subprocess.DEVNULL
        ).splitlines()

    words = said(str(ENGINES / "torchrun.sh"), "1", "gpu3", "--name", "two words", NODES="3", DEVICES="8")
    assert words == [
        *("--nnodes", "3", "--nproc_per_node", "8", "--node_rank", "1", "--master_addr", "gpu3"),
        *("--master_port", "29500", "-m", "mlssl.cli", "fit", "--name", "two words"),
        *("--trainer.num_nodes", "3", "--trainer.devices", "8", "--trainer.strategy", "ddp"),
    ]
    (tmp_path / "job.sh").write_text(script_of("A cluster's job"))
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    last = tmp_path / "runs" / "77" / "fit-1" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    folder = ["--data.root", "/tmp/photos"]
    for restarts, words in ((0, ["--runs", "runs/77", "--data.dataset", "folder"]), (1, ["--resume", "runs/77/fit-1"])):
        last.touch()
        printed = said("job.sh", cwd=tmp_path, SLURM_JOB_ID="77", SLURM_RESTART_COUNT=str(restarts), TMPDIR="/tmp")
        assert printed[: 2 + len(words)] == ["mlssl", "fit", *words]
        assert printed[-2:] == folder
    of_job = {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_ID": "77"}
    words = said(str(ENGINES / "slurm.sbatch"), "--name", "two words", **of_job)
    assert words == [
        *("mlssl", "fit", "--name", "two words", "--runs", "runs/77"),
        *("--trainer.num_nodes", "2", "--trainer.devices", "4", "--trainer.strategy", "ddp"),
    ]


# ---------------------------------------------------------------------- FSDP


def test_fsdp_is_built_by_the_command_up_to_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MLSSL_RUN_FOLDER", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr(CUDAAccelerator, "get_parallel_devices", staticmethod(lambda ids: [torch.device("cpu")] * 8))
    monkeypatch.setattr(CUDAAccelerator, "parse_devices", staticmethod(lambda devices: list(range(8))))
    built: list[L.Trainer] = []
    monkeypatch.setattr(RunCLI, "_run_subcommand", lambda self, _: built.append(self.trainer))
    configs = ["--config", str(CONFIG), "--config", str(ENGINES / "fsdp.yaml")]
    RunCLI(["fit", *configs, "--data.root", str(tmp_path), "--model.backbone", "test_vit"])
    (trainer,) = built
    strategy = trainer.strategy
    assert type(strategy) is FSDPStrategy
    assert strategy.kwargs["auto_wrap_policy"]._module_classes == {Block}
    assert (strategy._state_dict_type, trainer.world_size, trainer.precision) == ("full", 8, "bf16-true")
    settings = yaml.safe_load((ENGINES / "fsdp.yaml").read_text())
    assert any(isinstance(part, Block) for part in MultiLabelSSLModule("test_vit").backbone.modules())
    assert settings["model"]["backbone"].startswith("vit_")  # its blocks are timm's Block


def write_shards(whole: Path, folder: Path) -> None:
    """Half of every weight by each process, as written by FSDP, and the rest as by Lightning."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    checkpoint = torch.load(whole, weights_only=True)
    module = MultiLabelSSLModule("test_vit", projection_dim=16, predictor_dim=8, channels_last=False)
    module.load_state_dict(checkpoint.pop("state_dict"))
    mesh = init_device_mesh("cpu", (2,))
    for block in module.backbone.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    shards.save({"model": module.state_dict()}, checkpoint_id=folder)
    if rank() == 0:
        torch.save(checkpoint, folder / "meta.pt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_a_checkpoint_in_shards_of_two_processes_is_exported_and_becomes_one_file(
    tmp_path: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = trained_module("test_vit")
    whole, folder = written_checkpoint(module, tmp_path / "whole.ckpt"), tmp_path / "last.ckpt"
    processes.run(write_shards, whole, folder)
    assert len(list(folder.glob("*.distcp"))) == 2
    report = export_backbone(folder, tmp_path / "backbone.safetensors")
    assert_same_features(loaded_by(report.check), module.backbone)

    monkeypatch.setattr(sys, "argv", ["consolidate_checkpoint", str(folder)])
    runpy.run_module("lightning.pytorch.utilities.consolidate_checkpoint", run_name="__main__")
    consolidated = tmp_path / "last.ckpt.consolidated"
    loaded = MultiLabelSSLModule.load_from_checkpoint(consolidated, weights_only=True)
    expected = torch.load(whole, weights_only=True)["state_dict"]
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in expected.items())


class Sharded(FullyShardedDataParallel):
    """A network that `is_sharded` takes for a sharded one; FSDP itself cannot be built on a CPU."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


def fully_sharded() -> tuple[bool, bool]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = is_sharded(network)
    fully_shard(network[1], mesh=init_device_mesh("cpu", (2,)))
    return before, is_sharded(network)


def test_a_sharded_network_is_detected_by_its_modules_or_weights(processes: Processes) -> None:
    assert not is_sharded(nn.Sequential(nn.Linear(2, 2)))
    assert is_sharded(nn.Sequential(Sharded()))
    assert processes.run(fully_sharded) == [(False, True)] * 2


@pytest.fixture
def fit_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function from callbacks and settings of model and data to a Trainer that treats the network as sharded."""
    callbacks = [f"callbacks.{name}" for name in ("export", "knn", "networks", "representation")]
    for module in ("trainer_optimizer", *callbacks):
        monkeypatch.setattr(f"mlssl.{module}.is_sharded", lambda network: True)

    def fit(*callbacks: L.Callback, logger: Any = False, probe_train: Any = None, **model: Any) -> L.Trainer:
        data = MultiLabelDataModule(
            train=synthetic_scenes("train", size=32, count=8),
            val=synthetic_scenes("test", size=32, count=4),
            probe_train=probe_train,
            batch_size=4,
            size=32,
            num_workers=0,
        )
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=1,
            callbacks=list(callbacks),
            logger=logger,
            default_root_dir=tmp_path,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(MultiLabelSSLModule("test_resnet", projection_dim=16, predictor_dim=8, **model), data)
        return trainer

    return fit


@pytest.mark.slow
def test_callbacks_that_need_the_whole_network_skip_a_sharded_one(
    fit_sharded: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    board = WandbLogger(save_dir=tmp_path, offline=True)
    callbacks = [BackboneExport(), RepresentationLogger(), OnlineKNN(k=2, every_n_epochs=1), OnlineLinearProbe()]
    with caplog.at_level(logging.INFO):
        trainer = fit_sharded(*callbacks, logger=board)
    board.experiment.finish()
    for line in (
        "BackboneExport: no device has the whole network: export a checkpoint instead, mlssl export FILE.",
        "RepresentationLogger: nothing is logged: no device has the whole network.",
        "OnlineKNN: FSDP shards the network, and no device has all of it, so there is no kNN.",
    ):
        assert caplog.messages.count(line) == 1
    assert not (tmp_path / "exports").exists()
    assert "probe/mAP" in trainer.callback_metrics  # from the features of the steps


def test_settings_that_are_wrong_on_shards_are_refused(fit_sharded: Any) -> None:
    with pytest.raises(TypeError, match="FSDP shards the network, and no device has all of it: leave probe_train out"):
        fit_sharded(OnlineLinearProbe(), probe_train=synthetic_scenes("train", size=32, count=8))
    for settings in ({"optimizer": "lars"}, {"optimizer": "muon"}, {"decay_norm_and_bias": False}):
        with pytest.raises(
            ValueError, match="FSDP gives each device parts of them without their shape: use 'adam', 'ad"
        ):
            fit_sharded(**settings)
