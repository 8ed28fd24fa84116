"""Small finished runs, and a browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlssl.cli import main
from mlssl.runs import RUN_FOLDER_VARIABLE

SMALL = [
    *("--model.backbone", "test_resnet", "--model.projection_dim", "16", "--model.predictor_dim", "8"),
    *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "2", "--trainer.limit_train_batches", "3"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--trainer.precision", "32-true", "--trainer.log_every_n_steps", "1", "--trainer.limit_val_batches", "2"),
    *("--data.batch_size", "8", "--data.size", "32", "--data.eval_size", "32", "--data.num_workers", "0"),
]


@pytest.fixture(scope="session")
def fit(tmp_path_factory) -> Any:
    """A function from further words to a run folder written by `mlssl fit`."""

    def make(*words: str) -> Path:
        folder = tmp_path_factory.mktemp("report")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            for name in (RUN_FOLDER_VARIABLE, "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
                patch.setenv(name, "")
            assert main(["fit", *SMALL, *words]) == 0
        (run,) = (folder / "runs").iterdir()
        return run

    return make


@pytest.fixture(scope="session")
def drawn_run(fit) -> Path:
    """A run on drawn scenes, which have labels."""
    return fit("--name", "drawn")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """The system's Chromium, without a window."""
    from playwright import sync_api as playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine: install the package chromium to test the page in it")
    flags = [
        *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", "--disable-quic"),
    ]
    with playwright.sync_playwright() as context:
        opened = context.chromium.launch(executable_path=path, args=flags)
        yield opened
        opened.close()
