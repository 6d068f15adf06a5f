"""Starting before the kernel ahead is over (programmatic dependent launch, sm_90).

A kernel calls `take_turn` once: there it waits until the one ahead is over and what that wrote can
be seen, then lets the next one start, which by then may read whatever is older than its own
predecessor (CUDA programming guide, "Programmatic Dependent Launch"). So a kernel that is launched
with `early_launch` may read, before it takes its turn, weights, tables and what two launches before
left, but nothing that the last one wrote, and may write nothing. No bit of a result changes.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@functools.cache
def can_start_early(device: torch.device) -> bool:
    """Whether kernels of this device know about it."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device)[0] >= 9
    )


def early_launch(device: torch.device) -> dict[str, bool]:
    """Options of a kernel that may start early."""
    return {"EARLY": True, "launch_pdl": True} if can_start_early(device) else {"EARLY": False}


def ordered_launch(device: torch.device) -> dict[str, bool]:
    """Options of a kernel that starts when the last one is over, but lets the next start early."""
    return {"EARLY": can_start_early(device)}


@triton.jit
def take_turn(EARLY: tl.constexpr):
    """Wait until the kernel ahead is over, and let the next one start."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
