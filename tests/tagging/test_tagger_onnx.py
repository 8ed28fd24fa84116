"""A tagger in onnxruntime: from pixels to the same probabilities."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from test_tagger import CLASSES, SIZE, made

from mlssl.cli import main
from mlssl.tagging.onnx import export_tagger


@pytest.mark.slow
def test_a_whole_tagger_runs_in_onnxruntime_for_any_number_of_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tagger = made()
    tagger.save(tmp_path / "tagger.safetensors")
    path = tmp_path / "tagger.onnx"
    assert main(["export", str(tmp_path / "tagger.safetensors"), "-o", str(path)]) == 0
    assert "tagger.onnx: the whole tagger, largest difference in a probability" in capsys.readouterr().out
    images = np.random.default_rng(1).integers(0, 256, (3, *SIZE, 3)).astype(np.uint8)
    session = onnxruntime.InferenceSession(str(path))
    (found,) = session.run(["probabilities"], {"images": images.transpose(0, 3, 1, 2)})
    torch.testing.assert_close(torch.from_numpy(found), tagger(list(images)).probabilities, rtol=0, atol=1e-4)
    said = {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}
    assert (said["classes"], said["size"]) == (list(CLASSES), list(SIZE))
    assert said["thresholds"] == pytest.approx(tagger.thresholds.values.tolist(), abs=1e-5)
    with pytest.raises(FileExistsError, match=r"tagger\.onnx' exists"):
        export_tagger(tagger, path)
    with pytest.raises(ValueError, match=r"does not end in \.onnx, the only format of a whole tagger"):
        export_tagger(tagger, tmp_path / "tagger.pt2")

    graph = path.read_bytes()
    monkeypatch.setattr(
        "mlssl.tagging.onnx.write_graph", lambda network, path, *args, **kwargs: path.write_bytes(graph)
    )
    tagger.network.classifier.bias += 0.5
    with pytest.raises(ValueError, match="The graph's probabilities differ"):
        export_tagger(tagger, tmp_path / "other.onnx")
    assert not (tmp_path / "other.onnx").exists()
