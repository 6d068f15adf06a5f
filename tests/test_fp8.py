"""A document in fp8, end to end on a tiny model: ingested, resumed, asked, refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kv_store import Store, fp8
from orchestrator.engine import Engine
from orchestrator.errors import KvOutOfRange, UsageError
from orchestrator.ingest import IngestOptions, Progress
from orchestrator.model.load import LoadedModel, load_model
from orchestrator.prefill import Prefill
from orchestrator.types import Mode
from sparse_attn.api import find_backend
from sparse_attn.select.centroid_build import CentroidParams
from tests.test_prefill import NUM_TOKENS, make_layout
from tests.tiny_model import QUESTION, SEGMENT_TOKENS, TEXT, save_tiny_model

OPTIONS = IngestOptions(segment_tokens=SEGMENT_TOKENS, kv_dtype="fp8")


def engine_of(root: Path, case: str = "llama", backend: str = "native") -> Engine:
    return Engine.load(str(root / case), store=root / "store", threads=1, backend=backend)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the text in fp8 and as numbers, of two models."""
    root = tmp_path_factory.mktemp("fp8")
    for case in ("llama", "gemma3"):
        save_tiny_model(root / "models", case).rename(root / case)
        with engine_of(root, case) as engine:
            engine.ingest(text=TEXT, name=f"{case}-fp8", options=OPTIONS)
            numbers = IngestOptions(segment_tokens=SEGMENT_TOKENS)
            engine.ingest(text=TEXT, name=f"{case}-float32", options=numbers)
    return root


@pytest.mark.parametrize("case", ["llama", "gemma3"])
@pytest.mark.parametrize("mode", ["exact", "centroid"])
def test_answers_of_two_backends(root: Path, case: str, mode: Mode) -> None:
    answers = {}
    for backend in ("native", "torch"):
        with engine_of(root, case, backend) as engine:
            for of in ("fp8", "float32"):
                name = f"{case}-{of}"
                answers[backend, of] = engine.ask(
                    name, QUESTION, mode=mode, max_tokens=6, audit=True
                )
    narrow, wide = answers["native", "fp8"], answers["native", "float32"]
    assert narrow.text == answers["torch", "fp8"].text
    assert narrow.usage.prompt_tokens == wide.usage.prompt_tokens
    assert 0.2 * wide.usage.bytes_read < narrow.usage.bytes_read < wide.usage.bytes_read
    assert abs(narrow.recall.mass_mean - wide.recall.mass_mean) < 0.05


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_later_chunks_attend_to_what_is_stored(root: Path, case: str) -> None:
    """The same as after the numbers that the stored bytes stand for."""
    model = load_model(str(root / case))
    ids = torch.randint(0, 250, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0))
    narrow, wide, plain = (
        first_segment(model, ids, kv_dtype) for kv_dtype in ("float8_e4m3fn", "float32", "float32")
    )
    for x in ("k", "v"):
        for layer, rows in enumerate(getattr(wide.resident, x)):
            for g, first in enumerate(wide.resident.holding.head_bounds[:-1]):
                stored = narrow.resident.wide_head(x, layer, g, SEGMENT_TOKENS)
                rows[first : first + SEGMENT_TOKENS] = stored
    chunk = ids[SEGMENT_TOKENS : SEGMENT_TOKENS + 50]
    found, expected, other = (x.forward(chunk, SEGMENT_TOKENS) for x in (narrow, wide, plain))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert float((found - other).abs().max()) > 1e-3


def first_segment(model: LoadedModel, ids: torch.Tensor, kv_dtype: str) -> Prefill:
    """A prefill whose first segment is sealed."""
    layout = make_layout(model, kv_dtype=kv_dtype, dtype="float32")
    prefill = Prefill(model.decoder, find_backend("torch"), layout, clusters=CentroidParams())
    prefill.fill(ids[:SEGMENT_TOKENS], 0)
    prefill.fit_scales(0)
    prefill.append(0, prefill.build(0))
    return prefill


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_what_is_stored(root: Path, case: str) -> None:
    with Store(root / "store").open(f"{case}-fp8") as document:
        layout = document.layout
        heads = document.read_segment(0)
        assert document.manifest.params.kv_dtype == "float8_e4m3fn"
    with Store(root / "store").open(f"{case}-float32") as document:
        given = document.read_segment(0)
    for own, other in zip(heads, given, strict=True):
        assert own["k"].dtype == fp8.DTYPE
        first, last = layout.clustered_span(0)
        assert own["steady_k"].dtype == torch.float32
        assert own["steady_k"].shape[1] == layout.sinks
        assert torch.equal(own["steady_k"], other["k"][:, :first])
        for i, name in enumerate(("k", "v")):
            wide = fp8.widen(own[name], own["scales"][:, i], torch.float32)
            by_token, expected = (
                x.gather(1, y["positions"].argsort(1).long()[..., None].expand_as(x))
                for x, y in ((wide, own), (other[name], other))
            )
            error = (by_token - expected)[:, first:last].abs()
            assert bool((error <= 2.0**-4 * expected[:, first:last].abs() + 1e-3).all())
            assert float(error.max()) > 0
        assert statistics_hold(own)


def statistics_hold(head: dict[str, torch.Tensor]) -> bool:
    """Whether centroids and value sums are those of the numbers that are stored."""
    layers, columns = head["cluster_sizes"].shape
    k, v = (fp8.widen(head[x], head["scales"][:, i], torch.float32) for i, x in enumerate("kv"))
    for layer in range(layers):
        for column in range(columns):
            start, size = (int(head[x][layer, column]) for x in ("cluster_starts", "cluster_sizes"))
            if size:
                own = slice(start, start + size)
                for name, x in (
                    ("centroids", k[layer, own].mean(0)),
                    ("value_sums", v[layer, own].sum(0)),
                ):
                    torch.testing.assert_close(
                        head[name][layer, column].float(), x, atol=2e-3, rtol=2e-3
                    )
    return True


def test_a_resumed_ingest_gives_the_same_bytes(root: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.done_tokens > SEGMENT_TOKENS:
            raise Stopped

    with engine_of(root) as engine, pytest.raises(Stopped):
        engine.ingest(text=TEXT, name="boxes", options=OPTIONS, on_progress=stop)
    with engine_of(root) as engine:
        report = engine.ingest(text=TEXT, name="boxes", options=OPTIONS)
        assert report.computed_tokens < report.num_tokens
        whole = {info.name: info.document_hash for info in engine.docs()}
    assert report.document_hash == whole["llama-fp8"]


def test_keys_beyond_the_first_segments_scale_are_refused(root: Path) -> None:
    model = load_model(str(root / "llama"))
    ids = torch.randint(0, 250, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0))
    prefill = first_segment(model, ids, "float8_e4m3fn")
    prefill.fill(ids[SEGMENT_TOKENS : 2 * SEGMENT_TOKENS], SEGMENT_TOKENS)
    prefill.fit_scales(1)
    for number in (1e6, float("nan"), float("inf")):
        prefill._attention.open_v[1, 0, 70, 3] = number
        with pytest.raises(
            KvOutOfRange,
            match=r"segment 1, full-attention layer 1, KV head 0: a value of .*; limit .*bfloat16",
        ):
            prefill.fit_scales(1)


def test_an_unknown_number_format_is_refused() -> None:
    with pytest.raises(UsageError, match=r"KV dtype 'int4'.*limit float32, bfloat16, fp8; leave"):
        IngestOptions(kv_dtype="int4")
