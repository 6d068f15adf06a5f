"""The backend that a caller named, checked once; nothing is ever substituted for it.

`find_backend` returns a `Backend`: operations on parts, and the steps of a question made of them. A
backend that does not exist here is an error that lists those that do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sparse_attn.blocks import BlockOperations
from sparse_attn.errors import BackendUnknown
from sparse_attn.estimate import Missed
from sparse_attn.folds import Kept, Runs
from sparse_attn.select.base import Limit, Tail
from sparse_attn.select.centroid import Units
from sparse_attn.state import Part
from sparse_attn.step import Ranks, Scores, UnitsRead

BACKENDS = ("reference", "torch", "native", "triton")


class Backend(Protocol):
    """What attention is computed with. Shapes and meanings are those of `composed.Composed`.

    makes_plans: whether it has `plan_dense` and `plan_selected` too (`kernels.backend`); blocks:
    what a sparse ingest chooses and reads blocks with.
    """

    makes_plans: bool
    blocks: BlockOperations

    def fused_for(self, dtype: torch.dtype) -> Any: ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...

    def linear_split(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, bounds: Sequence[int]
    ) -> Tensor: ...

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None
    ) -> Part: ...

    def attend_causal(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Part: ...

    def attend_prefix(
        self, q: Tensor, k: Tensor, v: Tensor, *, past: int, scale: float
    ) -> Part: ...

    def merge_parts(self, parts: Sequence[Part]) -> Part: ...

    def merge_tree(self, outs: Tensor, lses: Tensor) -> Part: ...

    def merge_tree_lse(self, lses: Tensor) -> Tensor: ...

    def attend_runs(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        runs: Runs,
        *,
        scale: float,
        keeps: bool,
        scales: Tensor | None = None,
    ) -> tuple[Part, Kept | None]: ...

    def score_units(self, q: Tensor, units: Units, *, scale: float) -> Scores: ...

    def close_units(self, scores: Scores, units: Units, opened: Tensor) -> Scores: ...

    def rank_units(
        self, scores: Scores, units: Units, *, total: Tensor, lse_steady: Tensor | None = None
    ) -> Ranks: ...

    def take_units(
        self, scores: Scores, units: Units, *, total: Tensor, lse_steady: Tensor, limit: Limit
    ) -> Tensor: ...

    def attend_units(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        units: Units,
        scores: Scores,
        taken: Tensor,
        *,
        scale: float,
        is_estimating: bool,
        keeps: bool,
        closed: tuple[Units, Scores] | None = None,
        scales: Tensor | None = None,
    ) -> UnitsRead: ...

    def spread_evidence(self, evidence: Tensor, kept: Kept, lse_read: Tensor) -> None: ...

    def sample_missed(
        self,
        q: Tensor,
        k: Tensor,
        tail: Tail,
        lse_read: Tensor,
        *,
        scale: float,
        num_strata: int,
        generator: torch.Generator,
        scales: Tensor | None = None,
    ) -> Missed: ...


def find_backend(name: str) -> Backend:
    """The backend of that name; raises BackendUnknown otherwise."""
    from sparse_attn import reference, reference_prefill, torch_backend, torch_prefill
    from sparse_attn.composed import Composed

    match name:
        case "reference":
            return Composed(reference, reference_prefill)
        case "torch":
            return Composed(torch_backend, torch_prefill)
        case "native":
            from sparse_attn.native.backend import NativeBackend

            return NativeBackend()
        case "triton":
            from sparse_attn.kernels.backend import TritonBackend

            return TritonBackend()
    raise BackendUnknown(
        f"backend {name!r} does not exist here; choose one of {', '.join(BACKENDS)}"
    )
