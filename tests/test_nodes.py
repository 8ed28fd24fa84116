"""Several machines: the variables of SLURM and torchrun, and two "nodes" on this machine."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only
from test_exactness import Frozen

from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.readers.synthetic import synthetic_scenes

STEPS = 6


def train(folder: Path, nodes: int) -> None:
    """Train on this node's share and save the weights in `folder`."""
    torch.set_num_threads(1)
    module = Frozen("test_resnet")
    images = synthetic_scenes("train", size=32, count=8)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=nodes,
        strategy="ddp" if nodes > 1 else "auto",
        precision="64-true",
        max_steps=STEPS,
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, MultiLabelDataModule(train=images, batch_size=4 // nodes, size=32, num_workers=0))
    torch.save(module.state_dict(), folder / f"{nodes}-{trainer.global_rank}.pt")


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training")
def test_two_nodes_by_torchrun_end_with_the_weights_of_one_device(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nnodes=2",
                "--nproc_per_node=1",
                f"--node_rank={node}",
                "--master_addr=127.0.0.1",
                f"--master_port={port}",
                __file__,
                str(tmp_path),
            ]
        )
        for node in (0, 1)
    ]
    assert [node.wait(timeout=300) for node in nodes] == [0, 0]
    train(tmp_path, nodes=1)
    expected, *found = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    for weights in found:
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-9, atol=1e-12)


def test_slurms_variables_give_every_task_its_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    variables = {
        "JOB_ID": "7", "JOB_NAME": "pretrain", "NTASKS": "4", "NTASKS_PER_NODE": "2", "NNODES": "2", "PROCID": "3",
        "LOCALID": "1", "NODEID": "1", "NODELIST": "gpu[3-4]", "JOB_NODELIST": "gpu[3-4]",
    }  # fmt: skip
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # Lightning sets it to 3, and later tests would hear nothing
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    trainer = L.Trainer(
        accelerator="cpu", devices=2, num_nodes=2, strategy="ddp", logger=False, default_root_dir=tmp_path
    )
    assert isinstance(trainer.strategy.cluster_environment, SLURMEnvironment)  # type: ignore[attr-defined]
    assert (trainer.world_size, trainer.global_rank, trainer.node_rank, trainer.local_rank) == (4, 3, 1, 1)
    data = MultiLabelDataModule(
        train=synthetic_scenes("train", size=32, count=16), batch_size=2, size=32, num_workers=0
    )
    data.trainer = trainer
    sampler = data.train_dataloader().sampler
    assert (sampler.num_replicas, sampler.rank) == (4, 3)  # type: ignore[attr-defined]


if __name__ == "__main__":
    train(Path(sys.argv[1]), nodes=2)
