"""The backend that a caller named, checked once; nothing is ever substituted for it.

`find_backend` returns a `Backend`: operations on parts, and the steps of a question made of them. A
backend that does not exist here is an error that lists those that do.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sparse_attn.errors import BackendUnknown
from sparse_attn.select.base import Limit, Tail
from sparse_attn.select.centroid import CentroidIndex
from sparse_attn.state import Part
from sparse_attn.step import Step

BACKENDS = ("reference", "torch", "native")


class Backend(Protocol):
    """What attention is computed with. Shapes and meanings are those of `composed.Composed`."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None
    ) -> Part: ...

    def attend_causal(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Part: ...

    def attend_prefix(
        self, q: Tensor, k: Tensor, v: Tensor, *, past: int, scale: float
    ) -> Part: ...

    def attend_body(
        self, q: Tensor, k: Tensor, v: Tensor, steady: Part, *, scale: float, evidence: Tensor
    ) -> Part: ...

    def attend_selected(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: CentroidIndex,
        steady: Part,
        *,
        scale: float,
        limit: Limit,
        levels: int,
        is_estimating: bool,
        evidence: Tensor | None,
    ) -> Step: ...

    def sample_recall(
        self,
        q: Tensor,
        k: Tensor,
        tail: Tail,
        lse_read: Tensor,
        *,
        scale: float,
        num_strata: int,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]: ...


def find_backend(name: str) -> Backend:
    """The backend of that name; raises BackendUnknown otherwise."""
    from sparse_attn import reference, torch_backend
    from sparse_attn.composed import Composed

    match name:
        case "reference":
            return Composed(reference)
        case "torch":
            return Composed(torch_backend)
        case "native":
            from sparse_attn.native.backend import NativeBackend

            return NativeBackend()
    raise BackendUnknown(
        f"backend {name!r} does not exist here; choose one of {', '.join(BACKENDS)}"
    )
