"""Starting before the kernel ahead is over (programmatic dependent launch, sm_90).

A kernel calls `let_next_start`, and the next one, if it was launched with `early_launch`, is set up
while the first still runs; it must call `wait_for_last` before it reads or writes anything (CUDA
programming guide, "Programmatic Dependent Launch"). Nothing of this changes a bit of a result.
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


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    """The next kernel may start."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def wait_for_last(EARLY: tl.constexpr):
    """Wait until whatever was launched before is over, and written."""
    if EARLY:
        gdc_wait()
