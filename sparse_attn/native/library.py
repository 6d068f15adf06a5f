"""The compiled kernels as Python functions over tensors: `kernels.c` through ctypes.

Owns pointers, argument types and their checks: whatever reaches C is on the CPU, contiguous where C
counts on it, and of a type that C knows. Knows no selection and no order of steps.

The kernels run on the OpenMP threads of torch: importing torch puts its runtime where the loader
finds it, so that a second pool never competes for the cores.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int32, c_int64, c_void_p
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from sparse_attn.errors import BackendUnknown, ShapeMismatch

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
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


class _UnitsCall(Structure):
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


class _SampleCall(Structure):
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


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    """The shared object that the installation compiled; raises BackendUnknown where it is not."""
    spec = find_spec("sparse_attn.native._kernels")
    if spec is None or spec.origin is None:
        raise BackendUnknown(
            "backend 'native' was not compiled here; it needs gcc when Longspan is installed; "
            "install again, or use --backend torch"
        )
    return ctypes.CDLL(spec.origin)


class KeysOf:
    """Keys and values [G, S, D] of one layer as C sees them; a view of a longer buffer may be given.

    num_heads: query heads that read them.
    """

    def __init__(self, k: Tensor, v: Tensor, num_heads: int) -> None:
        num_kv_heads, _, head_dim = k.shape
        per_group, rest = divmod(num_heads, num_kv_heads)
        is_dense = k.stride()[1:] == v.stride()[1:] == (head_dim, 1)
        is_known = k.dtype in _TYPES and k.dtype == v.dtype and k.device.type == "cpu"
        if not (is_dense and is_known and k.shape == v.shape and k.stride(0) == v.stride(0)):
            raise ShapeMismatch(
                f"keys {list(k.shape)} {k.dtype} and values {list(v.shape)} {v.dtype} on {k.device}; "
                "the native backend reads rows of one type on the CPU; use --backend torch"
            )
        if rest or not 1 <= per_group <= _MAX_GROUP or head_dim > _MAX_HEAD_DIM:
            raise ShapeMismatch(
                f"{num_heads} query heads over {num_kv_heads} KV heads of dim {head_dim}; the native "
                f"backend takes groups to {_MAX_GROUP} and dims to {_MAX_HEAD_DIM}; "
                "use --backend torch"
            )
        self.k, self.v = k, v
        self.shape = (num_kv_heads, per_group, head_dim)
        self.struct = _Keys(
            k=k.data_ptr(),
            v=v.data_ptr(),
            head_stride=k.stride(0),
            type=_TYPES[k.dtype],
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
        tables = [_dense(x) for x in (centroids, variances, value_sums)]
        if len({x.dtype for x in tables}) != 1 or tables[0].dtype not in _TYPES:
            raise ShapeMismatch(
                f"look-up tables of types {[str(x.dtype) for x in tables]}; the native backend reads "
                "one float type; ingest the document again"
            )
        num_kv_heads, num_columns, head_dim = centroids.shape
        small = [_dense(x) for x in (log_sizes, critical, starts, sizes)]
        self.columns = None if columns is None else _dense(columns)
        self.num_units = sizes.shape[1]
        self._kept = (tables, small)  # alive as long as their pointers
        self.struct = _Units(
            **dict(zip(("centroids", "variances", "value_sums"), map(_pointer, tables), strict=True)),
            **dict(zip(("log_sizes", "critical", "starts", "sizes"), map(_pointer, small), strict=True)),
            columns=None if self.columns is None else _pointer(self.columns),
            U=self.num_units,
            C=num_columns,
            type=_TYPES[tables[0].dtype],
            G=num_kv_heads,
            P=per_group,
            D=head_dim,
        )


def attend_prefix(keys: KeysOf, q: Tensor, *, past: int) -> tuple[Tensor, Tensor]:
    """out [T, H, D] and lse [T, H]: token t of the scaled q [T, H, D] sees slots 0 to past + t."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
    _check_memory(
        _library().longspan_attend_prefix(
            byref(keys.struct),
            _address(q),
            c_int64(q.shape[0]),
            c_int64(past),
            _address(out),
            _address(lse),
            c_int(torch.get_num_threads()),
        )
    )
    return out, lse


def attend_body(keys: KeysOf, q: Tensor, out: Tensor, lse: Tensor, evidence: Tensor) -> None:
    """Merges attention of one scaled query q [H, D] over every slot into the part out, lse, and adds
    each slot's share of it to evidence [G, S].
    """
    _check_memory(
        _library().longspan_attend_body(
            byref(keys.struct),
            _address(q),
            c_int64(keys.k.shape[1]),
            _address(out),
            _address(lse),
            _address(evidence),
            c_int(torch.get_num_threads()),
        )
    )


def products(x: Tensor, weight: Tensor) -> Tensor:
    """weight [N, K] times x [K] float32: [N] float32."""
    out = x.new_empty(weight.shape[0])
    _library().longspan_products(
        _address(weight),
        c_int(_TYPES[weight.dtype]),
        c_int64(weight.shape[0]),
        c_int64(weight.shape[1]),
        _address(x),
        _address(out),
        c_int(torch.get_num_threads()),
    )
    return out


def score_units(units: UnitsOf, q: Tensor) -> tuple[Tensor, Tensor]:
    """Log mass of every unit for the scaled q [T, H, D], with and without its spread: [T, H, U]."""
    log_mass = q.new_empty((*q.shape[:2], units.num_units))
    linear, squares = torch.empty_like(log_mass), q * q
    _library().longspan_score_units(
        byref(units.struct),
        _address(q),
        _address(squares),
        c_int64(q.shape[0]),
        _address(log_mass),
        _address(linear),
        c_int(torch.get_num_threads()),
    )
    return log_mass, linear


def take_units(
    log_mass: Tensor,
    sizes: Tensor,
    rank_weights: Tensor,
    *,
    lse_other: Tensor,
    lse_steady: Tensor,
    keys: int | None,
    mass: float | None,
) -> Tensor:
    """Which units each query reads, [G, T, U] bool; see `select/centroid.py` for the rule."""
    num_tokens, num_heads, num_units = log_mass.shape
    num_kv_heads = sizes.shape[0]
    taken = torch.empty((num_kv_heads, num_tokens, num_units), dtype=torch.bool)
    _check_memory(
        _library().longspan_take_units(
            _address(log_mass),
            _address(sizes),
            _address(rank_weights),
            c_int64(num_tokens),
            c_int64(num_kv_heads),
            c_int64(num_heads // num_kv_heads),
            c_int64(num_units),
            _address(lse_other),
            _address(lse_steady),
            c_int64(-1 if keys is None else keys),
            c_float(0.0 if mass is None else mass),
            _address(taken),
            c_int(torch.get_num_threads()),
        )
    )
    return taken


def attend_units(
    keys: KeysOf,
    units: UnitsOf,
    q: Tensor,
    *,
    taken: Tensor,
    log_mass: Tensor,
    out: Tensor,
    lse: Tensor,
    evidence: Tensor | None,
    is_estimating: bool,
) -> Tensor:
    """Merges attention over the taken units into the part out [T, H, D], lse [T, H], then, if
    `is_estimating`, what the others are estimated to hold.

    log_mass [T, H, U] becomes -inf where a unit was taken; evidence [G, S] gains the last query's
    mass. Returns the lse [T, H] of what was read.
    """
    lse_read = torch.empty_like(lse)
    call = _UnitsCall(
        keys=ctypes.pointer(keys.struct),
        units=ctypes.pointer(units.struct),
        q=_pointer(q),
        taken=_pointer(taken),
        log_mass=_pointer(log_mass),
        out=_pointer(out),
        lse=_pointer(lse),
        lse_read=_pointer(lse_read),
        evidence=None if evidence is None else _pointer(evidence),
        T=q.shape[0],
        S=keys.k.shape[1],
        is_estimating=is_estimating,
        threads=torch.get_num_threads(),
    )
    _check_memory(_library().longspan_attend_units(byref(call)))
    return lse_read


def sample_recall(
    keys: KeysOf,
    q: Tensor,
    *,
    log_mass: Tensor,
    linear: Tensor,
    radii: Tensor,
    starts: Tensor,
    sizes: Tensor,
    lse_read: Tensor,
    uniform: Tensor,
    uniform_share: float,
    max_log_ratio: float,
) -> tuple[Tensor, Tensor]:
    """Sampled recall and bound [T, H]; uniform: [2, T, H, strata, 2] numbers in [0, 1)."""
    recall, bound = q.new_empty(q.shape[:2]), q.new_empty(q.shape[:2])
    tensors = {
        name: _dense(x)
        for name, x in (
            ("q", q),
            ("log_mass", log_mass),
            ("linear", linear),
            ("radii", radii),
            ("starts", starts),
            ("sizes", sizes),
            ("lse_read", lse_read),
            ("uniform", uniform),
        )
    }
    call = _SampleCall(
        keys=ctypes.pointer(keys.struct),
        **{name: _pointer(x) for name, x in tensors.items()},
        recall=_pointer(recall),
        bound=_pointer(bound),
        T=q.shape[0],
        U=log_mass.shape[2],
        strata=uniform.shape[3],
        uniform_share=uniform_share,
        max_log_ratio=max_log_ratio,
        threads=torch.get_num_threads(),
    )
    _check_memory(_library().longspan_sample_recall(byref(call)))
    return recall, bound


def _dense(x: Tensor) -> Tensor:
    if x.device.type != "cpu":
        raise ShapeMismatch(
            f"a tensor on {x.device}; the native backend computes on the CPU; use --backend torch"
        )
    return x.contiguous()


def _pointer(x: Tensor) -> int:
    if not x.is_contiguous():
        raise ShapeMismatch(
            f"a tensor {list(x.shape)} with strides {x.stride()}; C reads contiguous ones; copy it"
        )
    return x.data_ptr()


def _address(x: Tensor) -> c_void_p:
    return c_void_p(_pointer(x))


def _check_memory(code: int) -> None:
    if code:
        raise MemoryError("the native backend got no memory for a step's partial results")
