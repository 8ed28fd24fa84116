"""The pictures of the documentation are those drawn by its script, and each is shown on a page."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
STATIC = ROOT / "docs" / "_static"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    runpy.run_path(str(ROOT / "docs" / "pictures.py"))["main"](folder)
    return folder


def test_the_script_draws_every_committed_picture(drawn):
    assert {path.name for path in drawn.iterdir()} == {path.name for path in STATIC.glob("*.png")}
    for path in STATIC.glob("*.png"):
        kept, new = (np.asarray(Image.open(one).convert("RGB"), dtype=float) for one in (path, drawn / path.name))
        assert np.abs(np.subtract(kept.shape, new.shape)).max() <= 20  # another matplotlib sets letters otherwise
        assert abs(kept.mean() - new.mean()) < 5
        assert path.stat().st_size < 300_000


def test_every_picture_is_shown_and_described():
    text = "\n".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    for path in STATIC.glob("*.png"):
        assert f"](_static/{path.name})" in text
        assert f"![](_static/{path.name})" not in text


def test_the_table_of_time_to_quality_matches_its_picture():
    drawn = json.loads((STATIC / "time_to_quality.json").read_text())
    page = (ROOT / "docs" / "performance.md").read_text()
    lines = re.findall(r"^\| ([012]) \| (ours|the author's) \| (.+) \|$", page, re.MULTILINE)
    assert len(lines) == 6
    for seed, way, cells in lines:
        key = {"ours": "ours", "the author's": "author"}[way]
        rows = [row for row in drawn if (row["seed"], row["way"]) == (int(seed), key)]
        of_epoch = {row["epoch"]: f"{row['mAP']:.3f}" for row in rows}
        reached = next(row["processor_s"] for row in rows if row["mAP"] >= 0.38)
        expected = [of_epoch.get(epoch, "") for epoch in (1, 2, 3, 4, 10)]
        expected += [f"{reached:.0f}", f"{rows[-1]['processor_s']:.0f}"]
        assert [cell.strip() for cell in cells.split("|")] == expected
