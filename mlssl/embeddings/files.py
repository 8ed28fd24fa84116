"""Embedding files with image names: safetensors, .npy plus names, CSV and Parquet; streamed writing, and reading."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mlssl.atomic import written_aside

SUFFIXES = (".safetensors", ".npy", ".csv", ".parquet")
_HEADER_BYTES = 4096
"""Space for the header of a .safetensors file, written last, when the number of rows is known."""

_NPY_HEADER_BYTES = 128
_TABLES = (".csv", ".parquet")


class Embeddings(NamedTuple):
    """Names of n images, their rows (n, …) float32, and metadata of the file."""

    names: list[str]
    rows: Tensor
    about: dict[str, str]


class EmbeddingWriter(Protocol):
    """Writes rows of images."""

    def write(self, names: Sequence[str], rows: Tensor) -> None:
        """Write the names of n images and their rows (n, …) float32."""
        ...


def names_file(path: Path) -> Path:
    """The names file next to an .npy file, a CSV file with the single column path."""
    return path.with_suffix(".names.csv")


def utf8(name: str) -> str:
    r"""The name with non-UTF-8 bytes escaped, for formats that need UTF-8.

    >>> print(utf8("caf\udce9.jpg"))
    caf\udce9.jpg
    """
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def check_embedding_file(path: Path, *, patches: bool = False) -> None:
    """Refuse an output that cannot be written, before any image is read.

    Raises:
        ValueError: The suffix is unknown, or names a table while maps (D, h, w) are requested.
        ImportError: Parquet is requested without pyarrow.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} has an unknown format: use the suffix {', '.join(SUFFIXES)}")
    if patches and path.suffix in _TABLES:
        raise ValueError(f"{path} is a table, which cannot contain feature maps: write .safetensors or .npy")
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ImportError("Parquet needs pyarrow: pip install pyarrow, or write .safetensors, .npy or .csv")


@contextmanager
def embedding_writer(path: Path, about: Mapping[str, str]) -> Iterator[EmbeddingWriter]:
    """A writer of the suffix's format; the files get their names once they are complete.

    Memory does not grow with the number of rows, except for the names in a .safetensors file.

    Args:
        path: File to write, replaced if it exists.
        about: Metadata for the header of .safetensors and Parquet.

    Raises:
        ValueError: As `check_embedding_file`; also nothing was written, or rows differ in shape.
        OSError: A file cannot be written.
    """
    check_embedding_file(path)
    with ExitStack() as stack:
        if path.suffix == ".parquet":
            yield stack.enter_context(_parquet(stack.enter_context(written_aside(path)), about))
        elif path.suffix == ".csv":
            yield _Csv(_text(stack, path))
        elif path.suffix == ".npy":
            names = _text(stack, names_file(path))
            yield stack.enter_context(_npy(stack.enter_context(written_aside(path)), names))
        else:
            yield stack.enter_context(_safetensors(stack.enter_context(written_aside(path)), about))


def read_embeddings(path: Path) -> Embeddings:
    """Read a file of `embedding_writer`, also from untrusted sources; rows of .npy and .safetensors are memory-mapped.

    Raises:
        FileNotFoundError: The file or its names file does not exist.
        ValueError: It contains no embeddings, or the numbers of names and rows differ.
        ImportError: As `check_embedding_file`.
    """
    check_embedding_file(path)
    for file in (path, *([names_file(path)] if path.suffix == ".npy" else [])):
        if not file.is_file():
            raise FileNotFoundError(f"no file {str(file)!r}: pass a file written by mlssl predict")
    try:
        names, rows, about = _READERS[path.suffix](path)
    except (ValueError, KeyError, IndexError, StopIteration, SafetensorError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} contains no readable embeddings ({reason}): pass a file written by mlssl predict"
        ) from None
    if len(names) != len(rows) or not len(rows) or rows.dtype != torch.float32:
        raise ValueError(
            f"{path} contains {len(names)} names and {len(rows)} rows of {rows.dtype}, expected one float32 row per "
            "name: write it again"
        )
    return Embeddings(names, rows, about)


# ---------------------------------------------------------------------- writers


def _text(stack: ExitStack, path: Path) -> IO[str]:
    aside = stack.enter_context(written_aside(path))
    return stack.enter_context(aside.open("w", newline="", encoding="utf-8", errors="surrogateescape"))


class _Csv:
    """A header, then path and D floats per row."""

    def __init__(self, file: IO[str]) -> None:
        self.rows, self.has_header = csv.writer(file), False

    def write(self, names: Sequence[str], rows: Tensor) -> None:
        if not self.has_header:
            self.rows.writerow(["path", *(f"f{number}" for number in range(rows.shape[1]))])
            self.has_header = True
        for name, row in zip(names, rows.numpy(), strict=True):
            self.rows.writerow([name, *(f"{value:.9g}" for value in row)])  # nine digits restore a float32 exactly


class _Raw:
    """Rows as bytes, after space for a header that is written once their number is known."""

    def __init__(self, file: IO[bytes], room: int) -> None:
        self.file, self.count = file, 0
        self.shape: tuple[int, ...] | None = None
        file.write(b"\0" * room)

    def append(self, rows: Tensor) -> None:
        shape = tuple(rows.shape[1:])
        if self.shape not in (None, shape):
            raise ValueError(f"rows of shape {shape} followed rows of shape {self.shape}: use images of one size")
        self.shape, self.count = shape, self.count + len(rows)
        self.file.write(rows.contiguous().numpy().astype("<f4", copy=False).tobytes())

    def whole_shape(self) -> tuple[int, ...]:
        if self.shape is None:
            raise ValueError("there are no rows to write: check the image folder")
        return self.count, *self.shape


@contextmanager
def _npy(path: Path, names: IO[str]) -> Iterator[EmbeddingWriter]:
    """NumPy's format 1.0, see numpy.lib.format."""
    table = csv.writer(names)
    table.writerow(["path"])

    class Npy:
        def write(self, names: Sequence[str], rows: Tensor) -> None:
            raw.append(rows)
            table.writerows([name] for name in names)

    with path.open("wb") as file:
        raw = _Raw(file, _NPY_HEADER_BYTES)
        yield Npy()
        header = repr({"descr": "<f4", "fortran_order": False, "shape": raw.whole_shape()}).encode()
        length = _NPY_HEADER_BYTES - 10
        file.seek(0)
        file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", length) + header.ljust(length - 1) + b"\n")


@contextmanager
def _safetensors(path: Path, about: Mapping[str, str]) -> Iterator[EmbeddingWriter]:
    """Tensors "embeddings" (n, …) and "names", the bytes of the names in UTF-8, each ended by a NUL."""
    encoded = bytearray()

    class Safetensors:
        def write(self, names: Sequence[str], rows: Tensor) -> None:
            raw.append(rows)
            for name in names:
                encoded.extend(name.encode("utf-8", "surrogateescape") + b"\0")

    with path.open("wb") as file:
        raw = _Raw(file, 8 + _HEADER_BYTES)
        yield Safetensors()
        shape = raw.whole_shape()
        end = 4 * int(np.prod(shape, dtype=np.int64))
        file.write(encoded)
        header = json.dumps(
            {
                "__metadata__": dict(about),
                "embeddings": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]},
                "names": {"dtype": "U8", "shape": [len(encoded)], "data_offsets": [end, end + len(encoded)]},
            }
        ).encode()
        if len(header) > _HEADER_BYTES:
            raise ValueError(f"{len(header)} bytes of header are more than {_HEADER_BYTES}: shorten the metadata")
        file.seek(0)
        file.write(struct.pack("<Q", _HEADER_BYTES) + header.ljust(_HEADER_BYTES))


@contextmanager
def _parquet(path: Path, about: Mapping[str, str]) -> Iterator[EmbeddingWriter]:
    """Columns path and embedding, a list of D floats."""
    import pyarrow
    from pyarrow import parquet

    with ExitStack() as stack:
        writer: Any = None

        class Parquet:
            def write(self, names: Sequence[str], rows: Tensor) -> None:
                nonlocal writer
                kind = pyarrow.list_(pyarrow.float32(), rows.shape[1])
                schema = pyarrow.schema([("path", pyarrow.string()), ("embedding", kind)], metadata=dict(about))
                if writer is None:
                    writer = stack.enter_context(parquet.ParquetWriter(path, schema, use_dictionary=False))
                flat = pyarrow.array(rows.flatten().numpy(), pyarrow.float32())
                columns = [list(map(utf8, names)), pyarrow.FixedSizeListArray.from_arrays(flat, rows.shape[1])]
                writer.write_table(pyarrow.table(columns, schema=schema))

        yield Parquet()
        if writer is None:
            raise ValueError("there are no rows to write: check the image folder")


# ---------------------------------------------------------------------- readers


def _read_safetensors(path: Path) -> tuple[list[str], Tensor, dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        rows, encoded = file.get_tensor("embeddings"), file.get_tensor("names")
        about = file.metadata() or {}
    names = encoded.numpy().tobytes().decode("utf-8", "surrogateescape").split("\0")
    return names[:-1], rows, about


def _read_npy(path: Path) -> tuple[list[str], Tensor, dict[str, str]]:
    rows = np.load(path, mmap_mode="c", allow_pickle=False)
    with names_file(path).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        names = [row[0] for row in csv.reader(file)][1:]
    return names, torch.from_numpy(rows), {}


def _read_csv(path: Path) -> tuple[list[str], Tensor, dict[str, str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.reader(file)
        width = len(next(table))
        names, rows = [], []
        for row in table:
            names.append(row[0])
            rows.append(np.array(row[1:width], dtype=np.float32))
    return names, torch.from_numpy(np.stack(rows)), {}


def _read_parquet(path: Path) -> tuple[list[str], Tensor, dict[str, str]]:
    from pyarrow import parquet

    table = parquet.read_table(path)
    column = table.column("embedding").combine_chunks()
    rows = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
    about = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    return table.column("path").to_pylist(), torch.from_numpy(rows.astype(np.float32)), about


_READERS = {".safetensors": _read_safetensors, ".npy": _read_npy, ".csv": _read_csv, ".parquet": _read_parquet}
