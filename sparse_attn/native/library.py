"""The compiled kernels as Python functions over tensors: `kernels.c` through ctypes.

Owns the calls over keys and over parts, and their argument types; `look_up.py` has those over
units. Knows no selection and no order of steps.

The kernels run on the OpenMP threads of torch: importing torch puts its runtime where the loader
finds it, so that a second pool never competes for the cores.
"""

from __future__ import annotations

import ctypes
from ctypes import byref
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from sparse_attn.errors import BackendUnknown, ShapeMismatch
from sparse_attn.folds import Kept
from sparse_attn.native.structs import (
    TYPES,
    KeysOf,
    RunsCall,
    RunsOf,
    SampleCall,
    dense,
    pointer,
)
from sparse_attn.select.base import Tail
from sparse_attn.state import Part

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
# Arguments of the calls that do not take one structure: converting them is most of a short call.
_ARGUMENTS = {
    "attend_prefix": (_POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _INT),
    "merge_tree": (_POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER, _POINTER, _INT),
    "merge_pair": (*(_POINTER,) * 4, _LONG, _LONG, _INT),
    "spread_evidence": (*(_POINTER,) * 5, _LONG, _LONG, _LONG, _POINTER, _INT),
    "products": (_POINTER, _INT, _LONG, _LONG, _POINTER, _POINTER, _INT),
    "score_units": (_POINTER, _POINTER, _POINTER, _LONG, *(_POINTER,) * 3, _INT),
    "total_mass": (_POINTER, _POINTER, _LONG, _LONG, _LONG, _LONG, _POINTER, _INT),
}


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
        found = ctypes.CDLL(spec.origin)
    except OSError as error:
        raise BackendUnknown(
            f"backend 'native' cannot be loaded ({error}); it runs on the OpenMP threads of torch; "
            "install again beside this torch, or use --backend torch"
        ) from error
    for name, arguments in _ARGUMENTS.items():
        getattr(found, f"longspan_{name}").argtypes = arguments
    return found


def attend_prefix(keys: KeysOf, q: Tensor, *, past: int) -> tuple[Tensor, Tensor]:
    """out [T, H, D] and lse [T, H]: token t of the scaled q [T, H, D] sees slots 0 to past + t."""
    if past + q.shape[0] > keys.k.shape[1]:
        raise ShapeMismatch(
            f"{q.shape[0]} tokens after {past} over {keys.k.shape[1]} slots; each token has a "
            "slot; append its key first"
        )
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
    check_memory(
        load().longspan_attend_prefix(
            byref(keys.struct),
            pointer(q),
            q.shape[0],
            past,
            pointer(out),
            pointer(lse),
            torch.get_num_threads(),
        )
    )
    return out, lse


def attend_runs(
    keys: KeysOf, runs: RunsOf, q: Tensor, *, keeps: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """out [T, H, D] and lse [T, H] of the scaled q [T, H, D] over every run, and if `keeps` the
    last token's scores [H/G, keys].
    """
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
    kept = q.new_empty((keys.struct.P, runs.num_keys)) if keeps else None
    call = RunsCall(
        keys=ctypes.pointer(keys.struct),
        **runs.pointers,
        q=pointer(q),
        out=pointer(out),
        lse=pointer(lse),
        kept=optional(kept),
        T=q.shape[0],
        num_kept=runs.num_keys,
        threads=torch.get_num_threads(),
    )
    check_memory(load().longspan_attend_runs(byref(call)))
    return out, lse, kept


def merge_tree(outs: Tensor | None, lses: Tensor) -> tuple[Tensor, Tensor]:
    """The part over n parts, outs [n, T, H, D] (or none) and lses [n, T, H], by the tree."""
    lse = lses.new_empty(lses.shape[1:])
    out = lse if outs is None else outs.new_empty(outs.shape[1:])
    check_memory(
        load().longspan_merge_tree(
            None if outs is None else pointer(outs),
            pointer(lses),
            lses.shape[0],
            lse.numel(),
            0 if outs is None else outs.shape[-1],
            pointer(out),
            pointer(lse),
            torch.get_num_threads(),
        )
    )
    return out, lse


def merge_pair(part: Part, other: Part) -> None:
    """Merges another part into the first."""
    load().longspan_merge_pair(
        pointer(part.out),
        pointer(part.lse),
        pointer(other.out),
        pointer(other.lse),
        part.lse.numel(),
        part.out.shape[-1],
        torch.get_num_threads(),
    )


def spread_evidence(evidence: Tensor, kept: Kept, lse: Tensor) -> None:
    """evidence [N] gains exp(score - lse) of the kept scores, summed over heads; lse: [H]."""
    num_heads, num_keys = kept.scores.shape
    check_memory(
        load().longspan_spread_evidence(
            pointer(evidence),
            *(pointer(x, torch.int64) for x in (kept.first, kept.count, kept.bounds)),
            pointer(kept.scores),
            num_keys,
            kept.bounds.shape[0] - 1,
            num_heads,
            pointer(lse),
            torch.get_num_threads(),
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
        pointer(weight, weight.dtype),
        TYPES[weight.dtype],
        weight.shape[0],
        weight.shape[1],
        pointer(x),
        pointer(out),
        torch.get_num_threads(),
    )
    return out


def sample_missed(
    keys: KeysOf,
    q: Tensor,
    tail: Tail,
    lse_read: Tensor,
    *,
    uniform: Tensor,
    uniform_share: float,
    max_log_ratio: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and greatest log mass of what was missed, [T, H] each; uniform: [2, T, H,
    strata, 2] numbers in [0, 1).
    """
    mean, variance, most = (q.new_empty(q.shape[:2]) for _ in range(3))
    tensors = {
        name: dense(x)
        for name, x in (
            ("q", q),
            ("log_mass", tail.log_mass),
            ("linear", tail.log_mass_linear),
            ("radii", tail.radii),
            ("starts", tail.starts),
            ("sizes", tail.sizes),
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
        mean=pointer(mean),
        variance=pointer(variance),
        most=pointer(most),
        T=q.shape[0],
        U=tail.sizes.shape[1],
        strata=uniform.shape[3],
        uniform_share=uniform_share,
        max_log_ratio=max_log_ratio,
        threads=torch.get_num_threads(),
    )
    check_memory(load().longspan_sample_missed(byref(call)))
    return mean, variance, most


def optional(x: Tensor | None) -> int | None:
    return None if x is None else pointer(x)


def check_memory(code: int) -> None:
    if code:
        raise MemoryError("the native backend got no memory for a step's partial results")
