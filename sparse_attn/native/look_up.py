"""The compiled kernels of a look-up as Python functions over tensors: scores, choice, attention.

Owns the calls over units and their argument types, as `library.py` those over keys; knows no order
of steps.
"""

from __future__ import annotations

import ctypes
from ctypes import byref
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_attn.folds import NUM_FOLDS
from sparse_attn.native.library import check_memory, load, optional
from sparse_attn.native.structs import CountCall, KeysOf, RankCall, UnitsCall, UnitsOf, pointer
from sparse_attn.select.base import Limit


def score_units(units: UnitsOf, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log mass of every unit for the scaled q [T, H, D], with and without its spread, [T, H, U];
    and of all units together, [T, H].
    """
    log_mass, lse = q.new_empty((*q.shape[:2], units.num_units)), q.new_empty(q.shape[:2])
    linear, squares = torch.empty_like(log_mass), q * q
    load().longspan_score_units(
        byref(units.struct),
        pointer(q),
        pointer(squares),
        q.shape[0],
        pointer(log_mass),
        pointer(linear),
        pointer(lse),
        torch.get_num_threads(),
    )
    return log_mass, linear, lse


def total_mass(log_mass: Tensor, bounds: Tensor) -> Tensor:
    """Natural log of the mass of all units, [T, H], of log_mass [T, H, U]; bounds: [G, 9]."""
    num_tokens, num_heads, num_units = log_mass.shape
    lse = log_mass.new_empty((num_tokens, num_heads))
    load().longspan_total_mass(
        pointer(log_mass),
        pointer(bounds, torch.int64),
        num_tokens,
        bounds.shape[0],
        num_heads // bounds.shape[0],
        num_units,
        pointer(lse),
        torch.get_num_threads(),
    )
    return lse


def rank_units(
    log_mass: Tensor, units: UnitsOf, *, total: Tensor, lse_steady: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """benefit [G, T, U] and, if lse_steady is given, shares [G, P, T, U] and steady [G, P, T]."""
    num_tokens, G, P = log_mass.shape[0], units.struct.G, units.struct.P
    benefit = log_mass.new_empty((G, num_tokens, units.num_units))
    shares, steady = None, None
    if lse_steady is not None:
        shares = log_mass.new_empty((G, P, num_tokens, units.num_units))
        steady = log_mass.new_empty((G, P, num_tokens))
    call = _rank_call(log_mass, units, total, lse_steady)
    call.benefit, call.shares, call.steady = pointer(benefit), optional(shares), optional(steady)
    check_memory(load().longspan_rank_units(byref(call)))
    return benefit, shares, steady


def take_units(
    log_mass: Tensor, units: UnitsOf, *, total: Tensor, lse_steady: Tensor, limit: Limit
) -> Tensor:
    """Which units each query reads, [G, T, U] bool; see `select/take.py` for the rule."""
    taken = torch.empty((units.struct.G, log_mass.shape[0], units.num_units), dtype=torch.bool)
    call = _rank_call(log_mass, units, total, lse_steady)
    call.taken = pointer(taken, torch.bool)
    call.max_keys = -1 if limit.keys is None else limit.keys
    call.mass = limit.mass or 0.0
    check_memory(load().longspan_take_units(byref(call)))
    return taken


def _rank_call(
    log_mass: Tensor, units: UnitsOf, total: Tensor, lse_steady: Tensor | None
) -> RankCall:
    return RankCall(
        log_mass=pointer(log_mass),
        sizes=pointer(units.sizes, torch.int64),
        rank_weights=pointer(units.rank_weights),
        total=pointer(total),
        lse_steady=optional(lse_steady),
        T=log_mass.shape[0],
        G=units.struct.G,
        P=units.struct.P,
        U=units.num_units,
        threads=torch.get_num_threads(),
    )


class Count(NamedTuple):
    """What was taken: attended [G, T], keys of each query; read [G], of all; of the last query the
    first, count [n] and bounds [G + 1] of its runs, and what C needs to keep its scores.
    """

    attended: Tensor
    read: Tensor
    runs: tuple[Tensor, Tensor, Tensor] | None
    offsets: Tensor
    num_kept: int
    most_keys: int


def count_taken(taken: Tensor, units: UnitsOf, *, keeps: bool) -> Count:
    """Keys of the taken [G, T, U] units, and if `keeps` the runs that the last query took."""
    G, T, U = taken.shape
    # One piece of memory for all of them: a tensor costs more than the counting of a few units.
    lengths = (G * T, G, G * NUM_FOLDS, G + 1, *((G * U,) * 2 if keeps else ()))
    room = torch.empty(sum(lengths), dtype=torch.int64)
    places = list(accumulate(lengths, initial=0))
    at = [room.data_ptr() + 8 * place for place in places]
    call = CountCall(
        taken=pointer(taken, torch.bool),
        units=ctypes.pointer(units.struct),
        attended=at[0],
        read=at[1],
        offsets=at[2],
        T=T,
    )
    if keeps:
        call.runs, call.first, call.count = at[3], at[4], at[5]
    load().longspan_count_taken(byref(call))
    runs = None
    if keeps:
        bounds = room[places[3] : places[4]]
        first, count = (room[place : place + call.num_runs] for place in places[4:6])
        runs = (first, count, bounds)
    attended, read = room[: G * T].view(G, T), room[places[1] : places[2]]
    offsets = room[places[2] : places[3]]
    return Count(attended, read, runs, offsets, call.num_kept, call.most_keys)


def attend_units(
    keys: KeysOf,
    units: UnitsOf,
    q: Tensor,
    *,
    taken: Tensor,
    log_mass: Tensor,
    count: Count,
    closed: tuple[UnitsOf, Tensor] | None,
    is_estimating: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """out [T, H, D] and lse [T, H] over the taken units and, if `is_estimating`, what the others
    and the `closed` ones (with their log mass) are estimated to hold; lse_read [T, H] of what was
    read; the last query's scores [H/G, keys], if `count` has runs.

    log_mass [T, H, U] becomes -inf where a unit was taken.
    """
    out, lse, lse_read = torch.empty_like(q), q.new_empty(q.shape[:2]), q.new_empty(q.shape[:2])
    kept = q.new_empty((units.struct.P, count.num_kept)) if count.runs is not None else None
    call = UnitsCall(
        keys=ctypes.pointer(keys.struct),
        units=ctypes.pointer(units.struct),
        closed=None if closed is None else ctypes.pointer(closed[0].struct),
        closed_log_mass=None if closed is None else pointer(closed[1]),
        q=pointer(q),
        taken=pointer(taken, torch.bool),
        log_mass=pointer(log_mass),
        out=pointer(out),
        lse=pointer(lse),
        lse_read=pointer(lse_read),
        offsets=pointer(count.offsets, torch.int64),
        kept=optional(kept),
        T=q.shape[0],
        num_kept=count.num_kept,
        most_keys=count.most_keys,
        is_estimating=is_estimating,
        threads=torch.get_num_threads(),
    )
    check_memory(load().longspan_attend_units(byref(call)))
    return out, lse, lse_read, kept
