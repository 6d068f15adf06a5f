"""The compiled kernels as Python functions over tensors: `kernels.c` through ctypes.

Owns the calls and their argument types; knows no selection and no order of steps.

The kernels run on the OpenMP threads of torch: importing torch puts its runtime where the loader
finds it, so that a second pool never competes for the cores.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int, c_int64, c_void_p
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from sparse_attn.errors import BackendUnknown, ShapeMismatch
from sparse_attn.native.structs import TYPES, KeysOf, SampleCall, UnitsCall, UnitsOf, dense, pointer


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL:
    """The shared object that the installation compiled; raises BackendUnknown where it is not."""
    spec = find_spec("sparse_attn.native._kernels")
    if spec is None or spec.origin is None:
        raise BackendUnknown(
            "backend 'native' was not compiled here; it needs gcc 12 when Longspan is installed; "
            "install again, or use --backend torch"
        )
    try:
        return ctypes.CDLL(spec.origin)
    except OSError as error:
        raise BackendUnknown(
            f"backend 'native' cannot be loaded ({error}); it runs on the OpenMP threads of torch; "
            "install again beside this torch, or use --backend torch"
        ) from error


def attend_prefix(keys: KeysOf, q: Tensor, *, past: int) -> tuple[Tensor, Tensor]:
    """out [T, H, D] and lse [T, H]: token t of the scaled q [T, H, D] sees slots 0 to past + t."""
    if past + q.shape[0] > keys.k.shape[1]:
        raise ShapeMismatch(
            f"{q.shape[0]} tokens after {past} over {keys.k.shape[1]} slots; each token has a "
            "slot; append its key first"
        )
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
    _check_memory(
        load().longspan_attend_prefix(
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
    """Merges attention of one scaled query q [H, D] over every slot into the part out, lse.

    evidence [G, S] gains each slot's share of the merged part.
    """
    _check_memory(
        load().longspan_attend_body(
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
    if weight.dtype not in TYPES or x.shape != weight.shape[1:]:
        raise ShapeMismatch(
            f"weights {list(weight.shape)} {weight.dtype} times {list(x.shape)}; the native "
            "backend multiplies float32 or bfloat16 [N, K] with [K]; use --backend torch"
        )
    out = x.new_empty(weight.shape[0])
    load().longspan_products(
        _address(weight, weight.dtype),
        c_int(TYPES[weight.dtype]),
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
    load().longspan_score_units(
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
        load().longspan_take_units(
            _address(log_mass),
            _address(sizes, torch.int64),
            _address(rank_weights),
            c_int64(num_tokens),
            c_int64(num_kv_heads),
            c_int64(num_heads // num_kv_heads),
            c_int64(num_units),
            _address(lse_other),
            _address(lse_steady),
            c_int64(-1 if keys is None else keys),
            c_float(0.0 if mass is None else mass),
            _address(taken, torch.bool),
            c_int(torch.get_num_threads()),
        )
    )
    return taken


def count_taken(taken: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Keys of the taken [G, T, U] units of sizes [G, U]: of each query [G, T], of all [G]."""
    num_kv_heads, num_tokens, num_units = taken.shape
    attended = torch.empty((num_kv_heads, num_tokens), dtype=torch.int64)
    read = torch.empty(num_kv_heads, dtype=torch.int64)
    load().longspan_count_taken(
        _address(taken, torch.bool),
        _address(sizes, torch.int64),
        c_int64(num_tokens),
        c_int64(num_kv_heads),
        c_int64(num_units),
        _address(attended, torch.int64),
        _address(read, torch.int64),
    )
    return attended, read


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
    call = UnitsCall(
        keys=ctypes.pointer(keys.struct),
        units=ctypes.pointer(units.struct),
        q=pointer(q),
        taken=pointer(taken, torch.bool),
        log_mass=pointer(log_mass),
        out=pointer(out),
        lse=pointer(lse),
        lse_read=pointer(lse_read),
        evidence=None if evidence is None else pointer(evidence),
        T=q.shape[0],
        S=keys.k.shape[1],
        is_estimating=is_estimating,
        threads=torch.get_num_threads(),
    )
    _check_memory(load().longspan_attend_units(byref(call)))
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
        name: dense(x)
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
    call = SampleCall(
        keys=ctypes.pointer(keys.struct),
        **{
            name: pointer(x, torch.int64 if name in ("starts", "sizes") else torch.float32)
            for name, x in tensors.items()
        },
        recall=pointer(recall),
        bound=pointer(bound),
        T=q.shape[0],
        U=log_mass.shape[2],
        strata=uniform.shape[3],
        uniform_share=uniform_share,
        max_log_ratio=max_log_ratio,
        threads=torch.get_num_threads(),
    )
    _check_memory(load().longspan_sample_recall(byref(call)))
    return recall, bound


def _address(x: Tensor, dtype: torch.dtype = torch.float32) -> c_void_p:
    return c_void_p(pointer(x, dtype))


def _check_memory(code: int) -> None:
    if code:
        raise MemoryError("the native backend got no memory for a step's partial results")
