"""The `triton` backend: plans for the steps of a question on one GPU.

Owns what a question's attention is made of where one rank holds the whole document: `plan_dense`
and `plan_selected`. What has no plan (prefill of a document, several ranks) is computed as the
torch backend does it; `longspan doctor` and the README say which is which.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_attn import torch_backend
from sparse_attn.composed import Composed
from sparse_attn.errors import BackendUnknown
from sparse_attn.kernels.decode import DecodeDocument, DenseDecode, Heads
from sparse_attn.kernels.selected import CentroidDecode
from sparse_attn.select.base import Limit


class TritonBackend(Composed):
    """Kernels where a question spends its time on a GPU."""

    makes_plans = True

    def __init__(self) -> None:
        """Raises BackendUnknown where nothing here can run a kernel."""
        super().__init__(torch_backend)
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            raise BackendUnknown(
                "backend 'triton' found no GPU; limit one that torch can use; choose --backend "
                "native, or set TRITON_INTERPRET=1 to try kernels on the CPU, slowly"
            )

    def plan_dense(
        self,
        heads: Heads,
        document: DecodeDocument,
        visible: Tensor,
        *,
        scale: float,
        windows: Sequence[int] | None = None,
        keeps: bool = False,
    ) -> DenseDecode:
        """A plan that reads every key of the document; see `decode.DenseDecode`."""
        return DenseDecode(heads, [document], visible, scale=scale, windows=windows, keeps=keeps)

    def plan_selected(
        self,
        heads: Heads,
        document: DecodeDocument,
        visible: Tensor,
        *,
        limit: Limit,
        levels: int,
        scale: float,
        estimates: bool,
        keeps: bool = False,
    ) -> CentroidDecode:
        """A plan that reads what its limit allows; see `selected.CentroidDecode`."""
        return CentroidDecode(
            heads,
            [document],
            visible,
            limit=limit,
            levels=levels,
            scale=scale,
            estimates=estimates,
            keeps=keeps,
        )
