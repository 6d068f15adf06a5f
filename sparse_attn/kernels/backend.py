"""The `triton` backend: plans for the steps of a question on one GPU.

Owns what a question's attention is made of where one rank holds the whole document: `plan_dense`
and `plan_selected`; a sparse ingest's blocks are chosen and read by `prefill.py`. What has neither
(dense attention of an ingest, several ranks) is computed as the torch backend does it, as the
README and `docs/kernels.md` say.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sparse_attn import torch_backend
from sparse_attn.composed import Composed
from sparse_attn.errors import BackendUnknown
from sparse_attn.kernels import layer, prefill
from sparse_attn.kernels.decode import DecodeDocument, DenseDecode, Heads
from sparse_attn.kernels.selected import CentroidDecode
from sparse_attn.kernels.tables import Tables, join_tables, tables_of
from sparse_attn.select.base import Limit
from sparse_attn.select.centroid import Units
from sparse_attn.state import Part

# Of every small product: bits of a column must not depend on how many others the caller has.
_TILE = layer.TILES[32]
# Of dense prefill kernels: a query tile.
_MIN_DENSE_TOKENS = 64


class TritonBackend(Composed):
    """Kernels where a question spends its time on a GPU.

    dense_kernels: whether dense attention of an ingest's chunks is `prefill.py`'s too, and not
    torch's flash operator; row C5 measures both, `--dense kernels` of row C6 tries it.
    """

    makes_plans = True
    dense_kernels = False

    def __init__(self) -> None:
        """Raises BackendUnknown where nothing here can run a kernel."""
        super().__init__(torch_backend, prefill)
        self._tables: WeakKeyDictionary[Units, Tables] = WeakKeyDictionary()
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            raise BackendUnknown(
                "backend 'triton' found no GPU; limit one that torch can use; choose --backend "
                "native, or set TRITON_INTERPRET=1 to try kernels on the CPU, slowly"
            )

    def fused_for(self, dtype: torch.dtype) -> Any:
        """`kernels.layer` on a GPU for half types; float32 is for comparing, and torch's."""
        return layer if torch.cuda.is_available() and dtype != torch.float32 else None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None
    ) -> Part:
        if mask is None and self._has_dense(q):
            return prefill.attend_dense(q, k, v, scale=scale)
        return super().attend(q, k, v, scale=scale, mask=mask)

    def attend_causal(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Part:
        if self._has_dense(q):
            return prefill.attend_causal(q, k, v, scale=scale)
        return super().attend_causal(q, k, v, scale=scale)

    def _has_dense(self, q: Tensor) -> bool:
        """Whether kernels are wanted, and there are as many queries as they are made for."""
        return self.dense_kernels and q.shape[0] >= _MIN_DENSE_TOKENS

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not _is_small(x, weight):
            return super().linear(x, weight, bias)
        return layer.small_linear(x, weight, bias, tile=_TILE)

    def linear_split(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, bounds: Sequence[int]
    ) -> Tensor:
        if _is_small(x, weight):  # every column is added up by itself, in a fixed order
            return self.linear(x, weight, bias)
        return super().linear_split(x, weight, bias, bounds)

    def plan_dense(
        self,
        heads: Heads,
        documents: Sequence[DecodeDocument],
        visible: Tensor,
        *,
        scale: float,
        windows: Sequence[int] | None = None,
        evidence: Sequence[Sequence[Tensor]] | None = None,
    ) -> DenseDecode:
        """A plan that reads every key of the documents; see `decode.DenseDecode`."""
        return DenseDecode(
            heads, documents, visible, scale=scale, windows=windows, evidence=evidence
        )

    def plan_selected(
        self,
        heads: Heads,
        documents: Sequence[DecodeDocument],
        visible: Tensor,
        *,
        limit: Limit,
        levels: int,
        scale: float,
        estimates: bool,
        evidence: Sequence[Sequence[Tensor]] | None = None,
    ) -> CentroidDecode:
        """A plan that reads what its limit allows; see `selected.CentroidDecode`. Plans share the
        tables of a document.
        """
        return CentroidDecode(
            heads,
            documents,
            visible,
            limit=limit,
            levels=levels,
            scale=scale,
            estimates=estimates,
            evidence=evidence,
            tables=join_tables([self._tables_of(document) for document in documents]),
        )

    def _tables_of(self, document: DecodeDocument) -> Tables:
        of_document = document.indexes[0].clusters
        if of_document not in self._tables:
            self._tables[of_document] = tables_of(document.indexes)
        return self._tables[of_document]


def _is_small(x: Tensor, weight: Tensor) -> bool:
    """Whether a product is bound by its weights' bytes, which `small_linear` reads once."""
    is_half = weight.dtype in (torch.bfloat16, torch.float16) and x.dtype == weight.dtype
    return x.is_cuda and is_half and x.shape[0] <= layer.MAX_ROWS and weight.is_contiguous()
