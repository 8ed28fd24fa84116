"""The library follows the import rules of pyproject.toml, and each rule detects a violation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def lint(folder: Path) -> str:
    """Output of import-linter on the library in `folder`, with the rules of its pyproject.toml."""
    command = [sys.executable, "-c", LINT, "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr


def test_the_library_follows_every_rule() -> None:
    assert " 0 broken." in lint(ROOT)


@pytest.mark.parametrize(
    ("file", "line", "rule", "found"),
    [
        ("heads.py", "from mlssl.module import X", "Imports only go down", "mlssl.heads -> mlssl.module"),
        ("heads.py", "def f():\n    import mlssl.module", "Imports only go down", "mlssl.heads -> mlssl.module"),
        ("heads.py", "from . import module", "Imports only go down", "mlssl.heads -> mlssl.module"),
        (
            "data/records.py",
            "from mlssl.callbacks import X",
            "Imports only go down",
            "data.records -> mlssl.callbacks",
        ),
        ("novelty.py", "", "Imports only go down", "novelty"),
        ("views/grid.py", "from .blocks import X", "No package has a circle", "mlssl.views"),
        (
            "data/readers/coco.py",
            "from .folder import X",
            "Readers are independent",
            "coco -> mlssl.data.readers",
        ),
        ("callbacks/knn.py", "from .probe import X", "Callbacks are independent", "knn -> mlssl.callbacks.probe"),
        ("heads.py", "import lightning as L", "Only the upper floors know", "mlssl.heads -> lightning"),
        ("report/page.py", "def f():\n    from lightning import X", "Only the upper", "mlssl.report.page -> lightning"),
        ("module.py", "import pytorch_lightning", "Only the upper", "mlssl.module -> pytorch_lightning"),
    ],
)
def test_each_rule_detects_a_violation(file: str, line: str, rule: str, found: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "mlssl", tmp_path / "mlssl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "mlssl" / file).open("a") as source:
        source.write(f"\n{line}\n")
    said = lint(tmp_path)
    assert any(one.startswith(rule) and "BROKEN" in one for one in said.splitlines())
    assert found in said
