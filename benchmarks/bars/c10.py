"""Row C10, accuracy of kernels: against attention in float64, on whatever device is there.

Owns the inputs, random and adversarial, and the definition in float64: attention over the very keys
that a kernel read, and the estimate's formula over the units that stood for the rest. On a GPU in
bfloat16; without one, smaller and interpreted in float32.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from triton.runtime import interpreter

from benchmarks.harness import note, print_row
from sparse_attn.blocks import BlockSelection
from sparse_attn.kernels import prefill, selected
from sparse_attn.kernels.decode import Attended
from sparse_attn.kernels.selected import CentroidDecode
from sparse_attn.select.base import Limit
from sparse_attn.select.centroid import Units
from tests.sparse_attn.decoding import (
    Case,
    Kind,
    case_of,
    keys_of,
    make,
    plan_of,
    reduce_by_halves,
    run,
)
from tests.sparse_attn.inputs import SCALE, Layer
from tests.sparse_attn.rounding import in_fp8

BAR = (
    "greatest error of a channel over sum p |v|, against float64: at most 1e-2 in bfloat16, 3e-2 "
    "over a body in fp8, the numbers that are stored; of lse at most 1e-3; the bits of a query "
    "depend neither on the others nor on the batch"
)
MAX_OUT, MAX_OUT_FP8, MAX_LSE = 1e-2, 3e-2, 1e-3
ON_GPU = torch.cuda.is_available()
KIND = Kind(
    device="cuda" if ON_GPU else "cpu",
    dtype=torch.bfloat16 if ON_GPU else torch.float32,
    out=MAX_OUT,
    lse=MAX_LSE,
)
LENGTHS = (2000, 1, 63, 65, 3001, 4096, 513, 128, 777, 1500) if ON_GPU else (45, 1, 33, 27)
HEADS, HEAD_DIM = ((32, 8), 128) if ON_GPU else ((6, 2), 16)
LIMITS = (
    Limit(keys=0),
    Limit(keys=2048 if ON_GPU else 10),
    Limit(keys=10**6),
    Limit(mass=0.5),
    Limit(mass=0.9),
)
PREFILL = ((300, 2000), 64) if ON_GPU else ((33, 130), 64)
ORDERS: tuple[Literal["queries", "keys"], ...] = ("queries", "keys")
Errors = tuple[float, float]


def main() -> int:
    """Measure the row."""
    if not ON_GPU:
        # Every program of a grid costs time in the interpreter, and every element of a sum.
        selected._PROGRAMS, interpreter.ReduceOps.generic_reduce = (6, 6), reduce_by_halves
    rows: dict[str, dict[str, float]] = {}
    for name, found in (*decode_errors(), *prefill_errors()):
        kept = rows.setdefault(name, {"out": 0.0, "lse": 0.0})
        kept["out"], kept["lse"] = worst(kept["out"], found[0]), worst(kept["lse"], found[1])
    for name, kept in rows.items():
        note(f"{name}: out {kept['out']:.2e}, lse {kept['lse']:.2e}")
    same = {str(levels): same_bits(levels) for levels in (0, 1, 2)}
    lse = max(kept["lse"] for kept in rows.values())
    out, out_fp8 = (
        max(kept["out"] for name, kept in rows.items() if name.startswith("fp8") == is_fp8)
        for is_fp8 in (False, True)
    )
    measured = {
        "device": KIND.device,
        "dtype": str(KIND.dtype),
        "largest_out": out,
        "largest_out_fp8": out_fp8,
        "largest_lse": lse,
        "errors": rows,
        "same_bits_by_levels": same,
    }
    holds = out <= MAX_OUT and out_fp8 <= MAX_OUT_FP8 and lse <= MAX_LSE and all(same.values())
    return print_row(row="C10", measured=measured, bar=BAR, holds=holds)


def worst(a: float, b: float) -> float:
    """The greater, where what is not a number is greatest of all."""
    return 1e30 if math.isnan(b) else max(a, b)


def decode_errors() -> Iterator[tuple[str, Errors]]:
    """(name, errors) of the decode plans over all inputs, in the type of KIND and in fp8."""
    for inputs, change in INPUTS.items():
        case = make(KIND, LENGTHS, heads=HEADS, head_dim=HEAD_DIM)
        layer, q = change(case.layer, case.q.float())
        case = case_of(KIND, layer, q.bfloat16())  # as a model's are
        yield from _errors_of(case, inputs)
        for name, found in _errors_of(in_fp8(case), inputs):
            yield f"fp8, {name}", found


def _errors_of(case: Case, inputs: str) -> Iterator[tuple[str, Errors]]:
    every = torch.ones(HEADS[1], len(case.layer.body[0]), dtype=torch.bool)
    yield f"dense decode, {inputs}", errors(run(plan_of([case]), case), case, every, [])
    for levels in (1, 2):
        for limit in LIMITS:
            plan = plan_of([case], limit, levels=levels)
            found = run(plan, case)
            answer = errors(found, case, *own_selection(plan, case, levels))
            yield f"centroid decode, {levels} levels, {inputs}", answer


def _one_hot(layer: Layer, q: Tensor) -> tuple[Layer, Tensor]:
    k = layer.k.clone()
    k[layer.body[0][5]] = 8.0 * q[0, 0].sign()
    return replace(layer, k=k), q


def _outliers(layer: Layer, q: Tensor) -> tuple[Layer, Tensor]:
    k = layer.k.clone()
    k[:, 3] *= 20.0
    return replace(layer, k=k), q


def _offset(layer: Layer, q: Tensor) -> tuple[Layer, Tensor]:
    return replace(layer, v=layer.v + 100.0, steady_v=layer.steady_v + 100.0), q


INPUTS: dict[str, Callable[[Layer, Tensor], tuple[Layer, Tensor]]] = {
    "random": lambda layer, q: (layer, q),
    "sharp": lambda layer, q: (layer, 4.0 * q),
    "large logits": lambda layer, q: (layer, 50.0 * q),
    "tiny queries": lambda layer, q: (layer, 1e-20 * q),
    "no query": lambda layer, q: (layer, 0.0 * q),
    "one hot": _one_hot,
    "outlier channel": _outliers,
    "offset values": _offset,
}


def own_selection(
    plan: CentroidDecode, case: Case, levels: int
) -> tuple[Tensor, list[tuple[Units, Tensor]]]:
    """Which of each head's body keys were read [G, n], and the units that stand for the others."""
    bounds, slots, body = plan.slot_bounds[0].cpu(), plan.slots.cpu(), case.layer.body
    read = torch.stack(
        [
            torch.isin(torch.tensor(body[g]), slots[g, : bounds[g, -1]].long())
            for g in range(case.num_kv_heads)
        ]
    )
    index = case.layer.index
    first = index.groups if levels == 2 else index.clusters
    closed = (plan._mass[:, 0].cpu() > -torch.inf) & (first.sizes > 0)  # what was taken is -inf
    if levels == 1:
        return read, [(first, closed)]
    unread = torch.zeros_like(index.clusters.sizes, dtype=torch.bool)
    for g in range(case.num_kv_heads):
        opened = ~closed[g] & (first.sizes[g] > 0)
        runs = zip(index.group_starts[g, opened], index.group_counts[g, opened], strict=True)
        for start, count in runs:
            unread[g, start : start + count] = True
        unread[g] &= ~torch.isin(index.clusters.starts[g], slots[g, : bounds[g, -1]].long())
    return read, [(first, closed), (index.clusters, unread)]


def errors(found: Attended, case: Case, read: Tensor, units: list[tuple[Units, Tensor]]) -> Errors:
    """Of out over sum p |v|, and of both lse."""
    keys, values = (x.double() for x in keys_of(case))
    worst_out = worst_lse = 0.0
    per_group = case.q.shape[1] // case.num_kv_heads
    is_steady = torch.ones(case.num_steady, dtype=torch.bool)
    for h in range(case.q.shape[1]):
        g = h // per_group
        own, x = torch.cat([read[g], is_steady]), case.q[0, h].double()
        masses, means = [keys[g, own] @ x * SCALE], [values[g, own]]
        lse_read = torch.logsumexp(masses[0], dim=0)
        for table, stands in units:
            mass, mean = estimate(table, g, stands[g], x)
            masses.append(mass)
            means.append(mean)
        lse, out, size = attended(torch.cat(masses), torch.cat(means))
        error = (found.out[0, 0, h].double() - out).abs() / size.clamp(min=1e-300)
        worst_out = worst(worst_out, float(error.max()))
        for ours, theirs in ((found.lse, lse), (found.lse_read, lse_read)):
            worst_lse = worst(worst_lse, float((ours[0, 0, h].double() - theirs).abs()))
    return worst_out, worst_lse


def attended(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """lse, sum p v and sum p |v| in float64."""
    lse = torch.logsumexp(scores, dim=0)
    weights = torch.exp(scores - lse)
    return lse, weights @ values, weights @ values.abs()


def estimate(units: Units, g: int, stands: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Log mass and mean value of units, by the formula of `select/centroid.py` in float64."""
    sizes = units.sizes[g, stands].double()
    centroids, variances, sums = (
        x[g, stands].double() for x in (units.centroids, units.variances, units.value_sums)
    )
    sigma = (variances @ q.square()).sqrt() * SCALE
    knee = torch.minimum(sigma, (2.0 * sizes.log()).sqrt())
    mass = sizes.log() + centroids @ q * SCALE + knee * (sigma - knee / 2)
    return mass, sums / sizes.unsqueeze(1)


def same_bits(levels: int) -> bool:
    """Whether two queries of two documents in one plan are as each is alone."""
    options: dict[str, Any] = {"limit": LIMITS[1], "levels": levels} if levels else {}
    cases = [
        make(KIND, lengths, heads=HEADS, head_dim=HEAD_DIM, seed=seed)
        for lengths, seed in ((LENGTHS, 0), (LENGTHS[:2] + LENGTHS[-1:], 3))
    ]
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 2, HEADS[0], HEAD_DIM, generator=generator).to(KIND.dtype)
    together = run(plan_of(cases, num_queries=2, see=5, **options), cases[0], q)
    is_same = True
    for b, case in enumerate(cases):
        for t in range(2):
            alone = run(plan_of([case], see=5 + t, **options), case, q[b : b + 1, t : t + 1])
            is_same &= all(
                torch.equal(getattr(together, name)[b, t], getattr(alone, name)[0, 0])
                for name in Attended.__slots__
            )
    return is_same


def prefill_errors() -> Iterator[tuple[str, Errors]]:
    """(name, errors) of the prefill kernels over all inputs."""
    (num_tokens, num_slots), block = PREFILL
    generator = torch.Generator().manual_seed(4)
    chosen = _some_blocks(num_tokens, num_slots, block, generator)
    for inputs, factor in (("random", 1.0), ("sharp", 4.0), ("large logits", 50.0), ("none", 0.0)):
        q = torch.randn(num_tokens, 4, 128, generator=generator) * factor
        k, v = torch.randn(2, 2, num_slots, 128, generator=generator)
        own_q, own_k, own_v = own = [x.to(KIND.device, KIND.dtype) for x in (q, k, v)]
        q, k, v = (x.cpu().double() for x in own)
        order = torch.arange(num_slots).unsqueeze(0)
        causal = order <= num_slots - num_tokens + torch.arange(num_tokens).unsqueeze(1)
        causal = causal.expand(4, -1, -1)
        all_keys = torch.ones_like(causal)
        tile = torch.arange(num_tokens) // chosen.tile_tokens
        flags = chosen.flags(-(-num_slots // block)).cpu().bool()[tile].permute(1, 0, 2)
        listed = flags[..., order[0] // block].repeat_interleave(2, dim=0)
        every = BlockSelection.of(
            torch.arange(-(-num_slots // block)).expand(len(chosen.blocks), 2, -1).to(KIND.device),
            block=block,
            tile_tokens=chosen.tile_tokens,
        )
        kernels: dict[str, tuple[Any, Tensor]] = {
            "dense": (prefill.attend_dense(own_q, own_k, own_v, scale=0.09), all_keys),
            "causal": (
                prefill.attend_causal(own_q, own_k, own_v, scale=0.09),
                causal.expand(4, -1, -1),
            ),
        }
        for by in ORDERS:
            for kind, lists, mask in (("some", chosen, listed), ("all", every, all_keys)):
                part = prefill.attend_blocks(own_q, own_k, own_v, lists, scale=0.09, order=by)
                kernels[f"{kind} blocks by {by}"] = (part, mask)
        for name, (part, mask) in kernels.items():
            yield f"prefill {name}, {inputs}", part_errors(part, q, k, v, mask)


def _some_blocks(
    num_tokens: int, num_slots: int, block: int, generator: torch.Generator
) -> BlockSelection:
    """About half of the blocks for each tile of 16 queries and KV head, the first always."""
    num_blocks = -(-num_slots // block)
    taken = torch.rand(-(-num_tokens // 16), 2, num_blocks, generator=generator) < 0.5
    taken[..., 0] = True
    rows = torch.where(taken, torch.arange(num_blocks), num_blocks).sort(dim=2).values
    rows = rows.masked_fill(rows == num_blocks, -1)
    return BlockSelection.of(rows.to(KIND.device), block=block, tile_tokens=16)


def part_errors(part: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Errors:
    """Of a part over keys [H, T, S] that each query sees; q, k, v in float64."""
    k, v = (x.repeat_interleave(2, dim=0) for x in (k, v))
    scores = torch.einsum("thd,hsd->hts", q, k) * 0.09
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(scores, dim=2)
    weights = torch.exp(scores - lse.unsqueeze(2))
    error = (part.out.cpu().double().transpose(0, 1) - weights @ v).abs() / (weights @ v.abs())
    lse_error = (part.lse.cpu().double().transpose(0, 1) - lse).abs()
    return float(error.max()), float(lse_error.max())


if __name__ == "__main__":
    sys.exit(main())
