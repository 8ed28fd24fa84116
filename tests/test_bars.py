"""A bar without a terminal draws few lines."""

from __future__ import annotations

import io
import sys

import pytest

from mlssl.bars import progress_bar


class _Screen(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.mark.parametrize(("is_terminal", "drawn"), [(False, 2), (True, 12)])
def test_a_log_gets_the_start_and_the_end(is_terminal: bool, drawn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = _Screen(is_terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_bar(total=10, desc="features", miniters=1) as bar:
        seconds = iter(range(1, 100))
        bar._time = lambda: bar.start_t + next(seconds)  # each step takes a second
        for _ in range(10):
            bar.update()
    shown = screen.getvalue()
    assert shown.count("features") == drawn
    assert "features: 100%" in shown


def test_a_bar_with_a_long_name_fits_in_80_columns() -> None:
    screen = _Screen(True)
    with progress_bar(
        total=2500, desc="features, resnet10t (untrained), train", unit=" images", file=screen, ncols=80
    ) as bar:
        bar._time = lambda: bar.start_t + 60.0
        bar.update(1024)
        bar.refresh()
    line = screen.getvalue().split("\r")[-2]
    assert len(line) <= 80
    assert line.endswith("images/s")
    assert "left" in line


def test_a_bar_without_a_total_counts() -> None:
    screen = _Screen(True)
    with progress_bar(total=None, desc="features", unit=" images", file=screen) as bar:
        bar.update(7)
    assert "7 images" in screen.getvalue()
