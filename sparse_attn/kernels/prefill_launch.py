"""How the prefill kernels are launched: tiles, warps, pipeline, by head dim and vendor.

Owns numbers alone. Chosen so that on sm_90 no loop spills and no product is serialised, and that
gfx942's 64 KiB on chip suffice (`compile_list_prefill.py` lists what is compiled).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Rows and slots of a program's tile, its warps, pipeline depth, most registers a thread."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def options(self) -> dict[str, int]:
        """What a kernel is launched with."""
        registers = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, **registers}


@dataclass(frozen=True, slots=True, kw_only=True)
class Launches:
    """Of dense attention, lists of blocks, pairs (block_n unused), and of both passes of a choice
    (block_n units).

    unread_units: units of a tile where the terms of unread blocks are made beside the lists.
    """

    dense: Launch
    lists: Launch
    pairs: Launch
    log_sums: Launch
    shares: Launch
    unread_units: int


# Lists have one stage more: the entry is fetched one before the keys that it names. A limit of 128
# registers would let two such programs share a multiprocessor, but ptxas then waits after every
# single wgmma (C7512); smaller tiles than 128 x 128 rescale the output more often.
_WIDE = Launch(block_m=128, block_n=128, num_warps=8, num_stages=2)
NVIDIA = {
    64: Launches(
        dense=replace(_WIDE, num_stages=3),
        lists=replace(_WIDE, num_stages=3),
        pairs=Launch(block_m=64, block_n=64, num_warps=4, num_stages=2),
        log_sums=Launch(block_m=128, block_n=128, num_warps=8, num_stages=2),
        shares=Launch(block_m=128, block_n=128, num_warps=8, num_stages=2),
        unread_units=64,
    ),
    128: Launches(
        dense=_WIDE,
        lists=replace(_WIDE, num_stages=3),
        pairs=Launch(block_m=64, block_n=64, num_warps=4, num_stages=2),
        log_sums=Launch(block_m=128, block_n=64, num_warps=8, num_stages=2),
        shares=Launch(block_m=64, block_n=64, num_warps=4, num_stages=2),
        unread_units=32,
    ),
    256: Launches(
        dense=replace(_WIDE, block_n=64),
        lists=replace(_WIDE, block_n=64, num_stages=3),
        pairs=Launch(block_m=64, block_n=64, num_warps=8, num_stages=1),
        log_sums=Launch(block_m=64, block_n=32, num_warps=4, num_stages=2),
        shares=Launch(block_m=64, block_n=64, num_warps=4, num_stages=1),
        unread_units=16,
    ),
}
# 64 KiB on chip (gfx942) hold one stage of keys and values.
_ONE_STAGE = Launch(block_m=128, block_n=64, num_warps=4, num_stages=1)
_SMALL = Launch(block_m=64, block_n=32, num_warps=4, num_stages=1)
AMD = {
    64: Launches(
        dense=_ONE_STAGE,
        lists=_ONE_STAGE,
        pairs=_SMALL,
        log_sums=_SMALL,
        shares=_SMALL,
        unread_units=32,
    ),
    128: Launches(
        dense=_ONE_STAGE,
        lists=_ONE_STAGE,
        pairs=_SMALL,
        log_sums=_SMALL,
        shares=_SMALL,
        unread_units=32,
    ),
    256: Launches(
        dense=_SMALL,
        lists=_SMALL,
        pairs=_SMALL,
        log_sums=_SMALL,
        shares=_SMALL,
        unread_units=16,
    ),
}
LANES = 4  # threads that share a row of a product on NVIDIA
PAIR_ROWS = 512  # rows of q for which a block stays on chip


def launches(head_dim: int) -> Launches:
    """The launches of this build of torch."""
    return (AMD if torch.version.hip else NVIDIA)[head_dim]


def fitted(launch: Launch, *, rows: int, block: int = 128) -> Launch:
    """The launch with a tile no larger than what there is: rows of a tile, slots of a block.

    A program of fewer rows has one warpgroup and fewer slots, so that several share a
    multiprocessor, and needs no limit on registers.
    """
    block_m = min(launch.block_m, max(16, padded(rows)))
    if block_m == launch.block_m:
        return replace(launch, block_n=min(launch.block_n, block))
    block_n = min(launch.block_n, 64)
    return replace(launch, block_m=block_m, block_n=block_n, num_warps=4, max_registers=None)


def padded(n: int) -> int:
    """The power of two at or above n."""
    return 1 << (n - 1).bit_length()


def pairs_per_item(rows: int) -> int:
    """Pairs of `rows` rows that pass while a block stays on chip."""
    return max(1, PAIR_ROWS // rows)
