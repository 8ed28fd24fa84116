"""The command that measures a GPU: in small sizes on a CPU, its limits, its table."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples" / "benchmarks"
APART = {"exact"}
"""Starts processes, which would import the tests."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:You are trying to `self.log"),
    pytest.mark.filterwarnings("ignore:.*train_dataloader.*does not have many", "ignore:Be aware that when using"),
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("gpu")
    for name in ("gpu", "gpu_measurements", "step", "loader", "loss", "authors_way"):
        sys.modules.pop(name, None)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(6):
        Image.effect_noise((48, 40), 20 + 10 * number).save(folder / f"{number}.jpg")
    return folder


@pytest.mark.slow
def test_everything_is_measured_on_a_cpu_too(gpu: Any, photographs: Path) -> None:
    found = {name: gpu.measure(name, photographs, tiny=True) for name in gpu.LIMITS_S if name not in APART}
    left_out = {name for name, result in found.items() if "left_out" in result}
    assert left_out == {"memory", "fsdp", "compiled"}  # they need a GPU
    assert found["resume"]["identical"]
    assert found["resume"]["from_step"] == 3
    results = {"machine": gpu.machine(), **found}
    measured = [row for row in gpu.table(results).splitlines() if gpu.NOT_YET not in row]
    assert any("optimizer's share" in row for row in measured)
    assert any("times the author's way" in row for row in measured)


@pytest.mark.slow
def test_two_processes_are_exact(gpu: Any, photographs: Path) -> None:
    assert gpu.measure_apart("exact", photographs, True, limit_s=600)["gradient"] < 1e-9


def test_a_slow_or_failed_measurement_does_not_stop_the_others(gpu: Any, tmp_path: Path) -> None:
    assert gpu.measure_apart("evaluation", tmp_path, True, limit_s=0.2) == {"failed": "took more than 0 s"}


def test_a_run_writes_after_each_measurement(
    gpu: Any, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, seen = tmp_path / "gpu.json", []

    def measured(name: str, *_: Any) -> dict[str, Any]:
        seen.append(json.loads(output.read_text()) if output.exists() else {})
        return {"failed": "of no use"} if name == "loss" else {"took_s": 1.0}

    monkeypatch.setattr(gpu, "measure_apart", measured)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{gpu.MARKS[0]}\nold\n{gpu.MARKS[1]}\nafter\n")
    assert gpu.main([str(photographs), "-o", str(output), "--page", str(page)]) == 1  # one has failed
    assert [len(results) for results in seen] == [0, *range(2, len(gpu.LIMITS_S) + 1)]
    assert "loss" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.count(gpu.NOT_YET) == len(gpu.ROWS)


def test_the_page_contains_the_table_of_the_results(gpu: Any) -> None:
    file = FOLDER / "gpu.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    assert f"{gpu.MARKS[0]}\n{gpu.table(results)}\n{gpu.MARKS[1]}" in (ROOT / "docs" / "performance.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere is not a folder"),
        ([".", "--only", "speed"], "--only speed is unknown: choose step, loss"),
    ],
)
def test_wrong_words_are_refused(gpu: Any, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(words)
    assert message in capsys.readouterr().err
