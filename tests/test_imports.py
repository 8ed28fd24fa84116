"""Importing the library has no side effects: no network, no set-up of the process, nothing slow or optional."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

WATCH = """
import json, logging, os, random, sys, warnings
import lightning, numpy, torch  # what they set up for themselves is theirs

OUTWARD = ("socket.", "urllib.", "http.", "ftplib.", "subprocess.", "os.exec", "os.posix_spawn", "os.system")
opened = []
sys.addaudithook(lambda event, arguments: opened.append(event) if event.startswith(OUTWARD) else None)

def state():
    return {
        "environment": dict(os.environ),
        "warnings filters": [str(one) for one in warnings.filters],
        "root handlers": [str(one) for one in logging.root.handlers],
        "root level": logging.root.level,
        "hooks": [str(one) for one in (sys.excepthook, warnings.showwarning)],
        "threads": torch.get_num_threads(),
        "random states": [str(random.getstate()), str(numpy.random.get_state()), torch.get_rng_state().tolist()],
    }

results = []
for statement in sys.argv[1:]:
    opened.clear()
    before, modules = state(), set(sys.modules)
    exec(statement)
    after = state()
    changed = [name for name in before if before[name] != after[name]]
    results.append({"opened": list(opened), "changed": changed, "modules": sorted(set(sys.modules) - modules)})
print(json.dumps(results))
"""
TELLTALES = {
    "import socket; socket.socket().close()": "opened",
    "import subprocess; subprocess.run(['true'])": "opened",
    "os.environ['NEW'] = '1'": "environment",
    "warnings.simplefilter('error')": "warnings filters",
    "logging.basicConfig(level='INFO')": "root handlers",
    "torch.rand(1)": "random states",
}


def python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", *arguments], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


@pytest.fixture(scope="module")
def watched() -> list[dict[str, Any]]:
    """Observations of a new process while importing the library, and then at each of the violations."""
    results: list[dict[str, Any]] = json.loads(python(WATCH, "import mlssl", *TELLTALES))
    return results


def test_import_opens_no_socket_and_does_not_change_the_process(watched: list[dict[str, Any]]) -> None:
    assert watched[0]["opened"] == []
    assert watched[0]["changed"] == []


def test_import_loads_no_slow_or_optional_package(watched: list[dict[str, Any]]) -> None:
    imported = {name.partition(".")[0] for name in watched[0]["modules"]}
    assert "mlssl" in imported
    assert not imported & {"albumentations", "timm", "wandb", "matplotlib", "cv2", "sklearn", "pytorch_lightning"}


def test_the_watch_detects_each_violation(watched: list[dict[str, Any]]) -> None:
    for (statement, expected), noticed in zip(TELLTALES.items(), watched[1:], strict=True):
        assert noticed["opened"] if expected == "opened" else expected in noticed["changed"], statement
