"""A segment on its way to the disk: what is written, when it counts, and what a fault leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kv_store import SegmentFiles, StoreFull
from orchestrator.engine import Engine
from orchestrator.ingest import IngestOptions
from tests.tiny_model import SEGMENT_TOKENS, TEXT, save_tiny_model

OPTIONS = IngestOptions(segment_tokens=SEGMENT_TOKENS)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_fault_of_the_disk_leaves_what_was_written_before(tmp_path: Path, device: str) -> None:
    write, model = (
        SegmentFiles.write,
        str(save_tiny_model(tmp_path / "model", "llama-yarn-wide-heads")),
    )

    def fail(files: SegmentFiles, segment_idx: int, heads: Any) -> Any:
        if segment_idx == 2:
            raise StoreFull("disk is full; free space")
        return write(files, segment_idx, heads)

    options = {"device": device, "dtype": "bfloat16", "backend": "torch"}
    with Engine.load(model, store=tmp_path / "store", **options) as engine:
        whole = engine.ingest(text=TEXT, name="whole", options=OPTIONS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SegmentFiles, "write", fail)
            with pytest.raises(StoreFull, match="disk is full"):
                engine.ingest(text=TEXT, name="boxes", options=OPTIONS)
        assert engine.store.find("boxes").sealed_tokens == 2 * SEGMENT_TOKENS
        resumed = engine.ingest(text=TEXT, name="boxes", options=OPTIONS)
        assert resumed.computed_tokens == resumed.num_tokens - 2 * SEGMENT_TOKENS
        assert resumed.document_hash == whole.document_hash
        assert engine.store.verify("boxes") == []


@pytest.mark.parametrize("device", DEVICES)
def test_an_ingest_that_ends_early_lets_its_last_segment_get_to_the_disk(
    tmp_path: Path, device: str
) -> None:
    class Enough(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.done_tokens > 3 * SEGMENT_TOKENS:
            raise Enough

    model = str(save_tiny_model(tmp_path / "model", "llama-yarn-wide-heads"))
    options = {"device": device, "dtype": "bfloat16", "backend": "torch"}
    with Engine.load(model, store=tmp_path / "store", **options) as engine:
        with pytest.raises(Enough):
            engine.ingest(text=TEXT, name="boxes", options=OPTIONS, on_progress=stop)
        assert engine.store.find("boxes").sealed_tokens == 3 * SEGMENT_TOKENS
        assert not list((tmp_path / "store").rglob("*.tmp"))
        assert engine.ingest(text=TEXT, name="boxes", options=OPTIONS).document_hash
