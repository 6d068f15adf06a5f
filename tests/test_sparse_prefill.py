"""`ingest --prefill sparse`: what is read, and that backends, ranks and a resume agree on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kv_store import Holding, Layout, ResidentDocument
from orchestrator.engine import Engine
from orchestrator.errors import UsageError
from orchestrator.ingest import IngestOptions, Progress
from orchestrator.place import alone
from orchestrator.sparse_prefill import SealedBlocks, SparseParams
from orchestrator.types import AskOptions
from sparse_attn import reference, torch_prefill
from sparse_attn.api import find_backend
from sparse_attn.state import Part, merge_parts
from tests.mesh import LONG_TEXT, SEGMENT_TOKENS, run_mesh, save_long_model

QUESTION, SCALE = "How many jars are on shelf 9?", 0.125
NUM_SEGMENTS, HEADS, KV_HEADS, HEAD_DIM = 5, 4, 2, 64
LAYOUT = Layout(
    num_tokens=NUM_SEGMENTS * SEGMENT_TOKENS,
    segment_tokens=SEGMENT_TOKENS,
    sinks=4,
    window=64,
    num_full_layers=1,
    num_sliding_layers=0,
    sliding_window=0,
    num_kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    kv_dtype="float32",
)
PARAMS = SparseParams(budget="25%", min_keys=128, local_tokens=64)


def sealed_blocks(
    k: Tensor,
    v: Tensor,
    *,
    num_segments: int,
    backend: str = "torch",
    params: SparseParams = PARAMS,
) -> SealedBlocks:
    """A document of one layer with its first segments sealed, from k, v [G, S, D]."""
    resident = ResidentDocument(Holding.whole(LAYOUT), dtype=k.dtype, device=k.device)
    place = alone(num_heads=HEADS, num_kv_heads=KV_HEADS)
    blocks = SealedBlocks(resident, find_backend(backend), place, params, scale=SCALE)
    for segment_idx in range(num_segments):
        start, stop = LAYOUT.segment_span(segment_idx)
        positions = torch.arange(start, stop, dtype=torch.int32, device=k.device).unsqueeze(0)
        heads = {
            g: {"k": k[None, g, start:stop], "v": v[None, g, start:stop], "positions": positions}
            for g in range(KV_HEADS)
        }
        resident.append(segment_idx, heads)
        blocks.append()
    return blocks


def random_keys() -> tuple[Tensor, Tensor, Tensor]:
    """q [70, H, D] and k, v [G, S, D]."""
    generator = torch.Generator().manual_seed(0)
    q = 2.0 * torch.randn(70, HEADS, HEAD_DIM, generator=generator)
    k, v = torch.randn(2, KV_HEADS, LAYOUT.num_tokens, HEAD_DIM, generator=generator)
    return q, k, v


@pytest.mark.parametrize("num_segments", [1, 2, 4])
@pytest.mark.parametrize("num_before", [0, 63, 64])
def test_every_sealed_key_counts_once(num_segments: int, num_before: int) -> None:
    q, k, v = random_keys()
    blocks = sealed_blocks(k, torch.ones_like(v), num_segments=num_segments)
    part = merge_parts(blocks.attend(0, torch.zeros_like(q), num_before=num_before))
    num_keys = float(num_segments * SEGMENT_TOKENS)
    torch.testing.assert_close(part.lse.exp(), torch.full_like(part.lse, num_keys))
    torch.testing.assert_close(part.out, torch.ones_like(part.out))


def test_the_segment_before_is_read_whole_where_nothing_else_is_near() -> None:
    q, k, v = random_keys()
    blocks = sealed_blocks(k, v, num_segments=3)
    last = slice(2 * SEGMENT_TOKENS, 3 * SEGMENT_TOKENS)
    dense = reference.attend(q, k[:, last], v[:, last], scale=SCALE)
    *_, near = blocks.attend(0, q, num_before=PARAMS.local_tokens - 1)
    assert_close(near, dense)
    assert len(blocks.attend(0, q, num_before=PARAMS.local_tokens)) == 1


def test_a_block_that_one_query_needs_is_read() -> None:
    """One query of a tile looks for keys that lie together; the others do not care."""
    q, k, v = random_keys()
    wanted = slice(384, 512)
    k[:, wanted, 0] += 8.0
    q[11], q[11, :, 0] = 0.0, 64.0
    k[:, 400, 0], v[:, 400] = 30.0, 5.0
    part = merge_parts(sealed_blocks(k, v, num_segments=4).attend(0, q, num_before=64))
    dense = reference.attend(q[11:12], k[:, wanted], v[:, wanted], scale=SCALE)
    torch.testing.assert_close(part.out[11:12], dense.out, atol=1e-3, rtol=0)


def test_sinks_are_read_however_little_they_seem_to_matter() -> None:
    """Token 0 is an outlier that the mean of its block hides; all other keys are alike."""
    q, k, v = (torch.zeros_like(x) for x in random_keys())
    q[..., 0], k[..., 0] = 4.0, 2.0
    k[:, :128, 0], k[:, 0, 0] = -8.0, 8.0
    v[:, 0] = 100.0
    seen = merge_parts(sealed_blocks(k, v, num_segments=2).attend(0, q, num_before=64))
    assert_close(seen, reference.attend(q, k[:, :512], v[:, :512], scale=SCALE))


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
@pytest.mark.parametrize("num_before", [0, 64])
def test_backends_read_the_same(backend: str, num_before: int) -> None:
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("float32 is for the interpreter")
    q, k, v = random_keys()
    ours, theirs = (
        merge_parts(
            sealed_blocks(k, v, num_segments=4, backend=name).attend(0, q, num_before=num_before)
        )
        for name in (backend, "reference")
    )
    assert_close(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("num_before", [0, 64])
def test_kernels_read_as_torch_does_on_a_gpu(num_before: int) -> None:
    q, k, v = (x.to("cuda", torch.bfloat16) for x in random_keys())
    ours, theirs = (
        merge_parts(
            sealed_blocks(k, v, num_segments=4, backend=name).attend(0, q, num_before=num_before)
        )
        for name in ("triton", "torch")
    )
    # Rounded scores may swap a block for its neighbour in rank; the tail then stands for it.
    assert float((ours.out - theirs.out).abs().mean()) < 6e-2
    assert float((ours.lse - theirs.lse).abs().mean()) < 6e-2


def ingest(name: str, **options: Any) -> Callable[[Engine], str]:
    def work(engine: Engine) -> str:
        chosen = IngestOptions(segment_tokens=SEGMENT_TOKENS, chunk_tokens=128, **options)
        return engine.ingest(text=LONG_TEXT, name=name, options=chosen).document_hash

    return work


def ingest_and_ask(**options: Any) -> Callable[[Engine], Tensor]:
    """Logits after the question."""

    def work(engine: Engine) -> Tensor:
        ingest("shelves", replace=True, **options)(engine)
        asked = AskOptions(mode="exact")
        with engine.begin("shelves", QUESTION, asked, num_answer_tokens=1) as session:
            return session.forward(session.question_ids)

    return work


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_long_model(tmp_path_factory.mktemp("model"), "llama")


def test_a_budget_of_everything_is_an_exact_ingest_by_another_name(
    model: Path, tmp_path: Path
) -> None:
    exact = run_mesh("1x1", model, tmp_path, ingest_and_ask())
    whole = run_mesh(
        "1x1", model, tmp_path, ingest_and_ask(prefill="sparse", prefill_budget="100%")
    )
    torch.testing.assert_close(whole, exact, atol=1e-3, rtol=0)
    hashes = {
        run_mesh("1x1", model, tmp_path, ingest(f"d{i}", **options))
        for i, options in enumerate(
            ({}, *({"prefill": "sparse", "prefill_budget": b} for b in (None, "100%", 1200)))
        )
    }
    assert len(hashes) == 4


def test_less_is_read_and_the_estimate_brings_the_answer_near(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights attend to everything a little, and an estimate is nearer than nothing."""

    def no_tail(*args: Any, tail: object, **options: Any) -> Part:
        assert tail is not None
        return attend_blocks(*args, **options)

    attend_blocks = torch_prefill.attend_blocks
    exact = run_mesh("1x1", model, tmp_path, ingest_and_ask())
    sparse = run_mesh("1x1", model, tmp_path, ingest_and_ask(prefill="sparse"))
    monkeypatch.setattr(torch_prefill, "attend_blocks", no_tail)
    without = run_mesh("1x1", model, tmp_path / "other", ingest_and_ask(prefill="sparse"))
    with_error, without_error = (float((x - exact).abs().mean()) for x in (sparse, without))
    assert 0.0 < with_error < 0.03 * float(exact.std())
    assert with_error < without_error


@pytest.mark.gpu
def test_an_ingest_by_kernels_is_that_by_torch(tmp_path: Path) -> None:
    model = save_long_model(tmp_path / "model", "llama-heads-of-64")
    ours, theirs = (
        run_mesh(
            "1x1",
            model,
            tmp_path / backend,
            ingest_and_ask(prefill="sparse"),
            device="cuda",
            dtype="bfloat16",
            backend=backend,
        ).cpu()
        for backend in ("triton", "torch")
    )
    assert float((ours - theirs).abs().mean()) < 0.1 * float(theirs.std())


def test_ranks_with_their_own_heads_read_the_same(model: Path, tmp_path: Path) -> None:
    one, two = (
        run_mesh(mesh, model, tmp_path, ingest_and_ask(prefill="sparse")) for mesh in ("1x1", "2x1")
    )
    torch.testing.assert_close(two, one, atol=1e-3, rtol=0)


def test_ranks_that_share_segments_are_refused(model: Path, tmp_path: Path) -> None:
    def work(engine: Engine) -> str:
        with pytest.raises(UsageError, match=r"1 context rank; give --mesh with heads"):
            ingest("shelves", prefill="sparse")(engine)
        return ingest("shelves")(engine)

    assert run_mesh("1x2", model, tmp_path, work)


def test_a_resumed_ingest_has_the_bits_of_an_undisturbed_one(model: Path, tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.done_tokens > 7 * SEGMENT_TOKENS:
            raise Enough

    def disturbed(engine: Engine) -> str:
        options = IngestOptions(segment_tokens=SEGMENT_TOKENS, chunk_tokens=128, prefill="sparse")
        with pytest.raises(Enough):
            engine.ingest(text=LONG_TEXT, name="shelves", options=options, on_progress=stop)
        return ingest("shelves", prefill="sparse")(engine)

    whole = run_mesh("1x1", model, tmp_path / "a", ingest("shelves", prefill="sparse"))
    assert run_mesh("1x1", model, tmp_path / "b", disturbed) == whole


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prefill": "dense"}, "exact or sparse"),
        ({"prefill_budget": "10%"}, "give prefill sparse too"),
        ({"prefill": "sparse", "prefill_budget": "0%"}, "out of range"),
        ({"prefill": "sparse", "prefill_budget": "some"}, "neither keys nor a percentage"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        IngestOptions(**options)


def test_a_budget_has_one_spelling() -> None:
    described = {SparseParams.of(budget).describe() for budget in (None, "10%", " 10.0 % ")}
    assert len(described) == 1
    assert SparseParams.of(4096) == SparseParams.of("4096")
    assert SparseParams.of(4096).budget_keys(100_000) == 4096
    assert SparseParams.of("10%").budget_keys(100_000) == 10_000


def assert_close(found: Part, expected: Part) -> None:
    torch.testing.assert_close(found.out, expected.out, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.lse, expected.lse, atol=1e-4, rtol=1e-4)
