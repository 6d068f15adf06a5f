"""The structures that `kernels.c` reads, filled from checked tensors.

Owns pointers and their checks: whatever reaches C is on the CPU, contiguous where C counts on it,
and of a type that C knows. A structure lives as long as the tensors that it points to.
"""

from __future__ import annotations

from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from sparse_attn.errors import ShapeMismatch

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# As in `kernels.c`.
_MAX_HEAD_DIM, _MAX_GROUP = 512, 64


class _Keys(Structure):
    _fields_ = [
        ("k", c_void_p),
        ("v", c_void_p),
        ("head_stride", c_int64),
        ("type", c_int32),
        ("G", c_int32),
        ("P", c_int32),
        ("D", c_int32),
    ]


class _Units(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("centroids", "variances", "value_sums")),
        *((name, c_void_p) for name in ("log_sizes", "critical", "starts", "sizes", "columns")),
        ("U", c_int64),
        ("C", c_int64),
        ("type", c_int32),
        ("G", c_int32),
        ("P", c_int32),
        ("D", c_int32),
    ]


class UnitsCall(Structure):
    _fields_ = [
        ("keys", POINTER(_Keys)),
        ("units", POINTER(_Units)),
        *((name, c_void_p) for name in ("q", "taken", "log_mass", "out", "lse", "lse_read")),
        ("evidence", c_void_p),
        ("T", c_int64),
        ("S", c_int64),
        ("is_estimating", c_int32),
        ("threads", c_int32),
    ]


class SampleCall(Structure):
    _fields_ = [
        ("keys", POINTER(_Keys)),
        *((name, c_void_p) for name in ("q", "log_mass", "linear", "radii", "starts", "sizes")),
        *((name, c_void_p) for name in ("lse_read", "uniform", "recall", "bound")),
        ("T", c_int64),
        ("U", c_int64),
        ("strata", c_int64),
        ("uniform_share", c_float),
        ("max_log_ratio", c_float),
        ("threads", c_int32),
    ]


class KeysOf:
    """Keys and values [G, S, D] of one layer, or a view of a longer buffer, as C sees them.

    num_heads: query heads that read them.
    """

    def __init__(self, k: Tensor, v: Tensor, num_heads: int) -> None:
        num_kv_heads, _, head_dim = k.shape
        per_group, rest = divmod(num_heads, num_kv_heads)
        is_dense = k.stride()[1:] == v.stride()[1:] == (head_dim, 1)
        is_known = k.dtype in TYPES and k.dtype == v.dtype and k.device.type == "cpu"
        if not (is_dense and is_known and k.shape == v.shape and k.stride(0) == v.stride(0)):
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
        self.k, self.v = k, v
        self.shape = (num_kv_heads, per_group, head_dim)
        self.struct = _Keys(
            k=k.data_ptr(),
            v=v.data_ptr(),
            head_stride=k.stride(0),
            type=TYPES[k.dtype],
            G=num_kv_heads,
            P=per_group,
            D=head_dim,
        )


class UnitsOf:
    """Clusters or groups of one layer as C sees them.

    centroids, variances, value_sums: [G, C, D] of one type; log_sizes, critical [G, U] float32;
    starts, sizes, columns [G, U] int64: `columns` says which of the C columns each unit is (-1:
    padding), None where U is C.
    """

    def __init__(
        self,
        *,
        centroids: Tensor,
        variances: Tensor,
        value_sums: Tensor,
        log_sizes: Tensor,
        critical: Tensor,
        starts: Tensor,
        sizes: Tensor,
        columns: Tensor | None,
        per_group: int,
    ) -> None:
        tables = [dense(x) for x in (centroids, variances, value_sums)]
        kinds = {(x.dtype, x.shape) for x in tables}
        if len(kinds) != 1 or tables[0].dtype not in TYPES:
            raise ShapeMismatch(
                f"look-up tables of {[(str(x.dtype), list(x.shape)) for x in tables]}; the native "
                "backend reads one float type and shape; ingest the document again"
            )
        num_kv_heads, num_columns, head_dim = centroids.shape
        floats = {"log_sizes": dense(log_sizes), "critical": dense(critical)}
        ints = {"starts": dense(starts), "sizes": dense(sizes)}
        self.columns = None if columns is None else dense(columns)
        self.num_units = sizes.shape[1]
        self._kept = (tables, floats, ints)  # alive as long as their pointers
        names = ("centroids", "variances", "value_sums")
        large = zip(names, (pointer(x, x.dtype) for x in tables), strict=True)
        self.struct = _Units(
            **dict(large),
            **{name: pointer(x) for name, x in floats.items()},
            **{name: pointer(x, torch.int64) for name, x in ints.items()},
            columns=None if self.columns is None else pointer(self.columns, torch.int64),
            U=self.num_units,
            C=num_columns,
            type=TYPES[tables[0].dtype],
            G=num_kv_heads,
            P=per_group,
            D=head_dim,
        )


def dense(x: Tensor) -> Tensor:
    """x contiguous; raises ShapeMismatch unless it is on the CPU."""
    if x.device.type != "cpu":
        raise ShapeMismatch(
            f"a tensor on {x.device}; the native backend computes on the CPU; use --backend torch"
        )
    return x.contiguous()


def pointer(x: Tensor, dtype: torch.dtype = torch.float32) -> int:
    """Address of a contiguous CPU tensor of that type; raises ShapeMismatch for another."""
    if not x.is_contiguous() or x.dtype != dtype or x.device.type != "cpu":
        raise ShapeMismatch(
            f"a tensor {list(x.shape)} {x.dtype} on {x.device} with strides {x.stride()}; C reads "
            f"contiguous ones of {dtype} on the CPU; convert it, or use --backend torch"
        )
    return x.data_ptr()
