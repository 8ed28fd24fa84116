"""Fixtures for all tests."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from _gloo import Processes

ROOT = Path(__file__).resolve().parent.parent
MAX_WORKERS = 4
"""Processes of `pytest -n auto` at most: each may start four more, and every one of them imports torch."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One per core, up to a few."""
    return min(MAX_WORKERS, os.cpu_count() or 1)


def pytest_configure() -> None:
    """Handle Ctrl-C even if a shell started the tests in the background: their child processes would ignore it too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out slow and thorough tests unless `-m` names their marker."""
    asked = config.getoption("markexpr")

    def is_left_out(item: pytest.Item) -> bool:
        markers = [name for name in ("thorough", "slow") if item.get_closest_marker(name)]
        return bool(markers) and markers[0] not in asked  # a slow test may have a thorough case

    config.hook.pytest_deselected(items=[item for item in items if is_left_out(item)])
    items[:] = [item for item in items if not is_left_out(item)]


@pytest.fixture(scope="session")
def corel5k() -> Path:
    """Corel-5K: real images with their words."""
    return _real_images("corel5k")


@pytest.fixture(scope="session")
def coco256() -> Path:
    """256 images of COCO 2017 in COCO's layout."""
    return _real_images("coco256")


def _real_images(name: str) -> Path:
    folder = Path(os.environ.get("MLSSL_TEST_DATA", ROOT.parent / "shared" / "data")) / name
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}: set MLSSL_TEST_DATA to a folder with corel5k/ and coco256/")
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # several wait for each other on a busy machine, and tiny networks gain nothing


@pytest.fixture(autouse=True)
def _lightning_is_heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Lightning's log does not propagate if it was imported before pytest's handler, as with older pytest.
    logger = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(logger, "propagate", True)
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(autouse=True)
def _wandb_starts_anew() -> Iterator[None]:
    # Its service outlives a run, and takes the next one's relative paths from the folder that it was started in.
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Processes that run a function in a gloo group; kept for the session, because each takes seconds to start."""
    pool = Processes(tmp_path_factory.mktemp("gloo"))
    yield pool
    pool.close()
