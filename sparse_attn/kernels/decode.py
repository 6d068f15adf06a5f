"""Attention of a few queries over whole documents: everything decided before, fixed shapes during.

A plan (`DenseDecode` here, `CentroidDecode` in `selected.py`) is made once for a set of documents,
all their layers and a number of queries each; it holds every buffer and address that a step needs,
so that `run` launches kernels and decides nothing: it can be captured in a CUDA graph. Nothing that
is computed for one query depends on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.errors import AttentionError, ShapeMismatch
from sparse_attn.folds import Runs
from sparse_attn.kernels.decode_checks import (
    check_body,
    check_heads,
    check_keys,
    check_layer,
)
from sparse_attn.kernels.dense import MOST_AT_ONCE, attend_runs_kernel
from sparse_attn.kernels.early import early_launch, ordered_launch
from sparse_attn.kernels.evidence import Evidence, spans_of
from sparse_attn.kernels.merge import merge_kernel, merge_options
from sparse_attn.kernels.pieces import count_steady, runs_of, split_runs, steady_pieces
from sparse_attn.select.centroid import CentroidIndex

KV_TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.float8e4nv,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Shape of a step: B documents, T queries of each, G KV heads of P query heads, head dim D."""

    num_documents: int
    num_queries: int
    num_kv_heads: int
    per_group: int
    head_dim: int

    def __post_init__(self) -> None:
        """Raises ShapeMismatch for what no kernel was made for."""
        check_heads(self.head_dim, self.per_group)

    @property
    def num_heads(self) -> int:
        """H = G P."""
        return self.num_kv_heads * self.per_group

    @property
    def num_problems(self) -> int:
        """Z = B T G: a problem is one query and KV head of one document."""
        return self.num_documents * self.num_queries * self.num_kv_heads

    @property
    def columns(self) -> int:
        """Rows of one problem, filled up to what the right of a matrix product takes."""
        return max(8, 1 << (self.per_group - 1).bit_length())


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeDocument:
    """A document as plans need it. runs: the body's slots; per layer: k, v [N, D] (none where every
    key is steady), index (none where no plan selects), and the steady buffers [G, capacity, D] in
    token order, contiguous, finite also where nothing was written yet. num_keys: of the whole
    document's body over its KV heads, where `runs` has a share of it. scales: per layer, [G, 2]
    float32 of a head's keys and values where the body is in e4m3, else None; steady keys are not.
    """

    runs: Runs
    k: Sequence[Tensor]
    v: Sequence[Tensor]
    steady_k: Sequence[Tensor]
    steady_v: Sequence[Tensor]
    indexes: Sequence[CentroidIndex] = ()
    num_keys: int | None = None
    scales: Sequence[Tensor | None] = ()

    def scales_of(self, layer: int) -> Tensor | None:
        """Scales of a layer of the body, None where it has none."""
        return self.scales[layer] if self.scales else None

    def addresses(self, layer: int) -> list[int]:
        """Where a layer's keys, values and scales of the body begin; 0 for none."""
        scales = self.scales_of(layer)
        at = 0 if scales is None else scales.data_ptr()
        return [self.k[layer].data_ptr(), self.v[layer].data_ptr(), at]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attended:
    """out: [B, T, H, D] in q's dtype; lse, lse_read: [B, T, H] float32, natural log, of everything,
    and of what was read exactly.
    """

    out: Tensor
    lse: Tensor
    lse_read: Tensor


class Rows:
    """The parts of every problem, and the kernel that merges them."""

    def __init__(self, heads: Heads, num_parts: int, like: Tensor) -> None:
        """like: a tensor with the dtype of queries and keys, on the device."""
        self.heads, self.num_parts, self.kv = heads, num_parts, KV_TYPES[like.dtype]
        z, p, d = heads.num_problems, heads.per_group, heads.head_dim
        device = like.device
        self.out = torch.zeros(z, num_parts, p, d, device=device)
        self.lse = torch.full((z, num_parts, p), -float("inf"), device=device)
        shape = (heads.num_documents, heads.num_queries, heads.num_kv_heads * p)
        self.result = Attended(
            out=torch.empty(*shape, d, dtype=like.dtype, device=device),
            lse=torch.empty(shape, device=device),
            lse_read=torch.empty(shape, device=device),
        )

    def check(self, layer: int, num_layers: int, q: Tensor) -> None:
        """Raises ShapeMismatch or AttentionError for what a step was not planned for."""
        check_layer(layer, num_layers, q, self.result.out, self.result.out.shape)

    def attend_runs(
        self,
        q: Tensor,
        runs: Tensor,
        visible: Tensor,
        *,
        stored: torch.dtype,
        scale: float,
        window: int = 0,
        scores: Tensor | None = None,
    ) -> None:
        """A part for each run of a table, at the places that the table names; stored: type of its
        keys; window: how many of the tokens that a query sees it attends to, 0 for all; scores [P,
        N]: filled if given.
        """
        heads = self.heads
        block_r = min(64, max(16, triton.next_power_of_2(heads.num_queries * heads.per_group)))
        blocks = triton.cdiv(heads.num_queries * heads.per_group, block_r)
        kept = self.lse if scores is None else scores
        # Of more programs than run at once the last wave came late where they had started early.
        launch = early_launch if runs.shape[0] * blocks <= MOST_AT_ONCE else ordered_launch
        attend_runs_kernel[runs.shape[0], blocks](
            q, runs, visible, self.out, self.lse, kept, scale, heads.num_queries, self.num_parts,
            kept.shape[1],
            G=heads.num_kv_heads, P=heads.per_group, D=heads.head_dim, KV=self.kv,
            BLOCK_R=block_r, WINDOW=window, KEEPS=scores is not None, STORED=KV_TYPES[stored],
            **launch(self.out.device), **dense_options(heads.head_dim),
        )  # fmt: skip

    def merge(
        self,
        bounds: tuple[Tensor, Tensor, Tensor],
        *,
        num_steady: int,
        bases: tuple[int, int, int],
        tiles: tuple[int, int] = (1, 1),
        num_lists: int = 1,
        reads_all: bool = False,
    ) -> Attended:
        """Merge parts by the bounds of their lists (`merge.merge_kernel`)."""
        heads, result = self.heads, self.result
        options = merge_options(heads.head_dim)
        blocks = heads.per_group * (heads.head_dim // options["BLOCK"])
        merge_kernel[blocks, heads.num_problems](
            self.out, self.lse, *bounds, result.out, result.lse, result.lse_read,
            heads.num_queries, self.num_parts, num_steady, *bases,
            G=heads.num_kv_heads, P=heads.per_group, D=heads.head_dim,
            TILE_READ=tiles[0], TILE_MEMBERS=tiles[1], LISTS=num_lists, READS_ALL=reads_all,
            **early_launch(self.out.device), **options,
        )  # fmt: skip
        return result


class DenseDecode:
    """Attention over every key of the documents, and their steady keys.

    visible: [B] int64 on the device, how many steady keys of a document the first query of a step
    sees; each later one sees one more. windows: for each layer, as in `Rows.attend_runs`.
    evidence: where `spread` adds up, of plans of one query a document (`Evidence`).
    """

    def __init__(
        self,
        heads: Heads,
        documents: Sequence[DecodeDocument],
        visible: Tensor,
        *,
        scale: float,
        windows: Sequence[int] | None = None,
        evidence: Sequence[Sequence[Tensor]] | None = None,
    ) -> None:
        check_documents(heads, documents, visible)
        self.heads, self._visible, self._scale = heads, visible, scale
        sizes = [document.k[0].shape[0] if document.k else 0 for document in documents]
        self._first_slots = [sum(sizes[:b]) for b in range(len(documents))]
        self._kept = documents  # the plan holds addresses
        layers, device = range(len(documents[0].steady_k)), visible.device
        self._windows = windows or [0] * len(layers)
        self._num_steady = count_steady(x for d in documents for x in d.steady_k)
        split = [split_runs(document.runs, document.num_keys) for document in documents]
        self._bounds = torch.cat([bounds for _, bounds in split]).int().to(device)
        steady = steady_pieces([d.steady_k[0] for d in documents])
        like = documents[0].steady_k[0]
        self._runs = []
        for i in layers:
            kept = [
                runs_of(steady[b], d.steady_k[i], d.steady_v[i]) for b, d in enumerate(documents)
            ]
            body = [self._body_runs(split[b][0], d, b, i) for b, d in enumerate(documents)]
            self._runs.append(_launches(kept, body, like.dtype, documents[0].k))
        self._rows = Rows(heads, self._num_steady + int(self._bounds[:, -1].max()), like)
        # Of the lists that a plan of this kind does not have.
        self._nothing = torch.zeros(heads.num_problems, 9, dtype=torch.int32, device=device)
        self._evidence: Evidence | None = None
        if evidence is not None:
            self._evidence = Evidence(heads, evidence, self._first_slots)
            shape = (heads.per_group, sum(sizes))
            self._scores = torch.full(shape, -float("inf"), device=device)
            spans = torch.cat(
                [spans_of(d.runs) + self._first_slots[b] for b, d in enumerate(documents)]
            )
            self._longest, self._spans = int(spans.diff(dim=1).max()), spans.to(device)

    def _body_runs(self, pieces: Tensor, document: DecodeDocument, b: int, layer: int) -> Tensor:
        if layer >= len(document.k):
            return runs_of(pieces[:0], document.steady_k[0], document.steady_v[0])
        heads_before, slots_before = b * self.heads.num_kv_heads, self._first_slots[b]
        shift = torch.tensor([0, 0, self._num_steady, heads_before, 0, slots_before])
        return runs_of(
            pieces + shift, document.k[layer], document.v[layer], document.scales_of(layer)
        )

    def run(self, layer: int, q: Tensor) -> Attended:
        """Attention of q [B, T, H, D]; overwrites what the last call gave."""
        self._rows.check(layer, len(self._runs), q)
        for runs, stored in self._runs[layer]:
            self._rows.attend_runs(
                q,
                runs,
                self._visible,
                stored=stored,
                scale=self._scale,
                window=self._windows[layer],
                scores=None if self._evidence is None else self._scores,
            )
        return self._rows.merge(
            (self._bounds, self._nothing, self._nothing),
            num_steady=self._num_steady,
            bases=(self._num_steady,) * 3,
            reads_all=True,
        )

    def spread(self, layer: int) -> None:
        """Each slot gains its share of all that was read by the last `run`, over all heads."""
        assert self._evidence is not None
        self._evidence.spread(
            layer, self._scores, self._spans, self._rows.result.lse, num_places=self._longest
        )


def _launches(
    steady: list[Tensor], body: list[Tensor], dtype: torch.dtype, k: Sequence[Tensor]
) -> list[tuple[Tensor, torch.dtype]]:
    """Tables of runs that are attended together, and the type of their keys: those of the body
    apart where they are in another type.
    """
    if not k or k[0].dtype == dtype:
        return [(torch.cat(steady + body), dtype)]
    apart = [(torch.cat(steady), dtype), (torch.cat(body), k[0].dtype)]
    return [(runs, stored) for runs, stored in apart if len(runs)]


def dense_options(head_dim: int) -> dict[str, int]:
    """Tile and pipeline of `attend_runs_kernel`: the best of those measured on an H200."""
    return {"BLOCK_N": 64, "STAGES": 2 if head_dim > 128 else 3, "num_warps": 4}


def check_documents(heads: Heads, documents: Sequence[DecodeDocument], visible: Tensor) -> None:
    """Raises ShapeMismatch or AttentionError for documents that do not fit the plan's heads."""
    like, dim = documents[0].steady_k[0], heads.head_dim
    if len(documents) != heads.num_documents or tuple(visible.shape) != (len(documents),):
        raise ShapeMismatch(
            f"{len(documents)} documents, visible {tuple(visible.shape)}; limit "
            f"{heads.num_documents} of both; plan for what is there"
        )
    for document in documents:
        for name, keys in (("k", document.k), ("v", document.v)):
            for layer, x in enumerate(keys):
                shape, scales = (document.k[0].shape[0], dim), document.scales_of(layer)
                check_body(name, x, like, shape, scales, heads.num_kv_heads)
        for name, keys in (("steady_k", document.steady_k), ("steady_v", document.steady_v)):
            for x in keys:
                check_keys(name, x, like, (heads.num_kv_heads, None, dim))
    stored = {x.dtype for document in documents for x in (*document.k, *document.v)}
    if len(stored) > 1:
        raise AttentionError(
            f"documents store keys and values as {sorted(map(str, stored))}; limit one type a "
            "plan; make a plan for each"
        )


def addresses_of_rows(table: Tensor, num_problems: int) -> Tensor:
    """Address of each problem's row of a table [Z, ...]: [Z] int64, on its device."""
    problem = torch.arange(num_problems, device=table.device)
    return table.data_ptr() + problem * (table.stride(0) * table.element_size())
