"""Work beside a forward: what it waits for, what waits for it, and what it keeps alive."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from orchestrator.model import streams
from orchestrator.model.streams import Beside, Upload

CPU = torch.device("cpu")


class FakeStream:
    """Writes down which stream waits for which."""

    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.device, self._cuda, self.name = torch.device("cuda"), cuda, name

    def wait_stream(self, other: FakeStream) -> None:
        self._cuda.log.append(f"{self.name} waits for {other.name}")


class FakeCuda:
    """What `streams.py` uses of torch.cuda."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = FakeStream(self, "forward")

    def Stream(self, device: torch.device) -> FakeStream:  # noqa: N802
        return FakeStream(self, "beside")

    def current_stream(self, device: torch.device) -> FakeStream:
        return self.current

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def launch(self, what: str) -> None:
        self.log.append(f"{self.current.name}: {what}")


def test_a_fork_waits_for_the_forward_and_a_join_for_the_fork(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(streams, "_cuda", cuda)
    beside = Beside(torch.device("cuda"))
    beside.join()  # nothing to wait for
    cuda.launch("attend")
    with beside.fork():
        cuda.launch("spread")
    cuda.launch("multiply")
    beside.join()
    beside.join()
    cuda.launch("attend")
    assert cuda.log == [
        "forward: attend",
        "beside waits for forward",
        "beside: spread",
        "forward: multiply",
        "forward waits for beside",
        "forward: attend",
    ]


def test_what_is_read_beside_lives_until_the_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_cuda", FakeCuda())
    beside, q = Beside(torch.device("cuda")), torch.zeros(1)
    kept = weakref.ref(q)
    with beside.fork(q):
        del q
    assert kept() is not None
    beside.join()
    assert kept() is None


def test_a_cpu_goes_through_it_in_order() -> None:
    beside, log = Beside(CPU), []
    log.append("before")
    with beside.fork(torch.zeros(1)):
        log.append("beside")
    log.append("after")
    beside.join()
    assert log == ["before", "beside", "after"]


def test_an_upload_stays_in_its_place() -> None:
    upload = Upload((2, 2), torch.int64, CPU)
    there = upload.there
    for rows in ([[1, 2], [3, 4]], [[5, 6], [7, 8]]):
        upload.send(torch.tensor(rows))
        assert upload.there is there
        assert there.tolist() == rows
