"""Help, the version and a misspelt command import no large package, in a separate process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlssl.cli import main
from mlssl.commands.parsing import COMMANDS
from mlssl.commands.trainer_help import TRAINER_HELP

HEAVY = {
    "torch",
    "lightning",
    "timm",
    "torchvision",
    "torchmetrics",
    "albumentations",
    "matplotlib",
    "wandb",
    "sklearn",
}
PROGRAM = """
import json, sys
from mlssl.cli import main
try:
    main(sys.argv[1:])
finally:
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def modules_of(words: list[str], **settings) -> set[str]:
    """Top-level modules that a process has imported by the time it has run the command."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, **settings)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--help"],
        ["--version"],
        ["fitt"],
        ["views", "--sise", "3"],
        ["completion", "bash"],
        *([command, "--help"] for command in (*COMMANDS, *TRAINER_HELP)),
    ],
    ids=" ".join,
)
def test_help_and_errors_import_no_large_package(words: list[str]) -> None:
    modules = modules_of(words)
    assert "mlssl" in modules
    assert not modules & {*HEAVY, "numpy", "cv2", "PIL"}


def test_views_imports_neither_torch_nor_lightning_nor_timm(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    modules = modules_of(["views", "photo.png", "--size", "32", "--branches", "gray"], cwd=tmp_path)
    assert (tmp_path / "views.png").is_file()
    assert "cv2" in modules
    assert not modules & HEAVY


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("fitt", "there is no command 'fitt', did you mean 'fit'? mlssl --help lists them"),
        ("veiws", "there is no command 'veiws', did you mean 'views'? mlssl --help lists them"),
        ("zzz", "there is no command 'zzz': mlssl --help lists them"),
    ],
)
def test_a_misspelt_command_gets_the_nearest_one_suggested(
    word: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word]) == 2
    assert capsys.readouterr().err == f"mlssl: error: {message}\n"
