"""What goes in and what comes out of a question, as plain data; the shape of `ask --json`.

Owns the public result types and their JSON form; imports no torch. Times are seconds, sizes are
bytes, spans are character offsets into the document's text.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from orchestrator.errors import UsageError

Mode = Literal["auto", "exact", "window", "centroid"]
MODES: tuple[Mode, ...] = ("auto", "exact", "window", "centroid")

# The public JSON form holds these; the rest is for those who use the engine.
_SELECTION_FIELDS = ("requested", "mode", "budget_keys", "mass", "reason")
_AUDIT_FIELDS = ("mass_mean", "mass_p10", "miss_max")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is drawn: temperature 0 is greedy; top_p keeps the smallest set of that
    mass.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UsageError(
                f"temperature {self.temperature} is below 0 or infinite; give 0 for greedy choice"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"top-p {self.top_p} is outside (0, 1]; give 1 to keep every token")


@dataclass(frozen=True, slots=True, kw_only=True)
class AskOptions:
    """One question's options, before `auto` is resolved.

    budget: keys, or a percentage of the document's keys such as "12.5%"; mass: share of attention
    to read; the two exclude each other. levels: of the centroid look-up, 1 or 2, None to decide by
    size; choice: how ranks divide a budget, `global` (the best clusters wherever they lie) or
    `proportional` (each its share).
    """

    mode: Mode = "auto"
    budget: str | int | None = None
    mass: float | None = None
    levels: int | None = None
    choice: Literal["global", "proportional"] = "global"
    max_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    audit: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionReport:
    """What was asked for, what was done, and why."""

    requested: str
    mode: str
    budget_keys: int | None
    mass: float | None
    levels: int | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens in and out, and what attention read: keys per KV head and query, bytes in total."""

    prompt_tokens: int
    cached_tokens: int
    question_tokens: int
    completion_tokens: int
    attended_keys_mean: float
    attended_keys_max: int
    bytes_read: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds: load weights, open the document, first token from the question, one later token,
    all.
    """

    load_s: float
    open_s: float
    ttft_s: float
    tpot_s: float
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """Upper bound on the missed share over (query, layer, head); vacuous where it exceeds 0.99."""

    p50: float
    p99: float
    vacuous_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """True recall, from exact attention over every key with the same queries.

    bound_violations: (query, layer, head) that missed more than their bound allows; 0 unless a
    bound is wrong.
    """

    mass_mean: float
    mass_p10: float
    miss_max: float
    bound_violations: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """Share of attention mass that was read exactly, over every query, full-attention layer and
    head.

    mass_mean, ci95: estimated from sampled unread keys; mass_p10: tenth percentile over (layer,
    head).
    """

    mass_mean: float
    mass_p10: float
    ci95: tuple[float, float]
    bound: Bound
    audit: Audit | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """A span of the document and its share of the answer tokens' document attention."""

    start_char: int
    end_char: int
    score: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answered question. `to_json` is the object of `ask --json`.

    plan: predicted and measured seconds and the mesh, None where nothing was predicted.
    """

    text: str
    finish_reason: str
    model: str
    document_name: str
    document_hash: str
    selection: SelectionReport
    usage: Usage
    timing: Timing
    recall: Recall
    evidence: tuple[Evidence, ...]
    stack: dict[str, Any]
    plan: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The public JSON form, schema 1 (DESIGN section 7)."""
        usage, recall = asdict(self.usage), asdict(self.recall)
        cached = usage.pop("cached_tokens")
        if recall["audit"] is not None:
            recall["audit"] = {name: recall["audit"][name] for name in _AUDIT_FIELDS}
        return {
            "schema": 1,
            "answer": self.text,
            "finish_reason": self.finish_reason,
            "model": self.model,
            "document": {"name": self.document_name, "hash": self.document_hash},
            "selection": {name: getattr(self.selection, name) for name in _SELECTION_FIELDS},
            "usage": {
                "prompt_tokens": usage.pop("prompt_tokens"),
                "prompt_tokens_details": {"cached_tokens": cached},
                **usage,
            },
            "timing": asdict(self.timing),
            "recall": recall,
            "evidence": [asdict(span) for span in self.evidence],
            "plan": self.plan,
            "stack": self.stack,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Teacher-forced score of a given answer: mean natural-log loss per token, and recall."""

    nll_per_token: float
    num_tokens: int
    recall: Recall
