"""Embedding files: read back as written, in constant memory; modified files are refused."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mlssl.data.records import Records
from mlssl.embeddings.files import SUFFIXES, embedding_writer, names_file, read_embeddings
from mlssl.embeddings.networks import FeatureRows
from mlssl.embeddings.streaming import Images, streamed
from mlssl.weights.sources import open_backbone

NAMES = ["a.jpg", 'below/né, "b".jpg', "new\nline.png", "bytes \udcff.png"]
ROWS = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


def write(path: Path, rows: Tensor = ROWS, names: list[str] = NAMES) -> Path:
    with embedding_writer(path, {"source": "last.ckpt"}) as writer:
        for start in range(0, len(rows), 3):
            writer.write(names[start : start + 3], rows[start : start + 3])
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_names_and_rows_are_read_back_exactly(suffix: str, tmp_path: Path) -> None:
    found = read_embeddings(write(tmp_path / f"e{suffix}"))
    assert found.names == ([*NAMES[:3], "bytes \\udcff.png"] if suffix == ".parquet" else NAMES)
    assert torch.equal(found.rows, ROWS)
    assert found.about.get("source") == ("last.ckpt" if suffix in (".safetensors", ".parquet") else None)


def test_other_libraries_read_them(tmp_path: Path) -> None:
    assert torch.equal(load_file(write(tmp_path / "e.safetensors"))["embeddings"], ROWS)
    assert np.array_equal(np.load(write(tmp_path / "e.npy", ROWS[:3], NAMES[:3])), ROWS[:3].numpy())
    assert pandas.read_csv(tmp_path / "e.names.csv")["path"].tolist() == NAMES[:3]
    table = pandas.read_parquet(write(tmp_path / "e.parquet", ROWS[:3], NAMES[:3]))
    assert np.array_equal(np.stack(table["embedding"].to_list()), ROWS[:3].numpy())
    table = pandas.read_csv(write(tmp_path / "e.csv", ROWS[:3], NAMES[:3]), index_col="path")
    assert table.index.tolist() == NAMES[:3]
    assert np.array_equal(table.to_numpy("float32"), ROWS[:3].numpy())


@pytest.mark.parametrize("suffix", [".safetensors", ".npy"])
def test_maps_keep_their_shape(suffix: str, tmp_path: Path) -> None:
    maps = torch.randn(4, 5, 2, 3)
    assert torch.equal(read_embeddings(write(tmp_path / f"e{suffix}", maps)).rows, maps)


@pytest.mark.parametrize(("suffix", "count"), [(".safetensors", 100_000), (".npy", 100_000), (".parquet", 60_000)])
def test_memory_does_not_grow_with_the_number_of_rows(suffix: str, count: int, tmp_path: Path) -> None:
    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    rows = torch.rand(1000, 512)
    write(tmp_path / f"first{suffix}", rows, [f"{number}.jpg" for number in range(1000)])
    before = peak()
    with embedding_writer(tmp_path / f"e{suffix}", {}) as writer:
        for start in range(0, count, 1000):
            writer.write([f"{number:09d}.jpg" for number in range(start, start + 1000)], rows)
    written = (tmp_path / f"e{suffix}").stat().st_size / 2**20
    assert written > 110
    assert peak() - before < 55, "MiB"
    if suffix == ".npy":
        assert np.load(tmp_path / "e.npy", mmap_mode="r").shape == (count, 512)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_is_written_if_the_stream_ends_early_or_is_empty(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError), embedding_writer(tmp_path / f"e{suffix}", {}) as writer:  # noqa: PT012
        writer.write(NAMES[:1], ROWS[:1])
        raise AssertionError
    assert not list(tmp_path.iterdir())
    if suffix != ".csv":
        with (
            pytest.raises(ValueError, match="there are no rows to write"),
            embedding_writer(tmp_path / f"e{suffix}", {}),
        ):
            pass
        assert not list(tmp_path.iterdir())


def test_rows_of_another_shape_and_a_header_that_is_too_long_are_refused(tmp_path: Path) -> None:
    message = r"rows of shape \(4,\) followed rows of shape \(5,\)"
    with pytest.raises(ValueError, match=message), embedding_writer(tmp_path / "e.npy", {}) as writer:  # noqa: PT012
        writer.write(NAMES[:1], ROWS[:1])
        writer.write(NAMES[1:2], ROWS[:1, :4])
    with (
        pytest.raises(ValueError, match="bytes of header are more than 4096"),
        embedding_writer(tmp_path / "e.safetensors", {"source": 5000 * "a"}) as writer,
    ):
        writer.write(NAMES[:1], ROWS[:1])
    assert not list(tmp_path.iterdir())


def test_files_without_embeddings_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"no")
    (tmp_path / "c.csv").write_text("path,f0\na.jpg,x\n")
    (tmp_path / "d.csv").write_text("")
    np.save(tmp_path / "e.npy", np.array([{}], dtype=object), allow_pickle=True)
    names_file(tmp_path / "e.npy").write_text("path\na\n")
    for name in ("a.safetensors", "b.safetensors", "c.csv", "d.csv", "e.npy"):
        with pytest.raises(ValueError, match=f"{name} contains no readable embeddings"):
            read_embeddings(tmp_path / name)
    names_file(write(tmp_path / "f.npy")).write_text("path\na\n")
    with pytest.raises(ValueError, match="contains 1 names and 4 rows"):
        read_embeddings(tmp_path / "f.npy")
    names_file(tmp_path / "f.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"f\.names\.csv'"):
        read_embeddings(tmp_path / "f.npy")


def test_parquet_without_pyarrow_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlssl.embeddings.files.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="Parquet needs pyarrow: pip install pyarrow"):
        read_embeddings(tmp_path / "e.parquet")


# ---------------------------------------------------------------------- streams


def batches(count: int, size: int = 2) -> Iterator[tuple[list[int], Tensor]]:
    for start in range(0, count, size):
        indices = list(range(start, min(start + size, count)))
        yield indices, torch.tensor(indices, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


class Mean(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3))


@pytest.mark.parametrize("devices", [("cpu",), ("cpu", "cpu", "cpu")])
def test_rows_come_in_order_on_any_number_of_devices(devices: tuple[str, ...]) -> None:
    found = list(streamed(Mean(), batches(7), devices))
    assert [index for indices, _ in found for index in indices] == list(range(7))
    assert torch.cat([rows for _, rows in found])[:, 0].tolist() == list(range(7))


def test_as_many_batches_as_devices_are_in_flight() -> None:
    taken = []

    def counted() -> Iterator[tuple[list[int], Tensor]]:
        for batch in batches(100):
            taken.append(batch[0][0])
            yield batch

    stream = streamed(Mean(), counted(), ("cpu", "cpu"))
    next(stream)
    assert len(taken) == 2


def test_values_that_are_not_finite_are_reported_with_their_image() -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return 1 / (images.float().mean((2, 3)) - 3)

    with pytest.raises(ValueError, match="the network returns NaN or infinity for image 3"):
        list(streamed(Broken(), batches(6), ("cpu",)))


def test_images_are_named_relative_to_their_root_and_bad_ones_are_recorded(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "a").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "a" / "x.png")
    (tmp_path / "bad.png").write_bytes(b"no")
    records = Records(["bad.png", "a/x.png"], root=tmp_path, image_ids=[7, 5])
    images = Images(records, (32, 32), 1)
    network = FeatureRows(open_backbone("test_resnet"), "avgmax")
    ((indices, rows),) = list(streamed(network, images, ("cpu",)))
    assert (indices, [images.name(index) for index in indices], images.bad()) == ([1], ["a/x.png"], ["bad.png"])
    assert rows.shape == (1, 96)
    assert Images(Records(["/else/x.png"]), (32, 32)).name(0) == "/else/x.png"
