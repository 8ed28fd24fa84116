"""A server that accepts a connection and never answers: one sentence that names the request."""

from __future__ import annotations

import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mlssl.backbones
from mlssl import waiting
from mlssl.backbones import build_backbone
from mlssl.data.readers.shards import read_shards
from mlssl.module import MultiLabelSSLModule
from mlssl.waiting import call_with_timeout, downloads_end


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a server that never answers."""
    monkeypatch.setattr(waiting, "TIMEOUT", 0.5)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(20)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_an_answer_in_time_is_returned() -> None:
    assert call_with_timeout(divmod, 7, 3) == (2, 1)
    with pytest.raises(ZeroDivisionError, match="zero"):
        call_with_timeout(divmod, 7, 0)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.2 seconds"):
        call_with_timeout(time.sleep, 3, seconds=0.2)
    assert time.monotonic() - started < 2


def test_shards_at_a_silent_server(silent: str) -> None:
    with pytest.raises(OSError, match=rf"cannot read '{silent}/x/.*TimeoutError: no answer within 0\.5 seconds"):
        read_shards(f"{silent}/x")


def test_a_checkpoint_at_a_silent_server(silent: str) -> None:
    with pytest.raises(OSError, match=rf"cannot read the checkpoint '{silent}/a\.ckpt' \(no answer within"):
        MultiLabelSSLModule.load_from_checkpoint(f"{silent}/a.ckpt")


def test_published_weights_at_a_silent_server(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: Any, **__: Any) -> None:
        urllib.request.urlopen(silent)  # as torch.hub does, without a time

    monkeypatch.setattr(mlssl.backbones, "_build_timm", fetch)
    with pytest.raises(OSError, match=r"weights of backbone 'resnet18' cannot be fetched, their server did not answer"):
        build_backbone("resnet18", pretrained=True)
    assert socket.getdefaulttimeout() is None
    socket.setdefaulttimeout(9)
    try:
        with downloads_end():
            assert socket.getdefaulttimeout() == 9  # of the user
    finally:
        socket.setdefaulttimeout(None)


def test_references_are_read_or_refused_in_one_sentence(tmp_path: Path, silent: str) -> None:
    with pytest.raises(OSError, match=r"(?s)reference::.*json"):
        read_shards(f"reference::{tmp_path}/none.json")
    (tmp_path / "a.json").write_text('{"version": 1, "templates": {"u": "{{ 1 / 0 }}"}, "refs": {"a": ["{{u}}"]}}')
    with pytest.raises((OSError, ValueError), match="reference::"):
        read_shards(f"reference::{tmp_path}/a.json")
    with pytest.raises(OSError, match=r"cannot read 'reference::.*TimeoutError: no answer within"):
        read_shards(f"reference::{silent}/a.json")
