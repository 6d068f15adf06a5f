"""One safetensors file: what is written comes back, and nothing else is believed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from kv_store import DocumentDamaged
from kv_store.disk import CHUNK_BYTES, TensorFile, byte_rows, encode_tensors

DTYPES = (torch.float32, torch.bfloat16, torch.int32)


def write(directory: Path, tensors: dict[str, torch.Tensor]) -> str:
    encode_tensors(tensors, {"note": "x"}).write(directory, "f.safetensors")
    return "f.safetensors"


@given(data=st.data())
def test_round_trip(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("file")
    names = data.draw(st.lists(st.sampled_from("abcdef"), unique=True))
    tensors = {}
    for name in names:
        shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
        values = torch.randint(-100, 100, tuple(shape))
        tensors[name] = values.to(data.draw(st.sampled_from(DTYPES)))
    file = write(directory, tensors)
    with TensorFile(directory, file, expected=None) as read:
        assert read.metadata["note"] == "x"
        assert read.size_bytes == (directory / file).stat().st_size
        read.check_all()
        found = read.read_all()
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_other_programs_can_read_it(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(3, 5).bfloat16(), "i": torch.arange(7, dtype=torch.int32)}
    file = write(tmp_path, tensors)
    with safe_open(str(tmp_path / file), framework="pt") as read:
        assert sorted(read.keys()) == ["i", "x"]
        assert all(torch.equal(read.get_tensor(name), tensors[name]) for name in tensors)


def test_bytes_do_not_depend_on_order_strides_or_clock(tmp_path: Path) -> None:
    x, y = torch.randn(4, 6), torch.arange(5, dtype=torch.int32)
    first = encode_tensors({"x": x.t(), "y": y}, {})
    second = encode_tensors({"y": y, "x": x.t().contiguous()}, {})
    assert b"".join(first.pieces) == b"".join(second.pieces)
    assert first.digest == second.digest


@pytest.mark.parametrize("num_rows", [1, 3, 700])
def test_large_tensors_into_pieces_across_checksums(num_rows: int, tmp_path: Path) -> None:
    num_columns = (2 * CHUNK_BYTES + 400) // (4 * num_rows) + 1
    tensor = torch.randn(num_rows, num_columns)
    file = write(tmp_path, {"x": tensor})
    room = torch.zeros(num_rows, 2, num_columns)
    with TensorFile(tmp_path, file, expected=None) as read:
        assert len(read.entries["x"].checksums) == 3
        read.read_into("x", byte_rows(room[:, 1]))
    assert torch.equal(room[:, 1], tensor)
    assert not room[:, 0].any()


@pytest.mark.parametrize("chunk_idx", [0, 1, 2])
def test_one_flipped_bit_of_a_large_tensor(chunk_idx: int, tmp_path: Path) -> None:
    file = write(tmp_path, {"x": torch.zeros(2 * CHUNK_BYTES // 4 + 9)})
    raw = bytearray((tmp_path / file).read_bytes())
    raw[len(raw) - 36 - 2 * CHUNK_BYTES + chunk_idx * CHUNK_BYTES] ^= 4
    (tmp_path / file).write_bytes(raw)
    with TensorFile(tmp_path, file, expected=None) as read:
        with pytest.raises(DocumentDamaged, match=f"MiB {chunk_idx} does not match"):
            read.read("x")
        with pytest.raises(DocumentDamaged, match=f"MiB {chunk_idx} does not match"):
            read.check_all()


def test_cut_after_opening(tmp_path: Path) -> None:
    file = write(tmp_path, {"x": torch.zeros(100)})
    with TensorFile(tmp_path, file, expected=None, verify=False) as read:
        with (tmp_path / file).open("r+b") as cut:
            cut.truncate(read.size_bytes - 1)
        with pytest.raises(DocumentDamaged, match="ends early"):
            read.read("x")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DocumentDamaged, match=r"gone\.safetensors: missing"):
        TensorFile(tmp_path, "gone.safetensors", expected=None)
