"""Files of a run and of exports, changed at random: read, or refused in the library's own words."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import torch
from _toy import small

from mlssl.received import check_names_no_code
from mlssl.run_folder import read_config, read_log
from mlssl.weights.checkpoints import architecture, check_resumable, load_plain

NUMBER = 200
"""Changes of each kind of file."""

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
    """Some bytes replaced, removed, repeated, or the rest cut off."""
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
    """What comes of each: "read", or the kind of error."""
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


def test_configs_and_logs(tmp_path: Path) -> None:
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
    assert outcomes(config_of, (changed_bytes(config, random_) for _ in range(NUMBER))) == {"read", "refused"}
    assert outcomes(log_of, (changed_bytes(log, random_) for _ in range(NUMBER))) == {"read", "refused"}


def test_checkpoints(tmp_path: Path) -> None:
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

    assert outcomes(read, (changed_value(content, random_) for _ in range(NUMBER))) == {"read", "refused"}
    changed = (changed_value(content, random_) for _ in range(NUMBER))
    assert outcomes(lambda one: check_resumable(one, path), changed) == {"refused"}
    torch.save(content, path)
    whole = path.read_bytes()

    def load(one: bytes) -> None:
        path.write_bytes(one)
        load_plain(path)

    assert "refused" in outcomes(load, (changed_bytes(whole, random_) for _ in range(NUMBER)))
