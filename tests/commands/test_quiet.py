"""Messages about the user's input are shown, and messages about packages are hidden."""

from __future__ import annotations

import logging
import warnings

import pytest
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from mlssl.commands.quiet import is_remark, quiet

PACKAGES = "/usr/lib/python3/site-packages"


def lightning_says(text: str) -> None:
    """Log like a file of Lightning."""
    record = logging.LogRecord("", logging.INFO, f"{PACKAGES}/lightning/pytorch/setup.py", 1, text, None, None)
    logging.getLogger("lightning.pytorch").handle(record)


@pytest.mark.parametrize("verbose", [False, True])
def test_remarks_of_lightning_are_left_out_and_those_of_mlssl_are_not(
    verbose: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("lightning.pytorch")
    before = list(logger.handlers), logger.propagate, list(logging.getLogger().handlers)
    with quiet(verbose):
        lightning_says("GPU available: False")
        rank_zero_info("4500 images")
    assert capsys.readouterr().err.splitlines() == ["GPU available: False"] * verbose + ["4500 images"]
    assert (list(logger.handlers), logger.propagate, list(logging.getLogger().handlers)) == before


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("verbose", [False, True])
def test_warnings_about_the_users_input_take_one_line(verbose: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(), quiet(verbose):
        warnings.simplefilter("always")
        warnings.warn("old", FutureWarning, stacklevel=1)
        rank_zero_warn("3 images could not be decoded")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 + verbose
    assert said[-1].endswith("warning: 3 images could not be decoded")
    assert said[-1].startswith("warning: ") != verbose


@pytest.mark.parametrize(
    ("category", "filename", "expected"),
    [
        (UserWarning, f"{PACKAGES}/lightning/pytorch/trainer/connectors/data_connector.py", True),
        (UserWarning, f"{PACKAGES}/torch/utils/data/dataloader.py", True),
        (UserWarning, f"{PACKAGES}/torch/cuda/__init__.py", False),  # such as a driver that is too old
        (UserWarning, f"{PACKAGES}/mlssl/data/datamodule.py", False),
        (UserWarning, "/home/lightning/mine.py", False),
        (DeprecationWarning, "/home/me/mine.py", True),
    ],
)
def test_what_counts_as_a_remark(category: type[Warning], filename: str, expected: bool) -> None:
    assert is_remark(category, filename) is expected
