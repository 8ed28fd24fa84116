"""Search in saved embeddings: equal to a slow comparison, and the command on photographs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mlssl.cli import main
from mlssl.embeddings import search
from mlssl.embeddings.files import Embeddings
from mlssl.embeddings.search import embedded_alike, nearest_rows
from mlssl.weights.sources import open_backbone


def test_the_nearest_rows_are_those_of_a_comparison_with_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "PIECE", 7)
    rows, query = torch.randn(50, 6), torch.randn(6)
    expected = sorted(
        ((F.cosine_similarity(row, query, dim=0).item(), index) for index, row in enumerate(rows)), reverse=True
    )
    found = nearest_rows(query, rows, 5)
    assert found.indices == [index for _, index in expected[:5]]
    assert found.cosines == pytest.approx([cosine for cosine, _ in expected[:5]], abs=1e-5)
    assert nearest_rows(query, rows, 5, expected[0][1]).indices == [index for _, index in expected[1:6]]
    assert len(nearest_rows(query, rows, 99, 3).indices) == 49


@pytest.mark.parametrize(
    ("rows", "k", "leave_out", "message"),
    [
        (torch.ones(3, 4), 0, None, "k=0 images were requested"),
        (torch.ones(3, 5), 1, None, r"have shape \(3, 5\), and the backbone has 4 features"),
        (torch.ones(1, 4), 1, 0, "contain only the query image"),
    ],
)
def test_an_invalid_search_is_refused(rows, k, leave_out, message) -> None:
    with pytest.raises(ValueError, match=message):
        nearest_rows(torch.ones(4), rows, k, leave_out)


@pytest.mark.parametrize(
    ("about", "rows", "message"),
    [
        ({"pooling": "patches"}, torch.zeros(1, 96), "e.npy contains feature maps"),
        ({}, torch.zeros(1, 96, 2, 2), "e.npy contains feature maps"),
        ({"size": "["}, torch.zeros(1, 96), "e.npy states the size None and the pooling 'avg'"),
        ({"size": "[32, 1e9]"}, torch.zeros(1, 96), "e.npy states the size"),
        ({"pooling": "sum"}, torch.zeros(1, 96), "the pooling 'sum': write it again"),
    ],
)
def test_the_metadata_of_a_file_is_checked(about, rows, message) -> None:
    with pytest.raises(ValueError, match=message):
        embedded_alike(
            np.zeros((9, 9, 3), np.uint8),
            open_backbone("test_resnet"),
            Embeddings(["a"], rows, about),
            Path("e.npy"),
            32,
        )


@pytest.fixture
def query(coco256: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The first of six photographs in the folder photos."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for photograph in sorted((coco256 / "val2017").glob("*.jpg"))[:6]:
        Path("photos", photograph.name).write_bytes(photograph.read_bytes())
    return str(min(Path("photos").iterdir()))


def test_neighbors_of_saved_embeddings_are_those_of_the_folder(query: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["neighbors", query, "photos", "--backbone", "test_resnet", "--k", "3"]
    assert main([*common, "--size", "32"]) == 0
    by_folder = capsys.readouterr().out.splitlines()[:3]
    assert main(["predict", "test_resnet", "photos", "-o", "e.safetensors", "--size", "32"]) == 0
    capsys.readouterr()
    assert main([*common, "--embeddings", "e.safetensors"]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == by_folder
    assert main([*common, "--embeddings", "e.safetensors", "--block", "0"]) == 2
    assert "--block 0 compares blocks, but --embeddings is of whole images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "changed", "message"),
    [
        ("e.safetensors", ["--seed", "1"], r"features of .*\.jpg: .* its mlssl predict, which was given 'test_resnet'"),
        ("e.safetensors", ["--backbone", "test_vit"], "does not contain this backbone's features of"),
        ("e.npy", ["--size", "64"], r"its mlssl predict, and its --size \(64 was assumed\), or write it again"),
    ],
)
def test_embeddings_of_another_backbone_or_size_are_refused(file, changed, message, query: str, capsys) -> None:
    assert main(["predict", "test_resnet", "photos", "-o", file, "--size", "32"]) == 0
    common = ["neighbors", query, "photos", "--embeddings", file]
    assert main([*common, "--backbone", "test_resnet", "--size", "32"]) == 0
    capsys.readouterr()
    assert main([*common, "--backbone", "test_resnet", *changed]) == 2
    assert re.search(message, capsys.readouterr().err)
    Path("other").mkdir()
    assert main(["neighbors", query, "other", *common[3:], "--backbone", "test_resnet", "--size", "32"]) == 2
    assert f"{file} is of images that are not there, first other/" in capsys.readouterr().err
