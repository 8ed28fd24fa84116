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
def test_a_log_gets_the_beginning_and_the_end(is_terminal: bool, drawn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = _Screen(is_terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_bar(total=10, desc="features", miniters=1) as bar:
        seconds = iter(range(1, 100))
        bar._time = lambda: bar.start_t + next(seconds)  # each step takes a second
        for _ in range(10):
            bar.update()
    shown = screen.getvalue()
    assert shown.count("features") == drawn
    assert "10/10" in shown
