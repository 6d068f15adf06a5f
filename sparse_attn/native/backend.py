"""The `native` backend: the steps of a question in C, everything else as the torch backend does it.

Owns the order of the kernels' calls. The rules they follow are those of `select/centroid.py` and
`estimate.py`, which compute the same with torch operators.
"""

from __future__ import annotations

import math
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sparse_attn import torch_backend
from sparse_attn.composed import Composed
from sparse_attn.estimate import MAX_LOG_RATIO, UNIFORM_SHARE
from sparse_attn.native import library
from sparse_attn.native.structs import KeysOf, UnitsOf
from sparse_attn.select.base import Limit, Tail
from sparse_attn.select.centroid import (
    CentroidIndex,
    Units,
    expand_runs,
    lookup_bytes,
    opening_limit,
)
from sparse_attn.state import Part, merge_parts
from sparse_attn.step import Step

# From this many query tokens on, dense attention is a matrix product and torch's is the faster one.
_MIN_DENSE_TOKENS = 4


class NativeBackend(Composed):
    """Kernels of `kernels.c` where a question spends its time."""

    def __init__(self) -> None:
        super().__init__(torch_backend)
        library.load()  # what is missing is said now, not in the middle of a question
        self._units: WeakKeyDictionary[Units, UnitsOf] = WeakKeyDictionary()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        is_known = weight.dtype in (torch.float32, torch.bfloat16) and weight.is_contiguous()
        if x.shape[0] != 1 or not is_known:
            return super().linear(x, weight, bias)
        out = library.products(x[0].float().contiguous(), weight)
        if bias is not None:
            out += bias
        return out.to(x.dtype).unsqueeze(0)

    def attend_prefix(self, q: Tensor, k: Tensor, v: Tensor, *, past: int, scale: float) -> Part:
        keys = KeysOf(k, v, q.shape[1])
        return Part(*library.attend_prefix(keys, _scaled(q, scale), past=past))

    def attend_body(
        self, q: Tensor, k: Tensor, v: Tensor, steady: Part, *, scale: float, evidence: Tensor
    ) -> Part:
        if q.shape[0] >= _MIN_DENSE_TOKENS:
            return super().attend_body(q, k, v, steady, scale=scale, evidence=evidence)
        rows, keys, part = _scaled(q, scale), KeysOf(k, v, q.shape[1]), _copy(steady)
        unwanted = torch.zeros_like(evidence) if q.shape[0] > 1 else evidence
        for t in range(q.shape[0]):
            is_last = t == q.shape[0] - 1
            library.attend_body(
                keys, rows[t], part.out[t], part.lse[t], evidence if is_last else unwanted
            )
        return part

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
    ) -> Step:
        rows, keys, part = _scaled(q, scale), KeysOf(k, v, q.shape[1]), _copy(steady)
        lse_steady, lse_other, clusters = steady.lse.contiguous(), steady.lse, index.clusters
        unopened, columns, num_bytes = None, None, 0
        if levels == 2:
            unopened, columns = self._open_groups(index, rows, lse_steady, limit, keys)
            num_bytes += lookup_bytes(index.groups)
            clusters = index.clusters.take_small(columns)
            lse_other = torch.logaddexp(lse_other, torch_backend.log_sum_exp(unopened.log_mass))
        units = self._units_of(clusters, index.clusters, columns, keys)
        log_mass, linear = library.score_units(units, rows)
        taken = library.take_units(
            log_mass,
            clusters.sizes,
            clusters.rank_weights,
            lse_other=lse_other.contiguous(),
            lse_steady=lse_steady,
            keys=limit.keys,
            mass=limit.mass,
        )
        lse_read = library.attend_units(
            keys,
            units,
            rows,
            taken=taken,
            log_mass=log_mass,
            out=part.out,
            lse=part.lse,
            evidence=evidence,
            is_estimating=is_estimating,
        )
        tail = clusters.tail(log_mass, linear)
        out = part.out
        if unopened is not None:
            tail = tail.join(unopened)
            if is_estimating:
                groups = index.groups
                rest = self.attend_estimated(unopened.log_mass, groups.value_sums, groups.sizes)
                out = merge_parts([part, rest]).out
        num_attended, num_read = library.count_taken(taken, clusters.sizes)
        num_bytes += lookup_bytes(index.clusters, units.num_units)
        return Step(out, lse_read, tail, num_attended, num_read, num_bytes)

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
    ) -> tuple[Tensor, Tensor]:
        return library.sample_recall(
            KeysOf(k, k, q.shape[1]),
            _scaled(q, scale),
            log_mass=tail.log_mass,
            linear=tail.log_mass_linear,
            radii=tail.radii,
            starts=tail.starts,
            sizes=tail.sizes,
            lse_read=lse_read,
            uniform=torch.rand((2, *q.shape[:2], num_strata, 2), generator=generator),
            uniform_share=UNIFORM_SHARE,
            max_log_ratio=MAX_LOG_RATIO,
        )

    def _open_groups(
        self, index: CentroidIndex, rows: Tensor, lse_steady: Tensor, limit: Limit, keys: KeysOf
    ) -> tuple[Tail, Tensor]:
        """The groups that stay closed, and the columns [G, W] of the clusters of those that some
        query opens.
        """
        groups, opening = index.groups, opening_limit(limit)
        log_mass, linear = library.score_units(self._units_of(groups, groups, None, keys), rows)
        opened = library.take_units(
            log_mass,
            groups.sizes,
            groups.rank_weights,
            lse_other=lse_steady,
            lse_steady=lse_steady,
            keys=opening.keys,
            mass=opening.mass,
        ).any(dim=1)
        columns, _ = expand_runs(index.group_starts, index.group_counts, opened)
        per_head = opened.repeat_interleave(keys.shape[1], dim=0)
        return groups.tail(log_mass.masked_fill_(per_head, -math.inf), linear), columns

    def _units_of(
        self, units: Units, tables: Units, columns: Tensor | None, keys: KeysOf
    ) -> UnitsOf:
        """`units`, whose large tables are the columns `columns` of those of `tables`."""
        known = self._units.get(units) if columns is None else None
        if known is not None and keys.shape[1] == known.struct.P:
            return known
        found = UnitsOf(
            centroids=tables.centroids,
            variances=tables.variances,
            value_sums=tables.value_sums,
            log_sizes=units.log_sizes,
            critical=units.critical,
            starts=units.starts,
            sizes=units.sizes,
            columns=columns,
            per_group=keys.shape[1],
        )
        if columns is None:
            self._units[units] = found
        return found


def _scaled(q: Tensor, scale: float) -> Tensor:
    return q.float().mul(scale).contiguous()


def _copy(part: Part) -> Part:
    """A contiguous copy, for kernels that merge into it."""
    return Part(
        part.out.clone(memory_format=torch.contiguous_format),
        part.lse.clone(memory_format=torch.contiguous_format),
    )
