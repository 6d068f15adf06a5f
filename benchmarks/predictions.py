"""`python -m benchmarks.predictions`: what row B6 will measure, predicted and written down first.

Owns the cases and the file of predictions, which is committed before the cases are run: a case is
*fresh* if it was never run while the formulas were made. Refuses to measure.

    --topology FILE   of the machine [that of longspan calibrate]; its cases alone are written anew
    --out FILE        where predictions are kept
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, environment, note
from collectives.mesh import parse_mesh
from orchestrator.planner import Choice, Plan, Topology, Workload, encode_topology, predict
from orchestrator.planning import (
    PlanRequest,
    default_topology_file,
    read_model,
    read_topology,
    readings_of,
)

FILE = RESULTS / "predictions.json"
BUDGET = "12.5%"
ANSWER_TOKENS = 16
# What every question becomes with the chat template of its model, in tokens.
QUESTION_TOKENS = {"smollm2-135m": 17, "shape:llama-3.1-8b": 54}
CHUNK_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One document on one mesh; both readings are predicted and measured. machine: `cpu`, or a
    GPU's name; threads: of each rank, 0 on GPUs.
    """

    machine: str
    model: str
    num_tokens: int
    segment_tokens: int
    mesh: str
    threads: int
    is_fresh: bool

    @property
    def name(self) -> str:
        """Names the case in files and tables."""
        threads = f"-{self.threads}t" if self.threads else ""
        return f"{self.machine}-{self.mesh}{threads}-{self.num_tokens}-{self.segment_tokens}"

    @property
    def num_ranks(self) -> int:
        """Ranks of the mesh."""
        return parse_mesh(self.mesh).num_ranks


def _cpu(num_tokens: int, mesh: str, threads: int, *, is_fresh: bool, segment: int = 1024) -> Case:
    return Case(
        machine="cpu",
        model="smollm2-135m",
        num_tokens=num_tokens,
        segment_tokens=segment,
        mesh=mesh,
        threads=threads,
        is_fresh=is_fresh,
    )


def _gpus(kind: str, num_tokens: int, mesh: str) -> Case:
    return Case(
        machine=kind,
        model="shape:llama-3.1-8b",
        num_tokens=num_tokens,
        segment_tokens=4096,
        mesh=mesh,
        threads=0,
        is_fresh=True,
    )


CASES = (
    _cpu(2049, "1x1", 1, is_fresh=False),
    _cpu(6006, "1x1", 1, is_fresh=False),
    _cpu(2049, "1x1", 2, is_fresh=False),
    _cpu(6006, "1x1", 2, is_fresh=False),
    _cpu(2800, "1x1", 1, is_fresh=True),
    _cpu(5200, "1x1", 2, is_fresh=True),
    _cpu(4300, "1x1", 2, is_fresh=True, segment=2048),
    _cpu(2800, "1x2", 1, is_fresh=True),
    _cpu(5200, "1x2", 1, is_fresh=True),
    *(
        _gpus("H200", num_tokens, mesh)
        for mesh in ("1x1", "1x2", "2x1", "2x2", "1x4")
        for num_tokens in (16_384, 49_152)
    ),
)


def predict_case(case: Case, topology: Topology) -> dict[str, Plan]:
    """Plans by mode."""
    cfg, file_bytes = read_model(case.model)
    workload = Workload(
        cfg=cfg,
        num_tokens=case.num_tokens,
        segment_tokens=case.segment_tokens,
        question_tokens=QUESTION_TOKENS[case.model],
        answer_tokens=ANSWER_TOKENS,
        weights_file_bytes=file_bytes,
    )
    plans, n = {}, case.num_ranks
    for mode in ("exact", "centroid"):
        request = PlanRequest(
            model=case.model,
            machine=f"cpu:{n}" if case.machine == "cpu" else f"{n}x{case.machine}",
            num_tokens=case.num_tokens,
            segment_tokens=case.segment_tokens,
            mode=mode,
            budget=BUDGET if mode == "centroid" else None,
        )
        (reading,) = readings_of(request, workload)
        choice = Choice(
            mesh=parse_mesh(case.mesh),
            threads=case.threads,
            chunk_tokens=min(CHUNK_TOKENS, case.segment_tokens),
            split_tokens=None,
            reading=reading,
        )
        plans[mode] = predict(workload, choice, topology)
    return plans


def figures(plans: Mapping[str, Plan], *, is_cpu: bool) -> dict[str, float]:
    """The numbers that are measured, by name; bytes of a GPU are those of its allocator."""

    def num_bytes(plan: Plan, part: str) -> int:
        use = getattr(plan.prediction, part)
        return int(use.total if is_cpu else use.tensors)

    found: dict[str, float] = {
        "ingest_s": plans["exact"].prediction.ingest.total_s,
        "ingest_bytes": num_bytes(plans["exact"], "ingest_memory"),
    }
    for mode, plan in plans.items():
        found[f"{mode}_first_token_s"] = plan.prediction.first_token_s
        found[f"{mode}_token_s"] = plan.prediction.token_s
        found[f"{mode}_bytes"] = num_bytes(plan, "question_memory")
    return found


def predict_all(topology: Topology) -> dict[str, Any]:
    """Every case of the topology's machine that it has room for."""
    cases = [
        case
        for case in CASES
        if case.machine == topology.kind and case.num_ranks <= topology.num_devices
    ]
    return {
        "environment": environment(),
        "topology": json.loads(encode_topology(topology)),
        "cases": {
            case.name: {
                **asdict(case),
                "predicted": figures(predict_case(case, topology), is_cpu=topology.is_cpu),
            }
            for case in cases
        },
    }


def read_predictions(file: Path = FILE) -> dict[str, Any]:
    """What was written: by machine, its environment, topology and cases."""
    if not file.exists():
        return {}
    written: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return written


def main() -> int:
    """Predict the cases of one machine and put them into the file."""
    parser = argparse.ArgumentParser(prog="benchmarks.predictions")
    parser.add_argument("--topology", type=Path, default=default_topology_file())
    parser.add_argument("--out", type=Path, default=FILE)
    arguments = parser.parse_args()
    topology = read_topology(arguments.topology)
    found = predict_all(topology)
    written = {**read_predictions(arguments.out), topology.kind: found}
    arguments.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    for name, case in found["cases"].items():
        note(f"{name}: {json.dumps(case['predicted'])}")
    note(f"{len(found['cases'])} cases of {topology.kind} in {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
