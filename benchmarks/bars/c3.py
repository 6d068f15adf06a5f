"""Row C3: decode attention over given selections, against the bandwidth at which this GPU reads.

Eight requests, each with a document of its own and 16K keys chosen for each KV head: runs of a few
neighbours at random places, as clusters leave them.
"""

from __future__ import annotations

import statistics
import sys

import torch
from torch import Tensor

from benchmarks.harness import note, print_row
from orchestrator.evaluation.attention_bench import time_in_graph
from orchestrator.evaluation.decode_bench import measure_read_bandwidth
from sparse_attn.kernels.decode import Heads
from sparse_attn.kernels.listed import ListedDecode

BAR = "8 requests with 16K chosen keys each: at least 80 % of the read bandwidth of this run"
BATCH, NUM_CHOSEN, NUM_TOKENS, RUN = 8, 16_384, 131_072, 8
NUM_KV_HEADS, PER_GROUP, HEAD_DIM, LAYERS, LEAST = 8, 4, 128, 2, 0.8


def main() -> int:
    """Measure and print the row."""
    device = torch.device("cuda")
    bandwidth = measure_read_bandwidth(device, num_bytes=8 << 30)
    heads = Heads(
        num_documents=BATCH,
        num_queries=1,
        num_kv_heads=NUM_KV_HEADS,
        per_group=PER_GROUP,
        head_dim=HEAD_DIM,
    )
    shape = (NUM_KV_HEADS * NUM_TOKENS, HEAD_DIM)
    plans, selections = [], []
    for _ in range(LAYERS):
        k, v = (
            [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(BATCH)]
            for _ in range(2)
        )
        plans.append(ListedDecode(heads, k, v, capacity=NUM_CHOSEN, scale=HEAD_DIM**-0.5))
        selections.append(_choose(heads.num_problems, device))
    q = torch.randn(
        BATCH, 1, NUM_KV_HEADS * PER_GROUP, HEAD_DIM, device=device, dtype=torch.bfloat16
    )

    def attend(layer: int) -> object:
        return plans[layer].run(q, *selections[layer])

    seconds = time_in_graph(attend, LAYERS, repeats=20)
    num_bytes = 4 * heads.num_problems * NUM_CHOSEN * HEAD_DIM
    median = statistics.median(seconds)
    share = num_bytes / bandwidth / median
    note(f"{median * 1e6:.1f} us, {share:.1%} of {bandwidth / 1e12:.2f} TB/s")
    return print_row(
        row="C3",
        measured={
            "share_of_bandwidth": share,
            "bandwidth": bandwidth,
            "num_bytes": num_bytes,
            "median_s": median,
            "min_s": min(seconds),
            "max_s": max(seconds),
        },
        bar=BAR,
        holds=share >= LEAST,
    )


def _choose(num_problems: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """slots [Z, n] of each problem's head, in rising order, and bounds [Z, 9] of equal folds."""
    num_runs = NUM_CHOSEN // RUN
    first = torch.rand(num_problems, NUM_TOKENS // RUN, device=device).argsort(dim=1)[:, :num_runs]
    first = first.sort(dim=1).values * RUN
    slots = (first.unsqueeze(2) + torch.arange(RUN, device=device)).view(num_problems, -1)
    head = torch.arange(num_problems, device=device) % NUM_KV_HEADS
    slots = slots + (head * NUM_TOKENS).unsqueeze(1)
    edges = torch.arange(9, device=device) * (NUM_CHOSEN // 8)
    return slots.int().contiguous(), edges.int().repeat(num_problems, 1)


if __name__ == "__main__":
    sys.exit(main())
