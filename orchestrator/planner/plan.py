"""What planning gives back: ways of running a workload, each with its predicted times and memory.

Owns the result's plain data and its JSON form. Refuses to compute any of it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.planner.memory import MemoryUse
from orchestrator.planner.phases import IngestTime
from orchestrator.planner.workload import Choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Seconds, and bytes of the fullest rank. first_token_s: with the document open; opening it
    first takes open_s.
    """

    ingest: IngestTime
    open_s: float
    first_token_s: float
    token_s: float
    ingest_memory: MemoryUse
    question_memory: MemoryUse

    @property
    def memory_bytes(self) -> int:
        """What a rank must have."""
        return max(self.ingest_memory.total, self.question_memory.total)

    def total_s(self, answer_tokens: int) -> float:
        """One ingest and one answer."""
        asked_s = self.open_s + self.first_token_s + max(0, answer_tokens - 1) * self.token_s
        return self.ingest.total_s + asked_s

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "ingest_s": self.ingest.total_s,
            "ingest_parts_s": asdict(self.ingest),
            "open_s": self.open_s,
            "first_token_s": self.first_token_s,
            "token_s": self.token_s,
            "memory_bytes": self.memory_bytes,
            "ingest_memory": self.ingest_memory.to_json(),
            "question_memory": self.question_memory.to_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One way of running a workload and what it is predicted to take; everything is resident."""

    choice: Choice
    prediction: Prediction

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        choice = self.choice
        return {
            "mesh": str(choice.mesh),
            "num_ranks": choice.mesh.num_ranks,
            "threads": choice.threads,
            "chunk_tokens": choice.chunk_tokens,
            "split_tokens": choice.split_tokens,
            "residency": "resident",
            "mode": choice.reading.mode,
            "retrieved_keys": choice.reading.keys if choice.reading.mode == "centroid" else None,
            "levels": choice.reading.levels,
            "predicted": self.prediction.to_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """The best plan, those that come after it in order, and what they stand on."""

    best: Plan
    runners_up: tuple[Plan, ...]
    num_refused: int
    origin: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "plan": self.best.to_json(),
            "runners_up": [plan.to_json() for plan in self.runners_up],
            "refused": self.num_refused,
            "figures": self.origin,
        }
