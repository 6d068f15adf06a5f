"""The structures that `kernels.c` reads, filled from checked tensors.

Owns pointers and their checks: whatever reaches C is on the CPU, contiguous where C counts on it,
and of a type that C knows. A structure lives as long as the tensors that it points to.
"""

from __future__ import annotations

from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from sparse_attn.errors import ShapeMismatch
from sparse_attn.folds import Runs
from sparse_attn.select.centroid import Units
from sparse_attn.stored import FP8, check_scales

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KEY_TYPES = {**TYPES, FP8: 3}
# As in `kernels.c`.
_MAX_HEAD_DIM, _MAX_GROUP = 512, 64


class _Keys(Structure):
    _fields_ = [
        ("k", c_void_p),
        ("v", c_void_p),
        ("scales", c_void_p),
        ("head_stride", c_int64),
        ("type", c_int32),
        ("G", c_int32),
        ("P", c_int32),
        ("D", c_int32),
    ]


class _Units(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("centroids", "variances", "value_sums")),
        *((name, c_void_p) for name in ("log_sizes", "critical", "starts", "sizes")),
        *((name, c_void_p) for name in ("bounds", "columns")),
        ("U", c_int64),
        ("C", c_int64),
        ("type", c_int32),
        ("G", c_int32),
        ("P", c_int32),
        ("D", c_int32),
    ]


class RunsCall(Structure):
    _fields_ = [
        ("keys", POINTER(_Keys)),
        *((name, c_void_p) for name in ("first", "count", "offsets", "bounds")),
        *((name, c_void_p) for name in ("q", "out", "lse", "kept")),
        ("T", c_int64),
        ("num_kept", c_int64),
        ("threads", c_int32),
    ]


class UnitsCall(Structure):
    _fields_ = [
        ("keys", POINTER(_Keys)),
        ("units", POINTER(_Units)),
        ("closed", POINTER(_Units)),
        *((name, c_void_p) for name in ("q", "taken", "log_mass", "closed_log_mass")),
        *((name, c_void_p) for name in ("out", "lse", "lse_read", "offsets", "kept")),
        ("T", c_int64),
        ("num_kept", c_int64),
        ("most_keys", c_int64),
        ("is_estimating", c_int32),
        ("threads", c_int32),
    ]


class RankCall(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("log_mass", "sizes", "rank_weights")),
        *((name, c_void_p) for name in ("total", "lse_steady")),
        *((name, c_void_p) for name in ("benefit", "shares", "steady", "taken")),
        *((name, c_int64) for name in ("T", "G", "P", "U", "max_keys")),
        ("mass", c_double),
        ("threads", c_int32),
    ]


class CountCall(Structure):
    _fields_ = [
        ("taken", c_void_p),
        ("units", POINTER(_Units)),
        *((name, c_void_p) for name in ("attended", "read", "offsets")),
        *((name, c_void_p) for name in ("first", "count", "runs")),
        *((name, c_int64) for name in ("T", "num_kept", "num_runs", "most_keys")),
    ]


class SampleCall(Structure):
    _fields_ = [
        ("keys", POINTER(_Keys)),
        *((name, c_void_p) for name in ("q", "log_mass", "linear", "radii", "starts", "sizes")),
        *((name, c_void_p) for name in ("lse_read", "uniform", "mean", "variance", "most")),
        ("T", c_int64),
        ("U", c_int64),
        ("strata", c_int64),
        ("uniform_share", c_float),
        ("max_log_ratio", c_float),
        ("threads", c_int32),
    ]


class KeysOf:
    """Keys and values of one layer as C sees them: [G, S, D] or a view of a longer buffer, or flat
    [N, D].

    num_heads: query heads that read them; num_kv_heads: of a flat table; scales: [G, 2] of rows in
    e4m3.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        scales: Tensor | None = None,
    ) -> None:
        check_scales(k, scales)
        head_dim, num_kv_heads = k.shape[-1], num_kv_heads or k.shape[0]
        per_group, rest = divmod(num_heads, num_kv_heads)
        strides = (head_dim, 1)
        is_dense = k.shape == v.shape and k.stride() == v.stride() and k.stride()[-2:] == strides
        if not (is_dense and k.dtype in KEY_TYPES and k.dtype == v.dtype and k.is_cpu):
            raise ShapeMismatch(
                f"keys {list(k.shape)} {k.dtype} and values {list(v.shape)} {v.dtype} on "
                f"{k.device}; the native backend reads rows of one type on the CPU; "
                "use --backend torch"
            )
        if rest or not 1 <= per_group <= _MAX_GROUP or head_dim > _MAX_HEAD_DIM:
            raise ShapeMismatch(
                f"{num_heads} query heads over {num_kv_heads} KV heads of dim {head_dim}; "
                f"the native backend takes groups to {_MAX_GROUP} and dims to {_MAX_HEAD_DIM}; "
                "use --backend torch"
            )
        if scales is not None and scales.shape[0] != num_kv_heads:
            raise ShapeMismatch(
                f"scales of {scales.shape[0]} KV heads; limit {num_kv_heads}, one pair for each; "
                "pass what the document has"
            )
        self.k, self.v, self.scales = k, v, scales
        self.struct = _Keys(
            k=k.data_ptr(),
            v=v.data_ptr(),
            scales=None if scales is None else pointer(scales),
            head_stride=k.stride(0) if k.dim() == 3 else 0,
            type=KEY_TYPES[k.dtype],
            G=num_kv_heads,
            P=per_group,
            D=head_dim,
        )


class RunsOf:
    """Runs of slots as C sees them, with the place of each run's keys among all keys."""

    def __init__(self, runs: Runs) -> None:
        self.first, self.count, self.bounds = (
            dense(x) for x in (runs.first, runs.count, runs.bounds)
        )
        self.offsets = self.count.cumsum(dim=0) - self.count
        self.heads = torch.cat([self.bounds[:, 0], self.bounds[-1:, -1]])
        self.num_keys = runs.num_keys
        tensors = (self.first, self.count, self.offsets, self.bounds)
        names = ("first", "count", "offsets", "bounds")
        self.pointers = {
            name: pointer(x, torch.int64) for name, x in zip(names, tensors, strict=True)
        }


class UnitsOf:
    """Clusters or groups of one layer as C sees them; per_group: query heads of a KV head."""

    def __init__(self, units: Units, per_group: int) -> None:
        large = {
            name: dense(getattr(units, name)) for name in ("centroids", "variances", "value_sums")
        }
        kinds = {(x.dtype, x.shape) for x in large.values()}
        if len(kinds) != 1 or units.centroids.dtype not in TYPES:
            found = [(str(x.dtype), list(x.shape)) for x in large.values()]
            raise ShapeMismatch(
                f"look-up tables of {found}; the native backend reads one float type and shape; "
                "ingest the document again"
            )
        floats = {name: dense(getattr(units, name)) for name in ("log_sizes", "critical")}
        ints = {name: dense(getattr(units, name)) for name in ("starts", "sizes", "bounds")}
        columns = None if units.columns is None else dense(units.columns)
        self.sizes, self.rank_weights = ints["sizes"], dense(units.rank_weights)
        self.num_units = units.num_units
        self._kept = (large, floats, ints, columns)  # alive as long as their pointers
        num_kv_heads, num_columns, head_dim = units.centroids.shape
        self.struct = _Units(
            **{name: pointer(x, x.dtype) for name, x in large.items()},
            **{name: pointer(x) for name, x in floats.items()},
            **{name: pointer(x, torch.int64) for name, x in ints.items()},
            columns=None if columns is None else pointer(columns, torch.int64),
            U=self.num_units,
            C=num_columns,
            type=TYPES[units.centroids.dtype],
            G=num_kv_heads,
            P=per_group,
            D=head_dim,
        )


def dense(x: Tensor) -> Tensor:
    """x contiguous; raises ShapeMismatch unless it is on the CPU."""
    if not x.is_cpu:
        raise ShapeMismatch(
            f"a tensor on {x.device}; the native backend computes on the CPU; use --backend torch"
        )
    return x.contiguous()


def pointer(x: Tensor, dtype: torch.dtype = torch.float32) -> int:
    """Address of a contiguous CPU tensor of that type; raises ShapeMismatch for another."""
    if not (x.is_cpu and x.dtype == dtype and x.is_contiguous()):
        raise ShapeMismatch(
            f"a tensor {list(x.shape)} {x.dtype} on {x.device} with strides {x.stride()}; C reads "
            f"contiguous ones of {dtype} on the CPU; convert it, or use --backend torch"
        )
    return x.data_ptr()
