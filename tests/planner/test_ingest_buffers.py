"""What an ingest is predicted to hold at its peak, against the tensors that it holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from orchestrator import sealing
from orchestrator.model.decoder import Decoder
from orchestrator.model.shapes import random_weights, shape_config
from orchestrator.planner.ingest_buffers import chunk_phase, cluster_phases
from orchestrator.planner.memory import ingest_memory
from orchestrator.prefill import Prefill
from sparse_attn.api import find_backend
from sparse_attn.select.centroid_build import CentroidParams, build
from tests.planner.machines import LLAMA, choice, machine, workload

CPU = torch.device("cpu")
WEAK_REF: Any = StorageWeakRef
SEGMENT_TOKENS, NUM_TOKENS, CHUNK_TOKENS = 256, 512, 32
NUM_PROBLEMS = LLAMA.num_layers * LLAMA.num_kv_heads
SEGMENT_BYTES = 8192 * NUM_PROBLEMS * 2 * LLAMA.head_dim * 2
TOPOLOGY = replace(machine(1), dtype="float32")


@contextmanager
def live_bytes() -> Iterator[list[int]]:
    """Bytes of every storage that an operator gave out and that is still there, after each one."""
    seen: dict[int, tuple[Any, int]] = {}
    totals: list[int] = []

    def run(_: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for at in [at for at, (ref, _) in seen.items() if ref.expired()]:
            del seen[at]
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                ref = WEAK_REF(x.untyped_storage())
                seen.setdefault(ref.cdata, (ref, x.untyped_storage().nbytes()))
        totals.append(sum(num_bytes for _, num_bytes in seen.values()))
        return out

    with type("LiveBytes", (TorchDispatchMode,), {"__torch_dispatch__": run})():
        yield totals


def test_an_ingest_on_a_gpu_holds_what_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sealing, "build", partial(build, kernels=True))
    cfg = replace(shape_config("shape:llama-3.1-8b@2"), num_heads=4, num_kv_heads=2)
    cfg = replace(cfg, model_dim=32, mlp_dim=64, head_dim=8, vocab_size=259)
    decoder = Decoder(cfg, random_weights(cfg, dtype=torch.float32, device=CPU))
    work = workload(NUM_TOKENS, cfg=cfg, segment_tokens=SEGMENT_TOKENS)
    clusters = CentroidParams(iterations=1).for_document(NUM_TOKENS)
    ids = torch.arange(NUM_TOKENS) % cfg.vocab_size
    with live_bytes() as live:
        prefill = Prefill(decoder, find_backend("torch"), work.layout("float32"), clusters=clusters)
        for segment_idx in range(NUM_TOKENS // SEGMENT_TOKENS):
            first = segment_idx * SEGMENT_TOKENS
            for start in range(first, first + SEGMENT_TOKENS, CHUNK_TOKENS):
                prefill.fill(ids[start : start + CHUNK_TOKENS], start)
            prefill.append(segment_idx, prefill.build(segment_idx))
    use = ingest_memory(work, choice(chunk_tokens=CHUNK_TOKENS), TOPOLOGY)
    assert use.tensors - use.weights == pytest.approx(max(live), rel=0.05)


def test_a_segment_on_its_way_to_the_disk_is_beside_the_next_ones_chunks() -> None:
    one, two = (workload(n, segment_tokens=8192) for n in (8192, 16_384))
    phases = [sum(chunk_phase(work, choice(), machine())) for work in (one, two)]
    assert phases[1] - phases[0] == SEGMENT_BYTES + 8192 * 4 * NUM_PROBLEMS


def test_sealing_on_a_gpu_holds_a_segment_twice_in_slot_order() -> None:
    use = ingest_memory(workload(3 * 8192, segment_tokens=8192), choice(), machine(1))
    # For all heads at once, then by head; with one head both are the same.
    assert use.temporary == pytest.approx(2 * SEGMENT_BYTES + use.tables / 3, rel=0.02)
    narrow = replace(LLAMA, num_kv_heads=1, num_heads=4)
    alone = workload(3 * 8192, segment_tokens=8192, cfg=narrow)
    phases = cluster_phases(alone, choice(), machine(1))
    assert sum(phases[1]) == pytest.approx(SEGMENT_BYTES / 8, rel=0.05)
