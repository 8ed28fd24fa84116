"""Randomly changed files of runs and exports: read, or refused with a message of the library."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from _toy import small
from safetensors import safe_open
from safetensors.torch import save_file

from mlssl.export import export_backbone
from mlssl.received import check_names_no_code
from mlssl.run_folder import read_config, read_log
from mlssl.weights.checkpoints import architecture, check_resumable, load_plain
from mlssl.weights.sources import open_backbone

NUMBERS = [50, pytest.param(300, marks=pytest.mark.thorough)]
"""Of each of seven kinds: 350 inputs in every run, 2,100 by `pytest -m thorough tests/test_mutated_runs.py`."""

VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1e300,
    float("nan"),
    "",
    "x",
    "hf-hub:a",
    [],
    [0],
    [[1]],
    {},
    {"class_path": "a"},
]


def changed_bytes(content: bytes, random_: random.Random) -> bytes:
    """Some bytes replaced, removed, repeated, or the rest truncated."""
    start, length = random_.randrange(len(content)), random_.randrange(1, 20)
    end = start + length
    kind = random_.randrange(4)
    if kind == 0:
        return content[:start]
    middle = [b"", content[start:end] * 2, random_.randbytes(length)][kind - 1]
    return content[:start] + middle + content[end:]


def changed_value(value: Any, random_: random.Random) -> Any:
    """One value at any depth replaced."""
    if not isinstance(value, (dict, list)) or not value or random_.random() < 0.2:
        return random_.choice(VALUES)
    if isinstance(value, list):
        index = random_.randrange(len(value))
        return [changed_value(one, random_) if i == index else one for i, one in enumerate(value)]
    name = random_.choice(list(value))
    if random_.random() < 0.1:
        return {key: one for key, one in value.items() if key != name}
    return {**value, name: changed_value(value[name], random_)}


def outcomes(read: Any, inputs: Any) -> set[str]:
    """Outcome of each: "read", or the kind of error."""
    found, said = set(), []
    for one in inputs:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                read(one)
            found.add("read")
        except ValueError as error:
            said.append(error)
            found.add("refused")
    for error in said:
        assert type(error) is ValueError, repr(error)
        assert len(str(error)) > 20
        assert " weights_only" not in str(error)
    return found


@pytest.mark.parametrize("number", NUMBERS)
def test_configs_and_logs(number: int, tmp_path: Path) -> None:
    random_ = random.Random(0)
    config = b"seed_everything: 0\nmodel: {backbone: a, x: [1, 2]}\ndata: {size: 3}\ntrainer: &a\n  b: 1\n  c: *a\n"
    log = b"epoch,step,train/loss\r\n" + b"".join(b"0,%d,1.5\r\n" % step for step in range(20))

    def config_of(content: bytes) -> None:
        (tmp_path / "config.yaml").write_bytes(content)
        read_config(tmp_path)

    def log_of(content: bytes) -> None:
        (tmp_path / "metrics.csv").write_bytes(content)
        read_log(tmp_path)

    config = config.replace(b"  c: *a\n", b"  c: 2\n")
    assert outcomes(config_of, (changed_bytes(config, random_) for _ in range(number))) == {"read", "refused"}
    assert outcomes(log_of, (changed_bytes(log, random_) for _ in range(number))) == {"read", "refused"}


@pytest.mark.parametrize("number", NUMBERS)
def test_checkpoints(number: int, tmp_path: Path) -> None:
    random_ = random.Random(0)
    module, path = small(), tmp_path / "a.ckpt"
    plain = json.loads(json.dumps(dict(module.hparams)))
    content = {
        "hyper_parameters": {**plain, "backbone_kwargs": {"in_chans": 3}},
        "backbone": {"name": "test_resnet", "arguments": {"in_chans": 3}, "mean": [0.5, 0.5], "std": [0.5, 0.5]},
        "state_dict": {"backbone.weight": torch.zeros(2)},
        "loops": {"fit_loop": {"epoch_loop.batch_progress": {"total": {"completed": 1, "ready": 1}}}},
        "global_step": 3,
    }

    def read(one: Any) -> None:
        architecture(one, path)
        check_names_no_code(one.get("hyper_parameters"), path)

    assert outcomes(read, (changed_value(content, random_) for _ in range(number))) == {"read", "refused"}
    changed = (changed_value(content, random_) for _ in range(number))
    assert outcomes(lambda one: check_resumable(one, path), changed) == {"refused"}
    torch.save(content, path)
    whole = path.read_bytes()

    def load(one: bytes) -> None:
        path.write_bytes(one)
        load_plain(path)

    assert "refused" in outcomes(load, (changed_bytes(whole, random_) for _ in range(number)))


@pytest.mark.parametrize("number", NUMBERS)
def test_exports(number: int, tmp_path: Path) -> None:
    """Values in the header of an export, JSON as text, and bytes of the file."""
    random_, path = random.Random(0), tmp_path / "a.safetensors"
    export_backbone(small(), path)
    whole = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        header = {**file.metadata(), "arguments": json.dumps({"in_chans": 3}), "std": json.dumps([0.5, 0.5, 0.5])}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    plain = {name: parsed(text) for name, text in header.items()}

    def with_header(one: Any) -> None:
        values = one if isinstance(one, dict) else {"backbone": one}
        text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
        save_file(tensors, path, metadata=text)
        open_backbone(str(path))

    def with_bytes(one: bytes) -> None:
        path.write_bytes(one)
        open_backbone(str(path))

    assert outcomes(with_header, (changed_value(plain, random_) for _ in range(number))) == {"read", "refused"}
    assert "refused" in outcomes(with_bytes, (changed_bytes(whole, random_) for _ in range(number)))


def parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
