"""Row C6, sparse ingest: a document of 256K tokens of the 8B shape, end to end, sparse and exact.

One H200. Both ingests are `Engine.ingest` as the command line calls it, each once, from text to a
sealed document on disk, which is then removed. Owns where the time goes: chunks, clusters, taking
the stored form in, and waiting for the disk, where a segment is written while the next is computed.
Each part is waited for, and the seconds of copying to the host and of writing are beside them.
Weights and text are noise: times alone mean something (quality: `benchmarks/sparse_prefill.py`).

    --tokens N          a shorter document: try 32768 first, no row holds for it
    --chunk-tokens N    [what `longspan ingest` takes]
    --dense torch|kernels   what attends where everything is read, with the triton backend [torch]
    --budget N|P%       of the sparse ingest [10%]
    --folder DIR        where the document is written [a temporary folder]: 50 GB at 256K tokens
    --device cpu --model shape:llama-3.1-8b@2 --tokens 2048 --segment-tokens 512    tries the script
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.harness import note, print_row
from kv_store import Layout, SegmentFiles
from orchestrator.engine import Engine
from orchestrator.ingest import MAX_CHUNK_TOKENS, NUM_SINKS, IngestOptions
from orchestrator.model.config import ModelConfig
from orchestrator.prefill import Prefill
from orchestrator.segment_writing import SegmentWriting
from orchestrator.sparse_prefill import SparseParams
from sparse_attn.api import find_backend
from sparse_attn.kernels.backend import TritonBackend

BAR = (
    "`ingest --prefill sparse` of 256K tokens of the 8B shape takes at most 1 / 2.3 of an exact "
    "ingest of the same text, end to end, on one H200"
)
MIN_SPEEDUP, NUM_TOKENS = 2.3, 262_144
DENSE_FLOPS = 989e12  # of an H100 or H200, half precision
# Methods that are timed, by what they are called here.
PARTS: dict[str, tuple[type, str]] = {
    "chunks_s": (Prefill, "fill"),
    "clusters_s": (Prefill, "build"),
    "wait_for_disk_s": (SegmentWriting, "wait"),
    "append_s": (Prefill, "append"),
}
# The same, beside the computation where there is a GPU: not part of the whole. leaving_s: from when
# a segment is built until it is on disk; writing_s: of that, its files.
WRITING: dict[str, tuple[type, str]] = {
    "leaving_s": (SegmentWriting, "_write"),
    "writing_s": (SegmentFiles, "write"),
}
# Keys of the second layer, whose first layer read by blocks: mean difference, of their mean size.
MAX_DIFFERENCE = 2e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingested:
    """Seconds of one ingest and of its parts; rest_s: tokens, text, manifest, and the host."""

    total_s: float
    parts_s: dict[str, float]
    leaving_s: float
    writing_s: float
    rest_s: float
    limit_s: float
    disk_bytes: int
    peak_bytes: int | None

    def shares(self) -> dict[str, float]:
        """Of the whole, by part."""
        parts = {**self.parts_s, "rest_s": self.rest_s}
        return {name.removesuffix("_s"): s / self.total_s for name, s in parts.items()}


def main() -> int:
    """Measure the row."""
    options = _options()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("row C6: no GPU; limit one H200; run it there, or try --device cpu")
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
        _load(options, folder) as engine,
    ):
        difference = _check(engine, options)
        note(f"blocks by {engine.config.backend} and by torch: keys differ by {difference:.3g}")
        if not difference <= MAX_DIFFERENCE:
            raise SystemExit(f"c6: keys differ by {difference:.3g}, at most {MAX_DIFFERENCE}")
        exact = _measure(engine, options, _ingest_options(options))
        sparse = _measure(engine, options, _sparse_options(options))
        backend, dtype = engine.config.backend, engine.config.dtype
    speedup = exact.total_s / sparse.total_s
    measured = {
        "speedup": speedup,
        "speedup_of_chunks": exact.parts_s["chunks_s"] / sparse.parts_s["chunks_s"],
        "model": options.model,
        "num_tokens": options.tokens,
        "chunk_tokens": options.chunk_tokens,
        "backend": backend,
        "dense": options.dense,
        "dtype": dtype,
        "sparse": SparseParams.of(options.budget).to_dict(),
        "exact_s": asdict(exact) | {"shares": exact.shares()},
        "sparse_s": asdict(sparse) | {"shares": sparse.shares()},
        "runs_of_each": 1,
        "difference_from_torch": difference,
    }
    is_whole = options.tokens >= NUM_TOKENS and options.device == "cuda"
    return print_row(
        row="C6", measured=measured, bar=BAR, holds=speedup >= MIN_SPEEDUP and is_whole
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend")
    parser.add_argument("--model", default="shape:llama-3.1-8b")
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS)
    parser.add_argument("--segment-tokens", type=int, default=8192)
    parser.add_argument("--chunk-tokens", type=int, default=MAX_CHUNK_TOKENS)
    parser.add_argument("--dense", choices=("torch", "kernels"), default="torch")
    parser.add_argument("--budget")
    parser.add_argument("--folder")
    return parser.parse_known_args()[0]


def _ingest_options(options: argparse.Namespace) -> IngestOptions:
    return IngestOptions(segment_tokens=options.segment_tokens, chunk_tokens=options.chunk_tokens)


def _sparse_options(options: argparse.Namespace) -> IngestOptions:
    return replace(_ingest_options(options), prefill="sparse", prefill_budget=options.budget)


def _load(options: argparse.Namespace, folder: str) -> Engine:
    """An engine whose model holds the document, which is longer than such models were made for."""
    engine = Engine.load(
        options.model, store=Path(folder), device=options.device, backend=options.backend
    )
    if options.dense == "kernels":
        if not isinstance(engine.backend, TritonBackend):
            raise SystemExit(
                f"c6: --dense kernels with backend {engine.config.backend}; limit triton; give "
                "--backend triton"
            )
        engine.backend.dense_kernels = True
    worker = engine.executor.worker
    cfg = replace(worker.model.cfg, max_context_tokens=2 * options.tokens)
    worker.model = replace(worker.model, cfg=cfg)
    return engine


def _measure(engine: Engine, options: argparse.Namespace, chosen: IngestOptions) -> Ingested:
    """One ingest, after a short one that compiles kernels and opens libraries."""
    limit_s = _limit_s(engine.model.cfg, options, chosen.sparse())
    note(f"{chosen.prefill}: limit of its products {limit_s:.2f} s")
    # As many segments as it takes to choose among blocks in every way.
    warm_tokens = min(options.tokens, 4 * options.segment_tokens)
    engine.ingest(text=_text(warm_tokens), name="warm", options=chosen)
    engine.remove("warm")
    is_cuda = options.device == "cuda"
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    wait = _wait_for_computing if is_cuda else _no_wait
    with _timed(PARTS, wait) as parts_s, _timed(WRITING, _no_wait) as writing:
        started = perf_counter()
        engine.ingest(text=_text(options.tokens), name="long", options=chosen)
        total_s = perf_counter() - started
    (info,) = engine.docs()
    engine.remove("long")
    found = Ingested(
        total_s=total_s,
        parts_s=dict(parts_s),
        leaving_s=writing["leaving_s"],
        writing_s=writing["writing_s"],
        rest_s=total_s - sum(parts_s.values()),
        limit_s=limit_s,
        disk_bytes=info.disk_bytes,
        peak_bytes=torch.cuda.max_memory_allocated() if is_cuda else None,
    )
    shares = ", ".join(f"{name} {share:.1%}" for name, share in found.shares().items())
    note(f"{chosen.prefill}: {total_s:.2f} s: {shares}")
    gigabytes, moving_s = info.disk_bytes / 1e9, max(0.0, found.leaving_s - found.writing_s)
    note(f"  {gigabytes:.1f} GB: to the host {moving_s:.2f} s, to the disk {found.writing_s:.2f} s")
    return found


@contextmanager
def _timed(
    methods: Mapping[str, tuple[type, str]], wait: Callable[[], object]
) -> Iterator[dict[str, float]]:
    """Seconds in every method, filled in while the context lasts; wait: for the device."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            wait()
            started = perf_counter()
            result = method(*args, **kwargs)
            wait()
            seconds[name] += perf_counter() - started
            return result

        return call

    patches = [
        mock.patch.object(owner, method, timed(name, getattr(owner, method)))
        for name, (owner, method) in methods.items()
    ]
    for patch in patches:
        patch.start()
    try:
        yield seconds
    finally:
        for patch in patches:
            patch.stop()


def _limit_s(cfg: ModelConfig, options: argparse.Namespace, sparse: SparseParams | None) -> float:
    """Products of the layers' matrices and of attention to what is read, at the tensor cores' peak;
    estimates, clusters and files left out.
    """
    heads, dim = cfg.num_heads * cfg.head_dim, cfg.model_dim
    weights = 2 * dim * heads + 2 * dim * cfg.num_kv_heads * cfg.head_dim + 3 * dim * cfg.mlp_dim
    length, pairs = options.segment_tokens, 0.0
    for start in range(0, options.tokens, options.chunk_tokens):
        tokens = min(options.chunk_tokens, options.tokens - start)
        before = start % length
        sealed = start - before
        if sparse is not None:
            near = length if before < sparse.local_tokens and sealed else 0
            sealed = near + min(sealed - near, sparse.budget_keys(sealed - near))
        pairs += tokens * (sealed + before + tokens / 2)
    flops = 2.0 * options.tokens * weights + 4.0 * pairs * heads
    return float(cfg.num_layers * flops / DENSE_FLOPS)


def _check(engine: Engine, options: argparse.Namespace) -> float:
    """How far keys of a short sparse ingest by this backend are from those by torch's operators."""
    cfg, tokens = engine.model.cfg, 4 * 1024
    layout = Layout(
        num_tokens=tokens,
        segment_tokens=1024,
        sinks=NUM_SINKS,
        window=64,
        num_full_layers=len(cfg.full_layers),
        num_sliding_layers=0,
        sliding_window=0,
        num_kv_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        kv_dtype=str(engine.model.decoder.dtype).removeprefix("torch."),
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(cfg.vocab_size, (tokens,), generator=generator).to(options.device)
    params = SparseParams(min_keys=256, local_tokens=512)
    keys: list[Tensor] = []
    for backend in (engine.backend, find_backend("torch")):
        prefill = Prefill(engine.model.decoder, backend, layout, clusters=None, sparse=params)
        for segment_idx in range(layout.num_segments):
            start, stop = layout.segment_span(segment_idx)
            for first in range(start, stop, 512):
                prefill.fill(ids[first : first + 512], first)
            prefill.append(segment_idx, prefill.build(segment_idx))
        keys.append(prefill.resident.k[1].float().clone())
    return float((keys[0] - keys[1]).abs().mean() / keys[1].abs().mean())


def _text(num_tokens: int) -> str:
    """Noise of that many tokens with what is put before a document: a token is a byte."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (num_tokens - 64,), generator=generator)
    return bytes(letters.tolist()).decode()


def _wait_for_computing() -> None:
    """The stream that computes; a segment that leaves on another one is not waited for."""
    torch.cuda.current_stream().synchronize()


def _no_wait() -> None:
    """On a CPU, what returned is done."""


if __name__ == "__main__":
    sys.exit(main())
