"""Seconds of one decode step on synthetic KV of a given length, beside what the bytes allow."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass

import torch

from orchestrator.answering import RECALL_PERIOD
from orchestrator.evaluation.synthetic import NOTICE, synthetic_context
from orchestrator.model.attention import Attention, make_attention
from orchestrator.model.decode_graph import DecodeGraph
from orchestrator.model.load import LoadedModel
from orchestrator.model.recorder import Recorder
from orchestrator.selection import decide
from orchestrator.steps import AttentionPlan
from orchestrator.types import AskOptions, Mode
from sparse_attn.api import Backend
from sparse_attn.select.centroid_build import CentroidParams


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTiming:
    """One mode on one length; limit_s: step_bytes at the bandwidth that this run measured; build_s:
    of the document.
    """

    notice: str
    model: str
    mode: str
    levels: int
    num_tokens: int
    kv_dtype: str
    keys_per_cluster: int
    clusters_per_group: int
    build_s: float
    bandwidth_bytes_per_s: float
    step_bytes: int
    limit_s: float
    median_s: float
    min_s: float
    max_s: float

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


def measure_decode(
    model: LoadedModel,
    backend: Backend,
    *,
    num_tokens: int,
    segment_tokens: int,
    modes: tuple[Mode, ...],
    budget: str,
    repeats: int,
    kv_dtype: str | None = None,
    clusters: CentroidParams | None = None,
) -> list[DecodeTiming]:
    """Time one-token forwards in each mode on the same synthetic document; kv_dtype: as in
    `IngestOptions`.
    """
    decoder, cfg, clusters = model.decoder, model.cfg, clusters or CentroidParams()
    began = time.perf_counter()
    context = synthetic_context(
        cfg,
        num_tokens=num_tokens,
        segment_tokens=segment_tokens,
        dtype=decoder.dtype,
        device=decoder.device,
        kv_dtype=kv_dtype,
        clusters=clusters,
    )
    bandwidth = measure_read_bandwidth(decoder.device)  # waits for what was queued
    build_s = time.perf_counter() - began
    timings = []
    for mode in modes:
        decision = decide(
            AskOptions(mode=mode, budget=budget if mode == "centroid" else None),
            num_tokens=num_tokens,
            num_steady=context.num_steady,
            keys_per_cluster=clusters.keys_per_cluster,
        )
        plan = AttentionPlan(
            mode=mode,
            keys=decision.retrieved_keys or 0,
            levels=decision.levels,
            recall_period=RECALL_PERIOD,
        )
        recorder = Recorder(context.resident, context.place, recall_period=plan.recall_period)
        attention = make_attention(
            context,
            plan,
            backend,
            recorder,
            scale=cfg.attention_scale,
            windows=cfg.windows,
            capacity_tokens=repeats + 2,
        )
        seconds = _time_steps(model, attention, num_tokens, repeats)
        step_bytes = recorder.bytes_read_here() // (repeats + 2) + decoder.num_bytes
        timings.append(
            DecodeTiming(
                notice=NOTICE,
                model=model.name,
                mode=mode,
                levels=decision.levels,
                num_tokens=num_tokens,
                kv_dtype=context.resident.layout.kv_dtype,
                keys_per_cluster=clusters.keys_per_cluster,
                clusters_per_group=clusters.clusters_per_group,
                build_s=build_s,
                bandwidth_bytes_per_s=bandwidth,
                step_bytes=step_bytes,
                limit_s=step_bytes / bandwidth,
                median_s=statistics.median(seconds),
                min_s=min(seconds),
                max_s=max(seconds),
            )
        )
    return timings


def measure_read_bandwidth(device: torch.device, *, num_bytes: int = 1 << 30) -> float:
    """Bytes per second of summing a large tensor: what a streaming read can reach here."""
    x = torch.ones(num_bytes // 4, device=device)
    best_s = min(_time_once(lambda: float(x.sum())) for _ in range(4))
    return num_bytes / best_s


def _time_steps(
    model: LoadedModel, attention: Attention, position: int, repeats: int
) -> list[float]:
    decoder = model.decoder
    is_graph = attention.is_static and decoder.device.type == "cuda"
    graph = DecodeGraph(decoder, attention) if is_graph else None

    def step(offset: int) -> None:
        if graph is not None:
            logits = graph.forward(0, position + offset)
        else:
            ids = torch.zeros(1, dtype=torch.int64, device=decoder.device)
            hidden = decoder.forward(ids, ids + position + offset, attention)
            logits = decoder.logits(hidden)[0]
        attention.advance(1)
        int(logits.argmax())

    with torch.inference_mode():
        for offset in range(2):
            step(offset)
        return [_time_once(lambda o=offset: step(o + 2)) for offset in range(repeats)]


def _time_once(function: object) -> float:
    assert callable(function)
    began = time.perf_counter()
    function()
    return time.perf_counter() - began
