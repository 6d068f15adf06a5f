"""Row B5, overlap: a prefill chunk unsplit, split in two, and with its communication deleted.

The ranks are processes of `longspan launch`, each with its shard of random weights of a known
shape; every rank runs the same variants in turn, in one run. That a split changes no result beyond
rounding is measured in float32 on CPUs, whatever the device of the timing. Owns the variants and
the verdict.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.faults import reference_text
from benchmarks.harness import ROOT, note, print_row
from benchmarks.meshes import difference, ingest, run_over, trace
from collectives import Group, read_rendezvous
from kv_store import Layout
from orchestrator.cluster.rank import joined, load_worker
from orchestrator.config import DEFAULT_MODEL, resolve
from orchestrator.model.decoder import Decoder
from orchestrator.place import Place
from orchestrator.prefill import Prefill
from orchestrator.worker import Worker
from tests.mesh import LONG_TEXT, save_long_model

BAR = (
    "70B shape, 8 layers, 4 H200, chunks of 4K and 8K: unsplit, split, communication deleted, in "
    "one run; split logits within 1e-4 (float32, CPU); split never below 0.99x of unsplit where "
    "the planner splits; share of communication hidden printed"
)
CLOSE, LEAST = 1e-4, 0.99
VARIANTS = ("unsplit", "split", "deleted")


class MutedGroup:
    """A group that moves nothing: a rank takes its own tensor for everybody's."""

    def __init__(self, group: Group) -> None:
        self.rank, self.size = group.rank, group.size

    def start_all_gather(self, tensor: Tensor) -> Muted:
        """Own tensor `size` times, without a copy."""
        return Muted(tensor.unsqueeze(0).expand(self.size, *tensor.shape))

    def start_all_to_all(self, tensor: Tensor) -> Muted:
        """Own rows."""
        return Muted(tensor)

    def start_all_reduce_(self, tensor: Tensor, *, op: str = "sum") -> Muted:
        """Own tensor."""
        return Muted(tensor)


class Muted:
    """A result that is there."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def wait(self) -> Tensor:
        """The tensor."""
        return self._tensor


def main() -> int:
    """Measure the row; under a launcher, be one of its ranks."""
    arguments = _parse()
    if arguments.rank:
        return _run_rank(arguments)
    chunks = [_launch(arguments, chunk) for chunk in arguments.chunks]
    split_error = _split_error()
    has_all = arguments.device == "cuda" and arguments.nproc == 4 and arguments.layers == 8
    holds = (
        has_all
        and split_error <= CLOSE
        and all(chunk["split_speed"] >= LEAST for chunk in chunks if chunk["planner_splits"])
    )
    measured = {
        "shape": arguments.shape,
        "layers": arguments.layers,
        "ranks": arguments.nproc,
        "mesh": arguments.mesh,
        "device": arguments.device,
        "is_the_rows_machine": has_all,
        "split_error_float32_cpu": split_error,
        "chunks": chunks,
    }
    return print_row(row="B5", measured=measured, bar=BAR, holds=holds)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", action="store_true")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--nproc", type=int, default=4)
    parser.add_argument("--mesh", default="4x1")
    parser.add_argument("--shape", default="llama-3.3-70b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--chunks", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--repeats", type=int, default=12)
    known, _ = parser.parse_known_args([word for word in sys.argv[1:] if word != "B5"])
    return known


def _launch(arguments: argparse.Namespace, chunk: int) -> dict[str, Any]:
    """Run the ranks for one chunk size; what rank 0 measured."""
    own = [sys.executable, "-m", "benchmarks.bars.b5", "--rank", "--device", arguments.device]
    own += ["--mesh", arguments.mesh, "--shape", arguments.shape, "--chunks", str(chunk)]
    own += ["--layers", str(arguments.layers), "--repeats", str(arguments.repeats)]
    command = [sys.executable, "-m", "orchestrator", "launch", "--nproc", str(arguments.nproc)]
    done = subprocess.run(
        [*command, "--mesh", arguments.mesh, "--", *own],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        note(done.stderr[-3000:])
        raise RuntimeError(f"the ranks ended with {done.returncode}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    note(f"chunk {chunk}: {measured}")
    return measured


def _run_rank(arguments: argparse.Namespace) -> int:
    config = resolve(
        model=f"shape:{arguments.shape}@{arguments.layers}",
        device=arguments.device,
        mesh=arguments.mesh,
    )
    with joined(read_rendezvous(timeout_s=300.0), config) as group:
        worker = load_worker(config, group).worker
        measured = _time_variants(worker, arguments.chunks[0], arguments.repeats)
        if group.rank == 0:
            print(json.dumps(measured), flush=True)
    return 0


def _time_variants(worker: Worker, chunk: int, repeats: int) -> dict[str, Any]:
    """Seconds of a chunk behind one sealed segment of its size, by variant, all in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    runs = _variants(worker, chunk)
    for i in range(-2, repeats):
        for name in VARIANTS:
            worker.place.flat.control.barrier()
            began = time.perf_counter()
            runs[name]()
            worker.place.flat.settle()
            if i >= 0:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    exposed = medians["unsplit"] - medians["deleted"]
    return {
        "chunk_tokens": chunk,
        "median_s": medians,
        "spread_s": {name: [min(taken), max(taken)] for name, taken in seconds.items()},
        "unsplit_over_deleted": medians["unsplit"] / medians["deleted"],
        "split_speed": medians["unsplit"] / medians["split"],
        "communication_hidden": (medians["unsplit"] - medians["split"]) / exposed
        if exposed > 0
        else None,
        "planner_splits": True,
    }


def _variants(worker: Worker, chunk: int) -> dict[str, Callable[[], None]]:
    muted = _muted(worker)
    ids = torch.randint(
        0, worker.model.cfg.vocab_size, (chunk,), device=worker.model.decoder.device
    )
    half = chunk // 2 // 128 * 128
    loud = _prepare(worker.model.decoder, worker, worker.place, chunk, ids)
    silent = _prepare(muted[0], worker, muted[1], chunk, ids)

    def run(prefill: Prefill, split: int | None) -> Callable[[], None]:
        def fill() -> None:
            prefill.fill(ids, chunk, split=split)
            prefill._attention.restart()  # the next repeat takes the same place

        return fill

    return {"unsplit": run(loud, None), "split": run(loud, half), "deleted": run(silent, None)}


def _muted(worker: Worker) -> tuple[Decoder, Place]:
    """The same rank with groups that move nothing."""
    place, decoder = worker.place, worker.model.decoder
    silent: Any = {name: MutedGroup(getattr(place, name)) for name in ("flat", "context", "heads")}
    return (
        Decoder(
            decoder.cfg,
            decoder.weights,
            worker.backend.linear,
            shard=decoder.shard,
            group=silent["flat"],
        ),
        replace(place, **silent),
    )


def _prepare(decoder: Decoder, worker: Worker, place: Place, chunk: int, ids: Tensor) -> Prefill:
    """A prefill with one segment of `chunk` tokens sealed, and another open."""
    cfg = decoder.cfg
    layout = Layout(
        num_tokens=2 * chunk,
        segment_tokens=chunk,
        sinks=4,
        window=64,
        num_full_layers=len(cfg.full_layers),
        num_sliding_layers=0,
        sliding_window=0,
        num_kv_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        kv_dtype=str(decoder.dtype).removeprefix("torch."),
    )
    prefill = Prefill(decoder, worker.backend, layout, clusters=None, place=place)
    prefill.fill(ids, 0)
    prefill.append(0, prefill.build(0))
    return prefill


def _split_error() -> float:
    """Largest change of a logit where every chunk of an ingest is split: float32, on CPUs."""
    largest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        tiny = str(save_long_model(Path(folder) / "tiny"))
        cases = {tiny: (LONG_TEXT, ("1x2", "2x1")), DEFAULT_MODEL: (reference_text(1500), ("1x2",))}
        for i, (model, (text, meshes)) in enumerate(cases.items()):
            store = Path(folder) / str(i)
            for mesh in meshes:
                for split in (None, 100):
                    work = ingest(f"{mesh}-{split}", text=text, split_tokens=split)
                    run_over("threads", mesh, model, store, work)
                whole, cut = (
                    run_over("threads", "1x1", model, store, trace(f"{mesh}-{split}", "exact"))
                    for split in (None, 100)
                )
                largest = max(largest, difference(cut, whole))
    return largest


if __name__ == "__main__":
    sys.exit(main())
