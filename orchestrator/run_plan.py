"""What the planner says of the run at hand: whether to split its chunks, and what it should take.

Owns the way from an engine's configuration to the planner's words. Where this machine was not
calibrated for the engine's device and dtype, nothing is predicted and nothing is split.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collectives.mesh import Mesh, parse_mesh
from orchestrator.config import EngineConfig
from orchestrator.errors import TopologyInvalid
from orchestrator.planner import Choice, Plan, Reading, Topology, Workload, predict
from orchestrator.planner.search import splits
from orchestrator.planning import default_topology_file, read_topology
from orchestrator.types import Answer

if TYPE_CHECKING:
    from orchestrator.model.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlanner:
    """The planner for one engine. topology: None where nothing is known of this machine."""

    cfg: ModelConfig
    mesh: Mesh
    threads: int
    topology: Topology | None

    @staticmethod
    def load(config: EngineConfig, cfg: ModelConfig, *, file: Path | None = None) -> RunPlanner:
        """From the file that `longspan calibrate` wrote, if it fits the configuration.

        Raises TopologyInvalid for a file that is there and cannot be read.
        """
        path = file or default_topology_file()
        topology = read_topology(path) if path.exists() else None
        if topology is not None:
            is_device = topology.is_cpu == (config.device == "cpu")
            topology = topology if is_device and topology.dtype == config.dtype else None
        threads = config.threads if config.device == "cpu" else 0
        mesh = parse_mesh(config.mesh)
        return RunPlanner(cfg=cfg, mesh=mesh, threads=threads, topology=topology)

    def choose_split(
        self,
        *,
        num_tokens: int,
        segment_tokens: int,
        chunk_tokens: int,
        kv_dtype: str | None = None,
    ) -> int | None:
        """Tokens of a chunk's first half, or None where no split is predicted to be faster."""
        if self.topology is None or self.mesh.num_ranks == 1:
            return None
        workload = Workload(
            cfg=self.cfg, num_tokens=num_tokens, segment_tokens=segment_tokens, kv_dtype=kv_dtype
        )
        reading = Reading(mode="exact")
        plans = [
            self._predict(workload, chunk_tokens, split, reading)
            for split in splits(chunk_tokens, self.topology, self.mesh)
        ]
        found = [plan for plan in plans if plan is not None]
        if not found:
            return None
        best = min(found, key=lambda plan: plan.prediction.ingest.total_s)
        return best.choice.split_tokens

    def describe(
        self, answer: Answer, *, segment_tokens: int, kv_dtype: str | None = None
    ) -> dict[str, Any] | None:
        """The `plan` of an answer: predicted and measured seconds, and the mesh; None where nothing
        is predicted of its mode.
        """
        selection, usage = answer.selection, answer.usage
        if self.topology is None or selection.mode not in ("exact", "centroid"):
            return None
        if selection.mode == "centroid" and selection.budget_keys is None:
            return None
        workload = Workload(
            cfg=self.cfg,
            num_tokens=usage.cached_tokens,
            segment_tokens=segment_tokens,
            question_tokens=usage.question_tokens,
            answer_tokens=max(1, usage.completion_tokens),
            kv_dtype=kv_dtype,
        )
        steady = workload.sinks + workload.window
        reading = Reading(
            mode="exact" if selection.mode == "exact" else "centroid",
            keys=max(0, (selection.budget_keys or 0) - steady),
            levels=selection.levels or 1,
        )
        plan = self._predict(workload, min(1024, segment_tokens), None, reading)
        if plan is None:
            return None
        predicted, timing = plan.prediction, answer.timing
        return {
            "predicted": {
                "open_s": predicted.open_s,
                "first_token_s": predicted.first_token_s,
                "token_s": predicted.token_s,
                "memory_bytes": predicted.question_memory.total,
            },
            "measured": {
                "open_s": timing.open_s,
                "first_token_s": timing.ttft_s - timing.open_s,
                "token_s": timing.tpot_s,
            },
            "mesh": str(self.mesh),
        }

    def _predict(
        self, workload: Workload, chunk_tokens: int, split: int | None, reading: Reading
    ) -> Plan | None:
        """None where the topology has no figure for this mesh."""
        assert self.topology is not None
        choice = Choice(
            mesh=self.mesh,
            threads=self.threads,
            chunk_tokens=min(chunk_tokens, workload.segment_tokens),
            split_tokens=split,
            reading=reading,
        )
        try:
            return predict(workload, choice, self.topology)
        except TopologyInvalid:
            return None
