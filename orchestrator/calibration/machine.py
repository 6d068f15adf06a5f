"""The machine as a whole: which ranks are timed with how many threads, and what they add up to.

Owns the topology that a calibration writes. Refuses to know how each rate is measured.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from orchestrator.calibration import arithmetic, questions
from orchestrator.calibration.arithmetic import SIZES, Probe
from orchestrator.calibration.links import measure_together
from orchestrator.calibration.others import Usage
from orchestrator.calibration.questions import (
    QUESTIONS_ON_CPU,
    QUESTIONS_ON_GPU,
    ProductRates,
    QuestionSizes,
    make_documents,
    measure_questions,
)
from orchestrator.calibration.storage import measure_disk
from orchestrator.calibration.task import Task
from orchestrator.calibration.timing import Stopwatch
from orchestrator.cluster.environment import own_packages
from orchestrator.planner.topology import Contention, Link, Rates, Topology
from sparse_attn.api import find_backend

Note = Callable[[str], None]
# What two halves of a chunk can hide: nothing where a rank's cores are its only ones; on a GPU as
# much as NCCL beside a product leaves (`planner/machines.py`).
_OVERLAP_ON_GPU = 0.65
_FIRST_USE_TIMEOUT_S = 300
_GPU_NAME = re.compile(r"\b([A-Z]+[0-9]+[A-Z]*)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is timed. sizes: `cpu`, `cuda` or `tiny`; repeats: multiplies how long each probe is
    repeated.
    """

    sizes: str
    questions: QuestionSizes
    repeats: float = 1.0

    @classmethod
    def full(cls, device: str) -> Effort:
        """What a plan should stand on; about a minute on two cores."""
        is_gpu = device == "cuda"
        return cls(sizes=device, questions=QUESTIONS_ON_GPU if is_gpu else QUESTIONS_ON_CPU)


def calibrate(
    *,
    device: str,
    backend: str,
    store: Path,
    effort: Effort | None = None,
    note: Note = lambda _: None,
) -> Topology:
    """Measure this machine; restores the number of threads.

    Raises CalibrationFailed on a machine too busy for it, RankFailed, BackendUnknown.
    """
    effort = effort or Effort.full(device)
    threads, before = torch.get_num_threads(), Usage.now()
    try:
        topology = _calibrate(device, backend, store, effort, note)
    finally:
        torch.set_num_threads(threads)
    others = f"others used {Usage.now().others_share(before):.0%} of the cores"
    note(others)
    return replace(topology, origin=f"{topology.origin}; {others}")


def _calibrate(device: str, backend: str, store: Path, effort: Effort, note: Note) -> Topology:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    num_devices = _count_devices(device)
    probe = Probe(
        backend=find_backend(backend),
        stopwatch=Stopwatch(device=torch.device(device), effort=effort.repeats),
        sizes=SIZES[effort.sizes],
        dtype=dtype,
    )
    note("documents to look things up in")
    documents = {
        dim: make_documents(probe, effort.questions, dim) for dim in effort.questions.head_dims
    }
    rates = []
    for threads in _thread_counts(device, num_devices):
        note(f"one rank{f' of {threads} threads' if threads else ''}")
        torch.set_num_threads(max(1, threads))
        rates.append(_measure_rates(probe, effort, documents, threads))
    note("files")
    disk = measure_disk(store)
    name = str(dtype).removeprefix("torch.")
    links: list[Link] = []
    contention: list[Contention] = []
    for num_ranks in _rank_counts(num_devices):
        note(f"{num_ranks} ranks beside each other")
        threads = num_devices // num_ranks if device == "cpu" else 0
        task = Task(device=device, dtype=name, backend=backend, sizes=effort.sizes, threads=threads)
        together = measure_together(num_ranks, task)
        links += together.links
        alone = max((r for r in rates if r.threads <= threads), key=lambda r: r.threads)
        contention.append(together.contention(alone))
    process_bytes, start_s = _measure_first_use(backend, device)
    return Topology(
        kind=_kind(device),
        num_devices=num_devices,
        memory_bytes=_memory_bytes(device),
        process_bytes=process_bytes,
        start_s=start_s,
        dtype=name,
        num_sms=_count_sms(device),
        overlap_share=_OVERLAP_ON_GPU if device == "cuda" else 0.0,
        rates=tuple(rates),
        contention=tuple(contention),
        links=tuple(links),
        disk=disk,
        origin=f"measured on this machine by longspan calibrate, backend {backend}",
    )


def _measure_rates(
    probe: Probe,
    effort: Effort,
    documents: dict[int, questions.Documents],
    threads: int,
) -> Rates:
    products = ProductRates(
        weight_bytes_per_s=arithmetic.weight_bytes_per_s(probe),
        question_flops_per_s=arithmetic.question_curve(probe),
    )
    asked = measure_questions(probe, effort.questions, documents, products)
    return Rates(
        threads=threads,
        matrix_flops_per_s=arithmetic.matrix_curve(probe),
        question_flops_per_s=products.question_flops_per_s,
        attention_flops_per_s=arithmetic.attention_curve(probe),
        causal_flops_per_s=arithmetic.causal_curve(probe),
        cluster_flops_per_s=arithmetic.cluster_curve(probe),
        lookup_flops_per_s=asked.lookup_flops_per_s,
        list_units_per_s=asked.list_units_per_s,
        weight_bytes_per_s=products.weight_bytes_per_s,
        kv_bytes_per_s=asked.kv_bytes_per_s,
        lookup_bytes_per_s=asked.lookup_bytes_per_s,
        elementwise_bytes_per_s=arithmetic.elementwise_bytes_per_s(probe),
        fresh_bytes_per_s=arithmetic.fresh_bytes_per_s(probe),
        exact_layer_s=asked.exact_layer_s,
        centroid_layer_s=asked.centroid_layer_s,
        exact_tile_s=asked.exact_tile_s,
        centroid_tile_s=asked.centroid_tile_s,
        run_s=asked.run_s,
    )


def _measure_first_use(backend: str, device: str) -> tuple[int, float]:
    """What `first_use.py` writes."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "orchestrator.calibration.first_use", backend, device],
        env={**os.environ, **own_packages(os.environ)},
        capture_output=True,
        text=True,
        check=True,
        timeout=_FIRST_USE_TIMEOUT_S,
    )
    num_bytes, seconds = done.stdout.split()
    return int(num_bytes), float(seconds)


def _count_devices(device: str) -> int:
    return torch.cuda.device_count() if device == "cuda" else len(os.sched_getaffinity(0))


def _thread_counts(device: str, num_devices: int) -> list[int]:
    """Threads of a rank that are timed: 1, 2, 4 and so on, and all cores; 0 on a GPU."""
    if device == "cuda":
        return [0]
    return sorted({*_powers(num_devices), num_devices})


def _rank_counts(num_devices: int) -> list[int]:
    """Numbers of ranks that are timed beside each other."""
    return sorted({*_powers(num_devices), num_devices} - {1})


def _powers(limit: int) -> set[int]:
    return {1 << i for i in range(limit.bit_length()) if 1 << i <= limit}


def _kind(device: str) -> str:
    """`cpu`, or a GPU's short name, such as H100."""
    if device == "cpu":
        return "cpu"
    match = _GPU_NAME.search(torch.cuda.get_device_name(0).upper())
    return match[1] if match else "GPU"


def _memory_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.mem_get_info(0)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _count_sms(device: str) -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count if device == "cuda" else 0
