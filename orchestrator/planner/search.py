"""Which way of running a workload is best on a machine, and what to do where none fits.

Owns the candidates (mesh, chunk, split, reading), the order among plans and the refusal. The
predictions are those of `phases.py` and `memory.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from collectives.mesh import Mesh
from orchestrator.errors import PlanRefused
from orchestrator.planner.cost import TILE, Cost
from orchestrator.planner.memory import (
    ingest_memory,
    limits,
    loading_bytes,
    question_memory,
    weight_bytes,
)
from orchestrator.planner.phases import first_token_s, ingest_time, open_s, token_s
from orchestrator.planner.plan import Plan, PlanReport, Prediction
from orchestrator.planner.topology import Topology
from orchestrator.planner.workload import Choice, Reading, Workload

CHUNK_TOKENS = (512, 1024, 2048, 4096, 8192)
# Below this a chunk is never split: TokenWeave gains nothing there on dense models.
MIN_SPLIT_TOKENS = 1024
MAX_DEVICES = 64


class NoPlanFits(PlanRefused):
    """No plan fits. fitting_tokens: the longest document that does on this machine, 0 where even
    the weights do not; fitting_devices: the fewest GPUs that hold this one, None where none do.
    """

    def __init__(self, message: str, *, fitting_tokens: int, fitting_devices: int | None) -> None:
        super().__init__(message)
        self.fitting_tokens = fitting_tokens
        self.fitting_devices = fitting_devices


def find_plan(
    workload: Workload, topology: Topology, readings: Sequence[Reading], *, num_runners_up: int = 4
) -> PlanReport:
    """The plan whose ingest and one answer take least, among those that fit.

    Raises NoPlanFits with what would fit.
    """
    plans: list[Plan] = []
    num_refused = 0
    for mesh in meshes(workload, topology):
        found = plans_of(workload, topology, mesh, readings)
        plans += found
        num_refused += not found
    if not plans:
        raise _refusal(workload, topology, readings)
    plans.sort(key=lambda plan: plan.prediction.total_s(workload.answer_tokens))
    return PlanReport(
        best=plans[0],
        runners_up=tuple(plans[1 : 1 + num_runners_up]),
        num_refused=num_refused,
        origin=topology.origin,
    )


def meshes(workload: Workload, topology: Topology) -> Iterator[Mesh]:
    """Every grid of at most the machine's devices whose head groups divide the KV heads."""
    for num_ranks in range(1, topology.num_devices + 1):
        for heads in range(1, num_ranks + 1):
            if num_ranks % heads == 0 and workload.cfg.num_kv_heads % heads == 0:
                yield Mesh(heads=heads, context=num_ranks // heads)


def plans_of(
    workload: Workload, topology: Topology, mesh: Mesh, readings: Sequence[Reading]
) -> list[Plan]:
    """One plan a reading, each with the chunk and split that ingest fastest; empty if none fits.

    Reading decides nothing of an ingest, and chunks nothing of a question.
    """
    candidates = [
        Choice(
            mesh=mesh,
            threads=topology.threads_of(mesh.num_ranks),
            chunk_tokens=chunk_tokens,
            split_tokens=split_tokens,
            reading=readings[0],
        )
        for chunk_tokens in chunk_sizes(workload)
        for split_tokens in splits(chunk_tokens, topology, mesh)
    ]
    limit = limits(topology, mesh.num_ranks)
    fitting = [c for c in candidates if ingest_memory(workload, c, topology).total <= limit]
    if not fitting:
        return []
    best = min(fitting, key=lambda choice: ingest_time(_cost(workload, choice, topology)).total_s)
    plans = [predict(workload, replace(best, reading=reading), topology) for reading in readings]
    return [plan for plan in plans if plan.prediction.memory_bytes <= limit]


def predict(workload: Workload, choice: Choice, topology: Topology) -> Plan:
    """What one way of running a workload takes, whether it fits or not."""
    cost = _cost(workload, choice, topology)
    prediction = Prediction(
        ingest=ingest_time(cost),
        open_s=open_s(cost),
        first_token_s=first_token_s(cost),
        token_s=token_s(cost),
        ingest_memory=ingest_memory(workload, choice, topology),
        question_memory=question_memory(workload, choice, topology),
    )
    return Plan(choice=choice, prediction=prediction)


def chunk_sizes(workload: Workload) -> list[int]:
    """Sizes of a prefill chunk: a chunk never crosses a segment."""
    fitting = [size for size in CHUNK_TOKENS if size <= workload.segment_tokens]
    return fitting or [workload.segment_tokens]


def splits(chunk_tokens: int, topology: Topology, mesh: Mesh) -> list[int | None]:
    """No split, and where halves could hide communication the middle and one tile to its sides."""
    can_hide = mesh.num_ranks > 1 and topology.overlap_share > 0
    if not can_hide or chunk_tokens < MIN_SPLIT_TOKENS:
        return [None]
    middle = chunk_tokens // 2 // TILE * TILE
    return [None, middle, middle + TILE, middle - TILE]


def fits(workload: Workload, topology: Topology, readings: Sequence[Reading]) -> bool:
    """Whether any plan fits: the smallest chunk takes least, and no split takes memory."""
    for mesh in meshes(workload, topology):
        limit = limits(topology, mesh.num_ranks)
        for reading in readings:
            choice = Choice(
                mesh=mesh,
                threads=topology.threads_of(mesh.num_ranks),
                chunk_tokens=min(chunk_sizes(workload)),
                split_tokens=None,
                reading=reading,
            )
            needed = max(
                ingest_memory(workload, choice, topology).total,
                question_memory(workload, choice, topology).total,
            )
            if needed <= limit:
                return True
    return False


def fitting_tokens(workload: Workload, topology: Topology, readings: Sequence[Reading]) -> int:
    """Tokens of the longest document below this one that fits, in whole KiTokens; 0 for none."""
    low, high = 0, -(-workload.num_tokens // 1024)
    while high - low > 1:
        middle = (low + high) // 2
        shorter = replace(workload, num_tokens=1024 * middle)
        low, high = (middle, high) if fits(shorter, topology, readings) else (low, middle)
    return 1024 * low


def fitting_devices(
    workload: Workload, topology: Topology, readings: Sequence[Reading]
) -> int | None:
    """The fewest GPUs of this kind that hold the workload; None up to MAX_DEVICES, or on a CPU."""
    if topology.is_cpu:
        return None
    for count in range(topology.num_devices + 1, MAX_DEVICES + 1):
        if fits(workload, replace(topology, num_devices=count), readings):
            return count
    return None


def _cost(workload: Workload, choice: Choice, topology: Topology) -> Cost:
    return Cost(workload=workload, choice=choice, topology=topology)


def _refusal(workload: Workload, topology: Topology, readings: Sequence[Reading]) -> NoPlanFits:
    tokens = fitting_tokens(workload, topology, readings)
    devices = fitting_devices(workload, topology, readings)
    remedies = []
    if tokens:
        remedies.append(f"a document of at most {tokens} tokens")
    if devices:
        remedies.append(f"--gpus {devices}x{topology.kind}")
    if not remedies:
        remedies.append("a smaller model, or a machine with more memory")
    what, needed, limit = _least(workload, topology, readings)
    return NoPlanFits(
        f"{workload.num_tokens} tokens of {workload.cfg.name} on {topology.num_devices} "
        f"{topology.kind}: {what} {needed / 2**30:.1f} GiB; limit {limit / 2**30:.1f} GiB a rank; "
        f"plan {' or '.join(remedies)}",
        fitting_tokens=tokens,
        fitting_devices=devices,
    )


def _least(
    workload: Workload, topology: Topology, readings: Sequence[Reading]
) -> tuple[str, int, int]:
    """What is in the way on the mesh that comes nearest: bytes needed, and the limit."""
    best: tuple[float, str, int, int] | None = None
    for mesh in meshes(workload, topology):
        limit = limits(topology, mesh.num_ranks)
        choice = Choice(
            mesh=mesh,
            threads=topology.threads_of(mesh.num_ranks),
            chunk_tokens=min(chunk_sizes(workload)),
            split_tokens=None,
            reading=readings[0],
        )
        needed = ingest_memory(workload, choice, topology).total
        what = f"an ingest on mesh {mesh} needs"
        weights = weight_bytes(workload, mesh, 0, topology.item_bytes)
        if weights + loading_bytes(workload, mesh, topology) > limit:
            what, needed = f"the weights alone on mesh {mesh} need", weights
        if best is None or needed / limit < best[0]:
            best = (needed / limit, what, needed, limit)
    assert best is not None
    return best[1:]
