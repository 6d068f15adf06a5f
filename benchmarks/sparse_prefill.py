"""What `ingest --prefill sparse` costs in quality: `python -m benchmarks.sparse_prefill`.

Two measures on a model with real weights, each against an exact ingest of the same document: the
loss of every token of a text (Python's language reference) once `SKIPPED` tokens are before it, and
needles that are asked for in mode `exact` afterwards. Judges nothing.

    --tokens N     of the text [7168], more than `SKIPPED`; 0 for none
    --cases N      needles, the lengths and depths of row A3 in turn [6]; 0 for none
    --threads N    of torch
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import fmean
from time import perf_counter

import torch
from torch import Tensor

from benchmarks.harness import environment, note
from kv_store import Layout
from orchestrator.config import DEFAULT_MODEL
from orchestrator.engine import Engine
from orchestrator.evaluation.haystacks import build_cases, reference_paragraphs
from orchestrator.evaluation.niah import NiahMode, ask_case, ingested
from orchestrator.ingest import NUM_SINKS, IngestOptions
from orchestrator.prefill import Prefill
from orchestrator.sparse_prefill import SparseParams
from sparse_attn.select.centroid_build import CentroidParams

SEGMENT_TOKENS, CHUNK_TOKENS, SKIPPED = 1024, 512, 3072
LENGTHS, DEPTHS = (4096, 7000), (0.2, 0.5, 0.8)
# The first is what `longspan ingest` does; the others do without its floor of keys, and read the
# segment before for the first half of each segment alone.
SETTINGS: dict[str, SparseParams] = {
    "default": SparseParams(),
    **{
        f"{budget}, no floor": SparseParams(budget=budget, min_keys=128, local_tokens=CHUNK_TOKENS)
        for budget in ("5%", "10%", "25%")
    },
    "10%, no floor, blocks of 64": SparseParams(
        min_keys=128, local_tokens=CHUNK_TOKENS, block_slots=64
    ),
}


def main() -> int:
    """Print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=7168)
    parser.add_argument("--cases", type=int, default=6)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine.load(options.model, store=Path(folder), threads=options.threads) as engine,
    ):
        measured = {
            "model": options.model,
            "text": dict(_compare_losses(engine, options.tokens)),
            "needles": list(_ask_needles(engine, options.cases)),
            "environment": environment(),
        }
    sys.stdout.write(json.dumps(measured) + "\n")
    return 0


def _compare_losses(engine: Engine, num_tokens: int) -> Iterator[tuple[str, dict[str, float]]]:
    if not num_tokens:
        return
    text = "\n\n".join(reference_paragraphs())
    ids = torch.tensor(engine.model.tokenizer.encode(text)[0][:num_tokens])
    exact = _losses(engine, ids, None)
    yield "exact", {"loss": float(exact.mean())}
    for name, params in SETTINGS.items():
        started = perf_counter()
        added = _losses(engine, ids, params) - exact
        found = {
            "loss_added": float(added.mean()),
            "standard_error": float(added.std()) / len(added) ** 0.5,
            "mean_difference": float(added.abs().mean()),
            "seconds": perf_counter() - started,
        }
        note(f"{name}: {', '.join(f'{k} {v:.4f}' for k, v in found.items())}")
        yield name, found


def _losses(engine: Engine, ids: Tensor, sparse: SparseParams | None) -> Tensor:
    """Natural-log loss of every token of the document from the `SKIPPED`-th on."""
    model = engine.model
    layout = _layout(engine, len(ids))
    prefill = Prefill(
        model.decoder, engine.backend, layout, clusters=CentroidParams(), sparse=sparse
    )
    losses = []
    for segment_idx in range(layout.num_segments):
        start, stop = layout.segment_span(segment_idx)
        for first in range(start, stop, CHUNK_TOKENS):
            last = min(first + CHUNK_TOKENS, stop)
            hidden = prefill.forward(ids[first:last], first)
            following = ids[first + 1 : last + 1]
            with torch.inference_mode():
                logits = model.decoder.logits(hidden[: len(following)])
                losses.append(
                    torch.nn.functional.cross_entropy(logits, following, reduction="none")
                )
        prefill.append(segment_idx, prefill.build(segment_idx))
    return torch.cat(losses)[SKIPPED:]


def _layout(engine: Engine, num_tokens: int) -> Layout:
    cfg = engine.model.cfg
    return Layout(
        num_tokens=num_tokens,
        segment_tokens=SEGMENT_TOKENS,
        sinks=NUM_SINKS,
        window=64,
        num_full_layers=len(cfg.full_layers),
        num_sliding_layers=0,
        sliding_window=0,
        num_kv_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        kv_dtype=str(engine.model.decoder.dtype).removeprefix("torch."),
    )


def _ask_needles(engine: Engine, num_cases: int) -> Iterator[dict[str, object]]:
    encode = engine.model.tokenizer.encode
    cases = build_cases(
        lengths_tokens=LENGTHS,
        depths=DEPTHS,
        count_tokens=lambda text: len(encode(text)[0]),
        haystacks=("reference",),
    )
    rows: dict[str, list[tuple[bool, float]]] = {"exact": [], "sparse": []}
    for case in islice(cases, num_cases):
        for prefill in ("exact", "sparse"):
            options = IngestOptions(segment_tokens=SEGMENT_TOKENS, prefill=prefill)
            with ingested(engine, case, options) as name:
                row = ask_case(engine, name, case, NiahMode(mode="exact"))
            rows[prefill].append((row.is_found, row.nll_per_token))
            note(f"{case.length_tokens} tokens, {case.depth}, {prefill}: {row.answer!r}")
    for prefill, found in rows.items():
        if found:
            yield {
                "prefill": prefill,
                "num_cases": len(found),
                "num_found": sum(is_found for is_found, _ in found),
                "answer_loss": fmean(loss for _, loss in found),
            }


if __name__ == "__main__":
    sys.exit(main())
